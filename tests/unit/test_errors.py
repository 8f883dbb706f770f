"""The public error codes: each explained, in the code and on its page."""

import re
from pathlib import Path

import pytest

from aitbc_miner.errors import CODES, ErrorCode, JobError, MinerError, Retry

PAGE = Path(__file__).parents[2] / "docs/errors.md"
AGAIN = {Retry.HERE: "on this node", Retry.ELSEWHERE: "on another node", Retry.FINAL: "no"}


def test_every_code_has_its_entry_and_is_spelled_as_it_is_called() -> None:
    assert list(CODES) == list(ErrorCode)
    assert all(code.name == code.value == str(code) for code in ErrorCode)
    assert all(re.fullmatch(r"E_[A-Z]+", code) for code in ErrorCode)


@pytest.mark.parametrize("code", ErrorCode)
def test_an_entry_says_what_it_means_and_what_to_do(code: ErrorCode) -> None:
    info = CODES[code]
    assert info.retry in Retry
    for text in (info.meaning, info.advice):
        assert text.strip() == text != ""
        assert not text.endswith(".")
        assert "\n" not in text
        assert "|" not in text


def test_the_page_lists_exactly_these_codes_in_this_order() -> None:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in PAGE.read_text(encoding="utf-8").splitlines()
        if line.startswith("| `E_")
    ]
    assert rows == [
        [f"`{code}`", info.meaning, AGAIN[info.retry], info.advice] for code, info in CODES.items()
    ]


def test_a_job_error_carries_its_code_and_is_one_of_ours() -> None:
    error = JobError(ErrorCode.E_DENY, "cannot run it: no")
    assert (error.code, error.message, str(error)) == (
        ErrorCode.E_DENY,
        "cannot run it: no",
        "cannot run it: no",
    )
    assert isinstance(error, MinerError)


def test_the_codes_of_the_protocol_are_there() -> None:
    promised = (
        "E_MANIFEST E_DENY E_INPUT E_NOGPU E_NOSLOT E_TIMEOUT E_OOM E_VRAM E_PIDS E_DISK E_OUTPUT E_ARTIFACT "
        "E_EXIT E_SIGNAL E_SANDBOX E_SECRET E_EGRESS E_TASK E_CANCELLED E_LOST E_UPLOAD E_INTERNAL"
    )
    assert set(promised.split()) <= set(ErrorCode)
