"""Receipts as the AITBC coordinator makes them: signed first, and then added to."""

import base64
import json
import time
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tools.mock_aitbc_records import AitbcJob

UNIT_PRICE = 0.02


class Signer:
    """Has a key of its own; `key_id` is the public half as receipts name it."""

    def __init__(self) -> None:
        self._key = Ed25519PrivateKey.generate()
        self.key_id = _text(self._key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw))

    def receipt(self, job: AitbcJob, miner: str, number: int, said: dict[str, Any]) -> dict[str, Any]:
        """Make the receipt of a result; what the miner says of units and price is believed."""
        result, metrics = said["result"], said.get("metrics") or {}
        units = _first(metrics.get("units"), result.get("units"))
        if units is None:
            units = max(0.0, float(metrics.get("duration_ms") or 0) / 1000)
        price = _first(
            *(one.get("price") for one in (metrics, result)), result.get("aitbc_earned"), result.get("cost")
        )
        receipt: dict[str, Any] = {
            "version": "1.0",
            "receipt_id": f"{number:032x}",
            "job_id": job.job_id,
            "provider": miner,
            "client": "client-1",
            "status": "COMPLETED",
            "units": units,
            "unit_type": "gpu_seconds",
            "unit_price": UNIT_PRICE,
            "price": units * UNIT_PRICE if price is None else price,
            "completed_at": int(time.time()),
            "started_at": int(job.requested_at.timestamp()),
            "metadata": {
                "job_payload": job.payload,
                "job_constraints": job.constraints,
                "result": result,
                "metrics": metrics,
            },
        }
        text = json.dumps(_without_null(receipt), sort_keys=True, separators=(",", ":"))
        signature = {"alg": "Ed25519", "key_id": self.key_id, "sig": _text(self._key.sign(text.encode()))}
        wants_proof = job.constraints.get("zk_proof_required")
        return {
            **receipt,
            "signature": signature,
            "attestations": [],
            "zk_status": "generation_failed" if wants_proof else "not_required",
            "tee_status": "not_required",
        }


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_null(one) for name, one in value.items() if one is not None}
    if isinstance(value, list):
        return [_without_null(one) for one in value if one is not None]
    return value


def _text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")
