"""Which slot a job goes to, and what is said when none will ever do."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from aitbc_miner.errors import ErrorCode, JobError
from aitbc_miner.jobs import Manifest, Requirements
from aitbc_miner.slots.placement import Offer, Ticket, fits, place, refuse_hopeless, ticket_for

SMALL = Offer("small", "cpu", 1, 1000, runners=("cli",))
LARGE = Offer("large", "cpu", 8, 16_000, runners=("cli", "python"))
GPU = Offer("gpu", "gpu", 4, 8000, 16_000, ("cli", "python"))


def ticket(
    job_id: str = "j", *, runner: str = "cli", priority: int = 0, at: float = 0.0, **needs: int
) -> Ticket:
    gpu = bool(needs.pop("gpu", 0))
    return Ticket(job_id, runner, Requirements(gpu=gpu, **needs), priority, at)


def placed(tickets: Sequence[Ticket], free: Sequence[Offer]) -> dict[str, str]:
    return {job.job_id: offer.name for job, offer in place(tickets, free)}


@pytest.mark.parametrize(
    ("job", "slots"),
    [
        (ticket(), {"small", "large", "gpu"}),
        (ticket(runner="python"), {"large", "gpu"}),
        (ticket(runner="wasm"), set()),
        (ticket(cpu_threads=1, memory_mb=1000), {"small", "large", "gpu"}),
        (ticket(cpu_threads=2), {"large", "gpu"}),
        (ticket(memory_mb=1001), {"large", "gpu"}),
        (ticket(cpu_threads=8), {"large"}),
        (ticket(cpu_threads=9), set()),
        (ticket(gpu=1), {"gpu"}),
        (ticket(vram_mb=16_000), {"gpu"}),
        (ticket(vram_mb=16_001), set()),
        (ticket(gpu=1, memory_mb=8001), set()),
    ],
)
def test_a_slot_fits_when_it_has_all_that_is_needed(job: Ticket, slots: set[str]) -> None:
    assert {offer.name for offer in (SMALL, LARGE, GPU) if fits(job, offer)} == slots


def test_the_tightest_slot_is_taken_and_a_gpu_only_when_nothing_else_is_free() -> None:
    assert placed([ticket()], [GPU, LARGE, SMALL]) == {"j": "small"}
    assert placed([ticket(memory_mb=2000)], [GPU, LARGE, SMALL]) == {"j": "large"}
    assert placed([ticket()], [GPU]) == {"j": "gpu"}
    assert placed([ticket("a", at=1), ticket("b", gpu=1, at=2)], [GPU, LARGE]) == {"a": "large", "b": "gpu"}


def test_among_gpus_the_least_video_memory_that_is_enough() -> None:
    gpus = [Offer(f"g{vram}", "gpu", 1, 100, vram, ("cli",)) for vram in (80_000, 8000, 24_000)]
    assert placed([ticket(gpu=1)], gpus) == {"j": "g8000"}
    assert placed([ticket(vram_mb=9000)], gpus) == {"j": "g24000"}


def test_priority_first_then_age() -> None:
    jobs = [ticket("young", at=9), ticket("old", at=1), ticket("urgent", priority=5, at=10)]
    assert [job.job_id for job, _ in place(jobs, [SMALL, LARGE, GPU])] == ["urgent", "old", "young"]
    assert list(placed(jobs, [SMALL])) == ["urgent"]
    assert list(placed([ticket("b"), ticket("a")], [SMALL])) == ["a"]


def test_a_job_that_must_wait_holds_up_nobody() -> None:
    assert placed([ticket("big", priority=9, cpu_threads=8), ticket("little")], [SMALL]) == {
        "little": "small"
    }


def test_nothing_free_or_nothing_waiting_is_nothing() -> None:
    assert place([ticket()], []) == []
    assert place([], [SMALL]) == []


@pytest.mark.parametrize(
    ("job", "offers", "code", "message"),
    [
        (
            ticket(gpu=1),
            [SMALL, LARGE],
            ErrorCode.E_NOGPU,
            "cannot place the job: no slot of this node has a GPU",
        ),
        (
            ticket(vram_mb=24_000),
            [SMALL, GPU],
            ErrorCode.E_NOGPU,
            "cannot place the job: no slot has 24000 MB of video memory; the largest has 16000 MB",
        ),
        (
            ticket(runner="wasm"),
            [SMALL, LARGE],
            ErrorCode.E_NOSLOT,
            "cannot place the job: no slot offers the runner 'wasm'",
        ),
        (
            ticket(cpu_threads=4, memory_mb=64_000),
            [SMALL, LARGE],
            ErrorCode.E_NOSLOT,
            "cannot place the job: no slot has both 4 threads and 64000 MiB of memory; "
            "the slots with 4 threads have at most 16000 MiB of memory",
        ),
        # The largest memory belongs to a slot with too few threads.
        (
            ticket(cpu_threads=4, memory_mb=8192),
            [
                Offer("wide", "cpu", 8, 4096, runners=("cli",)),
                Offer("deep", "cpu", 2, 16_384, runners=("cli",)),
            ],
            ErrorCode.E_NOSLOT,
            "cannot place the job: no slot has both 4 threads and 8192 MiB of memory; "
            "the slots with 4 threads have at most 4096 MiB of memory",
        ),
        (
            ticket(cpu_threads=16, memory_mb=8192),
            [SMALL, LARGE],
            ErrorCode.E_NOSLOT,
            "cannot place the job: no slot has 16 threads; the slots here have at most 8 threads",
        ),
        # The slot of the larger GPU does not offer the runner.
        (
            ticket(runner="python", vram_mb=16_000),
            [replace(GPU, runners=("cli",)), replace(GPU, vram_mb=8000)],
            ErrorCode.E_NOSLOT,
            "cannot place the job: no slot has 16000 MB of video memory; "
            "the slots here have at most 8000 MB of video memory",
        ),
        (
            ticket(cpu_threads=8, memory_mb=64_000, vram_mb=1),
            [replace(GPU, cpu_threads=8, memory_mb=32_000)],
            ErrorCode.E_NOSLOT,
            "cannot place the job: no slot has 1 MB of video memory, 8 threads and 64000 MiB of memory; "
            "the slots with 1 MB of video memory and 8 threads have at most 32000 MiB of memory",
        ),
        # There is a GPU large enough; it is something else that its slot lacks.
        (
            ticket(gpu=1, memory_mb=9000),
            [LARGE, GPU],
            ErrorCode.E_NOSLOT,
            "cannot place the job: no slot has 9000 MiB of memory; "
            "the slots here have at most 8000 MiB of memory",
        ),
        (
            ticket(gpu=1, runner="wasm"),
            [replace(SMALL, runners=("wasm",)), GPU],
            ErrorCode.E_NOSLOT,
            "cannot place the job: no GPU slot offers the runner 'wasm'",
        ),
        (
            replace(ticket(runner="python", gpu=1), egress="open"),
            [replace(SMALL, egress="open"), GPU],
            ErrorCode.E_EGRESS,
            "cannot place the job: no GPU slot with the runner 'python' grants egress 'open'; "
            "set `egress` of a slot",
        ),
        (
            ticket(),
            [],
            ErrorCode.E_NOSLOT,
            "cannot place the job: no slot offers the runner 'cli'",
        ),
    ],
)
def test_a_hopeless_job_is_refused_with_what_is_missing(
    job: Ticket, offers: list[Offer], code: ErrorCode, message: str
) -> None:
    with pytest.raises(JobError) as caught:
        refuse_hopeless(job, offers)
    assert (caught.value.code, caught.value.message) == (code, message)


NEEDS = st.builds(
    Requirements,
    gpu=st.booleans(),
    vram_mb=st.sampled_from([0, 0, 8, 16]),
    cpu_threads=st.integers(0, 4),
    memory_mb=st.integers(0, 4),
)
TICKETS = st.lists(
    st.builds(
        Ticket,
        st.text("abcdef", min_size=1, max_size=4),
        st.sampled_from(["cli", "python", "other"]),
        NEEDS,
        st.integers(-2, 2),
        st.floats(0, 100),
    ),
    max_size=8,
    unique_by=lambda job: job.job_id,
)
OFFERS = st.lists(
    st.builds(
        Offer,
        st.text("xyz", min_size=1, max_size=4),
        st.sampled_from(["cpu", "gpu"]),
        st.integers(1, 4),
        st.integers(1, 4),
        st.sampled_from([0, 8, 16]),
        st.sets(st.sampled_from(["cli", "python"])).map(tuple),
    ),
    max_size=6,
    unique_by=lambda offer: offer.name,
)


@given(TICKETS, OFFERS)
def test_whatever_waits_each_pair_fits_and_nothing_is_used_twice(
    jobs: list[Ticket], free: list[Offer]
) -> None:
    pairs = place(jobs, free)
    for job, offer in pairs:
        needs = job.requirements
        assert job.runner in offer.runners
        assert (needs.cpu_threads, needs.memory_mb) <= (offer.cpu_threads, 4)
        assert needs.memory_mb <= offer.memory_mb
        if needs.gpu or needs.vram_mb:
            assert (offer.kind, needs.vram_mb <= offer.vram_mb) == ("gpu", True)
    assert len({job.job_id for job, _ in pairs}) == len({offer.name for _, offer in pairs}) == len(pairs)


@given(TICKETS, OFFERS)
def test_nobody_waits_for_a_slot_that_stays_free_or_that_a_later_job_got(
    jobs: list[Ticket], free: list[Offer]
) -> None:
    pairs = place(jobs, free)
    got = {job.job_id: offer for job, offer in pairs}
    for job in jobs:
        if job.job_id in got:
            continue
        later = [offer for other, offer in pairs if rank(other) > rank(job)]
        unused = [offer for offer in free if offer not in got.values()]
        assert not any(fits(job, offer) for offer in (*later, *unused))


def rank(job: Ticket) -> tuple[int, float, str]:
    return -job.priority, job.received, job.job_id


@given(TICKETS, OFFERS)
def test_a_gpu_is_not_wasted(jobs: list[Ticket], free: list[Offer]) -> None:
    pairs = place(jobs, free)
    left = [offer for offer in free if offer not in [used for _, used in pairs]]
    for job, offer in pairs:
        if offer.kind == "gpu" and not (job.requirements.gpu or job.requirements.vram_mb):
            assert not any(other.kind == "cpu" and fits(job, other) for other in left)


@given(TICKETS, OFFERS)
def test_a_job_is_hopeless_exactly_when_no_slot_fits(jobs: list[Ticket], offers: list[Offer]) -> None:
    for job in jobs:
        if any(fits(job, offer) for offer in offers):
            refuse_hopeless(job, offers)
            continue
        with pytest.raises(JobError, match=r"^cannot place the job: ") as caught:
            refuse_hopeless(job, offers)
        assert caught.value.code in {ErrorCode.E_NOGPU, ErrorCode.E_NOSLOT}
        if caught.value.code is ErrorCode.E_NOGPU:
            assert job.requirements.gpu or job.requirements.vram_mb


# --- the network -------------------------------------------------------------------------------------------

OPEN = Offer("open", "cpu", 8, 16_000, runners=("cli",), egress="open")


def test_a_job_that_wants_a_network_goes_where_there_is_one() -> None:
    wants = replace(ticket("wants"), egress="open")
    assert place([wants], [SMALL, LARGE, OPEN]) == [(wants, OPEN)]
    assert place([wants], [SMALL, LARGE]) == []
    does_not = ticket("not")
    large = replace(OPEN, memory_mb=500)
    assert dict(place([does_not, wants], [large, SMALL])) == {does_not: SMALL, wants: large}


@pytest.mark.parametrize(("asked", "egress"), [(None, None), ("none", None), ("open", "open")])
def test_what_a_manifest_asks_for(asked: str | None, egress: str | None) -> None:
    manifest = Manifest("j", "cli", command="true", egress=asked, priority=3)
    assert ticket_for(manifest, 7.0) == Ticket("j", "cli", Requirements(), 3, 7.0, egress)


def test_a_network_that_no_slot_has_is_refused_for_that() -> None:
    wants = replace(ticket("wants"), egress="open")
    with pytest.raises(JobError) as error:
        refuse_hopeless(wants, [SMALL, LARGE])
    assert error.value.code is ErrorCode.E_EGRESS
    refuse_hopeless(wants, [SMALL, OPEN])
    with pytest.raises(JobError) as error:
        refuse_hopeless(replace(wants, requirements=Requirements(memory_mb=20_000)), [LARGE, OPEN])
    assert error.value.code is ErrorCode.E_NOSLOT
