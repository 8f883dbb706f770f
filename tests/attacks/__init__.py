"""Small hostile programs, each with the property that it tries to break."""

from tests.attacks.attack import Attack
from tests.attacks.escaping import ESCAPING
from tests.attacks.forging import FORGING
from tests.attacks.reading import READING
from tests.attacks.sharing import SHARING
from tests.attacks.starving import STARVING

__all__ = ["ATTACKS", "Attack"]

ATTACKS = (*READING, *ESCAPING, *STARVING, *FORGING, *SHARING)
