"""Other names for probes and their settings: those of earlier scripts, so that their command lines keep working."""

from collections.abc import Iterable, Iterator

PROBES = {
    "lanczos": "spectrum",
    "hessian_lanczos": "spectrum",
    "sgd_noise": "noise",
    "intrinsic_dim": "intrinsic_dimension",
    "auto_neb": "elastic_band",
    "neb": "elastic_band",
}
SETTINGS = {
    "intrinsic_dimension": {"d_sub": "dimension"},
    "elastic_band": {"n_nodes": "num_nodes", "iters": "steps"},
}


def probe_name(name: str) -> str:
    """The probe that a name stands for; unknown ones stay."""
    plain = name.replace("-", "_")
    return PROBES.get(plain, plain)


def assignments(probe: str, arguments: Iterable[str]) -> Iterator[str]:
    """`--k 3`, `--k=3` and `--recalibrate` as "k=3" and "recalibrate=true", under the probe's own names.

    Raises:
        ValueError: A value without a name.
    """
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        if not argument.startswith("--"):
            raise ValueError(f"{argument}: expected --NAME VALUE with one of the probe's settings")
        name, given, value = argument[2:].partition("=")
        if not given:
            value = waiting.pop(0) if waiting and not waiting[0].startswith("--") else "true"
        plain = name.replace("-", "_")
        yield f"{SETTINGS.get(probe, {}).get(plain, plain)}={value}"
