"""The table of targets."""

from fuzz import kept, said, shown, wire, written
from fuzz.engine import Target

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (*said.TARGETS, *written.TARGETS, *kept.TARGETS, *shown.TARGETS, *wire.TARGETS)
}
