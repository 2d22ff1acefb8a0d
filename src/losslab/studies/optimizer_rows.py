"""Which settings act in which optimizer, and what each row takes where nothing is given. Needs no torch."""

from typing import Any

OWN = "module:path.to.Class"  # the row of all optimizers of users' own

# Optimizers that are made of another one, and of which they are by default.
BASES = {"sam": "sgd", "schedule_free": "adamw"}

# Of which it is known how much curvature they bear (`losslab.optim.homotopy.preconditioner.limit`).
BOUNDED = ("sgd", "momentum", "nesterov", "adam", "adamw", "talt")

# What is not named does nothing in a row and is refused there; `weight_decay` acts in all but one of one's own, and is
# 0 unless it is given.
# The numbers are the papers' (docs/optimizers.md names them), rates those for small networks.
ROWS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.1, "momentum": 0.0, "nesterov": False},
    "momentum": {"lr": 0.05, "momentum": 0.9},
    "nesterov": {"lr": 0.05, "momentum": 0.9},
    "adam": {"lr": 1e-3, "betas": (0.9, 0.999)},
    "adamw": {"lr": 1e-3, "betas": (0.9, 0.999)},
    "muon": {"lr": 3e-3, "momentum": 0.95, "betas": (0.9, 0.95)},
    "talt": {"lr": 5e-3, "betas": (0.9, 0.99)},
    "sam on sgd": {"lr": 0.05, "momentum": 0.9, "nesterov": False, "rho": 0.05},
    "sam on adamw": {"lr": 1e-3, "betas": (0.9, 0.999), "rho": 0.05},
    "soap": {"lr": 3e-3, "betas": (0.95, 0.95)},
    "shampoo": {"lr": 0.3},
    "lion": {"lr": 3e-4, "betas": (0.9, 0.99)},
    "schedule_free on sgd": {"lr": 1.0, "momentum": 0.9},
    "schedule_free on adamw": {"lr": 2.5e-3, "betas": (0.9, 0.999)},
    OWN: {"lr": 1e-3, "options": {}},  # torch's own default of its adaptive ones
}
NAMES = tuple(dict.fromkeys(row.partition(" on ")[0] for row in ROWS if row != OWN))


def is_own(name: str) -> bool:
    """Whether a name is that of an optimizer of the user's own."""
    return name.startswith("module:")


def row_of(name: str, base: str | None) -> str:
    """The key of `ROWS` for an optimizer, on its usual base where none is given."""
    if is_own(name):
        return OWN
    return f"{name} on {base or BASES[name]}" if name in BASES else name


def defaults(name: Any, base: Any) -> dict[str, Any]:
    """What a row takes where nothing is given; nothing for a row that does not exist."""
    known = isinstance(name, str) and (base is None or isinstance(base, str))
    settings = ROWS.get(row_of(name, base), {}) if known else {}
    return {**_sections(name), **settings} if settings else {}


def acting(name: str, base: str) -> set[str]:
    """The settings that act in a row."""
    decay = () if is_own(name) else ("weight_decay",)
    return {"name", *decay, *ROWS[row_of(name, base)], *_sections(name)}


def _sections(name: str) -> dict[str, Any]:
    """What acts besides a row's numbers: what it is made of, or TALT's section, whose defaults are its own."""
    if name in BASES:
        return {"base": BASES[name]}
    return {"talt": {}} if name == "talt" else {}
