"""Reads the machine's NVIDIA GPUs through NVML, without trusting NVML to answer.

A call into NVML can hang in the driver for ever, and then not even SIGKILL ends the caller. So only a child
process (gpu/nvml.py) calls NVML. `GpuReader` waits for the child with a deadline, and abandons a child that
hangs.
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
    """A part of a GPU that can be rented alone; video memory in MiB.

    capabilities: the numbers of its nodes /dev/nvidia-caps/nvidia-cap<number>.
    """

    uuid: str
    name: str
    vram_mb: int | None
    capabilities: tuple[int, ...] = ()


class GpuInfo(Struct, frozen=True):
    """The facts of a GPU, fixed while the driver is loaded. With an `error`, only `index` is certain.

    A value that the GPU does not tell is empty or None; `odd` names the values that it should have told.
    vram_mb: MiB; with `unified` the machine's memory. cuda: the newest version that the driver supports.
    pci_bus_id: as in sysfs (0000:01:00.0). minor: the number of /dev/nvidia<minor>.
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
    """The usage of a GPU or MIG instance, in MiB, percent, Celsius, watts; None: the GPU does not tell.

    uuid: the index of a GPU that does not tell its UUID.
    """

    uuid: str
    vram_used_mb: int | None = None
    vram_total_mb: int | None = None
    utilisation_pct: int | None = None
    temperature_c: int | None = None
    power_w: float | None = None
    error: str | None = None


class GpuList(Struct, frozen=True):
    """The GPUs, or the error. `missing`: the NVIDIA library is not installed, which is no fault."""

    gpus: list[GpuInfo] = []
    error: str | None = None
    missing: bool = False


class NvmlReply(GpuList, frozen=True):
    """A line from the child. After an `error` the child is useless."""

    usage: list[GpuUsage] = []


Usages: TypeAlias = list[GpuUsage]  # GpuReader has a method called `list`


class GpuReader:
    """Asks for the GPUs in a child process, which may hang, break or talk nonsense. For a single thread.

    After a failure the reader kills the child and pauses for `pause_s`. Each further failure doubles the
    pause, up to `max_pause_s`; a missing NVIDIA library pauses for `max_pause_s` at once. During the pause,
    calls repeat the error. The child gets only PATH and LD_LIBRARY_PATH of `environ`.
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
        """Return the GPUs within about `deadline_s`. Raises nothing: `error` has the failure."""
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

        Raises nothing: if NVML fails, each GPU that `list` last found has an entry with the error.
        """
        reply = self._ask("usage", deadline_s)
        return [GpuUsage(uuid, error=reply.error) for uuid in self._uuids] if reply.error else reply.usage

    def close(self) -> None:
        """Kill the child, and abandon a child that survives."""
        self._end_child()
        if self._ended:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._ended.wait(1.0)

    def _ask(self, request: str, deadline_s: float) -> NvmlReply:
        deadline = clock.now() + deadline_s
        if self._ended:
            # Reap the child now: without a driver, the next child may start only after a long pause.
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
        # A process that hangs in the driver outlives SIGKILL. Start no second: it would hang as well.
        if self._ended and self._ended.poll() is None:
            raise MinerError(
                f"process {self._ended.pid} still hangs in the driver; reload the driver or reboot"
            )
        # An abandoned child must not hold our stderr: the reader of stderr would wait for the child's end.
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
        """Kill the child without waiting; the next call reaps the child."""
        if child := self._child:
            child.kill()
            for pipe in (child.stdin, child.stdout):
                if pipe:
                    pipe.close()
            self._child, self._ended = None, child


def _child_command() -> Sequence[str]:
    # -I keeps modules of the environment and of the current directory out, and with them our own package
    # unless it is installed: so the command is given the package's place.
    start = "import sys; sys.path.append(sys.argv[1]); from aitbc_miner.gpu.nvml import serve; serve()"
    return [sys.executable, "-I", "-c", start, str(Path(__file__).resolve().parents[2])]


def _exchange(child: subprocess.Popen[bytes], request: str, deadline: float) -> NvmlReply:
    """Send a request to the child and return the reply.

    Raises:
        MinerError: the child sends no reply in time, or nonsense.
        OSError: the child has closed its pipe.
    """
    if child.stdin is None or child.stdout is None:
        raise MinerError("the NVML process was started without pipes")
    child.stdin.write(request.encode() + b"\n")
    line = _read_line(child.stdout.fileno(), deadline)
    try:
        return msgspec.json.decode(line, type=NvmlReply)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MinerError(f"the NVML process answered {line[:60]!r}: {error}") from error


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
            raise MinerError(f"the NVML process ended after {received[:60]!r}; see dmesg")
        if len(received) > MAX_REPLY_BYTES:
            raise MinerError(f"the NVML process answered more than {MAX_REPLY_BYTES} bytes")
    return received
