"""What the heartbeat process says of this node's slots, and of what is wrong with the coordinator."""

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
"""For so many intervals at most a coordinator may ask to hear nothing of us."""


def capability_of(slots: Sequence[SlotView]) -> list[SlotCapability]:
    """Say what each slot is; a change of that is told to the coordinator anew."""
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
    """Say what a slot does now, and what its job uses of the machine."""
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
    """Say what the operator can do; `source` is where the credential comes from."""
    match error:
        case CoordinatorError(status=404) | RegistrationError(__cause__=Refused(status=404)):
            return "check coordinator.base_url: nothing there takes registrations; mind its path"
        case RegistrationError(__cause__=Refused()):
            return "compare coordinator.base_url with what the coordinator's operator gave you, and ask them"
        case RegistrationError():
            return f"put the token that the coordinator gave you into {source} (coordinator.auth_token)"
        case Unreachable():
            return "check coordinator.base_url and this machine's network; the node keeps trying"
        case _:
            return "nothing on this node; it keeps trying"


def rest_after(error: CoordinatorError, interval_s: float) -> float:
    """Say how long to wait at least before the next heartbeat, where somebody has said so.

    Who is silent for long is taken for dead, whatever was asked. It is asked in whole seconds.
    """
    longest_s = max(SILENT_BEATS * interval_s, 2.0)
    match error:
        case Busy():
            return min(error.retry_after or 0.0, longest_s)
        case Paced():
            return min(error.wait_s, longest_s)
    return 0.0
