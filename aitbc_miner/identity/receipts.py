"""Checks receipts: a coordinator's signed statements of the job that was done and its price. Pure.

The coordinator signs the receipt as JSON with sorted keys, without spaces, null values (at every depth, in
lists too) and members added after signing; non-ASCII characters are escaped. The caller must decode a receipt
with Python's `json`, as the coordinator uses: then numbers are encoded unchanged, 1.0 as 1.0 and 1 as 1.
"""

import base64
import json
from collections.abc import Collection, Mapping
from itertools import islice
from typing import Any, Literal

import msgspec
from msgspec import Struct

from aitbc_miner.util.forgiving import too_deep

RECEIPT = "receipt.json"
MAX_BYTES = 24 << 20
"""A receipt repeats the job and its result."""
MAX_AMOUNT = 1e15
MAX_TEXT, MAX_MEMBERS = 200, 50
"""Bounds for the part that is kept of a receipt too large to keep whole."""

_ADDED_LATER = frozenset(
    {
        *("signature", "attestations", "zk_status", "tee_status", "zk_proof"),
        *("tee_attestation_id", "tee_quote"),
    }
)


class Receipt(Struct, frozen=True):
    """A receipt as received. If it did not verify, `why` has the reason.

    `units` and `price` are None unless the receipt has a number for them, 0 to `MAX_AMOUNT`.
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
    """Check a receipt for a job of this node; never raises.

    `provider` is the node's id at the coordinator. If `trusted_keys` are given, one must have signed.
    """
    kept = _bounded(receipt)
    why = "it is not a JSON object, nested too deeply or too large"
    try:
        if kept is receipt:
            why = _fault(kept, job_id, provider, trusted_keys)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        why = f"checking it failed: {type(error).__name__}"
    units, price = _amount(kept.get("units")), _amount(kept.get("price"))
    return Receipt(kept, not why, why, units, price, received_wall)


def canonical(receipt: Mapping[str, Any]) -> bytes:
    """Give the bytes that the coordinator signs. Raises as `json.dumps` does."""
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
    """Give the receipt itself; if it is too deep or too large, give its first short members."""
    if isinstance(receipt, dict):
        try:
            if not too_deep(receipt) and len(msgspec.json.encode(receipt)) <= MAX_BYTES:
                return receipt
        except (ValueError, TypeError, OverflowError, RecursionError):
            pass  # a number or text in it cannot be encoded
        short = ((name, value) for name, value in receipt.items() if _is_short(name) and _is_short(value))
        return {str(name): value for name, value in islice(short, MAX_MEMBERS)}
    return {"receipt": receipt if _is_short(receipt) else type(receipt).__name__}


def _is_short(value: object) -> bool:
    if isinstance(value, str):
        # Unprintable text may have a lone surrogate, and UTF-8 cannot encode surrogates.
        return len(value) <= MAX_TEXT and value.isprintable()
    return value is None or (isinstance(value, int | float) and abs(value) <= MAX_AMOUNT)


def _fault(receipt: Mapping[str, Any], job_id: str, provider: str, trusted_keys: Collection[str]) -> str:
    # Imported here, because only the agent checks receipts; the other processes save the memory.
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey  # noqa: PLC0415

    signature = receipt.get("signature")
    if not isinstance(signature, dict) or signature.get("alg") != "Ed25519":
        return "it has no Ed25519 signature"
    key = signature.get("key_id")
    try:
        public, signed = Ed25519PublicKey.from_public_bytes(_raw(key)), _raw(signature.get("sig"))
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return "its signature or key cannot be decoded"
    try:
        public.verify(signed, canonical(receipt))
    except InvalidSignature:
        return "its signature does not match its content"
    if trusted_keys and key not in trusted_keys:
        return "its key is not in coordinator.receipt_keys"
    if receipt.get("job_id") != job_id:
        return "it is for another job"
    if receipt.get("provider") != provider:
        return "it is for another miner"
    return ""


def _raw(text: object) -> bytes:
    """Decode base64url without padding. Raises ValueError unless encoding the bytes gives the same text."""
    if not isinstance(text, str):
        raise TypeError("not text")
    raw = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    if base64.urlsafe_b64encode(raw).decode().rstrip("=") != text:
        raise ValueError("not the usual base64url encoding")
    return raw


def _amount(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    # NaN fails both comparisons.
    return float(value) if 0 <= value <= MAX_AMOUNT else None
