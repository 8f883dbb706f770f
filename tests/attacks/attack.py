"""What an attack is, and what each of its programs begins with."""

from typing import Any, NamedTuple

# Secrets and marks that the tests lay out; where one turns up, something got through.
CANARIES = {
    "env": "canary-of-the-environment",
    "file": "canary-of-a-file",
    "work": "canary-of-a-work-directory",
    "argv": "canary-of-the-arguments",
    "memory": "canary-of-shared-memory",
    "process": "canary-of-a-process",
}

# What programs write when they have got through; what else they print is for people.
THROUGH = "THROUGH:"

PRELUDE = '''
import ctypes, errno, fcntl, glob, os, resource, signal, socket, stat, struct, subprocess, sys, time
libc = ctypes.CDLL(None, use_errno=True)

def through(*what):
    print("THROUGH:", *what, flush=True)

def call(number, *args):
    """Make a system call by its number; gives its result, or minus the errno."""
    ctypes.set_errno(0)
    got = libc.syscall(ctypes.c_long(number), *(ctypes.c_long(a) if isinstance(a, int) else a for a in args))
    return got if got >= 0 else -ctypes.get_errno()

def tried(number, *args):
    """Make a system call that must not be made: only these two answers are a refusal."""
    got = call(number, *args)
    print("call", number, "gave", got if got >= 0 else errno.errorcode.get(-got, got))
    if got not in (-errno.EPERM, -errno.ENOSYS, -errno.EACCES, -errno.EAFNOSUPPORT, -errno.EPROTONOSUPPORT):
        through("call", number, "gave", got)
    return got

def read(path):
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read(65536).decode("utf-8", "replace")
    except OSError as error:
        print(path, errno.errorcode.get(error.errno, error.errno))
        return ""

def own():
    """Give the pids that are this program's own: all there are, where it has a first process of its own."""
    if read("/proc/1/comm").strip() == "time":
        return {int(path.split("/")[2]) for path in glob.glob("/proc/[0-9]*/stat")}
    return {os.getpid()}
'''


class Attack(NamedTuple):
    """A hostile program in Python.

    Args:
        name: unique; also part of the job's id.
        property: what it tries to break.
        program: what it does, after `PRELUDE`; `{name}` stands for an entry of CANARIES or for what the test
            has prepared.
        bites: whether it gets through without the sandbox.
        codes: the ends that such a job may have.
        more: for its manifest.
    """

    name: str
    property: str
    program: str
    bites: bool = False
    codes: frozenset[str] = frozenset({"OK", "E_EXIT", "E_SIGNAL"})
    more: dict[str, Any] = {}  # noqa: RUF012  # never changed

    def source(self, **words: str) -> str:
        """Give the program as it is run."""
        text = self.program
        for name, word in {**CANARIES, **words}.items():
            text = text.replace(f"<{name}>", word)
        return f"{PRELUDE}\n{text.strip()}\n"


def calls(name: str, what: str, *lines: str, bites: bool = False) -> Attack:
    """Make an attack of system calls that must not be made."""
    return Attack(name, what, "\n".join(lines), bites)
