"""A coordinator to try the miner against: the whole `bootstrap` dialect on a loopback port, and its faults.

In a test or a demo:

    with MockCoordinator(lease_s=5) as mock:
        mock.submit({"job_id": "j-1", "runner": "cli", "command": "true"})
        ...                                       # a node with coordinator.base_url = mock.url
        mock.wait(lambda ledger: ledger.job("j-1").state == "done", timeout=10)

By hand: `python tools/mock_coordinator.py --listen 127.0.0.1:8000 --jobs DIR`, then look at http://127.0.0.1:8000/.
"""

import argparse
import inspect
import json
import signal
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self, TypeVar

# So that it also runs as a script, from anywhere.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import mock_faults
from tools.mock_aitbc import KEY, MockAitbc
from tools.mock_faults import Faults
from tools.mock_handler import ROOT, Desk, Handler
from tools.mock_ledger import Ledger
from tools.mock_records import Job, Rules
from tools.mock_server import Boundary, Listener, no_boundary

T = TypeVar("T")

EPILOG = """\
GET / shows nodes and jobs, GET /state.json the same for programs. Faults are switched on with POST /_faults:

    curl -H 'Content-Type: application/json' http://HOST:PORT/_faults \\
      -d '{"endpoint": "pull", "kind": "status:503:5", "times": 3}'     without times for ever
    curl -H 'Content-Type: application/json' http://HOST:PORT/_faults -d '{"clear": true}'

Endpoints: register, heartbeat, pull, ack, progress, result, fail, files.

"""


class MockCoordinator:
    """A coordinator for one test or demo; a context manager, or `start` and `close`.

    Port 0 takes a free one and keeps it over `stop` and `start`, which play an outage: the ledger stays.
    Without `out_dir`, artifacts go into a directory that ends with it. `boundary` is asked around each call:
    see `mock_handler.Boundary`. See `Rules` for the other arguments.
    """

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
        self.faults = Faults()
        self._life = ExitStack()
        if out_dir is None:
            out_dir = Path(self._life.enter_context(tempfile.TemporaryDirectory(prefix="mock-coordinator-")))
        out_dir.mkdir(parents=True, exist_ok=True)
        self.out_dir = out_dir
        desk = Desk(self.ledger, self.faults, bootstrap_token, files_dir, out_dir, verbose, boundary)
        handler = type("DeskHandler", (Handler,), {"desk": desk})
        self._listener = Listener(host, port, handler, desk.stopping)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def root(self) -> str:
        """Where the page and the files are: `root + "/files/NAME"`."""
        return self._listener.root

    @property
    def url(self) -> str:
        """The API root, what a node has as `coordinator.base_url`."""
        return self.root + ROOT

    def start(self) -> None:
        """Listen.

        Raises:
            OSError: the port is taken.
        """
        self._listener.start()

    def stop(self) -> None:
        """Stop listening and cut every connection."""
        self._listener.stop()

    def close(self) -> None:
        """Stop, and delete what is temporary."""
        self.stop()
        self._life.close()

    def submit(self, manifest: dict[str, Any]) -> str:
        """Queue a job and return its id; ValueError when that is taken."""
        return self.ledger.submit(manifest)

    def submit_raw(self, value: bytes, *, whole_reply: bool = False) -> str:
        """Queue bytes to send verbatim as the job of a pull reply, or as all of it; returns their id."""
        return self.ledger.submit_raw(value, whole_reply=whole_reply)

    def load(self, folder: Path) -> list[str]:
        """Queue every manifest of a directory (*.json, *.yaml, *.yml), by name.

        Raises:
            ValueError: a file is no manifest, with its name.
        """
        files = sorted(path for path in folder.iterdir() if path.suffix in {".json", ".yaml", ".yml"})
        return [self.submit(_read_manifest(path)) for path in files]

    def cancel(self, job_id: str) -> None:
        """Cancel a job; the node that runs it learns so at its next progress note."""
        self.ledger.cancel(job_id)

    def job(self, job_id: str) -> Job:
        """Return a job as it is now; KeyError when there is none."""
        return self.ledger.job(job_id)

    def wait(self, predicate: Callable[[Ledger], T], timeout: float = 10.0) -> T:
        """Return the predicate's value as soon as it is true; TimeoutError after `timeout` seconds."""
        return self.ledger.wait(predicate, timeout)

    def fault(self, endpoint: str, kind: str, times: int | None = None) -> None:
        """Make calls go wrong as `mock_faults` describes; ValueError for what it does not know."""
        self.faults.add(endpoint, kind, times)

    def clear_faults(self) -> None:
        """Let everything work again."""
        self.faults.clear()


def _read_manifest(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8")
    try:
        manifest = json.loads(text) if path.suffix == ".json" else _yaml(text)
        json.dumps(manifest)
    except (ValueError, TypeError) as error:
        raise ValueError(f"cannot load job {path}: {error}") from error
    if not isinstance(manifest, dict):
        raise ValueError(f"cannot load job {path}: it is not an object")  # noqa: TRY004  a bad value in a file
    return manifest


def _yaml(text: str) -> object:
    import yaml  # noqa: PLC0415  so that all but YAML works with the standard library alone

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal():
        raise argparse.ArgumentTypeError(f"cannot listen on {text!r}: it is not HOST:PORT")
    return host, int(port)


def _folder(text: str) -> Path:
    path = Path(text)
    try:
        next(path.iterdir(), None)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot read {text}: {error.strerror}") from error
    return path


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="A coordinator to try the miner against (bootstrap dialect).",
        epilog=EPILOG + inspect.cleandoc(mock_faults.__doc__ or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--listen",
        type=_address,
        default="127.0.0.1:0",
        metavar="HOST:PORT",
        help="port 0 takes a free one (default)",
    )
    add(
        "--jobs",
        type=_folder,
        metavar="DIR",
        help="queue the manifests in DIR (*.json, *.yaml), read once, at the start;"
        " one without job_id becomes job-0001 and so on",
    )
    add("--files", type=_folder, metavar="DIR", help="serve DIR at /files/ and, broken off once, at /flaky/")
    add("--out", type=Path, metavar="DIR", help="keep artifacts here (default: until it ends)")
    add("--token", help="the bootstrap token (default: demo-token); all here see it")
    add(
        "--lease-s",
        type=float,
        default=30.0,
        metavar="N",
        help="queue a job again when it is not acked in time",
    )
    add(
        "--silent-s", type=float, metavar="N", help="queue an acked job again when its node is silent so long"
    )
    add("--ignore-filters", action="store_true", help="hand out jobs whether they fit the node or not")
    add(
        "--dialect",
        choices=("bootstrap", "aitbc-v1"),
        default="bootstrap",
        help="which coordinator to be; of aitbc-v1, --token is the API key (default: demo-key-0123456789),"
        " and --jobs has payloads (*.json)",
    )
    add("--receipts", action="store_true", help="aitbc-v1: give signed receipts, and print the key")
    add("--no-rate-limits", action="store_true", help="aitbc-v1: take any number of calls")
    add("--repeat", action="store_true", help="answer every pull with the same job")
    add("--verbose", action="store_true", help="print every request on stderr")
    return parser.parse_args(argv)


def _mock(options: argparse.Namespace) -> MockCoordinator:
    host, port = options.listen
    return MockCoordinator(
        port,
        host=host,
        bootstrap_token=options.token or "demo-token",
        lease_s=options.lease_s,
        silent_s=options.silent_s,
        ignore_filters=options.ignore_filters,
        repeat=options.repeat,
        files_dir=options.files,
        out_dir=options.out,
        verbose=options.verbose,
    )


def _double(options: argparse.Namespace) -> MockAitbc:
    host, port = options.listen
    return MockAitbc(
        port,
        host=host,
        keys=(options.token or KEY,),
        rate_limits=not options.no_rate_limits,
        receipts=options.receipts,
        verbose=options.verbose,
    )


def main(argv: list[str] | None = None) -> int:
    """Run until SIGTERM or SIGINT."""
    options = _arguments(argv)
    # Blocked before any thread starts, so that the signals wait for sigwait below.
    endings = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, endings)
    mock = _double(options) if options.dialect == "aitbc-v1" else _mock(options)
    try:
        if options.jobs:
            mock.load(options.jobs)
        mock.start()
        print(f"listening on {mock.url}", flush=True)
        if isinstance(mock, MockAitbc) and mock.receipt_key:
            print(f"receipts are signed by {mock.receipt_key}", flush=True)
        signal.sigwait(endings)
    except (OSError, ValueError) as error:
        print(f"cannot run the mock coordinator: {error}", file=sys.stderr)
        return 1
    finally:
        mock.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
