"""The table of targets."""

from tests.fuzz import foreign, kept, said, shown, wire, written
from tests.fuzz.engine import Target

TARGETS: dict[str, Target] = {
    target.name: target for module in (said, foreign, written, kept, shown, wire) for target in module.TARGETS
}
