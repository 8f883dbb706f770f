"""Kills a node's processes at every step of a job, then checks that no job was lost or done twice.

campaign: real nodes run short jobs of mock coordinators. The tool kills (SIGKILL) supervisor, agent,
heartbeat, a worker or all processes, at the boundary of a step or at random, up to --kills or --minutes. Then
it lets all jobs end, and checks the coordinator's ledger, the node's records and the machine.
outage: the coordinator is away for --minutes while --jobs jobs end.
drop: the coordinator carries out --times calls of /jobs/result, but their answers are lost.
answers: the coordinator answers calls of both dialects with odd statuses and bodies, once or for long, before
or after it carries out the call. The tool tries each pair of these factors, or with --full all combinations.
inject: strace makes single system calls of worker, agent and supervisor fail, or kills the process at the
call, while a job runs on the node. The tool tries some calls, or with --full all calls.

The exit status is 1 if a check fails; the tool then keeps the node's directory and prints its path.
"""

import argparse
import secrets
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from msgspec.structs import replace

from tools.fault_harness.answers import run_all
from tools.fault_harness.campaign import Campaign, Settings, Tally
from tools.fault_harness.checks import KINDS, Finding
from tools.fault_harness.inject import FEW, FULL, MOST, inject, shown
from tools.fault_harness.plan import BOUNDARIES, STEPS, Boundary, Side
from tools.fault_harness.scenarios import Shown, drop, outage

ANSWERED = ("lost", "doubled", "killed", "E_UPLOAD")
DEFAULT_KILLS = 100
KEEP_SAYING_S = 15.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chosen test and print its results; give the exit status."""
    options = _options(argv)
    began = time.monotonic()
    tell = partial(_tell, began, options.verbose)
    match options.what:
        case "outage":
            minutes = 5.0 if options.minutes is None else options.minutes
            return _print_scenario(outage(options.jobs, minutes, tell))
        case "answers":
            return _print_answers(full=options.full, began=began)
        case "drop":
            return _print_scenario(drop(options.times, tell))
        case "inject":
            done = inject(FULL if options.full else FEW, options.most, tell)
            print("\n".join(shown(done)))
            return _print_findings([(done.directory, done.findings)])
    print(f"seed {options.seed}; to repeat these faults: tools/faults {_repeat(options)}", flush=True)
    tallies = run_campaigns(options, tell)
    return print_tallies(tallies, time.monotonic() - began)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools/faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("what", choices=["campaign", "outage", "drop", "answers", "inject"], nargs="?", default="campaign")
    add("--seed", default=secrets.token_hex(4), help="seed of the sequence of faults")
    add("--kills", type=int, help=f"stop after so many kills ({DEFAULT_KILLS}, unless --minutes is given)")
    add("--minutes", type=float, help="stop after so many minutes; outage: the minutes of the outage (5)")
    add("--nodes", type=int, default=2, help="number of nodes at once, each with its own coordinator (2)")
    add("--slots", type=int, default=4, help="number of slots of each node (4)")
    add("--drop-replies", type=float, default=0.0, metavar="P", help="share of answers that get lost")
    add("--disk", type=float, default=0.0, metavar="P", help="share of writes, fsyncs and renames that fail")
    add("--redis", action="store_true", help="keep the queue in a real Redis, and kill and start it too")
    add("--jobs", type=int, default=20, help="outage: number of jobs (20)")
    add("--times", type=int, default=50, help="drop: number of lost answers (50)")
    add("--full", action="store_true", help="answers, inject: try all combinations, about 20 minutes")
    add("--most", type=int, default=MOST, metavar="N", help="inject: the most runs for each call and fault")
    add("-v", "--verbose", action="store_true", help="print each fault")
    options = parser.parse_args(argv)
    if options.kills is None and options.minutes is None:
        options.kills = DEFAULT_KILLS
    return options


def _repeat(options: argparse.Namespace) -> str:
    names = ("seed", "kills", "minutes", "nodes", "slots", "drop_replies", "disk")
    given = {name: getattr(options, name) for name in names if getattr(options, name)}
    words = [f"--{name.replace('_', '-')} {value}" for name, value in given.items()]
    return " ".join([*words, *(["--redis"] if options.redis else [])])


def _tell(began: float, verbose: bool, text: str) -> None:  # noqa: FBT001  # bound once, above
    if verbose:
        print(f"{time.monotonic() - began:8.2f} s  {text}", flush=True)


def _tell_of(tell: Callable[[str], None], name: str, text: str) -> None:
    tell(name + text)


def run_campaigns(options: argparse.Namespace, tell: Callable[[str], None]) -> list[Tally]:
    """Run a campaign on each node, until the number of kills or the time is reached."""
    campaigns: list[Campaign] = []
    stop = threading.Event()
    until = None if options.minutes is None else time.monotonic() + options.minutes * 60

    def enough() -> bool:
        done = sum(campaign.tally.kills.total() for campaign in campaigns)
        over = until is not None and time.monotonic() >= until
        return stop.is_set() or over or (options.kills is not None and done >= options.kills)

    for number in range(options.nodes):
        name = f"node {number}: " if options.nodes > 1 else ""
        settings = Settings(f"{options.seed}/{number}", options.slots, options.drop_replies, options.disk)
        settings = replace(settings, redis=options.redis)
        campaigns.append(Campaign(settings, enough, partial(_tell_of, tell, name)))
    with ThreadPoolExecutor(options.nodes) as pool:
        futures = [pool.submit(campaign.run) for campaign in campaigns]
        try:
            return [future.result() for future in futures]
        finally:
            # Also when this is interrupted: the other nodes are let end as well.
            stop.set()


def print_tallies(tallies: list[Tally], seconds: float) -> int:
    """Print the results of the campaigns; give the exit status."""
    kills = sum((tally.kills for tally in tallies), Counter[str]())
    endings = sum((tally.endings for tally in tallies), Counter[str]())
    passed = sum((tally.passed for tally in tallies), Counter[Boundary]())
    hits = sum((tally.hits for tally in tallies), Counter[Boundary]())
    print(
        f"{kills.total()} kills in {seconds / 60:.1f} min ({kills.total() / seconds:.1f} a second):"
        f" {_list(kills)}"
    )
    print(f"{sum(tally.jobs for tally in tallies)} jobs: {_list(endings)}")
    if dropped := sum(tally.dropped for tally in tallies):
        print(f"{dropped} further answers lost")
    if disk := sum((tally.disk for tally in tallies), Counter[str]()):
        print(f"disk errors: {_list(disk)}")
    print_table(hits, passed)
    missed = [each for tally in tallies for each in tally.missed]
    print(
        f"{len(missed)} faults not made, because no process reached the boundary in time"
        + "".join(f"\n  {m}" for m in missed)
    )
    never = [f"{side} {step}" for step, side in BOUNDARIES if not hits[Boundary(step, side)]]
    print(f"boundaries without a kill: {', '.join(never) or 'none'}")
    return _print_findings([(tally.directory, tally.findings) for tally in tallies])


def print_table(hits: Counter[Boundary], passed: Counter[Boundary]) -> None:
    """Print the number of kills before and after each step, and how often the node took the step."""
    print(f"\n{'step':<12} {'kills before':>12} {'after':>6} {'taken':>7}")
    for step, meaning in STEPS.items():
        before, after = Boundary(step, Side.BEFORE), Boundary(step, Side.AFTER)
        print(f"{step:<12} {hits[before]:>12} {hits[after]:>6} {passed[before]:>7}  {meaning}")
    print()


def _list(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "none"


def _print_scenario(shown: Shown) -> int:
    print("\n".join(shown.said))
    return _print_findings([(shown.directory, shown.findings)])


def _print_answers(*, full: bool, began: float) -> int:
    shown = run_all(full=full)
    found = sum((each.found for _, each in shown), Counter[str]())
    for dialect in dict.fromkeys(dialect for dialect, _ in shown):
        print(f"{dialect}: {sum(each.cases for name, each in shown if name == dialect)} odd answers")
    print("".join(f"  {example}\n" for _, each in shown for example in each.examples), end="")
    print(
        f"in {(time.monotonic() - began) / 60:.1f} min: "
        + ", ".join(f"{found[kind]} {kind}" for kind in ANSWERED)
    )
    return 1 if found else 0


def _print_findings(of_nodes: list[tuple[str, list[Finding]]]) -> int:
    """Print the findings, and remove the directories of nodes without findings."""
    found = Counter(finding.kind for _, findings in of_nodes for finding in findings)
    print(", ".join(f"{found[kind]} {kind}" for kind in KINDS))
    for directory, findings in of_nodes:
        if findings:
            print(f"findings in {directory} (kept):" + "".join(f"\n  {finding}" for finding in findings))
        else:
            shutil.rmtree(directory, ignore_errors=True)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
