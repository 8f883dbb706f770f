"""An installed node under systemd: its units, the traces of its jobs, and what must be gone afterwards."""

import contextlib
import os
import pwd
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
import yaml

from aitbc_miner.control.client import ask
from aitbc_miner.control.protocol import Request, Status
from aitbc_miner.ipc.messages import SlotView
from aitbc_miner.sandbox.users import job_user
from aitbc_miner.slots.state import SlotState
from tools.lib.local_node import wait_until
from tools.lib.marked_jobs import MarkedJobs, allow_programs
from tools.mock.bootstrap.coordinator import MockCoordinator
from tools.mock.bootstrap.records import FINAL, Job

CHECKOUT = Path(__file__).parents[2]
MAIN, SLOTS = "aitbc-miner.service", "aitbc-miner-slots.service"
CURRENT = Path("/usr/lib/aitbc-miner/current")
ETC, STATE, RUN = Path("/etc/aitbc/miner"), Path("/var/lib/aitbc/miner"), Path("/run/aitbc-miner")
CGROUP = Path("/sys/fs/cgroup/aitbc.slice", SLOTS)
TOKEN = "demo-token"
# The machine is emulated: what takes a second elsewhere may take twenty here.
WAIT_S = 300.0
NODE_ID = "vm"
# Where there is no kernel of our own, there may be no controllers either: the node does with what there is.
CONTAINER = Path("/run/systemd/container").exists()
UNDECIDED = {SlotState.STOPPED, SlotState.STARTING}


def run(*command: str | Path, check: bool = True) -> str:
    """Run a command and give all that it printed; with `check` it must succeed."""
    done = subprocess.run(
        list(map(str, command)),
        check=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=WAIT_S * 2,
    )
    assert done.returncode == 0 or not check, (
        f"{shlex.join(done.args)} gave {done.returncode}:\n{done.stdout}"
    )
    return done.stdout


def install(*options: str, check: bool = True) -> str:
    """Run the installer; the packages come from the directory that the laboratory has brought along."""
    wheels = [] if "--uninstall" in options else ["--wheels", os.environ["AITBC_WHEELS"]]
    return run(CHECKOUT / "tools" / "install", *options, *wheels, check=check)


class Machine(MarkedJobs):
    """This machine with the node installed. Nothing is started before `start`.

    Jobs may say in `marks` that they have begun: one file for each run. It is in a place
    that the unit lets them write in, unlike /tmp.
    """

    def __init__(self, mock: MockCoordinator) -> None:
        self.mock = mock
        self.patience_s = WAIT_S
        self.marks = Path("/var/lib/aitbc/marks")
        self.marks.mkdir()
        # Each slot's jobs have a user of their own.
        self.marks.chmod(0o777)
        self.jobs = STATE / "jobs"
        self.socket = RUN / "control.sock"

    # --- configuration -------------------------------------------------------------------------------------

    def configure(self, **changes: Any) -> None:
        """Write config.yaml, the token and the allowlist; `changes` replace keys within the sections."""
        config: dict[str, Any] = {
            "node_id": NODE_ID,
            "coordinator": {
                "base_url": self.mock.url,
                "auth_token": f"file:{ETC}/token",
                "poll_interval_s": 0.5,
                "timeout_s": 60,
                "allow_private_inputs": True,
            },
            "heartbeat": {"interval_s": 2, "backoff": {"min_s": 0.2, "max_s": 2}},
            # The disk of a machine for tests is small, and some have one of a few megabytes.
            "workspace": {"min_free_mb": 0, "min_free_inodes": 0, "reserve_mb": 1},
            "sandbox": {"mode": "off"},
            "cgroup": {"mode": "auto" if CONTAINER else "required"},
            "privileges": {"mode": "required"},
        }
        for section, values in changes.items():
            config[section] = {**config.get(section, {}), **values} if isinstance(values, dict) else values
        (ETC / "config.yaml").write_text(yaml.safe_dump(config))
        token = ETC / "token"
        token.write_text(TOKEN)
        shutil.chown(token, "root", "aitbc")
        token.chmod(0o640)
        allow_programs(ETC / "allowlist.d")

    def slots(self, rows: int | list[dict[str, Any]]) -> None:
        """Write slots.d and make the slots' users; a node that runs takes it up by `systemctl reload`."""
        if isinstance(rows, int):
            rows = [{"name": f"cpu{i}", "kind": "cpu"} for i in range(rows)]
        (ETC / "slots.d" / "slots.yaml").write_text(yaml.safe_dump({"slots": rows}))
        known = {entry.pw_name for entry in pwd.getpwall()}
        for user in {job_user(row["name"]) for row in rows} - known:
            run("useradd", "--system", "--user-group", "--no-create-home", "-s", "/usr/sbin/nologin", user)
        if self.is_active():
            run("systemctl", "reload", MAIN)

    # --- the units -----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the node and wait until it answers."""
        run("systemctl", "start", MAIN)
        self.wait_up()

    def stop(self, unit: str = MAIN) -> None:
        """Stop a unit; stopping SLOTS stops both, and ends the jobs."""
        run("systemctl", "stop", unit)

    def restart(self, unit: str = MAIN) -> None:
        """Restart a unit and wait until the node answers again."""
        run("systemctl", "restart", unit)
        self.wait_up()

    def kill(self, number: int = signal.SIGKILL, pid: int | None = None) -> int:
        """Signal the supervisor, or another process, and give its pid; does not wait for what comes of it."""
        pid = pid or self.main_pid()
        os.kill(pid, number)
        return pid

    def is_active(self, unit: str = MAIN) -> bool:
        """Whether a unit runs."""
        return self.show("ActiveState", unit) == "active"

    def show(self, name: str, unit: str = MAIN) -> str:
        """Give a property of a unit as systemd has it."""
        return run("systemctl", "show", "--value", "-p", name, unit).strip()

    def main_pid(self) -> int:
        """Give the supervisor's pid; 0 when there is none."""
        return int(self.show("MainPID"))

    def wait_new_main(self, old: int) -> int:
        """Wait until another supervisor than `old` answers and give its pid."""
        return int(wait_until(lambda: (now := self.status()) and now.pid != old and now.pid, WAIT_S, 0.2))

    def wait_up(self) -> Status:
        """Wait until the node answers and all its slots have made up their minds; give its status."""
        return wait_until(self._settled, WAIT_S, 0.2)  # type: ignore[no-any-return]

    def _settled(self) -> Status | None:
        now = self.status()
        # Asking systemd means starting a program, which takes its time here.
        if now is None and self.show("ActiveState") == "failed":
            raise RuntimeError(f"the node has failed:\n{self.journal()[-8000:]}")
        ready = now and now.slots and all(row.slot.state not in UNDECIDED for row in now.slots)
        return now if ready else None

    def journal(self, unit: str = MAIN, *, after: str = "") -> str:
        """Give all that a unit has said, or only what came after a place that `journal_end` has given."""
        later = [f"--after-cursor={after}"] if after else []
        return run("journalctl", "--no-pager", "-o", "short-monotonic", "-u", unit, *later)

    def journal_end(self) -> str:
        """Give the place that the journal has come to; no clock tells it, for tests set that."""
        return (
            run("journalctl", "--no-pager", "-n", "1", "--show-cursor", "-o", "cat")
            .rpartition("cursor: ")[2]
            .strip()
        )

    # --- the node ------------------------------------------------------------------------------------------

    def status(self) -> Status | None:
        """Ask for the node's status; None when it does not answer."""
        try:
            answer, _ = ask(self.socket, Request("status"), 20.0)
        except OSError:
            return None
        return answer if isinstance(answer, Status) else None

    def now(self) -> Status:
        """Give the status, which must be there."""
        status = self.status()
        assert status is not None, self.journal()[-8000:]
        return status

    def problems(self) -> list[str]:
        """Give what the node finds fault with; in a container not that there are no controllers."""
        found = [problem.what for problem in self.now().problems]
        return [what for what in found if not (CONTAINER and what.startswith("no controller for "))]

    def slot(self, name: str = "cpu0") -> SlotView:
        """Give a slot as `status` shows it."""
        return next(row.slot for row in self.now().slots if row.slot.offer.name == name)

    def slot_group(self, name: str = "cpu0") -> Path:
        """Give the control group of a slot; `job` and `worker` are below it."""
        return CGROUP / name

    def workers(self) -> dict[str, int]:
        """Give the pid of each slot's worker."""
        return {row.slot.offer.name: row.slot.worker_pid for row in self.now().slots if row.slot.worker_pid}

    # --- jobs ----------------------------------------------------------------------------------------------

    def submit(self, manifest: dict[str, Any]) -> str:
        """Queue a job and give its id."""
        return self.mock.submit(manifest)

    def wait_final(self, job_ids: Iterable[str], timeout: float = WAIT_S) -> list[Job]:
        """Wait until all jobs are final at the coordinator and give them."""
        wanted = list(job_ids)
        self.mock.wait(lambda ledger: all(ledger.job(each).state in FINAL for each in wanted), timeout)
        return [self.mock.job(each) for each in wanted]

    # --- afterwards ----------------------------------------------------------------------------------------

    def remains(self) -> list[str]:
        """Name what the node and its jobs have left on the machine: processes, control groups, mounts."""
        processes = [f"process {each.pid} of {each.info['username']}" for each in _processes()]
        # systemd removes the unit's own group with what is below it, so one that is there is a leak.
        groups = [str(path) for path in (CGROUP, CGROUP.with_name(MAIN)) if path.exists()]
        mounts = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if "aitbc" in line]
        return [*processes, *groups, *mounts]

    def clean_up(self) -> None:
        """Stop everything, whatever state the test has left it in, and forget the jobs."""
        with contextlib.suppress(ProcessLookupError):
            # A stopped supervisor does not hear that it is to end.
            if pid := self.main_pid():
                os.kill(pid, signal.SIGCONT)
        run("systemctl", "stop", MAIN, SLOTS, check=False)
        run("systemctl", "reset-failed", MAIN, SLOTS, check=False)
        # Not shutil's: some jobs leave trees that are deeper than Python counts.
        run("rm", "-rf", self.marks, self.jobs)
        # The queue knows the ids of all jobs that were here, and tests give theirs the same ones.
        for path in [RUN / "workers.json", *STATE.glob("queue.db*")]:
            path.unlink(missing_ok=True)
        (ETC / "slots.d" / "slots.yaml").unlink(missing_ok=True)


def _processes() -> list[psutil.Process]:
    found = psutil.process_iter(["username", "cmdline"])
    return [
        each
        for each in found
        if (each.info["username"] or "").startswith("aitbc")
        or any(str(CURRENT.parent) in word for word in each.info["cmdline"] or ())
    ]


def missing(said: str) -> list[str]:
    """Give the lines of `doctor` that say MISSING; in a container, which has no controllers, not of these."""
    lines = [line for line in said.splitlines() if "MISSING" in line]
    expected = (" cgroup2 ", "see MISSING above") if CONTAINER else ()
    return [line for line in lines if not any(text in line for text in expected)]


def alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has collected yet does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_gone(pids: Iterable[int]) -> None:
    """Wait until none of the processes runs any more."""
    wait_until(lambda: not any(alive(pid) for pid in pids), WAIT_S, 0.1)


def hold(release: Path) -> str:
    """Give a line for bash that waits for a file."""
    return f"until [ -e {release} ]; do sleep 0.2; done"
