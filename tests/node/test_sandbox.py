"""What a job sees and may do in a real sandbox, and how its end is told."""

import errno
import os
import select
import shutil
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from aitbc_miner.cgroup.group import Group
from aitbc_miner.jobs import ExitStatus
from aitbc_miner.sandbox.bubblewrap import SANDBOX_FAILED, Sandbox, enclose, why_not
from aitbc_miner.sandbox.spawn import spawn
from aitbc_miner.sandbox.users import Identity
from aitbc_miner.util.limits import ProcessLimits
from aitbc_miner.worker.launch import give_pipes
from tests.attacks.attack import THROUGH
from tests.attacks.sharing import SHARING
from tests.node.test_spawn import DEADLINE_S, GID, ROOT, SH, UID, group, in_worker

__all__ = ["group"]

pytestmark = pytest.mark.needs("bubblewrap", "time")
MIB = 1 << 20
JOB_USER = Identity(UID, GID, "aitbc-job-test")
PYTHON = "/usr/bin/python3"
ENV = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}


class Boxed(NamedTuple):
    """What came of a program in the sandbox."""

    exit: ExitStatus
    out: str


@pytest.fixture(params=["a slot's user", "the miner's own"] if ROOT else ["the miner's own"])
def box(request: pytest.FixtureRequest) -> Sandbox:
    """Give a sandbox for each kind of user."""
    return Sandbox(JOB_USER if request.param == "a slot's user" else None, tmp_bytes=MIB, shm_bytes=MIB)


@pytest.fixture
def job(box: Sandbox) -> Iterator[Path]:
    """Give the directory of a job."""
    directory = Path(tempfile.mkdtemp(prefix="aitbc-box-"))
    directory.chmod(0o755)
    for name in ("work", "output", "tmp"):
        (directory / name).mkdir()
        if box.runs_as:
            os.chown(directory / name, box.runs_as.uid, box.runs_as.gid)
    yield directory
    shutil.rmtree(directory)


def run(box: Sandbox, job: Path, argv: Sequence[str], group: Path | None = None, **more: Any) -> Boxed:
    """Run a program in the sandbox, in a helper process, and give how it ended and what it printed."""
    return Boxed(*in_worker(_run, box, job, list(argv), group, more))


def _run(
    box: Sandbox, job: Path, argv: list[str], group: Path | None, more: dict[str, Any]
) -> tuple[ExitStatus, str]:
    with ExitStack() as stack:
        read, write = os.pipe()
        stack.callback(os.close, read)
        null = os.open(os.devnull, os.O_RDONLY)
        fds = {0: null, 1: write, 2: write}
        give_pipes(fds, box.runs_as)
        enclosed = enclose(box, job, argv, more.get("binds", ()), fds, stack)
        user = box.runs_as
        started = spawn(
            enclosed.argv,
            cwd=job / "work",
            env=ENV,
            fds=fds | enclosed.fds,
            limits=ProcessLimits(),
            group=Group(group) if group else None,
            uid=user.uid if user else None,
            gid=user.gid if user else None,
            enclosed=enclosed,
        )
        os.close(write)
        stack.enter_context(started)
        out = b""
        if more.get("terminate"):
            # It says when it is ready.
            out = os.read(read, 4096)
            started.terminate()
        assert select.select([started.pidfd], [], [], DEADLINE_S)[0]
        ended = started.poll()
        assert ended
        assert started.kill_all(DEADLINE_S)
        while data := os.read(read, 65536):
            out += data
        return ended, out.decode()


def sh(box: Sandbox, job: Path, line: str, **more: Any) -> Boxed:
    return run(box, job, [SH, "-c", line], **more)


def test_it_can_be_had_here(box: Sandbox) -> None:
    assert why_not(box) is None


def test_a_job_sees_what_it_needs_and_no_more(box: Sandbox, job: Path) -> None:
    out = sh(box, job, "ls /; echo; ls /etc; echo; ls /dev; echo; ls /job; echo; ls -d /proc/[0-9]*").out
    top, etc, dev, own, processes = (block.split() for block in out.split("\n\n"))
    assert {"usr", "bin", "lib", "etc", "dev", "proc", "tmp", "job", "sys"} <= {*top}
    assert not {"home", "root", "run", "var", "mnt", "srv", "opt", "boot", "media"} & {*top}
    assert not {"shadow", "aitbc", "resolv.conf", "hostname", "machine-id"} & {*etc}
    assert {"null", "zero", "full", "random", "urandom", "tty", "shm"} <= {*dev}
    assert not [name for name in dev if name.startswith(("sd", "vd", "kmsg", "mem", "kvm", "nvidia"))]
    assert own == ["output", "tmp", "work"]
    # GNU time and ls.
    assert len(processes) <= 3


PLACES = "/ /usr /etc /etc/passwd /dev /sys /proc/sys/kernel/core_pattern /job /job/work /job/output"
# Of the machine, and the job would be its owner if the miner ran it as root.
MACHINE = "/proc/sysrq-trigger /proc/sys/kernel/hostname /proc/sys/vm/drop_caches"
WRITE = """
import os, sys
for place in sys.argv[1:]:
    try:
        os.close(os.open(f"{place}/x" if os.path.isdir(place) else place, os.O_WRONLY | os.O_CREAT))
        print(place)
    except OSError:
        pass
"""


def test_a_job_writes_into_its_own_directories_only(box: Sandbox, job: Path) -> None:
    out = run(
        box, job, [PYTHON, "-c", WRITE, *PLACES.split(), *MACHINE.split(), "/job/tmp", "/tmp", "/dev/shm"]
    ).out
    assert out.splitlines() == ["/job/work", "/job/output", "/job/tmp", "/tmp", "/dev/shm"]
    assert (job / "work" / "x").exists()


def test_a_job_has_no_rights_and_no_descriptors(box: Sandbox, job: Path) -> None:
    line = "cat /proc/self/status; echo fds; ls /proc/$$/fd; hostname; cat /proc/self/cgroup; id -u; tty; env"
    out = sh(box, job, line).out
    fields = dict(each.split(":\t") for each in out.splitlines() if ":\t" in each)
    assert {fields[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert (fields["NoNewPrivs"], fields["Seccomp"]) == ("1", "2")
    after = out.partition("fds\n")[2].splitlines()
    assert after[:4] == ["0", "1", "2", "job"]
    assert str(box.runs_as.uid if box.runs_as else os.getuid()) in after
    assert "not a tty" in after
    assert set(ENV) | {"PWD"} == {
        line.partition("=")[0] for line in after if "=" in line and line[0].isupper()
    } - {"_", "OLDPWD"}


def test_memory_files_are_bounded(box: Sandbox, job: Path) -> None:
    for place in ("/tmp", "/dev/shm"):
        out = sh(box, job, f"head -c 2M /dev/zero >{place}/much; echo $?; stat -c %s {place}/much").out
        assert "No space left on device" in out
        assert out.splitlines()[-2:] == ["1", str(MIB)]


def test_without_the_network_there_is_but_a_loopback(box: Sandbox, job: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        ask = (
            "import socket, os\n"
            f"try: socket.create_connection(('127.0.0.1', {port}), 5); print('reached')\n"
            "except OSError as error: print(error.errno)\n"
            "print(socket.if_nameindex())"
        )
        assert run(box, job, [PYTHON, "-c", ask]).out == f"{errno.ECONNREFUSED}\n[(1, 'lo')]\n"
        open_box = Sandbox(box.runs_as, MIB, MIB, network=True)
        assert run(open_box, job, [PYTHON, "-c", ask]).out.startswith("reached\n")


@pytest.mark.parametrize(
    ("line", "ended"),
    [
        ("exit 0", ExitStatus(status=0)),
        ("exit 3", ExitStatus(status=3)),
        ("exit 137", ExitStatus(status=137)),
        ("kill -9 $$", ExitStatus(signal=9)),
        ("kill -TERM $$", ExitStatus(signal=15)),
        ("kill -SEGV $$", ExitStatus(signal=11)),
        ("exec /nowhere", ExitStatus(status=127)),
        ("sleep 1000 & exit 5", ExitStatus(status=5)),
        ("(setsid sleep 1000 &) ; exit 6", ExitStatus(status=6)),
    ],
)
def test_its_end_is_told(box: Sandbox, job: Path, line: str, ended: ExitStatus, group: Path | None) -> None:
    assert sh(box, job, line, group=group).exit == ended


def test_it_is_asked_to_end_before_it_is_killed(box: Sandbox, job: Path, group: Path | None) -> None:
    line = "trap 'echo asked; exit 7' TERM; echo ready; while :; do sleep 0.1; done"
    done = sh(box, job, line, group=group, terminate=True)
    assert done.exit == ExitStatus(status=7)
    # The shell may say so of its sleep.
    assert [line for line in done.out.splitlines() if line != "Terminated"] == ["ready", "asked"]


def test_a_sandbox_that_cannot_be_made_is_told_from_a_program_that_failed(box: Sandbox, job: Path) -> None:
    done = sh(box, job, "echo never", binds=[Path("/no/such/models")])
    assert done.exit == ExitStatus(status=1, killed_for=SANDBOX_FAILED)
    assert "/no/such/models" in done.out


def test_what_is_bound_can_be_read_and_not_written(box: Sandbox, job: Path) -> None:
    models = job / "models"
    models.mkdir()
    (models / "m").write_text("weights")
    models.chmod(0o777)
    done = sh(box, job, f"cat {models}/m; : > {models}/x", binds=[models])
    assert done.out.startswith("weights")
    assert "Read-only file system" in done.out
    assert sh(box, job, f"cat {models}/m").exit.status == 1


def test_a_node_that_is_named_is_the_only_one_there(box: Sandbox, job: Path) -> None:
    # There is no card here: a pseudo device stands for it.
    card = Sandbox(box.runs_as, MIB, MIB, devices=(Path("/dev/null"), Path("/dev/no-such-card")))
    done = run(card, job, [SH, "-c", "ls /dev; echo x >/dev/null && echo written"])
    assert "written" in done.out
    assert "no-such-card" not in done.out


def test_of_all_cards_a_job_sees_its_own_alone(box: Sandbox, job: Path) -> None:
    # What stands for /sys and /proc/driver here is in the job's directory.
    for number in (1, 2):
        card = job / f"sys/devices/pci0000:00/0000:0{number}:00.0"
        card.mkdir(parents=True)
        (card / "serial").write_text(f"card {number}")
        link = job / f"sys/bus/pci/devices/0000:0{number}:00.0"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(f"../../../devices/pci0000:00/{card.name}")
    own = job / "sys/bus/pci/devices/0000:01:00.0"
    card_box = Sandbox(box.runs_as, MIB, MIB, devices=(own, Path("/proc/driver/nvidia/version")))
    line = f"ls {job}/sys/bus/pci/devices {job}/sys/devices/pci*; cat {own}/serial; ls /proc/driver"
    done = sh(card_box, job, line)
    assert "card 1" in done.out
    assert "0000:02:00.0" not in done.out
    assert done.exit == ExitStatus(status=0), done.out
    assert "Read-only file system" in sh(card_box, job, f": > {own}/serial; : > /proc/driver/x").out


# Opens all that is there for writing; prints what of it can be written, and sockets, FIFOs and devices.
WALK = """
import os, stat
NODES = {f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom", "tty")}
seen = set()
def look(path):
    info = os.lstat(path)
    if stat.S_ISLNK(info.st_mode):
        return
    seen.add(path)
    if stat.S_ISDIR(info.st_mode):
        try:
            fd = os.open(path, os.O_TMPFILE | os.O_WRONLY, 0o600)
        except OSError:
            pass
        else:
            print("makes files in", path)
        for make in (os.mkdir, lambda name: os.mkfifo(name), lambda name: os.symlink("x", name)):
            try:
                make(path + "/made-by-a-job")
            except OSError:
                pass
            else:
                print("makes entries in", path)
        return
    if path in NODES:
        return
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY))
    except OSError:
        pass
    else:
        print("writes", path)
    if not stat.S_ISREG(info.st_mode):
        print("is no plain file", path)
for top, names, files in os.walk("/"):
    if top == "/":
        names.remove("job"), names.remove("tmp")
    if top == "/dev":
        names.remove("shm"), names.remove("pts")
    if top == "/proc":
        names[:] = [name for name in names if not name.isdigit() and name not in ("self", "thread-self")]
    for name in [".", *names, *files]:
        look(os.path.join(top, name))
print(len(seen), "places")
"""


def test_nothing_of_the_machine_can_be_written(box: Sandbox, job: Path) -> None:
    out = run(box, job, [PYTHON, "-c", WALK]).out
    *found, count = out.splitlines()
    assert found == []
    assert int(count.split()[0]) > 5000


def test_of_the_machine_in_proc_there_is_nothing_to_wait_on_or_to_learn(box: Sandbox, job: Path) -> None:
    ask = (
        "import os\n"
        "print(sorted(n for n in os.listdir('/proc') if os.path.isdir('/proc/' + n) and not n.isdigit()"
        " and os.listdir('/proc/' + n)))\n"
        "print([open('/proc/' + n).read() for n in ('interrupts', 'keys') if os.path.exists('/proc/' + n)])"
    )
    out = run(box, job, [PYTHON, "-c", ask]).out.splitlines()
    assert out == ["['net', 'self', 'sys', 'sysvipc', 'thread-self']", "['', '']"]


@pytest.mark.parametrize(
    ("take", "most", "refused"),
    [
        ("os.openpty()", 64, errno.ENOSPC),
        ("os.close(os.open('/tmp/' + os.urandom(8).hex(), os.O_CREAT))", 256, errno.ENOSPC),
        ("os.mkdir('/dev/shm/' + os.urandom(8).hex())", 256, errno.ENOSPC),
        ("os.symlink('x' * 4000, '/dev/shm/' + os.urandom(8).hex())", 256, errno.ENOSPC),
    ],
)
def test_what_jobs_share_is_bounded_for_each(
    box: Sandbox, job: Path, take: str, most: int, refused: int
) -> None:
    ask = (
        "import os\nmade = 0\ntry:\n    while made < 5000:\n"
        f"        {take}; made += 1\nexcept OSError as error:\n    print(made, error.errno)"
    )
    made, number = map(int, run(box, job, [PYTHON, "-c", ask]).out.split())
    assert most // 2 <= made <= most
    assert number == refused


@pytest.mark.parametrize(
    "line",
    [
        "echo said >/dev/stdout",
        "echo said | tee /dev/stderr >/dev/null",
        "echo said >/dev/fd/1",
        f"{PYTHON} -c \"open('/dev/stdout', 'w').write('said')\"",
        "cat /dev/stdin; echo said",
    ],
)
def test_standard_streams_can_be_opened_by_name(box: Sandbox, job: Path, line: str) -> None:
    done = sh(box, job, line)
    assert "said" in done.out, done
    assert "denied" not in done.out


@pytest.mark.parametrize("box", ["a slot's user" if ROOT else "the miner's own"], indirect=True)
def test_no_sibling_of_what_is_refused_gets_through(box: Sandbox, job: Path) -> None:
    # Under systemd, with a node around them, they run in tests/vm/test_attacks.py.
    # Nobody reads the output here before the end; for what pours into it see test_worker.
    sources = {each.name: each.source() for each in SHARING if each.name != "pour-into-the-log"}
    got = {}
    for name, (ended, out) in in_worker(_run_each, box, job, sources).items():
        assert ended == ExitStatus(status=0), (name, out)
        got[name] = [line for line in out.splitlines() if line.startswith(THROUGH)]
    assert {name: lines for name, lines in got.items() if lines} == {}


def _run_each(box: Sandbox, job: Path, sources: dict[str, str]) -> dict[str, tuple[ExitStatus, str]]:
    return {name: _run(box, job, [PYTHON, "-c", source], None, {}) for name, source in sources.items()}
