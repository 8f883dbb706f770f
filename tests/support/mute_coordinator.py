"""A coordinator of which nothing may be asked; a test's own overrides what may."""

from pathlib import Path
from typing import Any

from aitbc_miner.coordinator.interface import (
    Assignments,
    Gone,
    Heartbeat,
    PulledJob,
    PullFilters,
    Standing,
    Told,
)
from aitbc_miner.jobs import Outcome


class MuteCoordinator:
    """Fails the test at every call."""

    slowest = 1.0

    def use_token(self, token: str) -> None:
        raise AssertionError("not to be asked here")

    def register(self, capabilities: dict[str, Any]) -> str:
        raise AssertionError("not to be asked here")

    def heartbeat(self, report: Heartbeat) -> None:
        raise AssertionError("not to be asked here")

    def pull(self, filters: PullFilters) -> PulledJob | None:
        raise AssertionError("not to be asked here")

    def ack(self, job_id: str, holder: str | None = None) -> None:
        raise AssertionError("not to be asked here")

    def progress(self, job_id: str, pct: float, note: str) -> bool:
        raise AssertionError("not to be asked here")

    def leave(self) -> None:
        raise AssertionError("not to be asked here")

    def assignments(self) -> Assignments | None:
        return None

    def why_idle(self, standing: Standing) -> list[str]:
        return []

    def result(self, job_id: str, outcome: Outcome, root: Path, key: str, *, again: bool = False) -> Told:
        raise AssertionError("not to be asked here")

    def fail(self, job_id: str, outcome: Outcome, key: str, *, again: bool = False) -> Told:
        raise AssertionError("not to be asked here")


class Stranger(MuteCoordinator):
    """Says of each job that it is another node's."""

    def ack(self, job_id: str, holder: str | None = None) -> None:
        raise Gone("cannot accept: 409", 409)
