"""The machine's NVIDIA GPUs, asked through NVML without ever trusting it to answer.

A call into NVML can hang in the driver for ever, and then not even SIGKILL ends the caller. So it is made in
a child process only (gpu/nvml.py); `GpuReader` waits for it with a deadline and leaves it behind if it must.
"""

import contextlib
import os
import select
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self, TypeAlias

import msgspec
from msgspec import Struct

from aitbc_miner.errors import MinerError
from aitbc_miner.gpu.devices import numa_node_of
from aitbc_miner.util import clock

MAX_REPLY_BYTES = 4 * 2**20
NO_LIBRARY = "no NVIDIA library (libnvidia-ml.so.1): GPU slots are not possible; install nvidia-driver"


class MigInstance(Struct, frozen=True):
    """A part of a GPU that can be rented by itself; video memory in MiB.

    `capabilities` are the numbers of its nodes /dev/nvidia-caps/nvidia-cap<number>.
    """

    uuid: str
    name: str
    vram_mb: int | None
    capabilities: tuple[int, ...] = ()


class GpuInfo(Struct, frozen=True):
    """What does not change about a GPU while the driver is loaded. With an `error`, only `index` is certain.

    What it does not tell is empty or None, and named in `odd` where it should have been told. `vram_mb` is in
    MiB, with `unified` the machine's own memory; `cuda` is the newest version that the driver supports;
    `pci_bus_id` is written as in sysfs (0000:01:00.0); `minor` is that of /dev/nvidia<minor>.
    """

    index: int
    vendor: str = "nvidia"
    name: str = ""
    uuid: str = ""
    vram_mb: int | None = None
    unified: bool = False
    driver: str = ""
    cuda: str = ""
    compute_capability: str | None = None
    mig: list[MigInstance] = []
    mig_enabled: bool = False
    pci_bus_id: str = ""
    numa_node: int | None = None
    minor: int | None = None
    odd: list[str] = []
    error: str | None = None


class GpuUsage(Struct, frozen=True):
    """What a GPU or MIG instance does now; None for what it does not tell. MiB, percent, Celsius, watts.

    A GPU that does not tell its UUID is named by its index.
    """

    uuid: str
    vram_used_mb: int | None = None
    vram_total_mb: int | None = None
    utilisation_pct: int | None = None
    temperature_c: int | None = None
    power_w: float | None = None
    error: str | None = None


class GpuList(Struct, frozen=True):
    """The GPUs, or why they are not known; `missing` means that there is no NVIDIA library, so no fault."""

    gpus: list[GpuInfo] = []
    error: str | None = None
    missing: bool = False


class NvmlReply(Struct, frozen=True):
    """One line from the child. With an `error` the child is of no more use."""

    gpus: list[GpuInfo] = []
    usage: list[GpuUsage] = []
    error: str | None = None
    missing: bool = False


Usages: TypeAlias = list[GpuUsage]  # GpuReader has a method called `list`


class GpuReader:
    """Asks for the GPUs in a child process that may hang, break or talk nonsense. For one thread at a time.

    After a failure the child is ended and no new one is started for `pause_s`, doubled at each further
    failure up to `max_pause_s` (at once where there is no NVIDIA library); calls in that time repeat the
    error.
    `environ` is where PATH and LD_LIBRARY_PATH are taken from, the only variables that the child gets.
    """

    def __init__(
        self,
        *,
        environ: Mapping[str, str] | None = None,
        sysfs: Path = Path("/sys"),
        pause_s: float = 5.0,
        max_pause_s: float = 300.0,
        command: Sequence[str] | None = None,
    ) -> None:
        source = os.environ if environ is None else environ
        self._environ = {name: source[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in source}
        self._command = command or _child_command()
        self._sysfs = sysfs
        self._first_pause_s, self._max_pause_s = pause_s, max_pause_s
        self._pause_s = 0.0
        self._not_before = 0.0
        self._failure = NvmlReply()
        self._child: subprocess.Popen[bytes] | None = None
        self._ended: subprocess.Popen[bytes] | None = None
        self._uuids: Sequence[str] = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def list(self, deadline_s: float = 5.0) -> GpuList:
        """Return the GPUs within about `deadline_s`. Raises nothing: what went wrong is in `error`."""
        reply = self._ask("list", deadline_s)
        if reply.error:
            return GpuList(error=reply.error, missing=reply.missing)
        gpus = [
            msgspec.structs.replace(info, numa_node=numa_node_of(self._sysfs, info.pci_bus_id))
            for info in reply.gpus
        ]
        uuids = [uuid for info in gpus for uuid in (info.uuid, *(part.uuid for part in info.mig))]
        self._uuids = [uuid for uuid in uuids if uuid]
        return GpuList(gpus)

    def usage(self, deadline_s: float = 2.0) -> Usages:
        """Return the usage of each GPU and MIG instance within about `deadline_s`.

        Raises nothing: when NVML fails, each one that `list` last found has an entry with the error.
        """
        reply = self._ask("usage", deadline_s)
        return [GpuUsage(uuid, error=reply.error) for uuid in self._uuids] if reply.error else reply.usage

    def close(self) -> None:
        """End the child; one that cannot be ended is left behind."""
        self._end_child()
        if self._ended:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._ended.wait(1.0)

    def _ask(self, request: str, deadline_s: float) -> NvmlReply:
        deadline = clock.now() + deadline_s
        if self._ended:
            # Reaps it: where there is no driver, there may be no next one for long.
            self._ended.poll()
        if clock.now() < self._not_before:
            return self._failure
        try:
            self._child = self._child or self._start_child()
            reply = _exchange(self._child, request, deadline)
        except (MinerError, OSError) as error:
            reply = NvmlReply(error=f"cannot ask NVML: {error}")
        if reply.error:
            self._fail(reply)
        else:
            self._pause_s = 0.0
        return reply

    def _start_child(self) -> subprocess.Popen[bytes]:
        # A process that hangs in the driver outlives SIGKILL. One is enough: the next would hang as well.
        if self._ended and self._ended.poll() is None:
            raise MinerError(f"process {self._ended.pid} still hangs in the driver; reload it or reboot")
        # The child may stay behind, so it must not hold our stderr: whoever reads that waits for its end.
        return subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            cwd="/",
            env=self._environ,
            start_new_session=True,
        )

    def _fail(self, reply: NvmlReply) -> None:
        self._end_child()
        doubled = min(max(self._first_pause_s, self._pause_s * 2), self._max_pause_s)
        self._pause_s = self._max_pause_s if reply.missing else doubled
        self._not_before = clock.now() + self._pause_s
        self._failure = reply

    def _end_child(self) -> None:
        """Kill the child without waiting for it; it is reaped when we are asked again."""
        if child := self._child:
            child.kill()
            for pipe in (child.stdin, child.stdout):
                if pipe:
                    pipe.close()
            self._child, self._ended = None, child


def _child_command() -> Sequence[str]:
    # Isolated (-I), so that neither the environment nor the current directory can slip a module in; the place
    # of our own package is then unknown unless it is installed.
    start = "import sys; sys.path.append(sys.argv[1]); from aitbc_miner.gpu.nvml import serve; serve()"
    return [sys.executable, "-I", "-c", start, str(Path(__file__).resolve().parents[2])]


def _exchange(child: subprocess.Popen[bytes], request: str, deadline: float) -> NvmlReply:
    """Send one request and return its reply.

    Raises:
        MinerError: no reply in time, or something that is none.
        OSError: the child has closed its end.
    """
    if child.stdin is None or child.stdout is None:
        raise MinerError("its process was started without pipes")
    child.stdin.write(request.encode() + b"\n")
    line = _read_line(child.stdout.fileno(), deadline)
    try:
        return msgspec.json.decode(line, type=NvmlReply)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MinerError(f"its process answered {line[:60]!r}: {error}") from error


def _read_line(source: int, deadline: float) -> bytes:
    poll = select.poll()
    poll.register(source, select.POLLIN)
    received = b""
    while not received.endswith(b"\n"):
        left = deadline - clock.now()
        if left <= 0 or not poll.poll(left * 1000):
            raise MinerError("no answer in time; the driver hangs, or the machine is very busy")
        chunk = os.read(source, 65536)
        received += chunk
        if not chunk:
            raise MinerError(f"its process ended after {received[:60]!r}; see dmesg")
        if len(received) > MAX_REPLY_BYTES:
            raise MinerError(f"its process answered more than {MAX_REPLY_BYTES} bytes")
    return received
