"""The house's layers, held by a test: a module imports only from rows below its own, deferred imports counted."""

import ast
from pathlib import Path

import losslab

PACKAGE = Path(losslab.__file__).parent

# Top to bottom. Names in one row never import each other.
LAYERS = [
    {"__main__"},
    {"cli"},
    {"analyzer", "integrations"},
    {"report"},
    {"studies"},
    {"probes", "optim"},
    {"solvers"},
    {"operators"},
    {"params", "random", "status", "records", "memory", "ranks", "_version"},
]
RANK = {name: rank for rank, row in enumerate(LAYERS) for name in row}


def modules() -> dict[str, ast.Module]:
    """Every module of the package by its dotted name, parsed."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = ast.parse(path.read_text())
    return found


def first_party_imports(tree: ast.Module) -> set[str]:
    """Dotted names below losslab that a module imports anywhere, in functions too."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layer they cross"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("losslab.") for name in names if name.startswith("losslab.")}


def test_every_module_has_a_layer():
    unknown = {name.split(".")[0] for name in modules()} - RANK.keys() - {""}
    assert not unknown, f"add {unknown} to LAYERS"


def test_imports_point_down():
    wrong = []
    for name, tree in modules().items():
        here = name.split(".")[0]
        if not here:
            continue
        for imported in first_party_imports(tree):
            there = imported.split(".")[0]
            if there in RANK and there != here and RANK[there] <= RANK[here]:
                wrong.append(f"{name} imports {imported}")
    assert not wrong, wrong


def test_no_import_cycles():
    names = modules()

    def target(imported: str) -> str:
        """The module that a dotted name lies in: its longest prefix that is one."""
        while imported and imported not in names:
            imported = imported.rpartition(".")[0]
        return imported

    graph = {name: {target(i) for i in first_party_imports(tree)} - {name, ""} for name, tree in names.items() if name}
    while graph:
        leaves = [name for name, imports in graph.items() if not imports & graph.keys()]
        assert leaves, f"a cycle among {sorted(graph)}"
        for name in leaves:
            del graph[name]


def test_no_deferred_first_party_imports():
    deferred = [
        f"{name}:{node.lineno}"
        for name, tree in modules().items()
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("losslab")
    ]
    assert not deferred, deferred


def test_report_never_imports_torch():
    below = ("records", "status", "studies.record", "studies.config", "studies.sections", "studies.config_file")
    for name, tree in modules().items():
        if name.startswith("report") or name in below:
            imported = {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
            imported |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
            assert not any(i.split(".")[0] in ("torch", "lightning_fabric") for i in imported), name
