"""What every measurement starts from is a risk: a model alone has no loss and no data."""

from losslab.operators.risk import EmpiricalRisk


def require_risk(risk: object) -> None:
    """Refuse a model, or anything else, where a risk is expected.

    Raises:
        TypeError: It is none.
    """
    if not isinstance(risk, EmpiricalRisk):
        raise TypeError(
            f"risk: expected an EmpiricalRisk, got {type(risk).__name__}; "
            "make one: EmpiricalRisk(model, loss_fn, batches)"
        )
