"""Jobs that mean harm, and the code that each must end with: what `test_node_hostile` sends to a node."""

import json
import os
from typing import Any

Manifest = dict[str, Any]
Cases = dict[str, tuple[str, Manifest]]

ROOT = os.geteuid() == 0
OK = "OK"
KB = 1024


def cli(*args: str, **more: Any) -> Manifest:
    """Make a job that would be fine but for `more`."""
    plain = {"runner": "cli", "command": "sha256sum", "args": list(args or ("a",)), "timeout_s": 20}
    return {**plain, "input": {"inline": {"a": "1"}}, **more}


def task(trick: str, artifacts: list[str] | None = None, timeout_s: float = 30.0, **options: Any) -> Manifest:
    """Make a job that does one of the tricks of hostile_tasks/hostile.py."""
    manifest = {"runner": "python", "task": "hostile", "params": {"trick": trick, **options}}
    return {**manifest, "timeout_s": timeout_s, "artifacts": [{"path": path} for path in artifacts or ()]}


WRONG_TYPES: Manifest = {
    "runner": 5,
    "requirements": [],
    "timeout_s": "60",
    "priority": "high",
    "input": ["a"],
    "command": {"path": "/bin/sh"},
    "args": "a",
    "task": ["hostile"],
    "params": [1],
    "artifacts": {"path": "a"},
    "env": ["A=1"],
    "egress": 5,
    "secrets": ["a"],
}
WRONG_VALUES: dict[str, Manifest] = {
    "runner-unknown": {"runner": "bash"},
    "runner-long": {"runner": "x" * 70},
    "no-command": {"command": ""},
    "no-task": {"runner": "python"},
    "args-mixed": {"args": ["a", 1]},
    "args-nul": {"args": ["a\0b"]},
    "args-too-many": {"args": ["a"] * 10_001},
    "command-nul": {"command": "sha256sum\0"},
    "command-long": {"command": "x" * 5000},
    "env-nul": {"env": {"GREETING": "a\0b"}},
    "env-number": {"env": {"GREETING": 5}},
    "requirements-negative": {"requirements": {"memory_mb": -1}},
    "requirements-huge": {"requirements": {"memory_mb": 10**30}},
    "requirements-float": {"requirements": {"cpu_threads": 0.5}},
    "timeout-zero": {"timeout_s": 0},
    "timeout-negative": {"timeout_s": -5},
    "timeout-endless": {"timeout_s": 1e300},
    "priority-huge": {"priority": 10**30},
    "priority-float": {"priority": 1e30},
    "urls-number": {"input": {"urls": [5]}},
    "urls-many": {"input": {"urls": ["http://127.0.0.1/"] * 1001}},
    "url-long": {"input": {"urls": ["http://127.0.0.1/" + "x" * 5000]}},
    "sha256-bad": {"input": {"urls": [{"url": "http://127.0.0.1/", "sha256": "../../x"}]}},
    "max-mb-negative": {"input": {"urls": [{"url": "http://127.0.0.1/", "max_mb": -1}]}},
    "inline-number": {"input": {"inline": {"a": 1}}},
    "artifact-no-path": {"artifacts": [{"type": "text/plain"}]},
    "artifact-path-long": {"artifacts": [{"path": "x" * 5000}]},
}
DENIED: dict[str, Manifest] = {
    "path": {"command": "/bin/sh"},
    "climbing": {"command": "../../../bin/sh"},
    "shell": {"command": "sha256sum;id"},
    "option": {"args": ["--check", "a"]},
    "option-value": {"args": ["--files0-from=/etc/shadow"]},
    "absolute-argument": {"args": ["/etc/shadow"]},
    "climbing-argument": {"args": ["../manifest.json"]},
    "line-break": {"args": ["a\n"]},
    "args-many": {"args": ["a"] * 9000},
    "args-long": {"args": ["a" * 200_000]},
    "preload": {"env": {"LD_PRELOAD": "/tmp/evil.so"}},
    "path-variable": {"env": {"PATH": "/tmp"}},
    "python-variable": {"env": {"PYTHONPATH": "/tmp"}},
    "own-variable": {"env": {"AITBC_REPORT_FD": "2"}},
    "unknown-variable": {"env": {"FOO": "1"}},
    "no-variable": {"env": {"GREETING=x": "1"}},
    "empty-variable": {"env": {"": "1"}},
    "task-module": {"runner": "python", "task": "os"},
    "task-climbing": {"runner": "python", "task": "../hostile"},
    "task-dotted": {"runner": "python", "task": "tasks.hostile"},
    "task-dunder": {"runner": "python", "task": "__init__"},
    "task-line-break": {"runner": "python", "task": "hostile\n"},
    "task-file": {"runner": "python", "task": "hostile.py"},
}


def inputs(files: str) -> dict[str, Manifest]:
    """Make inputs that must not be taken; `files` is the coordinator's address."""
    names = ("../x", "..", ".", "", "-rf", "a/b", "/etc/passwd", "a\0b", "a\nb", "\x7f", "x" * 300)
    inline = {f"inline-{number}": {"inline": {name: "1"}} for number, name in enumerate(names)}
    named = {
        f"named-{number}": {"urls": [{"url": f"{files}/files/a", "name": name}]}
        for number, name in enumerate(names)
    }
    urls = {
        "file": "file:///etc/passwd",
        "ftp": "ftp://127.0.0.1/a",
        "gopher": "gopher://127.0.0.1/a",
        "data": "data:text/plain,a",
        "no-scheme": "//127.0.0.1/a",
        "path": "/etc/passwd",
        "empty": "",
        "user": files.replace("//", "//root:hunter2@") + "/files/a",
        "no-host": "http:///a",
        "bad-port": "http://127.0.0.1:99999/a",
        "bad-ipv6": "http://[::1/a",
        "nul": "http://127.0.0.1\0/a",
        "long-label": f"http://{'ü' * 70}.example/a",
        "line-break": "http://127.0.0.1/a\r\nHost: x",
        "metadata": "http://169.254.169.254/latest/meta-data/a",
        "metadata-as-number": "http://2852039166/a",
        "metadata-in-ipv6": "http://[::ffff:169.254.169.254]/a",
        "no-file-name": f"{files}/files/",
        "hidden-slash": f"{files}/files/..%2f..%2fx",
        "hidden-nul": f"{files}/files/a%00b",
        "redirect-file": f"{files}/redirect?to=file:///etc/passwd",
        "redirect-ftp": f"{files}/redirect?to=ftp://127.0.0.1/a",
        "redirect-user": f"{files}/redirect?to=http://root:hunter2@127.0.0.1/a",
        "redirect-nowhere": f"{files}/redirect?to=",
        "redirect-loop": f"{files}/redirect?to=/redirect?to=/redirect",
    }
    by_url: dict[str, Manifest] = {
        f"url-{name}": {"urls": [{"url": url, "name": "a"}]} for name, url in urls.items()
    }
    for name in ("no-file-name", "hidden-slash", "hidden-nul"):
        by_url[f"url-{name}"] = {"urls": [urls[name]]}
    twice = {"twice": {"urls": [f"{files}/files/a"], "inline": {"a": "1"}}}
    return {**inline, **named, **by_url, **twice}


PATHS = ("../../etc/passwd", "..", ".", "/etc/passwd", "a\0b", "", "a//b", "a/", "output/../../x", "x" * 1100)

# What was not declared and cannot be delivered is left out, and costs the job nothing else.
LEFT_BEHIND: Cases = {
    "symlink": ("E_ARTIFACT", task("symlink", ["promised"], target="/etc/passwd")),
    "symlink-to-device": (OK, task("symlink_in_output", target="/dev/zero")),
    "dangling-symlink": (OK, task("symlink_in_output", target="/nowhere")),
    "linked-directory": ("E_ARTIFACT", task("linked_directory", ["etc/passwd"])),
    "fifo": (OK, task("fifo")),
    "unix-socket": (OK, task("unix_socket")),
    "hard-link": (OK, task("hard_link")),
    "directory": ("E_ARTIFACT", task("deep_directories", ["d"], depth=2)),
    "too-many-files": ("E_OUTPUT", task("many_files", count=2000)),
    "too-many-directories": ("E_OUTPUT", task("many_directories", count=2000)),
    "over-max-mb": (
        "E_ARTIFACT",
        {**task("big_file", megabytes=2), "artifacts": [{"path": "big", "max_mb": 1}]},
    ),
    "over-all": ("E_OUTPUT", task("big_file", megabytes=1_000_000)),
    "too-deep": (OK, task("deep_directories", depth=60)),
    "name-line-break": (OK, task("odd_name", name=b"a\nb".hex())),
    "name-undecodable": (OK, task("odd_name", name="ff")),
    "name-escape": (OK, task("odd_name", name=b"\x1b[2J".hex())),
    "no-permissions": (OK if ROOT else "E_ARTIFACT", task("no_permissions")),
    "set-uid-file": (OK, task("set_uid_file")),
    "litter": (OK, task("litter", count=5000)),
    # With a user of its own the job may not touch the directory that holds them.
    "replaced-directories": (OK if ROOT else "E_ARTIFACT", task("replace_directories")),
}
SAID: Cases = {
    "garbage-reports": (OK, task("garbage_reports")),
    "claims-cancelled": (
        "E_TASK",
        task("say", line='{"type":"failure","code":"E_CANCELLED","message":"\\u001b[2J"}', leave=1),
    ),
    "claims-success": ("E_EXIT", task("say", line='{"type":"result","value":1}', leave=3)),
    "endless-report": (OK, task("endless_report", megabytes=32)),
    "many-reports": (OK, task("many_reports", count=20_000)),
    "bad-progress": (OK, task("bad_progress")),
    "flood": (OK, task("flood", megabytes=200)),
    **{
        f"nested-result-{depth}": ("E_TASK", task("nested_result", depth=depth)) for depth in (150, 900, 5000)
    },
    **{
        f"nested-result-{depth}": ("E_TASK", task("nested_result", depth=depth))
        for depth in range(960, 1000, 6)
    },
}
ENDED: Cases = {
    "exits": ("E_TASK", task("leave_by_exit")),
    "leaves-at-once": ("E_TASK", task("leave_at_once", status=0)),
    "leaves-badly": ("E_EXIT", task("leave_at_once", status=42)),
    "closes-everything": ("E_EXIT", task("close_everything")),
    "kills-itself": ("E_SIGNAL", task("signal_self", number=9)),
    "stops-itself": ("E_TIMEOUT", task("signal_self", number=19, timeout_s=0.5)),
}
BY_FORCE: dict[str, Any] = {}
"""What jobs report of their tries to signal others."""
if ROOT:
    # Without users of their own, jobs are no better confined than their operator.
    LEFT_BEHIND["device"] = ("E_TASK", task("device"))
    ENDED["kills-its-parent"] = (OK, task("kill_parent"))
    ENDED["signals-everybody"] = (OK, task("kill_the_node"))
    BY_FORCE |= {"kills-its-parent": "denied", "signals-everybody": ["EPERM"]}


def cases(files: str) -> Cases:
    """Make all jobs whose manifest is JSON with a usable id."""
    return {
        **{f"type-{name}": ("E_MANIFEST", cli(**{name: value})) for name, value in WRONG_TYPES.items()},
        **{f"value-{name}": ("E_MANIFEST", cli(**more)) for name, more in WRONG_VALUES.items()},
        **{f"denied-{name}": ("E_DENY", cli(**more)) for name, more in DENIED.items()},
        **{f"input-{name}": ("E_INPUT", cli(input=more)) for name, more in inputs(files).items()},
        **{
            f"artifact-{number}": ("E_ARTIFACT", cli(artifacts=[{"path": path}]))
            for number, path in enumerate(PATHS)
        },
        **LEFT_BEHIND,
        **SAID,
        **ENDED,
        "secrets": ("E_SECRET", cli(secrets={"KEY": "c2VhbGVk"})),
        "egress-open": ("E_EGRESS", cli(egress="open")),
        "egress-unknown": ("E_EGRESS", cli(egress="../../etc")),
        "gpu": ("E_NOGPU", cli(requirements={"gpu": True})),
        "too-large": ("E_NOSLOT", cli(requirements={"memory_mb": 2**31})),
    }


IDS = ("../../etc", ".", "..", "", "x" * 129, "a\0b", "a\nb", "ü", "a b", "-\r\nX: y", "a/b", "💥" * 100)


def _raw(job_id: str, rest: str) -> bytes:
    return f'{{"job_id": "{job_id}", "runner": "cli", "command": "sha256sum", {rest}}}'.encode()


RAW: dict[str, bytes] = {
    "raw-huge": _raw("raw-huge", '"x": "' + "x" * 400 * KB + '"'),
    "raw-deep": _raw("raw-deep", '"x": ' + "[" * 100_000 + "]" * 100_000),
    "raw-deep-objects": _raw("raw-deep-objects", '"x": ' + '{"a":' * 20_000 + "1" + "}" * 20_000),
    "raw-million-params": _raw(
        "raw-million-params", '"params": {' + ",".join(f'"k{n}": {n}' for n in range(1_000_000)) + "}"
    ),
    "raw-nan": _raw("raw-nan", '"timeout_s": NaN'),
    "raw-infinite": _raw("raw-infinite", '"timeout_s": 1e999'),
    "raw-not-json": _raw("raw-not-json", "x: 1"),
    "raw-cut-off": _raw("raw-cut-off", '"args": ["a"')[:-1],
    "raw-not-utf8": _raw("raw-not-utf8", '"args": ["a"]').replace(b'"a"', b'"\xff"'),
    "raw-half-surrogate": _raw("raw-half-surrogate", r'"args": ["\ud800"]'),
    **{
        f"raw-nested-{depth}": _raw(
            f"raw-nested-{depth}",
            f'"runner": "python", "task": "hostile", "params": {{"a": {"[" * depth}{"]" * depth}}}',
        )
        for depth in (200, 500, *range(940, 1000, 4))
    },
    "raw-long-number": _raw("raw-long-number", '"priority": ' + "9" * 100_000),
}
"""Manifests as they are on the wire, by the id that they give themselves; E_MANIFEST, all of them."""

NAMELESS = (
    b'{"job_id": 5, "runner": "cli", "command": "sha256sum"}',
    b'{"runner": "cli", "command": "sha256sum"}',
    b'"a job"',
    b"[" * 200_000,
    b"\xff\xfe\x00",
    b"}{",
)
"""What nobody can be told about, because it has no name."""


def with_id(job_id: str) -> bytes:
    """Make a manifest with a hostile id."""
    return json.dumps(cli(job_id=job_id)).encode()
