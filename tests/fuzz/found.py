"""Inputs that once broke a promise, by target; they are tried each time."""

FOUND: dict[str, tuple[bytes, ...]] = {
    "manifest": (
        b'{"job_id":"a","runner":"cli","command":"x","retry":{"on":["E_\\u001b' + b"A" * 5000 + b'"]}}',
    ),
    "allowlist": (
        b"command: {path: /\xe2\x80\xa8usr/bin/env, name: tool}\n",
        b'command: {path: /usr/bin/env, name: tool}\nargs: [["[' + b"9" * 5000 + b'"]]\n',
        b'command: {path: /usr/bin/env, name: tool}\nargs: [["' + b"B" * 5000 + b'"]]\n',
    ),
    "frames": (b'private\n\0\0\0\x11{"type":"\\u001f"}',),
    "config": (b"NODE_ID\0\n\x80\0\na: 1",),
    "slots": (
        *(
            b'"\\U99999999"',
            b"slots: [{name: a, kind: cpu, nice: !!int ''}]",
            b"slots: [{name: a, kind: cpu, nice: !!float ''}]",
        ),
        *(
            b"%YAML 1." + b"1" * 5000 + b"\n---\n{}",
            b"slots: [{name: a, kind: cpu, max_runtime_s: 1" + b":0" * 300 + b":0.5}]",
        ),
        *(
            b"slots: [{name: a, kind: cpu, nice: 1" + b":0" * 500_000 + b"}]",
            b'slots: [{name: a, kind: cpu, binds: ["/\\ud800"]}]',
        ),
    ),
    "units": (b"//etc", b"//root"),
    "redis": (
        b"99999999999999999999\n"
        + bytes.fromhex("84a46b696e64a372756ea66a6f625f6964a161a46e6f6465a16ea8617474656d70747300"),
    ),
    "metrics": (
        *(
            b'{"counters":{"jobs":{"OK":9007199254740992}}}',
            b'{"durations":{"steps":{"run":{"sum_s":1.7e308}}}}',
        ),
        b'{"durations":{"steps":{"run":{"sum_s":1.7e308},"x":{"sum_s":1.7e308}}}}',
    ),
    "workers": (b'{"a":{"pid":1,"start":1,"x":' + b"[" * 5000,),
    "process-names": (b"Uid:\t7\t7\t7", b"x\rUid:\t7\t7", b"Uid:\t7\t7\t7\n)"),
    "client": (
        b'\0\0\1\7{"type":"status","node_id":"","version":"\\u001f","pid":0,"up_s":0.0,"accepting":false,"stopping":false,'
        b'"coordinator":{"type":"CoordinatorView","reachable":false,"since_wall":""},"base_url":"","slots":[],"queued":[],'
        b'"pending_reports":0,"finished":{},"problems":[]}',
    ),
    "page-requests": (b"GET http://[x/ HTTP/1.1\r\n\r\n",),
}
