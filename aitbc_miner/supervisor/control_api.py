"""Answers what `aitbc-minerctl` asks, from what the supervisor knows at this moment."""

import contextlib
import os
from collections.abc import Iterator
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
from aitbc_miner.slots.state import SlotState
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
# A child that died once and has run since then is no problem any more.
DEATH_SHOWN_S = 600.0
MAX_ASKED = 100
BAD = frozenset({SlotState.BACKOFF, SlotState.QUARANTINED})


class ControlApi:
    """Answers the operator. Holds what only that shows, and whether the node takes new jobs."""

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
        self._slow = slow
        self._shutdown = shutdown
        self._began = clock.now()
        self._build = build()
        self._retries: dict[str, list[Later]] = {}
        self.accepting = True
        self.coordinator = CoordinatorView(reachable=False, since_wall=clock.wall())
        self.deliveries = Deliveries(0)
        self.gpu_error: str | None = None
        self.troubles: dict[str, Problem] = {}
        self.reported: list[str] = []
        self.starved = Starved()
        self._deaths: dict[str, tuple[float, str]] = {}

    def note_death(self, name: str, text: str) -> None:
        """Show for a while how a child died."""
        self._deaths[name] = clock.now(), text

    def answer(self, request: Request, later: Later) -> FullAnswer | None:
        """Answer a request that is permitted; None when the answer comes later."""
        match request.verb:
            case "status" | "slots":
                return self._status(), []
            case "jobs":
                return Jobs([self._with_use(row) for row in self._index.rows(request.state)]), []
            case "drain" | "resume":
                return self._set_accepting(request.verb == "resume"), []
            case "retry":
                return self._retry(request.job_id, later)
        if request.verb in SLOW_VERBS:
            self._slow.ask(request, later)
            return None
        job_id = request.job_id
        row = self._index.get(job_id) if job_id else None
        if job_id is None or row is None or not valid_job_id(job_id):
            what = "cancel" if request.verb == "cancel" else "show"
            return Refusal(
                f"cannot {what} job {job_id!r}: there is none of this id here; see `aitbc-minerctl jobs`"
            ), []
        if names := FILES.get(request.verb):
            return self._files(self._with_use(row), names)
        return self._cancel_job(row), []

    def _use(self, slot: RunningSlot | None) -> JobUse | None:
        if slot is None or slot.rules.job_state is not State.RUNNING:
            return None
        # Of a worker of an earlier run nobody has heard since when its job runs.
        said = slot.said or Said(slot.rules.since, slot.rules.deadline)
        most = self._config.workspace.max_job_mb
        return use_of(slot.view(), said, slot.plan.spec.cpu_max, None if most is None else most << 20)

    def _with_use(self, row: JobRow) -> JobRow:
        """Add what a job uses that runs now."""
        slot = self._slots.slots.get(row.slot or "") if row.state is State.RUNNING else None
        ours = slot if slot and slot.rules.job_id == row.job_id else None
        return replace(row, use=use) if (use := self._use(ours)) else row

    def _set_accepting(self, accepting: bool) -> Done:  # noqa: FBT001  # the one thing that it sets
        self.accepting = accepting
        if accepting:
            return Done("resumed: jobs are pulled again")
        running = sum(slot.rules.job_id is not None for slot in self._slots)
        waiting = len(self._slots.queue)
        return Done(f"draining: no new jobs are pulled; {running} running, {waiting} waiting go on")

    def _cancel_job(self, row: JobRow) -> Answer:
        if self._slots.cancel(row.job_id, "cancel", "by the operator"):
            return Done(f"cancelling job {row.job_id}; it is given a few seconds to end by itself")
        return Refusal(
            f"cannot cancel job {row.job_id}: it is in no slot, but {row.state}; "
            f"see `aitbc-minerctl job {row.job_id}`"
        )

    def _retry(self, job_id: str | None, later: Later) -> FullAnswer | None:
        """Ask the agent, who knows what waits and what was refused, to try a job once more."""
        if job_id is None or not valid_job_id(job_id):
            return Refusal(f"cannot retry: {job_id!r:.200} is no job's id; see `aitbc-minerctl jobs`"), []
        if len(self._retries) >= MAX_ASKED:
            return Refusal(f"cannot retry: the agent has not answered for {MAX_ASKED} other jobs yet"), []
        self._retries.setdefault(job_id, []).append(later)
        self._agent.send(RetryJob(job_id))
        return None

    def retried(self, said: Retried) -> None:
        """Pass the agent's answer on to those who asked."""
        for later in self._retries.pop(said.job_id, []):
            later(Done(said.message) if said.done else Refusal(said.message))

    def _files(self, row: JobRow, names: tuple[str, ...]) -> FullAnswer:
        """Open a job's files for the client, which reads them itself: reading may take long."""
        fds: list[int] = []
        found: list[str] = []
        try:
            with fs.directory(self._config.workspace.root / directory_of(row.job_id)) as job:
                for name in names:
                    with contextlib.suppress(FileNotFoundError):
                        fds.append(fs.open_below(job, name))
                        found.append(Path(name).name)
        except OSError as error:
            for fd in fds:
                os.close(fd)
            where = self._config.workspace.root / directory_of(row.job_id)
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
        """Say why no job is pulled, where nobody wanted that; the remedies are among the problems."""
        if not self.accepting:
            return ""
        reasons = {
            "the node is starting": not self._slots.slots,
            "no slot can be used": all(slot.rules.state in BAD for slot in self._slots),
            "there is too little space on the disk": self._disk.short,
            "the agent does not run; it is started again": self._agent.child is None,
            "the coordinator was not asked yet": not self.coordinator.registered
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
            problems.append(
                Problem(self.deliveries.error, "nothing is lost: it is tried again until it works")
            )
        if self.deliveries.refused:
            problems.append(
                Problem(
                    f"the coordinator has refused the reports of {self.deliveries.refused} jobs (E_UPLOAD)",
                    "see `aitbc-minerctl jobs --state FAILED`; `aitbc-minerctl retry ID` sends one once more",
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
                problems.append(Problem(f"slot {slot.name}: {reason}", "it is tried again by itself"))
            elif slot.trouble:
                what = f"slot {slot.name}: {slot.trouble}"
                problems.append(Problem(what, "nothing is lost: it is tried again until it works"))
        recent = clock.now() - DEATH_SHOWN_S
        problems += [Problem(f"{name} {how}") for name, (at, how) in self._deaths.items() if at > recent]
        return problems + [Problem(notice) for notice in self._notices]

    def _hunger(self) -> Iterator[Problem]:
        since = self.starved.since
        if since is None or not self.accepting:
            return
        minutes = (clock.now() - since) / 60
        yield Problem(f"no job has come for {minutes:.0f} minutes; the coordinator does not say why")
        yield from (Problem("perhaps: " + cause) for cause in self.starved.causes)
