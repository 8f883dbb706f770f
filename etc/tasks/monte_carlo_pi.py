"""Estimates pi by throwing random points at a square, on all CPUs that the slot gives the job."""

import os
import random
from multiprocessing import Pool
from typing import Annotated, Any

from msgspec import Meta

from aitbc_miner.task import progress

CHUNK = 200_000
"""A process throws so many points, in about a tenth of a second, before it reports."""


def run(
    samples: Annotated[int, Meta(ge=1, le=10**12)],
    seed: int = 0,
    processes: Annotated[int, Meta(ge=0, le=1024)] = 0,
) -> dict[str, Any]:
    """Throw `samples` points in `processes` processes (0: one for each CPU of the job)."""
    workers = processes or len(os.sched_getaffinity(0))
    # Each chunk has its own seed, so that the result does not depend on the number of processes.
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
