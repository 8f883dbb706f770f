import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from aitbc_miner.errors import MinerError
from aitbc_miner.util import system

NOBODY = 65534


def python(code: str, *args: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_the_boot_has_an_id() -> None:
    assert uuid.UUID(system.boot_id())
    assert system.boot_id() == system.boot_id()


def test_the_start_of_a_process_survives_the_worst_of_names() -> None:
    rename = "from pathlib import Path; Path('/proc/self/comm').write_text(') R 1 (')"
    with python(f"{rename}; print('ready', flush=True); input()") as child:
        assert child.stdout
        assert child.stdout.readline() == "ready\n"
        assert Path(f"/proc/{child.pid}/comm").read_text() == ") R 1 (\n"
        start = system.process_start(child.pid)
        child.communicate("\n", timeout=20)
    ours = int(Path("/proc/self/stat").read_text().split()[21])
    assert start is not None
    assert ours <= start <= ours + 24 * 3600 * os.sysconf("SC_CLK_TCK")
    assert system.process_start(os.getpid()) == ours
    assert system.process_start(child.pid) is None


DROP = """
import os, sys
from pathlib import Path
from aitbc_miner.errors import MinerError
from aitbc_miner.util.system import drop_privileges
try:
    drop_privileges(65534, 65534)
except MinerError as error:
    sys.exit(str(error))
status = Path("/proc/self/status").read_text()
no_new_privs = next(line.split()[1] for line in status.splitlines() if line.startswith("NoNewPrivs"))
capabilities = next(line.split()[1] for line in status.splitlines() if line.startswith("CapPrm"))
owner = Path("/proc/self/mem").stat().st_uid
print(os.getresuid(), os.getresgid(), os.getgroups(), no_new_privs, int(capabilities, 16), owner)
"""


def test_privileges_are_dropped_for_good() -> None:
    done = subprocess.run(
        [sys.executable, "-c", DROP], check=False, capture_output=True, text=True, timeout=20
    )
    if os.geteuid() == 0:
        three = (NOBODY, NOBODY, NOBODY)
        # A process that may not be dumped belongs to root in /proc.
        assert done.stdout.split("\n")[0] == f"{three} {three} [] 1 0 0", done.stderr
    else:
        assert "cannot drop privileges to uid 65534" in done.stderr


@pytest.mark.parametrize(("uid", "gid"), [(0, NOBODY), (NOBODY, 0)])
def test_root_is_nothing_to_drop_to(uid: int, gid: int) -> None:
    with pytest.raises(MinerError, match="name an ordinary user"):
        system.drop_privileges(uid, gid)
