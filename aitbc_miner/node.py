"""Puts a node together: directories, users, cgroups, the start of each child. Then runs the supervisor."""

import fcntl
import os
import socket
import sys
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from aitbc_miner.agent.loop import Agent
from aitbc_miner.cgroup.group import CgroupError, Group
from aitbc_miner.config.settings import Config
from aitbc_miner.control.protocol import History, Judged, Refusal, Request
from aitbc_miner.coordinator.connect import connect, proxy_of
from aitbc_miner.errors import EXIT_CONFIG, EXIT_FAILURE, EXIT_OK, MinerError
from aitbc_miner.gpu.facts import GpuFact
from aitbc_miner.gpu.job_view import gpu_env, gpu_view
from aitbc_miner.heartbeat.loop import run_heartbeat
from aitbc_miner.identity.credentials import credential_of_root
from aitbc_miner.ipc.channel import Allowance, Channel
from aitbc_miner.ipc.messages import (
    FromAgent,
    FromHeartbeat,
    FromWorker,
    PrivateLine,
    ToAgent,
    ToHeartbeat,
)
from aitbc_miner.preflight.check import find_python
from aitbc_miner.preflight.confinement import ConfinementError, find_cgroups, find_sandbox, take_cgroups
from aitbc_miner.preflight.requirements import NodePlace, foreign, require
from aitbc_miner.probe.topology import read_machine
from aitbc_miner.queue.redis import open_shared
from aitbc_miner.sandbox.spawn import become_subreaper
from aitbc_miner.sandbox.users import Identities, Identity, PrivilegeError, is_unallocated, resolve
from aitbc_miner.slots.cgroups import SlotGroup, slot_groups
from aitbc_miner.slots.derive import derive_slots, lay_out, slots_for
from aitbc_miner.slots.placement import make_offer
from aitbc_miner.slots.spec import SlotSpec
from aitbc_miner.store.records import PASSABLE
from aitbc_miner.supervisor.adoption import WorkerBook
from aitbc_miner.supervisor.children import Child, Keeper, Main
from aitbc_miner.supervisor.loop import Supervisor
from aitbc_miner.supervisor.node_plan import Layout, SlotPlan
from aitbc_miner.supervisor.slow_answers import judge, read_history, read_layout
from aitbc_miner.util import clock, fs, log
from aitbc_miner.util.locks import HeldError, Locks
from aitbc_miner.util.notify import Notifier
from aitbc_miner.util.system import drop_privileges
from aitbc_miner.util.web import Proxy
from aitbc_miner.worker.context import SlotContext
from aitbc_miner.worker.loop import adjust_slot, run_worker


class WorkspaceError(MinerError):
    """Another miner uses the jobs' directory, or another user owns the directory of the node's files."""


def run_node(path: Path, config: Config, warnings: list[str]) -> int:
    """Run the node in the foreground until the node is told to stop; gives the exit status.

    `config` is the content of the file `path`; a reload reads the file again.
    """
    log.configure(
        config.node_id,
        level=config.logging.level,
        # A person at a terminal gets text, not JSON.
        as_json=config.logging.json and not (config.logging.path is None and sys.stderr.isatty()),
        path=str(config.logging.path) if config.logging.path else None,
    )
    events = log.events("supervisor")
    try:
        become_subreaper()
        node = Node(path, config)
        for line in [*warnings, *node.notices]:
            events.warning("notice given", text=line)
        supervisor = Supervisor(node, Notifier(os.environ))
    except (MinerError, OSError) as error:
        events.error("cannot start", error=str(error))
        # Only the operator can mend EXIT_CONFIG, so systemd does not restart; a full disk may recover.
        return EXIT_CONFIG if isinstance(error, MinerError) else EXIT_FAILURE
    events.info("started", pid=os.getpid(), root=str(config.workspace.root))
    try:
        supervisor.run()
    except OSError as error:
        # The workers and jobs go on, and the next start adopts them.
        events.error("cannot go on", error=str(error), exc_info=True)
        return EXIT_FAILURE
    finally:
        node.close()
    return EXIT_OK


class Node:
    """The facts that do not change while the node runs, and the start of each kind of child."""

    def __init__(self, path: Path, config: Config) -> None:
        self._path = path
        self.config = config
        found = find_cgroups(config)
        self._facts = read_machine(found.home)
        specs, faults = slots_for(config.slots_dir, self._facts)
        if faults:
            raise ConfinementError("cannot lay out the slots: " + "; ".join(map(str, faults)))
        self._identities = self._resolve([spec.name for spec in specs])
        self.layout = Layout(specs, self._identities.jobs)
        require(NodePlace(config, self._identities, len(specs)))
        self._locks = Locks(f"pid {os.getpid()}, since {clock.wall()}, configuration {path}")
        self._locks.take(f"the node id {config.node_id}", "stop the other miner, or set another node_id")
        if found.parent is not None:
            self._locks.take(f"the control group {found.parent}", "stop the other miner")
        self._cgroups = take_cgroups(config, found)
        self._sandboxed, unsafe = find_sandbox(config, self._identities.probe)
        self._interpreter = find_python(config.runners.python, self._identities)
        if self._cgroups.parent not in {None, self._cgroups.home}:
            Group(self._cgroups.parent).create()
        self.notices = [*self._identities.missing, *self._cgroups.missing, *unsafe]
        _make_workspace(config.workspace.root, self._identities.service)
        _make_state(config.queue.path.parent, self._identities.service)
        for key, place in (
            ("workspace.root", config.workspace.root),
            ("queue.path", config.queue.path.parent),
            ("control.socket", config.control.socket.parent),
        ):
            self._locks.take(str(place.resolve()), f"stop the other miner, or set another {key}")
            # For miners in containers, which share the directory but not our /run.
        self._lock = _lock(config.workspace.root)
        self.book = WorkerBook(config.control.socket.with_name("workers.json"))
        # The node token takes this line. The supervisor never reads it, but keeps both ends for new children.
        self._heartbeat_end, self._agent_end = socket.socketpair()
        self.agent = _keeper("agent", self._be_agent, FromAgent, self._agent_end)
        self.heartbeat = _keeper("heartbeat", self._be_heartbeat, FromHeartbeat, self._heartbeat_end)

    def close(self) -> None:
        """Remove the slots' cgroups, except cgroups with a running job (handover)."""
        parent = self._cgroups.parent
        extra = [parent] if parent not in {None, self._cgroups.home} else []
        for path in [*(slot_groups(parent) if parent else ()), *extra]:
            try:
                # A cgroup with a job stays; in another cgroup, the last process may be ending.
                Group(path).remove(timeout_s=0.0 if Group(path).populated() else 0.5)
            except CgroupError as error:
                log.events("supervisor").debug("cgroup stays", reason=str(error))
        self._locks.close()

    def _resolve(self, slots: list[str]) -> Identities:
        privileges = self.config.privileges
        return resolve(privileges.mode, privileges.service_user, slots)

    # --- slots ---------------------------------------------------------------------------------------------

    def plan(self, layout: Layout, gpus: list[GpuFact]) -> list[SlotPlan]:
        """Plan each slot, with these GPUs."""
        # A reload uses these facts as well.
        nodes = {name: gpu.numa_node for gpu in gpus if gpu.numa_node is not None for name in gpu.ids}
        self._facts = replace(self._facts, gpu_ids=[gpu.ids for gpu in gpus], gpu_nodes=nodes)
        specs = lay_out(layout.specs, self._facts, []) or derive_slots(self._facts)
        users = layout.users
        problems: dict[str, str] = {}
        if not users:
            users, problems = self._users_of([spec.name for spec in specs])
        return [self._plan_slot(spec, gpus, users.get(spec.name), problems.get(spec.name)) for spec in specs]

    def plan_stray(self, name: str) -> SlotPlan:
        """Plan a removed slot in which a worker of an earlier run still has a job."""
        return self._plan_slot(SlotSpec(name=name, kind="cpu"), [], None, None)

    def _users_of(self, names: list[str]) -> tuple[dict[str, Identity], dict[str, str]]:
        """Find the users of slots; gives also the error of each slot without a user, which stays unused."""
        try:
            return self._resolve(names).jobs, {}
        except PrivilegeError:
            users: dict[str, Identity] = {}
            problems: dict[str, str] = {}
        for name in names:
            try:
                users |= self._resolve([name]).jobs
            except PrivilegeError as error:
                problems[name] = str(error)
        return users, problems

    def end_others(self, names: set[str]) -> None:
        """Kill the processes in the cgroups of all slots except `names`; in a child."""
        parent = self._cgroups.parent
        for path in slot_groups(parent) if parent else ():
            if path.name not in names:
                try:
                    SlotGroup(path.parent, path.name).teardown()
                except CgroupError as error:
                    log.events("supervisor").warning("old slot not removed", error=str(error))

    def _plan_slot(
        self, spec: SlotSpec, gpus: list[GpuFact], user: Identity | None, problem: str | None
    ) -> SlotPlan:
        gpu = next((gpu for gpu in gpus if spec.gpu is not None and str(spec.gpu) in gpu.ids), None)
        memory = self._facts.memory_bytes
        vram_mb = gpu.vram_mb if gpu else 0
        if gpu and gpu.unified:
            # A unified GPU uses the machine's memory.
            vram_mb = min(vram_mb, memory >> 20)
        offer = make_offer(spec, threads=self._facts.threads, memory_bytes=memory, vram_mb=vram_mb)
        parent = self._cgroups.parent
        slot = SlotContext(
            config=self.config,
            spec=spec,
            group_parent=parent,
            controllers=self._cgroups.controllers,
            runs_as=user,
            service=self._identities.service,
            gpu_env=gpu_env(gpu),
            sandboxed=self._sandboxed,
            interpreter=self._interpreter,
            devices=gpu_view(gpu),
        )
        problem = self._claim(user) or problem
        if spec.gpu is not None and gpu is None:
            problem = f"GPU {spec.gpu} is missing or does not answer; see `aitbc-miner probe`"
        return SlotPlan(
            spec,
            offer,
            parent / spec.name if parent else None,
            partial(self._spawn_worker, slot),
            partial(adjust_slot, slot),
            slot.gpu_env,
            problem,
            slot.devices,
        )

    def _claim(self, user: Identity | None) -> str | None:
        """Lock a slot's user, whose processes the worker kills between jobs; gives the error of a failure."""
        try:
            # No process of an unallocated id is killed.
            if user is not None and not is_unallocated(user.uid):
                self._locks.take(f"the user {user.name}", "stop the other miner, or rename the slot", 0.0)
        except (HeldError, OSError) as error:
            return str(error)
        return None

    def _spawn_worker(self, slot: SlotContext) -> Child[FromWorker]:
        name = slot.spec.name
        child: Child[FromWorker] = Child(f"worker {name}", partial(run_worker, slot), FromWorker)
        self.book.note(name, child.pid)
        return child

    # --- children, after the fork --------------------------------------------------------------------------

    def _be_agent(self, pipe: "Connection[Any, Any]") -> None:
        channel: Channel[ToAgent] = Channel(pipe, ToAgent)
        line: Channel[PrivateLine] = Channel(self._agent_end, PrivateLine, allowance=Allowance())
        early = credential_of_root(self.config.queue.password or "", os.environ)
        proxy, input_proxy = self._proxies()
        self._become_service()
        shared = open_shared(self.config, os.environ, early)
        coordinator = connect(self.config, None, proxy)
        Agent(channel, line, self.config, coordinator, shared, input_proxy).run()

    def _be_heartbeat(self, pipe: "Connection[Any, Any]") -> None:
        channel: Channel[ToHeartbeat] = Channel(pipe, ToHeartbeat)
        line: Channel[PrivateLine] = Channel(self._heartbeat_end, PrivateLine, allowance=Allowance())
        early = credential_of_root(self.config.coordinator.auth_token, os.environ)
        proxy, _ = self._proxies()
        self._become_service()
        run_heartbeat(channel, line, self.config, os.environ, early=early, proxy=proxy)

    def _proxies(self) -> tuple[Proxy | None, Proxy | None]:
        """Make the proxies of the coordinator and of inputs, while this process can read all credentials."""
        there, inputs = self.config.coordinator, self.config.inputs
        return (
            proxy_of(there.proxy, there.proxy_auth, os.environ),
            proxy_of(inputs.proxy, inputs.proxy_auth, os.environ),
        )

    def read_layout(self) -> Layout:
        """Read the configuration again, in a child."""
        return read_layout(self._path, self.config, self._facts)

    def read_history(self, request: Request, memory: int) -> History | Refusal:
        """Read the history in a child, as the service's user: root does not parse the service's database."""
        self._become_service()
        with os.fdopen(memory, "wb") as out:
            fault = read_history(self.config.queue.path, request, out)
        return Refusal(fault) if fault else History()

    def judge(self, request: Request) -> Judged:
        """Judge a command for the operator, in a child."""
        return judge(self.config.runners.cli, request)

    def _become_service(self) -> None:
        if self._identities.service is not None:
            drop_privileges(self._identities.service.uid, self._identities.service.gid)


def _keeper(name: str, main: Main, incoming: Any, line: socket.socket) -> Keeper[Any]:
    return Keeper(name, main, incoming, [line.fileno()], pause_min=0.5, pause_max=5.0)


def _make_workspace(root: Path, service: Identity | None) -> None:
    # Opened without following links: the service may own the parent directory.
    fd = fs.open_directory(root, make=PASSABLE)
    try:
        if service is not None:
            os.fchown(fd, service.uid, service.gid)
            os.fchmod(fd, PASSABLE)
    finally:
        os.close(fd)


def _make_state(directory: Path, service: Identity | None) -> None:
    """Make the directory of the node's database and counters.

    Raises:
        WorkspaceError: the directory has files, and the service does not own it.
    """
    # Passable, because the jobs' directories may be below this directory.
    os.close(fs.open_directory(directory, make=PASSABLE))
    with fs.directory(directory) as fd:
        if service is None or os.fstat(fd).st_uid == service.uid:
            return
        if fault := foreign(directory, service.uid, service.gid):
            raise WorkspaceError(f"cannot use {directory}: {fault}")
        os.fchown(fd, service.uid, service.gid)


def _lock(root: Path) -> int:
    """Lock the jobs' directory against other miners while this process lives; gives the descriptor to keep.

    Raises:
        WorkspaceError: another miner has the lock.
    """
    lock = fs.open_directory(root)
    try:
        # The lock ends with its last descriptor. Children close theirs, so adopted workers hold no lock.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise WorkspaceError(
            f"cannot use {root}: another miner uses the directory; stop it, or set another workspace.root"
        ) from None
    return lock
