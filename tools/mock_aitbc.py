"""A strict double of the AITBC coordinator-api on a loopback port, as it was observed, and its faults.

In a test:

    with MockAitbc() as mock:
        job_id = mock.submit({"type": "wordstats", "text": "a b a"})
        ...                                 # a node with coordinator.dialect aitbc-v1 and base_url = mock.url
        mock.wait(lambda ledger: ledger.job(job_id).state == "COMPLETED", timeout=10)

By hand: `python tools/mock_coordinator.py --dialect aitbc-v1`.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, TypeVar

from tools.mock_aitbc_handler import AitbcDesk, AitbcHandler, make_token
from tools.mock_aitbc_ledger import AitbcLedger
from tools.mock_aitbc_receipts import Signer
from tools.mock_aitbc_records import AitbcCall, AitbcJob, Miner, Said
from tools.mock_faults import AITBC_ENDPOINTS, Faults
from tools.mock_server import Boundary, Listener, no_boundary

T = TypeVar("T")
KEY = "demo-key-0123456789"


class MockAitbc:
    """A coordinator for one test or demo; a context manager, or `start` and `close`.

    Port 0 takes a free one and keeps it over `stop` and `start`, which play an outage: the database stays.
    `keys` are the API keys of miners. The limits are those of one address, in `window_s` seconds.
    """

    def __init__(  # noqa: PLR0913  each has a default and is given by name
        self,
        port: int = 0,
        *,
        host: str = "127.0.0.1",
        keys: tuple[str, ...] = (KEY,),
        jwt_secret: str = "demo-secret-0123456789",
        rate_limits: bool = True,
        window_s: float = 60.0,
        receipts: bool = False,
        verbose: bool = False,
        boundary: Boundary = no_boundary,
    ) -> None:
        signer = Signer() if receipts else None
        self.receipt_key = signer.key_id if signer else None
        self.ledger = AitbcLedger(signer, window_s, rate_limits=rate_limits)
        self.faults = Faults(AITBC_ENDPOINTS)
        self._secret = jwt_secret
        desk = AitbcDesk(self.ledger, self.faults, keys, jwt_secret, verbose, boundary)
        handler = type("AitbcDeskHandler", (AitbcHandler,), {"desk": desk})
        self._listener = Listener(host, port, handler, desk.stopping)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def url(self) -> str:
        """The API root, what a node has as `coordinator.base_url`."""
        return self._listener.root + "/v1"

    def start(self) -> None:
        """Listen; OSError when the port is taken."""
        self._listener.start()

    def stop(self) -> None:
        """Stop listening and cut every connection."""
        self._listener.stop()

    close = stop

    def submit(
        self,
        payload: dict[str, Any],
        *,
        constraints: dict[str, Any] | None = None,
        ttl_seconds: float = 900,
        payment_amount: float | None = None,
        job_id: str | None = None,
    ) -> str:
        """Queue a job as a client does, and return its id."""
        return self.ledger.submit(payload, constraints or {}, ttl_seconds, payment_amount, job_id)

    def load(self, folder: Path) -> list[str]:
        """Queue each file of a directory (*.json), by name: a payload, or an object with `payload` in it.

        Raises:
            ValueError: a file is no JSON object, with its name.
        """
        jobs: list[str] = []
        for path in sorted(folder.glob("*.json")):
            try:
                said = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"cannot load job {path}: {error}") from error
            if not isinstance(said, dict):
                raise ValueError(f"cannot load job {path}: it is not an object")  # noqa: TRY004  a bad value
            job: dict[str, Any] = said if isinstance(said.get("payload"), dict) else {"payload": said}
            jobs.append(
                self.submit(
                    job["payload"],
                    constraints=job.get("constraints"),
                    ttl_seconds=job.get("ttl_seconds", 900),
                    payment_amount=job.get("payment_amount"),
                )
            )
        return jobs

    def job(self, job_id: str) -> AitbcJob:
        """Return a job as the database has it; KeyError when there is none."""
        return self.ledger.job(job_id)

    def jobs(self) -> dict[str, AitbcJob]:
        """Return all jobs."""
        return self.ledger.jobs()

    def miners(self) -> dict[str, Miner]:
        """Return all miners."""
        return self.ledger.miners()

    def strays(self) -> list[Said]:
        """Return the reports on jobs that were not known."""
        return self.ledger.strays()

    def calls(self, endpoint: str | None = None) -> list[AitbcCall]:
        """Return the requests, of one endpoint or of all."""
        return self.ledger.calls(endpoint)

    def cancel(self, job_id: str) -> bool:
        """Cancel a job as its client; False when it is over."""
        return self.ledger.cancel(job_id)

    def wipe(self) -> None:
        """Begin with an empty database: no miners, no jobs."""
        self.ledger.wipe(jobs=True)

    def forget_miners(self) -> None:
        """Forget all miners, and no job."""
        self.ledger.wipe(jobs=False)

    def token(self, sub: str = "node-1", role: str = "miner", ttl_s: float = 3600) -> str:
        """Make a JSON web token of this coordinator."""
        return make_token({"sub": sub, "role": role, "exp": time.time() + ttl_s}, self._secret)

    def wait(self, predicate: Callable[[AitbcLedger], T], timeout: float = 10.0) -> T:
        """Return the predicate's value as soon as it is true; TimeoutError after `timeout` seconds."""
        return self.ledger.wait(predicate, timeout)

    def fault(self, endpoint: str, kind: str, times: int | None = None) -> None:
        """Make calls go wrong as `mock_faults` describes; ValueError for what it does not know."""
        self.faults.add(endpoint, kind, times)

    def clear_faults(self) -> None:
        """Let everything work again."""
        self.faults.clear()
