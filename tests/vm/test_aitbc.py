"""The installed node at an AITBC coordinator: a sample service in the sandbox, and all killed in a job."""

from collections.abc import Iterator

import pytest

from tests.vm.boxed import BoxedMachine
from tests.vm.machine import ETC, MAIN, SLOTS, TOKEN, WAIT_S, run
from tools.lib.local_node import wait_until
from tools.mock.aitbc.coordinator import MockAitbc

pytestmark = pytest.mark.one_release("12", "between node and coordinator nothing is of the release")

SERVICE = """
service: pause
match: {types: [pause]}
fields:
  seconds: {type: int, min: 0, max: 60, required: true}
run: {command: sleep, args: ["{seconds}"]}
"""


@pytest.fixture
def double(boxed: BoxedMachine) -> Iterator[MockAitbc]:
    """Give a double of the coordinator that the machine's node works for, with its real limits."""
    services = ETC / "services.d"
    services.mkdir(exist_ok=True)
    (services / "pause.yaml").write_text(SERVICE)
    with MockAitbc(keys=(TOKEN,), receipts=True) as made:
        there = {"base_url": made.url, "dialect": "aitbc-v1", "auth_scheme": "api_key"}
        boxed.configure(coordinator={**there, "auth_token": f"file:{ETC}/token", "timeout_s": 60})
        boxed.slots(1)
        yield made
    (services / "pause.yaml").unlink()


def completed(double: MockAitbc, job_id: str) -> None:
    double.wait(lambda _: double.job(job_id).state == "COMPLETED", WAIT_S)


def test_a_sample_service_earns(boxed: BoxedMachine, double: MockAitbc) -> None:
    assert "ok: 2 services: " in run("aitbc-miner", "check")
    boxed.start()
    job_id = double.submit({"type": "wordstats", "text": "one two two"})
    completed(double, job_id)
    result = double.job(job_id).result
    assert result is not None
    assert result["counts"]["words"] == 3
    wait_until(lambda: boxed.now().finished.get("OK") == 1, WAIT_S)
    shown = run("aitbc-minerctl", "job", job_id)
    assert f"verified, signed by {double.receipt_key}" in " ".join(shown.split())
    assert "RECEIPTS" in run("aitbc-minerctl", "history")


def test_all_killed_in_the_middle_of_a_job(boxed: BoxedMachine, double: MockAitbc) -> None:
    boxed.start()
    old = boxed.main_pid()
    job_id = double.submit({"type": "pause", "seconds": 20})
    wait_until(lambda: boxed.slot().job_pid, WAIT_S, 0.2)
    run("systemctl", "kill", "--signal=KILL", SLOTS)
    run("systemctl", "kill", "--signal=KILL", MAIN)
    boxed.wait_new_main(old)
    completed(double, job_id)
    assert len(double.job(job_id).results) == 1
    assert double.job(job_id).fails == ()
