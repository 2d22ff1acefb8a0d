"""The founders' bound on bits: its formula by hand, its units, and what it is worth."""

import math

import pytest
import torch

from losslab.optim import mantissa_bits, precision_advice, required_precision


@pytest.mark.parametrize(
    ("arguments", "bits"),
    [  # κ, D, ε, c
        ((1.0, 1.0, 1.0), 0.0),
        ((2.0, 8.0, 0.5), 8.0),  # 1 + 6 + 1
        ((1024.0, 1.0, 2.0**-20), 30.0),
        ((1024.0, 4.0, 2.0**-20, 0.25), 32.0),
        ((1e4, 10.0, 1e-3), math.log2(1e9)),
        ((1e-9, 1.0, 1.0), 0.0),  # not fewer than none
        ((0.0, 1.0, 1e-9), 0.0),
        ((1.0, 0.0, 1e-9), 0.0),
        ((math.inf, 1.0, 1.0), math.inf),
        ((1e300, 1e200, 1e-300), (300 + 400 + 300) * math.log2(10)),  # no overflow
    ],
)
def test_bits_are_those_of_a_table_made_by_hand(arguments, bits):
    assert required_precision(*arguments) == pytest.approx(bits, rel=1e-12)


def test_four_times_the_curvature_asks_for_two_bits():
    assert required_precision(4e5, 3.0, 1e-3) - required_precision(1e5, 3.0, 1e-3) == pytest.approx(2.0)


def test_another_unit_of_the_loss_changes_the_bound_though_not_the_rounding():
    """A loss times s has κ/s and ε·s: s² times less, where doubling changes no rounding at all."""
    for s in (2.0, 1024.0):
        change = required_precision(1e5 / s, 3.0, 1e-3 * s) - required_precision(1e5, 3.0, 1e-3)
        assert change == pytest.approx(-2 * math.log2(s))


def test_a_descent_in_one_dimension_reaches_far_less_than_the_bound_allows():
    """½(θ − ⅓)² at loss L has κ = 1/2L, D = ⅓: the bound is met with ε = L at L = D·2^(−p/2)/√2."""
    theta = torch.zeros((), dtype=torch.float32)
    for _ in range(100):
        theta -= 0.5 * (theta - torch.tensor(1 / 3))
    reached = 0.5 * (float(theta) - 1 / 3) ** 2
    bound = 2.0**-12 / (3 * math.sqrt(2))
    assert required_precision(1 / (2 * bound), 1 / 3, bound) == pytest.approx(24.0)
    assert reached < 1e-8 * bound


@pytest.mark.parametrize(
    ("dtype", "bits"), [(torch.bfloat16, 8), (torch.float16, 11), (torch.float32, 24), (torch.float64, 53)]
)
def test_advice_begins_where_the_mantissa_ends(dtype, bits):
    assert mantissa_bits(dtype) == bits
    assert precision_advice(2.0**bits, 1.0, 1.0, dtype) is None
    said = precision_advice(2.0 ** (bits + 1), 1.0, 1.0, dtype)
    name = str(dtype).removeprefix("torch.")
    assert f"ask for {bits + 1}.0 bits and {name} has {bits}; " in said
    assert said.endswith("expect ε of 2")
    assert "\n" not in said


def test_advice_names_the_next_type_that_is_enough():
    def advised(bits, dtype=torch.bfloat16):
        return precision_advice(2.0**bits, 1.0, 1.0, dtype)

    assert "use float16, or expect" in advised(11)
    assert "use float32, or expect" in advised(12)
    assert "use float64, or expect" in advised(25)
    assert "no type has so many: expect" in advised(54)
    assert "use float64" in advised(25, torch.float32)
    assert "expect ε of inf" in precision_advice(1e300, 1e300, 1e-9, torch.float64)
    assert "ask for 18.6 bits" in precision_advice(1e2, 10.0, 0.1, torch.bfloat16, c=4.0)


@pytest.mark.parametrize("kappa", [math.inf, math.nan])
def test_a_curvature_that_is_not_finite_gets_no_advice(kappa):
    assert precision_advice(kappa, 1.0, 1e-9, torch.bfloat16) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1.0, 1.0, 1.0), r"^kappa: expected a number of at least 0, got -1\.0$"),
        ((math.nan, 1.0, 1.0), r"^kappa: expected a number of at least 0, got nan$"),
        ((1.0, -1.0, 1.0), r"^diameter: expected a finite number of at least 0, got -1\.0$"),
        ((1.0, math.inf, 1.0), r"^diameter: expected a finite number of at least 0, got inf$"),
        ((1.0, 1.0, 0.0), r"^eps: expected a finite number above 0, got 0\.0$"),
        ((1.0, 1.0, 1.0, 0), r"^c: expected a finite number above 0, got 0$"),
    ],
)
def test_a_number_out_of_range_is_refused_by_its_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        required_precision(*arguments)


@pytest.mark.parametrize("dtype", [torch.int64, "float32", None])
def test_a_type_that_does_not_float_is_refused(dtype):
    with pytest.raises(ValueError, match=r"^dtype: expected a floating torch\.dtype, got "):
        precision_advice(1.0, 1.0, 1.0, dtype)
