"""A small node that runs nothing, for calls of a test to the mock coordinator."""

import hashlib
import json
from typing import Any, Self

import requests

from tools.mock.bootstrap.coordinator import MockCoordinator

TOKEN = "demo-token"
SLOT = {"name": "cpu0", "kind": "cpu", "cpu_threads": 2, "memory_mb": 1024, "vram_mb": 0, "runners": ["cli"]}


def manifest(job_id: str, **more: Any) -> dict[str, Any]:
    """Return the smallest valid manifest, with the keys `more`."""
    return {"job_id": job_id, "runner": "cli", "command": "true", **more}


class Client:
    """A node; every method returns the unchanged response."""

    def __init__(self, mock: MockCoordinator, node_id: str = "node-1", *, register: bool = True) -> None:
        self.mock = mock
        self.node_id = node_id
        self.token = TOKEN
        self.session = requests.Session()
        self.session.trust_env = False
        if register:
            self.token = self.post("/nodes/register", {"node_id": node_id}).json()["node_token"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.session.close()

    def post(self, path: str, body: Any = None, key: str | None = None, **more: Any) -> requests.Response:
        """Send a POST to the API, with the token and optionally an Idempotency-Key."""
        headers = {"Authorization": f"Bearer {self.token}", **more.pop("headers", {})}
        if key:
            headers["Idempotency-Key"] = key
        if body is not None:
            more["json"] = body
        more = {"timeout": 10, "allow_redirects": False, **more}
        return self.session.post(self.mock.url + path, headers=headers, **more)

    def get(self, path: str, **more: Any) -> requests.Response:
        """Send a GET beside the API, without the token."""
        return self.session.get(self.mock.root + path, **{"timeout": 10, "allow_redirects": False, **more})

    def heartbeat(self, **more: Any) -> requests.Response:
        """Send a heartbeat."""
        return self.post("/nodes/heartbeat", {"node_id": self.node_id, "load": 0.5, **more})

    def pull(self, *slots: dict[str, Any], known: tuple[str, ...] = ()) -> Any:
        """Pull a job that fits a slot; return the manifest or None."""
        filters = {"slots": list(slots or [SLOT]), "known": list(known)}
        return self.post("/jobs/pull", {"node_id": self.node_id, "filters": filters}).json()["job"]

    def ack(self, job_id: str) -> requests.Response:
        """Acknowledge a pulled job."""
        named = {"job_id": job_id, "node_id": self.node_id}
        return self.post("/jobs/ack", named, params=named)

    def progress(self, job_id: str, pct: Any = 50, note: Any = "half") -> requests.Response:
        """Send a progress note."""
        return self.post("/jobs/progress", {"job_id": job_id, "pct": pct, "note": note})

    def result(
        self,
        job_id: str,
        files: dict[str, bytes],
        key: str | None = "key-1",
        *,
        metadata: Any = None,
        told: dict[str, bytes] | None = None,
    ) -> requests.Response:
        """Report a result; its metadata lists `told` instead of `files`, or is `metadata` verbatim."""
        listed = [
            {"path": path, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for path, data in (files if told is None else told).items()
        ]
        text = json.dumps({"artifacts": listed}) if metadata is None else metadata
        fields = [("job_id", job_id), ("node_id", self.node_id), ("metadata", text)]
        parts = [(name, (None, value)) for name, value in fields]
        uploads = [("artifact", (path, data)) for path, data in files.items()]
        return self.post("/jobs/result", key=key, files=[*parts, *uploads])

    def fail(self, job_id: Any, key: str | None = "key-1", code: str = "E_EXIT") -> requests.Response:
        """Report a failure."""
        body = {"job_id": job_id, "error_code": code, "error_msg": "it went wrong", "logs_ref": None}
        return self.post("/jobs/fail", body, key)

    def run(self, job_id: str) -> None:
        """Pull and acknowledge a waiting job."""
        assert self.pull()["job_id"] == job_id
        assert self.ack(job_id).status_code == 200
