"""Estimates pi by throwing random points at a square, on all CPUs that the slot gives the job."""

import os
import random
from multiprocessing import Pool
from typing import Annotated, Any

from msgspec import Meta

from aitbc_miner.task import progress

CHUNK = 200_000
"""Points a process throws before it reports, about a tenth of a second."""


def run(
    samples: Annotated[int, Meta(ge=1, le=10**12)],
    seed: int = 0,
    processes: Annotated[int, Meta(ge=0, le=1024)] = 0,
) -> dict[str, Any]:
    """Throw `samples` points; `processes` of 0 means one for each CPU this job may use."""
    workers = processes or len(os.sched_getaffinity(0))
    # A seed for each chunk, not each process: the same seed gives the same answer on any number of CPUs.
    chunks = -(-samples // CHUNK)
    work = ((f"{seed}/{number}", min(CHUNK, samples - number * CHUNK)) for number in range(chunks))
    step = chunks // 100 or 1  # a hundred reports are enough
    hits = 0
    with Pool(workers) as pool:
        for done, inside in enumerate(pool.imap_unordered(_hits, work), 1):
            hits += inside
            if done % step == 0:
                progress(100 * done / chunks, f"pi is about {4 * hits / min(samples, done * CHUNK):.3f}")
    return {"pi": 4 * hits / samples, "samples": samples, "hits": hits, "processes": workers}


def _hits(chunk: tuple[str, int]) -> int:
    seed, points = chunk
    throw = random.Random(seed).random  # noqa: S311  # no secret depends on it
    return sum(throw() ** 2 + throw() ** 2 <= 1.0 for _ in range(points))
