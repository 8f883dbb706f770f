"""What is read at the start: each job in the place where it goes on, and broken records out of the way."""

import errno
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from aitbc_miner.agent.recovery import Found, read_outcome, recover, recover_rest
from aitbc_miner.errors import ErrorCode
from aitbc_miner.jobs import BROKEN, Outcome, State, StateRecord
from aitbc_miner.store.database import Database
from aitbc_miner.store.ledger import Ledger, account_of
from aitbc_miner.store.records import MANIFEST, OUTCOME, STATE, RecordError, Records
from aitbc_miner.util import fs
from tests.support.power_cut import cut_after

S = State
GOOD = Outcome("j1", result={"answer": 42})


def raw(job_id: str) -> bytes:
    return msgspec.json.encode({"job_id": job_id, "runner": "cli", "command": "true"})


def left(records: Records, job_id: str = "j1", *steps: State, outcome: Outcome | None = None) -> Path:
    """Record a job, and how far it has come."""
    records.create(job_id, raw(job_id))
    with records.open(job_id) as job:
        for step in steps:
            job.move(step, slot="cpu0", **({"started": True} if step is S.RUNNING else {}))
        if outcome is not None:
            job.write_outcome(outcome)
    return records.root / job_id


def places(found: Found) -> dict[str, list[str]]:
    """Give the lists that are not empty."""
    named = {
        "finished": found.finished,
        "to_deliver": found.to_deliver,
        "ended": found.ended,
        "to_resume": found.to_resume,
        "to_retry": found.to_retry,
        "started": [each.job_id for each in found.started],
    }
    return {name: ids for name, ids in named.items() if ids}


def aside(records: Records) -> list[str]:
    try:
        return sorted(path.name for path in (records.root / BROKEN).iterdir())
    except FileNotFoundError:
        return []


WHOLE: dict[str, tuple[tuple[State, ...], Outcome | None, str]] = {
    "pulled": ((), None, "to_resume"),
    "acked": ((S.ACKED,), None, "to_resume"),
    "acked and refused": ((S.ACKED,), Outcome("j1", code=ErrorCode.E_NOGPU), "ended"),
    "being prepared": ((S.ACKED, S.PREP), None, "started"),
    "runs": ((S.ACKED, S.PREP, S.RUNNING), None, "started"),
    "ended by its worker": ((S.ACKED, S.PREP, S.RUNNING), GOOD, "ended"),
    "being collected": ((S.ACKED, S.PREP, S.RUNNING, S.COLLECTING), None, "started"),
    "waits": ((S.ACKED, S.PREP, S.RETRY_WAIT), None, "to_retry"),
    "being sent": ((S.ACKED, S.PREP, S.RUNNING, S.UPLOADING), GOOD, "to_deliver"),
    "being sent, unsaid": ((S.ACKED, S.UPLOADING), None, "to_deliver"),
    "delivered": ((S.ACKED, S.UPLOADING, S.DONE), GOOD, "finished"),
    "failed": ((S.ACKED, S.UPLOADING, S.FAILED), Outcome("j1", code=ErrorCode.E_EXIT), "finished"),
    "not ours": ((S.FAILED,), None, "finished"),
}


@pytest.mark.parametrize(("steps", "outcome", "place"), WHOLE.values(), ids=WHOLE)
def test_a_job_goes_on_where_it_was(
    records: Records, steps: tuple[State, ...], outcome: Outcome | None, place: str
) -> None:
    left(records, "j1", *steps, outcome=outcome)
    found = recover(records)
    assert places(found) == {place: ["j1"]}
    assert (found.broken, aside(records)) == (0, [])
    if place == "started":
        assert (found.started[0].state, found.started[0].slot) == (steps[-1], "cpu0")


def test_the_leases_of_jobs_that_are_not_over_are_given(records: Records) -> None:
    for job_id, state in {"a": S.ACKED, "b": S.RUNNING, "c": S.UPLOADING, "d": S.DONE, "e": S.FAILED}.items():
        records.create(job_id, raw(job_id), state=state, lease=f"of {job_id}")
    records.create("f", raw("f"))
    assert recover(records).leases == {"a": "of a", "b": "of b", "c": "of c"}


def test_what_is_settled_is_not_read(records: Records) -> None:
    left(records, "a", S.ACKED)
    broken = left(records, "b")
    (broken / STATE).write_bytes(b"")
    assert places(recover(records, {"b"})) == {"to_resume": ["a"]}
    assert aside(records) == []


def test_what_the_last_attempt_came_to_does_not_count_for_the_next(records: Records) -> None:
    job = left(records, "j1", S.ACKED, S.PREP, outcome=Outcome("j1", code=ErrorCode.E_INTERNAL))
    with records.open("j1") as opened:
        # The node died between the two steps of `try_again`.
        opened.move(S.RETRY_WAIT, attempt=2)
    assert places(recover(records)) == {"to_retry": ["j1"]}
    assert not (job / OUTCOME).exists()
    assert msgspec.json.decode((job / "outcome.1.json").read_bytes(), type=Outcome).code == "E_INTERNAL"


# --- broken records ----------------------------------------------------------------------------------------


def of_version_2(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 2}))


def of_another(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "job_id": "j2"}))


def as_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def as_link(path: Path) -> None:
    target = path.rename(path.with_name("elsewhere"))
    path.symlink_to(target)


BREAK: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "torn": lambda path: path.write_bytes(path.read_bytes()[:30]),
    "random": lambda path: path.write_bytes(random.Random(7).randbytes(300)),
    "zeros": lambda path: path.write_bytes(b"\0" * 300),
    "version 2": of_version_2,
    "another job's": of_another,
    "a list": lambda path: path.write_bytes(b"[]"),
    "deep": lambda path: path.write_bytes(b"[" * 60_000),
    "huge": lambda path: path.write_bytes(b" " * (65 << 20)),
    "a directory": as_directory,
    "a link": as_link,
}
GONE: dict[str, Callable[[Path], object]] = {"missing": Path.unlink}
STATE_BROKEN = {**BREAK, **GONE}


@pytest.mark.parametrize("break_it", STATE_BROKEN.values(), ids=STATE_BROKEN)
def test_a_broken_state_beside_a_result_is_delivered_as_it_is(
    records: Records, break_it: Callable[[Path], object]
) -> None:
    job = left(records, "j1", S.ACKED, S.PREP, S.RUNNING, outcome=GOOD)
    before = (job / OUTCOME).read_bytes()
    break_it(job / STATE)
    found = recover(records)
    assert (places(found), found.broken) == ({"to_deliver": ["j1"]}, 1)
    assert (job / OUTCOME).read_bytes() == before
    with records.open("j1") as opened:
        assert (opened.state().state, opened.state().started) == (S.UPLOADING, True)
    assert aside(records) == ([] if break_it is Path.unlink else ["j1+state.json"])
    assert places(recover(records)) == {"to_deliver": ["j1"]}


@pytest.mark.parametrize("break_it", STATE_BROKEN.values(), ids=STATE_BROKEN)
@pytest.mark.parametrize("outcome_too", [False, True])
def test_a_job_of_which_nobody_knows_how_far_it_came_is_lost(
    records: Records, break_it: Callable[[Path], object], outcome_too: bool
) -> None:
    job = left(records, "j1", S.ACKED, S.PREP, outcome=GOOD if outcome_too else None)
    (job / "work").mkdir()
    (job / "work/a").write_text("half done")
    break_it(job / STATE)
    there = os.path.lexists(job / STATE)
    if outcome_too:
        (job / OUTCOME).write_bytes(b"{")
    found = recover(records)
    assert (places(found), found.broken) == ({"to_deliver": ["j1"]}, 1)
    with records.open("j1") as opened:
        outcome = opened.outcome()
        assert outcome is not None
        assert (opened.state().state, outcome.code) == (S.UPLOADING, ErrorCode.E_LOST)
        assert opened.manifest().command == "true"
    torn = [*(["j1+outcome.json"] if outcome_too else []), *(["j1+state.json"] if there else [])]
    assert aside(records) == torn
    assert (job / "work/a").read_text() == "half done"
    # Once is enough.
    assert (places(recover(records)), recover(records).broken) == ({"to_deliver": ["j1"]}, 0)


OUTCOMES = {
    "runs": (S.RUNNING, "started"),
    "being sent": (S.UPLOADING, "to_deliver"),
    "acked": (S.ACKED, "to_resume"),
}


@pytest.mark.parametrize(("state", "place"), OUTCOMES.values(), ids=OUTCOMES)
@pytest.mark.parametrize("break_it", BREAK.values(), ids=BREAK)
def test_a_job_with_a_broken_outcome_is_one_without(
    records: Records, break_it: Callable[[Path], object], state: State, place: str
) -> None:
    records.create("j1", raw("j1"), state=state)
    with records.open("j1") as job:
        job.write_outcome(GOOD)
    break_it(records.root / "j1" / OUTCOME)
    found = recover(records)
    assert (places(found), found.broken) == ({place: ["j1"]}, 1)
    assert aside(records) == ["j1+outcome.json"]
    assert read_outcome(records, "j1") is None


def test_a_directory_that_is_no_job_is_set_aside_and_nothing_is_said_of_it(records: Records) -> None:
    for name, manifest in {"empty": None, "text": b"hello", "other": raw("j9"), "list": b"[]"}.items():
        (records.root / name).mkdir()
        if manifest is not None:
            (records.root / name / MANIFEST).write_bytes(manifest)
    found = recover(records)
    assert (places(found), found.broken) == ({}, 4)
    assert aside(records) == ["empty", "list", "other", "text"]


def test_what_has_no_name_of_a_job_is_left_alone(records: Records) -> None:
    (records.root / "lost+found").mkdir()
    (records.root / "+reserve").mkdir()
    (records.root / "a file").write_text("")
    (records.root / "file").write_text("")
    (records.root / "link").symlink_to("/")
    before = sorted(path.name for path in records.root.iterdir())
    found = recover(records)
    assert (places(found), found.broken) == ({}, 0)
    assert sorted(path.name for path in records.root.iterdir()) == before


def test_one_broken_record_hides_no_other(records: Records, caplog: pytest.LogCaptureFixture) -> None:
    for job_id in ("a", "j1", "z"):
        left(records, job_id, S.ACKED)
    (records.root / "j1" / STATE).write_bytes(b"{")
    assert places(recover(records)) == {"to_resume": ["a", "z"], "to_deliver": ["j1"]}
    assert [record.getMessage() for record in caplog.records] == ["broken record set aside"]


def test_the_same_job_can_be_broken_more_than_once(records: Records) -> None:
    left(records, "j1", S.ACKED)
    for _ in range(3):
        (records.root / "j1" / STATE).write_bytes(b"{")
        (records.root / "j1" / OUTCOME).write_bytes(b"{")
        assert places(recover(records)) == {"to_deliver": ["j1"]}
    names = [f"j1+{name}{suffix}" for name in (OUTCOME, STATE) for suffix in ("", "+1", "+2")]
    assert aside(records) == names


@pytest.mark.parametrize("name", [STATE, OUTCOME])
def test_a_disk_that_takes_nothing_ends_no_start(
    records: Records, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    left(records, "a", S.ACKED)
    left(records, "j1", S.ACKED, S.PREP, outcome=GOOD)
    (records.root / "j1" / name).write_bytes(b"{")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", full)
        found = recover(records)
    assert (places(found), list(found.unread)) == ({"to_resume": ["a"]}, ["j1"])
    assert caplog.records[-1].getMessage() == "record not read"
    # With space again it is dealt with.
    assert "j1" in {
        job_id for ids in places(recover_rest(records, list(found.unread))).values() for job_id in ids
    }


@pytest.mark.parametrize("name", [STATE, OUTCOME, MANIFEST])
@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.EACCES, errno.ENOMEM])
def test_what_cannot_be_read_now_is_not_broken(
    records: Records, name: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    left(records, "j1", S.ACKED, S.PREP, S.RUNNING, outcome=GOOD)
    if name == MANIFEST:  # which is read only where the state is broken
        (records.root / "j1" / STATE).write_bytes(b"{")
        (records.root / "j1" / OUTCOME).unlink()
    read = fs.read_bounded

    def fails(dir_fd: int, asked: str, limit: int) -> bytes:
        if asked == name:
            raise OSError(number, os.strerror(number), name)
        return read(dir_fd, asked, limit)

    with monkeypatch.context() as patch:
        patch.setattr(fs, "read_bounded", fails)
        found = recover(records)
        again = recover_rest(records, list(found.unread))
    assert [(places(each), list(each.unread), each.broken) for each in (found, again)] == [
        ({}, ["j1"], 0)
    ] * 2
    assert aside(records) == []
    place = "to_deliver" if name == MANIFEST else "ended"
    assert places(recover_rest(records, list(again.unread))) == {place: ["j1"]}


@pytest.mark.parametrize("with_result", [False, True])
def test_no_crash_while_a_record_is_mended_has_the_job_run_again(tmp_path: Path, with_result: bool) -> None:
    reached, call = True, 0
    while reached:
        records = Records(tmp_path / str(call))
        records.root.mkdir()
        left(records, "j1", S.ACKED, S.PREP, S.RUNNING, outcome=GOOD if with_result else None)
        (records.root / "j1" / STATE).write_bytes(b"{")
        reached = cut_after(call, lambda of=records: recover(of))  # type: ignore[misc]
        for _ in range(2):
            assert set(places(recover(records))) <= {"to_deliver"}
        if with_result:
            assert read_outcome(records, "j1") == GOOD
        call += 1
    assert call > 4


# --- many --------------------------------------------------------------------------------------------------


def test_ten_thousand_jobs_that_are_done_are_not_read(
    records: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = Database(tmp_path / "+books" / "queue.db")
    accounts = Ledger(database)
    accounts.enter(account_of(GOOD, StateRecord("j1", S.DONE), "cli", "accepted"))
    with database.writing() as connection:
        connection.execute("CREATE TEMP TABLE one AS SELECT * FROM accounts")
        for number in range(10_000):
            # Without a record in it: if it were read, it would be found broken.
            (records.root / f"done-{number}").mkdir()
            connection.execute("UPDATE one SET job_id = ?", (f"done-{number}",))
            connection.execute("INSERT INTO accounts SELECT * FROM one")
    going = [f"going-{number}" for number in range(100)]
    for job_id in going:
        left(records, job_id, S.ACKED)
    opened = count_opened(monkeypatch)
    found = recover(records, accounts.settled())
    assert (places(found), found.broken) == ({"to_resume": sorted(going)}, 0)
    # For each a directory and its state, and once more its directory for the outcome that it has not.
    # (On the way to a directory each step is looked at.)
    assert len([path for path in opened if path not in {*records.root.parts, "."}]) <= 4 * len(going) + 10
    assert not [path for path in opened if "done-" in path]


def count_opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    opened: list[str] = []
    real = os.open

    def noting(path: str | Path, *args: int, **kwargs: int | None) -> int:
        opened.append(str(path))
        return real(path, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", noting)
    return opened


def test_an_outcome_that_cannot_be_read_is_none(records: Records, caplog: pytest.LogCaptureFixture) -> None:
    job = left(records, "j1", outcome=GOOD)
    assert read_outcome(records, "j1") == GOOD
    (job / OUTCOME).write_bytes(b"{")
    assert read_outcome(records, "j1") is None
    assert [record.getMessage() for record in caplog.records] == ["broken record found"]
    with records.open("j1") as opened, pytest.raises(RecordError):
        opened.outcome()
