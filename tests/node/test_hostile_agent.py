"""An agent that was taken over floods its supervisor: that stays small, answers, and ends it each time."""

import os
import subprocess
import sys
from pathlib import Path

from aitbc_miner.control.client import ask
from aitbc_miner.control.protocol import Request, Status
from aitbc_miner.util import clock
from tests.node.conftest import NodeFactory
from tests.node.harness import WAIT_S
from tests.node.hostile_agent import KINDS
from tests.node.rig import peak_mib
from tools.lib.local_node import TOKEN, wait_until

SCRIPT = Path(__file__).with_name("hostile_agent.py")
# With all the floods kept it would be several hundred; what is on its way just then makes up to 70.
GROWTH_MIB = 128
ANSWER_S = 5.0
FLOODS_S = 300.0


def test_an_agent_that_floods_is_ended_and_costs_little(node_factory: NodeFactory) -> None:
    node = node_factory(2)
    lives = node.directory / "lives"
    lives.touch()
    with node.log.open("ab") as log:
        node.process = subprocess.Popen(
            [sys.executable, str(SCRIPT), str(node.config), str(lives)],
            env={**os.environ, "MINER_AUTH": TOKEN},
            stdin=subprocess.DEVNULL,
            stderr=log,
        )
    wait_until(lambda: node.status() or node.process_ended(), WAIT_S)
    before = peak_mib(node.process.pid)
    asked, until = 0, clock.now() + FLOODS_S
    while lives.stat().st_size <= len(KINDS):
        answer, _ = ask(node.socket, Request("status"), ANSWER_S)
        assert isinstance(answer, Status), node.log.read_text()[-4000:]
        asked += 1
        assert clock.now() < until, f"{lives.stat().st_size} of {len(KINDS)} floods are over"
    # Each flood lasts some seconds at most, and many questions are answered meanwhile.
    assert asked > 2 * len(KINDS)
    assert peak_mib(node.process.pid) - before < GROWTH_MIB
    status = node.now()
    assert status.pid == node.process.pid
    ended = node.log.read_text().count("child killed")
    assert ended == len(KINDS), node.log.read_text()[-4000:]
    assert "heartbeat" not in " ".join(problem.what for problem in status.problems)
    assert any("was ended by the supervisor: " in problem.what for problem in status.problems)
