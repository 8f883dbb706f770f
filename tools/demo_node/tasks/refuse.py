"""Fails with a reason of its own."""

from aitbc_miner.task import TaskError


def run(reason: str) -> None:
    """Say no."""
    raise TaskError("NOT_TODAY", reason)
