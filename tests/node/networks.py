"""Coordinators of both dialects behind one face, so that one scenario is played against each."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.node.harness import Node
from tools.mock.aitbc.coordinator import MockAitbc
from tools.mock.bootstrap.coordinator import MockCoordinator
from tools.mock.bootstrap.records import Verdict

DIALECTS = ("bootstrap", "aitbc-v1")
KEY = "demo-key-0123456789"
# A job is a line for bash. What is lost with its machine is run again: of a job that failed, nobody there is.
SERVICE = """
service: script
match: {types: [script]}
fields:
  line: {type: text, required: true, max_bytes: 10000}
run: {command: bash, args: ["-c", "{line}"]}
result:
  log: {log: true}
"""
RETRY = {"max_attempts": 3, "on": ["E_LOST"]}


class Network(ABC):
    """A coordinator and how jobs are seen there: `queued`, `running`, `done`, `failed` or `cancelled`."""

    mock: MockCoordinator | MockAitbc

    @abstractmethod
    def node(self, slots: int = 1, **changes: Any) -> Node:
        """Make a node that works for this coordinator, not started yet."""

    @abstractmethod
    def submit(self, line: str) -> str:
        """Queue a job that runs a line of bash."""

    @abstractmethod
    def submit_unknown(self) -> str:
        """Queue a job that no node may run."""

    @abstractmethod
    def state(self, job_id: str) -> str:
        """Say where a job is."""

    @abstractmethod
    def message(self, job_id: str) -> str:
        """Say what the client is told of a job that failed."""

    @abstractmethod
    def counted(self, job_id: str) -> int:
        """Count the reports of a job that counted: what it was paid for, or charged with."""

    @abstractmethod
    def cancel(self, job_id: str) -> None:
        """Have the client cancel a job."""

    @abstractmethod
    def forget_nodes(self) -> None:
        """Forget all nodes, and no job."""

    @abstractmethod
    def fault(self, call: str, kind: str, times: int | None = None) -> None:
        """Make a call go wrong: `register`, `heartbeat`, `pull`, `result` or `fail`."""

    def wait(self, done: Callable[[], object], timeout: float = 60.0) -> None:
        """Wait until something is so at the coordinator."""
        self.mock.wait(lambda _: done(), timeout)

    def wait_state(self, job_id: str, *states: str, timeout: float = 60.0) -> None:
        """Wait until a job is in one of the states."""
        self.wait(lambda: self.state(job_id) in states, timeout)

    def running(self, job_ids: list[str]) -> int:
        """Count those of the jobs that the coordinator believes to run."""
        return sum(self.state(job_id) == "running" for job_id in job_ids)


class Bootstrap(Network):
    """The dialect `bootstrap`."""

    def __init__(self, mock: MockCoordinator) -> None:
        self.mock: MockCoordinator = mock

    def node(self, slots: int = 1, **changes: Any) -> Node:
        return Node(self.mock.url, slots, **changes)

    def submit(self, line: str) -> str:
        job = {"runner": "cli", "command": "bash", "args": ["-c", line], "retry": RETRY}
        return self.mock.submit(job)

    def submit_unknown(self) -> str:
        return self.mock.submit({"runner": "cli", "command": "mine-bitcoin"})

    def state(self, job_id: str) -> str:
        job = self.mock.ledger.job(job_id)
        if job.cancelled and job.state in {"failed", "done"}:
            return "cancelled" if job.state == "failed" else "done"
        return {"leased": "running", "acked": "running"}.get(job.state, str(job.state))

    def message(self, job_id: str) -> str:
        report = self.mock.job(job_id).accepted
        assert report is not None
        return f"{report.body['error_code']}: {report.body['error_msg']}"

    def counted(self, job_id: str) -> int:
        return sum(report.verdict is Verdict.ACCEPTED for report in self.mock.job(job_id).reports)

    def cancel(self, job_id: str) -> None:
        self.mock.cancel(job_id)

    def forget_nodes(self) -> None:
        self.mock.ledger.revoke_tokens()
        self.mock.ledger.forget_nodes()

    def fault(self, call: str, kind: str, times: int | None = None) -> None:
        self.mock.fault(call, kind, times)


class Aitbc(Network):
    """The dialect `aitbc-v1`."""

    def __init__(self, mock: MockAitbc) -> None:
        self.mock: MockAitbc = mock

    def node(self, slots: int = 1, **changes: Any) -> Node:
        mine = {"dialect": "aitbc-v1", "auth_scheme": "api_key"}
        there = {**mine, **changes.pop("coordinator", {})}
        environ = {"MINER_AUTH": KEY, **changes.pop("environ", {})}
        node = Node(self.mock.url, slots, environ=environ, coordinator=there, **changes)
        directory = node.put("services.d")
        (directory / "script.yaml").write_text(SERVICE)
        node.write_config(self.mock.url, coordinator=there, services_dir=str(directory), **changes)
        return node

    def submit(self, line: str) -> str:
        return self.mock.submit({"type": "script", "line": line})

    def submit_unknown(self) -> str:
        return self.mock.submit({"type": "mine bitcoin"})

    def state(self, job_id: str) -> str:
        state = self.mock.job(job_id).state
        return {"COMPLETED": "done", "CANCELED": "cancelled"}.get(state, str(state).lower())

    def message(self, job_id: str) -> str:
        return str(self.mock.job(job_id).error)

    def counted(self, job_id: str) -> int:
        job = self.mock.job(job_id)
        return len(job.results) + len(job.fails)

    def cancel(self, job_id: str) -> None:
        assert self.mock.cancel(job_id)

    def forget_nodes(self) -> None:
        self.mock.forget_miners()

    def fault(self, call: str, kind: str, times: int | None = None) -> None:
        self.mock.fault({"pull": "poll"}.get(call, call), kind, times)


@contextlib.contextmanager
def network(dialect: str, **rules: Any) -> Iterator[Network]:
    """Give a coordinator of a dialect; `rules` are those of its mock."""
    if dialect == "bootstrap":
        with MockCoordinator(lease_s=3.0, **rules) as mock:
            yield Bootstrap(mock)
    else:
        with MockAitbc(**{"rate_limits": False, **rules}) as double:
            yield Aitbc(double)


def job_file(node: Node, job_id: str, name: str) -> Path:
    """Give a file of a job's record."""
    return node.jobs / job_id / name
