"""Decides whether and where the node tries a failed job again. Pure.

A job whose program has started runs again only if its manifest says so (`retry`). A job that failed earlier,
by no fault of its own, has up to `queue.max_attempts` attempts: no attempt can have had any effect.
"""

import random
from enum import StrEnum

from aitbc_miner.errors import CODES, ErrorCode, Retry
from aitbc_miner.jobs import RetryPolicy

# Somebody cancelled the job, the job itself is at fault, or the report failed and not the run.
NEVER = frozenset({ErrorCode.E_CANCELLED, ErrorCode.E_MANIFEST, ErrorCode.E_DENY, ErrorCode.E_UPLOAD})


class Where(StrEnum):
    """The place of the next attempt."""

    HERE = "here"
    ELSEWHERE = "elsewhere"


def next_attempt(
    code: ErrorCode | None, *, started: bool, attempt: int, policy: RetryPolicy, most: int, shared: bool
) -> Where | None:
    """Give the place of the next attempt after attempt number `attempt` failed; None: report the job.

    `most` limits the attempts of a job whose program has not started. `shared`: the node is in a fleet. If
    only another node can mend the failure, a node without a fleet leaves the choice to the coordinator.
    """
    if code is None or code in NEVER:
        return None
    retry = CODES[code].retry
    named = code in policy.on
    if started:
        allowed = attempt < policy.max_attempts and (named if policy.on else retry is not Retry.FINAL)
    else:
        allowed = attempt < most and retry is not Retry.FINAL
    if not allowed:
        return None
    if retry is Retry.ELSEWHERE:
        return Where.ELSEWHERE if shared else Where.HERE if named and started else None
    return Where.HERE


def outlives_its_node(policy: RetryPolicy) -> bool:
    """Whether a job may start again on another node after the loss of its node."""
    return policy.max_attempts > 1 and (not policy.on or ErrorCode.E_LOST in policy.on)


def pause_before(attempt: int, min_s: float, max_s: float, rng: random.Random) -> float:
    """Give the pause before attempt number `attempt`, in seconds, with full jitter."""
    ceiling = min(max_s, min_s * 2.0 ** min(attempt - 1, 32))
    return rng.uniform(min_s, max(min_s, ceiling))
