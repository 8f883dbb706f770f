"""Why a node may get no jobs from an AITBC coordinator: its reply "no job" never has a reason. Pure."""

from collections.abc import Iterator

from msgspec import Struct

from aitbc_miner.coordinator.interface import Standing


class Known(Struct, frozen=True):
    """The node's facts that decide about jobs: its offers, and the calls that the coordinator refuses."""

    region: str | None = None
    price: float | None = None
    cuda: bool = False
    models: bool = False
    services: tuple[str, ...] = ()
    resting: tuple[str, ...] = ()


def why_idle(known: Known, standing: Standing) -> list[str]:
    """List the possible reasons, the most likely first, each with its remedy."""
    return [*_certain(known), *_reputation(standing), *_matching(known), _BOND]


_BOND = (
    "jobs with a required bond or a price of 10 or more go only to miners with a bond, and the coordinator"
    " does not tell whether this node has a bond; see your account with the coordinator"
)


def _certain(known: Known) -> Iterator[str]:
    if not known.services:
        yield "this node offers no service and so refuses every job; put a service file into services_dir"
    if "poll" in known.resting:
        yield (
            "the coordinator limits requests per IP address and rejects ours; if N nodes share this address,"
            " set coordinator.share to 1/N"
        )


def _reputation(standing: Standing) -> Iterator[str]:
    rule = (
        "the coordinator gives every job to the miner with the highest reputation that it lists as free, even"
        " if that miner has been offline for long"
    )
    if standing.failed:
        done = standing.failed + standing.succeeded
        yield (
            f"{standing.failed} of the {done} jobs of this node failed, which costs reputation: {rule};"
            " see `aitbc-minerctl history`, and ask the coordinator's operator to remove offline miners"
        )
    elif not standing.succeeded:
        yield f"this node is new and has no reputation yet: {rule}"


def _matching(known: Known) -> Iterator[str]:
    lacking = [
        name
        for name, there in (
            ("region (coordinator.region)", known.region is not None),
            ("maximum price (coordinator.price)", known.price is not None),
            ("CUDA version (no toolkit is installed)", known.cuda),
            ("model (models of a service)", known.models),
        )
        if not there
    ]
    if lacking:
        yield f"this node gets no jobs that require a {', a '.join(lacking)}; provide what the brackets name"
    yield "jobs may require another GPU or more video memory than this node has; see `aitbc-miner probe`"
