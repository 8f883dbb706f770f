"""The configuration: defaults, overrides, and a table of bad files with the exact faults."""

import re
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest

from aitbc_miner.config.settings import Config, CoordinatorSection, QueueSection, derive_node_id, load_config

GOOD = "coordinator: {base_url: 'https://c.example/api/v1', auth_token: 'env:MINER_AUTH'}\n"
SAMPLE = Path(__file__).parents[3] / "etc" / "config.yaml"


def load(
    tmp_path: Path, text: str, environ: Mapping[str, str] = {}
) -> tuple[Config | None, list[str], list[str]]:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    config, faults, warnings = load_config(path, environ)
    assert (config is None) == bool(faults)
    return config, [str(fault).removeprefix(str(path)) for fault in faults], warnings


def faults_of(tmp_path: Path, text: str, environ: Mapping[str, str] = {}) -> list[str]:
    return load(tmp_path, text, environ)[1]


def good(tmp_path: Path, text: str, environ: Mapping[str, str] = {}) -> Config:
    config, faults, _ = load(tmp_path, text, environ)
    assert faults == []
    assert config is not None
    return config


def coordinator(**keys: str) -> str:
    given = {"base_url": "https://c.example", "auth_token": "env:X"} | keys
    return "coordinator:\n" + "".join(f"  {key}: {value}\n" for key, value in given.items())


def test_two_keys_are_enough(tmp_path: Path) -> None:
    config = good(tmp_path, GOOD)
    assert config == Config(coordinator=CoordinatorSection("https://c.example/api/v1", "env:MINER_AUTH"))
    assert config.node_id == derive_node_id()


def test_the_sample_has_every_key_at_its_default() -> None:
    config, faults, warnings = load_config(SAMPLE, {})
    assert faults == []
    assert config is not None
    defaults = Config(
        coordinator=CoordinatorSection("https://coordinator.example/api/v1", "file:/etc/aitbc/miner/token")
    )
    assert config == defaults
    assert warnings == []


def _keys(struct: type[msgspec.Struct]) -> set[str]:
    keys: set[str] = set()
    for field in msgspec.structs.fields(struct):
        keys.add(field.encode_name)
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            keys |= _keys(field.type)
    return keys


def test_the_sample_leaves_no_key_out() -> None:
    assert _keys(Config) <= set(re.findall(r"([a-z_0-9]+):", SAMPLE.read_text()))


def test_it_is_frozen(tmp_path: Path) -> None:
    config = good(tmp_path, GOOD)
    with pytest.raises(AttributeError):
        config.node_id = "x"  # type: ignore[misc]


def test_every_fault_in_one_pass(tmp_path: Path) -> None:
    text = """\
node_id: no/slash
coordinator:
  base_url: ftp://c.example
  auth_token: hunter2hunter2
  dialect: aitbc-v2
  timout_s: 5
  timeout_s: -1
  ca_file: /nonexistent/ca.pem
heartbeat:
  interval_s: 15s
  jitter_pct: 51
  backoff: {min_s: 9, max_s: 3}
runners: {cli: {enable: maybe, allowlist_dirs: [relative]}, python: {preload: ["os;evil"]}}
workspace: {root: jobs, keep_success: 1y, max_log_mb: 0}
queue: {backend: postgres, url: 'http://h', password: hunter2, lease_s: 0, max_attempts: 0}
privileges: {mode: off, service_user: "Root User"}
sandbox: {mode: on}
shutdown: {mode: wait}
telemetry: {listen: 9464}
control: {socket: "/%s"}
logging: {level: INFO, json: 1}
slots_dir: slots.d
secret: {}
""" % ("s" * 200)
    whole = "must be a number above 0 and at most 86400"
    absolute = "must be an absolute path, such as /var/lib/aitbc"
    shown_socket = "/" + "s" * 76 + "..."
    assert faults_of(tmp_path, text) == [
        ":1: node_id: is 'no/slash'; must be text of 1 to 64 characters A-Z a-z 0-9 . _ -, or null",
        (
            ":3: coordinator.base_url: is 'ftp://c.example'; "
            "must be an http or https address, such as https://coordinator.example/api/v1"
        ),
        (
            ":4: coordinator.auth_token: is (hidden); "
            "must be env:NAME, file:/PATH or credential:NAME, never the token itself"
        ),
        ":5: coordinator.dialect: is 'aitbc-v2'; must be one of bootstrap, aitbc-v1",
        ":6: coordinator.timout_s: unknown key; did you mean timeout_s?",
        f":7: coordinator.timeout_s: is -1; {whole}",
        (
            ":8: coordinator.ca_file: is '/nonexistent/ca.pem'; "
            "must be an existing file with CA certificates in PEM form"
        ),
        f":10: heartbeat.interval_s: is '15s'; {whole}",
        ":11: heartbeat.jitter_pct: is 51; must be a number of at least 0 and at most 50",
        ":12: heartbeat.backoff.min_s: is 9, above max_s (3); lower min_s or raise max_s",
        ":13: runners.cli.enable: is 'maybe'; must be true or false",
        f":13: runners.cli.allowlist_dirs[0]: is 'relative'; {absolute}",
        (
            ":13: runners.python.preload[0]: is 'os;evil'; "
            "must be the name of a module, such as numpy or scipy.fft"
        ),
        f":14: workspace.root: is 'jobs'; {absolute}",
        (
            ":14: workspace.keep_success: is '1y'; "
            "must be a duration: a number with its unit (s, m, h, d or w), such as 24h"
        ),
        ":14: workspace.max_log_mb: is 0; must be a whole number of at least 1 and at most 2147483648",
        ":15: queue.backend: is 'postgres'; must be one of sqlite, redis",
        (
            ":15: queue.url: is 'http://h'; "
            "must be redis://HOST:PORT/N, rediss://HOST:PORT/N (TLS) or unix:///PATH?db=N"
        ),
        (
            ":15: queue.password: is (hidden); "
            "must be env:NAME, file:/PATH or credential:NAME, never the token itself"
        ),
        ":15: queue.lease_s: is 0; must be a number of at least 1 and at most 86400",
        ":15: queue.max_attempts: is 0; must be a whole number of at least 1 and at most 2147483648",
        ":16: privileges.mode: is off; must be one of required, auto",
        ":16: privileges.service_user: is 'Root User'; must be the name of a user, such as aitbc",
        ":17: sandbox.mode: is on; must be one of required, auto, off",
        ":18: shutdown.mode: is 'wait'; must be one of handover, drain, kill",
        ":19: telemetry.listen: is 9464; must be host:port, such as 127.0.0.1:9464 or [::1]:9464",
        (
            f":20: control.socket: is '{shown_socket}'; "
            "must be a path of at most 107 bytes, because it names a socket"
        ),
        ":21: logging.level: is 'INFO'; must be one of debug, info, warning, error",
        ":21: logging.json: is 1; must be true or false",
        f":22: slots_dir: is 'slots.d'; {absolute}",
        ":23: secret: unknown key; did you mean secrets?",
    ]


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("", [":1: coordinator: this key is missing; must be a mapping of keys to values"]),
        (
            "coordinator:\n",
            [
                (
                    ":1: coordinator.base_url: this key is missing; "
                    "must be an http or https address, such as https://coordinator.example/api/v1"
                ),
                (
                    ":1: coordinator.auth_token: this key is missing; "
                    "must be env:NAME, file:/PATH or credential:NAME, never the token itself"
                ),
            ],
        ),
        (
            coordinator(auth_token="null"),
            [
                (
                    ":3: coordinator.auth_token: is null; "
                    "must be env:NAME, file:/PATH or credential:NAME, never the token itself"
                )
            ],
        ),
        (
            coordinator(auth_token="pkcs11:token=x;pin-value=1234"),
            [
                (
                    ":3: coordinator.auth_token: is (hidden); "
                    "pkcs11: is not supported; use env:NAME, file:/PATH or credential:NAME"
                )
            ],
        ),
        (
            coordinator(base_url="http://c.example/"),
            [
                (
                    ":2: coordinator.base_url: is 'http://c.example', which sends the token unencrypted; "
                    "use https, or set coordinator.allow_http: true on a network that you trust"
                )
            ],
        ),
        (
            coordinator(base_url="https://user:hunter2@c.example"),
            [
                (
                    ":2: coordinator.base_url: is 'https://(hidden)@c.example'; must have no user, "
                    "password, ? or #; set the token's source in coordinator.auth_token"
                )
            ],
        ),
        (
            coordinator(tls_verify="false", ca_file="/etc/passwd"),
            [":5: coordinator.ca_file: has no effect while tls_verify is false; remove one of the two keys"],
        ),
        (
            coordinator(dialect="other"),
            [":4: coordinator.dialect: is 'other'; must be one of bootstrap, aitbc-v1"],
        ),
    ],
)
def test_bad_files(tmp_path: Path, text: str, faults: list[str]) -> None:
    assert faults_of(tmp_path, text) == faults


@pytest.mark.parametrize(
    "url",
    [
        "https://",
        "https:///x",
        "c.example",
        "//c.example",
        "https://c:99999",
        "https://c:x",
        "https://[::1",
        "'https://c e'",
        "7",
        "[]",
        "https://c\\x",
    ],
)
def test_bad_addresses(tmp_path: Path, url: str) -> None:
    (fault,) = faults_of(tmp_path, coordinator(base_url=url))
    assert fault.endswith("must be an http or https address, such as https://coordinator.example/api/v1")


@pytest.mark.parametrize(
    "url",
    [
        "https://c",
        "https://[2001:db8::1]:8443/x",
        "http://127.0.0.1:8000",
        "http://127.9.9.9",
        "http://[::1]:1/a",
        "http://localhost",
    ],
)
def test_good_addresses(tmp_path: Path, url: str) -> None:
    assert good(tmp_path, coordinator(base_url=f"'{url}/'")).coordinator.base_url == url


@pytest.mark.parametrize(
    "host", ["localhost.evil.example", "127.0.0.1.evil.example", "0.0.0.0", "10.0.0.1", "127001"]
)
def test_http_is_for_loopback(tmp_path: Path, host: str) -> None:
    (fault,) = faults_of(tmp_path, coordinator(base_url=f"http://{host}"))
    assert "sends the token unencrypted" in fault
    assert good(tmp_path, coordinator(base_url=f"http://{host}", allow_http="true")).coordinator.allow_http


@pytest.mark.parametrize(
    "url",
    [
        "redis://queue.example:6379/0",
        "redis://[::1]",
        "rediss://queue.example/3",
        "unix:///run/redis/redis.sock?db=2",
    ],
)
def test_a_fleet_shares_a_redis_server(tmp_path: Path, url: str) -> None:
    text = f"queue: {{backend: redis, url: '{url}', password: 'file:/etc/p', lease_s: 30, max_attempts: 2}}\n"
    queue = good(tmp_path, GOOD + text).queue
    assert (queue.backend, queue.url, queue.password) == ("redis", url, "file:/etc/p")
    assert (queue.lease_s, queue.max_attempts, queue.path) == (30, 2, QueueSection().path)


@pytest.mark.parametrize(
    "url",
    [
        "redis://",
        "unix://",
        "'unix:'",
        "redis://h:x",
        "redis://h:99999",
        "'redis://h /0'",
        "h:6379",
        "7",
        "[]",
    ],
)
def test_what_is_no_address_of_a_redis_server(tmp_path: Path, url: str) -> None:
    (fault,) = faults_of(tmp_path, GOOD + f"queue: {{url: {url}}}")
    assert fault.endswith("must be redis://HOST:PORT/N, rediss://HOST:PORT/N (TLS) or unix:///PATH?db=N")


def test_the_redis_backend_needs_an_address_without_its_password(tmp_path: Path) -> None:
    assert faults_of(tmp_path, GOOD + "queue: {backend: redis}") == [
        ":2: queue.url: is not set; set an address for redis, such as redis://127.0.0.1:6379/0"
    ]
    (fault,) = faults_of(tmp_path, GOOD + "queue: {backend: redis, url: 'redis://:hunter2@h'}")
    assert fault.endswith("must have no user and password; set the password's source in queue.password")
    assert "hunter2" not in fault


def test_the_textfile_is_one_that_node_exporter_reads(tmp_path: Path) -> None:
    config = good(tmp_path, GOOD + "telemetry: {textfile: /var/lib/aitbc/miner/m.prom}")
    assert config.telemetry.textfile == Path("/var/lib/aitbc/miner/m.prom")
    for name, said in {"/x/m.txt": "must end in .prom", "m.prom": "must be an absolute path"}.items():
        (fault,) = faults_of(tmp_path, GOOD + f"telemetry: {{textfile: {name}}}")
        assert f"telemetry.textfile: is '{name}'; {said}" in fault


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "[::1]:9464", "localhost:65535"])
def test_where_to_listen(tmp_path: Path, listen: str) -> None:
    assert good(tmp_path, GOOD + f"telemetry: {{listen: '{listen}'}}").telemetry.listen == listen


@pytest.mark.parametrize("listen", ["localhost", ":9464", "127.0.0.1:65536", "::1:9464", "a b:1", "x:y"])
def test_where_not_to_listen(tmp_path: Path, listen: str) -> None:
    (fault,) = faults_of(tmp_path, GOOD + f"telemetry: {{listen: '{listen}'}}")
    assert (
        fault
        == f":2: telemetry.listen: is '{listen}'; must be host:port, such as 127.0.0.1:9464 or [::1]:9464"
    )


def test_modes_need_no_quotes(tmp_path: Path) -> None:
    config = good(tmp_path, GOOD + "sandbox: {mode: off}\ncgroup: {mode: off}\n")
    assert (config.sandbox.mode, config.cgroup.mode) == ("off", "off")


def test_overrides(tmp_path: Path) -> None:
    environ = {
        "AITBC_MINER_NODE_ID": "node-7",
        "AITBC_MINER_COORDINATOR__TIMEOUT_S": "30",
        "AITBC_MINER_HEARTBEAT__BACKOFF__MIN_S": "1",
        "AITBC_MINER_RUNNERS__PYTHON__TASK_PATHS": "[/a, /b]",
        "AITBC_MINER_WORKSPACE__KEEP_FAILED": "2d",
        "MINER_AUTH": "x",
    }
    config = good(tmp_path, GOOD, environ)
    assert config.node_id == "node-7"
    assert config.coordinator.timeout_s == 30
    assert config.heartbeat.backoff.min_s == 1
    assert config.runners.python.task_paths == (Path("/a"), Path("/b"))
    assert config.workspace.keep_failed == 172_800


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("node_id", "12345", "12345"),
        ("node_id", "NO", "NO"),
        ("coordinator.region", "NO", "NO"),
        ("coordinator.region", "1e3", "1e3"),
        ("coordinator.region", "a: b", "a: b"),
        ("coordinator.region", "null", None),
        ("coordinator.base_url", "https://[::1]:8443", "https://[::1]:8443"),
        ("telemetry.listen", "[::]:9464", "[::]:9464"),
        ("telemetry.listen", "null", "127.0.0.1:9464"),
        ("telemetry.textfile", "/x/#1.prom", Path("/x/#1.prom")),
        ("coordinator.tls_verify", "NO", False),
        ("coordinator.price", "0.5", 0.5),
        ("sandbox.mode", "off", "off"),
        ("workspace.max_job_mb", "null", None),
        ("workspace.max_job_mb", "", 20_480),
        ("workspace.keep_success", "0", 0.0),
        ("logging.level", " ", "info"),
        ("runners.python.preload", "", ()),
        ("runners.python.preload", "null", ()),
    ],
)
def test_the_text_of_an_override_is_the_value(tmp_path: Path, key: str, text: str, value: object) -> None:
    """For a key with one value, whatever YAML would make of it; empty is the default, over the file's too."""
    file = GOOD + "logging: {level: debug}\nworkspace: {max_job_mb: 7}\n"
    config: object = good(tmp_path, file, {"AITBC_MINER_" + key.replace(".", "__").upper(): text})
    for name in key.split("."):
        config = getattr(config, name)
    assert config == value


def test_an_empty_override_of_a_key_without_a_default(tmp_path: Path) -> None:
    (fault,) = faults_of(tmp_path, GOOD, {"AITBC_MINER_COORDINATOR__BASE_URL": ""})
    assert "__BASE_URL: coordinator.base_url: is empty, and this key has no default; must be" in fault


def test_faulty_overrides(tmp_path: Path) -> None:
    environ = {
        "AITBC_MINER_COORDINATOR__TIMOUT_S": "3",
        "AITBC_MINER_COORDINATOR__AUTH_TOKEN": "hunter2hunter2",
        "AITBC_MINER_LOGGING__LEVEL": "loud",
        "AITBC_MINER_HEARTBEAT__BACKOFF__MIN_S": "500",
    }
    assert faults_of(tmp_path, GOOD, environ) == [
        (
            "AITBC_MINER_COORDINATOR__TIMOUT_S: unknown variable; "
            "did you mean AITBC_MINER_COORDINATOR__TIMEOUT_S?"
        ),
        (
            "AITBC_MINER_COORDINATOR__AUTH_TOKEN: coordinator.auth_token: is (hidden); "
            "must be env:NAME, file:/PATH or credential:NAME, never the token itself"
        ),
        (
            "AITBC_MINER_HEARTBEAT__BACKOFF__MIN_S: heartbeat.backoff.min_s: is 500, above max_s (120); "
            "lower min_s or raise max_s"
        ),
        "AITBC_MINER_LOGGING__LEVEL: logging.level: is 'loud'; must be one of debug, info, warning, error",
    ]


def test_overrides_alone_make_a_configuration(tmp_path: Path) -> None:
    environ = {
        "AITBC_MINER_COORDINATOR__BASE_URL": "https://c.example",
        "AITBC_MINER_COORDINATOR__AUTH_TOKEN": "env:X",
    }
    assert good(tmp_path, "", environ).coordinator == CoordinatorSection("https://c.example", "env:X")


def test_a_missing_file() -> None:
    config, faults, warnings = load_config(Path("/nonexistent/config.yaml"), {})
    assert (config, warnings) == (None, [])
    assert list(map(str, faults)) == [
        "/nonexistent/config.yaml: cannot read this file: No such file or directory"
    ]


def test_warnings_about_what_has_no_effect(tmp_path: Path) -> None:
    text = """\
queue: {path: /var/lib/q.db, max_attempts: 5}
secrets: {pkcs11: "pkcs11:token=x"}
privileges: {job_user: nobody}
services_dir: /srv
workspace: {keep_success: 1h, keep_failed: 7d, min_free_mb: 1}
sandbox: {mode: "off"}
"""
    _, _, warnings = load(tmp_path, GOOD + text)
    assert warnings == [
        "privileges.job_user has no effect in this version; remove the key until a later version supports it",
        "secrets.pkcs11 has no effect in this version; remove the key until a later version supports it",
        "services_dir has no effect with coordinator.dialect: bootstrap; remove the key, or set dialect: "
        "aitbc-v1",
    ]


def test_the_node_id_is_stable_and_not_the_machine_id(tmp_path: Path) -> None:
    path = tmp_path / "machine-id"
    path.write_text("0123456789abcdef0123456789abcdef\n")
    name = derive_node_id(path)
    assert name == derive_node_id(path) == "node-4c54970a6e7f"
    path.write_text("f123456789abcdef0123456789abcdef\n")
    assert derive_node_id(path) != name


@pytest.mark.parametrize("content", [None, "", "uninitialized\n", "0" * 32])
def test_the_node_id_without_a_machine_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    path = tmp_path / "machine-id"
    if content is not None:
        path.write_text(content)
    monkeypatch.setattr("socket.gethostname", lambda: "host-a")
    first = derive_node_id(path)
    monkeypatch.setattr("socket.gethostname", lambda: "host-b")
    assert re.fullmatch("node-[0-9a-f]{12}", first)
    assert derive_node_id(path) != first
