"""A coordinator's signed word that a job was done and what it is worth: checked, and kept as it came. Pure.

What is signed is the receipt as JSON: what is null is left out at every depth, of lists too, keys are sorted,
there is no space, and what is not ASCII is escaped; without the members that are added after signing. Numbers
have to be decoded by Python's own `json`, which is what the coordinator writes them with: then they are
written again as they came, 1.0 as 1.0 and 1 as 1.
"""

import base64
import json
from collections.abc import Collection, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from msgspec import Struct

from aitbc_miner.util.nesting import too_deep

if TYPE_CHECKING:  # the agent alone checks receipts; others read what came of it
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

RECEIPT = "receipt.json"
MAX_BYTES = 24 << 20
"""A receipt repeats the job and its result."""
MAX_AMOUNT = 1e15
MAX_TEXT, MAX_MEMBERS = 200, 50
"""What is kept of a receipt that cannot be kept whole."""

_ADDED_LATER = frozenset(
    {
        *("signature", "attestations", "zk_status", "tee_status", "zk_proof"),
        *("tee_attestation_id", "tee_quote"),
    }
)


class Receipt(Struct, frozen=True):
    """A receipt as it came, and what is wrong with it (`why`) if it did not verify.

    `units` and `price` are None where it names none that can be counted.
    """

    receipt: dict[str, Any]
    verified: bool
    why: str = ""
    units: float | None = None
    price: float | None = None
    received_wall: str = ""
    version: Literal[1] = 1


def examine(
    receipt: object, job_id: str, provider: str, trusted_keys: Collection[str] = (), received_wall: str = ""
) -> Receipt:
    """Check a receipt for a job of ours; never raises, whatever it is.

    `provider` is who we are there. With `trusted_keys`, one of them must have signed it.
    """
    kept = _bounded(receipt)
    why = "it is no receipt, or too large"
    try:
        if kept is receipt:
            why = _fault(kept, job_id, provider, trusted_keys)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        why = f"it cannot be checked: {type(error).__name__}"
    units, price = _amount(kept.get("units")), _amount(kept.get("price"))
    return Receipt(kept, not why, why, units, price, received_wall)


def canonical(receipt: Mapping[str, Any]) -> bytes:
    """Give the bytes that are signed. Raises as `json.dumps` where JSON cannot say it."""
    signed = {
        name: value
        for name, value in receipt.items()
        if name not in _ADDED_LATER and not name.startswith("reinvest_")
    }
    return json.dumps(_without_none(signed), sort_keys=True, separators=(",", ":")).encode()


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_none(one) for name, one in value.items() if one is not None}
    if isinstance(value, list):
        return [_without_none(one) for one in value if one is not None]
    return value


def _bounded(receipt: object) -> dict[str, Any]:
    """Give a receipt that can be kept: itself, or of one that is too deep or large what is short in it."""
    if isinstance(receipt, dict):
        try:
            if not too_deep(receipt) and len(msgspec.json.encode(receipt)) <= MAX_BYTES:
                return receipt
        except (ValueError, TypeError, OverflowError, RecursionError):
            pass  # it has a number or a text that cannot be written down
        short = ((name, value) for name, value in receipt.items() if _is_short(name) and _is_short(value))
        return {str(name): value for name, value in islice(short, MAX_MEMBERS)}
    return {"receipt": receipt if _is_short(receipt) else type(receipt).__name__}


def _is_short(value: object) -> bool:
    if isinstance(value, str):
        # What cannot be printed may be half a character, which no file can hold.
        return len(value) <= MAX_TEXT and value.isprintable()
    return value is None or (isinstance(value, int | float) and abs(value) <= MAX_AMOUNT)


def _fault(receipt: Mapping[str, Any], job_id: str, provider: str, trusted_keys: Collection[str]) -> str:
    from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey  # noqa: PLC0415

    signature = receipt.get("signature")
    if not isinstance(signature, dict) or signature.get("alg") != "Ed25519":
        return "it bears no Ed25519 signature"
    key = signature.get("key_id")
    try:
        public, signed = Ed25519PublicKey.from_public_bytes(_raw(key)), _raw(signature.get("sig"))
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return "its signature or the key in it cannot be read"
    if not _verifies(public, signed, canonical(receipt)):
        return "its signature is not of what it says"
    if trusted_keys and key not in trusted_keys:
        return "its key is none of coordinator.receipt_keys"
    if receipt.get("job_id") != job_id:
        return "it is for another job"
    if receipt.get("provider") != provider:
        return "it is for another miner"
    return ""


def _verifies(public: "Ed25519PublicKey", signature: bytes, message: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature  # noqa: PLC0415

    try:
        public.verify(signature, message)
    except InvalidSignature:
        return False
    return True


def _raw(text: object) -> bytes:
    """Decode base64url without padding. Raises ValueError for another spelling of the same bytes, too."""
    if not isinstance(text, str):
        raise TypeError("no text")
    raw = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    if base64.urlsafe_b64encode(raw).decode().rstrip("=") != text:
        raise ValueError("not as it is written there")
    return raw


def _amount(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    # NaN is neither.
    return float(value) if 0 <= value <= MAX_AMOUNT else None
