"""The filter of system calls on a real program: what is refused, how, and what goes on working."""

import errno
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import aitbc_miner
from aitbc_miner.errors import MinerError
from aitbc_miner.sandbox import seccomp
from aitbc_miner.sandbox.seccomp import DENIED, IO_URING, MASKED, DeniedCall, Masked, filter_fd, numbers
from tests.node.test_spawn import ROOT, UID

# Loads a filter from descriptor 3 if there is one, and does what it is told: calls by number, or code.
RUN = """
import ctypes, errno, json, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
what = json.loads(sys.argv[1])
if what["filter"]:
    program = os.read(3, 1 << 20)
    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, ctypes.byref(Program(len(program) // 8, program)), 0, 0) == 0, ctypes.get_errno()
def call(number, *args):
    ctypes.set_errno(0)
    got = libc.syscall(ctypes.c_long(number), *map(ctypes.c_ulong, args))
    return ctypes.get_errno() if got < 0 else 0
if "code" in what:
    exec(what["code"])
else:
    print(json.dumps([call(*words) for words in what["calls"]]))
"""


def run(
    what: dict[str, Any], *, filtered: bool = True, io_uring: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run `RUN`, as somebody who is not root."""
    with ExitStack() as stack:
        rules = filter_fd(io_uring=io_uring)
        stack.callback(os.close, rules)
        order = json.dumps({"filter": filtered, **what})
        line = [sys.executable, "-I", "-c", f"import os; os.dup2({rules}, 3); {RUN}", order]
        done: subprocess.CompletedProcess[str] = subprocess.run(
            line,
            pass_fds=[rules],
            capture_output=True,
            text=True,
            timeout=60,
            cwd="/",
            check=False,
            **({"user": UID, "group": UID, "extra_groups": []} if ROOT else {}),  # type: ignore[call-overload]
        )
        return done


def errnos(calls: Sequence[Sequence[int]], **how: Any) -> list[int]:
    done = run({"calls": list(calls)}, **how)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


def test_every_refusal_has_its_reason_and_a_number() -> None:
    rows: list[DeniedCall | Masked] = [*DENIED, IO_URING, *MASKED]
    for row in rows:
        assert 8 <= len(row.reason) <= 110, row
    for denied in (*DENIED, IO_URING):
        assert list(numbers(denied.calls.split())), denied


def test_what_is_denied_is_refused() -> None:
    wanted = {number: row.errno for row in (*DENIED, IO_URING) for number in numbers(row.calls.split())}
    assert len(wanted) > 60
    told = errnos([[number] for number in wanted])
    assert dict(zip(wanted, told, strict=True)) == wanted
    # Without the filter the kernel says something else to a good part of them, to the rest what we say.
    plain = errnos([[number] for number in wanted], filtered=False)
    assert sum(ours != its for ours, its in zip(wanted.values(), plain, strict=True)) > 20


@pytest.mark.parametrize("upper", [0, 1 << 32], ids=["as it is", "with an upper half"])
def test_what_is_denied_by_its_arguments_is_refused(upper: int) -> None:
    calls, wanted = [], []
    for row in MASKED:
        for number in numbers([row.call]):
            args = [0] * 6
            args[row.arg] = row.value | (upper if row.mask == seccomp._INT else 0)
            if row.before:
                args[row.arg - 1] = row.before[1]
            calls.append([number, *args])
            wanted.append(row.errno)
    assert errnos(calls) == wanted
    # A clone that is made would go on as a second one of these programs.
    others = [
        (each, told)
        for each, told in zip(calls, wanted, strict=True)
        if [each[0]] != list(numbers(["clone"]))
    ]
    plain = errnos([each for each, _ in others], filtered=False)
    assert sum(ours != its for (_, ours), its in zip(others, plain, strict=True)) > 20


def test_sockets_of_odd_kinds_are_refused() -> None:
    (number,) = numbers(["socket"])
    odd = [3, 5, 17, 21, 30, 31, 38, 40, 44, 45]
    assert set(errnos([[number, family, 1, 0] for family in odd])) == {errno.EAFNOSUPPORT}
    assert errnos([[number, 16, 3, protocol] for protocol in (4, 9, 12)]) == [errno.EPROTONOSUPPORT] * 3
    # SCTP, MPTCP, UDP-Lite, L2TP, ICMP, ICMPv6, DCCP, and what is not known yet; by the kind alone, too.
    for family in (2, 10):
        other = [
            (1, 132),
            (1, 262),
            (2, 136),
            (2, 115),
            (2, 1),
            (2, 58),
            (2, 7),
            (1, 300),
            (2, (1 << 32) | 132),
        ]
        told = errnos([[number, family, *each] for each in other])
        assert told == [errno.EPROTONOSUPPORT] * len(other)
        kinds = [(3, 255), (4, 0), (5, 0), (6, 33), (10, 0), (5 | 0o2000000, 0), (3 | 1 << 40, 0)]
        told = errnos([[number, family, *each] for each in kinds])
        assert set(told) <= {errno.ESOCKTNOSUPPORT, errno.EPROTONOSUPPORT}
    usual = [
        (socket.AF_UNIX, 1, 0),
        (socket.AF_INET, 1, 0),
        (socket.AF_INET6, 2, 0),
        (socket.AF_NETLINK, 3, 0),
    ]
    usual += [(socket.AF_INET, 1 | 0o2004000, 6), (socket.AF_INET6, 2 | 0o2000000, 17)]
    assert errnos([[number, *each] for each in usual]) == [0] * 6


def test_pairs_of_sockets_are_of_one_family() -> None:
    # TIPC makes pairs, and asking for any family loads its module.
    (pair,) = numbers(["socketpair"])
    odd = [2, 16, 17, 30, 38, 45, 1 | 1 << 32]
    assert set(errnos([[pair, family, 1, 0, 0] for family in odd])) == {errno.EAFNOSUPPORT}
    assert errnos([[pair, 1, 1, 0, 0]]) == [errno.EFAULT]


def test_calls_that_nobody_has_gone_through_are_there_for_no_job() -> None:
    newer = [seccomp.LAST + 1, 463, 466, 467, 468, 469, 470, 512, 700, (1 << 30) - 1]
    assert set(errnos([[number] for number in newer])) == {errno.ENOSYS}
    # The last that is known goes on to the tables: mseal of nothing is no fault.
    assert errnos([[seccomp.LAST, 0, 0, 0]]) == errnos([[seccomp.LAST, 0, 0, 0]], filtered=False)


def test_no_way_leaves_a_setuid_or_setgid_file() -> None:
    source = f"""
import tempfile
os.chdir(tempfile.mkdtemp())
os.umask(0)
def text(word):
    return ctypes.cast(ctypes.c_char_p(word), ctypes.c_void_p).value
def openat2(mode):
    return call(437, ctypes.c_ulong(-100).value, text(b"e"), text(struct.pack("=QQQ", 0o101, mode, 0)), 24)
ways = dict(
    open=lambda mode: os.open("a", os.O_CREAT | os.O_WRONLY, mode),
    # Without a name of a directory os.link gives the link itself another name.
    tmpfile=lambda mode: os.link(
        f"/proc/self/fd/{{os.open('.', os.O_TMPFILE | os.O_WRONLY, mode)}}", "b", dst_dir_fd=os.open(".", 0)
    ),
    chmod=lambda mode: os.chmod("own", mode),
    fchmod=lambda mode: os.fchmod(os.open("own", os.O_RDONLY), mode),
    mkdir=lambda mode: os.path.isdir("d") or os.mkdir("d", mode),
    mknod=lambda mode: os.mknod("n", 0o100000 | mode),
    mkfifo=lambda mode: os.mkfifo("f", mode),
    creat=lambda mode: call({next(numbers(["creat"]), -1)}, text(b"c"), mode),
    openat2=openat2,
)
open("own", "w").close()
for mode in (0o4755, 0o2755, 0o6777, 0o755):
    for name, way in ways.items():
        try:
            way(mode)
        except OSError as error:
            if mode == 0o755: print(name, error)
    print([name for name in os.listdir(".") if os.lstat(name).st_mode & 0o6000])
    # Made at once, without the bit.
    assert os.path.isdir("d")
print(*sorted(os.listdir(".")))
"""
    done = run({"code": source})
    assert (done.stdout, done.stderr) == ("[]\n" * 4 + "a b c d f n own\n", "")


def test_what_is_asked_for_by_options_and_requests_of_its_kind_is_refused() -> None:
    source = """
import fcntl, socket
def told(act):
    try: act()
    except OSError as error: return errno.errorcode[error.errno]
    return "done"
line = socket.socket()
print(told(lambda: line.setsockopt(1, 26, bytes(16))), told(lambda: line.setsockopt(1, 50, bytes(4))),
      told(lambda: line.setsockopt(6, 31, b"tls")), told(lambda: line.setsockopt(1, 2, 1)))
_, tty = os.openpty()
print(told(lambda: fcntl.ioctl(tty, 0x5423, bytes(4))), told(lambda: fcntl.ioctl(tty, 0x5424, bytes(4))))
print(libc.prctl(62, 1, 0, 0, 0), errno.errorcode[ctypes.get_errno()])
"""
    done = run({"code": source})
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["ENOPROTOOPT ENOPROTOOPT ENOPROTOOPT done", "EPERM done", "-1 EPERM"]


def test_a_slot_may_allow_io_uring() -> None:
    (setup, *_) = numbers(["io_uring_setup"])
    assert errnos([[setup, 0, 0]]) == [errno.ENOSYS]
    assert errnos([[setup, 0, 0]], io_uring=True) != [errno.ENOSYS]


# mov eax, 20; int 0x80; ret: getpid of a 32-bit program. mov eax, 0x40000027; syscall; ret: of an x32 one.
FOREIGN = {"32 bits": "b814000000cd80c3", "x32": "b8270000400f05c3"}


@pytest.mark.parametrize("code", FOREIGN.values(), ids=FOREIGN)
def test_calls_of_other_architectures_end_the_program(code: str) -> None:
    source = f"""
import mmap
page = mmap.mmap(-1, 4096, prot=7)
page.write(bytes.fromhex({code!r}))
run = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
print("came back with", run(), flush=True)
"""
    if os.uname().machine != "x86_64":
        source = "os.kill(os.getpid(), 31)"
    done = run({"code": source})
    assert (done.returncode, done.stdout) == (-31, "")


def test_ordinary_programs_go_on_working() -> None:
    source = """
import hashlib, multiprocessing, socket, sqlite3, subprocess, tempfile, threading
done = []
threads = [threading.Thread(target=done.append, args=(i,)) for i in range(4)]
for t in threads: t.start()
for t in threads: t.join()
assert sorted(done) == [0, 1, 2, 3]
assert subprocess.check_output(["/bin/sh", "-c", "seq 3 | sort -r | head -n 1"]) == b"3\\n"
with tempfile.TemporaryDirectory() as place:
    base = sqlite3.connect(place + "/x.db"); base.execute("create table t (a)"); base.commit(); base.close()
    os.chmod(place, 0o755)
a, b = socket.socketpair(); a.send(b"x"); assert b.recv(1) == b"x"
with multiprocessing.get_context("fork").Pool(2) as pool: assert pool.map(abs, [-1, -2]) == [1, 2]
print("all of it")
"""
    done = run({"code": source})
    assert (done.stdout, done.stderr) == ("all of it\n", "")


def test_without_the_library_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyseccomp", None)
    with pytest.raises(MinerError, match=r"cannot build .*; apt-get install libseccomp2"):
        filter_fd()


def test_a_name_that_nobody_knows_is_said() -> None:
    with pytest.raises(MinerError, match="has no number of no_such_call"):
        list(numbers(["no_such_call"]))


def test_the_numbers_of_newer_calls_are_right() -> None:
    import pyseccomp

    for name, number in seccomp.NEWER.items():
        assert pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name) in {number, -1}


def documented() -> str:
    """Write the filter as docs/security.md has it."""
    rows: dict[tuple[str, str], list[str]] = {}
    for denied in (*DENIED, IO_URING):
        told = errno.errorcode[denied.errno]
        rows[denied.reason, told] = [f"`{call}`" for call in denied.calls.split()]
    for masked in MASKED:
        calls = rows.setdefault((masked.reason, errno.errorcode[masked.errno]), [])
        if f"`{masked.call}`" not in calls:
            calls.append(f"`{masked.call}`")
    lines = [f"| {' '.join(calls)} | {told} | {reason} |" for (reason, told), calls in rows.items()]
    return "\n".join(["| calls | told | why not |", "| --- | --- | --- |", *lines, ""])


def test_the_documents_have_the_filter_as_it_is() -> None:
    text = (Path(aitbc_miner.__file__).parents[1] / "docs" / "security.md").read_text()
    _, _, rest = text.partition("<!-- begin of the filter -->\n")
    assert rest.partition("<!-- end of the filter -->")[0] == documented()
