"""A strict double of the deployed AITBC coordinator: its dialect, limits and traps, with faults.

In a test:

    with MockAitbc() as mock:
        job_id = mock.submit({"type": "wordstats", "text": "a b a"})
        ...                                       # a node with coordinator.base_url = mock.url
        mock.wait(lambda ledger: ledger.job(job_id).state == "COMPLETED", timeout=10)

By hand: `python tools/mock_coordinator.py --dialect aitbc-v1 --listen 127.0.0.1:8203 --jobs DIR`.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from tools.mock.aitbc.auth import Gate
from tools.mock.aitbc.handler import AitbcDesk, AitbcHandler
from tools.mock.aitbc.ledger import AitbcLedger
from tools.mock.aitbc.records import AitbcJob, AitbcReport, Miner
from tools.mock.aitbc.wire import Windows
from tools.mock.bootstrap.records import Call
from tools.mock.exchange import Boundary, no_boundary
from tools.mock.faults import AITBC_ENDPOINTS, Faults
from tools.mock.server import MockServer

if TYPE_CHECKING:
    from tools.mock.aitbc.receipts import Signer

T = TypeVar("T")
KEY = "demo-key-0123456789"
OF_JOB = frozenset({"payload", "constraints", "ttl_seconds", "payment_amount", "job_id"})


class MockAitbc(MockServer):
    """A coordinator of the dialect `aitbc-v1` for one test or demo.

    `keys`: the API keys of miners. `window_s`: the length of a minute of the rate limits. `receipts`: answer
    each result with a receipt signed by `receipt_key`. `boundary` is called before and after each call: see
    `exchange.Boundary`.
    """

    api = "/v1"

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
        signer = _signer() if receipts else None
        self.receipt_key = signer.key_id if signer else None
        self.ledger = AitbcLedger(signer.receipt if signer else None)
        self._gate = Gate(keys, jwt_secret)
        desk = AitbcDesk(
            ledger=self.ledger,
            faults=Faults(AITBC_ENDPOINTS),
            gate=self._gate,
            windows=Windows(window_s) if rate_limits else None,
            verbose=verbose,
            boundary=boundary,
        )
        super().__init__((host, port), AitbcHandler, desk)

    def token(self, sub: str = "node-1", role: str = "miner", ttl_s: float = 3600) -> str:
        """Return a JSON web token; the role `client` is for the calls of clients."""
        return self._gate.token(sub, role, ttl_s)

    def submit(
        self,
        payload: dict[str, Any],
        *,
        constraints: dict[str, Any] | None = None,
        ttl_seconds: float = 900,
        payment_amount: float | None = None,
        job_id: str | None = None,
    ) -> str:
        """Queue a job and return its id. Raises ValueError: the id is taken, or a constraint is unknown."""
        return self.ledger.submit(
            job_id, ttl_seconds, constraints or {}, payload=payload, payment_amount=payment_amount
        )

    def cancel(self, job_id: str) -> bool:
        """Cancel a job as its client; False if the job has ended."""
        return self.ledger.cancel(job_id)

    def job(self, job_id: str) -> AitbcJob:
        """Return a job as in the database. Raises KeyError: the job is unknown."""
        return self.ledger.job(job_id)

    def jobs(self) -> dict[str, AitbcJob]:
        """Return all jobs, the oldest first."""
        return self.ledger.jobs()

    def miners(self) -> dict[str, Miner]:
        """Return all miners."""
        return self.ledger.miners()

    def strays(self) -> list[AitbcReport]:
        """Return the reports on unknown jobs."""
        return self.ledger.strays()

    def calls(self, endpoint: str | None = None) -> list[Call]:
        """Return the requests of an endpoint, or all requests, the oldest first."""
        return self.ledger.calls(endpoint)

    def forget_miners(self) -> None:
        """Forget all miners, but keep the jobs."""
        self.ledger.forget_miners()

    def wipe(self) -> None:
        """Begin with an empty database, without miners and jobs; keep the counts of the rate limits."""
        self.ledger.wipe()

    def wait(self, predicate: Callable[[AitbcLedger], T], timeout: float = 120.0) -> T:
        """Return the predicate's value as soon as it is true; TimeoutError after `timeout` seconds."""
        return self.ledger.wait(predicate, timeout)

    def _load(self, job: dict[str, Any]) -> str:
        # A payload that stands alone, or a job that has one.
        whole = isinstance(job.get("payload"), dict) and job.keys() <= OF_JOB
        return self.submit(**job) if whole else self.submit(job)


def _signer() -> "Signer":
    # So that all but receipts works with the standard library alone.
    from tools.mock.aitbc.receipts import Signer  # noqa: PLC0415

    return Signer()
