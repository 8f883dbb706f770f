"""The program `tools/mock_coordinator.py`: a double of a coordinator, to try a node by hand."""

import argparse
import inspect
import signal
import sys
from pathlib import Path

from tools.mock import faults
from tools.mock.aitbc.coordinator import KEY, MockAitbc
from tools.mock.bootstrap.coordinator import MockCoordinator

EPILOG = """\
GET / shows nodes and jobs, GET /state.json the same for programs. Faults are switched on with POST /_faults:

    curl -H 'Content-Type: application/json' http://HOST:PORT/_faults \\
      -d '{"endpoint": "result", "kind": "status:503:5", "times": 3}'     without times for ever
    curl -H 'Content-Type: application/json' http://HOST:PORT/_faults -d '{"clear": true}'

Endpoints of bootstrap: register, heartbeat, pull, ack, progress, result, fail, files.
Endpoints of aitbc-v1: register, heartbeat, poll, result, fail, jobs (a miner's list), leave, client.

aitbc-v1 does as the AITBC coordinator was seen to do, limits and traps included. Its clients' calls (POST
/v1/jobs, GET /v1/jobs/ID, GET /v1/jobs/ID/result, POST /v1/jobs/ID/cancel) take the token that it prints.

"""
DIALECTS = ("bootstrap", "aitbc-v1")
OF_DIALECT = {
    "bootstrap": ("files", "out", "lease_s", "silent_s", "ignore_filters", "repeat"),
    "aitbc-v1": ("receipts", "no_rate_limits"),
}


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
        description="A coordinator to try the miner against.",
        epilog=EPILOG + inspect.cleandoc(faults.__doc__ or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--dialect",
        choices=DIALECTS,
        default=DIALECTS[0],
        help="dialect of the coordinator (default: bootstrap)",
    )
    add(
        "--listen",
        type=_address,
        default="127.0.0.1:0",
        metavar="HOST:PORT",
        help="address; port 0 is a free port (default)",
    )
    add(
        "--jobs",
        type=_folder,
        metavar="DIR",
        help="queue the jobs in DIR (*.json, *.yaml) at the start. bootstrap: manifests; a manifest without"
        " job_id becomes job-0001 and so on. aitbc-v1: payloads, or objects with payload and optionally"
        " constraints, ttl_seconds, payment_amount, job_id",
    )
    add(
        "--token",
        metavar="TEXT",
        help="the bootstrap token (default: demo-token), or the API key of aitbc-v1"
        f" (default: {KEY}); all users of this machine can see the value",
    )
    add("--verbose", action="store_true", help="print every request on stderr")
    _add_bootstrap(parser.add_argument_group("bootstrap"))
    add = parser.add_argument_group("aitbc-v1").add_argument
    add(
        "--receipts",
        action="store_true",
        help="answer results with receipts; the program prints the public key of their signatures",
    )
    add("--no-rate-limits", action="store_true", help="accept any number of calls a minute")
    options = parser.parse_args(argv)
    others = [name for dialect, names in OF_DIALECT.items() if dialect != options.dialect for name in names]
    for name in others:
        if getattr(options, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} is not for dialect {options.dialect}")
    return options


def _add_bootstrap(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--files",
        type=_folder,
        metavar="DIR",
        help="serve DIR at /files/, and at /flaky/ with one interruption",
    )
    add("--out", type=Path, metavar="DIR", help="keep artifacts in DIR (default: until the program ends)")
    add(
        "--lease-s",
        type=float,
        default=30.0,
        metavar="N",
        help="queue a job again if its ack does not arrive in time",
    )
    silent = "queue an acked job again if its node is silent for so long"
    add("--silent-s", type=float, metavar="N", help=silent)
    add("--ignore-filters", action="store_true", help="hand out jobs even if they do not fit the node")
    add("--repeat", action="store_true", help="answer every pull with the same job")


def _bootstrap(options: argparse.Namespace) -> MockCoordinator:
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


def _aitbc(options: argparse.Namespace) -> MockAitbc:
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
    mock = _aitbc(options) if options.dialect == "aitbc-v1" else _bootstrap(options)
    try:
        if options.jobs:
            mock.load(options.jobs)
        mock.start()
        print(f"listening on {mock.url}", flush=True)
        if isinstance(mock, MockAitbc):
            _tell(mock)
        signal.sigwait(endings)
    except (OSError, ValueError) as error:
        print(f"cannot run the mock coordinator: {error}", file=sys.stderr)
        return 1
    finally:
        mock.close()
    return 0


def _tell(mock: MockAitbc) -> None:
    print(f"client token, valid for a day: {mock.token('demo-client', 'client', 86400)}", flush=True)
    if mock.receipt_key:
        print(f"public key of receipts: {mock.receipt_key}", flush=True)
