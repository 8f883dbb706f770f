"""The fault harness itself: its plan is pure, and each thing that can be wrong is seen."""

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from aitbc_miner.errors import ErrorCode
from aitbc_miner.jobs import BROKEN, Outcome, State
from aitbc_miner.store.records import Records
from tools.fault_harness.checks import Fates, check_job, check_log, check_records
from tools.fault_harness.jobs import KINDS, Jobs
from tools.fault_harness.main import main
from tools.fault_harness.plan import BOUNDARIES, Boundary, Side, Whom, faults
from tools.fault_harness.steps import Gate, Moment, StepServer, Trap
from tools.lib.marked_jobs import MarkedJobs
from tools.mock.bootstrap import records as mock_records
from tools.mock.bootstrap.coordinator import MockCoordinator
from tools.mock.bootstrap.records import Job, Report, Verdict

QUICK = next(kind for kind in KINDS if kind.name == "quick")
FAILING = next(kind for kind in KINDS if kind.name == "failing")
RETRIED = next(kind for kind in KINDS if kind.name == "retried")


# --- the plan ----------------------------------------------------------------------------------------------


def test_faults_follow_from_the_seed_alone() -> None:
    assert list(islice(faults("a"), 300)) == list(islice(faults("a"), 300))
    assert list(islice(faults("a"), 300)) != list(islice(faults("b"), 300))


def test_each_round_comes_to_every_boundary_twice() -> None:
    here, elsewhere = Counter[Boundary](), Counter[Boundary]()
    for fault in faults("a"):
        if fault.boundary is not None:
            (here if fault.whom is Whom.HERE else elsewhere)[fault.boundary] += 1
        if here.total() == elsewhere.total() == len(BOUNDARIES):
            break
    assert here == elsewhere == Counter(BOUNDARIES)


def test_half_a_round_comes_to_every_boundary() -> None:
    seen = {fault.boundary for fault in islice(faults("a"), len(BOUNDARIES) * 5 // 4 + 4)}
    assert set(BOUNDARIES) <= seen


def test_jobs_follow_from_the_seed_alone(tmp_path: Path) -> None:
    class Marks(MarkedJobs):
        marks = tmp_path

    first, second = Jobs("a", Marks()), Jobs("a", Marks())
    assert [first.next() for _ in range(50)] == [second.next() for _ in range(50)]
    assert {kind.name for kind in first.kinds.values()} == {kind.name for kind in KINDS}


# --- the steps ---------------------------------------------------------------------------------------------

TAKE = """
import os, pathlib, sys
from aitbc_miner.jobs import State
from aitbc_miner.store.records import Records
records = Records(pathlib.Path(sys.argv[1]))
try:
    records.create("j", b"{}")
    with records.open("j") as job:
        job.move(State.ACKED)
except OSError as error:
    print(error.errno)
"""


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    made = Gate("seed", lambda: tmp_path)
    yield made
    made.calm()


def take_in(tmp_path: Path, gate: Gate, *, disk: bool = False) -> subprocess.CompletedProcess[str]:
    """Record a job in a process that has the shim."""
    server = StepServer(tmp_path, gate, disk=disk)
    jobs = tmp_path / "jobs"
    jobs.mkdir(exist_ok=True)
    environ = {**server.environ, "AITBC_FAULT_ROOT": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    try:
        return subprocess.run(
            [sys.executable, "-c", TAKE, str(jobs)],
            env=environ,
            check=False,
            timeout=60,
            text=True,
            capture_output=True,
        )
    finally:
        server.close()


def test_the_shim_names_each_step_of_a_record(tmp_path: Path, gate: Gate) -> None:
    done = take_in(tmp_path, gate)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    steps = ("manifest", "PULLED", "directory", "ACKED")
    assert gate.passed == Counter(Boundary(step, side) for step in steps for side in Side)


@pytest.mark.parametrize(
    ("side", "there"), [(Side.BEFORE, set()), (Side.AFTER, {"j"})], ids=["before", "after"]
)
def test_a_process_killed_at_a_boundary_goes_no_further(
    tmp_path: Path, gate: Gate, side: Side, there: set[str]
) -> None:
    met: list[Moment] = []

    def kill(moment: Moment) -> None:
        met.append(moment)
        assert moment.pid is not None
        os.kill(moment.pid, signal.SIGKILL)

    gate.trap = Trap(Boundary("directory", side), 0, kill)
    assert take_in(tmp_path, gate).returncode == -9
    assert gate.trap.disarm()
    assert [(moment.boundary, moment.job_id) for moment in met] == [(Boundary("directory", side), "j")]
    names = {path.name for path in (tmp_path / "jobs").iterdir()}
    assert {name for name in names if not name.startswith("+")} == there


def test_a_trap_lets_as_many_pass_as_it_is_told_to() -> None:
    here = Boundary("ACKED", Side.AFTER)
    met: list[Moment] = []
    trap = Trap(here, 2, met.append)
    meetings = [trap.meets(Moment(here, pid)) for pid in range(5)]
    assert meetings == [False, False, True, False, False]
    assert [moment.pid for moment in met] == [2]
    assert trap.disarm()
    assert not Trap(here, 0, met.append).disarm()


@pytest.mark.parametrize(("operation", "number"), [("create", 28), ("fsync", 5), ("rename", 28)])
def test_the_disk_fails_where_it_is_told_to(tmp_path: Path, operation: str, number: int) -> None:
    class OneFails(Gate):
        def _falls(self, what: str, share: float) -> bool:
            return share > 0 and what == operation

    gate = OneFails("seed", lambda: tmp_path, disk=1.0)
    assert take_in(tmp_path, gate, disk=True).stdout == f"{number}\n"
    assert gate.failed == Counter({operation: 1})
    assert not (tmp_path / "jobs" / "j").exists()


def test_calls_are_met_on_either_side(gate: Gate) -> None:
    assert not gate.call("ack", "before", 1)
    gate.trap = Trap(Boundary("ack", Side.AFTER), 0, lambda _: None)
    assert not gate.call("ack", "before", 1)
    assert gate.call("ack", "after", 1)
    assert not gate.call("ack", "after", 1)
    assert not gate.call("files", "after", 1)


def test_answers_are_lost_as_the_seed_says(tmp_path: Path) -> None:
    def lost() -> list[bool]:
        gate = Gate("seed", lambda: tmp_path, drop=0.5)
        return [gate.call("ack", side, 1) for _ in range(100) for side in Side]

    assert lost() == lost()
    assert 20 < sum(lost()) < 80
    assert not any(lost()[::2])


# --- the checks --------------------------------------------------------------------------------------------


def job(code: str | None = None, *more: Verdict) -> Job:
    """Make a job that ended once, and of which more reports came."""
    body = {"error_code": code, "error_msg": "so it is"}
    first = Report("fail" if code else "result", "j", "node", "key", body, 0.0)
    reports = (first, *(replace(first, verdict=verdict) for verdict in more))
    state = mock_records.State.FAILED if code else mock_records.State.DONE
    return Job("j", 1, b"", {}, state=state, reports=reports, acks=1)


def kinds_of(subject: Job, *, runs: int = 1, risk: bool = False, doom: bool = False) -> list[str]:
    """Give what is found wrong with a job of the kind that ends well."""
    fates = Fates({"j"} if risk or doom else set(), {"j"} if doom else set())
    return [finding.kind for finding in check_job(subject, QUICK, runs, fates)]


def test_what_may_be_is_no_finding() -> None:
    assert kinds_of(job()) == []
    assert kinds_of(job(None, Verdict.DUPLICATE)) == []
    assert kinds_of(job("E_LOST"), risk=True) == []
    assert kinds_of(job("E_LOST"), doom=True) == []
    assert kinds_of(job("E_LOST"), risk=True, runs=0) == []
    assert list(check_job(job("E_EXIT"), FAILING, 1, Fates(set(), set()))) == []
    assert list(check_job(job("E_DISK"), QUICK, 0, Fates(set(), set()), disk=True)) == []


def test_what_may_not_be_is_found() -> None:
    assert kinds_of(replace(job(), reports=())) == ["lost"]
    assert kinds_of(job(None, Verdict.ACCEPTED)) == ["doubled"]
    assert kinds_of(job(None, Verdict.CONFLICT)) == ["doubled"]
    assert kinds_of(job(), runs=2) == ["run twice"]
    assert kinds_of(job(), runs=0) == ["wrong"]
    assert kinds_of(job("E_LOST")) == ["wrong"]
    assert kinds_of(job(), doom=True) == ["wrong"]
    assert kinds_of(job("E_DISK")) == ["wrong"]


def test_a_job_may_run_as_often_as_its_policy_says() -> None:
    nobody, risked = Fates(set(), set()), Fates({"j"}, set())
    assert list(check_job(job(), RETRIED, 3, nobody)) == []
    assert [finding.kind for finding in check_job(job(), RETRIED, 4, nobody)] == ["run twice"]
    assert [finding.kind for finding in check_job(job("E_EXIT"), RETRIED, 3, nobody)] == ["wrong"]
    assert list(check_job(job("E_EXIT"), RETRIED, 3, risked)) == []
    assert list(check_job(job("E_EXIT"), RETRIED, 1, nobody, disk=True)) == []


def test_records_are_compared_with_the_ledger(tmp_path: Path) -> None:
    records = Records(tmp_path)
    with MockCoordinator() as mock:
        for job_id in ("torn", "open", "other"):
            mock.submit({"job_id": job_id, "runner": "cli", "command": "true"})
            records.create(job_id, b'{"job_id": "%s", "runner": "cli"}' % job_id.encode())
        with records.open("other") as other:
            other.write_outcome(Outcome("other", code=ErrorCode.E_EXIT))
            other.move(State.UPLOADING)
            other.move(State.DONE, delivery="accepted")
        (tmp_path / "torn" / "state.json").write_text("{")
        (tmp_path / BROKEN).mkdir()
        (tmp_path / BROKEN / "old").mkdir()
        found = [(finding.kind, finding.what.split()[0]) for finding in check_records(tmp_path, mock)]
    assert found == [("broken", "set"), ("lost", "open"), ("wrong", "other"), ("broken", "cannot")]


def test_the_log_is_read_for_what_the_node_takes_for_a_defect(tmp_path: Path) -> None:
    log = tmp_path / "node.log"
    log.write_text('{"event": "started"}\n{"event": "broken record"}\nTraceback (most recent call last):\n')
    assert [finding.kind for finding in check_log(log)] == ["broken", "defects"]


def test_unknown_words_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--seed"])
    assert ended.value.code == 2
    assert "--seed" in capsys.readouterr().err
