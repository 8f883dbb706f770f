"""A slot as the supervisor has it, with real processes."""

import signal
import subprocess

import pytest
from msgspec.structs import replace

from aitbc_miner.jobs import State
from aitbc_miner.slots.placement import Offer
from aitbc_miner.slots.spec import SlotSpec
from aitbc_miner.slots.state import Adopt, Cancel, SlotState, Tick, Timing
from aitbc_miner.supervisor.running_slot import Outcomes, RunningSlot, SlotPlan
from aitbc_miner.util.system import process_start

WAIT_S = 120.0


def test_an_adopted_worker_that_does_not_obey_is_killed() -> None:
    def nothing(*_: object) -> None:
        return

    offer = Offer("cpu0", "cpu", 1, 1024)
    outcomes = Outcomes(nothing, nothing, nothing, nothing, nothing)
    plan = SlotPlan(SlotSpec("cpu0", "cpu"), offer, None, lambda: pytest.fail("no worker wanted"), nothing)
    slot = RunningSlot(plan, outcomes)
    slot.rules = replace(slot.rules, timing=Timing(cancel_timeout=0.0))
    # The signal that asks a worker to end its job is ignored here, and the ignoring survives the exec.
    command = ["sh", "-c", "trap '' USR1; echo; exec sleep 600"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as worker:
        assert worker.stdout is not None
        worker.stdout.readline()
        assert slot.adopt(worker.pid, process_start(worker.pid))
        slot.feed(Adopt("j1", State.RUNNING))
        slot.feed(Cancel("cancel"))
        assert worker.poll() is None
        slot.feed(Tick())
        assert worker.wait(WAIT_S) == -signal.SIGKILL
        # Once it is gone, nothing is signalled any more.
        slot.feed(Tick())
    slot.rules = replace(slot.rules, retiring=True)
    slot.adopted_gone()
    assert slot.rules.state is SlotState.STOPPED
    slot.feed(Tick())
