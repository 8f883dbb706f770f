"""The shape of the code: imports point down, nothing needs the tests, files and functions stay small."""

import ast
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import aitbc_miner

PACKAGE = Path(aitbc_miner.__file__).parent
SOURCES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

# From top to bottom, packages and the modules beside them. Each may import from those in rows below it, and
# from itself, not from those beside it: the agent knows nothing of the worker.
ROWS = [
    {"main", "ctl"},
    {"node"},
    {"preflight"},
    {"supervisor", "worker", "agent", "heartbeat"},
    {"coordinator", "control", "telemetry", "queue", "runners", "inputs"},
    {"allowlist", "store", "ipc", "sandbox"},
    {"slots"},
    {"probe", "task"},
    {"gpu", "cgroup"},
    {"config", "jobs"},
    {"identity"},
    {"util"},
    {"errors", "__init__"},
]
ROW_OF = {name: row for row, names in enumerate(ROWS) for name in names}
# Their import names are kept, so they hand on what others import of them.
FACES = {"config", "queue"}
MOST_FILES = 20


class Import(NamedTuple):
    """One import of a module, by the full name of what is imported."""

    line: int
    target: str


def package_of(module: str) -> str:
    return module.partition(".")[0]


def imports(tree: ast.Module) -> Iterator[Import]:
    """Yield all imports, those inside functions and those that only a type checker sees included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            yield from (Import(node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def our_module(target: str) -> str | None:
    """Name the module of ours that an import leads to: of `aitbc_miner.util.fs.exists` it is `util.fs`."""
    root, _, rest = target.partition(".")
    if root != "aitbc_miner":
        return None
    while rest and rest not in SOURCES:
        rest = rest.rpartition(".")[0]
    return rest


def parse(module: str) -> ast.Module:
    return ast.parse(SOURCES[module].read_text(), SOURCES[module].name)


def graph() -> dict[str, set[str]]:
    """Say which modules of ours each imports; a package stands for its __init__."""
    return {
        module: {found for _, target in imports(parse(module)) if (found := our_module(target))} - {module}
        for module in SOURCES
    }


def circles(needs: dict[str, set[str]]) -> dict[str, set[str]]:
    """Take away what needs nothing that is left, until only circles and those who need them are left."""
    while leaves := {each for each, needed in needs.items() if not needed}:
        needs = {each: needed - leaves for each, needed in needs.items() if each not in leaves}
    return needs


def test_every_package_has_its_row() -> None:
    assert ROW_OF.keys() == {package_of(module) for module in SOURCES}
    assert len(ROW_OF) == sum(map(len, ROWS))


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_down(module: str) -> None:
    own = package_of(module)
    wrong = [
        f"{module}:{line} imports {imported}"
        for line, target in imports(parse(module))
        if (imported := our_module(target)) is not None
        and package_of(imported or "__init__") != own
        and ROW_OF[package_of(imported or "__init__")] <= ROW_OF[own]
    ]
    assert wrong == []


def test_no_module_imports_itself_in_a_circle() -> None:
    assert circles(graph()) == {}


def test_no_package_imports_itself_in_a_circle() -> None:
    needs: dict[str, set[str]] = {}
    for module, imported in graph().items():
        needs.setdefault(package_of(module), set()).update(map(package_of, imported))
    assert circles({package: needed - {package} for package, needed in needs.items()}) == {}


def test_a_circle_is_seen() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}).keys() == {"a", "b", "c"}


PACKAGES = sorted({module for module in SOURCES if SOURCES[module].name == "__init__.py"} - {"__init__"})


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_names_its_files_and_has_at_most_20(package: str) -> None:
    tree = parse(package)
    listed = re.findall(r"^\* ([\w, ]+):", ast.get_docstring(tree) or "", re.MULTILINE)
    named = [name for line in listed for name in line.split(", ")]
    there = {path.stem for path in SOURCES[package].parent.glob("*.py")} - {"__init__"}
    assert sorted(named) == sorted(there)
    assert len(there) <= MOST_FILES
    assert package in FACES or len(tree.body) == 1


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("config", ["Config", "load_config"]),
        ("queue", ["Claim", "Kind", "QueueError", "RetryQueue", "Task"]),
        *((name, []) for name in ("main", "agent", "probe", "task", "runners.cli", "runners.python")),
        *((name, []) for name in ("util.fs", "util.limits", "util.log")),
    ],
)
def test_what_others_import_stays_where_it_is(module: str, names: list[str]) -> None:
    there = importlib.import_module(f"aitbc_miner.{module}")
    assert [name for name in names if not hasattr(there, name)] == []
    assert set(names) <= set(getattr(there, "__all__", []))


@pytest.mark.parametrize("module", SOURCES)
def test_what_is_shipped_needs_neither_tests_nor_tools(module: str) -> None:
    ours = {"tests", "tools"}
    test_libraries = {"pytest", "hypothesis", "responses", "_pytest"}
    roots = {target.partition(".")[0] for _, target in imports(parse(module))}
    assert roots & (ours | test_libraries) == set()


def test_the_supervisor_loads_no_network_code() -> None:
    """By what its modules import in turn; the node itself forks the other processes and so loads all."""
    seen: set[str] = set()
    waiting = ["supervisor.loop"]
    foreign: set[str] = set()
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        for _, target in imports(parse(module)):
            ours = our_module(target)
            if ours is None:
                foreign.add(target.partition(".")[0])
            elif ours:
                waiting.append(ours)
    assert "slots.state" in seen
    assert (
        foreign & {"requests", "requests_toolbelt", "urllib3", "http", "ssl", "threading", "asyncio"} == set()
    )


@pytest.mark.parametrize("module", SOURCES)
def test_only_known_libraries_are_used(module: str) -> None:
    declared = {"cgroupspy", "re2", "msgspec", "pynvml", "prometheus_client", "psutil", "pyseccomp", "yaml"}
    declared |= {"requests", "requests_toolbelt", "urllib3", "redis", "cryptography", "aitbc_miner"}
    roots = {target.partition(".")[0] for _, target in imports(parse(module))}
    assert roots - declared - sys.stdlib_module_names == set()


@pytest.mark.parametrize("module", SOURCES)
def test_a_file_stays_under_400_lines(module: str) -> None:
    lines = len(SOURCES[module].read_text().splitlines())
    assert lines < 400


@pytest.mark.parametrize("module", SOURCES)
def test_a_function_stays_under_40_lines(module: str) -> None:
    sizes = {
        node.name: (node.end_lineno or 0) - node.lineno + 1
        for node in ast.walk(parse(module))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: lines for name, lines in sizes.items() if lines >= 40} == {}
