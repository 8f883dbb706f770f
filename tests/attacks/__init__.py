"""Small hostile programs, each with the property that it tries to break."""

from attacks.attack import Attack
from attacks.escaping import ESCAPING
from attacks.forging import FORGING
from attacks.reading import READING
from attacks.sharing import SHARING
from attacks.starving import STARVING

__all__ = ["ATTACKS", "Attack"]

ATTACKS = (*READING, *ESCAPING, *STARVING, *FORGING, *SHARING)
