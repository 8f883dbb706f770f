"""The node's configuration: /etc/aitbc/miner/config.yaml and its AITBC_MINER_* overrides, read once, frozen.

The structs define the keys and their defaults; etc/config.yaml explains each key to the operator.
"""

import hashlib
import re
import socket
from collections.abc import Iterator, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from aitbc_miner.config.document import BadField, Fault, Parse, read_document
from aitbc_miner.config.units import Duration
from aitbc_miner.config.values import (
    is_loopback,
    parse_base_url,
    parse_ca_file,
    parse_listen,
    parse_proxy,
    parse_redis_url,
    parse_socket,
    parse_textfile,
)
from aitbc_miner.identity.credentials import parse_source

MACHINE_ID = Path("/etc/machine-id")
SLOTS_DIR = Path("/etc/aitbc/miner/slots.d")
"""The default; without files in the directory, the node derives the slots from the machine."""
_MACHINE_ID = re.compile(r"[0-9a-fA-F]{32}")
_NODE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

Seconds = Annotated[float, Meta(gt=0, le=86_400)]
WholeMegabytes = Annotated[int, Meta(ge=0, le=2**31)]
Positive = Annotated[int, Meta(ge=1, le=2**31)]
UserName = Annotated[
    str, Meta(pattern=r"^[a-z_][a-z0-9_-]{0,30}\Z", description="the name of a user, such as aitbc")
]
ModuleName = Annotated[
    str,
    Meta(
        pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*\Z",
        description="the name of a module, such as numpy or scipy.fft",
    ),
]
ReceiptKey = Annotated[
    str,
    Meta(
        pattern=r"^[A-Za-z0-9_-]{43}\Z",
        description="a public Ed25519 key as receipts name it, 43 of A-Z a-z 0-9 _ -",
    ),
]
Mode = Literal["required", "auto"]
ModeOrOff = Literal["required", "auto", "off"]


def read_machine_id(path: Path = MACHINE_ID) -> str:
    """Give the text of the machine-id file; empty if the file cannot be read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def is_machine_id(text: str) -> bool:
    """Whether a text is a real id, and not empty or "uninitialized" as in images of many machines."""
    return bool(_MACHINE_ID.fullmatch(text)) and len(set(text)) > 1


def derive_node_id(machine_id_path: Path = MACHINE_ID) -> str:
    """Derive a stable node id. The machine-id, confidential by machine-id(5), cannot be computed from it."""
    machine_id = read_machine_id(machine_id_path)
    seed = "aitbc-miner" + (machine_id if is_machine_id(machine_id) else socket.gethostname())
    return f"node-{hashlib.sha256(seed.encode()).hexdigest()[:12]}"


def _parse_node_id(value: object) -> str:
    if value is None:
        return derive_node_id()
    if not isinstance(value, str) or not _NODE_ID.fullmatch(value):
        raise ValueError("must be text of 1 to 64 characters A-Z a-z 0-9 . _ -, or null")
    return value


class GiveUp(Struct, frozen=True):
    """When the node believes the coordinator's refusals of a job or report, and when the node tries again."""

    refusals: Annotated[int, Meta(ge=1, le=1000)] = 5
    over_s: Annotated[float, Meta(ge=0, le=86_400)] = 600.0
    again_s: Annotated[float, Meta(gt=0, le=31_536_000)] = 86_400.0


class CoordinatorSection(Struct, frozen=True):
    """The coordinator and the calls to it. `auth_token` names the token's source, never the token.

    For aitbc-v1 only: `price` is the node's lowest price for a unit, `share` its part of the calls that the
    coordinator accepts from one address, `receipt_keys` the keys that may sign receipts (empty: any key).
    """

    base_url: Annotated[str, Parse(parse_base_url)]
    auth_token: Annotated[str, Parse(parse_source)]
    dialect: Literal["bootstrap", "aitbc-v1"] = "bootstrap"
    auth_scheme: Literal["bearer", "api_key"] = "bearer"
    tls_verify: bool = True
    ca_file: Annotated[Path, Parse(parse_ca_file)] | None = None
    connect_timeout_s: Seconds = 10.0
    timeout_s: Seconds = 20.0
    poll_interval_s: Seconds = 3.0
    allow_http: bool = False
    region: Annotated[str, Meta(min_length=1, max_length=64)] | None = None
    price: Annotated[float, Meta(ge=0, le=1_000_000)] | None = None
    share: Annotated[float, Meta(gt=0, le=1)] = 1.0
    receipt_keys: tuple[ReceiptKey, ...] = ()
    max_manifest_kb: Annotated[int, Meta(ge=1, le=65_536)] = 256
    max_input_mb: WholeMegabytes = 10_240
    give_up: GiveUp = GiveUp()
    allow_private_inputs: bool = False
    proxy: Annotated[str, Parse(parse_proxy)] | None = None
    proxy_auth: Annotated[str, Parse(parse_source)] | None = None

    def __post_init__(self) -> None:
        if (
            self.base_url.startswith("http:")
            and not self.allow_http
            and (self.proxy or not is_loopback(self.base_url))
        ):
            remedy = "use https, or set coordinator.allow_http: true on a network that you trust"
            raise BadField("base_url", f"is {self.base_url!r}, which sends the token unencrypted; {remedy}")
        if self.dialect == "bootstrap" and self.auth_scheme != "bearer":
            raise BadField(
                "auth_scheme",
                f"is {self.auth_scheme}, but the dialect bootstrap knows bearer only; use bearer",
            )
        if self.ca_file and not self.tls_verify:
            raise BadField("ca_file", "has no effect while tls_verify is false; remove one of the two keys")
        _check_proxy(self)


class InputsSection(Struct, frozen=True):
    """How inputs are fetched. A `proxy` resolves their addresses, so the node cannot check the addresses."""

    proxy: Annotated[str, Parse(parse_proxy)] | None = None
    proxy_auth: Annotated[str, Parse(parse_source)] | None = None

    def __post_init__(self) -> None:
        _check_proxy(self)


def _check_proxy(section: CoordinatorSection | InputsSection) -> None:
    if section.proxy_auth and not section.proxy:
        raise BadField("proxy_auth", "has no effect without proxy; set proxy, or remove proxy_auth")


class BackoffSection(Struct, frozen=True):
    """The waits after failures: doubling from min_s up to max_s."""

    min_s: Seconds = 5.0
    max_s: Seconds = 120.0

    def __post_init__(self) -> None:
        if self.min_s > self.max_s:
            raise BadField(
                "min_s", f"is {self.min_s:g}, above max_s ({self.max_s:g}); lower min_s or raise max_s"
            )


class HeartbeatSection(Struct, frozen=True):
    """How often the node sends a heartbeat."""

    interval_s: Seconds = 15.0
    jitter_pct: Annotated[float, Meta(ge=0, le=50)] = 10.0
    backoff: BackoffSection = BackoffSection()


class CliRunnerSection(Struct, frozen=True):
    """Jobs that are commands."""

    enable: bool = True
    allowlist_dirs: tuple[Path, ...] = (Path("/etc/aitbc/miner/allowlist.d"),)


class PythonRunnerSection(Struct, frozen=True):
    """Jobs that are Python tasks.

    `venv` is the virtual environment of the tasks (null: the miner's own). `preload` are the modules that a
    waiting process of each slot imports in advance.
    """

    enable: bool = True
    task_paths: tuple[Path, ...] = (Path("/usr/local/lib/aitbc/miner/tasks"),)
    venv: Path | None = None
    preload: tuple[ModuleName, ...] = ()


class RunnersSection(Struct, frozen=True):
    """The kinds of jobs that this node takes."""

    cli: CliRunnerSection = CliRunnerSection()
    python: PythonRunnerSection = PythonRunnerSection()


class WorkspaceSection(Struct, frozen=True):
    """The jobs' directories, their lifetime, and the limits on the files of a job."""

    root: Path = Path("/var/lib/aitbc/miner/jobs")
    keep_success: Duration = 86_400.0
    keep_failed: Duration = 604_800.0
    min_free_mb: WholeMegabytes = 2048
    min_free_inodes: Annotated[int, Meta(ge=0, le=2**31)] = 10_000
    reserve_mb: WholeMegabytes = 64
    max_log_mb: Positive = 64
    max_artifacts_mb: Positive = 10_240
    max_artifacts: Positive = 1000
    max_job_mb: Positive | None = 20_480
    max_job_files: Positive | None = 200_000


class QueueSection(Struct, frozen=True):
    """The queue of jobs to retry and reports to resend. The node's own database is always at `path`.

    `url` and `password` (its source) are for redis, which a fleet may share. A node that does not renew its
    lease on a job for `lease_s` may lose the job to other nodes.
    """

    backend: Literal["sqlite", "redis"] = "sqlite"
    path: Path = Path("/var/lib/aitbc/miner/queue.db")
    url: Annotated[str, Parse(parse_redis_url)] | None = None
    password: Annotated[str, Parse(parse_source)] | None = None
    lease_s: Annotated[float, Meta(ge=1, le=86_400)] = 60.0
    max_attempts: Positive = 5

    def __post_init__(self) -> None:
        if self.backend == "redis" and self.url is None:
            raise BadField("url", "is not set; set an address for redis, such as redis://127.0.0.1:6379/0")


class PrivilegesSection(Struct, frozen=True):
    """The users of the processes; job_user `per-slot` means one user for each slot."""

    mode: Mode = "required"
    service_user: UserName = "aitbc"
    job_user: UserName = "per-slot"


class SandboxSection(Struct, frozen=True):
    """Whether jobs must run in a sandbox, and the MiB of its /tmp and /dev/shm."""

    mode: ModeOrOff = "required"
    tmp_mb: Annotated[int, Meta(ge=1, le=1 << 20)] = 256
    shm_mb: Annotated[int, Meta(ge=1, le=1 << 20)] = 256


class CgroupSection(Struct, frozen=True):
    """Whether cgroups must enforce the limits."""

    mode: ModeOrOff = "required"


class ShutdownSection(Struct, frozen=True):
    """How SIGTERM treats running jobs; `drain` waits up to grace_s."""

    mode: Literal["handover", "drain", "kill"] = "handover"
    grace_s: Annotated[float, Meta(ge=0, le=86_400)] = 300.0


class SecretsSection(Struct, frozen=True):
    """The key that opens secrets sealed for this node."""

    pkcs11: Annotated[str, Meta(max_length=4096)] | None = None


class TelemetrySection(Struct, frozen=True):
    """The address of /healthz and /metrics; port 0 takes a free port.

    `textfile` also gets the metrics, for node_exporter's textfile collector; its name must end in .prom.
    """

    listen: Annotated[str, Parse(parse_listen)] = "127.0.0.1:9464"
    textfile: Annotated[Path, Parse(parse_textfile)] | None = None


class ControlSection(Struct, frozen=True):
    """The socket for aitbc-minerctl."""

    socket: Annotated[Path, Parse(parse_socket)] = Path("/run/aitbc-miner/control.sock")


class LoggingSection(Struct, frozen=True):
    """The least level to log; without a path, to standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    json: bool = True
    path: Path | None = None


class Config(Struct, frozen=True):
    """All of config.yaml. `node_id` is never empty: its default is derived from the machine-id."""

    coordinator: CoordinatorSection
    node_id: Annotated[str, Parse(_parse_node_id)] = msgspec.field(default_factory=derive_node_id)
    heartbeat: HeartbeatSection = HeartbeatSection()
    runners: RunnersSection = RunnersSection()
    slots_dir: Path = SLOTS_DIR
    services_dir: Path = Path("/etc/aitbc/miner/services.d")
    egress_dir: Path = Path("/etc/aitbc/miner/egress.d")
    inputs: InputsSection = InputsSection()
    workspace: WorkspaceSection = WorkspaceSection()
    queue: QueueSection = QueueSection()
    privileges: PrivilegesSection = PrivilegesSection()
    sandbox: SandboxSection = SandboxSection()
    cgroup: CgroupSection = CgroupSection()
    shutdown: ShutdownSection = ShutdownSection()
    secrets: SecretsSection = SecretsSection()
    telemetry: TelemetrySection = TelemetrySection()
    control: ControlSection = ControlSection()
    logging: LoggingSection = LoggingSection()

    def sources(self) -> list[str]:
        """Give the sources of the operator's secrets, such as `env:NAME`."""
        there, inputs = self.coordinator, self.inputs
        named = (there.auth_token, there.proxy_auth, inputs.proxy_auth, self.queue.password)
        return [source for source in named if source]


_WITHOUT_EFFECT = ("egress_dir", "privileges.job_user", "secrets.pkcs11")
_AITBC_ONLY = ("services_dir", "coordinator.price", "coordinator.share", "coordinator.receipt_keys")


def load_config(path: Path, environ: Mapping[str, str]) -> tuple[Config | None, list[Fault], list[str]]:
    """Read the configuration file and its overrides in `environ`.

    Returns:
        The configuration, or None when there are faults; every fault; and warnings about keys that were
        changed but have no effect in this version.
    """
    faults: list[Fault] = []
    config = read_document(path, Config, faults, env_overrides=environ)
    return config, faults, list(_warnings(config)) if config else []


def _warnings(config: Config) -> Iterator[str]:
    there = config.coordinator
    defaults = Config(CoordinatorSection(there.base_url, there.auth_token, allow_http=True))
    unused = dict.fromkeys(
        _WITHOUT_EFFECT, " in this version; remove the key until a later version supports it"
    )
    if there.dialect != "aitbc-v1":
        cause = f" with coordinator.dialect: {there.dialect}; remove the key, or set dialect: aitbc-v1"
        unused |= dict.fromkeys(_AITBC_ONLY, cause)
    for key, cause in unused.items():
        look_up = attrgetter(key)
        if look_up(config) != look_up(defaults):
            yield f"{key} has no effect{cause}"
