"""The attack suite: every hostile program as a job of the installed node, in the sandbox and without it.

What gets through is told by canaries that turn up where they should not, by the program itself, which has no
reason to be modest, and by what the machine looks like afterwards.
"""

import json
import platform
import socket
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import yaml

from tests.attacks import ATTACKS, Attack
from tests.attacks.attack import CANARIES, THROUGH
from tests.vm.conftest import Count
from tests.vm.machine import ETC, TOKEN, WAIT_S, Machine, run
from tools.lib.local_node import wait_until
from tools.mock.bootstrap.records import Job, State

pytestmark = pytest.mark.own_kernel("what an attack may do depends on the kernel, and some are for it")

VICTIM, ABSTRACT = "victim", "aitbc-canary"
OUTSIDE = Path("/usr/local/share/aitbc-canary/file")
BESIDE = "semaphores-beside"
MEMORY_MAX, PIDS_MAX = "96M", 64
SLOTS = 4
# Run one at a time: they look at what another one does at the same moment.
ALONE = {"semaphores", "listen-for-others"}
VICTIM_PROGRAM = """
import ctypes, time
libc = ctypes.CDLL(None); libc.shmat.restype = ctypes.c_void_p
address = libc.shmat(libc.shmget(0, 4096, 0o1666), None, 0)
ctypes.memmove(address, b"<memory>", len("<memory>"))
open("/dev/shm/victim", "w").write("<memory>")
open("secret", "w").write("<work>"); open("ready", "w").close()
while True: time.sleep(1)
"""


class Result(NamedTuple):
    """What came of an attack: the code of its job, and how it got through if it did."""

    code: str
    through: str


class Siege:
    """The node under attack, with one mode of the sandbox."""

    def __init__(self, machine: Machine, mode: str) -> None:
        self._machine = machine
        self._mode = mode
        with socket.create_server(("0.0.0.0", 0)) as server:
            self._free: int = server.getsockname()[1]
        self._beside = {"listen-for-others": self._come_by, "semaphores": self._make_semaphore}
        self._made: set[str] = set()

    def start(self) -> None:
        """Start the node with a victim in one of its slots."""
        machine = self._machine
        machine.configure(
            sandbox={"mode": self._mode}, workspace={"min_free_mb": 0, "reserve_mb": 1, "max_log_mb": 4}
        )
        entry = {"command": {"path": "/usr/bin/python3"}, "args": [["program.py"], [".+"]]}
        (ETC / "allowlist.d" / "python3.yaml").write_text(yaml.safe_dump(entry))
        limits = {"memory_max": MEMORY_MAX, "swap_max": 0, "pids_max": PIDS_MAX, "cpus": "0"}
        limits["rlimits"] = {"fsize": "64M", "core": 0, "nofile": 4096}
        machine.slots([{"name": f"cpu{i}", "kind": "cpu", **deepcopy(limits)} for i in range(SLOTS)])
        machine.start()
        self._submit(VICTIM, VICTIM_PROGRAM, ["<argv>"])
        wait_until((machine.jobs / VICTIM / "work" / "ready").exists, WAIT_S, 0.2)

    def _submit(self, job_id: str, program: str, args: list[str], **more: object) -> None:
        for name, word in CANARIES.items():
            program = program.replace(f"<{name}>", word)
            args = [arg.replace(f"<{name}>", word) for arg in args]
        self._machine.submit(
            {
                "job_id": job_id,
                "runner": "cli",
                "command": "python3",
                "args": ["program.py", *args],
                "input": {"inline": {"program.py": program}},
                "timeout_s": 7200 if job_id == VICTIM else 200,
                **more,
            }
        )

    def attack(self, attacks: list[Attack]) -> dict[str, Result]:
        """Run the attacks, many at once, and say what came of each."""
        together = [attack for attack in attacks if attack.name not in ALONE]
        for attack in together:
            self._launch(attack)
        self._wait(together)
        for attack in attacks:
            if attack.name in ALONE:
                self._launch(attack)
                self._wait([attack])
        return {attack.name: self._result(attack) for attack in attacks}

    def _launch(self, attack: Attack) -> None:
        more = dict(attack.more)
        ids = [attack.name]
        if more.pop("again", False):
            # Once in every slot, and then once more where one of these has been.
            ids = [f"{attack.name}-{i}" for i in range(SLOTS - 1)] + [attack.name]
        for job_id in ids:
            words = {"victim": VICTIM, "own": job_id, "abstract": ABSTRACT, "outside": str(OUTSIDE)}
            words |= {"host": socket.gethostname(), "free": str(self._free)}
            words["port"] = self._machine.mock.url.rpartition(":")[2].partition("/")[0]
            self._submit(job_id, attack.source(**words), [], **more)

    def _wait(self, attacks: list[Attack]) -> None:
        left = {attack.name for attack in attacks}

        def over() -> bool:
            for name in sorted(left):
                if name in self._beside:
                    self._beside[name]()
                if self._machine.mock.job(name).state in {State.DONE, State.FAILED}:
                    left.discard(name)
            return not left

        wait_until(over, WAIT_S + 30 * len(attacks), 0.3)

    def _come_by(self) -> None:
        """Connect to a job that listens, as anybody on the network could."""
        if (self._machine.jobs / "listen-for-others" / "work" / "listens").exists():
            with socket.socket() as line:
                line.settimeout(2)
                line.connect_ex(("127.0.0.1", self._free))

    def _make_semaphore(self) -> None:
        """Have another job make a semaphore while one holds all that it can get."""
        held = (self._machine.jobs / "semaphores" / "work" / "held").exists()
        if held and BESIDE not in self._made:
            self._made.add(BESIDE)
            self._submit(BESIDE, "import ctypes; assert ctypes.CDLL(None).semget(0, 1, 0o1666) >= 0", [])

    def _result(self, attack: Attack) -> Result:
        job = self._machine.mock.job(attack.name)
        code = job.error_code or "OK"
        if found := self._found(attack, job):
            return Result(code, found)
        if code not in attack.codes:
            return Result(code, f"the job ended {code}: {job.accepted and job.accepted.body}"[:300])
        return Result(code, "")

    def _found(self, attack: Attack, job: Job) -> str:
        directory = self._machine.jobs / attack.name
        log = (
            (directory / "logs" / "exec.log").read_bytes()
            if (directory / "logs" / "exec.log").exists()
            else b""
        )
        for line in log.decode("utf-8", "replace").splitlines():
            if line.startswith(THROUGH):
                return line.removeprefix(THROUGH).strip()[:200]
        delivered = (
            [artifact.file.read_bytes() for artifact in job.accepted.artifacts] if job.accepted else []
        )
        secrets = {**CANARIES, "token": TOKEN}
        for name, secret in secrets.items():
            if any(secret.encode() in data for data in (log, *delivered)):
                return f"it has the canary of the {name}"
        after = AFTER.get(attack.name)
        return after(self._machine, job) if after else ""


# --- what is to be seen afterwards -------------------------------------------------------------------------


def others_have_semaphores(machine: Machine, _job: Job) -> str:
    (beside,) = machine.wait_final([BESIDE])
    return "another job could make no semaphore" if beside.state is not State.DONE else ""


def nobody_left(machine: Machine, _job: Job) -> str:
    left = [
        p.pid for p in psutil.process_iter(["cmdline"]) if CANARIES["process"] in (p.info["cmdline"] or [])
    ]
    return f"processes {left} outlive the job" if left else ""


def log_is_bounded(machine: Machine, job: Job) -> str:
    size = (machine.jobs / job.job_id / "logs" / "exec.log").stat().st_size
    return f"a log of {size} bytes" if size > 5 << 20 else ""


def nothing_odd_is_sent(_machine: Machine, job: Job) -> str:
    names = [artifact.path for artifact in job.accepted.artifacts] if job.accepted else []
    # One of them can be sent, and must come as it was called.
    odd = [name for name in names if name not in {"logs/exec.log", 'a"; name="outcome'}]
    return f"delivered as {odd}" if odd else ""


def nothing_acts_on_terminals(machine: Machine, job: Job) -> str:
    shown = run("aitbc-minerctl", "job", job.job_id) + run("aitbc-minerctl", "jobs")
    return "the operator's terminal is written to" if "\x1b" in shown or "\x9b" in shown else ""


AFTER: dict[str, Callable[[Machine, Job], str]] = {
    "semaphores": others_have_semaphores,
    "daemon": nobody_left,
    "log-flood": log_is_bounded,
    "names-of-two-lines": nothing_odd_is_sent,
    "names-with-quotes": nothing_odd_is_sent,
    "names-of-no-letters": nothing_odd_is_sent,
    "terminal-sequences": nothing_acts_on_terminals,
}


@pytest.fixture
def canaries() -> Iterator[None]:
    """Lay out what the attackers are after."""
    environment = ETC / "environment"
    environment.write_text(f"MINER_CANARY={CANARIES['env']}\n")
    environment.chmod(0o600)
    OUTSIDE.parent.mkdir()
    OUTSIDE.write_text(CANARIES["file"])
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0{ABSTRACT}")
        listener.listen()
        yield
    environment.unlink()
    OUTSIDE.unlink()
    OUTSIDE.parent.rmdir()


# Without the sandbox it is the attacks that are tried, and what they are written for is in both releases.
WITHOUT = pytest.param("off", marks=pytest.mark.one_release("13", "shows that the attacks bite"))


@pytest.mark.parametrize("mode", ["required", WITHOUT])
def test_nothing_gets_through_the_sandbox(
    machine: Machine, canaries: None, reports: Path, mode: str, count: Count
) -> None:
    biting = [each for each in ATTACKS if each.bites]
    siege = Siege(machine, mode)
    siege.start()
    # Each is tried in one of the releases; without the sandbox, those known to bite are. With --full, all.
    turn = int(platform.freedesktop_os_release()["VERSION_ID"]) % 2
    chosen = ATTACKS[turn::2] if mode == "required" else biting
    results = siege.attack(list(ATTACKS if count(0, 1) else chosen))
    (reports / f"attacks-{mode}.json").write_text(json.dumps(results, indent=1))
    through = {name: result.through for name, result in results.items() if result.through}
    # The victim has noticed nothing, and the slots are as good as ever.
    assert machine.mock.job(VICTIM).state not in {State.DONE, State.FAILED}
    machine.mock.cancel(VICTIM)
    machine.wait_final([VICTIM])
    wait_until(lambda: {row.slot.state for row in machine.now().slots} == {"IDLE"}, WAIT_S, 0.5)
    if mode == "required":
        assert through == {}
        return
    write_table(results, reports)
    toothless = [each.name for each in biting if each.name not in through]
    assert toothless == [], "these should get through where there is no sandbox"


def write_table(without: dict[str, Result], reports: Path) -> None:
    """Write the attack table: for each attack what it tries to break, with the sandbox and without."""
    file = reports / "attacks-required.json"
    inside = (
        {name: Result(*row) for name, row in json.loads(file.read_text()).items()} if file.exists() else {}
    )
    lines = ["| attack | property | with the sandbox | without |", "| --- | --- | --- | --- |"]
    for attack in ATTACKS:
        cells = [shown(results.get(attack.name)) for results in (inside, without)]
        lines.append(f"| {attack.name} | {attack.property} | {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    (reports / "attacks.md").write_text(text)
    print("\n" + text)


def shown(result: Result | None) -> str:
    """Write a cell of the table."""
    if result is None:
        return "not tried"
    return f"**{result.through.replace('|', '/')}**" if result.through else f"held ({result.code})"
