"""What a job leaves in memory, made for real by a user of its own, and removed by a real worker."""

import contextlib
import ctypes
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from aitbc_miner.cgroup.group import CgroupError, Group, find_mount, own_group
from aitbc_miner.ipc.messages import StartJob
from aitbc_miner.sandbox.users import UNALLOCATED, Identity
from aitbc_miner.slots.cgroups import SlotGroup
from aitbc_miner.worker import cleanup
from tests.node.bench import JOB_UID, Bench

needs_root = pytest.mark.xfail(os.geteuid() != 0, reason="only root can become another user", strict=True)
OWNER = Identity(JOB_UID, JOB_UID, "aitbc-job-cpu0")
OTHER = Identity(JOB_UID + 1, JOB_UID + 1, "aitbc-job-cpu1")
TIME_S = 120.0
SHM, MQUEUE = cleanup.IN_MEMORY
LIBC = ctypes.CDLL(None, use_errno=True)

SYSV = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
made = [libc.shmget(0, 4096, 0o1600), libc.semget(0, 3, 0o1600), libc.msgget(0, 0o1600)]
assert min(made) >= 0, ctypes.get_errno()
print(*made)
"""
DEEP = """
import os
os.mkdir(NAME)
os.chdir(NAME)
for level in range(3000):
    os.mkdir("d")
    open("f", "w").close()
    os.chdir("d")
os.chmod(".", 0)
"""


def run_as(who: Identity, program: str) -> str:
    """Run a program of Python as another user, which is over when this returns."""
    argv = [sys.executable, "-I", "-S", "-c", program]
    run = subprocess.run(
        argv, user=who.uid, group=who.gid, extra_groups=[], cwd="/", stdout=subprocess.PIPE, check=True
    )
    return run.stdout.decode()


def in_memory(who: Identity) -> list[str]:
    """Name what a user has in memory."""
    files = [path.name for path in SHM.iterdir() if path.lstat().st_uid == who.uid]
    return sorted([*files, *(kind for kind, _ in cleanup._sysv_of(who.uid))])


@pytest.fixture(autouse=True)
def cleared() -> Iterator[None]:
    yield
    if os.geteuid() == 0:
        for who in (OWNER, OTHER):
            cleanup.clear_user(who.uid, TIME_S)
            assert in_memory(who) == []


@pytest.fixture
def name() -> str:
    """Give a name in /dev/shm that nobody else has."""
    return str(SHM / f"aitbc-test-{os.getpid()}")


def logged(caplog: pytest.LogCaptureFixture) -> list[object]:
    return [getattr(record, "attrs", None) for record in caplog.records if record.levelno >= logging.ERROR]


@needs_root
def test_segments_semaphores_and_queues_are_removed(caplog: pytest.LogCaptureFixture) -> None:
    run_as(OWNER, SYSV)
    run_as(OTHER, SYSV)
    assert in_memory(OWNER) == ["msg", "sem", "shm"]
    assert cleanup.clear_user(OWNER.uid, TIME_S) == []
    assert in_memory(OWNER) == []
    assert in_memory(OTHER) == ["msg", "sem", "shm"]
    assert logged(caplog) == []
    # Only the copy of ourselves has become another user.
    assert os.geteuid() == 0


@needs_root
def test_it_takes_no_capability_that_the_unit_withholds(name: str) -> None:
    run_as(OWNER, f"{SYSV}\nimport os\nos.makedirs({name!r} + '/a', 0)")
    kept = ["+setuid", "+setgid", "+kill", "+chown", "+dac_override", "+fowner"]
    program = f"from aitbc_miner.worker.cleanup import clear_user; clear_user({OWNER.uid}, {TIME_S})"
    argv = ["/usr/bin/setpriv", "--bounding-set", ",".join(["-all", *kept]), sys.executable, "-c", program]
    root = Path(cleanup.__file__).parent.parent
    subprocess.run(argv, check=True, cwd=root)
    assert in_memory(OWNER) == []


@needs_root
def test_what_was_given_away_is_still_his() -> None:
    class Owner(ctypes.Structure):
        """The beginning of struct shmid_ds, which is all that IPC_SET reads of it here."""

        _fields_ = (
            *((each, ctypes.c_uint) for each in ("key", "uid", "gid", "cuid", "cgid")),
            ("mode", ctypes.c_uint),
            ("rest", ctypes.c_char * 256),
        )

    segment = int(run_as(OWNER, SYSV).split()[0])
    given = Owner(uid=OTHER.uid, gid=OTHER.gid, mode=0o600)
    assert LIBC.shmctl(segment, 1, ctypes.byref(given)) == 0
    assert in_memory(OTHER) == ["shm"]
    cleanup.remove_memory_of(OWNER.uid, TIME_S)
    assert in_memory(OTHER) == in_memory(OWNER) == []


@needs_root
def test_files_and_directories_go_and_links_are_not_followed(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "his").touch()
    os.chown(tmp_path / "his", OWNER.uid, OWNER.gid)
    run_as(
        OWNER,
        f"import os\n"
        f"os.makedirs({name!r} + '/a/b')\n"
        f"for at in {name!r}, {name!r} + '/a', {name!r} + '/a/b':\n"
        f"    open(at + '/file', 'w').write('x')\n"
        f"    os.symlink({str(tmp_path)!r}, at + '/link')\n"
        f"    os.mkfifo(at + '/fifo')\n"
        f"os.symlink({str(tmp_path)!r}, {name!r} + '.link')\n"
        f"open({name!r} + '.file', 'w').write('x')\n",
    )
    run_as(OTHER, f"open({name!r} + '.other', 'w').close()")
    cleanup.clear_user(OWNER.uid, TIME_S)
    assert in_memory(OWNER) == []
    assert in_memory(OTHER) == [f"{Path(name).name}.other"]
    assert (tmp_path / "his").exists()
    assert logged(caplog) == []


@needs_root
def test_directories_may_be_as_deep_as_they_like(name: str, caplog: pytest.LogCaptureFixture) -> None:
    run_as(OWNER, f"NAME = {name!r}\n{DEEP}")
    cleanup.clear_user(OWNER.uid, TIME_S)
    assert in_memory(OWNER) == []
    assert logged(caplog) == []


@needs_root
def test_what_takes_too_long_is_told_and_goes_the_next_time(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    run_as(OWNER, f"for end in 'ab': open({name!r} + end, 'w').close()")
    cleanup.remove_memory_of(OWNER.uid, 0)
    error = f"{SHM}: too many files to remove in time"
    assert logged(caplog) == [{"uid": OWNER.uid, "number": 1, "errors": [error]}]
    assert in_memory(OWNER) == [Path(name).name + end for end in "ab"]
    cleanup.remove_memory_of(OWNER.uid, TIME_S)
    assert in_memory(OWNER) == []


@needs_root
def test_what_cannot_be_removed_is_told_and_the_rest_goes(
    name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_as(OWNER, f"{SYSV}\nopen({name!r} + '1', 'w').close()\nopen({name!r} + '2', 'w').close()")
    kept, unlink = Path(f"{name}1").name, os.unlink

    def refuse(path: str, *, dir_fd: int) -> None:
        if path == kept:
            raise PermissionError(1, "Operation not permitted", path)
        unlink(path, dir_fd=dir_fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuse)
        patch.setitem(cleanup._REMOVERS, "sem", lambda _: -1)
        cleanup.remove_memory_of(OWNER.uid, TIME_S)
    assert in_memory(OWNER) == [kept, "sem"]
    [attrs] = logged(caplog)
    assert isinstance(attrs, dict)
    assert attrs["number"] == 2
    assert attrs["errors"][0].endswith(" is still there")
    assert attrs["errors"][1] == f"{SHM}: [Errno 1] Operation not permitted: {kept!r}"


@needs_root
def test_nothing_of_an_unallocated_id_is_touched(name: str) -> None:
    # The range is shared with other nodes of this machine, so nothing may be left of this test either.
    who = Identity(UNALLOCATED, UNALLOCATED, "somebody")
    segment, semaphores, queue = map(int, run_as(who, f"{SYSV}\nopen({name!r}, 'w').close()").split())
    try:
        assert cleanup.clear_user(who.uid, TIME_S) == []
        assert {("shm", segment), ("sem", semaphores), ("msg", queue)} <= {*cleanup._sysv_of(who.uid)}
        assert Path(name).exists()
    finally:
        removed = LIBC.shmctl(segment, 0, None), LIBC.semctl(semaphores, 0, 0), LIBC.msgctl(queue, 0, None)
        Path(name).unlink(missing_ok=True)
    assert removed == (0, 0, 0)


def test_a_machine_without_any_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cleanup, "SYSV", tmp_path / "none")
    monkeypatch.setattr(cleanup, "IN_MEMORY", (tmp_path / "none",))
    cleanup.remove_memory_of(OWNER.uid, TIME_S)
    assert logged(caplog) == []
    # And one where it is not what it should be.
    (tmp_path / "file").touch()
    monkeypatch.setattr(cleanup, "SYSV", tmp_path / "file")
    monkeypatch.setattr(cleanup, "IN_MEMORY", (tmp_path / "file",))
    cleanup.remove_memory_of(OWNER.uid, TIME_S)
    [attrs] = logged(caplog)
    assert isinstance(attrs, dict)
    assert attrs["number"] == 2


@needs_root
def test_a_worker_removes_what_was_there_before_it_and_what_its_jobs_leave(name: str) -> None:
    run_as(OWNER, SYSV)
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        bench = Bench(Path(directory))
        bench.runs_as = OWNER
        bench.delays = replace(bench.delays, kill=TIME_S)
        try:
            bench.start()
            assert in_memory(OWNER) == []
            program = f"{SYSV}\nopen({name!r}, 'w').close()"
            bench.submit("j1", f"{sys.executable} -I -S -c '{program.replace(chr(39), chr(34))}'")
            bench.send(StartJob("j1"))
            ended = bench.ended()
            assert (ended.code, ended.clean, ended.remains) == (None, True, "")
            outcome = bench.outcome("j1")
            assert outcome is not None
            assert len(outcome.log.tail.split()) == 3
            assert in_memory(OWNER) == []
            bench.assert_works()
        finally:
            bench.stop()


@contextlib.contextmanager
def sleeper(who: Identity) -> Iterator["subprocess.Popen[bytes]"]:
    """Run something as another user."""
    with subprocess.Popen(["sleep", "600"], user=who.uid, group=who.gid, extra_groups=[]) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_job_of_another_miner_with_the_same_user_is_spared() -> None:
    mount = find_mount()
    if os.geteuid() != 0 or mount is None or not mount.writable:
        with pytest.raises(CgroupError, match="cannot make cgroup"):
            Group(Path(mount.path if mount else "/sys/fs/cgroup") / f"aitbc-left-{os.getpid()}").create()
        return
    home = Group(own_group(mount) / f"aitbc-left-{os.getpid()}")
    home.create()
    try:
        with SlotGroup(home.path, "cpu0") as slot, sleeper(OWNER) as theirs, sleeper(OWNER) as stray:
            slot.job.write("cgroup.procs", theirs.pid)
            # Collected while it is waited for, or it would stay as a zombie that owns itself.
            waiting = threading.Thread(target=stray.wait)
            waiting.start()
            assert cleanup.clear_user(OWNER.uid, TIME_S) == [theirs.pid]
            waiting.join(TIME_S)
            assert (theirs.poll(), stray.returncode) == (None, -signal.SIGKILL)
    finally:
        home.remove()
