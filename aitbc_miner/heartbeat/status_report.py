"""Describes the slots for registrations and heartbeats, and finds remedies for the coordinator's errors."""

from collections.abc import Sequence
from typing import Any

from aitbc_miner.coordinator.interface import Busy, CoordinatorError, Paced, Refused, Unreachable
from aitbc_miner.errors import MinerError
from aitbc_miner.heartbeat.registration import RegistrationError
from aitbc_miner.ipc.messages import SlotView
from aitbc_miner.probe.machine import SlotCapability
from aitbc_miner.telemetry.metrics import Snapshot
from aitbc_miner.telemetry.sampling import Use

SILENT_BEATS = 3
"""The node pauses its heartbeats for at most so many intervals, even if the coordinator asks for more."""


def capability_of(slots: Sequence[SlotView]) -> list[SlotCapability]:
    """Describe each slot for a registration; if the description changes, the node registers again."""
    return [
        SlotCapability(
            name=view.offer.name,
            kind=view.offer.kind,
            cpus=view.cpus or "",
            memory_mb=view.offer.memory_mb,
            enforced=view.enforced,
            gpu=view.gpu,
            runners=list(view.offer.runners),
            offers=view.offers,
        )
        for view in slots
    ]


def slot_report(snapshot: Snapshot, view: SlotView) -> dict[str, Any]:
    """Describe the present state of a slot and its job's use of the machine, for a heartbeat."""
    use, gpu = snapshot.uses.get(view.offer.name, Use()), snapshot.gpu_uses.get(view.offer.name)
    report: dict[str, Any] = {
        "name": view.offer.name,
        "state": view.state,
        "job_id": view.job_id,
        "cpu_pct": use.cpu_pct,
        "memory_mb": None if use.memory_bytes is None else use.memory_bytes >> 20,
    }
    if gpu and not gpu.error:
        report |= {"vram_mb": gpu.vram_used_mb, "gpu_util": gpu.utilisation_pct}
    return report


def remedy_for(error: MinerError, source: str) -> str:
    """Give the operator's remedy for an error; `source` is the value of coordinator.auth_token."""
    match error:
        case CoordinatorError(status=404) | RegistrationError(__cause__=Refused(status=404)):
            return "check coordinator.base_url and its path: this address takes no registrations"
        case RegistrationError(__cause__=Refused()):
            return "check coordinator.base_url with the coordinator's operator"
        case RegistrationError():
            return f"put the token from the coordinator's operator into {source} (coordinator.auth_token)"
        case Unreachable():
            return "check coordinator.base_url and this machine's network; the node retries by itself"
        case _:
            return "no action needed here: the node retries by itself"


def rest_after(error: CoordinatorError, interval_s: float) -> float:
    """Give the least seconds until the next heartbeat, as far as the error asks for a pause; else 0.0.

    A coordinator takes a silent node for dead, so a longer request is cut. Retry-After has whole seconds.
    """
    longest_s = max(SILENT_BEATS * interval_s, 2.0)
    match error:
        case Busy():
            return min(error.retry_after or 0.0, longest_s)
        case Paced():
            return min(error.wait_s, longest_s)
    return 0.0
