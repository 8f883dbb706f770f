"""Why a node may get no jobs from an AITBC coordinator, which answers "none" to all reasons alike. Pure."""

from collections.abc import Iterator

from msgspec import Struct

from aitbc_miner.coordinator.interface import Standing


class Known(Struct, frozen=True):
    """What of this node bears on it: what it offers, and which of its calls are refused as too many."""

    region: str | None = None
    price: float | None = None
    cuda: bool = False
    models: bool = False
    services: tuple[str, ...] = ()
    resting: tuple[str, ...] = ()


def why_idle(known: Known, standing: Standing) -> list[str]:
    """Name the reasons there may be, the likeliest first, each with its remedy."""
    return [*_certain(known), *_reputation(standing), *_matching(known), _BOND]


_BOND = (
    "jobs that ask for a bond, or pay 10 or more, go only to miners with one, and whether this node has one"
    " is not told; see your account with the coordinator"
)


def _certain(known: Known) -> Iterator[str]:
    if not known.services:
        yield "no service is offered, so that each job would be refused; put one into services_dir"
    if "poll" in known.resting:
        yield "the coordinator refuses to be asked so often from this address; set coordinator.share"


def _reputation(standing: Standing) -> Iterator[str]:
    rule = "a miner of a higher reputation that counts as free gets each job, even one that is long gone"
    if standing.failed:
        done = standing.failed + standing.succeeded
        yield (
            f"{standing.failed} of the {done} jobs of this node failed, which costs reputation: {rule};"
            " see `aitbc-minerctl history`, and ask the coordinator's operator for miners that are gone"
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
        yield f"jobs that ask for a {', a '.join(lacking)} are not for this node, which names none"
    yield "jobs may ask for another GPU or for more video memory than this node has, see `aitbc-miner probe`"
