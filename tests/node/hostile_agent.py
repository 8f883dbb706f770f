"""A node whose agent is taken over: each time it is started it floods its supervisor in another way.

Run as `hostile_agent.py CONFIG LIVES`: in the file LIVES each life of the agent leaves a line.
"""

import os
import sys
from collections.abc import Callable, Iterator
from itertools import chain, count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec

from aitbc_miner import node
from aitbc_miner.config.settings import load_config
from aitbc_miner.errors import ErrorCode
from aitbc_miner.ipc.messages import (
    Counted,
    Deliveries,
    FromAgent,
    JobReady,
    JobUpdate,
    Recovered,
    Starved,
    Sweepable,
)
from aitbc_miner.jobs import State
from aitbc_miner.slots.placement import Ticket
from aitbc_miner.supervisor.children import Keeper

BIG = "x" * 1_000_000


def ready() -> Iterator[Any]:
    return (JobReady(Ticket(f"ready-{n}", "none")) for n in count())


def unplaceable() -> Iterator[Any]:
    # Slots are for one job at a time, so all of them wait.
    return (JobReady(Ticket(f"wait-{n}", "cli", priority=n % 100)) for n in count())


def jobs() -> Iterator[Any]:
    return (JobUpdate(f"job-{n}", State.PULLED, message="y" * 2000) for n in count())


def big_jobs() -> Iterator[Any]:
    return (JobUpdate(f"big-{n}", State.FAILED, code=ErrorCode.E_EXIT, message=BIG) for n in count())


def ends() -> Iterator[Any]:
    states = (State.ACKED, State.UPLOADING)
    return (JobUpdate("same", states[n % 2], message=BIG[:200]) for n in count())


def sweeps() -> Iterator[Any]:
    return (Sweepable([f"sweep-{n}-{m}" for m in range(1000)]) for n in count())


def counts() -> Iterator[Any]:
    return (Counted("retries", f"label{n}") for n in count())


def words() -> Iterator[Any]:
    return (Deliveries(n, BIG) if n % 2 else Starved(1.0, [BIG]) for n in count())


def silence() -> Iterator[Any]:
    return iter(())


def one_too_long() -> Iterator[Any]:
    yield JobUpdate("long", State.FAILED, message=BIG * 5)
    yield from silence()


KINDS: tuple[Callable[[], Iterator[Any]], ...] = (
    *(ready, unplaceable, jobs, big_jobs, ends, sweeps, counts, words, one_too_long),
)


def flood(lives: Path, pipe: "Connection[Any, Any]") -> None:
    with lives.open("a+") as file:
        file.write(".")
        file.flush()
        life = file.tell() - 1
    kind = KINDS[life]() if life < len(KINDS) else silence()
    for message in chain([Recovered([])], kind):
        send(pipe.fileno(), message)
    while os.read(pipe.fileno(), 1 << 16):
        pass


def send(fd: int, message: Any) -> None:
    body = msgspec.json.encode(message)
    data = memoryview(len(body).to_bytes(4, "big") + body)
    while data:
        data = data[os.write(fd, data) :]


def main() -> int:
    config_file, lives = map(Path, sys.argv[1:])

    class Hostile(node.Node):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.agent = Keeper(
                "agent", lambda pipe: flood(lives, pipe), FromAgent, [], pause_min=0.05, pause_max=0.2
            )

    node.Node = Hostile  # type: ignore[assignment, misc]
    config, faults, _ = load_config(config_file, os.environ)
    assert config is not None, faults
    return node.run_node(config_file, config, [])


if __name__ == "__main__":
    sys.exit(main())
