"""Answers the requests of `aitbc-minerctl` from the supervisor's state in memory."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from msgspec.structs import replace

from aitbc_miner.control.protocol import (
    SLOW_VERBS,
    Answer,
    Done,
    Files,
    FullAnswer,
    JobRow,
    Jobs,
    Later,
    Problem,
    Refusal,
    Request,
    SlotStatus,
    Status,
)
from aitbc_miner.ipc.messages import CoordinatorView, Deliveries, Retried, RetryJob, Starved
from aitbc_miner.jobs import JobUse, State, directory_of, valid_job_id
from aitbc_miner.slots.state import SLOT_REMEDY, SlotState
from aitbc_miner.supervisor.disk_watch import DiskWatch
from aitbc_miner.supervisor.job_index import JobIndex
from aitbc_miner.supervisor.job_use import Said, use_of
from aitbc_miner.supervisor.node_plan import NodePlan
from aitbc_miner.supervisor.running_slot import RunningSlot
from aitbc_miner.supervisor.shutdown import NodeShutdown
from aitbc_miner.supervisor.slot_pool import SlotPool
from aitbc_miner.supervisor.slow_requests import SlowRequests
from aitbc_miner.util import clock, fs
from aitbc_miner.util.build import build

FILES = {"job": ("manifest.json", "state.json", "outcome.json", "receipt.json"), "logs": ("logs/exec.log",)}
# For how long `status` shows the death of a child that runs again.
DEATH_SHOWN_S = 600.0
MAX_ASKED = 100
BAD = frozenset({SlotState.BACKOFF, SlotState.QUARANTINED})


def open_files(job: int, verb: str) -> tuple[list[str], list[int]]:
    """Open the files that `verb` shows of a job: their names and descriptors, without absent files.

    `job` is the descriptor of the job's directory.

    Raises:
        OSError: a file cannot be opened; all are closed again.
    """
    names: list[str] = []
    fds: list[int] = []
    try:
        for name in FILES[verb]:
            with contextlib.suppress(FileNotFoundError):
                fds.append(fs.open_below(job, name))
                names.append(Path(name).name)
    except OSError:
        for fd in fds:
            os.close(fd)
        raise
    return names, fds


class ControlApi:
    """Answers the operator. Holds the facts that only `status` shows, and whether the node takes new jobs."""

    def __init__(
        self,
        node: NodePlan,
        index: JobIndex,
        slots: SlotPool,
        disk: DiskWatch,
        slow: SlowRequests,
        shutdown: NodeShutdown,
    ) -> None:
        self._config = node.config
        self._notices = node.notices
        self._agent = node.agent
        self._index = index
        self._slots = slots
        self._disk = disk
        self._shutdown = shutdown
        self._began = clock.now()
        self._build = build()
        self._retries: dict[str, list[Later]] = {}
        self._answers: dict[str, Callable[[Request, Later], FullAnswer | None]] = {
            "status": self._show_status,
            "slots": self._show_status,
            "jobs": self._show_jobs,
            "cancel": self._cancel,
            "retry": self._retry,
            **dict.fromkeys(("drain", "resume"), self._set_accepting),
            **dict.fromkeys(FILES, self._show_files),
            **dict.fromkeys(SLOW_VERBS, slow.ask),
        }
        self.accepting = True
        self.coordinator = CoordinatorView(reachable=False, since_wall=clock.wall())
        self.deliveries = Deliveries(0)
        self.gpu_error: str | None = None
        self.troubles: dict[str, Problem] = {}
        self.reported: list[str] = []
        self.starved = Starved()
        self._deaths: dict[str, tuple[float, Problem]] = {}

    def note_death(self, name: str, text: str) -> None:
        """Have `status` show for a while how a child died."""
        remedy = "the supervisor has restarted the process; if this repeats, see `journalctl -u aitbc-miner`"
        self._deaths[name] = clock.now(), Problem(f"the process {name} {text}", remedy)

    def answer(self, request: Request, later: Later) -> FullAnswer | None:
        """Answer a permitted request; None when `later` will get the answer."""
        return self._answers[request.verb](request, later)

    def _show_status(self, _request: Request, _later: Later) -> FullAnswer:
        return self._status(), []

    def _show_jobs(self, request: Request, _later: Later) -> FullAnswer:
        return Jobs([self._with_use(row) for row in self._index.rows(request.state)]), []

    def _show_files(self, request: Request, _later: Later) -> FullAnswer:
        row = self._find(request, "show")
        return (row, []) if isinstance(row, Refusal) else self._files(self._with_use(row), request.verb)

    def _cancel(self, request: Request, _later: Later) -> FullAnswer:
        row = self._find(request, "cancel")
        return row if isinstance(row, Refusal) else self._cancel_job(row), []

    def _find(self, request: Request, what: str) -> JobRow | Refusal:
        job_id = request.job_id
        row = self._index.get(job_id) if job_id else None
        if job_id is not None and row is not None and valid_job_id(job_id):
            return row
        return Refusal(
            f"cannot {what} job {job_id!r}: this node has no job with this id; see `aitbc-minerctl jobs`"
        )

    def _use(self, slot: RunningSlot | None) -> JobUse | None:
        if slot is None or slot.rules.job_state is not State.RUNNING:
            return None
        # An adopted worker sends no messages, so the start of its job is not known.
        said = slot.said or Said(slot.rules.since, slot.rules.deadline)
        most = self._config.workspace.max_job_mb
        return use_of(slot.view(), said, slot.plan.spec.cpu_max, None if most is None else most << 20)

    def _with_use(self, row: JobRow) -> JobRow:
        """Add the resource use of a running job."""
        slot = self._slots.slots.get(row.slot or "") if row.state is State.RUNNING else None
        ours = slot if slot and slot.rules.job_id == row.job_id else None
        return replace(row, use=use) if (use := self._use(ours)) else row

    def _set_accepting(self, request: Request, _later: Later) -> FullAnswer:
        self.accepting = request.verb == "resume"
        if self.accepting:
            return Done("resumed: the node pulls jobs again"), []
        running = sum(slot.rules.job_id is not None for slot in self._slots)
        waiting = len(self._slots.queue)
        said = f"draining: the node pulls no new jobs; {running} running, {waiting} waiting go on"
        return Done(said), []

    def _cancel_job(self, row: JobRow) -> Answer:
        if self._slots.cancel(row.job_id, "cancel", "by the operator"):
            return Done(f"cancelling job {row.job_id}: its program has a few seconds to end by itself")
        return Refusal(
            f"cannot cancel job {row.job_id}: the job neither runs nor waits, its state is {row.state}; "
            f"see `aitbc-minerctl job {row.job_id}`"
        )

    def _retry(self, request: Request, later: Later) -> FullAnswer | None:
        """Ask the agent to retry a job: the agent knows the waiting jobs and the refused reports."""
        job_id = request.job_id
        if job_id is None or not valid_job_id(job_id):
            return Refusal(f"cannot retry: {job_id!r:.200} is not a job id; see `aitbc-minerctl jobs`"), []
        if len(self._retries) >= MAX_ASKED:
            return Refusal(f"cannot retry: {MAX_ASKED} other retries wait for the agent; try again later"), []
        self._retries.setdefault(job_id, []).append(later)
        self._agent.send(RetryJob(job_id))
        return None

    def retried(self, said: Retried) -> None:
        """Pass the agent's answer on to the clients that asked for the retry."""
        for later in self._retries.pop(said.job_id, []):
            later(Done(said.message) if said.done else Refusal(said.message))

    def forget_retries(self) -> None:
        """Answer the clients that wait for an agent that has died."""
        for job_id in list(self._retries):
            self.retried(Retried(job_id, f"cannot retry job {job_id}: the agent died; try again", done=False))

    def _files(self, row: JobRow, verb: str) -> FullAnswer:
        """Open a job's files for the client. The client reads the files: a disk may be slow."""
        where = self._config.workspace.root / directory_of(row.job_id)
        try:
            with fs.directory(where) as job:
                found, fds = open_files(job, verb)
        except OSError as error:
            return Refusal(
                f"cannot open the record of job {row.job_id}: {error.strerror}; look into {where}"
            ), []
        return Files(row, found), fds

    def _status(self) -> Status:
        now = clock.now()
        paused = self._why_paused()
        slots = [SlotStatus(slot.view(), now - slot.rules.since, self._use(slot)) for slot in self._slots]
        return Status(
            node_id=self._config.node_id,
            version=self._build,
            pid=os.getpid(),
            up_s=now - self._began,
            accepting=self.accepting and not paused,
            paused=paused,
            stopping=self._shutdown.mode is not None,
            coordinator=self.coordinator,
            base_url=self._config.coordinator.base_url,
            slots=slots,
            queued=list(self._slots.queue),
            pending_reports=self.deliveries.pending,
            finished=dict(self._index.finished),
            problems=self._problems(),
        )

    def _why_paused(self) -> str:
        """Say why the node pulls no jobs although it accepts jobs; the problems hold the remedies."""
        if not self.accepting:
            return ""
        reasons = {
            "the node is starting": not self._slots.slots,
            "no slot can be used": all(slot.rules.state in BAD for slot in self._slots),
            "the disk has too little free space": self._disk.short,
            "the agent does not run; the supervisor restarts it": self._agent.child is None,
            "the node has not asked the coordinator yet": not self.coordinator.registered
            and not self.coordinator.error,
            "the coordinator has not registered this node": not self.coordinator.registered,
            self.deliveries.paused: bool(self.deliveries.paused),
        }
        return next((reason for reason, holds in reasons.items() if holds), "")

    def _problems(self) -> list[Problem]:
        view = self.coordinator
        problems: list[Problem] = []
        if view.error:
            problems.append(Problem(view.error, view.remedy or ""))
        if self.deliveries.error and self.deliveries.error != view.error:
            remedy = "no result is lost: the node tries again by itself"
            problems.append(Problem(self.deliveries.error, remedy))
        if self.deliveries.refused:
            problems.append(
                Problem(
                    f"the coordinator has refused the reports of {self.deliveries.refused} jobs (E_UPLOAD)",
                    "see `aitbc-minerctl jobs --state FAILED`; `aitbc-minerctl retry ID` sends one again",
                )
            )
        if self._disk.problem:
            problems.append(self._disk.problem)
        problems += self.troubles.values()
        problems += self._hunger()
        problems += [Problem(text) for text in self.reported]
        if self.gpu_error:
            problems.append(Problem(self.gpu_error, "check the driver with `nvidia-smi`"))
        for slot in self._slots:
            if slot.rules.state in BAD:
                reason = slot.rules.reason or "unknown"
                problems.append(Problem(f"slot {slot.name}: {reason}", SLOT_REMEDY))
            elif slot.trouble:
                what = f"slot {slot.name}: {slot.trouble}"
                problems.append(Problem(what, "no result is lost: the worker tries again by itself"))
        recent = clock.now() - DEATH_SHOWN_S
        problems += [problem for at, problem in self._deaths.values() if at > recent]
        return problems + [Problem(notice) for notice in self._notices]

    def _hunger(self) -> Iterator[Problem]:
        since = self.starved.since
        if since is None or not self.accepting:
            return
        minutes = (clock.now() - since) / 60
        yield Problem(f"the coordinator has sent no job for {minutes:.0f} minutes and gives no reason")
        yield from (Problem("possible cause: " + cause) for cause in self.starved.causes)
