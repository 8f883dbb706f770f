"""What the supervisor remembers of jobs is bounded, whatever the agent says."""

import pytest

from aitbc_miner.ipc.channel import MAX_LINE, MAX_UNFINISHED, ExcessError
from aitbc_miner.ipc.messages import JobUpdate
from aitbc_miner.jobs import State
from aitbc_miner.supervisor.job_index import KEPT, JobIndex


def test_of_finished_jobs_the_last_ones_are_remembered() -> None:
    index = JobIndex()
    index.update(JobUpdate("runs", State.ACKED))
    for n in range(KEPT + 5):
        index.update(JobUpdate(f"j{n}", State.DONE))
    assert len(index.rows(None)) == KEPT
    assert index.get("runs") is not None
    assert index.get("j0") is None
    assert index.get(f"j{KEPT + 4}") is not None


def test_a_job_that_is_tried_again_is_not_forgotten_as_a_finished_one() -> None:
    index = JobIndex()
    index.update(JobUpdate("again", State.FAILED))
    index.update(JobUpdate("again", State.RETRY_WAIT))
    for n in range(KEPT + 5):
        index.update(JobUpdate(f"j{n}", State.DONE))
    assert index.get("again") is not None


def test_too_many_unfinished_jobs_are_an_excess_and_the_next_agent_begins_anew() -> None:
    index = JobIndex()
    for n in range(KEPT + MAX_UNFINISHED):
        index.update(JobUpdate(f"j{n}", State.PULLED))
    with pytest.raises(ExcessError, match="5000 unfinished jobs"):
        index.update(JobUpdate("one-more", State.PULLED))
    assert index.rows(None) == []
    index.update(JobUpdate("next", State.PULLED))
    assert index.get("next") is not None


def test_a_long_message_is_kept_in_part() -> None:
    index = JobIndex()
    index.update(JobUpdate("j", State.FAILED, message="x" * 100_000))
    row = index.get("j")
    assert row is not None
    assert len(row.message) == MAX_LINE
