"""`aitbc-miner check`: whether a node could run here with its configuration. Changes nothing."""

import os
import ssl
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from msgspec.structs import replace

from aitbc_miner.allowlist import abuse
from aitbc_miner.allowlist.entries import Entry, load_allowlist
from aitbc_miner.config.document import ENV_PREFIX, Fault
from aitbc_miner.config.dropins import drop_ins
from aitbc_miner.config.settings import Config, PythonRunnerSection
from aitbc_miner.config.units import format_cpus
from aitbc_miner.config.yaml_text import line_of
from aitbc_miner.coordinator.services import Service, read_services
from aitbc_miner.gpu.reader import GpuList
from aitbc_miner.identity.credentials import CredentialError, read_credential
from aitbc_miner.preflight import network
from aitbc_miner.preflight.confinement import (
    ConfinementError,
    find_cgroups,
    find_sandbox,
    offered_controllers,
)
from aitbc_miner.preflight.network import proxy_faults, refused_later
from aitbc_miner.preflight.requirements import NodePlace, RequirementError, full_disks, resolved, unmet
from aitbc_miner.preflight.sandbox_view import needs, special, unseen
from aitbc_miner.probe.machine import NEEDED_CONTROLLERS, SlotCapability
from aitbc_miner.probe.topology import MachineFacts, read_machine
from aitbc_miner.runners.interpreter import Interpreter, InterpreterError, cannot_import, find_interpreter
from aitbc_miner.runners.task_catalogue import FoundTask, list_tasks
from aitbc_miner.sandbox.users import Identities, Identity, PrivilegeError, group_of, resolve
from aitbc_miner.slots.derive import derive_slots, lay_out
from aitbc_miner.slots.reader import check_slots, read_slots
from aitbc_miner.slots.spec import MIB, SlotSpec
from aitbc_miner.telemetry.sampling import inventory
from aitbc_miner.util.trust import distrust, distrust_tree
from aitbc_miner.util.web import tls_context
from aitbc_miner.worker.prewarm import NO_PRELOAD


def machine_facts(gpus: GpuList) -> MachineFacts:
    """Describe the CPUs, memory and GPUs from which slots can be made."""
    nodes: dict[str, int] = {}
    parts: dict[str, tuple[str, ...]] = {}
    for gpu in gpus.gpus:
        own, instances = (gpu.uuid, str(gpu.index)), tuple(part.uuid for part in gpu.mig)
        if gpu.numa_node is not None:
            nodes |= dict.fromkeys([*own, *instances], gpu.numa_node)
        if gpu.mig_enabled:
            parts |= dict.fromkeys(own, instances)
    ids = [gpu.ids for gpu in inventory(gpus).gpus]
    return replace(read_machine(), gpu_ids=ids, gpu_nodes=nodes, gpu_parts=parts)


def told_of(specs: Sequence[SlotSpec], facts: MachineFacts) -> list[SlotCapability]:
    """Describe slots as the coordinator gets them, but without the controls that enforce the limits."""
    return [
        SlotCapability(
            name=spec.name,
            kind=spec.kind,
            cpus=format_cpus(spec.cpus or facts.cpus),
            memory_mb=min(spec.memory_max or facts.memory_bytes, facts.memory_bytes) // MIB,
            enforced={},
            gpu=None if spec.gpu is None else str(spec.gpu),
            runners=list(spec.runners),
        )
        for spec in specs
    ]


class Checker:
    """Checks everything that a node needs. `faults` prevent a start, `warnings` may be intended."""

    def __init__(self, path: Path, config: Config, environ: Mapping[str, str], gpus: GpuList) -> None:
        self._path = path
        self._config = config
        self._environ = environ
        self._gpus = gpus
        self.faults: list[Fault] = []
        self.warnings: list[str] = []
        self.slots: list[SlotSpec] = []
        self.commands: list[str] = []
        self.tasks: list[FoundTask] = []
        self.services: list[Service] = []
        self._interpreter: Interpreter | None = None
        self._absent: dict[str, str] = {}

    def check(self) -> None:
        """Check everything; a fault does not end the check."""
        identities = self.check_start()
        self._check_runners()
        if self._config.coordinator.dialect == "aitbc-v1":
            self._check_services()
        service = identities.service if identities else None
        self._check_credential(service)
        self._check_ca_file(service)
        self.warnings += network.network_warnings(self._config, self._environ)
        for key, message in [*full_disks(self._config), *proxy_faults(self._config, self._environ)]:
            self._fault(key, message)

    def check_start(self) -> Identities | None:
        """Check the requirements without which `run` refuses to start."""
        self._check_slots()
        identities = self._check_privileges()
        self._check_confinement(identities)
        self._check_python(identities)
        try:
            config = resolved(self._config)
        except RequirementError as error:
            key, _, message = str(error).partition(": ")
            self._fault(key, message)
            return identities
        for key, message in unmet(NodePlace(config, identities, len(self.slots))):
            self._fault(key, message)
        return identities

    def _fault(self, key: str, message: str) -> None:
        """Note a fault of a key, with the place that sets the key: a line of the file or a variable."""
        variable = ENV_PREFIX + key.replace(".", "__").upper()
        overridden = variable in self._environ
        line = None if overridden else line_of(self._path, key.split("."))
        self.faults.append(Fault(variable if overridden else str(self._path), line, key, message))

    def _check_slots(self) -> None:
        directory = self._config.slots_dir
        facts = machine_facts(self._gpus)
        before = len(self.faults)
        strange: list[Fault] = []
        specs = read_slots(directory, self.faults, strange)
        self.slots = lay_out(specs, facts, self.faults, directory)
        found, warnings = check_slots(self.slots, facts, directory)
        self.faults += found
        self.warnings += [*map(str, strange), *warnings, *self._disabled_runners(), *self._doubtful_binds()]
        if error := inventory(self._gpus).error:
            self.warnings.append(error)
        if not self.slots and len(self.faults) == before:
            self.slots = derive_slots(facts)

    def _disabled_runners(self) -> Iterator[str]:
        enabled = {"cli": self._config.runners.cli.enable, "python": self._config.runners.python.enable}
        for spec in self.slots:
            if any(enabled.values()) and not any(enabled[name] for name in spec.runners):
                keys = " or ".join(f"runners.{name}.enable" for name in spec.runners)
                yield f"slot {spec.name} takes no jobs: the slot's runners are off; set {keys}: true"

    def _doubtful_binds(self) -> Iterator[str]:
        for spec in self.slots:
            for path in map(Path, spec.binds):
                try:
                    problem = distrust(path)
                except OSError as error:
                    problem = f"cannot read the path: {error.strerror}; no job of the slot can start"
                if problem:
                    yield f"slot {spec.name}: binds: {path}: {problem}"
                for text in special(path):
                    yield f"slot {spec.name}: binds: {text}"

    def _check_privileges(self) -> Identities | None:
        privileges = self._config.privileges
        try:
            found = resolve(privileges.mode, privileges.service_user, [spec.name for spec in self.slots])
        except PrivilegeError as error:
            self._fault("privileges.mode", str(error))
            return None
        self.warnings += found.missing
        return found

    def _check_confinement(self, identities: Identities | None) -> None:
        try:
            self.warnings += find_cgroups(self._config).missing
        except ConfinementError as error:
            if os.geteuid() == 0 and offered_controllers() >= set(NEEDED_CONTROLLERS):
                # This shell's cgroup lacks controllers that systemd gives to the service.
                cause = str(error).partition(": ")[2].partition("; ")[0]
                self.warnings.append(f"{cause} (in this shell only); no action needed for the service")
            else:
                self._fault("cgroup.mode", str(error))
        try:
            sandboxed, missing = find_sandbox(self._config, identities.probe if identities else None)
            self.warnings += missing
            if self._config.runners.python.preload and not sandboxed:
                self.warnings.append(f"runners.python.preload has no effect: {NO_PRELOAD}")
        except ConfinementError as error:
            self._fault("sandbox.mode", str(error))

    def _check_runners(self) -> None:
        runners = self._config.runners
        if runners.cli.enable:
            warnings: list[Fault] = []
            allowlist = load_allowlist(runners.cli.allowlist_dirs, self.faults, warnings)
            self.warnings += map(str, warnings)
            for name, entry in allowlist.entries.items():
                file = str(allowlist.files[name])
                texts = [*abuse.abuse_warnings(entry), *self._hidden(entry)]
                self.warnings += [str(Fault(file, None, "command", text)) for text in texts]
                if not Path(entry.command.path).exists():
                    self._absent[name] = entry.command.path
            self.commands = sorted(allowlist.entries)
        if runners.python.enable:
            for directory in runners.python.task_paths:
                self._check_task_path(directory)
            if self._interpreter:
                self._check_tasks(self._interpreter)
        if not (runners.cli.enable or runners.python.enable):
            self.warnings.append(
                "no runner is enabled: this node takes no jobs; enable a runner in `runners`"
            )

    def _hidden(self, entry: Entry) -> Iterator[str]:
        """Yield a warning for each file of a command that jobs cannot see in their sandbox."""
        if self._config.sandbox.mode == "off":
            return
        program = Path(entry.command.path)
        able = [spec for spec in self.slots if "cli" in spec.runners and entry.kind in {None, spec.kind}]
        needed = needs(program)
        blind: dict[Path, list[str]] = {}
        for spec in able:
            for what in unseen([*map(Path, spec.binds), *entry.binds], needed):
                blind.setdefault(what, []).append(spec.name)
        for what, names in blind.items():
            whose = "jobs" if len(names) == len(able) else f"jobs of {' and '.join(names)}"
            need = "" if what == program else f", and {program} needs {what}"
            yield f"{whose} do not see {what} in their sandbox{need}; add the directory of {what} to `binds`"
        for path in entry.binds:
            yield from special(path)

    def _check_task_path(self, directory: Path) -> None:
        key = "runners.python.task_paths"
        try:
            if directory.exists() and not directory.is_dir():
                self._fault(key, f"{directory} is no directory; name a directory of tasks")
            elif problem := distrust_tree(directory):
                self._fault(key, f"cannot trust {directory}: {problem}; use chown or chmod")
            elif found := drop_ins(directory, self.faults, suffix=".py"):
                self.warnings += [str(one) for one in found.warnings(".py") if not Path(one.file).is_dir()]
        except FileNotFoundError:
            self.warnings.append(f"{key}: {directory} does not exist and offers no tasks")
        except OSError as error:
            self._fault(key, f"cannot read {directory}: {error.strerror}")

    def _check_python(self, identities: Identities | None) -> None:
        try:
            self._interpreter = find_python(self._config.runners.python, identities)
        except InterpreterError as error:
            self._fault("runners.python.venv", str(error))

    def _check_tasks(self, interpreter: Interpreter) -> None:
        """Have the tasks' Python import the tasks and the modules in `preload`."""
        python = self._config.runners.python
        user = resolve("auto", self._config.privileges.service_user, []).service
        self.tasks = list_tasks(python, user, interpreter)
        broken = [task for task in self.tasks if task.info.error]
        self.warnings += [f"task {task.info.name} ({task.file}): {task.info.error}" for task in broken]
        key = "runners.python.preload"
        try:
            failed = cannot_import(interpreter, python.preload, user)
        except InterpreterError as error:
            failed = {", ".join(python.preload): str(error)}
        self.warnings += [f"{key}: cannot import {name}: {why}" for name, why in failed.items()]

    def _check_services(self) -> None:
        """Check that each service has its command or task, its program and a slot with its egress."""
        directory = self._config.services_dir
        strange: list[Fault] = []
        files: dict[str, Path] = {}
        self.services = read_services(directory, self.faults, strange, files)
        self.warnings += map(str, strange)
        if not self.services:
            self.warnings.append(f"services_dir: {directory} has no service: the node refuses every job")
        tasks = {task.info.name for task in self.tasks}
        for service in self.services:
            run = service.run
            if run.command is not None and run.command not in self.commands:
                remedy = "add the command to allowlist.d, or remove the service"
                self.warnings.append(f"service {service.name}: no command {run.command!r}; {remedy}")
            if run.task is not None and run.task not in tasks:
                remedy = "add the task to a directory of task_paths, or remove the service"
                self.warnings.append(f"service {service.name}: no task {run.task!r}; {remedy}")
            file = files[service.name]
            self.faults += [
                Fault(str(file), line_of(file, key.split(".")), key, f"{message}, or remove the service")
                for key, message in self._lacking(service)
            ]

    def _lacking(self, service: Service) -> Iterator[tuple[str, str]]:
        """Give key and fault of each missing thing without which every job of a service fails."""
        if service.egress and all(service.egress != spec.egress for spec in self.slots):
            wanted = f"egress: {service.egress}"
            yield "egress", f"no slot has {wanted}; add `{wanted}` to a slot in {self._config.slots_dir}"
        if program := self._absent.get(service.run.command or ""):
            yield "run.command", f"the program {program} does not exist; install the program"

    def _check_credential(self, service: Identity | None) -> None:
        source = self._config.coordinator.auth_token
        if source.startswith("credential:") and "CREDENTIALS_DIRECTORY" not in self._environ:
            self.warnings.append(
                f"cannot check {source} here: systemd gives the credential to the service only"
            )
            return
        try:
            found = read_credential(source, self._environ, [service.uid] if service else [])
        except CredentialError as error:
            self._fault("coordinator.auth_token", str(error))
            return
        if fault := refused_later(self._config, found):
            self._fault("coordinator.auth_token", fault)
        kind, _, path = source.partition(":")
        # Root can read any file, but the service's user must read the token.
        if kind == "file" and service and not may_read(path, service):
            remedy = f"chgrp {group_of(service)} {path}; chmod 640 {path}"
            self._fault("coordinator.auth_token", f"the user {service.name} cannot read {path}; {remedy}")

    def _check_ca_file(self, service: Identity | None) -> None:
        path = self._config.coordinator.ca_file
        if path is None:
            return
        try:
            tls_context(path)
        except OSError as error:
            cause = "the file has no certificate" if isinstance(error, ssl.SSLError) else error.strerror
            remedy = "name a readable file with CA certificates in PEM form (-----BEGIN CERTIFICATE-----)"
            self._fault("coordinator.ca_file", f"cannot use {path}: {cause}; {remedy}")
            return
        if service and not may_read(str(path), service):
            remedy = f"chmod a+r {path}, and chmod a+x its directories"
            self._fault("coordinator.ca_file", f"the user {service.name} cannot read {path}; {remedy}")


def find_python(python: PythonRunnerSection, identities: Identities | None) -> Interpreter:
    """Find the Python of tasks as the service's user; without tasks, our own Python.

    Raises:
        InterpreterError: the Python cannot be used, or only root can start it.
    """
    user = identities.service if identities else None
    return find_interpreter(python.venv if python.enable else None, user)


def may_read(path: str, user: Identity) -> bool:
    """Ask the kernel whether a user may read a file. For root only."""
    command = ["/usr/bin/test", "-r", path]
    done = subprocess.run(command, user=user.uid, group=user.gid, extra_groups=[], check=False)
    return done.returncode == 0
