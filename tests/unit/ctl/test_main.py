"""The client against the real control socket, served in a thread with made-up answers."""

import json
import os
import pty
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from aitbc_miner.control.protocol import (
    Answer,
    Done,
    Files,
    FullAnswer,
    JobRow,
    Jobs,
    Judged,
    Later,
    Problem,
    Refusal,
    Request,
    SlotStatus,
    Status,
)
from aitbc_miner.control.server import ControlServer
from aitbc_miner.ctl import ask, logs
from aitbc_miner.ctl import main as ctl
from aitbc_miner.ctl.pages import amount, job_page, jobs_page, plain, slots_page, status_page
from aitbc_miner.errors import CODES, ErrorCode
from aitbc_miner.ipc.messages import CoordinatorView, SlotView
from aitbc_miner.jobs import Artifact, ExitStatus, JobUse, LogInfo, Outcome, State, Usage
from aitbc_miner.slots.placement import Offer
from aitbc_miner.util.terminal import columns, cut, duration, visible, wrap

DEADLINE_S = 20.0
EVIL = "bell\x07 \x1b[2Jcleared \x9b31m \u202egnp.exe\nnext"


class Desk:
    """Answers as it is told; notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Request] = []
        self.reply: Callable[[Request], FullAnswer] = lambda _: (Done("done"), [])

    def answer(self, request: Request, _later: Later) -> FullAnswer:
        self.asked.append(request)
        return self.reply(request)

    def says(self, answer: Answer, *files: Path) -> None:
        self.reply = lambda _: (answer, [os.open(file, os.O_RDONLY) for file in files])


class Served:
    """A control server that turns in a thread of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.desk = Desk()
        self._server = ControlServer(path, self.desk.answer)
        self._wake, self._woken = os.pipe()[::-1]
        self._thread = threading.Thread(target=self._turn)
        self._thread.start()

    def _turn(self) -> None:
        while True:
            sources = self._server.sources()
            readers = [fd for fd, (_, wanted) in sources.items() if wanted & select.POLLIN]
            writers = [fd for fd, (_, wanted) in sources.items() if wanted & select.POLLOUT]
            readable, writable, _ = select.select([self._woken, *readers], writers, [])
            if self._woken in readable:
                return
            for fd in {*readable, *writable}:
                if fd in self._server.sources():
                    sources[fd][0]()

    def close(self) -> None:
        os.close(self._wake)
        self._thread.join(DEADLINE_S)
        os.close(self._woken)
        self._server.close()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    server = Served(tmp_path / "run" / "control.sock")
    yield server
    server.close()


def environ(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AITBC_")}
    root = str(Path(__file__).resolve().parents[3])
    return kept | {"PYTHONPATH": root, "LC_ALL": "C.UTF-8"} | more


def run(path: Path | str, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "aitbc_miner.ctl.main", "--socket", str(path), *words]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=DEADLINE_S, env=environ(**more), check=False
    )


@contextmanager
def child_in_time(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command that is killed at its deadline, so that nobody waits for its output for ever."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, env=environ()) as child:
        killer = threading.Timer(DEADLINE_S, child.kill)
        killer.start()
        try:
            yield child
        finally:
            killer.cancel()
            child.kill()


def on_terminal(path: Path, *words: str, **more: str) -> str:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "aitbc_miner.ctl.main", "--socket", str(path), *words]
    with subprocess.Popen(command, stdout=theirs, env=environ(TERM="xterm", **more)) as child:
        os.close(theirs)
        shown = b""
        while select.select([ours], [], [], DEADLINE_S)[0]:
            try:
                shown += os.read(ours, 65536)
            except OSError:  # how a terminal says that its last user has gone
                break
        assert child.wait(DEADLINE_S) == 0
    os.close(ours)
    return shown.decode()


def slot(
    name: str, state: str = "IDLE", job: str | None = None, for_s: float = 5.0, **more: object
) -> SlotStatus:
    view = SlotView(
        Offer(name, "cpu", 2, 1024),
        state,
        free=job is None,
        job_id=job,
        job_state=State.RUNNING if job else None,
        enforced={"memory": "rlimit", "cpu": "nice"},
    )
    return SlotStatus(msgspec.structs.replace(view, **more), for_s)


def status(**changes: object) -> Status:
    made = Status(
        node_id="node-1",
        version="0.1.0",
        pid=42,
        up_s=3_700.0,
        accepting=True,
        stopping=False,
        coordinator=CoordinatorView(True, "2026-01-02T03:04:05.678Z", registered=True),
        base_url="https://coordinator.example/api/v1",
        slots=[slot("cpu0", "BUSY", "j-1", 63.0), slot("cpu1")],
        queued=["j-2"],
        pending_reports=1,
        finished={"E_EXIT": 3, "OK": 12},
        problems=[Problem("cannot deliver: refused", "nothing is lost")],
    )
    return msgspec.structs.replace(made, **changes)


USE = JobUse(63.0, 7200.0, 42.0, "epoch 3", 180.0, 200, 512 << 20, 1 << 30, 100 << 20, 20 << 30)
USED = "42 %, 1m03s of 2h00m, CPU 1.8 of 2, memory 0.5 of 1 GiB, disk 0.1 of 20 GiB, epo"


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever terminal the tests run in."""
    monkeypatch.setenv("COLUMNS", "80")


def test_a_running_job_shows_how_far_it_is_and_what_it_uses() -> None:
    busy = msgspec.structs.replace(slot("cpu0", "BUSY", "j-1", 63.0), use=USE)
    running = row(State.RUNNING, use=USE, wall_s=None)
    known = {"manifest": None, "state": None, "outcome": None}
    for page in (
        status_page(status(slots=[busy, slot("cpu1")]), plain),
        slots_page(status(slots=[busy]), plain),
        jobs_page(Jobs([running]), plain),
        job_page(running, known, plain),
    ):
        shown = " ".join(page.split())
        assert USED[:72] in shown, page
        assert max(map(columns, page.splitlines())) <= 80
    assert "epoch 3" in " ".join(job_page(running, known, plain).split())


@pytest.mark.parametrize("wide", [40, 80, 200])
def test_pages_fit_the_terminal(monkeypatch: pytest.MonkeyPatch, wide: int) -> None:
    monkeypatch.setenv("COLUMNS", str(wide))
    rows = [
        row(job_id="j" * n, message="漢字 " * 60, code=ErrorCode.E_EXIT, slot="s" * 30) for n in (1, 36, 128)
    ]
    page = jobs_page(Jobs([*rows, row(State.RUNNING, use=USE)]), plain)
    assert "E_EXIT 漢字" in page
    if wide >= 80:
        pages = [page, status_page(status(base_url="https://" + "h" * 300), plain)]
        pages.append(job_page(rows[1], {"manifest": None, "state": None, "outcome": None}, plain))
        assert max(columns(line) for page in pages for line in page.splitlines()) <= wide
    assert max(map(columns, page.splitlines())) <= max(wide, 48)


def row(state: State = State.DONE, **changes: object) -> JobRow:
    return msgspec.structs.replace(JobRow("j-1", state, "cli", "cpu0", wall_s=3.2, artifacts=1), **changes)


# --- status ------------------------------------------------------------------------------------------------


def test_status_tells_all_that_matters(served: Served) -> None:
    served.desk.says(status())
    done = run(served.path, "status")
    assert (done.returncode, done.stderr) == (0, "")
    for part in (
        *(
            "node-1",
            "0.1.0",
            "1h01m",
            "https://coordinator.example/api/v1",
            "reachable since 2026-01-02 03:04:05",
        ),
        *("registered", "accepting", "1 queued", "1 report waiting", "OK 12, E_EXIT 3"),
        *("cpu0", "BUSY", "j-1", "RUNNING", "1m03s", "cpu=nice memory=rlimit"),
        *("cannot deliver: refused", "nothing is lost"),
    ):
        assert part in done.stdout
    assert "\x1b" not in done.stdout
    assert served.desk.asked == [Request("status")]


def test_status_fits_one_screen_however_much_there_is() -> None:
    long = "word " * 200
    full = status(
        node_id="n" * 64,
        base_url="https://" + "h" * 300,
        slots=[
            msgspec.structs.replace(
                slot("s" * 30 + str(i), "QUARANTINED", "j" * 128, 1e9),
                slot=msgspec.structs.replace(
                    slot("s" * 30 + str(i)).slot, enforced={f"limit{j}": f"way{i}" for j in range(20)}
                ),
            )
            for i in range(40)
        ],
        finished=dict.fromkeys(ErrorCode, 10**9),
        problems=[Problem(long, long)] * 30,
        coordinator=CoordinatorView(False, "2026-01-02T03:04:05.678Z"),
        accepting=False,
    )
    lines = status_page(full, plain).split("\n")
    assert len(lines) <= 23
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("! word") for line in lines)
    assert any("more; see `aitbc-minerctl --json status`" in line for line in lines)
    assert any("slots more; see `aitbc-minerctl slots`" in line for line in lines)


def test_all_that_has_finished_is_told() -> None:
    page = status_page(status(finished=dict.fromkeys(ErrorCode, 7), slots=[slot("cpu0")]), plain)
    assert all(f"{code} 7" in page for code in ErrorCode)
    assert max(map(len, page.split("\n"))) <= 80


def test_what_is_cut_from_status_is_idle_and_slots_has_it() -> None:
    many = status(slots=[*(slot(f"idle{i}") for i in range(12)), slot("last", "BUSY", "j-9")])
    assert "last" in status_page(many, plain)
    assert "… and 6 slots more" in status_page(many, plain)
    page = slots_page(many, plain)
    assert all(f"idle{i} " in page for i in range(12))


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"accepting": False}, "draining: no new jobs"),
        ({"stopping": True}, "stopping"),
        ({"slots": []}, "no slots yet"),
        ({"finished": {}}, "none yet"),
        ({"finished": {"OK": 0, "E_EXIT": 0}}, "none yet"),
        ({"finished": {"OK": 0, "E_EXIT": 2}}, f"{'finished':12}E_EXIT 2\n"),
        ({"coordinator": CoordinatorView(False, "", error="not asked yet")}, "not asked yet, since ?, not"),
        ({"slots": [slot("cpu0", "ADOPTED", "j-1", enforced={})]}, "limits      as set by its worker"),
        (
            {"coordinator": CoordinatorView(False, "", error="no answer")},
            "not reachable since ?, not registered",
        ),
        ({"coordinator": CoordinatorView(False, "")}, "not asked yet, since ?, not"),
        ({"accepting": False, "paused": "the disk is full"}, "paused: the disk is full\n"),
    ],
)
def test_status_of_a_node_that_is_not_well(changes: dict[str, object], shown: str) -> None:
    assert shown in status_page(status(**changes), plain)


def test_colours_only_on_a_terminal_that_wants_them(served: Served) -> None:
    served.desk.says(status())
    assert "\x1b[32mreachable\x1b[0m" in on_terminal(served.path, "status")
    assert "\x1b" not in on_terminal(served.path, "status", NO_COLOR="1")


def test_nothing_from_outside_reaches_the_terminal_as_a_command(served: Served) -> None:
    view = msgspec.structs.replace(slot("cpu0").slot, reason=EVIL)
    served.desk.says(
        status(
            base_url=EVIL,
            node_id=EVIL,
            problems=[Problem(EVIL, EVIL)],
            slots=[SlotStatus(view, 1.0)],
            coordinator=CoordinatorView(True, EVIL),
        )
    )
    for words in (["status"], ["slots"], ["--json", "status"]):
        shown = on_terminal(served.path, *words, NO_COLOR="1")
        assert not {"\x07", "\x1b", "\x9b", "\u202e"} & set(shown), words
        assert "\\x1b[2J" in shown or "\\u001b[2J" in shown


# --- jobs, job ---------------------------------------------------------------------------------------------


def test_jobs(served: Served) -> None:
    failed = row(State.FAILED, job_id="j-2", code=ErrorCode.E_DENY, message=f"no {EVIL}")
    served.desk.says(Jobs([row(), failed]))
    done = run(served.path, "jobs", "--state", "done")
    assert served.desk.asked == [Request("jobs", None, State.DONE)]
    lines = done.stdout.splitlines()
    assert lines[1].split() == ["j-1", "DONE", "cpu0", "3s", "1", "artifact"]
    assert lines[2].startswith("j-2  FAILED      cpu0          3s  E_DENY no bell\\x07")
    assert len(lines) == 3


def test_no_jobs(served: Served) -> None:
    served.desk.says(Jobs([]))
    assert run(served.path, "jobs").stdout == "no jobs\n"
    assert json.loads(run(served.path, "--json", "jobs").stdout) == {"type": "jobs", "jobs": []}


def records(directory: Path, **content: object) -> dict[str, Path]:
    files = {}
    for name, value in content.items():
        files[f"{name}.json"] = directory / f"{name}.json"
        files[f"{name}.json"].write_bytes(value if isinstance(value, bytes) else msgspec.json.encode(value))
    return files


OUTCOME = Outcome(
    job_id="j-1",
    code=ErrorCode.E_SIGNAL,
    message="ended by signal 9",
    exit=ExitStatus(signal=9, killed_for="timeout"),
    usage=Usage(wall_s=1.5, user_s=0.25, peak_memory_bytes=3 << 20),
    timings={"run": 1.5, "total": 2.0},
    artifacts=[Artifact("out.txt", "work/out.txt", 11, "a" * 64)],
    result={"n": 1},
    log=LogInfo(bytes=9, dropped=4, tail="one\ntwo\x1b[31m\n"),
    enforced={"memory": "rlimit"},
)


def test_job_page(served: Served, tmp_path: Path) -> None:
    manifest = {"job_id": "j-1", "runner": "cli", "command": "ffmpeg", "args": ["-y", "-i", "in"]}
    files = records(tmp_path, manifest=manifest, state={}, outcome=OUTCOME)
    served.desk.says(Files(row(State.FAILED), list(files)), *files.values())
    done = run(served.path, "job", "j-1")
    assert (done.returncode, done.stderr) == (0, "")
    info = CODES[ErrorCode.E_SIGNAL]
    for part in (
        *("j-1  FAILED", "cli ffmpeg", "-y -i in", info.meaning, info.advice, "ended by signal 9"),
        *("signal 9 (SIGKILL), ended by the miner (timeout)", "run 1.500 s", "wall 1.50 s", "user 0.25 s"),
        *("peak memory 3.00 MiB", "memory=rlimit", '{"n":1}', "out.txt  11 bytes", "a" * 64),
        *("log (9 bytes, 4 dropped)", "  | one", "  | two\\x1b[31m", "aitbc-minerctl logs j-1"),
    ):
        assert " ".join(part.split()) in " ".join(done.stdout.split()), part
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("outcome", "shown"),
    [
        (Outcome(job_id="j-1", code=ErrorCode.E_DENY, timings={"prepare": 0.1}), "never ran"),
        (Outcome(job_id="j-1", code=ErrorCode.E_LOST), "not run to its end"),
        (Outcome(job_id="j-1", code=ErrorCode.E_SANDBOX, timings={"run": 0.1}), "not run to its end"),
        (Outcome(job_id="j-1", exit=ExitStatus(status=0)), "status 0"),
    ],
)
def test_exit_of_a_job(outcome: Outcome, shown: str) -> None:
    known = {"manifest": None, "state": None, "outcome": msgspec.to_builtins(outcome)}
    page = job_page(row(State.FAILED, runner=""), known, plain)
    assert f"{'exit':12}{shown}\n" in page
    assert f"{'runner':12}-\n" in page


def test_job_as_json_has_its_files_by_the_names_they_come_with(served: Served, tmp_path: Path) -> None:
    files = records(tmp_path, outcome=OUTCOME, manifest={"job_id": "j-1", "x": "\x9b"})
    served.desk.says(Files(row(), list(files)), *files.values())
    done = run(served.path, "--json", "job", "j-1")
    value = json.loads(done.stdout)
    assert list(value) == ["job", "manifest", "state", "outcome", "receipt"]
    assert value["manifest"] == {"job_id": "j-1", "x": "\x9b"}
    assert value["state"] is None
    assert value["job"]["state"] == "DONE"
    assert value["outcome"]["exit"]["signal"] == 9
    assert done.stdout.isascii()


def shown_receipt(receipt: object, **more: object) -> list[str]:
    value = {"receipt": receipt, "verified": False, "version": 1, **more}
    known = {"manifest": None, "state": None, "outcome": None, "receipt": value}
    return job_page(row(), known, plain).splitlines()


def test_a_receipt_that_verified_is_shown_with_what_it_is_worth() -> None:
    said = {"receipt_id": "b" * 32, "unit_type": "gpu_seconds", "signature": {"key_id": "K" * 43}}
    page = shown_receipt(said, verified=True, units=1.5, price=0.03)
    assert f"receipt     verified, signed by {'K' * 43}" in page
    assert f"worth 1.5 gpu_seconds, price 0.03; receipt {'b' * 32}" in " ".join(" ".join(page).split())


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        *((None, "-"), (0.0, "0"), (1.0, "1"), (0.1 + 0.2, "0.3"), (0.00001, "0.00001"), (1e6, "1000000")),
        *((100.0, "100"), (12_345_678.9, "12345678.9"), (1e20, "100000000000000000000"), (0.02, "0.02")),
    ],
)
def test_amounts_are_decimals(number: float | None, shown: str) -> None:
    assert amount(number) == shown


def test_a_receipt_that_did_not_verify_says_so_whatever_stands_in_it() -> None:
    lie = "1 unit\nreceipt     verified, signed by me\n\x1b[2J" + "x" * 500
    said = {"receipt_id": lie, "unit_type": lie, "signature": {"key_id": lie}}
    page = shown_receipt(said, why="it is for another job")
    assert "receipt     NOT VERIFIED: it is for another job" in page
    assert sum(line.startswith("receipt") for line in page) == 1
    assert "x" * 20 not in "".join(page), "nor can it fill the screen"
    assert "\x1b" not in "".join(page)
    assert max(map(len, page)) <= 80


@pytest.mark.parametrize("said", [{}, {"unit_type": [1], "receipt_id": {"x": 1}, "signature": 7}])
def test_a_receipt_without_anything_in_it(said: object) -> None:
    assert "worth       - units, price -; receipt none" in shown_receipt(said, why="it bears no signature")


@pytest.mark.parametrize("value", [[], {"receipt": 5}, {"version": 2}, "text"])
def test_a_receipt_that_is_no_record_of_ours_is_left_out(value: object) -> None:
    known = {"manifest": None, "state": None, "outcome": None, "receipt": value}
    assert "receipt" not in job_page(row(), known, plain)


@pytest.mark.parametrize("broken", [b"", b"{", b'"\xff"', b"[" * 100_000, b"5"])
def test_job_with_broken_records_still_shows_the_rest(served: Served, tmp_path: Path, broken: bytes) -> None:
    files = records(tmp_path, manifest=broken, outcome=broken)
    served.desk.says(Files(row(), list(files)), *files.values())
    done = run(served.path, "job", "j-1")
    assert done.returncode == 0
    assert done.stdout.startswith("j-1  DONE")
    assert "Traceback" not in done.stderr


# --- logs --------------------------------------------------------------------------------------------------


def test_logs_copies_bytes_as_they_are(served: Served, tmp_path: Path) -> None:
    log = tmp_path / "exec.log"
    log.write_bytes(bytes(range(256)) * 2000)
    served.desk.says(Files(row(State.RUNNING), ["exec.log"]), log)
    command = [sys.executable, "-m", "aitbc_miner.ctl.main", "--socket", str(served.path), "logs", "j-1"]
    done = subprocess.run(command, capture_output=True, env=environ(), timeout=DEADLINE_S, check=True)
    assert done.stdout == log.read_bytes()


def test_logs_on_a_terminal_do_nothing_to_it(served: Served, tmp_path: Path) -> None:
    log = tmp_path / "exec.log"
    log.write_bytes(b"a\tb\x1b]0;title\x07\r\n50%\r100%\n\xff\xc2\x9b31m\n")
    served.desk.says(Files(row(), ["exec.log"]), log)
    shown = on_terminal(served.path, "logs", "j-1")
    expected = "a\tb\\x1b]0;title\\x07\n50%\n100%\n\N{REPLACEMENT CHARACTER}\\x9b31m\n"
    assert shown.replace("\r\n", "\n") == expected


def test_logs_as_json_lines(served: Served, tmp_path: Path) -> None:
    log = tmp_path / "exec.log"
    log.write_bytes("eins\n\nzwei ü\u2028x\n".encode() + b"long" * 50_000 + b"\nno end \xe2")
    served.desk.says(Files(row(), ["exec.log"]), log)
    done = run(served.path, "--json", "logs", "j-1")
    lines = [json.loads(line)["line"] for line in done.stdout.splitlines()]
    assert lines == ["eins", "", "zwei ü\u2028x", "long" * 50_000, "no end \N{REPLACEMENT CHARACTER}"]


def test_no_log_yet(served: Served) -> None:
    served.desk.says(Files(row(State.PULLED), []))
    done = run(served.path, "logs", "j-1")
    assert (done.returncode, done.stdout) == (1, "")
    assert "cannot show the log of job j-1: the job has no log; its state is PULLED" in done.stderr


def test_follow_begins_before_the_log_is_there_and_ends_with_the_job(served: Served, tmp_path: Path) -> None:
    log = tmp_path / "exec.log"
    rounds: list[State] = []

    def reply(_: Request) -> FullAnswer:
        # Each question finds the job a step further on and the log a line longer; the last line comes
        # together with the end of the job.
        states = [State.PREP, State.RUNNING, State.COLLECTING, State.UPLOADING]
        rounds.append(states[len(rounds)])
        if rounds[-1] == State.PREP:
            return Files(row(State.PREP), []), []
        with log.open("a") as file:
            file.write(f"{rounds[-1]}\n")
        return Files(row(rounds[-1]), ["exec.log"]), [os.open(log, os.O_RDONLY)]

    served.desk.reply = reply
    done = run(served.path, "logs", "-f", "j-1")
    assert (done.returncode, done.stdout) == (0, "RUNNING\nCOLLECTING\nUPLOADING\n")
    assert {request.verb for request in served.desk.asked} == {"logs"}


def test_follow_shows_a_line_without_asking_again(served: Served, tmp_path: Path) -> None:
    log = tmp_path / "exec.log"
    log.write_text("first\n")
    served.desk.says(Files(row(State.RUNNING), ["exec.log"]), log)
    command = [
        sys.executable,
        "-m",
        "aitbc_miner.ctl.main",
        "--socket",
        str(served.path),
        "logs",
        "-f",
        "j-1",
    ]
    # As in the background of a script.
    with child_in_time("sh", "-c", "trap '' INT; exec \"$@\"", "sh", *command) as child:
        assert child.stdout
        assert child.stderr
        assert child.stdout.readline() == b"first\n"
        with log.open("a") as file:
            file.write("second\n")
        assert child.stdout.readline() == b"second\n"
        child.send_signal(2)
        assert child.wait(DEADLINE_S) == 130
        assert child.stderr.read() == b""


def test_a_log_that_begins_anew_is_shown_from_its_beginning(tmp_path: Path) -> None:
    log = tmp_path / "exec.log"
    log.write_text("try 2")
    pieces: list[bytes] = []

    def keep(data: bytes, *, last: bool = False) -> None:
        pieces.append(data)

    with log.open("rb", buffering=0) as file:
        assert logs._copy(file, 100, keep) == 5
    assert pieces == [b"try 2"]


def test_a_reader_that_leaves_is_no_error(served: Served, tmp_path: Path) -> None:
    log = tmp_path / "exec.log"
    log.write_bytes(b"x" * (4 << 20))
    served.desk.says(Files(row(), ["exec.log"]), log)
    command = [sys.executable, "-m", "aitbc_miner.ctl.main", "--socket", str(served.path), "logs", "j-1"]
    with child_in_time(*command) as child:
        assert child.stdout
        assert child.stderr
        child.stdout.read(10)
        child.stdout.close()
        assert child.stderr.read() == b""
        assert child.wait(DEADLINE_S) == 141


def test_a_full_disk_is_told(served: Served) -> None:
    served.desk.says(status())
    command = [sys.executable, "-m", "aitbc_miner.ctl.main", "--socket", str(served.path), "status"]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, env=environ(), timeout=DEADLINE_S, check=False
        )
    assert done.returncode == 1
    assert done.stderr == b"aitbc-minerctl: cannot finish the command: No space left on device\n"


# --- orders, refusals, faults ------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["drain"], ["resume"], ["cancel", "j-1"]])
def test_orders(served: Served, words: list[str]) -> None:
    served.desk.says(Done("as you wish"))
    assert run(served.path, *words).stdout == "as you wish\n"
    value = json.loads(run(served.path, "--json", *words).stdout)
    assert value == {"type": "done", "message": "as you wish"}
    assert served.desk.asked[0] == Request(words[0], words[1] if len(words) > 1 else None)


def test_slots_as_json_are_the_slots(served: Served) -> None:
    served.desk.says(status())
    value = json.loads(run(served.path, "--json", "slots").stdout)
    assert list(value) == ["slots"]
    assert json.loads(run(served.path, "slots", "--json").stdout) == value
    assert [entry["slot"]["offer"]["name"] for entry in value["slots"]] == ["cpu0", "cpu1"]


DENIED = Judged(
    permitted=False,
    message="argument 4 ('99') is not a value of -crf",
    file="/etc/aitbc/miner/allowlist.d/ffmpeg.yaml",
    line=21,
    rule="sections[2].options[1].value",
    argument=4,
    fits=["a whole number from 0 to 51", "-y"],
    notes=["only in \x1bslots"],
)


def test_a_denied_command_is_shown_with_its_rule_and_ends_with_1(served: Served) -> None:
    served.desk.says(DENIED)
    done = run(served.path, "allow", "--input", "a.mp4", "--", "ffmpeg", "-i", "a.mp4", "--", "x")
    assert done.stdout.splitlines() == [
        "denied      argument 4 ('99') is not a value of -crf",
        "by          /etc/aitbc/miner/allowlist.d/ffmpeg.yaml:21:",
        "            sections[2].options[1].value",
        "would fit   a whole number from 0 to 51",
        "would fit   -y",
        "note        only in \\x1bslots",
    ]
    assert (done.returncode, done.stderr) == (1, "")
    command = ["ffmpeg", "-i", "a.mp4", "--", "x"]
    assert served.desk.asked == [Request("allow", command=command, inputs=["a.mp4"])]
    done = run(served.path, "allow", "--json", "--", "ffmpeg")
    assert done.returncode == 1
    assert json.loads(done.stdout) == {"type": "judged", **msgspec.to_builtins(DENIED)}
    assert served.desk.asked[1] == Request("allow", command=["ffmpeg"])


def test_a_permitted_command_ends_with_0(served: Served) -> None:
    served.desk.says(Judged(permitted=True, message="/usr/bin/true -v", file="/etc/true.yaml"))
    done = run(served.path, "allow", "true", "--", "-v")
    assert (done.returncode, done.stdout) == (0, "permitted   /usr/bin/true -v\nby          /etc/true.yaml\n")
    assert served.desk.asked == [Request("allow", command=["true", "-v"])]


@pytest.mark.parametrize("args", [["\udcff"], ["x" * 100_000] * 3, ["\x01" * 50_000]])
def test_a_command_that_cannot_be_asked_for_is_wrong_usage(served: Served, args: list[str]) -> None:
    done = run(served.path, "allow", "--", "true", *args)
    assert done.returncode == 2
    assert done.stderr.startswith("aitbc-minerctl: cannot ask the miner: ")
    assert served.desk.asked == []


@pytest.mark.parametrize("code", [1, 77])
def test_a_refusal_brings_its_exit_status(served: Served, code: int) -> None:
    served.desk.says(Refusal("cannot cancel: no\x1b", code))
    done = run(served.path, "cancel", "j-1")
    assert (done.returncode, done.stdout, done.stderr) == (
        code,
        "",
        "aitbc-minerctl: cannot cancel: no\\x1b\n",
    )


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["fly"],
        ["job"],
        ["job", "../x"],
        ["job", "\udcff"],
        ["jobs", "--state", "LOST"],
        ["logs", "x" * 129],
        ["allow"],
        ["allow", "ffmpeg", "-i", "a.mp4"],
    ],
)
def test_usage(tmp_path: Path, words: list[str]) -> None:
    done = run(tmp_path / "none", *words)
    assert done.returncode == 2
    assert "usage: aitbc-minerctl" in done.stderr


def test_no_miner_there(tmp_path: Path) -> None:
    path = tmp_path / "none.sock"
    done = run(path, "status")
    assert done.returncode == 69
    assert f"cannot reach the miner at {path}: No such file or directory; check `systemctl" in done.stderr
    assert run("/" + "x" * 200, "status").returncode == 69


def test_the_socket_of_the_configuration_s_variable_is_used(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "aitbc_miner.ctl.main", "status"]
    path = str(tmp_path / "elsewhere.sock")
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=environ(AITBC_MINER_CONTROL__SOCKET=path),
        timeout=DEADLINE_S,
        check=False,
    )
    assert (done.returncode, path in done.stderr) == (69, True)


def test_a_socket_that_nobody_listens_on_any_more(tmp_path: Path) -> None:
    path = tmp_path / "old.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    done = run(path, "status")
    assert done.returncode == 69
    assert "Connection refused" in done.stderr


def frame(body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + body


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"\0",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        frame(b"{}"),
        frame(b'{"type":"refusal"}'),
        frame(b'{"type":"done","message":"\xff"}'),
        frame(b"[" * 100_000),
        frame(b'{"type":"done","message":"x"}') + b"more",
        frame(b'{"type":"done"')[:-3],
    ],
)
def test_garbage_for_an_answer(tmp_path: Path, said: bytes) -> None:
    path = tmp_path / "garbage.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(DEADLINE_S)

        def talk() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.recv(4096)
                peer.sendall(said)

        thread = threading.Thread(target=talk)
        thread.start()
        done = run(path, "status")
        thread.join(DEADLINE_S)
    assert done.returncode == 69
    assert done.stderr.startswith("aitbc-minerctl: cannot reach the miner at ")
    assert "Traceback" not in done.stderr


def test_an_answer_to_another_question(served: Served, tmp_path: Path) -> None:
    served.desk.says(Files(row(), ["manifest.json", "state.json"]), *records(tmp_path, manifest={}).values())
    assert run(served.path, "job", "j-1").returncode == 69
    assert run(served.path, "status").returncode == 69
    served.desk.says(Done("?"))
    assert run(served.path, "job", "j-1").returncode == 69


def test_a_miner_that_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "silent.sock"
    monkeypatch.setattr(ask, "TIMEOUT_S", 0.1)
    monkeypatch.setattr(sys, "argv", ["aitbc-minerctl", "--socket", str(path), "status"])
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        assert ctl.main() == 69
    assert "no answer within 0.1 s" in capsys.readouterr().err


def test_a_closed_socket_is_not_permitted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def closed(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(ask, "ask", closed)
    monkeypatch.setattr(sys, "argv", ["aitbc-minerctl", "status"])
    assert ctl.main() == 77
    assert "use sudo, or join the group aitbc-view\n" in capsys.readouterr().err


def test_it_imports_little() -> None:
    code = "import sys, aitbc_miner.ctl.main; print(*sys.modules)"
    # Where the coverage of children is measured, what measures it would be seen as well.
    alone = {name: value for name, value in environ().items() if not name.startswith("COV")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=alone, check=True)
    loaded = set(done.stdout.split())
    assert "aitbc_miner.control.server" in loaded
    assert not loaded & {"requests", "yaml", "psutil", "asyncio", "multiprocessing", "prometheus_client"}


# --- text --------------------------------------------------------------------------------------------------


def test_texts() -> None:
    assert visible("plain ü") == "plain ü"
    assert visible("a\x1b\n") == "a\\x1b\\n"
    assert cut("abcdef", 6) == "abcdef"
    assert cut("abcdefg", 6) == "abcde…"
    assert cut("漢字漢字", 6) == "漢字…"
    assert wrap("- ", "one two three four", most=14) == ["- one two", "  three four"]
    assert wrap("- ", "one two three four", most=14, lines=1) == ["- one two…"]
    assert wrap("", "a " + "x" * 25, most=10) == ["a xxxxxxxx", "x" * 10, "x" * 7]
    wide = wrap("- ", "漢字" * 8, most=14)
    assert [columns(line) for line in wide] == [14, 14, 10]
    assert "".join(line[2:] for line in wide) == "漢字" * 8


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0s"), (59.9, "59s"), (60, "1m00s"), (3_661, "1h01m"), (90_000, "1d01h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
