"""What a client is told of a failure: once, and nothing of this machine."""

import traceback

import pytest

from aitbc_miner.coordinator import aitbc_wire
from aitbc_miner.coordinator.job_failure import log_of, message_of
from aitbc_miner.errors import ErrorCode
from aitbc_miner.jobs import LogInfo, Outcome


def failed(message: str, tail: str = "", size: int = 0) -> Outcome:
    return Outcome(
        "j1", code=ErrorCode.E_TASK, message=message, log=LogInfo(bytes=size or len(tail), tail=tail)
    )


def raised() -> str:
    said = RuntimeError("no such voice: anna")
    try:
        raise said
    except RuntimeError:
        return traceback.format_exc()


def test_a_task_that_raises_is_told_once_and_without_a_traceback() -> None:
    said = "task speak: RuntimeError: no such voice: anna"
    outcome = failed(said, f"loading\n{raised()}{said}\n")
    told = aitbc_wire.failure(outcome)["error_message"]
    assert told == f"E_TASK: {said} | the end of its log: loading"


def test_chained_and_cut_tracebacks_are_left_out() -> None:
    trace = raised().splitlines()
    cut = "\n".join(
        [*trace[1:], "", "During handling of the above exception, another exception occurred:", "", *trace]
    )
    assert log_of(failed("", cut)) == "RuntimeError: no such voice: anna"
    group = '  + Exception Group Traceback (most recent call last):\n  |   File "/a/b.py", line 3\nboom'
    assert log_of(failed("", group)) == "boom"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("cannot open '/var/lib/aitbc/miner/jobs/j1/work/in.mp4'", "cannot open 'in.mp4'"),
        (
            "no x.py in the task paths /usr/local/lib/aitbc/tasks, /opt/tasks",
            "no x.py in the task paths tasks, tasks",
        ),
        ("cannot import name 'a' from 'b' (/opt/venv/lib/python3.11/site-packages/b.py)", "(b.py)"),
        ("File not found: /home/op/my-venv/bin/python3", "File not found: python3"),
        ("input https://host.example/a/b.mp4 is 12/24/36 MB", "https://host.example/a/b.mp4 is 12/24/36 MB"),
        ("exit status 3; /tmp", "exit status 3; /tmp"),
    ],
)
def test_no_path_of_the_machine_is_told(text: str, told: str) -> None:
    assert message_of(failed(text)).endswith(told)
    assert log_of(failed("", text)).endswith(told)


def test_half_a_line_at_the_start_of_the_tail_is_left_out() -> None:
    assert log_of(failed("", "lib/aitbc/venv/x.py: warning\ngood", size=99_999)) == "good"
    assert log_of(failed("", "y" * 100, size=99_999)) == "y" * 100
