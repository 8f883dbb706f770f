"""`aitbc-minerctl allow` of a whole node: what it says of a command is what a job with it gets."""

import json
import subprocess
import sys
from typing import Any

from tests.node.harness import Node, wait_final
from tools.mock.bootstrap.coordinator import MockCoordinator

WAIT_S = 120.0
ENTRY = """\
command: {path: /usr/bin/head}
leading: [-q]
options: [{name: -n, value: {int: {min: 1, max: 9}}}]
operands: [{value: input, max: 3}]
"""


def allow(node: Node, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "aitbc_miner.ctl.main", "--socket", str(node.socket), "allow", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)


def head(*args: str) -> dict[str, Any]:
    return {
        "runner": "cli",
        "command": "head",
        "args": [*args],
        "input": {"inline": {"a": "1\n2\n", "b": "3\n"}},
    }


def test_a_command_is_judged_as_a_job_is(node_factory: Any, coordinator: MockCoordinator) -> None:
    node = node_factory()
    file = node.directory / "allowlist.d" / "head.yaml"
    file.write_text(ENTRY)
    node.start()
    said = allow(node, "--input", "a", "--input", "b", "--", "head", "-n", "1", "a", "b")
    assert (said.returncode, said.stderr) == (0, "")
    assert said.stdout.splitlines()[0] == "permitted   /usr/bin/head -q -n 1 a b"
    said = allow(node, "--json", "--input", "a", "--", "head", "-n", "1", "c")
    assert said.returncode == 1
    judged = json.loads(said.stdout)
    assert (judged["file"], judged["line"], judged["argument"]) == (str(file), 4, 3)

    good, bad = coordinator.submit(head("-n", "1", "a", "b")), coordinator.submit(head("-n", "1", "c"))
    results = wait_final(coordinator, [good, bad])
    assert [job.error_code for job in results] == [None, "E_DENY"]
    assert judged["message"] in json.dumps(results[1].reports[-1].body)
