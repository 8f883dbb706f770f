"""Who is given which job by the double of the AITBC coordinator, and what it signs for it."""

import base64
import json
from collections.abc import Iterator
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from tools.mock.aitbc.client import Miner
from tools.mock.aitbc.coordinator import MockAitbc

GPUS = [{"name": "NVIDIA GeForce RTX 4090", "memory_mb": 24564}, {"name": "Tesla T4", "memory_mb": 15360}]
# Of a receipt, added when it is signed already.
ADDED = ("signature", "attestations", "zk_status", "tee_status", "tee_attestation_id", "tee_quote")


@pytest.fixture
def signing() -> Iterator[MockAitbc]:
    with MockAitbc(rate_limits=False, receipts=True) as double:
        yield double


# Each row: what a job asks for, what a miner has, and whether they fit.
MATCHES: list[tuple[dict[str, Any], dict[str, Any], bool]] = [
    ({}, {}, True),
    ({"gpu": "Tesla T4"}, {"gpus": GPUS}, True),
    ({"gpu": "nvidia"}, {"gpus": GPUS}, False),
    ({"gpu": "tesla t4"}, {"gpus": GPUS}, False),
    ({"gpu": "Tesla T4"}, {}, False),
    ({"gpu": "Tesla T4"}, {"gpus": ["Tesla T4"]}, False),
    ({"min_vram_gb": 23}, {"gpus": GPUS}, True),
    ({"min_vram_gb": 24}, {"gpus": GPUS}, False),
    ({"min_vram_gb": 1}, {"gpus": [{"name": "x", "memory_mb": "24564"}]}, False),
    ({"gpu": "Tesla T4", "min_vram_gb": 20}, {"gpus": GPUS}, True),
    ({"cuda": "12.4"}, {"cuda": "11.8 12.4"}, True),
    ({"cuda": "11.8"}, {"cuda": "12.4"}, False),
    ({"cuda": "2.4"}, {"cuda": "12.4"}, True),
    ({"cuda": "12.4"}, {}, False),
    ({"cuda": "12.4"}, {"cuda": 12.4}, False),
    ({"models": ["llama3:8b"]}, {"models": ["llama3:8b", "x"]}, True),
    ({"models": ["llama3"]}, {"models": ["llama3:8b"]}, False),
    ({"models": ["x", "y"]}, {"models": ["x"]}, False),
    ({"models": []}, {}, True),
    ({"region": "eu"}, {"region": "eu"}, True),
    ({"region": "eu"}, {"region": "us"}, False),
    ({"region": "eu"}, {"region": None}, False),
    ({"region": None}, {"region": "eu"}, True),
    ({"max_price": 0.5}, {"price": 0.5}, True),
    ({"max_price": 0.5}, {"price": 0.6}, False),
    ({"max_price": 0.5}, {}, False),
    ({"max_price": 0.5}, {"price": "0.1"}, False),
    ({"min_reputation": 0.5}, {}, True),
    ({"min_reputation": 0.6}, {}, False),
    ({"min_reputation": 0.9}, {"reputation_score": 0.95}, True),
    ({"bond_required": True}, {}, False),
    ({"zk_proof_required": True, "tee_attestation_required": True, "confidential": True}, {}, True),
]


@pytest.mark.parametrize(("asked", "has", "fits"), MATCHES)
def test_all_that_is_asked_for_must_be_there(
    double: MockAitbc, asked: dict[str, Any], has: dict[str, Any], fits: bool
) -> None:
    job_id = double.submit({}, constraints=asked)
    with Miner(double) as miner:
        miner.register(**has)
        job = miner.poll()
    assert (job is not None) is fits
    assert double.job(job_id).state == ("RUNNING" if fits else "QUEUED")


@pytest.mark.parametrize(("payment", "fits"), [(None, True), (9.99, True), (10, False), (50.5, False)])
def test_much_money_needs_a_bond_that_nobody_has(double: MockAitbc, payment: float, fits: bool) -> None:
    double.submit({}, payment_amount=payment)
    with Miner(double) as miner:
        assert (miner.poll() is not None) is fits


def test_what_does_not_fit_holds_up_nothing_behind_it(double: MockAitbc) -> None:
    double.submit({}, constraints={"gpu": "Tesla T4"})
    second = double.submit({})
    with Miner(double) as miner:
        assert miner.take() == second


# Reputation.


def test_reputation_as_it_was_measured_about(double: MockAitbc) -> None:
    with Miner(double) as miner:
        seen = []
        assert double.miners()["m-1"].reputation == 0.5
        for _ in range(5):
            double.submit({})
            miner.result(miner.take())
            seen.append(double.miners()["m-1"].reputation)
        assert seen == pytest.approx([0.602, 0.638, 0.653, 0.663, 0.670], abs=0.005)
        double.submit({})
        miner.fail(miner.take())
        assert double.miners()["m-1"].reputation < seen[-1] - 0.05
        miner.beat(metadata={"reputation_score": 0.9})
        assert double.miners()["m-1"].reputation == 0.9
    with Miner(double, "m-2") as other:
        double.submit({})
        double.forget_miners()
        other.register()
        other.fail(other.take())
    assert double.miners()["m-2"].reputation == pytest.approx(0.311, abs=0.001)


def starve(double: MockAitbc, miner: Miner) -> None:
    """Have a miner fail a job, so that any new one is better."""
    double.submit({})
    miner.fail(miner.take())
    miner.beat()


def test_a_better_row_withholds_jobs_alive_or_not_until_it_leaves(double: MockAitbc) -> None:
    with Miner(double) as miner, Miner(double, "ghost", concurrency=None) as ghost:
        starve(double, miner)
        job_id = double.submit({})
        ghost.register()
        assert miner.poll() is None
        ghost.call("DELETE", "/miners/ghost")
        assert miner.take() == job_id


def test_only_a_row_that_could_take_the_job_withholds_it(double: MockAitbc) -> None:
    with Miner(double) as miner, Miner(double, "ghost") as ghost:
        double.submit({})
        miner.fail(miner.take())
        cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
            ({"inflight": 0, "status": "DRAINING"}, {}),
            ({"inflight": 1}, {}),
            ({"inflight": 0}, {"cuda": "12.4"}),
            ({"inflight": 0, "metadata": {"reputation_score": 0.1}}, {}),
            ({"inflight": 0, "metadata": {"reputation_score": double.miners()["m-1"].reputation}}, {}),
        ]
        miner.register(cuda="12.4")
        for beat, asked in cases:
            ghost.beat(**beat)
            miner.beat()
            job_id = double.submit({}, constraints=asked)
            assert miner.take() == job_id, (beat, asked)
        ghost.beat()
        miner.beat()
        double.submit({})
        assert miner.poll() is None
        miner.beat(metadata={"reputation_score": 1})
        assert miner.poll() is not None, "what a miner says of itself is believed"


# Receipts.


def without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_null(each) for name, each in value.items() if each is not None}
    if isinstance(value, list):
        return [without_null(each) for each in value if each is not None]
    return value


def decoded(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def verify(signature: dict[str, str], signed: dict[str, Any]) -> None:
    """Check a signature as the contract has it; InvalidSignature if it is not so."""
    assert signature["alg"] == "Ed25519"
    text = json.dumps(without_null(signed), sort_keys=True, separators=(",", ":"))
    key = Ed25519PublicKey.from_public_bytes(decoded(signature["key_id"]))
    key.verify(decoded(signature["sig"]), text.encode())


def receipt_of(double: MockAitbc, result: dict[str, Any], job: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Have a job done, and return the receipt in the reply."""
    job_id = double.submit({"text": "grüße"}, constraints=job)
    with Miner(double) as miner:
        miner.take()
        reply = miner.post(f"/miners/{job_id}/result", {"result": result, **more})
    receipt: dict[str, Any] = reply.json()["receipt"]
    assert double.job(job_id).receipt == receipt
    assert receipt["job_id"] == job_id
    return receipt


def test_a_receipt_is_signed_before_it_is_added_to(signing: MockAitbc) -> None:
    result = {"said": "ÄÖ€", "none": None, "deep": [None, {"none": None, "a": 1.5}]}
    receipt = receipt_of(signing, result, {"zk_proof_required": True}, metrics={"duration_ms": 1500})
    assert (receipt["units"], receipt["price"], receipt["unit_price"]) == (1.5, 0.03, 0.02)
    told = {name: receipt[name] for name in ("version", "provider", "client", "status", "unit_type")}
    assert told == {
        "version": "1.0",
        "provider": "m-1",
        "client": "demo-client",
        "status": "COMPLETED",
        "unit_type": "gpu_seconds",
    }
    assert receipt["metadata"]["result"] == result
    assert receipt["metadata"]["job_constraints"]["gpu"] is None
    assert receipt["signature"]["key_id"] == signing.receipt_key
    assert (receipt["zk_status"], receipt["tee_status"]) == ("generation_failed", "not_required")
    signed = {name: value for name, value in receipt.items() if name not in ADDED}
    verify(receipt["signature"], signed)
    verify(receipt["attestations"][0], signed)
    with pytest.raises(InvalidSignature):
        verify(receipt["signature"], {**signed, "units": 2})
    all_but = {name: value for name, value in receipt.items() if name != "signature"}
    with pytest.raises(InvalidSignature):
        verify(receipt["signature"], all_but)


@pytest.mark.parametrize(
    ("metrics", "result", "units", "price"),
    [
        ({"units": 3, "price": 7, "duration_ms": 1}, {"units": 4, "price": 8}, 3, 7),
        ({"duration_ms": 1000}, {"units": 4, "aitbc_earned": 9, "cost": 1}, 4, 9),
        ({"duration_ms": 2000}, {"execution_time": 5, "cost": 1}, 2, 1),
        ({"duration_ms": -5}, {}, 0, 0),
        ({"compute_time": 6}, {"execution_time": 5}, 6, 0.12),
        ({}, {"execution_time": 5}, 5, 0.1),
    ],
)
def test_units_and_price_are_the_miners_word(
    signing: MockAitbc, metrics: dict[str, Any], result: dict[str, Any], units: float, price: float
) -> None:
    receipt = receipt_of(signing, result, {}, metrics=metrics)
    assert (receipt["units"], receipt["price"]) == (pytest.approx(units), pytest.approx(price))


def test_without_any_the_time_since_the_request_is_paid(signing: MockAitbc) -> None:
    assert 0 < receipt_of(signing, {}, {})["units"] < 60


@pytest.mark.parametrize(
    ("asked", "sent", "status"),
    [
        ({"tee_attestation_required": True}, {}, "verified"),
        ({}, {"tee_quote": "YWJj", "tee_attestation_id": "t-1"}, "verified"),
        ({}, {"tee_quote": "no quote!"}, "attestation_rejected"),
    ],
)
def test_enclaves(signing: MockAitbc, asked: dict[str, Any], sent: dict[str, Any], status: str) -> None:
    receipt = receipt_of(signing, {}, asked, **sent)
    assert receipt["tee_status"] == status
    assert {name: value for name, value in receipt.items() if name in sent} == sent
    verify(receipt["signature"], {name: value for name, value in receipt.items() if name not in ADDED})


def test_each_result_has_a_receipt_of_its_own(signing: MockAitbc) -> None:
    job_id = signing.submit({})
    with Miner(signing) as miner:
        miner.take()
        receipts = [miner.result(job_id).json()["receipt"]["receipt_id"] for _ in range(2)]
    assert len(set(receipts)) == 2
    kept = signing.job(job_id).receipt
    assert kept is not None
    assert kept["receipt_id"] == receipts[-1]


def test_no_key_and_no_receipt(double: MockAitbc) -> None:
    job_id = double.submit({})
    with Miner(double) as miner:
        assert miner.result(job_id).json()["receipt"] is None
    assert double.receipt_key is None
