"""A small miner that runs nothing, and its client, for calls of a test to the double."""

from typing import Any, Self

import requests

from tools.mock.aitbc.coordinator import KEY, MockAitbc


class Caller:
    """A caller; every method returns the unchanged response."""

    def __init__(self, mock: MockAitbc, **headers: str) -> None:
        self.mock = mock
        self.session = requests.Session()
        self.session.trust_env = False
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.session.close()

    def call(self, method: str, path: str, body: Any = None, **more: Any) -> requests.Response:
        """Send a request to the API, `body` as JSON."""
        if body is not None:
            more["json"] = body
        headers = {**self.headers, **more.pop("headers", {})}
        more = {"timeout": 10, "allow_redirects": False, **more}
        return self.session.request(method, self.mock.url + path, headers=headers, **more)

    def post(self, path: str, body: Any = None, **more: Any) -> requests.Response:
        """Send a POST."""
        return self.call("POST", path, body, **more)


class Miner(Caller):
    """A miner with an API key, registered by default."""

    def __init__(
        self, mock: MockAitbc, name: str = "m-1", *, concurrency: int | None = 1, **capabilities: Any
    ) -> None:
        super().__init__(mock, X_Api_Key=KEY, X_Miner_ID=name)
        self.name = name
        if concurrency is not None:
            assert self.register(concurrency, **capabilities).status_code == 200

    def register(
        self, concurrency: int = 1, region: str | None = None, **capabilities: Any
    ) -> requests.Response:
        """Register, or register again."""
        body = {"capabilities": capabilities, "concurrency": concurrency, "region": region}
        return self.post("/miners/register", body)

    def beat(self, **body: Any) -> requests.Response:
        """Send a heartbeat."""
        return self.post("/miners/heartbeat", body)

    def poll(self) -> dict[str, Any] | None:
        """Ask for a job."""
        reply = self.post("/miners/poll", {})
        assert reply.status_code in {200, 204}, reply.text
        found: dict[str, Any] | None = reply.json() if reply.status_code == 200 else None
        return found

    def take(self) -> str:
        """Pull a waiting job and return its id."""
        job = self.poll()
        assert job is not None
        return str(job["job_id"])

    def result(self, job_id: str, result: Any = None, **metrics: Any) -> requests.Response:
        """Report a result."""
        body = {"result": {"said": 1} if result is None else result, "metrics": metrics}
        return self.post(f"/miners/{job_id}/result", body)

    def fail(self, job_id: str, message: str = "E_EXIT: it went wrong") -> requests.Response:
        """Report a failure."""
        body = {"error_code": "E_EXIT", "error_message": message, "metrics": {}}
        return self.post(f"/miners/{job_id}/fail", body)

    def listed(self, miner: str | None = None, **query: Any) -> list[str]:
        """List the jobs of a miner and return their ids."""
        reply = self.post(f"/miners/{miner or self.name}/jobs", params=query)
        assert reply.status_code == 200, reply.text
        return [job["job_id"] for job in reply.json()["jobs"]]


class JobClient(Caller):
    """A client that submits jobs."""

    def __init__(self, mock: MockAitbc) -> None:
        super().__init__(mock, Authorization=f"Bearer {mock.token('c-1', 'client')}")

    def state(self, job_id: str) -> str:
        """Read a job and return its state."""
        return str(self.call("GET", f"/jobs/{job_id}").json()["state"])

    def outcome(self, job_id: str) -> int:
        """Ask for a result, and return the status of the reply."""
        return self.call("GET", f"/jobs/{job_id}/result").status_code


def plain(mock: MockAitbc, **headers: str) -> requests.Response:
    """Send a heartbeat with only these headers; their names have `_` for `-`."""
    with Caller(mock, **headers) as caller:
        return caller.post("/miners/heartbeat", {})
