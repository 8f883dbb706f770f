"""The shape of the code: imports point down, nothing needs the tests, files and functions stay small."""

import ast
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

# From top to bottom. A module may import from lower layers and from its own group, not from one beside it:
# the agent knows nothing of the worker. A name stands for all that is below it, too.
LAYERS: list[dict[str, set[str]]] = [
    {"command line": {"main"}, "operator's client": {"ctl", "ctlargs", "ctlview", "historyview", "stopped"}},
    {"the node": {"node"}},
    {
        "what it requires": {
            *("checks", "doctor", "reaching", "confinement", "requirements", "trying", "visible"),
        }
    },
    {
        "supervisor": {
            *(
                "supervisor",
                "slotset",
                "slots",
                "children",
                "desk",
                "jobuse",
                "jobindex",
                "orphans",
                "reloading",
            ),
            *("stopping", "historian", "storage", "sweeping", "allowing"),
        },
        "worker": {
            "worker",
            "jobrun",
            "starting",
            "execution",
            "supervision",
            "causes",
            "workspace",
            "diskuse",
            "warming",
        },
        "agent": {
            *("agent", "workbench", "pulling", "taking", "intake", "progress", "reporting", "delivery"),
            *("reruns", "fleet", "fleetwatch", "pruning", "recovery", "nodetoken", "queue_shared"),
            *("assignments", "idling", "ondemand", "persisting", "anchor"),
        },
        "heartbeat": {"heartbeat", "registration", "reports"},
    },
    {
        "coordinator": {"coordinator"},
        "control socket": {"control", "history"},
        "telemetry": {"telemetry", "pages", "counters", "sampling"},
        "running jobs": {
            *("runners", "runnerset", "sandbox", "ownmounts", "gpuview", "spawn", "syscalls", "leftovers"),
            "task",
        },
        "inputs and artifacts": {"inputs", "inputurls", "artifacts", "joblog"},
    },
    {
        "jobs": {
            *("jobs", "records", "reserve", "messages", "slot", "placing", "retrying", "accounts"),
            *("services", "serviceresult", "receipts"),
        },
        "queue": {"queue", "queue_sqlite", "queue_redis"},
    },
    {
        "configuration": {
            *("config", "configvalues", "credentials", "slotspec"),
            *("allowlist", "abuse", "argrules", "arggrammar", "argvalues", "argpatterns"),
        },
        "discovery": {"probe", "gpu", "nvml", "gpunodes", "privileges"},
        "channel": {"channel"},
        "database": {"database"},
    },
    {
        "cgroup": {"cgroup", "cgrouplimits", "delegation", "slotgroup"},
        "the machine": {"topology", "layout", "fitting"},
    },
    {"util": {"util"}},
    {"errors": {"errors", ""}},
]
PLACES = {name: (row, group) for row, layer in enumerate(LAYERS) for group in layer for name in layer[group]}


class Import(NamedTuple):
    """One import of a module, by the full name of what is imported."""

    line: int
    target: str


def place(module: str) -> tuple[int, str]:
    top = module.partition(".")[0]
    assert top in PLACES, f"{module} is in no layer: give it its place in the table above"
    return PLACES[top]


def imports(tree: ast.Module) -> Iterator[Import]:
    """Yield all imports, those inside functions included, but not those that only a type checker sees."""
    hidden = {id(node) for block in ast.walk(tree) if _is_type_checking(block) for node in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            yield from (Import(node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


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


def test_the_table_names_what_there_is() -> None:
    assert set(PLACES) == {module.partition(".")[0] for module in SOURCES if module != "__init__"} | {""}
    assert len(PLACES) == sum(len(names) for layer in LAYERS for names in layer.values())


@pytest.mark.parametrize("module", [module for module in SOURCES if module != "__init__"])
def test_imports_point_down(module: str) -> None:
    row, group = place(module)
    wrong = []
    for line, target in imports(parse(module)):
        imported = our_module(target)
        if imported is None:
            continue
        to_row, to_group = place(imported)
        if to_row < row or (to_row == row and to_group != group):
            wrong.append(f"{module}:{line} ({group}) imports {imported} ({to_group})")
    assert wrong == []


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {
        module: {found for _, target in imports(parse(module)) if (found := our_module(target))} - {module}
        for module in SOURCES
    }
    while leaves := {module for module, needs in graph.items() if not needs}:
        graph = {module: needs - leaves for module, needs in graph.items() if module not in leaves}
    assert graph == {}


@pytest.mark.parametrize("module", SOURCES)
def test_what_is_shipped_needs_neither_tests_nor_tools(module: str) -> None:
    known = {"tests", "tools", *(path.stem for path in Path(__file__).parent.glob("*.py"))}
    test_libraries = {"pytest", "hypothesis", "responses", "_pytest"}
    roots = {target.partition(".")[0] for _, target in imports(parse(module))}
    assert roots & (known | test_libraries) == set()


def test_the_supervisor_loads_no_network_code() -> None:
    """By what its modules import in turn; the node itself forks the other processes and so loads all."""
    seen: set[str] = set()
    waiting = ["supervisor"]
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
    assert "slot" in seen
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
