"""`aitbc-miner`: run the node, or look at what it would run with."""

import argparse
import os
import sys
from pathlib import Path

import aitbc_miner
from aitbc_miner.config import load_config
from aitbc_miner.errors import EXIT_CONFIG

CONFIG = Path("/etc/aitbc/miner/config.yaml")


def main() -> int:
    """Run one command and give the exit status."""
    arguments = _parser().parse_args()
    return run(arguments.config)


def run(path: Path) -> int:
    """Run the node in the foreground."""
    config, faults, warnings = load_config(path, os.environ)
    for fault in faults:
        print(fault, file=sys.stderr)
    if config is None:
        return EXIT_CONFIG
    from aitbc_miner.node import run_node  # noqa: PLC0415  # the whole daemon, which nothing else here needs

    return run_node(config, warnings)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="aitbc-miner", description=__doc__)
    parser.add_argument("--version", action="version", version=f"aitbc-miner {aitbc_miner.__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="COMMAND")
    verb = verbs.add_parser("run", help="run the node in the foreground")
    verb.add_argument("--config", type=Path, default=CONFIG)
    return parser


if __name__ == "__main__":
    sys.exit(main())
