"""A slot as the supervisor has it, with real processes."""

import signal
import subprocess
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace

from aitbc_miner.ipc.messages import JobSettled
from aitbc_miner.jobs import State
from aitbc_miner.slots.placement import Offer
from aitbc_miner.slots.spec import SlotSpec
from aitbc_miner.slots.state import Adopt, Cancel, SlotState, SlotTiming, Tick
from aitbc_miner.supervisor.children import OneShots
from aitbc_miner.supervisor.job_index import JobIndex
from aitbc_miner.supervisor.node_plan import SlotPlan
from aitbc_miner.supervisor.running_slot import Outcomes, RunningSlot
from aitbc_miner.util.system import process_start

WAIT_S = 120.0


def test_an_adopted_worker_that_does_not_obey_is_killed() -> None:
    offer = Offer("cpu0", "cpu", 1, 1024)
    told: list[object] = []
    agent: Any = SimpleNamespace(send=told.append)
    outcomes = Outcomes(JobIndex(), agent, agent, OneShots())
    unwanted: Any = lambda: pytest.fail("no child wanted")  # noqa: E731
    plan = SlotPlan(SlotSpec("cpu0", "cpu"), offer, None, unwanted, unwanted)
    slot = RunningSlot(plan, outcomes)
    slot.rules = replace(slot.rules, timing=SlotTiming(cancel_timeout=0.0))
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
    assert told == [JobSettled("j1", "the worker of slot cpu0 ended")]
    slot.feed(Tick())
