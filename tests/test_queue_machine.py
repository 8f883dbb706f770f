"""Random histories of the retry queue: two nodes on one store, against a model that says it in another way."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from msgspec.structs import replace
from queue_stores import open_store
from redis_server import RedisServer, redis_server

from aitbc_miner.queue import Claim, Kind, RetryQueue, Task

# Far apart, and no sum of steps is one of the times: how long a test takes makes no difference.
TIMES = st.sampled_from([0.0, 10_000.0, 30_000.0])
STEPS = st.sampled_from([7_000.0, 19_000.0])
KINDS = st.sampled_from(list(Kind))
JOBS = st.sampled_from(["j1", "j2", "j3"])
NODES = st.sampled_from(["a", "b"])
TASKS = st.builds(
    Task,
    kind=KINDS,
    job_id=JOBS,
    node=NODES,
    attempts=st.integers(0, 3),
    max_attempts=st.integers(0, 3),
    reason=st.text("ä\n\0x", max_size=2),
    payload=st.binary(max_size=3),
)

type_Key = tuple[Kind, str]


class Waiting:
    def __init__(self, task: Task, at: float) -> None:
        self.task, self.at = task, at


class Held:
    """Its lease may have run out."""

    def __init__(self, task: Task, token: str, until: float) -> None:
        self.task, self.token, self.until = task, token, until


class Dead:
    def __init__(self, task: Task, since: float) -> None:
        self.task, self.since = task, since
