"""Log lines: one event a line, and no secret in any of them."""

import contextlib
import io
import json
import logging
import os
import socket
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aitbc_miner.ipc.messages import FromWorker
from aitbc_miner.supervisor.children import Child
from aitbc_miner.util.log import (
    BACKLOG_BYTES,
    MASK,
    MAX_SECRETS,
    Formatter,
    configure,
    descriptors,
    events,
    flush,
    mask,
)

TOKEN = "tok-5f3a9c"


class Log(NamedTuple):
    """What was configured, and what it wrote."""

    formatter: Formatter
    stream: io.StringIO

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.stream.getvalue().splitlines()]

    def last(self) -> dict[str, Any]:
        return self.lines()[-1]


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Leave logging as it was."""
    root = logging.getLogger("aitbc_miner")
    before = root.handlers[:], root.level, root.propagate, logging.raiseExceptions
    yield
    for handler in root.handlers:
        handler.close()
    root.handlers[:], root.level, root.propagate, logging.raiseExceptions = before


@pytest.fixture(params=[True, False], ids=["json", "text"])
def either(request: pytest.FixtureRequest) -> Log:
    return made(as_json=request.param)


def made(*, as_json: bool = True, level: str = "debug") -> Log:
    stream = io.StringIO()
    configure("node-1", level=level, as_json=as_json, stream=stream)
    formatter = logging.getLogger("aitbc_miner").handlers[0].formatter
    assert isinstance(formatter, Formatter)
    return Log(formatter, stream)


# --- lines -------------------------------------------------------------------------------------------------


def test_a_line_says_when_where_and_what() -> None:
    log = made()
    events("worker", slot="cpu0").warning("job ended", job_id="j1", code="E_EXIT", seconds=1.5)
    (line,) = log.lines()
    assert line.pop("ts").endswith("Z")
    assert line == {
        "level": "warning",
        "node_id": "node-1",
        "job_id": "j1",
        "slot": "cpu0",
        "part": "worker",
        "event": "job ended",
        "attrs": {"code": "E_EXIT", "seconds": 1.5},
    }
    assert list(json.loads(log.stream.getvalue()))[:4] == ["ts", "level", "node_id", "job_id"]


def test_a_line_for_eyes_has_the_same_in_it() -> None:
    log = made(as_json=False)
    events("worker", slot="cpu0", job_id=None).info("job ended", job_id="j1", code="E_EXIT")
    line = log.stream.getvalue()
    for part in ("INFO", "worker", "j1 cpu0", "job ended", "code=E_EXIT"):
        assert part in line
    assert line.count("\n") == 1


def test_only_what_is_severe_enough_is_written() -> None:
    log = made(level="warning")
    events("agent").info("no")
    events("agent").error("yes")
    assert [line["event"] for line in log.lines()] == ["yes"]


def test_a_traceback_stays_in_its_line() -> None:
    log = made()
    try:
        fail(ValueError("two\nlines"))
    except ValueError:
        events("agent").exception("broken", job_id="j1")
    (line,) = log.lines()
    assert log.stream.getvalue().count("\n") == 1
    assert line["attrs"]["traceback"].startswith("Traceback (most recent call last):\n")
    assert line["attrs"]["traceback"].endswith("ValueError: two\nlines")


def fail(error: Exception) -> None:
    raise error


class Odd:
    def __str__(self) -> str:
        return "odd one"


ODD: dict[str, tuple[object, object]] = {
    "path": (Path("/a"), "/a"),
    "exception": (OSError(2, "gone"), "[Errno 2] gone"),
    "object": (Odd(), "odd one"),
    "nested": ({"a": [Odd()]}, {"a": ["odd one"]}),
    "line break": ("a\nb\x1b[2J", "a\nb\x1b[2J"),
    "not a number": (float("nan"), None),
}


@pytest.mark.parametrize(("value", "shown"), ODD.values(), ids=ODD)
def test_anything_can_be_an_attribute(value: object, shown: object) -> None:
    log = made()
    events("agent").info("odd", value=value)
    assert log.stream.getvalue().count("\n") == 1
    assert log.last()["attrs"] == {"value": shown}


@pytest.mark.parametrize(
    "value", ["\udcff.txt", "a\ud800", {("a", "b"): 1}, 10**400, {"a": {1, "b"}}], ids=ascii
)
def test_what_json_cannot_hold_is_logged_all_the_same(either: Log, value: object) -> None:
    events("agent").info("odd", value=value)
    text = either.stream.getvalue()
    assert "odd" in text
    assert text.count("\n") == 1
    # As the file or the journal will want it.
    text.encode()


def test_text_of_a_job_cannot_forge_a_line(either: Log) -> None:
    events("agent").info("ended", message="x\n12:00 INFO    agent  paid out\r\x1b[1A")
    text = either.stream.getvalue()
    assert text.count("\n") == 1
    assert "\x1b" not in text
    assert "\r" not in text


def test_a_file_is_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "miner.log"
    path.write_text("before\n")
    configure("node-1", level="info", as_json=True, path=str(path))
    events("agent").info("größer")
    first, second = path.read_text(encoding="utf-8").splitlines()
    assert first == "before"
    assert json.loads(second)["event"] == "größer"


@pytest.mark.parametrize("how", ["renamed", "removed"])
def test_a_file_that_was_renamed_or_removed_is_made_again(tmp_path: Path, how: str) -> None:
    path = tmp_path / "miner.log"
    configure("node-1", level="info", as_json=True, path=str(path))
    events("agent").info("before")
    path.rename(tmp_path / "miner.log.1") if how == "renamed" else path.unlink()
    events("agent").info("after")
    assert json.loads(path.read_text())["event"] == "after"
    if how == "renamed":
        assert json.loads((tmp_path / "miner.log.1").read_text())["event"] == "before"


def test_a_link_in_place_of_the_file_is_not_followed(tmp_path: Path) -> None:
    path = tmp_path / "miner.log"
    configure("node-1", level="info", as_json=True, path=str(path))
    path.rename(tmp_path / "old")
    path.symlink_to(tmp_path / "precious")
    events("agent").info("where to")
    assert not (tmp_path / "precious").exists()
    assert "where to" in (tmp_path / "old").read_text()


def test_a_child_that_may_not_open_the_new_file_gets_it(tmp_path: Path) -> None:
    path = tmp_path / "miner.log"
    configure("node-1", level="info", as_json=True, path=str(path))
    asked, ask = os.pipe()

    def speak(_pipe: object) -> None:
        # As somebody else, who has no right to the directory.
        (handler,) = logging.getLogger("aitbc_miner").handlers
        handler._uid = -1  # type: ignore[attr-defined]
        os.read(asked, 1)
        events("agent").info("from the child")

    child: Child[FromWorker] = Child("speaker", speak, FromWorker, keep=[asked])
    path.rename(tmp_path / "old")
    flush()
    os.write(ask, b".")
    assert child.reap() == "ended with exit status 0"
    assert json.loads(path.read_text())["event"] == "from the child"
    assert (tmp_path / "old").read_text() == ""
    logging.getLogger("aitbc_miner").handlers[0].close()
    os.close(asked)
    os.close(ask)


def test_a_child_without_room_for_a_descriptor_goes_on_with_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "miner.log"
    configure("node-1", level="info", as_json=True, path=str(path))
    (handler,) = logging.getLogger("aitbc_miner").handlers
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    theirs.setblocking(False)  # takes no keyword
    with ours, theirs:
        monkeypatch.setattr(handler, "inbox", theirs)
        ours.send(b".")  # as the kernel hands it over: the descriptor is left out
        events("agent").info("goes on")
    assert json.loads(path.read_text())["event"] == "goes on"
    handler.close()


def test_a_file_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        configure("node-1", level="info", as_json=True, path=str(tmp_path / "no/miner.log"))


def test_a_broken_log_ends_nobody() -> None:
    log = made()
    log.stream.close()
    events("agent").error("nobody hears it")


# --- readers that stall ------------------------------------------------------------------------------------


class Pipe(NamedTuple):
    """Where a log goes, and a way to take what is there without waiting."""

    ours: int
    theirs: int
    kept: set[int]

    def read(self) -> bytes:
        taken = b""
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(self.theirs, 1 << 20):
                taken += piece
        return taken

    def read_all(self) -> list[dict[str, Any]]:
        """Take all that is written and all that waits; a broken line is an error here."""
        taken = self.read()
        flush()
        while more := self.read():
            taken += more
            flush()
        return [json.loads(line) for line in taken.splitlines()]


def _pipe(path: Path) -> tuple[int, int, str | None]:
    theirs, ours = os.pipe()
    return ours, theirs, None


def _socket(path: Path) -> tuple[int, int, str | None]:
    ours, theirs = socket.socketpair()
    return ours.detach(), theirs.detach(), None


def _fifo(path: Path) -> tuple[int, int, str | None]:
    os.mkfifo(path)
    theirs = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    return os.open(path, os.O_WRONLY), theirs, str(path)


ENDS: dict[str, Callable[[Path], tuple[int, int, str | None]]] = {
    "pipe": _pipe,
    "pipe of somebody else": _pipe,
    "socket": _socket,
    "fifo": _fifo,
}


@pytest.fixture(params=ENDS)
def pipe(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pipe]:
    """Log into something whose reader decides when to read."""
    ours, theirs, path = ENDS[request.param](tmp_path / "fifo")
    os.set_blocking(theirs, False)
    if request.param == "pipe of somebody else":
        monkeypatch.setattr(os, "open", refused)
    with os.fdopen(ours, "w") as stream:
        configure("node-1", level="info", as_json=True, path=path, stream=stream)
        yield Pipe(ours, theirs, descriptors())
    os.close(theirs)


def refused(path: str, flags: int) -> int:
    raise PermissionError(13, "Permission denied", path)


def test_lines_arrive_at_once_when_somebody_reads(pipe: Pipe) -> None:
    events("agent").info("one")
    events("agent").info("two")
    assert [json.loads(line)["event"] for line in pipe.read().splitlines()] == ["one", "two"]


def test_a_reader_that_stalls_stops_nobody_and_learns_what_it_missed(pipe: Pipe) -> None:
    count = 4000
    for number in range(count):
        events("agent").info("told", number=number, much="x" * 500)
    found = pipe.read_all()
    told = [line["attrs"]["number"] for line in found if line["event"] == "told"]
    (notice,) = [line for line in found if line["event"] != "told"]
    assert notice["event"] == f"{count - len(told)} log lines were dropped"
    assert notice["level"] == "warning"
    # What was in the pipe, the notice where the gap is, and the last lines, for they say how it went on.
    at = found.index(notice)
    assert told == [*range(at), *range(count - (len(told) - at), count)]
    assert 0.9 * BACKLOG_BYTES < sum(len(json.dumps(line)) for line in found[at:]) < 1.1 * BACKLOG_BYTES
    events("agent").info("and on")
    assert [line["event"] for line in pipe.read_all()] == ["and on"]


def test_lines_longer_than_a_pipe_stay_whole(pipe: Pipe) -> None:
    for number in range(8):
        events("agent").info("long", number=number, much="x" * 100_000)
    found = pipe.read_all()
    assert {len(line["attrs"]["much"]) for line in found if line["event"] == "long"} == {100_000}
    assert found[-1]["attrs"]["number"] == 7


def test_a_reader_that_is_gone_stops_nobody(pipe: Pipe) -> None:
    for _ in range(2000):
        events("agent").info("told", much="x" * 500)
    with socket.socket() as other:
        os.dup2(other.fileno(), pipe.theirs)
    events("agent").info("nobody hears it")
    flush()


def test_a_child_does_not_write_what_waited_in_its_parent(pipe: Pipe) -> None:
    for number in range(800):
        events("agent").info("told", number=number, much="x" * 500)
    first = pipe.read()
    if (pid := os.fork()) == 0:
        events("worker").info("born")
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    (line,) = pipe.read().splitlines()[-1:]
    assert json.loads(line)["event"] == "born"
    assert first


def test_the_flags_of_what_others_have_open_are_left_alone(pipe: Pipe) -> None:
    assert os.get_blocking(pipe.ours)
    (fd,) = pipe.kept
    assert os.fstat(fd).st_ino == os.fstat(pipe.ours).st_ino
    assert not os.get_inheritable(fd)


def test_a_fifo_that_nobody_reads_yet_stops_no_start(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    configure("node-1", level="info", as_json=True, path=str(tmp_path / "fifo"))
    events("agent").info("early")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    assert json.loads(os.read(reader, 4096))["event"] == "early"
    os.close(reader)


# --- secrets -----------------------------------------------------------------------------------------------


SECRETS = [
    TOKEN,
    'quote"back\\slash',
    "line\nbreak-----",
    "tab\there",
    "größe-ünï",
    "<&>'",
    "100%s{x}",
    "/a/b",
]


@pytest.mark.parametrize("secret", SECRETS)
def test_a_secret_is_in_no_part_of_a_line(either: Log, secret: str) -> None:
    mask(secret)
    log = events("agent", slot=f"slot-{secret}")
    nested = {"a": [secret, {secret: 1}]}
    log.info(" ".join(["sent", secret, "off"]), job_id=secret, header=f"Bearer {secret}", nested=nested)
    text = either.stream.getvalue()
    assert MASK in text
    for form in forms(secret):
        assert form not in text


@pytest.mark.parametrize("secret", ['"level":', '"job_id":', "event", "true"])
def test_no_secret_makes_a_line_other_than_json(secret: str) -> None:
    stream = io.StringIO()
    configure("node-1", level="info", as_json=True, stream=stream)
    mask(secret)
    events("agent").info("sent", job_id="j1", done=True)
    line = json.loads(stream.getvalue())
    assert (line["event"], line["job_id"], line["level"]) == ("sent", "j1", "info")


@pytest.mark.parametrize("secret", SECRETS)
def test_a_secret_is_in_no_traceback(either: Log, secret: str) -> None:
    mask(secret)
    try:
        # Two arguments make Python show each as in source code.
        fail(ValueError(f"with {secret}", {"token": secret}))
    except ValueError:
        events("agent").exception("broken")
    text = either.stream.getvalue()
    assert "ValueError" in text
    for form in forms(secret):
        assert form not in text


def forms(secret: str) -> set[str]:
    """The ways in which a line could show it: itself, in JSON, as Python shows it, and that in JSON again."""
    shown = repr(secret)[1:-1]
    return {
        secret,
        json.dumps(secret, ensure_ascii=False)[1:-1],
        shown,
        json.dumps(shown, ensure_ascii=False)[1:-1],
    }


def test_a_secret_that_begins_like_another_leaves_nothing_behind(either: Log) -> None:
    either.formatter.add_secret("abcd")
    either.formatter.add_secret("abcd-efgh")
    either.formatter.add_secret("xx-abcd-efgh")
    events("agent").info("sent", token="abcd-efgh", other="xx-abcd-efgh")
    assert "efgh" not in either.stream.getvalue()
    assert "xx" not in either.stream.getvalue()


def test_secrets_can_be_given_at_once_or_later() -> None:
    record = logging.makeLogRecord({"name": "aitbc_miner.agent", "msg": f"{TOKEN} and other-one"})
    formatter = Formatter("node-1", as_json=True, secrets=[TOKEN])
    assert TOKEN not in formatter.format(record)
    assert "other-one" in formatter.format(record)
    formatter.add_secret("other-one")
    formatter.add_secret("other-one")
    assert json.loads(formatter.format(record))["event"] == f"{MASK} and {MASK}"


def test_of_many_tokens_the_first_and_the_last_are_masked(either: Log) -> None:
    either.formatter.add_secret("operator-secret")
    for number in range(50):
        either.formatter.add_secret(f"node-token-{number:03}")
        either.formatter.add_secret("operator-secret")
    assert len(either.formatter._secrets) == MAX_SECRETS
    events("agent").info("operator-secret node-token-049 node-token-043 node-token-042")
    assert f"{MASK} {MASK} {MASK} node-token-042" in either.stream.getvalue()


def test_what_is_too_short_to_be_a_secret_blanks_out_no_words(either: Log) -> None:
    for short in ("", "a", "job"):
        either.formatter.add_secret(short)
    events("agent").info("a job")
    assert "a job" in either.stream.getvalue()


TOKENS = st.text(string.ascii_letters + string.digits + "-._~+/=", min_size=8, max_size=20)


AROUND = st.text('"\\/ ä{}日:,', max_size=10)


@given(TOKENS, AROUND, AROUND)
def test_a_line_stays_json_and_has_no_token_wherever_it_stood(token: str, before: str, after: str) -> None:
    formatter = Formatter("n", as_json=True, secrets=[token])
    attrs = {"value": before + token + after, "list": [token]}
    line = formatter.format(logging.makeLogRecord({"name": "x", "msg": "y", "attrs": attrs}))
    assert "\n" not in line
    assert token not in line
    assert json.loads(line)["attrs"] == {"value": before + MASK + after, "list": [MASK]}
