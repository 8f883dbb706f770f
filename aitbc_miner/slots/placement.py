"""Which slot a job goes to: the tightest free one that fits; higher priority first, then the older job."""

import math
from collections.abc import Sequence
from typing import Annotated

from msgspec import Meta, Struct

from aitbc_miner.errors import ErrorCode, JobError
from aitbc_miner.jobs import JobId, Manifest, Requirements, Short
from aitbc_miner.slots.spec import SlotSpec

MIB = 1 << 20


class Ticket(Struct, frozen=True):
    """What the choice of a slot depends on. `received` orders jobs of the same priority.

    `egress` is the network policy that the job asks for; without one, any slot will do.
    """

    job_id: JobId
    runner: Short
    requirements: Requirements = Requirements()
    priority: int = 0
    received: float = 0.0
    egress: Annotated[str, Meta(max_length=4096)] | None = None


class Offer(Struct, frozen=True):
    """What a slot has to give: threads, MiB of memory, MB of video memory, runners, its network policy."""

    name: str
    kind: str
    cpu_threads: int
    memory_mb: int
    vram_mb: int = 0
    runners: tuple[str, ...] = ()
    egress: str = "none"


def ticket_for(manifest: Manifest, received: float = 0.0) -> Ticket:
    """Say what a job needs of a slot."""
    asked = None if manifest.egress == "none" else manifest.egress
    needs = manifest.requirements
    return Ticket(manifest.job_id, manifest.runner, needs, manifest.priority, received, asked)


def fits(ticket: Ticket, offer: Offer) -> bool:
    """Whether the slot has all that the job needs."""
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
    """Pair waiting jobs with free slots. A job for which none is free does not hold up those behind it."""
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
    """Say which free slots no job on its way will take; None is a job whose needs are not known yet."""
    # One of those may want any of them, so as many are kept.
    free = free[: max(0, len(free) - sum(ticket is None for ticket in coming))]
    taken = {offer.name for _, offer in place([ticket for ticket in coming if ticket], free)}
    return [offer for offer in free if offer.name not in taken]


def _size(offer: Offer) -> tuple[bool, bool, int, int, int, str]:
    # A GPU slot is taken by a job without a GPU only when no CPU slot is free; so is one with a network.
    return (
        offer.kind == "gpu",
        offer.egress != "none",
        offer.vram_mb,
        offer.memory_mb,
        offer.cpu_threads,
        offer.name,
    )


def refuse_hopeless(ticket: Ticket, offers: Sequence[Offer]) -> None:
    """Raise when no slot of this node, busy or free, could ever take the job.

    Raises:
        JobError: E_NOGPU when the GPU or its memory is what is missing, E_EGRESS when the network policy is,
            else E_NOSLOT.
    """
    if any(fits(ticket, offer) for offer in offers):
        return
    needs = ticket.requirements
    if needs.gpu or needs.vram_mb > 0:
        most = max((offer.vram_mb for offer in offers if offer.kind == "gpu"), default=None)
        if most is None:
            raise JobError(ErrorCode.E_NOGPU, "cannot place the job: it needs a GPU and no slot here has one")
        if needs.vram_mb > most:
            raise JobError(
                ErrorCode.E_NOGPU,
                f"cannot place the job: it needs {needs.vram_mb} MB of video memory; the most is {most} MB",
            )
    able = [offer for offer in offers if ticket.runner in offer.runners]
    if needs.gpu or needs.vram_mb > 0:
        able = [offer for offer in able if offer.kind == "gpu"]
    if not able:
        raise JobError(
            ErrorCode.E_NOSLOT, f"cannot place the job: no slot here offers the runner {ticket.runner!r}"
        )
    if ticket.egress is not None and all(offer.egress != ticket.egress for offer in able):
        raise JobError(
            ErrorCode.E_EGRESS,
            f"cannot place the job: no slot here grants egress {ticket.egress!r:.80}; set `egress` of a slot",
        )
    able = [offer for offer in able if ticket.egress in {None, offer.egress}]
    threads = max(offer.cpu_threads for offer in able)
    memory = max(offer.memory_mb for offer in able)
    raise JobError(
        ErrorCode.E_NOSLOT,
        f"cannot place the job: it needs {needs.cpu_threads} threads and {needs.memory_mb} MiB together; "
        f"the largest slots here have {threads} threads and {memory} MiB",
    )


def make_offer(spec: SlotSpec, *, threads: int, memory_bytes: int, vram_mb: int) -> Offer:
    """Say what a slot has to give, from its limits and the machine."""
    by_quota = math.ceil(spec.cpu_max / 100) if spec.cpu_max else threads
    cpus = min(len(spec.cpus) if spec.cpus else threads, by_quota)
    memory = min(spec.memory_max or memory_bytes, memory_bytes)
    runners = tuple(spec.runners)
    return Offer(spec.name, spec.kind, max(1, cpus), memory // MIB, vram_mb, runners, spec.egress)
