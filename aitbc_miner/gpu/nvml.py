"""The child process that asks NVML. A call may never return, so `gpu/reader.py` waits with a deadline.

A driver answers some questions with an error, or with nonsense (all bits set). Such an answer is left out;
all other answers of the card are kept.
"""

import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from aitbc_miner.gpu.devices import CAPABILITIES, CARDS, mig_capabilities, minor_of
from aitbc_miner.gpu.reader import NO_LIBRARY, GpuInfo, GpuUsage, MigInstance, NvmlReply

MAX_GPUS = 1024
MAX_PARTS = 64
# Limits far above every card: 16 TiB, 10 kW.
_MAX_BYTES = 1 << 44
_MAX_MILLIWATTS = 10_000_000
_UUID = re.compile(r"[A-Za-z][A-Za-z0-9._:/-]{0,127}")

NvmlMemory = tuple[int | None, int | None]
"""Used and total memory, in MiB."""


def serve() -> None:
    """Answer each line on stdin (`list` or `usage`) with a line of JSON on stdout, until stdin ends."""
    # The driver's library may print to stdout; send its output to stderr, not between our replies.
    with os.fdopen(os.dup(1), "wb", buffering=0) as replies:
        os.dup2(2, 1)
        nvml = _Nvml()
        failed = nvml.start()
        for line in sys.stdin:
            reply = failed or nvml.answer(line.strip())
            replies.write(msgspec.json.encode(reply) + b"\n")
            if reply.error:
                return


class _Nvml:
    """Asks NVML about all cards."""

    def __init__(self) -> None:
        import pynvml  # noqa: PLC0415  # only the child process may load NVML

        self._nvml = pynvml
        self._error: type[Exception] = pynvml.NVMLError

    def start(self) -> NvmlReply | None:
        """Load and start NVML; return the reply with the error if NVML does not start."""
        try:
            self._nvml.nvmlInit()
        except self._nvml.NVMLError_LibraryNotFound:
            return NvmlReply(error=NO_LIBRARY, missing=True)
        except self._error as error:
            return NvmlReply(error=f"cannot start NVML: {error}; see nvidia-smi and dmesg")
        return None

    def answer(self, request: str) -> NvmlReply:
        """Ask every GPU; the error of a GPU is in its entry."""
        try:
            count = _within(0, MAX_GPUS)(self._nvml.nvmlDeviceGetCount())
        except (self._error, ValueError) as error:
            return NvmlReply(error=f"cannot find the GPUs: {error}; see nvidia-smi and dmesg")
        cards = [_Card(self._nvml, index) for index in range(count)]
        if request == "list":
            driver, cuda = self._versions()
            return NvmlReply(gpus=_distinct([card.info(driver, cuda) for card in cards]))
        return NvmlReply(usage=[entry for card in cards for entry in card.usages()])

    def _versions(self) -> tuple[str, str]:
        nvml, ask = self._nvml, _Answers(self._nvml)
        number = ask("", nvml.nvmlSystemGetCudaDriverVersion_v2, read=_within(1000, 1_000_000)) or 0
        cuda = f"{number // 1000}.{number % 1000 // 10}" if number else ""
        return ask("", nvml.nvmlSystemGetDriverVersion, read=_text) or "", cuda


class _Answers:
    """Asks about a single card; `odd` names the questions that got an error or nonsense."""

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        self._absent = tuple(
            getattr(nvml, f"NVMLError_{name}")
            for name in ("NotSupported", "FunctionNotFound", "NoPermission")
        )
        self._fatal = (nvml.NVMLError_GpuIsLost, nvml.NVMLError_ResetRequired)
        self.odd: list[str] = []

    def __call__(self, what: str, call: Callable[..., Any], *args: object, read: Callable[[Any], Any]) -> Any:
        """Give the answer as converted by `read`, or None.

        Raises:
            NVMLError: the card is lost or must be reset, so further answers would be worthless.
        """
        try:
            return read(call(*args))
        except self._fatal:
            raise
        except self._absent:
            return None
        except Exception as error:  # noqa: BLE001  # undecodable text, and any error of the binding on nonsense
            self.odd.append(f"{what} ({error})")
            return None

    def memory(self, handle: Any) -> tuple[NvmlMemory, bool]:
        """Give the memory, and whether the card uses the machine's memory for want of its own (Grace)."""

        def ask() -> tuple[NvmlMemory, bool]:
            try:
                return _memory(self._nvml.nvmlDeviceGetMemoryInfo(handle)), False
            except self._nvml.NVMLError_NotSupported:
                return _memory_of_machine(), True

        said: tuple[NvmlMemory, bool] | None = self("memory", ask, read=lambda both: both)
        return said or ((None, None), False)


class _Card:
    """A GPU, by its index."""

    def __init__(self, nvml: Any, index: int) -> None:
        self._nvml = nvml
        self._index = index
        self._ask = _Answers(nvml)

    def info(self, driver: str, cuda: str) -> GpuInfo:
        """Give the facts of the GPU that do not change."""
        nvml, ask = self._nvml, self._ask
        try:
            gpu = nvml.nvmlDeviceGetHandleByIndex(self._index)
            capability = ask(
                "compute capability", nvml.nvmlDeviceGetCudaComputeCapability, gpu, read=_version
            )
            place = ask("PCI address", nvml.nvmlDeviceGetPciInfo, gpu, read=_pci) or ""
            minor = ask("minor number", nvml.nvmlDeviceGetMinorNumber, gpu, read=_within(0, 1 << 20))
            minor = minor_of(CARDS, place) if minor is None else minor
            parts = self._parts(gpu)
            (_, total), unified = ask.memory(gpu)
            return GpuInfo(
                index=self._index,
                name=ask("name", nvml.nvmlDeviceGetName, gpu, read=_text) or "",
                uuid=ask("UUID", nvml.nvmlDeviceGetUUID, gpu, read=_uuid) or "",
                vram_mb=total,
                unified=unified,
                driver=driver,
                cuda=cuda,
                compute_capability=capability,
                mig=[told for part in parts or [] if (told := self._part(part, minor))],
                mig_enabled=parts is not None,
                pci_bus_id=place,
                minor=minor,
                odd=ask.odd,
            )
        except self._nvml.NVMLError as error:
            return GpuInfo(index=self._index, driver=driver, cuda=cuda, error=_gpu_error(self._index, error))

    def _part(self, part: Any, minor: int | None) -> MigInstance | None:
        nvml, ask = self._nvml, self._ask
        uuid = ask("UUID of a MIG instance", nvml.nvmlDeviceGetUUID, part, read=_uuid)
        if uuid is None:
            return None  # without a UUID nobody can name the instance
        name = ask("name of a MIG instance", nvml.nvmlDeviceGetName, part, read=_text) or ""
        own = ask("", nvml.nvmlDeviceGetGpuInstanceId, part, read=_within(0, 1 << 20))
        compute = ask("", nvml.nvmlDeviceGetComputeInstanceId, part, read=_within(0, 1 << 20))
        (_, total), _ = ask.memory(part)
        return MigInstance(uuid, name, total, mig_capabilities(CAPABILITIES, minor, own, compute))

    def usages(self) -> list[GpuUsage]:
        """Give the usage of the GPU and of each MIG instance; an instance tells its memory only."""
        nvml, ask, name = self._nvml, self._ask, str(self._index)
        try:
            gpu = nvml.nvmlDeviceGetHandleByIndex(self._index)
            name = ask("", nvml.nvmlDeviceGetUUID, gpu, read=_uuid) or name
            milliwatts = ask("", nvml.nvmlDeviceGetPowerUsage, gpu, read=_within(0, _MAX_MILLIWATTS))
            load = (nvml.nvmlDeviceGetUtilizationRates, gpu)
            heat = (nvml.nvmlDeviceGetTemperature, gpu, nvml.NVML_TEMPERATURE_GPU)
            whole = GpuUsage(
                name,
                *ask.memory(gpu)[0],
                utilisation_pct=ask("", *load, read=lambda rates: _within(0, 100)(rates.gpu)),
                temperature_c=ask("", *heat, read=_within(0, 200)),
                power_w=None if milliwatts is None else milliwatts / 1000,
            )
            parts = [
                GpuUsage(uuid, *ask.memory(part)[0])
                for part in self._parts(gpu) or []
                if (uuid := ask("", nvml.nvmlDeviceGetUUID, part, read=_uuid))
            ]
        except nvml.NVMLError as error:
            return [GpuUsage(name, error=_gpu_error(self._index, error))]
        return [whole, *parts]

    def _parts(self, gpu: Any) -> list[Any] | None:
        """Return the handles of the MIG instances, or None if MIG is off."""
        nvml, ask = self._nvml, self._ask
        if not ask("MIG mode", nvml.nvmlDeviceGetMigMode, gpu, read=lambda mode: _within(0, 1)(mode[0])):
            return None
        most = ask("MIG", nvml.nvmlDeviceGetMaxMigDeviceCount, gpu, read=_within(0, MAX_PARTS))

        def part(place: int) -> Any:
            try:
                return nvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, place)
            except nvml.NVMLError_NotFound:
                # The places have gaps: an instance keeps its number when another instance is destroyed.
                return None

        places = range(MAX_PARTS // 4 if most is None else most)
        return [found for place in places if (found := ask("MIG", part, place, read=lambda one: one))]


def _distinct(gpus: list[GpuInfo]) -> list[GpuInfo]:
    """Remove a UUID that several cards or instances tell: such a UUID names none of them."""
    told = Counter(uuid for gpu in gpus for uuid in (gpu.uuid, *(part.uuid for part in gpu.mig)) if uuid)
    return [
        replace(
            gpu,
            uuid=gpu.uuid if told[gpu.uuid] == 1 else "",
            mig=[part for part in gpu.mig if told[part.uuid] == 1],
            odd=[*gpu.odd, *(["UUID of its own (another card has the same)"] if told[gpu.uuid] > 1 else [])],
        )
        for gpu in gpus
    ]


def _within(low: int, high: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        number = int(value)
        if not low <= number <= high:
            raise ValueError(f"{number} is out of range")
        return number

    return read


def _text(value: Any) -> str:
    text = (value.decode() if isinstance(value, bytes) else str(value)).strip()
    if not text or not text.isprintable():
        raise ValueError("the text is empty or not printable")
    return text[:128]


def _uuid(value: Any) -> str:
    text = _text(value)
    if not _UUID.fullmatch(text):
        raise ValueError(f"{text[:40]!a} is no UUID")
    return text


def _version(value: Any) -> str:
    major, minor = map(_within(0, 999), value)
    return f"{major}.{minor}"


def _pci(pci: Any) -> str:
    domain, bus, device = (
        _within(0, most)(value)
        for value, most in ((pci.domain, (1 << 32) - 2), (pci.bus, 255), (pci.device, 31))
    )
    return f"{domain:04x}:{bus:02x}:{device:02x}.0"


def _memory(said: Any) -> NvmlMemory:
    total = _within(1 << 20, _MAX_BYTES)(said.total)
    used = int(said.used)
    return used >> 20 if 0 <= used <= total else None, total >> 20


def _memory_of_machine() -> NvmlMemory:
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (int(fields[name].split()[0]) >> 10 for name in ("MemTotal", "MemAvailable"))
    return total - free, total


def _gpu_error(index: int, error: Exception) -> str:
    return f"cannot read GPU {index}: {error}; see nvidia-smi and dmesg"


if __name__ == "__main__":
    serve()
