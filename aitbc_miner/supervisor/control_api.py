"""Answers what `aitbc-minerctl` asks, from what the supervisor knows at this moment."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from msgspec.structs import replace

from aitbc_miner.config.settings import Config
from aitbc_miner.control.protocol import (
    Answer,
    Done,
    Files,
    JobRow,
    Jobs,
    Later,
    Problem,
    Refusal,
    Reply,
    Request,
    SlotStatus,
    Status,
)
from aitbc_miner.ipc.messages import CoordinatorView, Deliveries, Retried, RetryJob, Starved
from aitbc_miner.jobs import EndReason, JobUse, State, directory_of, valid_job_id
from aitbc_miner.slots.placement import Ticket
from aitbc_miner.slots.state import SlotState
from aitbc_miner.supervisor.job_index import JobIndex
from aitbc_miner.supervisor.job_use import Said, use_of
from aitbc_miner.supervisor.running_slot import RunningSlot
from aitbc_miner.util import clock, fs
from aitbc_miner.util.build import build

FILES = {"job": ("manifest.json", "state.json", "outcome.json", "receipt.json"), "logs": ("logs/exec.log",)}
# A child that died once and has run since then is no problem any more.
DEATH_SHOWN_S = 600.0
MAX_ASKED = 100
BAD = frozenset({SlotState.BACKOFF, SlotState.QUARANTINED})


class Desk:
    """The operator's counter. Holds what only it shows, and whether the node takes new jobs.

    `others` answer the verbs that are not about what is held here.
    """

    def __init__(
        self,
        config: Config,
        index: JobIndex,
        slots: Mapping[str, RunningSlot],
        queue: Mapping[str, Ticket],
        notices: list[str],
        cancel: Callable[[str, EndReason, str], bool],
        others: Mapping[str, Callable[[Request, Later], Reply | None]],
    ) -> None:
        self._config = config
        self._index = index
        self._slots = slots
        self._queue = queue
        self._notices = notices
        self._cancel = cancel
        self._others = others
        self._began = clock.now()
        self._build = build()
        self._changed = False
        self.accepting = True
        self.stopping = False
        self.coordinator = CoordinatorView(reachable=False, since_wall=clock.wall())
        self.deliveries = Deliveries(0)
        self.gpu_error: str | None = None
        self.disk_problem: Problem | None = None
        self.troubles: dict[str, Problem] = {}
        self.disk_short = False
        self.agent_runs = True
        self.reported: list[str] = []
        self.starved = Starved()
        self._deaths: dict[str, tuple[float, str]] = {}

    def take_changed(self) -> bool:
        """Whether `drain` or `resume` was said since this was last asked."""
        changed, self._changed = self._changed, False
        return changed

    def note_death(self, name: str, text: str) -> None:
        """Show for a while how a child died."""
        self._deaths[name] = clock.now(), text

    def answer(self, request: Request, later: Later) -> Reply | None:
        """Answer a request that is permitted; None when the answer comes later."""
        match request.verb:
            case "status" | "slots":
                return self._status(), []
            case "jobs":
                return Jobs([self._with_use(row) for row in self._index.rows(request.state)]), []
            case "drain" | "resume":
                return self._set_accepting(request.verb == "resume"), []
        if other := self._others.get(request.verb):
            return other(request, later)
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
        slot = self._slots.get(row.slot or "") if row.state is State.RUNNING else None
        ours = slot if slot and slot.rules.job_id == row.job_id else None
        return replace(row, use=use) if (use := self._use(ours)) else row

    def _set_accepting(self, accepting: bool) -> Done:  # noqa: FBT001  # the one thing that it sets
        self._changed = self.accepting is not accepting
        self.accepting = accepting
        if accepting:
            return Done("resumed: jobs are pulled again")
        running = sum(slot.rules.job_id is not None for slot in self._slots.values())
        return Done(f"draining: no new jobs are pulled; {running} running, {len(self._queue)} waiting go on")

    def _cancel_job(self, row: JobRow) -> Answer:
        if self._cancel(row.job_id, "cancel", "by the operator"):
            return Done(f"cancelling job {row.job_id}; it is given a few seconds to end by itself")
        return Refusal(
            f"cannot cancel job {row.job_id}: it is in no slot, but {row.state}; "
            f"see `aitbc-minerctl job {row.job_id}`"
        )

    def _files(self, row: JobRow, names: tuple[str, ...]) -> Reply:
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
        slots = [
            SlotStatus(slot.view(), now - slot.rules.since, self._use(slot)) for slot in self._slots.values()
        ]
        return Status(
            node_id=self._config.node_id,
            version=self._build,
            pid=os.getpid(),
            up_s=now - self._began,
            accepting=self.accepting and not paused,
            paused=paused,
            stopping=self.stopping,
            coordinator=self.coordinator,
            base_url=self._config.coordinator.base_url,
            slots=slots,
            queued=list(self._queue),
            pending_reports=self.deliveries.pending,
            finished=dict(self._index.finished),
            problems=self._problems(),
        )

    def _why_paused(self) -> str:
        """Say why no job is pulled, where nobody wanted that; the remedies are among the problems."""
        if not self.accepting:
            return ""
        reasons = {
            "the node is starting": not self._slots,
            "no slot can be used": all(slot.rules.state in BAD for slot in self._slots.values()),
            "there is too little space on the disk": self.disk_short,
            "the agent does not run; it is started again": not self.agent_runs,
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
        if self.disk_problem:
            problems.append(self.disk_problem)
        problems += self.troubles.values()
        problems += self._hunger()
        problems += [Problem(text) for text in self.reported]
        if self.gpu_error:
            problems.append(Problem(self.gpu_error, "check the driver with `nvidia-smi`"))
        for slot in self._slots.values():
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


class RetryDesk:
    """Asks the agent, who knows what waits and what was refused, to try a job once more."""

    def __init__(self, tell: Callable[[RetryJob], None]) -> None:
        self._tell = tell
        self._asked: dict[str, list[Later]] = {}

    def ask(self, request: Request, later: Later) -> Reply | None:
        """Pass a request on."""
        if request.job_id is None or not valid_job_id(request.job_id):
            return Refusal(
                f"cannot retry: {request.job_id!r:.200} is no job's id; see `aitbc-minerctl jobs`"
            ), []
        if len(self._asked) >= MAX_ASKED:
            return Refusal(f"cannot retry: the agent has not answered for {MAX_ASKED} other jobs yet"), []
        self._asked.setdefault(request.job_id, []).append(later)
        self._tell(RetryJob(request.job_id))
        return None

    def answered(self, said: Retried) -> None:
        """Pass the agent's answer on to those who asked."""
        for later in self._asked.pop(said.job_id, []):
            later(Done(said.message) if said.done else Refusal(said.message))
