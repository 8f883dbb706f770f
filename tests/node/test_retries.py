"""Jobs that fail on one node: tried again as their policy says, or not; reports that are refused."""

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from aitbc_miner.control.protocol import Done, JobRow, Refusal
from aitbc_miner.errors import ErrorCode
from aitbc_miner.jobs import Outcome, State, StateRecord
from aitbc_miner.store.records import Records
from tests.node.conftest import NodeFactory
from tests.node.harness import WAIT_S, Node, assert_once, noop, until, wait_final, wait_gone, wait_settled
from tools.fault_harness.plan import Boundary, Side
from tools.fault_harness.steps import Gate, Moment, StepServer, Trap
from tools.lib.local_node import wait_until
from tools.mock.bootstrap import records as mock_records
from tools.mock.bootstrap.coordinator import MockCoordinator

# Longer than any test, so that an attempt that is made was asked for; and so long that it can be seen.
PATIENT = {"interval_s": 0.5, "backoff": {"min_s": 600, "max_s": 1200}}
BRISK = {"interval_s": 0.5, "backoff": {"min_s": 0.5, "max_s": 1}}
POLICY = {"max_attempts": 3}


def record(node: Node, job_id: str) -> StateRecord:
    """Read a job's state.json."""
    with Records(node.jobs).open(job_id) as job:
        return job.state()


def attempt(node: Node, job_id: str, number: int) -> Outcome:
    """Read what an attempt came to that was followed by another."""
    return msgspec.json.decode((node.jobs / job_id / f"outcome.{number}.json").read_bytes(), type=Outcome)


def wait_shown(node: Node, job_id: str, state: State) -> JobRow:
    """Wait until `jobs` shows a job in a state, and give its line there."""

    def rows() -> list[JobRow]:
        return [row for row in node.ask("jobs").jobs if (row.job_id, row.state) == (job_id, state)]

    found: JobRow = wait_until(rows, WAIT_S)[0]
    return found


def kill_run(node: Node, job_id: str, number: int = 1) -> None:
    """Kill a job's program as somebody else might, when it was begun so often."""
    wait_until(lambda: len(node.runs(job_id)) == number, WAIT_S)
    pid = max(node.runs(job_id), key=lambda run: (node.marks / f"{job_id}+{run}").stat().st_mtime_ns)
    os.kill(pid, signal.SIGKILL)
    wait_gone([pid])


def waiting(node: Node, coordinator: MockCoordinator, job_id: str) -> None:
    """Have a job wait for its second attempt; it would end as soon as there is a file `go`."""
    coordinator.submit(node.script(job_id, until(node.marks / "go"), retry=POLICY))
    kill_run(node, job_id)
    wait_shown(node, job_id, State.RETRY_WAIT)


# --- the program was started -------------------------------------------------------------------------------


def test_a_killed_program_is_started_again_by_its_policy(
    coordinator: MockCoordinator, node_factory: NodeFactory
) -> None:
    node = node_factory(heartbeat=BRISK).start()
    coordinator.submit(node.script("j", until(node.marks / "go"), retry=POLICY))
    for number in (1, 2):
        kill_run(node, "j", number)
        shown = wait_shown(node, "j", State.RETRY_WAIT)
        assert shown.code is ErrorCode.E_SIGNAL
        assert coordinator.job("j").reports == ()
    (node.marks / "go").touch()
    (job,) = wait_final(coordinator, ["j"])
    assert job.state is mock_records.State.DONE
    wait_settled(node)
    assert_once(coordinator, ["j"])
    assert len(node.runs("j")) == 3
    assert record(node, "j").attempt == 3
    assert [(past.attempt, past.code) for past in (attempt(node, "j", 1), attempt(node, "j", 2))] == [
        (1, ErrorCode.E_SIGNAL),
        (2, ErrorCode.E_SIGNAL),
    ]
    assert job.acks == 1
    shown = wait_shown(node, "j", State.DONE)
    assert shown.code is None


def test_the_last_attempt_is_reported(coordinator: MockCoordinator, node_factory: NodeFactory) -> None:
    node = node_factory(heartbeat=BRISK).start()
    coordinator.submit(node.script("j", "kill -9 $$", retry={"max_attempts": 2}))
    (job,) = wait_final(coordinator, ["j"])
    assert job.error_code == "E_SIGNAL"
    wait_settled(node)
    assert_once(coordinator, ["j"])
    assert len(node.runs("j")) == 2
    assert attempt(node, "j", 1).code is ErrorCode.E_SIGNAL
    assert record(node, "j").attempt == 2


@pytest.mark.parametrize(
    ("then", "more", "code"),
    [
        ("kill -9 $$", {}, "E_SIGNAL"),
        ("kill -9 $$", {"retry": {"max_attempts": 1}}, "E_SIGNAL"),
        ("kill -9 $$", {"retry": {"max_attempts": 3, "on": ["E_LOST"]}}, "E_SIGNAL"),
        ("exit 3", {"retry": POLICY}, "E_EXIT"),
    ],
)
def test_what_the_policy_does_not_name_is_reported_at_once(
    coordinator: MockCoordinator, node_factory: NodeFactory, then: str, more: dict[str, Any], code: str
) -> None:
    node = node_factory(heartbeat=PATIENT).start()
    coordinator.submit(node.script("j", then, **more))
    (job,) = wait_final(coordinator, ["j"])
    assert job.error_code == code
    wait_settled(node)
    assert_once(coordinator, ["j"])
    assert len(node.runs("j")) == 1


def test_a_code_that_is_named_is_tried_again_though_it_is_final(
    coordinator: MockCoordinator, node_factory: NodeFactory
) -> None:
    node = node_factory(heartbeat=BRISK).start()
    first = node.marks / "first"
    line = f"[ -e {first} ] || {{ : > {first}; exit 3; }}"
    coordinator.submit(node.script("j", line, retry={"max_attempts": 2, "on": ["E_EXIT"]}))
    (job,) = wait_final(coordinator, ["j"])
    assert job.state is mock_records.State.DONE
    wait_settled(node)
    assert_once(coordinator, ["j"])
    assert len(node.runs("j")) == 2


def test_each_attempt_begins_with_its_inputs_and_an_empty_directory(
    coordinator: MockCoordinator, node_factory: NodeFactory
) -> None:
    node = node_factory(heartbeat=BRISK).start()
    line = 'ls; [ "$(cat data)" = fresh ] || exit 4; [ ! -e left ] || exit 5; : > left; : > data; kill -9 $$'
    more = {"input": {"inline": {"data": "fresh"}}, "retry": {"max_attempts": 2}}
    coordinator.submit(node.script("j", line, **more))
    (job,) = wait_final(coordinator, ["j"])
    assert job.error_code == "E_SIGNAL", job.accepted
    assert len(node.runs("j")) == 2


# --- while it waits ----------------------------------------------------------------------------------------


def test_the_coordinator_cancels_a_job_that_waits(
    coordinator: MockCoordinator, node_factory: NodeFactory
) -> None:
    node = node_factory(heartbeat=PATIENT).start()
    waiting(node, coordinator, "j")
    coordinator.ledger.cancel("j")
    (job,) = wait_final(coordinator, ["j"])
    assert job.error_code == "E_CANCELLED"
    wait_settled(node)
    assert_once(coordinator, ["j"])
    assert len(node.runs("j")) == 1


def test_the_operator_hurries_or_cancels_a_job_that_waits(
    coordinator: MockCoordinator, node_factory: NodeFactory
) -> None:
    node = node_factory(heartbeat=PATIENT).start()
    waiting(node, coordinator, "hurried")
    waiting(node, coordinator, "ended")
    (node.marks / "go").touch()
    node.tell("retry", "hurried")
    node.tell("cancel", "ended")
    hurried, ended = wait_final(coordinator, ["hurried", "ended"])
    assert hurried.state is mock_records.State.DONE
    assert ended.error_code == "E_CANCELLED"
    wait_settled(node)
    assert_once(coordinator, ["hurried", "ended"])
    assert [len(node.runs(job_id)) for job_id in ("hurried", "ended")] == [2, 1]
    # There is nothing left to try.
    assert isinstance(node.ask("retry", "hurried"), Refusal)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_job_waits_on_over_a_restart(
    coordinator: MockCoordinator, node_factory: NodeFactory, how: signal.Signals
) -> None:
    node = node_factory(heartbeat=PATIENT).start()
    for job_id in ("hurried", "cancelled"):
        waiting(node, coordinator, job_id)
    if how is signal.SIGTERM:
        assert node.stop() == 0
    else:
        node.clean_up()
    (node.marks / "go").touch()
    node.start()
    for job_id in ("hurried", "cancelled"):
        wait_shown(node, job_id, State.RETRY_WAIT)
    wait_final(coordinator, [coordinator.submit(noop())])
    assert [len(node.runs(job_id)) for job_id in ("hurried", "cancelled")] == [1, 1]
    coordinator.ledger.cancel("cancelled")
    (cancelled,) = wait_final(coordinator, ["cancelled"])
    assert cancelled.error_code == "E_CANCELLED"
    node.tell("retry", "hurried")
    (hurried,) = wait_final(coordinator, ["hurried"])
    assert hurried.state is mock_records.State.DONE
    wait_settled(node)
    assert_once(coordinator, ["hurried", "cancelled"])
    assert [len(node.runs(job_id)) for job_id in ("hurried", "cancelled")] == [2, 1]


def test_a_job_that_was_due_meanwhile_is_tried_after_a_restart(
    coordinator: MockCoordinator, node_factory: NodeFactory
) -> None:
    node = node_factory(heartbeat=BRISK).start()
    coordinator.submit(node.script("j", until(node.marks / "go"), retry=POLICY))
    kill_run(node, "j")
    wait_until(lambda: record(node, "j").state is State.RETRY_WAIT, WAIT_S)
    node.clean_up()
    (node.marks / "go").touch()
    node.start()
    (job,) = wait_final(coordinator, ["j"])
    assert job.state is mock_records.State.DONE
    wait_settled(node)
    assert_once(coordinator, ["j"])
    assert len(node.runs("j")) <= 3


# --- the program was not started ---------------------------------------------------------------------------


class Killer:
    """Kills the worker that comes to a boundary, `times` times."""

    def __init__(self, gate: Gate, boundary: Boundary, times: int) -> None:
        self._gate = gate
        self._boundary = boundary
        self._left = times
        self.killed: list[int] = []
        self._set()

    def _set(self) -> None:
        self._gate.trap = Trap(self._boundary, 0, self._spring) if self._left else None

    def _spring(self, moment: Moment) -> None:
        assert moment.pid is not None
        os.kill(moment.pid, signal.SIGKILL)
        self.killed.append(moment.pid)
        self._left -= 1
        self._set()


@pytest.fixture
def watched(node_factory: NodeFactory, tmp_path: Path) -> Iterator[tuple[Node, Gate]]:
    """Give a node that is not started yet, and the gate by which its workers' steps come."""
    gate = Gate("retries", lambda: tmp_path)
    server = StepServer(tmp_path, gate, disk=False)
    # The node makes its own directory there.
    environ = {**server.environ, "AITBC_FAULT_ROOT": tempfile.gettempdir()}
    yield node_factory(heartbeat=BRISK, queue={"max_attempts": 4}, environ=environ), gate
    gate.calm()
    server.close()


@pytest.mark.parametrize("side", list(Side))
def test_a_worker_that_dies_before_the_program_costs_no_attempt_of_it(
    coordinator: MockCoordinator, watched: tuple[Node, Gate], side: Side
) -> None:
    node, gate = watched
    killer = Killer(gate, Boundary("PREP", side), 2)
    node.start()
    coordinator.submit(node.script("j", "true"))
    (job,) = wait_final(coordinator, ["j"])
    assert job.state is mock_records.State.DONE
    wait_settled(node)
    assert_once(coordinator, ["j"])
    assert len(killer.killed) == 2
    assert len(node.runs("j")) == 1
    assert record(node, "j").attempt == 3
    assert attempt(node, "j", 1).code is ErrorCode.E_LOST


def test_a_job_that_no_worker_gets_to_start_is_reported_in_the_end(
    coordinator: MockCoordinator, watched: tuple[Node, Gate]
) -> None:
    node, gate = watched
    killer = Killer(gate, Boundary("PREP", Side.AFTER), 4)
    node.start()
    coordinator.submit(node.script("j", "true"))
    (job,) = wait_final(coordinator, ["j"])
    assert job.error_code == "E_LOST"
    wait_settled(node)
    assert_once(coordinator, ["j"])
    assert len(killer.killed) == 4
    assert node.runs("j") == []


def test_a_worker_that_dies_with_the_program_about_to_start_ends_the_job(
    coordinator: MockCoordinator, watched: tuple[Node, Gate]
) -> None:
    """From RUNNING on nobody can say that it was not started."""
    node, gate = watched
    killer = Killer(gate, Boundary("RUNNING", Side.AFTER), 1)
    node.start()
    coordinator.submit(node.script("j", "true"))
    (job,) = wait_final(coordinator, ["j"])
    assert job.error_code == "E_LOST"
    assert_once(coordinator, ["j"])
    assert len(killer.killed) == 1
    assert node.runs("j") == []


# --- reports that are refused ------------------------------------------------------------------------------


HASTY = {"give_up": {"refusals": 2, "over_s": 0}}


def refuse(coordinator: MockCoordinator) -> None:
    """Have the coordinator take no report from now on."""
    coordinator.fault("result", "status:413")
    coordinator.fault("fail", "status:400")


def wait_refused(node: Node, job_id: str) -> None:
    """Wait until a job is settled without having been reported."""
    records = Records(node.jobs)
    wait_until(lambda: records.known(job_id) and record(node, job_id).delivery == "refused", WAIT_S)
    assert record(node, job_id).state is State.FAILED


def refused_problem(node: Node) -> str:
    """Give what `status` says of reports that were refused."""
    texts = [problem.what for problem in node.now().problems]
    return next((text for text in texts if "has refused the reports of" in text), "")


@pytest.mark.parametrize("restart", [False, True])
def test_a_refused_result_is_sent_again_when_the_operator_says_so(
    coordinator: MockCoordinator, node_factory: NodeFactory, restart: bool
) -> None:
    node = node_factory(heartbeat=BRISK, coordinator=HASTY).start()
    refuse(coordinator)
    artifacts = [{"path": "out.txt"}]
    coordinator.submit(node.script("good", "echo made > out.txt", artifacts=artifacts))
    coordinator.submit(node.script("bad", "exit 3"))
    for job_id in ("good", "bad"):
        wait_refused(node, job_id)
        assert coordinator.job(job_id).reports == ()
    wait_until(lambda: "of 2 jobs" in refused_problem(node), WAIT_S)
    assert wait_shown(node, "good", State.FAILED).code is ErrorCode.E_UPLOAD
    # Nobody sends it again by himself.
    calls = len(coordinator.ledger.calls("result")) + len(coordinator.ledger.calls("fail"))
    coordinator.clear_faults()
    if restart:
        assert node.stop() == 0
        node.start()
        wait_until(lambda: "of 2 jobs" in refused_problem(node), WAIT_S)
    other = wait_final(coordinator, [coordinator.submit({"runner": "cli", "command": "missing"})])
    assert other[0].error_code == "E_DENY"
    assert len(coordinator.ledger.calls("result")) + len(coordinator.ledger.calls("fail")) == calls + 1
    for job_id in ("good", "bad"):
        answer = node.ask("retry", job_id)
        assert isinstance(answer, Done), answer
    good, bad = wait_final(coordinator, ["good", "bad"])
    assert good.state is mock_records.State.DONE
    assert good.accepted is not None
    assert "out.txt" in [artifact.path for artifact in good.accepted.artifacts]
    assert bad.error_code == "E_EXIT"
    wait_settled(node)
    assert_once(coordinator, ["good", "bad"])
    wait_until(lambda: not refused_problem(node), WAIT_S)
    assert wait_shown(node, "good", State.DONE)
    assert [len(node.runs(job_id)) for job_id in ("good", "bad")] == [1, 1]


def test_a_report_that_is_refused_once_more_stays_with_the_dead(
    coordinator: MockCoordinator, node_factory: NodeFactory
) -> None:
    node = node_factory(heartbeat=BRISK, coordinator=HASTY).start()
    refuse(coordinator)
    coordinator.submit(node.script("j", "true"))
    wait_refused(node, "j")
    # It is on record a moment before the agent counts it among the dead.
    wait_until(lambda: "of 1 jobs" in refused_problem(node), WAIT_S)
    calls = len(coordinator.ledger.calls("result"))
    node.tell("retry", "j")
    wait_until(lambda: len(coordinator.ledger.calls("result")) > calls, WAIT_S)
    wait_refused(node, "j")
    wait_until(lambda: "of 1 jobs" in refused_problem(node), WAIT_S)
    coordinator.clear_faults()
    node.tell("retry", "j")
    (job,) = wait_final(coordinator, ["j"])
    assert job.state is mock_records.State.DONE
    assert_once(coordinator, ["j"])
    assert len(node.runs("j")) == 1
