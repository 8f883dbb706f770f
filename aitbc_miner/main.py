"""`aitbc-miner`: runs the node, or shows and checks the machine and the configuration."""

import argparse
import os
import sys
from functools import partial
from pathlib import Path

import msgspec

from aitbc_miner.config.document import Fault
from aitbc_miner.config.settings import Config, WorkspaceSection, derive_node_id, load_config
from aitbc_miner.errors import EXIT_CONFIG, EXIT_FAILURE, EXIT_OK
from aitbc_miner.gpu.reader import GpuList, GpuReader
from aitbc_miner.preflight.check import Checker, machine_facts, told_of
from aitbc_miner.preflight.doctor import diagnose
from aitbc_miner.preflight.requirements import NodePlace, RequirementError, require, resolved
from aitbc_miner.probe.machine import capabilities, probe_machine, render_page
from aitbc_miner.runners.task_catalogue import FoundTask, list_tasks, params_of, told
from aitbc_miner.sandbox.users import resolve
from aitbc_miner.slots.derive import derive_slots, lay_out
from aitbc_miner.slots.reader import read_slots, to_yaml
from aitbc_miner.slots.spec import SlotSpec
from aitbc_miner.util.build import build
from aitbc_miner.util.inherited import begin_command, begin_node
from aitbc_miner.util.terminal import until_unread, width, wrap

CONFIG = Path("/etc/aitbc/miner/config.yaml")


def start() -> int:
    """Run the program `aitbc-miner`."""
    begin_command()
    arguments = _parser().parse_args()
    if arguments.verb == "run":
        try:
            arguments.config = arguments.config.absolute()
        except FileNotFoundError:
            print(
                f"cannot find {arguments.config}: the current directory was removed; name an absolute path",
                file=sys.stderr,
            )
            return EXIT_CONFIG
        begin_node("from aitbc_miner.main import start; sys.exit(start())")
        return _obey(arguments)
    return until_unread(partial(_obey, arguments))


def main() -> int:
    """Run one command and give the exit status."""
    return _obey(_parser().parse_args())


def _obey(arguments: argparse.Namespace) -> int:
    match arguments.verb:
        case "run":
            return run(arguments.config)
        case "probe":
            return probe(arguments.config, as_json=arguments.json)
        case "check":
            return check(arguments.config)
        case "slots":
            return slots(suggest=arguments.suggest, path=arguments.config)
        case "tasks":
            return tasks(arguments.config, as_json=arguments.json)
    return doctor(arguments.config)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="aitbc-miner", description="Rent out this machine: run the jobs that a coordinator hands out."
    )
    parser.add_argument("--version", action="version", version=f"aitbc-miner {build()}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="COMMAND")
    verbs.add_parser("run", help="run the node in the foreground")
    probe_ = verbs.add_parser("probe", help="show the CPUs, memory, disks and GPUs of this machine")
    probe_.add_argument("--json", action="store_true", help="in the form that the coordinator gets")
    verbs.add_parser("check", help="check the configuration and this machine; changes nothing")
    slots_ = verbs.add_parser("slots", help="print the slots as YAML")
    slots_.add_argument("--suggest", action="store_true", help="a layout derived from the machine")
    tasks_ = verbs.add_parser("tasks", help="list the Python tasks and their parameters")
    tasks_.add_argument("--json", action="store_true", help="with the parameters as JSON schemas")
    verbs.add_parser("doctor", help="list what a node needs, whether this machine has it, and remedies")
    for name, verb in verbs.choices.items():
        default = None if name == "probe" else CONFIG
        text = f"(default: {default or 'none, and the slots are derived from the machine'})"
        verb.add_argument(
            "--config", type=Path, metavar="FILE", default=default, help=f"the configuration {text}"
        )
    return parser


def run(path: Path) -> int:
    """Run the node in the foreground."""
    config, faults, warnings = load_config(path, os.environ)
    if config is None:
        status = _refuse(faults)
        if not path.exists():
            print("name the configuration with --config; etc/config.yaml is an example", file=sys.stderr)
        return status
    try:
        config = resolved(config)
        require(NodePlace(config, None, 0))
    except RequirementError as error:
        print(error, file=sys.stderr)
        return _refuse(_why_not(path, config))
    from aitbc_miner.node import run_node  # noqa: PLC0415  # imports the whole node

    status = run_node(path, config, warnings)
    if status == EXIT_CONFIG:
        # The node has logged the first fault; here follow all faults with file and line.
        _refuse(_why_not(path, config))
    return status


def _why_not(path: Path, config: Config) -> list[Fault]:
    checker = Checker(path, config, os.environ, find_gpus())
    checker.check_start()
    return checker.faults


def probe(path: Path | None, *, as_json: bool) -> int:
    """Show the machine's CPUs, memory, disks and GPUs, for the coordinator or for people."""
    config: Config | None = None
    faults: list[Fault] = []
    if path:
        config, faults, _ = load_config(path, os.environ)
    gpus = find_gpus()
    facts = machine_facts(gpus)
    specs = lay_out(read_slots(config.slots_dir, faults), facts, faults) if config else []
    if faults:
        return _refuse(faults)
    runners = _runners(config)
    machine = probe_machine((config.workspace if config else WorkspaceSection()).root)
    if as_json:
        node_id = config.node_id if config else derive_node_id()
        slots_ = told_of(specs or derive_slots(facts), facts)
        payload = capabilities(node_id, machine, gpus, slots_, runners, tasks=told(_tasks(config)))
        print(msgspec.json.format(msgspec.json.encode(payload), indent=2).decode())
    else:
        print(render_page(machine, gpus, runners))
        _say("Slots     ", ", ".join(spec.name for spec in specs or derive_slots(facts)))
    return EXIT_OK


def check(path: Path) -> int:
    """Check the configuration against this machine."""
    config, faults, warnings = load_config(path, os.environ)
    if config is None:
        return _refuse(faults)
    checker = Checker(path, config, os.environ, find_gpus())
    checker.check()
    for warning in [*warnings, *checker.warnings]:
        _complain(f"warning: {warning}")
    if checker.faults:
        return _refuse(checker.faults)
    _say("ok:", f"node {config.node_id}, coordinator {config.coordinator.base_url}")
    listed = {
        "slots": [spec.name for spec in checker.slots],
        "commands allowed": checker.commands,
        "tasks": [task.info.name for task in checker.tasks],
    }
    if config.coordinator.dialect == "aitbc-v1":
        listed["services"] = [service.name for service in checker.services]
    for what, names in listed.items():
        _say("ok:", f"{len(names)} {what}: {', '.join(names) or 'none'}")
    return EXIT_OK


def slots(path: Path, *, suggest: bool) -> int:
    """Print the configured slots, or a layout that suits this machine, as a file for slots.d."""
    specs: list[SlotSpec] = []
    gpus = find_gpus()
    facts = machine_facts(gpus)
    if not suggest:
        config, faults, _ = load_config(path, os.environ)
        specs = lay_out(read_slots(config.slots_dir, faults), facts, faults) if config else []
        if faults or config is None:
            return _refuse(faults)
        checker = Checker(path, config, os.environ, gpus)
        checker.check()
        # Printed in spite of faults: the installer makes the slots' users, whose absence is a fault.
        _refuse(checker.faults)
    print(to_yaml(specs or derive_slots(facts)), end="")
    return EXIT_OK


def tasks(path: Path, *, as_json: bool) -> int:
    """List the Python tasks with their parameters; a faulty task shows its error."""
    config, faults, _ = load_config(path, os.environ)
    if config is None:
        return _refuse(faults)
    found = _tasks(config)
    if as_json:
        shown = [{**msgspec.to_builtins(task.info), "file": str(task.file)} for task in found]
        print(msgspec.json.format(msgspec.json.encode(shown), indent=2).decode())
    else:
        for task in found:
            _say(task.info.name, task.info.error or task.info.description or str(task.file))
            for name, kind in params_of(task.info):
                _say(f"    {name:16}", kind)
    return EXIT_FAILURE if any(task.info.error for task in found) else EXIT_OK


def doctor(path: Path) -> int:
    """Show each requirement, whether the machine meets it, and its remedy."""
    config, faults, _ = load_config(path, os.environ)
    machine = probe_machine((config.workspace if config else WorkspaceSection()).root)
    missing = False
    for finding in diagnose(path, config, faults, machine, find_gpus()):
        word = "ok" if finding.there else "MISSING" if finding.required else "optional"
        _say(f"{word:8} {finding.name:8}", finding.detail)
        missing |= finding.required and not finding.there
        for remedy in finding.remedy.split("; ") if not finding.there else []:
            _say("  →", remedy)
    print("a requirement is missing" if missing else "nothing that the configuration requires is missing")
    return EXIT_FAILURE if missing else EXIT_OK


def find_gpus() -> GpuList:
    """Ask the driver for the GPUs; the driver may hang, so a child asks."""
    with GpuReader() as reader:
        return reader.list()


def _runners(config: Config | None) -> list[str]:
    if config is None:
        return ["cli", "python"]
    runners = {"cli": config.runners.cli.enable, "python": config.runners.python.enable}
    return [name for name, enabled in runners.items() if enabled]


def _tasks(config: Config | None) -> list[FoundTask]:
    if config is None or not config.runners.python.enable:
        return []
    # Read as the service's user, like in the running node: root does not import tasks.
    return list_tasks(config.runners.python, resolve("auto", config.privileges.service_user, []).service)


def _refuse(faults: list[Fault]) -> int:
    for fault in faults:
        _complain(str(fault))
    return EXIT_CONFIG


def _say(label: str, text: str) -> None:
    print("\n".join(wrap(f"{label} ", text)))


def _complain(text: str) -> None:
    """Print a fault: wrapped for a terminal, else in one line for other programs."""
    print("\n    ".join(wrap("", text, most=width() - 4)) if sys.stderr.isatty() else text, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(start())
