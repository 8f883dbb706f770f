"""Whether a job that failed is tried again, and where. Pure.

A job whose program was started runs again only if its manifest says so (`retry`). One that came to nothing
before that, for a reason that is not its own, may be tried as often as `queue.max_attempts` says: nothing of
it can have happened twice.
"""

import random
from enum import StrEnum

from aitbc_miner.errors import CODES, ErrorCode, Retry
from aitbc_miner.jobs import RetryPolicy

# Of somebody's will, of the job's own making, or about a report and not about a run.
NEVER = frozenset({ErrorCode.E_CANCELLED, ErrorCode.E_MANIFEST, ErrorCode.E_DENY, ErrorCode.E_UPLOAD})


class Where(StrEnum):
    """Where the next attempt may be made."""

    HERE = "here"
    ELSEWHERE = "elsewhere"


def next_attempt(
    code: ErrorCode | None, *, started: bool, attempt: int, policy: RetryPolicy, most: int, shared: bool
) -> Where | None:
    """Say where a job goes whose attempt number `attempt` has failed; None: its report ends it.

    `most` are the attempts that any job has as long as its program was not started. `shared`: whether there
    are other nodes to take it. Without them, what only another node can mend is the coordinator's to place.
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
    """Whether a job may be started once more when its node is lost with it."""
    return policy.max_attempts > 1 and (not policy.on or ErrorCode.E_LOST in policy.on)


def pause_before(attempt: int, min_s: float, max_s: float, rng: random.Random) -> float:
    """Give the seconds to wait before attempt number `attempt`, with full jitter."""
    ceiling = min(max_s, min_s * 2.0 ** min(attempt - 1, 32))
    return rng.uniform(min_s, max(min_s, ceiling))
