"""Receipts as the AITBC coordinator makes them: it adds fields after the signature."""

import base64
import binascii
import json
import secrets
import time
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tools.mock.aitbc.records import AitbcJob, AitbcReport, is_number

UNIT_PRICE = 0.02
PRICES = (("metrics", "price"), ("result", "price"), ("result", "aitbc_earned"), ("result", "cost"))
SECONDS = ("duration_seconds", "compute_time", "execution_time")


class Signer:
    """Signs receipts, and attests with a second key; `key_id` is the first public key, as in receipts."""

    def __init__(self) -> None:
        self._key = Ed25519PrivateKey.generate()
        self._attesting = Ed25519PrivateKey.generate()
        self.key_id = _key_id(self._key)

    def receipt(self, job: AitbcJob, report: AitbcReport) -> dict[str, Any]:
        """Make the receipt of a new result."""
        told = {"result": report.body["result"], "metrics": report.body.get("metrics") or {}}
        units = units_of(told["result"], told["metrics"], time.time() - job.requested_at.timestamp())
        prices = (told[where].get(name) for where, name in PRICES)
        receipt: dict[str, Any] = {
            "version": "1.0",
            "receipt_id": secrets.token_hex(16),
            "job_id": job.job_id,
            "provider": report.miner,
            "client": job.client,
            "status": "COMPLETED",
            "units": units,
            "unit_type": "gpu_seconds",
            "unit_price": UNIT_PRICE,
            "price": _first_number(*prices, units * UNIT_PRICE),
            "completed_at": int(time.time()),
            "started_at": int(job.requested_at.timestamp()),
            "metadata": {"job_payload": job.payload, "job_constraints": job.constraints, **told},
        }
        text = json.dumps(_without_null(receipt), sort_keys=True, separators=(",", ":")).encode()
        receipt["signature"] = _signed(self._key, text)
        receipt["attestations"] = [_signed(self._attesting, text)]
        # These come when it is signed already, so that they are no part of what is.
        receipt["zk_status"] = "generation_failed" if job.constraints["zk_proof_required"] else "not_required"
        return {**receipt, **_of_enclave(job, report)}


def units_of(result: dict[str, Any], metrics: dict[str, Any], since_s: float) -> float:
    """Give the seconds to pay; the miner's own figure has priority."""
    given = metrics.get("duration_ms")
    duration_s = None if given is None else max(0.0, float(given) / 1000)
    seconds = (told.get(name) for name in SECONDS for told in (metrics, result))
    return _first_number(metrics.get("units"), result.get("units"), duration_s, *seconds, since_s)


def _of_enclave(job: AitbcJob, report: AitbcReport) -> dict[str, Any]:
    quote, attestation = report.body.get("tee_quote"), report.body.get("tee_attestation_id")
    if quote is not None:
        try:
            base64.b64decode(quote, validate=True)
            status = "verified"
        except (binascii.Error, ValueError):
            status = "attestation_rejected"
    else:
        status = "verified" if job.constraints["tee_attestation_required"] else "not_required"
    more = {"tee_attestation_id": attestation, "tee_quote": quote}
    return {"tee_status": status, **{name: value for name, value in more.items() if value is not None}}


def _first_number(*values: Any) -> float:
    found: float = next(value for value in values if is_number(value))
    return found


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_null(each) for name, each in value.items() if each is not None}
    if isinstance(value, list):
        return [_without_null(each) for each in value if each is not None]
    return value


def _signed(key: Ed25519PrivateKey, text: bytes) -> dict[str, str]:
    return {"alg": "Ed25519", "key_id": _key_id(key), "sig": _text(key.sign(text))}


def _key_id(key: Ed25519PrivateKey) -> str:
    return _text(key.public_key().public_bytes_raw())


def _text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")
