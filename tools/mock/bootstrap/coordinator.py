"""A mock coordinator of dialect `bootstrap` on a loopback port, with faults.

In a test or a demo:

    with MockCoordinator(lease_s=5) as mock:
        mock.submit({"job_id": "j-1", "runner": "cli", "command": "true"})
        ...                                       # a node with coordinator.base_url = mock.url
        mock.wait(lambda ledger: ledger.job("j-1").state == "done", timeout=10)

`mock.aitbc` is the double of dialect `aitbc-v1`.

By hand: `python tools/mock_coordinator.py --listen 127.0.0.1:8000 --jobs DIR`, then look at http://127.0.0.1:8000/.
"""

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

from tools.mock.bootstrap.handler import ROOT, BootstrapDesk, Handler
from tools.mock.bootstrap.ledger import Ledger
from tools.mock.bootstrap.records import Job, Rules
from tools.mock.exchange import Boundary, no_boundary
from tools.mock.faults import Faults
from tools.mock.server import MockServer

T = TypeVar("T")


class MockCoordinator(MockServer):
    """A coordinator of the dialect `bootstrap` for one test or demo.

    Without `out_dir`, artifacts go into a temporary directory. `boundary` is called before and after each
    call: see `exchange.Boundary`. See `Rules` for the other arguments.
    """

    api = ROOT

    def __init__(  # noqa: PLR0913  each has a default and is given by name
        self,
        port: int = 0,
        *,
        host: str = "127.0.0.1",
        bootstrap_token: str = "demo-token",
        lease_s: float = 30.0,
        silent_s: float | None = None,
        ignore_filters: bool = False,
        repeat: bool = False,
        files_dir: Path | None = None,
        out_dir: Path | None = None,
        verbose: bool = False,
        boundary: Boundary = no_boundary,
    ) -> None:
        self.ledger = Ledger(Rules(lease_s, silent_s, ignore_filters, repeat))
        self._life = ExitStack()
        if out_dir is None:
            out_dir = Path(self._life.enter_context(tempfile.TemporaryDirectory(prefix="mock-coordinator-")))
        out_dir.mkdir(parents=True, exist_ok=True)
        self.out_dir = out_dir
        desk = BootstrapDesk(
            ledger=self.ledger,
            faults=Faults(),
            bootstrap_token=bootstrap_token,
            files_dir=files_dir,
            out_dir=out_dir,
            verbose=verbose,
            boundary=boundary,
        )
        super().__init__((host, port), Handler, desk)

    def close(self) -> None:
        """Stop, and delete the temporary directory."""
        super().close()
        self._life.close()

    def submit(self, manifest: dict[str, Any]) -> str:
        """Queue a job and return its id. Raises ValueError: the id is taken."""
        return self.ledger.submit(manifest)

    def submit_raw(self, value: bytes, *, whole_reply: bool = False) -> str:
        """Queue bytes for a pull reply, verbatim as its job or as the whole reply; return their id."""
        return self.ledger.submit_raw(value, whole_reply=whole_reply)

    def cancel(self, job_id: str) -> None:
        """Cancel a job; its node learns of it at the next progress note."""
        self.ledger.cancel(job_id)

    def job(self, job_id: str) -> Job:
        """Return a job as it is now. Raises KeyError: the job is unknown."""
        return self.ledger.job(job_id)

    def wait(self, predicate: Callable[[Ledger], T], timeout: float = 120.0) -> T:
        """Return the predicate's value as soon as it is true; TimeoutError after `timeout` seconds."""
        return self.ledger.wait(predicate, timeout)

    def _load(self, job: dict[str, Any]) -> str:
        return self.submit(job)
