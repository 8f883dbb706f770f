"""A whole node in a temporary directory, for the demo, the benchmark and the tests.

The node is the installed `aitbc-miner run` on loopback, with its own configuration and short delays. As root
the node uses the users and groups that this machine has, else the present user.
"""

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import psutil
import yaml

from aitbc_miner.cgroup.group import find_mount, own_group
from aitbc_miner.control.client import ask
from aitbc_miner.control.protocol import Request, Status

TOKEN = "demo-token"
START_S = 60.0
# A pause of wait_until is so many times as long as the question took, but never longer than this.
SHARE, LONGEST_PAUSE_S = 4.0, 1.0


class LocalNode:
    """Starts and stops a node in `directory`, which is removed at the end unless `keep`.

    `environ`: additional variables of the node's processes; `program`: the arguments of Python that start it.
    """

    def __init__(
        self,
        base_url: str,
        slots: list[dict[str, Any]],
        *,
        keep: bool = False,
        environ: Mapping[str, str] | None = None,
        **changes: Any,
    ) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="aitbc-miner-"))
        # The jobs' users must be able to pass; what they may see inside is the node's business.
        self.directory.chmod(0o755)
        self.node_id = self.directory.name
        self.socket = self.directory / "run" / "control.sock"
        self.jobs = self.directory / "jobs"
        self.log = self.directory / "node.log"
        self.config = self.directory / "config.yaml"
        self.process: subprocess.Popen[bytes] | None = None
        self.program = ["-m", "aitbc_miner.main"]
        self._keep = keep
        self._environ = dict(environ or {})
        self._stack = contextlib.ExitStack()
        for name in ("allowlist.d", "slots.d", "tasks"):
            self.put(name)
        self.write_slots(slots)
        self.write_config(base_url, **changes)

    def put(self, name: str, source: Path | None = None) -> Path:
        """Make a directory that only its owner can write, with copies of the files in `source`."""
        target = self.directory / name
        target.mkdir(mode=0o755, exist_ok=True)
        for file in sorted(source.glob("*.*")) if source else ():
            copy = target / file.name
            shutil.copyfile(file, copy)
            copy.chmod(0o644)
        return target

    def write_slots(self, slots: list[dict[str, Any]]) -> None:
        """Write slots.d."""
        _write(self.directory / "slots.d" / "slots.yaml", {"slots": slots} if slots else {"derive": True})

    def write_config(self, base_url: str, **changes: Any) -> None:
        """Write config.yaml; `changes` replace keys within its sections."""
        config: dict[str, Any] = {
            "node_id": self.node_id,
            "coordinator": {
                "base_url": base_url,
                "auth_token": "env:MINER_AUTH",
                "poll_interval_s": 0.2,
                "timeout_s": 5,
                "allow_private_inputs": True,
            },
            "heartbeat": {"interval_s": 1, "backoff": {"min_s": 0.2, "max_s": 2}},
            "runners": {
                "cli": {"allowlist_dirs": [str(self.directory / "allowlist.d")]},
                "python": {"task_paths": [str(self.directory / "tasks")]},
            },
            "slots_dir": str(self.directory / "slots.d"),
            "workspace": {"root": str(self.jobs), "min_free_mb": 0, "reserve_mb": 1},
            "queue": {"path": str(self.directory / "state" / "queue.db")},
            "privileges": {"mode": "auto"},
            "sandbox": {"mode": "off"},
            "cgroup": {"mode": "auto"},
            "shutdown": {"mode": "kill"},
            "telemetry": {"listen": "127.0.0.1:0"},
            "control": {"socket": str(self.socket)},
        }
        for section, values in changes.items():
            config[section] = {**config[section], **values} if isinstance(values, dict) else values
        _write(self.config, config)

    def launch(self) -> None:
        """Start the node without waiting."""
        command = [sys.executable, *self.program, "run", "--config", str(self.config)]
        # With PYTHON… of ours the node would start itself again, without what else it was given.
        ours = {name: text for name, text in os.environ.items() if not name.startswith("PYTHON")}
        environ = {**ours, "MINER_AUTH": TOKEN, **self._environ}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL, stderr=log)

    def start(self) -> Self:
        """Start the node and wait until it answers on its control socket."""
        self.launch()
        wait_until(lambda: self.status() is not None or self.process_ended(), START_S)
        if self.process_ended():
            raise RuntimeError(f"cannot start the node:\n{self.log.read_text()[-4000:]}")
        return self

    def process_ended(self) -> bool:
        """Whether the supervisor is gone."""
        return self.process is None or self.process.poll() is not None

    def status(self) -> Status | None:
        """Ask for the node's status; None if the node does not answer."""
        try:
            answer, _ = ask(self.socket, Request("status"), 5.0)
        except OSError:
            return None
        return answer if isinstance(answer, Status) else None

    def pids(self) -> list[int]:
        """Give the pids of all live processes of the node."""
        if self.process_ended() or self.process is None:
            return []
        root = psutil.Process(self.process.pid)
        return [root.pid, *(child.pid for child in root.children(recursive=True))]

    def cgroup(self) -> Path | None:
        """Give the directory of this node's groups, if it has groups."""
        mount = find_mount()
        path = own_group(mount) / f"aitbc-miner-{self.node_id}" if mount else None
        return path if path and path.exists() else None

    def stop(self, number: int = signal.SIGTERM, timeout: float = 30.0) -> int:
        """Stop the node and give its exit status."""
        if self.process is None:
            return 0
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(timeout)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        pids = self.pids()
        try:
            self.stop()
        except subprocess.TimeoutExpired:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        if not self._keep:
            shutil.rmtree(self.directory, ignore_errors=True)


def _write(path: Path, value: object) -> None:
    path.write_text(yaml.safe_dump(value))
    # Whatever the umask is: what others can write is not obeyed.
    path.chmod(0o644)


def wait_until(condition: Any, timeout: float, pause: float = 0.02) -> Any:
    """Wait until a condition gives a true value, and give the value.

    If the condition is slow, as in an emulated machine, the pauses are longer, so that the node has most of
    the time.

    Raises:
        TimeoutError: the condition gave no true value within `timeout` seconds.
    """
    began = time.monotonic()
    deadline = began + timeout
    while not (value := condition()):
        now = time.monotonic()
        if now > deadline:
            raise TimeoutError(f"cannot wait longer than {timeout:g} s")
        select.select([], [], [], max(pause, min(LONGEST_PAUSE_S, (now - began) * SHARE)))
        began = time.monotonic()
    return value
