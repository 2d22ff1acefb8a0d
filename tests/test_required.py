"""Everything public that measures a risk says so to whoever gives it a model."""

import inspect

import pytest
from torch import nn

import losslab as ll

MEASURES = sorted(
    name
    for name in dir(ll)
    if inspect.isroutine(getattr(ll, name)) or inspect.isclass(getattr(ll, name))
    if list(inspect.signature(getattr(ll, name)).parameters)[:1] == ["risk"]
)


def test_there_are_operators_and_probes_among_them():
    assert {"Hessian", "GaussNewton", "spectrum", "curve", "trajectory"} <= {*MEASURES}


@pytest.mark.parametrize("name", MEASURES)
def test_a_model_is_no_risk(name):
    measure = getattr(ll, name)
    needed = [p for p in list(inspect.signature(measure).parameters.values())[1:] if p.default is p.empty]
    by_name = {p.name: None for p in needed if p.kind is p.KEYWORD_ONLY}
    by_place = [None for p in needed if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    with pytest.raises(TypeError, match=r"^risk: expected an EmpiricalRisk, got Linear; make one"):
        measure(nn.Linear(2, 1), *by_place, **by_name)
