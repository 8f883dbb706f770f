"""A running node and everybody who means it harm: jobs, their authors, a broken coordinator, local users."""

import json
import os
import re
import signal
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from aitbc_miner.store import records, reserve
from aitbc_miner.util import clock
from tests.node.harness import assert_once, wait_final
from tests.node.hostile_jobs import BY_FORCE, IDS, NAMELESS, OK, RAW, ROOT, cases, cli, task, with_id
from tests.node.rig import PATIENCE_S, Rig, all_idle, code, outcome, peak_mib, running
from tools.lib.local_node import TOKEN, wait_until
from tools.mock.bootstrap.coordinator import MockCoordinator
from tools.mock.bootstrap.records import Rules, Verdict

SLOTS = [
    {
        "name": f"cpu{number}",
        "kind": "cpu",
        "memory_max": "512M",
        "pids_max": 200,
        "max_runtime_s": 60,
        "env": ["GREETING"],
    }
    for number in (0, 1)
]
NO_JOB, GOOD_AGAIN = "cannot pull a job: garbage reply", "the coordinator answers again"
CHANGES = {
    "coordinator": {"poll_interval_s": 0.05, "timeout_s": 5},
    "workspace": {"max_log_mb": 1, "max_artifacts": 100, "max_artifacts_mb": 8},
}


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    files = tmp_path_factory.mktemp("files")
    (files / "a").write_text("1")
    with (
        MockCoordinator(files_dir=files, ignore_filters=True) as mock,
        running(mock, SLOTS, **CHANGES) as rig,
    ):
        yield rig
        # Or an ordinary user could not remove what this job has shut.
        for shut in ("output", "output/below"):
            with suppress(FileNotFoundError):
                (rig.node.jobs / "no-permissions" / shut).chmod(0o700)


@pytest.fixture(scope="module")
def handed_out(rig: Rig) -> Rig:
    """All hostile jobs, given to the node at once."""
    for name, (_, manifest) in cases(rig.mock.root).items():
        rig.mock.submit({"job_id": name, **manifest})
    for value in RAW.values():
        rig.mock.submit_raw(value)
    return rig


@pytest.mark.parametrize("name", cases(""))
def test_a_hostile_job_gets_its_code(handed_out: Rig, name: str) -> None:
    expected, _ = cases("")[name]
    (job,) = wait_final(handed_out.mock, [name], PATIENCE_S)
    assert code(job) == expected, job.reports
    # One whose answer was late is sent again, and is known.
    assert_once(handed_out.mock, [name], repeats=True)


def reports(mock: MockCoordinator) -> dict[str, list[str]]:
    """Give the codes of all failures that were accepted, by the id that the node named."""
    found: dict[str, list[str]] = {}
    for job in mock.ledger.jobs().values():
        for report in job.reports:
            if report.verdict is not Verdict.ACCEPTED:
                continue
            found.setdefault(report.job_id, []).append(str(report.body.get("error_code")))
    return found


@pytest.mark.parametrize("name", RAW)
def test_a_manifest_that_is_none_gets_its_code(handed_out: Rig, name: str) -> None:
    codes = wait_until(lambda: reports(handed_out.mock).get(name), PATIENCE_S)
    assert codes == ["E_MANIFEST"]


@pytest.mark.parametrize("job_id", IDS)
def test_a_hostile_id_is_answered_and_touches_no_file(handed_out: Rig, job_id: str) -> None:
    handed_out.mock.submit_raw(with_id(job_id))
    codes = wait_until(lambda: reports(handed_out.mock).get(job_id), PATIENCE_S)
    assert codes == ["E_MANIFEST"]
    assert not any(job_id[:60] in path.name for path in handed_out.node.jobs.iterdir() if job_id.strip("."))


@pytest.mark.parametrize("value", NAMELESS, ids=lambda value: value[:12])
def test_what_has_no_name_is_told_to_the_operator(handed_out: Rig, value: bytes) -> None:
    def told(what: str) -> int:
        return handed_out.node.log.read_text().count(what)

    # One spell of trouble is told at its beginning and at its end.
    beginnings, ends = told(NO_JOB), told(GOOD_AGAIN)
    handed_out.mock.submit_raw(value)
    wait_until(lambda: told(GOOD_AGAIN) > ends, PATIENCE_S)
    assert told(NO_JOB) == beginnings + 1


def test_the_node_has_taken_no_harm(handed_out: Rig) -> None:
    wait_final(handed_out.mock, cases(""), PATIENCE_S)
    handed_out.assert_works("good-after-all")
    wait_until(lambda: all_idle(handed_out.node), PATIENCE_S)
    handed_out.assert_unharmed()
    known = {*cases(""), *RAW, "good-after-all", reserve.NAME, records.MARK}
    assert {path.name for path in handed_out.node.jobs.iterdir()} <= known
    # The password in an address is nobody's business.
    bodies = [report.body for job in handed_out.mock.ledger.jobs().values() for report in job.reports]
    assert "hunter2" not in handed_out.node.log.read_text() + json.dumps(bodies)


def test_a_flooded_log_is_cut_marked_and_counted(handed_out: Rig) -> None:
    log = outcome(handed_out, "flood").log
    kept = (handed_out.node.jobs / "flood" / "logs" / "exec.log").read_bytes()
    assert log.dropped == 200_000_000 - (1 << 20)
    assert len(kept) == log.bytes < (1 << 20) + 200
    assert b"[log cut here: the cap of 1048576 bytes is reached]" in kept
    assert f"[{log.dropped} bytes were dropped]".encode() in kept
    assert len(log.tail) == 4096


def test_a_job_cannot_say_or_do_what_only_the_node_can(handed_out: Rig) -> None:
    assert outcome(handed_out, "claims-cancelled").message == "?[2J"
    assert outcome(handed_out, "garbage-reports").result == "came back"
    assert outcome(handed_out, "endless-report").result == "came back"
    assert {name: outcome(handed_out, name).result for name in BY_FORCE} == BY_FORCE
    (job,) = wait_final(handed_out.mock, ["bad-progress"])
    assert all(0 <= note.pct <= 100 for note in job.progress)


def test_memory_stays_bounded(handed_out: Rig) -> None:
    wait_final(handed_out.mock, cases(""), PATIENCE_S)
    peaks = {name: peak_mib(pid) for name, pid in handed_out.children.items()}
    print(f"peak memory, MiB: {peaks}")
    assert max(peaks.values()) < 256, peaks


def test_a_talkative_job_ends_although_the_supervisor_was_slow_to_listen(rig: Rig) -> None:
    assert rig.node.process is not None
    rig.mock.submit({"job_id": "talker", **task("many_reports", count=20_000, wait=True)})
    folder = rig.node.jobs / "talker"
    wait_until((folder / "work" / "waiting").exists, PATIENCE_S)
    rig.node.process.send_signal(signal.SIGSTOP)
    try:
        (folder / "work" / "release").touch()
        wait_until((folder / "outcome.json").exists, PATIENCE_S)
    finally:
        rig.node.process.send_signal(signal.SIGCONT)
    (job,) = wait_final(rig.mock, ["talker"], PATIENCE_S)
    assert code(job) == OK
    wait_until(lambda: all_idle(rig.node), PATIENCE_S)
    rig.assert_unharmed()


# --- a coordinator that has gone mad -----------------------------------------------------------------------

FAULTS = (
    *("garbage", "huge", "deep_json", "wrong_json", "empty", "truncate", "redirect", "slow"),
    *("status:500", "status:429:0", "refuse", "drop_after"),
)
# A 200 says yes, whatever comes with it: after that no report is sent again.
YES = {"wrong_json", "empty"}
# The reply to an upload has a minute.
SPARED = {"ack": YES, "result": YES | {"slow"}, "fail": YES}


def set_faults(mock: MockCoordinator, endpoint: str) -> None:
    """Make the next calls go wrong, each in another way."""
    for kind in FAULTS:
        if kind not in SPARED.get(endpoint, ()):
            mock.fault(endpoint, kind, 1)


def faults_are_over(mock: MockCoordinator) -> bool:
    """Whether all that was to go wrong has gone wrong."""
    return not mock.faults.as_list()


@pytest.fixture(scope="module")
def troubled() -> Iterator[Rig]:
    """A node that had every possible trouble with registering."""
    with MockCoordinator() as mock:
        set_faults(mock, "register")
        hasty = {
            "coordinator": {"poll_interval_s": 0.05, "timeout_s": 1},
            "heartbeat": {"interval_s": 0.2, "backoff": {"min_s": 0.05, "max_s": 0.1}},
        }
        with running(mock, SLOTS, **hasty) as rig:
            wait_until(lambda: faults_are_over(mock), PATIENCE_S)
            yield rig


TROUBLE = {
    "register": None,
    "heartbeat": None,
    "pull": cli(),
    "ack": cli(),
    "progress": task("wait_for_release"),
    "result": cli(),
    "fail": cli("missing", command="gzip"),
}


@pytest.mark.parametrize("endpoint", TROUBLE)
def test_a_mad_coordinator_harms_nobody(troubled: Rig, endpoint: str) -> None:
    mock, manifest = troubled.mock, TROUBLE[endpoint]
    # A job in a reply that is lost on its way must be handed out again.
    mock.ledger.rules = Rules(lease_s=2.0 if endpoint == "pull" else 30.0)
    if endpoint != "register":
        set_faults(mock, endpoint)
    if manifest is not None:
        mock.submit({"job_id": endpoint, **manifest})
    wait_until(lambda: faults_are_over(mock), PATIENCE_S)
    if endpoint == "progress":
        (troubled.node.jobs / endpoint / "work" / "release").touch()
    if manifest is not None:
        (job,) = wait_final(mock, [endpoint], PATIENCE_S)
        assert code(job) == ("E_EXIT" if endpoint == "fail" else OK)
        wait_until(lambda: troubled.node.now().pending_reports == 0, PATIENCE_S)
        assert_once(mock, [endpoint], repeats=True)
    mock.clear_faults()
    troubled.assert_works(f"good-after-{endpoint}")
    wait_until(lambda: all_idle(troubled.node), PATIENCE_S)
    troubled.assert_unharmed()
    assert not any(call.credentials for call in mock.ledger.calls("elsewhere"))
    peaks = {name: peak_mib(pid) for name, pid in troubled.children.items()}
    assert max(peaks.values()) < 256, peaks


def test_a_job_whose_lease_ran_out_before_the_ack_came_through_is_taken_again(troubled: Rig) -> None:
    mock = troubled.mock
    mock.ledger.rules = Rules(lease_s=1.0)
    # Each pause between two acks is half a second, so the lease is over before the last of them.
    mock.fault("ack", "refuse", 4)
    troubled.assert_works("late")
    assert len(mock.job("late").handed) > 1


# --- jobs that do not want to end --------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["auto", "off"])
def test_nothing_of_a_stubborn_job_survives_its_timeout(mode: str) -> None:
    with MockCoordinator() as mock, running(mock, SLOTS[:1], cgroup={"mode": mode}) as rig:
        # On a busy machine it takes more than the first of these until all of them are there.
        for timeout_s in (3.0, 12.0, 48.0):
            name = f"brood-{timeout_s:.0f}"
            mock.submit({"job_id": name, **task("brood", timeout_s=timeout_s, children=50)})
            (job,) = wait_final(mock, [name], PATIENCE_S)
            pids = [int(path.name[4:]) for path in (rig.node.jobs / name / "work").glob("pid-*")]
            assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []
            assert code(job) == "E_TIMEOUT"
            if len(pids) == 51:
                break
        assert len(pids) == 51
        assert bool(rig.node.slot().cgroup) == (mode == "auto" and rig.node.cgroup() is not None)
        rig.assert_works("good")
        wait_until(lambda: all_idle(rig.node), PATIENCE_S)
        rig.assert_unharmed()


# --- local users -------------------------------------------------------------------------------------------


def connect(rig: Rig, data: bytes = b"") -> socket.socket:
    """Connect to the control socket and say something."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(str(rig.node.socket))
    sock.sendall(data)
    return sock


FRAMES = {
    "stalls": b"",
    "half-a-header": b"\0\0",
    "half-a-frame": b'\0\0\0\x20{"verb":',
    "no-bytes": b"\0\0\0\0",
    "huge": b"\xff\xff\xff\xff" + b"x" * 1000,
    "not-json": b"\0\0\0\x04haha",
    "not-utf8": b'\0\0\0\x0c{"verb":"\xff"',
    "not-a-request": b"\0\0\0\x02[]",
    "deep": (3000).to_bytes(4, "big") + b"[" * 3000,
    "unknown-verb": b'\0\0\0\x0f{"verb":"\\u001b"}',
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "bad-job": b'\0\0\0\x2e{"verb":"logs","job_id":"../../../etc/passwd"}',
}


@pytest.mark.parametrize("name", FRAMES)
def test_a_client_that_misbehaves_hurts_nobody(rig: Rig, name: str) -> None:
    calm = max(asked_within_s(rig) for _ in range(2))
    with connect(rig, FRAMES[name]), connect(rig):
        assert asked_within_s(rig) < 1.0 + 10 * calm
    rig.assert_unharmed()


def test_many_clients_keep_nobody_out(rig: Rig) -> None:
    clients: list[socket.socket] = []
    calm = max(asked_within_s(rig) for _ in range(5))
    try:
        clients.extend(connect(rig, FRAMES["half-a-frame"]) for _ in range(100))
        took = [asked_within_s(rig) for _ in range(5)]
        print(f"status with 100 other clients: {max(took) * 1000:.1f} ms at worst, {calm * 1000:.1f} without")
        assert max(took) < 1.0 + 10 * calm
    finally:
        for client in clients:
            client.close()
    rig.assert_unharmed()


def asked_within_s(rig: Rig) -> float:
    """Ask for the status and give how long that took."""
    began = clock.now()
    rig.node.now()
    return clock.now() - began


# --- what a job can reach ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trespasser(rig: Rig) -> dict[str, Any]:
    """What a job saw and could do while another one ran."""
    assert rig.node.process is not None
    rig.mock.submit({"job_id": "victim", **task("wait_for_release")})
    secret = rig.node.jobs / "victim" / "output" / "secret"
    wait_until(secret.exists, PATIENCE_S)
    theirs, node = str(secret.parent.parent), str(rig.node.directory)
    trespass = task("trespass", other=theirs, node=node, supervisor=rig.node.process.pid)
    rig.mock.submit({"job_id": "thief", **trespass})
    found = outcome(rig, "thief")
    (secret.parent.parent / "work" / "release").touch()
    assert outcome(rig, "victim").result == "released"
    assert isinstance(found.result, dict), found
    return found.result


def test_a_job_has_no_descriptors_but_its_own(trespasser: dict[str, Any]) -> None:
    fds = {int(number): target for number, target in trespasser["fds"].items()}
    assert sorted(fds) == [0, 1, 2, 3]
    assert fds[0] == os.devnull
    assert fds[1] == fds[2] != fds[3]
    assert all(re.fullmatch(r"pipe:\[\d+\]", fds[number]) for number in (1, 2, 3))


def test_a_job_has_no_environment_but_its_own(trespasser: dict[str, Any]) -> None:
    environment = trespasser["environment"]
    ours = re.compile(r"PATH|HOME|TMPDIR|LANG|LC_CTYPE|AITBC_.*|CUDA_.*|NVIDIA_VISIBLE_DEVICES")
    assert [name for name in environment if not ours.fullmatch(name)] == []
    assert TOKEN not in json.dumps(environment)


def test_a_job_reaches_nothing_of_anybody_else(trespasser: dict[str, Any]) -> None:
    done = {what for what, came_of_it in trespasser["tries"].items() if came_of_it == "done"}
    if ROOT:
        assert done == set()
        assert 0 not in trespasser["uids"]
    else:
        # Without a user of its own it is held by the kernel alone.
        assert not done & {"become root", "leave the cgroup"}
