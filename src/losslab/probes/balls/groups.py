"""A risk's examples a few at a time, each few a risk of its own."""

from collections.abc import Generator

from losslab.operators import batches as kinds
from losslab.operators.risk import EmpiricalRisk


def groups(risk: EmpiricalRisk, m: int) -> Generator[EmpiricalRisk, None, None]:
    """The same loss as a function of the same parameters on m examples after m examples (this process's own).

    Batches are cut, never joined: a batch's last group may hold fewer. Use it inside `contextlib.closing(...)`: at the
    end, also of an interrupted computation, modes and random states of the model's owner come back.

    Raises:
        ValueError: m not a whole number ≥ 1, larger than the first batch, or a batch that cannot be cut because no
            tensor of it has the examples on its first axis.
    """
    if type(m) is not int or m < 1:
        raise ValueError(f"m: expected a number of examples >= 1, got {m!r}")
    with risk.evaluating():
        for number, (batch, count) in enumerate(risk.read()):
            if number == 0 and count < m:
                raise ValueError(f"m: expected at most the {count} examples of a batch, got {m}; make batches larger")
            for start in range(0, count, m):
                size = min(m, count - start)
                yield EmpiricalRisk(
                    risk.model,
                    risk.loss_fn,
                    [batch if size == count else kinds.rows_of(batch, count, slice(start, start + size), "m")],
                    params=risk.space.names,
                    mode=risk.mode,
                    check=False,
                    count_examples=lambda _, size=size: size,  # type: ignore[misc]
                )
