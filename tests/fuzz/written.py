"""What people write: the configuration, slots, allowlists, credentials, sizes and durations."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
from hypothesis import strategies as st

from aitbc_miner.allowlist.entries import load_allowlist
from aitbc_miner.config import units
from aitbc_miner.config.document import Fault
from aitbc_miner.config.settings import load_config
from aitbc_miner.errors import JobError
from aitbc_miner.identity.credentials import CredentialError, read_credential
from aitbc_miner.probe.topology import MachineFacts
from aitbc_miner.slots.derive import lay_out
from aitbc_miner.slots.reader import read_slots, to_yaml
from aitbc_miner.slots.spec import SlotSpec
from aitbc_miner.util import trust
from tests.fuzz.engine import Check, Target, directory, fit_to_print, only, simply
from tests.fuzz.mutations import YAML, joined, mutated, parted, words

ETC = Path(__file__).parents[2] / "etc"
MACHINE = MachineFacts(cpus=tuple(range(8)), memory_bytes=1 << 36, gpu_ids=[("0", "GPU-1")])

CONFIG = b"""\
node_id: null
coordinator:
  base_url: https://coordinator.example/api/v1
  auth_token: env:TOKEN
  timeout_s: 20
heartbeat: {interval_s: 15, backoff: {min_s: 5, max_s: 120}}
runners:
  cli: {enable: true, allowlist_dirs: [/etc/allow]}
  python: {task_paths: [/a], preload: [numpy, scipy.fft]}
workspace: {root: /jobs, keep_success: 24h, min_free_mb: 2048}
queue: {backend: redis, url: "redis://h:1/0"}
sandbox: {mode: off, tmp_mb: 256}
telemetry: {listen: "127.0.0.1:9464"}
control: {socket: /run/c.sock}
logging: {level: info, json: true}
"""
ALLOW = b"""\
command: {path: /usr/bin/env, name: tool}
args:
  - ["-y"]
  - ["-i", "[a-z]+\\\\.(mp4|wav)"]
  - ["(a+)+b"]
  - ["-t", "[0-9]{1,5}"]
max_total_args_len: 4096
max_runtime_s: 7200
max_output_mb: 5.5
env: [OMP_NUM_THREADS]
"""
GRAMMAR = b"""\
command: {path: /usr/bin/env, name: video}
leading: ["-nostdin"]
sections:
  - name: inputs
    min: 1
    max: 4
    options:
      - {name: [-ss, --start], value: {float: {min: 0, max: 86400}}, write: [separate, equals]}
    operands:
      - {name: "-i", value: {input: {suffixes: [.mp4, .wav]}}}
  - name: outputs
    order: any
    options:
      - {name: "-crf", value: {int: {min: 0, max: 51}}}
      - {name: "-vf", value: {regex: 'scale=[0-9]{1,4}:(a+)+b'}}
      - {name: "-an", max: 3}
      - {name: "-c", value: {enum: [aac, copy]}, write: [joined]}
      - {name: "--title", value: {text: {max_length: 20, chars: "A-Za-z0-9 -"}}}
    exclusive: [["-an", "-c"]]
    operands:
      - {value: {output: {suffixes: [.mp4, .png], chars: "%"}}, max: 3}
kind: cpu
binds: [/usr/share]
"""
SLOTS = (ETC / "slots.d" / "slots.yaml.sample").read_bytes()
SHORT_SLOTS = (
    b"slots: [{name: a, kind: cpu, cpus: '0-3,5', memory_max: 1.5G, rlimits: {core: 0}},"
    b" {name: g, kind: gpu, gpu: 0}]"
)


def _see_faults(faults: list[Fault]) -> None:
    for fault in faults[:50]:
        fit_to_print(str(fault), most=4000)  # where many keys are allowed, all of them are named


@contextlib.contextmanager
def _config() -> Iterator[Check]:
    with directory() as where:
        file = where / "config.yaml"

        def check(data: bytes) -> None:
            name, value, text = parted(data, 3, b"\0\n")
            file.write_bytes(text)
            # As the environment of a process comes to Python.
            environ = {f"AITBC_MINER_{os.fsdecode(name)}": os.fsdecode(value)} if name else {}
            with only(size=len(data)):
                config, faults, warnings = load_config(file, environ)
                assert (config is None) == bool(faults)
                _see_faults(faults)
                for warning in warnings:
                    fit_to_print(warning)

        yield check


KEYS = words(
    "",
    "",
    "",
    "NODE_ID",
    "COORDINATOR__TIMEOUT_S",
    "HEARTBEAT__BACKOFF",
    "QUEUE__URL",
    "NO_SUCH",
    "SANDBOX__MODE",
)
VALUES = words("1", "x", "[1]", "{min_s: 2}", "off", "~", "redis://h/0")


@contextlib.contextmanager
def _slots() -> Iterator[Check]:
    with directory() as where:

        def check(data: bytes) -> None:
            (where / "slots.yaml").write_bytes(data)
            faults: list[Fault] = []
            with only(size=len(data)):
                specs = read_slots(where, faults)
                if specs and not faults:
                    _see_laid_out(where, specs)
                _see_faults(faults)

        yield check


def _see_laid_out(where: Path, specs: list[SlotSpec]) -> None:
    faults: list[Fault] = []
    laid = lay_out(specs, MACHINE, faults, where)
    _see_faults(faults)
    if faults:
        return
    (where / "slots.yaml").write_text(to_yaml(laid))
    again = read_slots(where, faults)
    assert not faults, [str(fault) for fault in faults]
    # What follows from the machine is not written.
    plain = [msgspec.structs.replace(spec, mems=None) for spec in laid]
    assert [msgspec.to_builtins(spec) for spec in again] == [msgspec.to_builtins(spec) for spec in plain]


@contextlib.contextmanager
def _allowlists() -> Iterator[Check]:
    with directory() as where:

        def check(data: bytes) -> None:
            (where / "tool.yaml").write_bytes(data)
            faults: list[Fault] = []
            warnings: list[Fault] = []
            with only(JobError, size=len(data)):
                allowlist = load_allowlist([where], faults, warnings)
                _see_faults(faults + warnings)
                for name in allowlist.entries:
                    fit_to_print(name)
                    arguments = ["-y", "-i", "a.mp4", "a" * 30 + "c", data[:40].decode("latin-1")]
                    allowlist.permit(name, arguments, INPUTS)

        yield check


@contextlib.contextmanager
def _arguments() -> Iterator[Check]:
    with directory() as where:
        (where / "tool.yaml").write_bytes(ALLOW)
        (where / "video.yaml").write_bytes(GRAMMAR)
        faults: list[Fault] = []
        allowlist = load_allowlist([where], faults, [])
        assert not faults, faults

        def check(data: bytes) -> None:
            command, *arguments = (
                part.decode("utf-8", "surrogatepass" if b"\xed" in data else "replace")
                for part in _pieces(data)
            )
            with only(JobError, size=len(data)):
                allowlist.permit(command, arguments, INPUTS)
                for argument in arguments:
                    assert argument.isprintable()
                    assert "/../" not in argument
                    assert not argument.startswith(("/", "../") if command != "video" else "/")
                    assert "://" not in argument

        yield check


def _pieces(data: bytes) -> list[bytes]:
    try:
        data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        data = data.decode("latin-1").encode()
    return data.split(b"\n")


INPUTS = frozenset({"a.mp4", "b.wav", "-i", "x y.mp4"})
TOOL = words(
    "-y", "-i", "-t", "a.mp4", "b.wav", "12", "aaaaaaaaab", "a" * 40, "-i\t", "/etc/shadow", "é", "--"
)
VIDEO = words(
    *(
        "-ss",
        "1.5",
        "--start=2",
        "-i",
        "a.mp4",
        "-i",
        "b.wav",
        "-crf",
        "5",
        "-vf",
        "scale=1:" + "a" * 30,
        "-an",
        "-caac",
    ),
    *(
        "--title",
        "A b",
        "-",
        "out.mp4",
        "../output/o.mp4",
        "x/%d.png",
        "http://x/a.mp4",
        "concat:a",
        "../../x.mp4",
        "1e3",
    ),
)
GOOD = (
    b"video\n-i\na.mp4\nout.mp4",
    b"video\n-ss\n1\n-i\na.mp4\n-i\nb.wav\n-crf\n5\n-vf\nscale=1:ab\n../output/o.mp4",
)
ARGUMENTS = st.one_of(
    st.lists(TOOL, max_size=12).map(lambda arguments: b"\n".join([b"tool", *arguments])),
    st.lists(VIDEO, max_size=25).map(lambda arguments: b"\n".join([b"video", *arguments])),
    st.sampled_from(GOOD),
)


@contextlib.contextmanager
def _credentials() -> Iterator[Check]:
    with directory() as where:
        file = where / "token"
        file.touch(mode=0o600)

        def check(data: bytes) -> None:
            file.write_bytes(data)
            with only(CredentialError, size=len(data)):
                token, why = _token(f"file:{file}")
                assert token.isascii()
                assert token.isprintable()
                told = data.decode("latin-1").strip()
                assert len(told) < 8 or told not in why

        yield check


def _token(source: str) -> tuple[str, str]:
    """Give the token, or else why there is none."""
    try:
        return read_credential(source, {}).reveal(), ""
    except CredentialError as error:
        fit_to_print(str(error))
        return "", str(error)


def _units(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    with only(ValueError, size=len(data)):
        size = units.parse_size(text)
        assert units.parse_size(units.format_size(size)) == size
    with only(ValueError, size=len(data)):
        seconds = units.parse_duration(text)
        assert abs(units.parse_duration(units.format_duration(seconds)) - seconds) < 1e-6 * max(1.0, seconds)
    with only(ValueError, size=len(data)):
        assert units.parse_percent(text) > 0
    with only(ValueError, size=10_000 + len(data)):
        cpus = units.parse_cpus(text)
        assert not cpus or units.parse_cpus(units.format_cpus(cpus)) == cpus
    with only(ValueError, size=len(data)):
        path = Path(os.path.normpath(f"/{str(trust.parse_bind(text)).lstrip('/')}"))
        for secret in (
            "/proc/1",
            "/etc/aitbc/miner/token",
            "/var/lib/aitbc/x",
            "/root/.ssh",
            "/run/x",
            "/dev/sda",
        ):
            assert not Path(secret).is_relative_to(path), f"{text!r} shows {secret}"
            assert not path.is_relative_to(str(Path(secret).parent)), f"{text!r} is in {secret}"
    if trust.may_be_set(text):
        fit_to_print(text)
        assert "=" not in text


UNITS = words(
    *(
        "16G",
        "1.5TiB",
        "512",
        "0",
        "24h",
        "7d",
        "90s",
        "0.5m",
        "400%",
        "0-3,5",
        "9-1",
        "0-9999",
        "1,,2",
        " 5 ",
        "٣",
    ),
    *(
        "/srv/models",
        "//etc",
        "/a/../b",
        "/srv/./x",
        "//root",
        "/",
        "OMP_NUM_THREADS",
        "LD_PRELOAD",
        "PATH",
        "a=b",
    ),
)

TARGETS = (
    Target(
        "config", joined(KEYS, mutated(VALUES, YAML), mutated(st.just(CONFIG), YAML), by=b"\0\n"), _config
    ),
    Target("slots", mutated(st.sampled_from([SLOTS, SHORT_SLOTS, SHORT_SLOTS, SHORT_SLOTS]), YAML), _slots),
    Target(
        "allowlist", mutated(st.just(ALLOW), (*YAML, b'"("', b'"(?i)a{1000}"', b'"\\\\p{L}"')), _allowlists
    ),
    Target("arguments", mutated(ARGUMENTS, (b"\n", b"tool", b"/usr/bin/env")), _arguments),
    Target("credential", mutated(words("t" * 40, "t\r\n", "a b")), _credentials),
    Target("units", mutated(UNITS), simply(_units)),
)
