"""Measures the cost of the sandbox: starts a program as a job, with and without a sandbox, in turn."""

import os
import select
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from aitbc_miner.sandbox.bubblewrap import Sandbox, enclose, why_not
from aitbc_miner.sandbox.spawn import become_subreaper, spawn
from aitbc_miner.sandbox.users import Identity
from aitbc_miner.util.limits import ProcessLimits

MIB = 1 << 20
# Belongs to nobody, by systemd's table of ids.
UID, GID = 60610, 60610
PROGRAMS = {
    "/bin/true": ["/bin/true"],
    "a shell with a pipe": ["/bin/sh", "-c", "echo x | cat >/dev/null"],
    "python3 -c pass": ["/usr/bin/python3", "-I", "-c", "pass"],
}


def cost(turns: int) -> None:
    """Print for each program the time from fork to wait, without and with the sandbox."""
    become_subreaper()
    user = Identity(UID, GID, "nobody") if os.geteuid() == 0 else None
    box = Sandbox(user, tmp_bytes=MIB, shm_bytes=MIB)
    if problem := why_not(box):
        print(f"cannot measure sandbox: {problem}")
        return
    print(f"sandbox: {turns} runs each, from fork to wait, ms (median, best)")
    with tempfile.TemporaryDirectory(prefix="aitbc-bench-") as folder:
        job = Path(folder)
        job.chmod(0o755)
        for name in ("work", "output", "tmp"):
            (job / name).mkdir()
            if user is not None:
                os.chown(job / name, user.uid, user.gid)
        for name, argv in PROGRAMS.items():
            bare, boxed = [], []
            for _ in range(turns):
                bare.append(run(box, job, argv, boxed=False))
                boxed.append(run(box, job, argv, boxed=True))
            middle = [statistics.median(each) * 1000 for each in (bare, boxed)]
            best = [min(each) * 1000 for each in (bare, boxed)]
            print(
                f"  {name:22} bare {middle[0]:7.2f} {best[0]:7.2f}   in the sandbox {middle[1]:7.2f} "
                f"{best[1]:7.2f}   ratio {middle[1] / middle[0]:.1f}, {middle[1] - middle[0]:.1f} ms more"
            )


def run(box: Sandbox, job: Path, argv: Sequence[str], *, boxed: bool) -> float:
    """Start the program once and give the seconds until its wait returns."""
    user = box.runs_as
    with ExitStack() as stack:
        null = os.open(os.devnull, os.O_RDWR)
        stack.callback(os.close, null)
        fds = {0: null, 1: null, 2: null}
        began = time.perf_counter()
        enclosed = enclose(box, job, argv, (), fds, stack) if boxed else None
        started = spawn(
            enclosed.argv if enclosed else argv,
            cwd=job / "work",
            env={"PATH": "/usr/bin:/bin"},
            fds=fds | (enclosed.fds if enclosed else {}),
            limits=ProcessLimits(),
            group=None,
            uid=user.uid if user else None,
            gid=user.gid if user else None,
            enclosed=enclosed,
        )
        with started:
            while (ended := started.poll()) is None:
                select.select([started.pidfd], [], [])
            took = time.perf_counter() - began
    if ended.status != 0:
        raise RuntimeError(f"{argv[0]} ended with {ended}")
    return took
