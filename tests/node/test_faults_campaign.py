"""The fault harness against the node, in a small count: nothing is lost, whatever is killed."""

import os
import re

import pytest

from tools.fault_harness.inject import FEW
from tools.fault_harness.main import main


def test_nothing_is_lost_in_a_small_campaign(capfd: pytest.CaptureFixture[str]) -> None:
    status = main(["--seed", "small", "--kills", "25", "--nodes", "1", "--drop-replies", "0.05", "-v"])
    said = capfd.readouterr().out
    assert status == 0, said
    assert "0 lost, 0 doubled, 0 run twice, 0 wrong, 0 orphans, 0 broken, 0 defects" in said
    assert int(re.findall(r"^(\d+) kills in", said, re.MULTILINE)[0]) >= 25
    # Most of them at a boundary: the harness does not merely wait for some that never come up.
    table = re.findall(r"^\w+ +(\d+) +(\d+) +\d+  ", said, re.MULTILINE)
    assert sum(int(number) for row in table for number in row) >= 12, said


def test_a_disk_that_fails_loses_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    status = main(["--seed", "disk", "--kills", "8", "--nodes", "1", "--disk", "0.02", "-v"])
    said = capfd.readouterr().out
    assert status == 0, said
    assert "disk errors: " in said


def test_reports_outlast_a_coordinator_that_is_away(capfd: pytest.CaptureFixture[str]) -> None:
    status = main(["outage", "--jobs", "6", "--minutes", "0.05"])
    said = capfd.readouterr().out
    assert status == 0, said
    assert "all of the 6 reports that waited" in said


def test_lost_answers_double_no_result(capfd: pytest.CaptureFixture[str]) -> None:
    status = main(["drop", "--times", "12"])
    said = capfd.readouterr().out
    assert status == 0, said
    assert "12 answers lost: 10 results accepted, 12 known already, 0 refused" in said


def test_odd_answers_lose_and_double_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """AITBC_TEST_FULL=1 has each with each, instead of each pair of what they are made of."""
    full = os.environ.get("AITBC_TEST_FULL") == "1"
    status = main(["answers", *(["--full"] if full else [])])
    said = capfd.readouterr().out
    assert status == 0, said
    assert "0 lost, 0 doubled, 0 killed, 0 E_UPLOAD" in said
    assert all(int(number) > 140 for number in re.findall(r": (\d+) odd answers", said)), said


@pytest.mark.needs("strace")
def test_a_system_call_that_fails_or_is_the_last_costs_no_job(capfd: pytest.CaptureFixture[str]) -> None:
    status = main(["inject", "--most", "3", "-v"])
    said = capfd.readouterr().out
    assert status == 0, said
    assert "0 lost, 0 doubled, 0 run twice, 0 wrong, 0 orphans, 0 broken, 0 defects" in said
    hits = re.findall(r"(\S+ \w+ [A-Z]+): (\d+) hits$", said, re.MULTILINE)
    assert len(hits) == len(FEW)
    assert all(int(number) for _, number in hits), said
