"""The sandbox as it is packaged: it stands between the miner's unit and the jobs."""

import signal
from pathlib import Path

import pytest

from tests.vm.boxed import BoxedMachine
from tests.vm.machine import WAIT_S, hold, wait_gone
from tests.vm.witness import assert_once
from tools.lib.local_node import wait_until
from tools.mock.bootstrap.records import State

pytestmark = pytest.mark.smoke

LOOK = "; ".join(
    (
        "grep -E '^(CapEff|CapBnd|NoNewPrivs|Seccomp):' /proc/self/status",
        "id -u; hostname; ls /; ls /etc",
        "for at in / /usr /etc /dev /proc/sys/kernel/hostname; do [ ! -w $at ] || echo can write $at; done",
        "cat /proc/self/cgroup; df --output=size /tmp /dev/shm | tail -n 2",
    )
)


def test_a_job_sees_its_own_and_nothing_else(boxed: BoxedMachine, reports: Path) -> None:
    boxed.slots(1)
    boxed.start()
    (job,) = boxed.wait_final([boxed.submit(boxed.script("look", LOOK))])
    assert job.state is State.DONE, job
    log = (boxed.jobs / "look" / "logs" / "exec.log").read_text()
    (reports / "sandbox-look.txt").write_text(log)
    for line in ("CapEff:\t0000000000000000", "CapBnd:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"):
        assert line in log, log
    assert "can write" not in log
    assert "\njob\n" in log
    assert not {"root", "home", "run", "var", "boot", "srv"} & set(log.splitlines())
    assert "0::/\n" in log
    assert log.split()[-2:] == ["262144", "262144"]
    assert boxed.problems() == []


def test_a_job_in_its_sandbox_outlives_the_miner(boxed: BoxedMachine) -> None:
    release = boxed.jobs / "long" / "work" / "release"
    boxed.slots(1)
    boxed.start()
    boxed.submit(boxed.script("long", f"{hold(Path('release'))}; echo done"))
    pid = boxed.running("long")
    boxed.restart()
    boxed.wait_new_main(boxed.kill(signal.SIGKILL))
    wait_until(lambda: "long" in [row.slot.job_id for row in boxed.now().slots], WAIT_S, 0.2)
    assert boxed.running("long") == pid
    release.touch()
    (job,) = boxed.wait_final(["long"])
    assert job.state is State.DONE, job
    wait_gone([pid])
    assert_once(boxed.mock, ["long"])
    assert len(boxed.runs("long")) == 1
