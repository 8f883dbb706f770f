"""Fails with an error of the task itself."""

from aitbc_miner.task import TaskError


def run(reason: str) -> None:
    """Raise the error."""
    raise TaskError("NOT_TODAY", reason)
