"""A worker without a node around it, and the jobs that it is given."""

import logging
import os
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
import pytest

from aitbc_miner.config.settings import Config, CoordinatorSection, WorkspaceSection
from aitbc_miner.config.settings import RunnersSection as Enabled
from aitbc_miner.ipc.channel import Channel
from aitbc_miner.ipc.messages import FromWorker, JobEnded, StartJob, ToWorker, WorkerReady
from aitbc_miner.jobs import ExitStatus, Manifest, Outcome, State, StateRecord
from aitbc_miner.runners.interface import JobPaths, Launch, Runner, Verdict, ended_badly
from aitbc_miner.runners.registry import RunnerSet
from aitbc_miner.sandbox.users import Identity
from aitbc_miner.slots.spec import SlotSpec
from aitbc_miner.store.records import Records
from aitbc_miner.supervisor.children import Child
from aitbc_miner.task import Report
from aitbc_miner.util import clock
from aitbc_miner.worker.context import Delays, SlotContext
from aitbc_miner.worker.loop import Worker

WAIT_S = 120.0
# Far from the ids that belong to somebody, and those that nodes take; of no other process that runs tests
# at the same time, for whatever such a user runs is found and killed.
JOB_UID = 3_000_000 + 4 * os.getpid()
Prepare = Callable[[pytest.MonkeyPatch], None]


class Runners(RunnerSet):
    """Those that `give` gives."""

    def __init__(self, give: Callable[[], dict[str, Runner]]) -> None:
        super().__init__(Enabled())
        self._give = give

    def current(self) -> dict[str, Runner]:
        return self._give()


class Shell:
    """A runner whose jobs are lines for sh; `upset` may raise in its steps, `result` is what a job gives."""

    name = "cli"

    def __init__(self, upset: Callable[[str], None] = lambda _: None, result: Any = None) -> None:
        self._upset = upset
        self._result = result

    def plan(self, manifest: Manifest, paths: JobPaths, slot: SlotSpec, gpu_env: Mapping[str, str]) -> Launch:
        self._upset("plan")
        return Launch(["/bin/sh", "-c", manifest.command or ""], {}, None, None)

    def verdict(self, exit: ExitStatus, reports: list[Report], log_tail: str) -> Verdict:  # noqa: A002
        self._upset("verdict")
        return ended_badly(exit, log_tail) or Verdict(None, result=self._result)


class Bench:
    """A worker, without cgroup unless it is given one, and the jobs that it is given."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.records = Records(root)
        self.log = root / "+log"
        self.service: Identity | None = None
        self.runs_as: Identity | None = None
        self.group_parent: Path | None = None
        self.spec = SlotSpec("cpu0", "cpu")
        self.delays = Delays(term_grace=0.2, kill=1.0, drain=0.5, notice=0.2)
        self.child: Child[FromWorker] | None = None

    def start(
        self, prepare: Prepare = lambda _: None, runners: Callable[[], dict[str, Runner]] | None = None
    ) -> None:
        """Start the worker, `prepare` changing what it is made of."""
        slot = SlotContext(
            config=Config(
                CoordinatorSection("https://c.example", "env:X"), workspace=WorkspaceSection(root=self.root)
            ),
            spec=self.spec,
            group_parent=self.group_parent,
            controllers=(),
            runs_as=self.runs_as,
            service=self.service,
            gpu_env={},
            delays=self.delays,
        )

        def main(pipe: "Connection[Any, Any]") -> None:
            logging.getLogger("aitbc_miner").addHandler(
                logging.FileHandler(self.log, errors="backslashreplace")
            )
            prepare(pytest.MonkeyPatch())
            channel: Channel[ToWorker] = Channel(pipe, ToWorker)
            Worker(slot, channel, Runners(runners or (lambda: {"cli": Shell()}))).run()

        self.child = Child("worker", main, FromWorker)
        self.until(lambda message: isinstance(message, WorkerReady))

    def submit(self, job_id: str, command: str = "echo hello; echo x > ../output/x", **more: Any) -> Path:
        """Record a job that waits for its slot."""
        manifest = {"job_id": job_id, "runner": "cli", "command": command, **more}
        self.records.create(job_id, msgspec.json.encode(manifest))
        self.put_into(job_id, State.ACKED)
        return self.root / job_id

    def put_into(self, job_id: str, state: State) -> None:
        """Set a job's state."""
        with self.records.open(job_id) as job:
            job.write_state(StateRecord(job_id=job_id, state=state))

    def send(self, message: ToWorker) -> None:
        """Tell the worker."""
        assert self.child is not None
        self.child.send(message)

    def until(self, wanted: Callable[[FromWorker], bool]) -> list[FromWorker]:
        """Give what the worker says, up to what is wanted."""
        assert self.child is not None
        heard: list[FromWorker] = []
        deadline = clock.now() + WAIT_S
        while clock.now() < deadline:
            heard += self.child.channel.wait(WAIT_S)
            if any(map(wanted, heard)):
                return heard
        raise AssertionError(f"never came: {heard}")

    def run(self, job_id: str) -> JobEnded:
        """Have the worker run a job and give what it says of the end."""
        self.send(StartJob(job_id))
        return self.ended()

    def ended(self) -> JobEnded:
        """Wait for the end of a job."""
        last = self.until(lambda message: isinstance(message, JobEnded))[-1]
        assert isinstance(last, JobEnded)
        return last

    def outcome(self, job_id: str) -> Outcome | None:
        """Give what is on disk."""
        with self.records.open(job_id) as job:
            return job.outcome()

    def assert_works(self) -> None:
        """Assert that the same worker takes a good job."""
        self.submit("after")
        assert self.run("after").code is None

    def stop(self) -> None:
        """End the worker and what it started."""
        if self.child:
            self.child.kill()
            self.child.reap()
