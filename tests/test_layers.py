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
    {
        "command line": {"aitbc_miner.main"},
        "operator's client": {
            "aitbc_miner.ctl.main",
            "aitbc_miner.ctl.arguments",
            "aitbc_miner.ctl.pages",
            "aitbc_miner.ctl.history_page",
            "aitbc_miner.ctl.stopped_node",
        },
    },
    {
        "the node": {"aitbc_miner.node"},
    },
    {
        "what it requires": {
            "aitbc_miner.preflight.check",
            "aitbc_miner.preflight.confinement",
            "aitbc_miner.preflight.doctor",
            "aitbc_miner.preflight.network",
            "aitbc_miner.preflight.requirements",
            "aitbc_miner.preflight.try_sandbox",
            "aitbc_miner.preflight.sandbox_view",
        },
    },
    {
        "supervisor": {
            "aitbc_miner.supervisor.allowing",
            "aitbc_miner.supervisor.children",
            "aitbc_miner.supervisor.control_api",
            "aitbc_miner.supervisor.historian",
            "aitbc_miner.supervisor.job_index",
            "aitbc_miner.supervisor.job_use",
            "aitbc_miner.supervisor.adoption",
            "aitbc_miner.supervisor.reload",
            "aitbc_miner.supervisor.running_slot",
            "aitbc_miner.supervisor.slot_pool",
            "aitbc_miner.supervisor.shutdown",
            "aitbc_miner.supervisor.disk_watch",
            "aitbc_miner.supervisor.loop",
            "aitbc_miner.supervisor.sweep",
        },
        "worker": {
            "aitbc_miner.worker.causes",
            "aitbc_miner.worker.disk_use",
            "aitbc_miner.worker.monitor",
            "aitbc_miner.worker.job_run",
            "aitbc_miner.worker.launch",
            "aitbc_miner.worker.link",
            "aitbc_miner.worker.prewarm",
            "aitbc_miner.worker.loop",
            "aitbc_miner.worker.workspace",
        },
        "agent": {
            "aitbc_miner.agent.loop",
            "aitbc_miner.agent.anchor",
            "aitbc_miner.agent.reconcile",
            "aitbc_miner.agent.delivery",
            "aitbc_miner.agent.fleet",
            "aitbc_miner.agent.fleet_watch",
            "aitbc_miner.agent.idle_monitor",
            "aitbc_miner.agent.admission",
            "aitbc_miner.agent.node_token",
            "aitbc_miner.agent.ondemand",
            "aitbc_miner.agent.local_faults",
            "aitbc_miner.agent.progress",
            "aitbc_miner.agent.retention",
            "aitbc_miner.agent.pull",
            "aitbc_miner.queue.shared",
            "aitbc_miner.agent.recovery",
            "aitbc_miner.agent.delivery_queue",
            "aitbc_miner.agent.retries",
            "aitbc_miner.agent.admission_queue",
            "aitbc_miner.agent.context",
        },
        "heartbeat": {
            "aitbc_miner.heartbeat.loop",
            "aitbc_miner.heartbeat.registration",
            "aitbc_miner.heartbeat.status_report",
        },
    },
    {
        "coordinator": {"aitbc_miner.coordinator"},
        "control socket": {"aitbc_miner.control.server", "aitbc_miner.supervisor.history"},
        "telemetry": {
            "aitbc_miner.telemetry.counters",
            "aitbc_miner.telemetry.pages",
            "aitbc_miner.telemetry.sampling",
            "aitbc_miner.telemetry.metrics",
        },
        "running jobs": {
            "aitbc_miner.gpu.job_view",
            "aitbc_miner.worker.cleanup",
            "aitbc_miner.sandbox.private_mounts",
            "aitbc_miner.runners",
            "aitbc_miner.runners.registry",
            "aitbc_miner.sandbox.bubblewrap",
            "aitbc_miner.sandbox.spawn",
            "aitbc_miner.sandbox.seccomp",
            "aitbc_miner.task",
        },
        "inputs and artifacts": {
            "aitbc_miner.worker.artifacts",
            "aitbc_miner.agent.inputs",
            "aitbc_miner.agent.input_urls",
            "aitbc_miner.worker.job_log",
        },
    },
    {
        "jobs": {
            "aitbc_miner.store.ledger",
            "aitbc_miner.jobs",
            "aitbc_miner.ipc.messages",
            "aitbc_miner.slots.placement",
            "aitbc_miner.identity.receipts",
            "aitbc_miner.store.records",
            "aitbc_miner.store.reserve",
            "aitbc_miner.agent.retry_policy",
            "aitbc_miner.coordinator.service_result",
            "aitbc_miner.coordinator.services",
            "aitbc_miner.slots.state",
        },
        "queue": {
            "aitbc_miner.queue",
            "aitbc_miner.queue.interface",
            "aitbc_miner.queue.redis",
            "aitbc_miner.queue.sqlite",
        },
    },
    {
        "configuration": {
            "aitbc_miner.allowlist.abuse",
            "aitbc_miner.allowlist.entries",
            "aitbc_miner.allowlist.grammar",
            "aitbc_miner.allowlist.patterns",
            "aitbc_miner.allowlist.rules",
            "aitbc_miner.allowlist.values",
            "aitbc_miner.config",
            "aitbc_miner.config.settings",
            "aitbc_miner.config.values",
            "aitbc_miner.identity.credentials",
            "aitbc_miner.slots.spec",
        },
        "discovery": {
            "aitbc_miner.gpu.reader",
            "aitbc_miner.gpu.devices",
            "aitbc_miner.gpu.nvml",
            "aitbc_miner.sandbox.users",
            "aitbc_miner.probe.machine",
        },
        "channel": {"aitbc_miner.ipc.channel"},
        "database": {"aitbc_miner.store.database"},
    },
    {
        "cgroup": {
            "aitbc_miner.cgroup.group",
            "aitbc_miner.slots.cgroup_limits",
            "aitbc_miner.cgroup.delegation",
            "aitbc_miner.slots.cgroups",
        },
        "the machine": {
            "aitbc_miner.slots.fit",
            "aitbc_miner.slots.cpu_layout",
            "aitbc_miner.probe.topology",
        },
    },
    {
        "util": {
            "aitbc_miner.util",
            "aitbc_miner.config.document",
            "aitbc_miner.config.yaml_text",
            "aitbc_miner.config.yaml_types",
            "aitbc_miner.config.units",
            "aitbc_miner.config.dropins",
            "aitbc_miner.control.listening",
            "aitbc_miner.telemetry.httpd",
        },
    },
    {
        "errors": {"aitbc_miner", "aitbc_miner.errors"},
    },
]
PLACES = {name: (row, group) for row, layer in enumerate(LAYERS) for group in layer for name in layer[group]}


class Import(NamedTuple):
    """One import of a module, by the full name of what is imported."""

    line: int
    target: str


def place(module: str) -> tuple[int, str]:
    name = _listed(module)
    assert name, f"{module} is in no layer: give it its place in the table above"
    return PLACES[name]


def _listed(module: str) -> str:
    """Name the entry that speaks for a module: its own, or that of a package around it."""
    name = f"aitbc_miner.{module}".removesuffix(".__init__").rstrip(".")
    while name and name not in PLACES:
        name = name.rpartition(".")[0]
    return name if name != "aitbc_miner" or module in {"", "__init__"} else ""


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
    modules = {f"aitbc_miner.{module}" for module in SOURCES if module != "__init__"}
    assert {
        name for name in PLACES if not any(f"{each}.".startswith(f"{name}.") for each in modules)
    } == set()
    assert len(PLACES) == sum(len(names) for layer in LAYERS for names in layer.values())


# An __init__.py that only says what the package holds has no place of its own.
PLACED = [module for module in SOURCES if any(True for _ in imports(parse(module)))]


@pytest.mark.parametrize("module", PLACED)
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
