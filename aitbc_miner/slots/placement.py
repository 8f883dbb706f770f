"""Chooses the slot for a job: the tightest free slot that fits. Higher priority first, then the older job."""

import math
from collections.abc import Sequence
from typing import Annotated

from msgspec import Meta, Struct

from aitbc_miner.errors import ErrorCode, JobError
from aitbc_miner.jobs import JobId, Manifest, Requirements, Short
from aitbc_miner.slots.spec import MIB, SlotSpec


class Ticket(Struct, frozen=True):
    """A job's requirements on its slot. `received` orders jobs of the same priority.

    `egress` is the network policy that the job asks for; None: the job runs under any policy.
    """

    job_id: JobId
    runner: Short
    requirements: Requirements = Requirements()
    priority: int = 0
    received: float = 0.0
    egress: Annotated[str, Meta(max_length=4096)] | None = None


class Offer(Struct, frozen=True):
    """A slot's resources: threads, MiB of memory, MB of video memory, runners, its network policy."""

    name: str
    kind: str
    cpu_threads: int
    memory_mb: int
    vram_mb: int = 0
    runners: tuple[str, ...] = ()
    egress: str = "none"


def ticket_for(manifest: Manifest, received: float = 0.0) -> Ticket:
    """Take a job's requirements from its manifest."""
    asked = None if manifest.egress == "none" else manifest.egress
    needs = manifest.requirements
    return Ticket(manifest.job_id, manifest.runner, needs, manifest.priority, received, asked)


def fits(ticket: Ticket, offer: Offer) -> bool:
    """Whether the slot meets all requirements of the job."""
    needs = ticket.requirements
    wants_gpu = needs.gpu or needs.vram_mb > 0
    return (
        ticket.runner in offer.runners
        and ticket.egress in {None, offer.egress}
        and needs.cpu_threads <= offer.cpu_threads
        and needs.memory_mb <= offer.memory_mb
        and (not wants_gpu or (offer.kind == "gpu" and needs.vram_mb <= offer.vram_mb))
    )


def place(tickets: Sequence[Ticket], free: Sequence[Offer]) -> list[tuple[Ticket, Offer]]:
    """Pair waiting jobs with free slots. A job without a fitting slot does not hold up the jobs behind it."""
    left = list(free)
    pairs: list[tuple[Ticket, Offer]] = []
    for ticket in sorted(tickets, key=lambda t: (-t.priority, t.received, t.job_id)):
        fitting = [offer for offer in left if fits(ticket, offer)]
        if fitting:
            offer = min(fitting, key=_size)
            left.remove(offer)
            pairs.append((ticket, offer))
    return pairs


def room(free: Sequence[Offer], coming: Sequence[Ticket | None]) -> list[Offer]:
    """List the free slots that no coming job will take; None is a coming job with unknown requirements."""
    # A job with unknown requirements may need any slot: keep a slot for each of these jobs.
    free = free[: max(0, len(free) - sum(ticket is None for ticket in coming))]
    taken = {offer.name for _, offer in place([ticket for ticket in coming if ticket], free)}
    return [offer for offer in free if offer.name not in taken]


def _size(offer: Offer) -> tuple[bool, bool, int, int, int, str]:
    # A job that needs no GPU takes a GPU slot only if no CPU slot is free. The same holds for a network.
    return (
        offer.kind == "gpu",
        offer.egress != "none",
        offer.vram_mb,
        offer.memory_mb,
        offer.cpu_threads,
        offer.name,
    )


def refuse_hopeless(ticket: Ticket, offers: Sequence[Offer]) -> None:
    """Raise if no slot of this node, busy or free, could ever take the job.

    Raises:
        JobError: E_NOGPU if the GPU or its memory is missing, E_EGRESS if the network policy is missing, else
            E_NOSLOT.
    """
    if any(fits(ticket, offer) for offer in offers):
        return
    needs = ticket.requirements
    kind = "GPU slot" if needs.gpu or needs.vram_mb > 0 else "slot"
    if kind == "GPU slot":
        most = max((offer.vram_mb for offer in offers if offer.kind == "gpu"), default=None)
        if most is None:
            raise JobError(ErrorCode.E_NOGPU, "cannot place the job: no slot of this node has a GPU")
        if needs.vram_mb > most:
            cause = f"no slot has {needs.vram_mb} MB of video memory; the largest has {most} MB"
            raise JobError(ErrorCode.E_NOGPU, f"cannot place the job: {cause}")
    able = [it for it in offers if ticket.runner in it.runners and (kind == "slot" or it.kind == "gpu")]
    if not able:
        raise JobError(
            ErrorCode.E_NOSLOT, f"cannot place the job: no {kind} offers the runner {ticket.runner!r}"
        )
    if ticket.egress is not None and all(offer.egress != ticket.egress for offer in able):
        raise JobError(
            ErrorCode.E_EGRESS,
            f"cannot place the job: no {kind} with the runner {ticket.runner!r} grants egress"
            f" {ticket.egress!r:.80}; set `egress` of a slot",
        )
    _refuse_size(needs, [offer for offer in able if ticket.egress in {None, offer.egress}])


def _refuse_size(needs: Requirements, able: Sequence[Offer]) -> None:
    """Raise E_NOSLOT with the first figure that no slot has, among the slots with enough of the others."""
    wanted: list[str] = []
    for figure, need, unit in (
        ("vram_mb", needs.vram_mb, "MB of video memory"),
        ("cpu_threads", needs.cpu_threads, "threads"),
        ("memory_mb", needs.memory_mb, "MiB of memory"),
    ):
        if need:
            wanted.append(f"{need} {unit}")
            most = max(getattr(offer, figure) for offer in able)
            if most < need:
                *others, last = wanted
                both = "both " if len(others) == 1 else ""
                figures = f"{both}{', '.join(others)} and {last}" if others else last
                slots = f"slots with {' and '.join(others)}" if others else "slots here"
                message = f"no slot has {figures}; the {slots} have at most {most} {unit}"
                raise JobError(ErrorCode.E_NOSLOT, f"cannot place the job: {message}")
            able = [offer for offer in able if getattr(offer, figure) >= need]


def make_offer(spec: SlotSpec, *, threads: int, memory_bytes: int, vram_mb: int) -> Offer:
    """Take a slot's resources from its limits and the machine."""
    by_quota = math.ceil(spec.cpu_max / 100) if spec.cpu_max else threads
    cpus = min(len(spec.cpus) if spec.cpus else threads, by_quota)
    memory = min(spec.memory_max or memory_bytes, memory_bytes)
    return Offer(spec.name, spec.kind, max(1, cpus), memory // MIB, vram_mb, tuple(spec.runners), spec.egress)
