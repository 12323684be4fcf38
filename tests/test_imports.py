"""Who may import whom, who may touch sockets, and that each module's `__all__` is true. Read from the sources; nothing is run."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

import dairllm

ROOT = Path(dairllm.__file__).parent

BASE = {
    *("errors", "units", "machine", "config", "config_document", "config_addresses", "config_names", "config_sources"),
    *("log_lines", "log_sink", "telemetry", "dairllm"),
}
"""Modules below all packages; "dairllm" is the package's own __init__."""

MAY_IMPORT = {
    **dict.fromkeys(BASE, BASE),
    "graph": BASE,
    "formats": BASE | {"graph"},
    "text": BASE | {"graph", "formats"},
    "kernels": BASE | {"graph"},
    "engine": BASE | {"graph", "formats", "kernels"},
    "paging": BASE | {"graph", "formats", "kernels", "engine"},
    "protocol": BASE | {"graph"},
    "net": BASE,
}
MAY_IMPORT["runtime"] = BASE | {"graph", "formats", "kernels", "engine", "paging", "net"}
MAY_IMPORT["serving"] = MAY_IMPORT["runtime"] | {"text", "runtime"}
MAY_IMPORT["cluster"] = MAY_IMPORT["runtime"] | {"protocol", "runtime"}
MAY_IMPORT["api"] = MAY_IMPORT["serving"] | {"serving"}
MAY_IMPORT["bench"] = MAY_IMPORT["cluster"] | MAY_IMPORT["serving"] | {"cluster", "serving"}
MAY_IMPORT["commands"] = MAY_IMPORT["bench"] | {"api", "bench"}
MAY_IMPORT["cli"] = MAY_IMPORT["commands"] | {"commands"}
MAY_IMPORT["__main__"] = {"cli"}

TOUCHES_THE_NETWORK = {"asyncio", "uvloop", "socket", "selectors", "socketserver", "ssl", "http", "urllib", "uvicorn", "starlette"}
MAY_TOUCH_IT = {"net", "runtime", "cluster", "serving", "bench", "api", "commands", "cli"}

FORBIDDEN = {
    "kernels": {"structlog", "logging", "pydantic", "yaml", "rich", "typer"},  # arithmetic alone
    "protocol": {"time", "threading", "os", "structlog", "logging"},  # bytes in, events out: no clocks, no threads, no I/O
    "graph": {"os", "pathlib", "structlog", "logging"},  # nouns
}


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def package_of(path: Path) -> str:
    """The part of the house that a file belongs to: its package, or the module's own name at the top."""
    relative = path.relative_to(ROOT)
    if len(relative.parts) > 1:
        return relative.parts[0]
    return "dairllm" if relative.stem == "__init__" else relative.stem


def dotted(path: Path) -> str:
    parts = ("dairllm", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {dotted(path): path for path in modules()}


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path: Path) -> Iterator[tuple[str, str | None, int]]:
    """(module, name or None, line) of every import statement of a file, wherever it stands."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, None, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            assert node.module is not None
            for alias in node.names:
                yield node.module, alias.name, node.lineno


def target_package(module: str, name: str | None) -> str:
    """Which part of the house `from module import name` reaches into."""
    parts = module.split(".")
    if len(parts) > 1:
        return parts[1]
    return name if name is not None and f"dairllm.{name}" in FILES else "dairllm"


@pytest.fixture(params=modules(), ids=dotted)
def path(request: pytest.FixtureRequest) -> Path:
    found = request.param
    assert isinstance(found, Path)
    return found


def test_imports_point_one_way(path: Path) -> None:
    package = package_of(path)
    assert package in MAY_IMPORT, f"{package} has no place in the order of imports yet: give it one here"
    for module, name, line in imported(path):
        if module.split(".")[0] == "dairllm":
            target = target_package(module, name)
            assert target == package or target in MAY_IMPORT[package], f"{path}:{line}: {package} must not import {target}"


def test_only_the_shells_touch_the_network(path: Path) -> None:
    package = package_of(path)
    for module, _, line in imported(path):
        top = module.split(".")[0]
        assert package in MAY_TOUCH_IT or top not in TOUCHES_THE_NETWORK, f"{path}:{line}: {top} in {package}"
        assert top not in FORBIDDEN.get(package, ()), f"{path}:{line}: {top} in {package}"


def test_all_is_there_and_true(path: Path) -> None:
    tree = parsed(path)
    listed = list(public_names(tree))
    assert listed or path.name in {"__init__.py", "__main__.py"}, f"{path}: no __all__, or nothing in it"
    assert len(set(listed)) == len(listed), f"{path}: a name stands twice in __all__"
    missing = set(listed) - set(defined_names(tree))
    assert not missing, f"{path}: __all__ names what is not there: {missing}"


def test_nothing_private_is_imported(path: Path) -> None:
    for module, name, line in imported(path):
        if name is not None and module in FILES and f"{module}.{name}" not in FILES:
            listed = set(public_names(parsed(FILES[module])))
            assert name in listed, f"{path}:{line}: {name} is not in {module}.__all__"


def public_names(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target if isinstance(node, ast.AnnAssign) else None
        if isinstance(target, ast.Name) and target.id == "__all__":
            assert isinstance(node, ast.Assign | ast.AnnAssign)
            assert isinstance(node.value, ast.List | ast.Tuple), "__all__ is to be a plain list"
            for element in node.value.elts:
                assert isinstance(element, ast.Constant)
                assert isinstance(element.value, str)
                yield element.value


def defined_names(tree: ast.Module) -> Iterator[str]:
    """Names that a module binds at its top level, in plain statements, `if` and `try`."""
    waiting: list[ast.stmt] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name.split(".")[0]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for part in ast.walk(target):
                    if isinstance(part, ast.Name):
                        yield part.id
        elif isinstance(node, ast.If | ast.Try | ast.With):
            waiting += node.body
            waiting += getattr(node, "orelse", [])


def test_a_running_process_needs_no_compiler() -> None:
    """What imports numba or LLVM when it is imported itself is a kernel, and nothing but kernels imports one so."""
    direct: dict[str, set[str]] = {}
    for module, path in FILES.items():
        top = parsed(path).body
        froms = [node for node in top if isinstance(node, ast.ImportFrom) and node.module]
        direct[module] = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
        direct[module] |= {node.module for node in froms if node.module}
        direct[module] |= {f"{node.module}.{alias.name}" for node in froms for alias in node.names}
    need = {module for module, names in direct.items() if {name.split(".")[0] for name in names} & {"numba", "llvmlite"}}
    while more := {module for module, names in direct.items() if names & need} - need:
        need |= more
    assert "dairllm.kernels.interpreter" in need
    assert {module for module in need if not module.startswith("dairllm.kernels.")} == set()
    assert not need & {f"dairllm.kernels.{name}" for name in ("entry", "forms", "panels", "records", "sizes")}
