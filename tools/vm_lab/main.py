"""The command line of the laboratory: a real Debian with systemd in QEMU, see docs/testing.md."""

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from tools.vm_lab import container, qemu
from tools.vm_lab import image as vm_image
from tools.vm_lab.cache import LabError, cache_root, require_packages, say

CHECKOUT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 3600.0
CONSOLE_LINES = 60
# Between the arguments of `test`: pytest once more in the same machine, with what follows.
THEN = "--then"
FIRST = "/lab/first"
VERBS = {
    "run": "run -- COMMAND ARGS as root in /src, the directory of the checkout",
    "test": f"run tests/vm, with arguments for pytest; after {THEN} run pytest again with further arguments",
    "shell": "open a console on this terminal",
    "build": "only make the images",
    "clean": "remove the images",
}


def arguments(words: list[str]) -> argparse.Namespace:
    """Parse the command line; options stand before the verb, arguments of `run` and `test` after it."""
    parser = argparse.ArgumentParser(
        prog="tools/vm", description="A real Debian 12 or 13 with systemd, in QEMU without KVM."
    )
    parser.add_argument(
        "--release", choices=sorted(vm_image.RELEASES), help="default: 13; build and test: both"
    )
    parser.add_argument(
        "--container",
        action="store_true",
        help="use systemd-nspawn instead of QEMU: fast, for root only, with this machine's kernel",
    )
    parser.add_argument(
        "--reports", type=Path, metavar="DIR", help="directory of the reports; default: build/vm/RELEASE"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=TIMEOUT_S,
        metavar="SECONDS",
        help="time-out of run and test; default: %(default)g",
    )
    verbs = "; ".join(f"{verb}: {what}" for verb, what in VERBS.items())
    parser.add_argument("verb", choices=VERBS, metavar="VERB", help=verbs)
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="...")
    parsed = parser.parse_args(words)
    if parsed.command[:1] == ["--"]:
        del parsed.command[0]
    if parsed.verb == "run" and not parsed.command:
        parser.error("run needs a command: tools/vm run -- COMMAND ARGS")
    if parsed.command and parsed.verb not in {"run", "test"}:
        parser.error(f"{parsed.verb} takes no arguments; write options before {parsed.verb}")
    if parsed.container and parsed.verb not in {"run", "test"}:
        parser.error(f"{parsed.verb} is not for a container: only run and test are")
    return parsed


def releases(chosen: argparse.Namespace) -> list[vm_image.Release]:
    """Give the chosen releases in their order."""
    if chosen.release:
        return [vm_image.RELEASES[chosen.release]]
    return list(vm_image.RELEASES.values()) if chosen.verb in {"build", "test"} else [vm_image.RELEASES["13"]]


def command_of(chosen: argparse.Namespace) -> tuple[list[str], dict[str, str]]:
    """Give the command for the machine, and its additional variables."""
    if chosen.verb == "shell":
        size = shutil.get_terminal_size()
        start = f"stty rows {size.lines} cols {size.columns}; exec bash -l"
        return ["sh", "-c", start], {"TERM": os.environ.get("TERM", "vt220")}
    if chosen.verb == "run":
        return chosen.command, {}
    colour = {"PY_COLORS": "1"} if sys.stdout.isatty() else {}
    at = chosen.command.index(THEN) if THEN in chosen.command else len(chosen.command)
    first, then = _pytest(chosen.command[:at]), _pytest(chosen.command[at + 1 :])
    command = first if at == len(chosen.command) else in_turn(first, then)
    return command, {"PYTHONPATH": "/src", **colour}


def _pytest(words: list[str]) -> list[str]:
    named = any(word.startswith("tests/") for word in words)
    return [qemu.GUEST["AITBC_TEST_PYTHON"], "-m", "pytest", *([] if named else ["tests/vm"]), *words]


def in_turn(first: list[str], then: list[str]) -> list[str]:
    """Join two commands. The second may reset the machine; after a reset only the second runs again."""
    script = f"""
if [ "$AITBC_VM_BOOT" = 1 ]; then
  {shlex.join(first)}
  echo $? >{FIRST}
  sync -f {FIRST}
fi
{shlex.join(then)} || exit
exit "$(cat {FIRST})"
"""
    return ["sh", "-c", script]


def session(chosen: argparse.Namespace, release: vm_image.Release) -> int:
    """Boot a machine, run the chosen command in it, and give the exit status."""
    directory = reports_directory(chosen, release)
    image = vm_image.image(cache_root(), release, CHECKOUT)
    with contextlib.ExitStack() as stack:
        files = qemu.Files.make(stack)
        qemu.lay_over(image, files)
        fill(files, chosen)
        started = time.monotonic()
        say(f"booting Debian {release.number}")
        if chosen.container:
            ended = container.run(image, files, chosen.timeout, directory)
            files.saved_console(directory / "console.txt")
            say(f"Debian {release.number} ran {time.monotonic() - started:.0f} s; reports are in {directory}")
            return ended
        if chosen.verb == "shell":
            say("end the machine with `poweroff`, or at once with Ctrl-A x")
            qemu.console(image, files)
            in_time = True
        else:
            in_time = qemu.run(image, files, chosen.timeout)
        status = qemu.take_out(files.reports, directory)
        say(f"Debian {release.number} ran {time.monotonic() - started:.0f} s; reports are in {directory}")
        if chosen.verb == "shell":
            return 0
        console = files.saved_console(directory / "console.txt")
        if not in_time:
            say(f"ended the machine: the command took longer than --timeout {chosen.timeout:g} s")
            return qemu.TIMED_OUT
        if status is None:
            tail = "\n".join(console.splitlines()[-CONSOLE_LINES:])
            say(f"the machine ended without an exit status; its last console output:\n{tail}")
            return qemu.NO_STATUS
        return status


def fill(files: qemu.Files, chosen: argparse.Namespace) -> None:
    """Write the machine's input: the checkout, its wheel, the command."""
    script = qemu.guest_script(*command_of(chosen), live=chosen.verb != "shell" and not chosen.container)
    with tempfile.TemporaryDirectory(prefix="aitbc-vm-") as scratch:
        sources, built, wheels = (Path(scratch, name) for name in ("src", "built", "wheels"))
        qemu.copy(CHECKOUT, sources)
        # setuptools writes into what it builds.
        shutil.copytree(sources, built, symlinks=True)
        wheels.mkdir()
        vm_image.project_wheel(cache_root(), built, wheels)
        qemu.pack(files.payload, sources, wheels, script)


def reports_directory(chosen: argparse.Namespace, release: vm_image.Release) -> Path:
    """Make the directory of the reports; empty it first only if it is the default directory."""
    ours = chosen.reports is None
    base = CHECKOUT / "build" / "vm" if ours else chosen.reports
    directory = base / release.number if ours or len(releases(chosen)) > 1 else base
    try:
        if ours and directory.exists():
            shutil.rmtree(directory)
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LabError(f"cannot keep reports in {directory}: {error.strerror}; use --reports DIR") from error
    return directory


def work(chosen: argparse.Namespace) -> int:
    """Carry out the command and give the exit status: the first status above 0."""
    if chosen.verb == "clean":
        shutil.rmtree(cache_root(), ignore_errors=True)
        return 0
    require_packages()
    if chosen.container:
        container.require()
    if chosen.verb == "build":
        for release in releases(chosen):
            vm_image.image(cache_root(), release, CHECKOUT)
        return 0
    statuses = [session(chosen, release) for release in releases(chosen)]
    return next((status for status in statuses if status), 0)


def main() -> int:
    chosen = arguments(sys.argv[1:])
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        return work(chosen)
    except LabError as error:
        say(str(error))
        return error.status
    except OSError as error:
        say(f"cannot go on: {error}")
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
