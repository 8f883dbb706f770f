"""Kills a node's processes at every step, again and again, and checks that no job is lost or done twice."""

import argparse
import secrets
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from tools.fault_campaign import Campaign, Settings, Tally


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/faults", description=__doc__)
    parser.add_argument("--seed", default=secrets.token_hex(4))
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--drop-replies", type=float, default=0.0)
    parser.add_argument("--disk", type=float, default=0.0)
    parser.add_argument("-v", "--verbose", action="store_true")
    o = parser.parse_args()
    print("seed", o.seed)
    began = time.monotonic()
    campaigns: list[Campaign] = []
    def enough() -> bool:
        return sum(c.tally.kills.total() for c in campaigns) >= o.kills
    def tell(n: int, text: str) -> None:
        if o.verbose: print(f"{time.monotonic()-began:7.2f} node {n} {text}", flush=True)
    for n in range(o.nodes):
        campaigns.append(Campaign(Settings(f"{o.seed}/{n}", o.slots, o.drop_replies, o.disk), enough, partial(tell, n)))
    with ThreadPoolExecutor(o.nodes) as pool:
        tallies = list(pool.map(lambda c: c.run(), campaigns))
    for t in tallies:
        print(t.directory, dict(t.kills), t.jobs, dict(t.endings), "missed", t.missed)
        for f in t.findings: print("  ", f)
    print(f"{time.monotonic()-began:.1f} s")
    return 0

if __name__ == "__main__":
    sys.exit(main())
