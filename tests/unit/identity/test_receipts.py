"""Receipts: what verifies, what is flagged, and that nothing a coordinator sends can hurt."""

import base64
import json
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from aitbc_miner.identity.receipts import Receipt, canonical, examine

JOB, MINER = "a" * 32, "node-1"
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = KEY.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def spelled(value: Any) -> str:
    """Write JSON as the coordinator does, in other words than the product's."""
    if isinstance(value, dict):
        members = (
            f"{json.dumps(name)}:{spelled(value[name])}" for name in sorted(value) if value[name] is not None
        )
        return "{" + ",".join(members) + "}"
    if isinstance(value, list):
        return "[" + ",".join(spelled(one) for one in value if one is not None) + "]"
    return json.dumps(value)


def signed(**more: Any) -> dict[str, Any]:
    """Make a receipt as the coordinator does: signed first, and then added to."""
    receipt: dict[str, Any] = {
        "version": "1.0",
        "receipt_id": "b" * 32,
        "job_id": JOB,
        "provider": MINER,
        "client": "müller",
        "status": "COMPLETED",
        "units": 1.5,
        "unit_type": "gpu_seconds",
        "unit_price": 0.02,
        "price": 0.03,
        "started_at": 1_700_000_000,
        "completed_at": 1e22,
        "metadata": {
            "job_payload": {"type": "words", "none": None, "list": [1.0, None, 1, {"x": None}]},
            "job_constraints": {"gpu": None},
            "result": {"text": "Grüße \U0001f600", "big": 2**60},
            "metrics": {"duration_ms": 1500},
        },
        **more,
    }
    sig = KEY.sign(spelled(receipt).encode())
    receipt["signature"] = {"alg": "Ed25519", "key_id": b64(PUBLIC), "sig": b64(sig)}
    receipt["attestations"] = []
    receipt |= {"zk_status": "generation_failed", "tee_status": "verified", "tee_quote": "eA=="}
    receipt |= {"reinvest_pct": "10", "reinvest_amount": None}
    wired: dict[str, Any] = json.loads(json.dumps(receipt))
    return wired


def test_what_the_coordinator_signs_verifies() -> None:
    found = examine(signed(), JOB, MINER, (), "now")
    assert (found.verified, found.why, found.units, found.price) == (True, "", 1.5, 0.03)
    assert found.received_wall == "now"
    assert found.receipt == signed()


def test_what_is_signed_byte_by_byte() -> None:
    receipt = {"b": [None, 1, {"n": None}], "a": {"é": 1.0, "Z": 1e22}, "zk_status": "x", "reinvest_pct": 1}
    assert canonical(receipt) == rb'{"a":{"Z":1e+22,"\u00e9":1.0},"b":[1,{}]}'


@pytest.mark.parametrize("name", [name for name in signed() if name not in {"attestations"}])
def test_each_member_that_is_signed_is_held(name: str) -> None:
    receipt = signed()
    receipt[name] = "another" if receipt[name] != "another" else 1
    later = {"zk_status", "tee_status", "tee_quote", "reinvest_pct", "reinvest_amount"}
    assert examine(receipt, JOB, MINER).verified == (name in later)
    del receipt[name]
    assert examine(receipt, JOB, MINER).verified == (name in later)


def test_a_number_that_only_looks_the_same_is_another() -> None:
    receipt = signed(units=1.0)
    assert examine(receipt, JOB, MINER).verified
    receipt["units"] = 1
    assert not examine(receipt, JOB, MINER).verified


@pytest.mark.parametrize(
    ("job_id", "provider", "keys", "why"),
    [
        ("c" * 32, MINER, (), "it is for another job"),
        (JOB, "node-2", (), "it is for another miner"),
        (JOB, MINER, ("A" * 43,), "its key is not in coordinator.receipt_keys"),
    ],
)
def test_whose_it_is(job_id: str, provider: str, keys: tuple[str, ...], why: str) -> None:
    found = examine(signed(), job_id, provider, keys)
    assert (found.verified, found.why) == (False, why)
    assert found.units == 1.5, "it is kept, and its numbers are shown"


def test_a_trusted_key() -> None:
    assert examine(signed(), JOB, MINER, (b64(PUBLIC),)).verified


@pytest.mark.parametrize(
    "signature",
    [
        None,
        "text",
        {},
        {"alg": "HS256", "key_id": b64(PUBLIC), "sig": "eA"},
        {"alg": "Ed25519", "key_id": "!", "sig": "eA"},
        {"alg": "Ed25519", "key_id": b64(PUBLIC)[:-1], "sig": "eA"},
        {"alg": "Ed25519", "key_id": b64(PUBLIC), "sig": "é"},
        {"alg": "Ed25519", "key_id": b64(PUBLIC), "sig": ""},
        {"alg": "Ed25519", "key_id": 7, "sig": [1]},
        {"alg": "Ed25519", "key_id": b64(PUBLIC), "sig": 10**5000},
    ],
)
def test_a_signature_that_is_none(signature: Any) -> None:
    found = examine({**signed(), "signature": signature}, JOB, MINER)
    assert not found.verified
    assert found.why


def test_another_way_to_sign_is_none() -> None:
    receipt = signed()
    receipt["signature"]["alg"] = "ed448"
    assert examine(receipt, JOB, MINER).why == "it has no Ed25519 signature"


@pytest.mark.parametrize("name", ["key_id", "sig"])
def test_a_signature_has_one_spelling(name: str) -> None:
    text = signed()["signature"][name]
    # Of its last letter not all bits count.
    loose = text[:-1] + chr(ord(text[-1]) + 1)
    for other in (f"{text}==", f"{text}\n", f" {text}", loose):
        assert base64.urlsafe_b64decode(other + "==") == base64.urlsafe_b64decode(text + "==")
        receipt = signed()
        receipt["signature"][name] = other
        assert examine(receipt, JOB, MINER).why == "its signature or key cannot be decoded"


@pytest.mark.parametrize("amount", [-1, "7", None, True, float("nan"), float("inf"), 1e300, 10**400, [1]])
def test_amounts_that_are_none_are_not_counted(amount: Any) -> None:
    found = examine({**signed(), "units": amount, "price": amount}, JOB, MINER)
    assert (found.units, found.price, found.verified) == (None, None, False)


def deep() -> Any:
    value: Any = []
    for _ in range(5000):
        value = [value]
    return value


@pytest.mark.parametrize("odd", [deep(), "\ud800", "x" * (25 << 20)], ids=["deep", "half", "long"])
def test_what_cannot_be_kept_whole_is_kept_in_part(odd: Any) -> None:
    found = examine({**signed(), "odd": odd}, JOB, MINER)
    assert not found.verified
    assert found.receipt["receipt_id"] == "b" * 32
    assert "odd" not in found.receipt
    assert len(msgspec.json.encode(found)) < 10_000


def test_what_is_nested_deeper_than_others_may_read_is_cut_off() -> None:
    deep: Any = []
    for _ in range(150):
        deep = [deep]
    found = examine(signed(metadata=deep), JOB, MINER)
    assert (found.verified, found.receipt["units"]) == (False, 1.5)
    assert "metadata" not in found.receipt


@pytest.mark.parametrize("odd", [{1: 2}, {"set": {1}}, {"inner": {1: 2, "a": 1}}])
def test_what_no_json_can_be_is_flagged(odd: Any) -> None:
    assert not examine({**signed(), **odd}, JOB, MINER).verified


@pytest.mark.parametrize("odd", [None, 7, "text", [], [1], True, deep()])
def test_what_is_no_receipt_is_flagged(odd: Any) -> None:
    found = examine(odd, JOB, MINER)
    assert (found.verified, found.why) == (False, "it is not a JSON object, nested too deeply or too large")


TEXT = st.text(st.characters(exclude_categories=()), max_size=8)  # halves of characters are among them
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
)


@given(receipt=ANY, name=st.sampled_from(sorted(signed())), value=ANY)
def test_nothing_raises_and_all_can_be_written(receipt: Any, name: str, value: Any) -> None:
    for each in (receipt, {**signed(), name: value}):
        found = examine(each, JOB, MINER)
        assert isinstance(found, Receipt)
        msgspec.json.encode(found)
