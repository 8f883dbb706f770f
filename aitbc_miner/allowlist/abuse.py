"""Known ways to abuse ordinary programs; `check` warns about them.

An operator who allows a program allows everything that the program can do. The tricks come from GTFOBins and
from the programs' manuals. A program without a warning is not necessarily safe.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from aitbc_miner.allowlist.entries import Entry
from aitbc_miner.allowlist.patterns import Work
from aitbc_miner.allowlist.values import Choice, Regex, TextValue


class Trick(NamedTuple):
    """One way to abuse a program.

    Args:
        programs: a regular expression for the whole name of the program.
        words: one of these arguments suffices; if empty, any arguments do.
        does: the effect, worded to follow "lets jobs".
        unless: the trick fails if `leading` has all of these arguments.
        remedy: the advice to the operator.
    """

    programs: str
    words: tuple[str, ...]
    does: str
    remedy: str
    unless: tuple[str, ...] = ()


LEAVE_OUT = "leave {word} out"

TRICKS = (
    Trick(
        r"(ba|da|k|z|c|tc|fi)?sh|busybox|python[0-9.]*|pypy[0-9.]*|perl[0-9.]*|ruby[0-9.]*|node(js)?|deno|php[0-9.]*"
        r"|lua[0-9.]*|tclsh[0-9.]*|Rscript|R|guile[0-9.-]*|java|groovy|expect|gdb|make|cmake|ninja|awk|[gm]awk|nawk|ed|vim?(\.\w+)?",
        (),
        "run any code: the program is an interpreter",
        "offer a task (docs/tasks.md) or a compiled program instead",
    ),
    Trick(
        r"env|nice|ionice|nohup|timeout|time|stdbuf|setsid|setpriv|xargs|parallel|flock|chroot|unshare|nsenter|taskset"
        r"|numactl|strace|ltrace|script|watch|sudo|doas|su|runuser|systemd-run|bwrap|firejail|proot|entr",
        (),
        "run any other program: the program exists to start others",
        "permit the program that jobs need, not the launcher",
    ),
    Trick(
        r"docker|podman|nerdctl|kubectl|qemu-.*|virsh|systemctl|crontab|at|batch",
        (),
        "have a system service run any code",
        "permit the program that jobs need, not the service's client",
    ),
    Trick(
        r"curl|wget|aria2c|nc(at)?|netcat|socat|ssh|scp|sftp|rsync|ftp|telnet|openssl",
        (),
        "use the network if their slot grants network access",
        "have the node fetch inputs (`input.url` of a job)",
    ),
    Trick(r"find", ("-exec", "-execdir", "-ok", "-okdir"), "run any program by {word}", LEAVE_OUT),
    Trick(r"find", ("-delete", "-fprint", "-fprintf", "-fls"), "write or delete files by {word}", LEAVE_OUT),
    Trick(
        r"(g|bsd)?tar",
        (
            *("--checkpoint-action=exec=sh", "--checkpoint-action", "--to-command", "--to-command=sh"),
            *("-I", "--use-compress-program", "--use-compress-program=sh", "--rsh-command=sh", "-F"),
        ),
        "run any program by {word}",
        LEAVE_OUT,
    ),
    Trick(
        r"(g|bsd)?tar|cpio|unzip|7z[ar]?",
        ("-P", "--absolute-names", "-C", "--directory", "--no-absolute-filenames"),
        "write outside of their directory by {word}",
        LEAVE_OUT,
    ),
    Trick(r"zip", ("-TT", "--unzip-command", "-T"), "run any program by {word}", LEAVE_OUT),
    Trick(
        r"ffmpeg|ffprobe|ffplay",
        (),
        "read any address or file that a playlist names",
        "begin `leading` with -protocol_whitelist file, and allow one input",
        unless=("-protocol_whitelist",),
    ),
    Trick(
        r"ffmpeg|ffprobe",
        ("-f", "-filter_complex_script", "-filter_script", "-init_hw_device", "-attach", "-dump_attachment"),
        "name other files and devices by {word}",
        "give {word} an enum of the needed values, or leave {word} out",
    ),
    Trick(
        r"convert|magick|mogrify|identify|montage|composite|import|display",
        (
            *("-define", "-write", "+write", "-script", "-profile", "-path"),
            *("mvg:a", "msl:a", "label:@a", "@a", "http://a"),
        ),
        "read, write or execute files by {word}",
        "use `input` and `output` with suffixes, which admit no `coder:` and no `@`, and leave {word} out",
    ),
    Trick(
        r"gs|ps2pdf|pdf2ps|epstopdf",
        (),
        "run PostScript, a language that reads and writes files",
        "put -dSAFER into `leading`",
        unless=("-dSAFER",),
    ),
    Trick(
        r"blender",
        ("--python", "-P", "--python-expr", "--python-console", "-y", "--enable-autoexec", "--addons"),
        "run Python by {word}",
        LEAVE_OUT,
    ),
    Trick(
        r"blender",
        (),
        "run the Python code inside a .blend file",
        "put --disable-autoexec and --background into `leading`",
        unless=("--disable-autoexec", "--background"),
    ),
    Trick(r"git", (), "run any program by hooks, aliases and -c", "have the node fetch inputs instead"),
    Trick(
        r"sed|gsed",
        ("-f", "-e", "--expression=1e", "1e sh", "w /tmp/x"),
        "run programs and write files by {word}",
        "permit fixed scripts only: give the operand an `enum`",
    ),
    Trick(
        r"sort",
        ("--compress-program", "--compress-program=sh", "-o", "--output"),
        "run a program or write files by {word}",
        LEAVE_OUT,
    ),
    Trick(
        r"(pdf|xe|lua)?(la)?tex",
        ("-shell-escape", "--shell-escape", "-enable-write18"),
        "run any program by {word}",
        LEAVE_OUT,
    ),
    Trick(
        r"pandoc",
        ("--filter", "-F", "--lua-filter", "-L", "--pdf-engine", "--extract-media"),
        "run any program by {word}",
        LEAVE_OUT,
    ),
    Trick(r"man|less|more|view|nano|emacs", (), "run any program from its prompt", "permit /usr/bin/cat"),
    Trick(r"sqlite3", ("-init", "-cmd", ".shell sh", ".system sh"), "run any program by {word}", LEAVE_OUT),
)


def abuse_warnings(entry: Entry) -> Iterator[str]:
    """Yield what an entry lets jobs do although its author probably did not intend it."""
    program = Path(entry.command.path).name
    for trick in TRICKS:
        prevented = trick.unless and all(word in entry.leading for word in trick.unless)
        if prevented or not re.fullmatch(trick.programs, program):
            continue
        word = next((word for word in trick.words if admits(entry, word)), None)
        if word is None and trick.words:
            continue
        shown = repr(word)
        yield f"lets jobs {trick.does.format(word=shown)}; {trick.remedy.format(word=shown)}"


def admits(entry: Entry, word: str) -> bool:
    """Whether a word is in `leading`, or can be an argument of a permitted argument list."""
    if word in entry.leading:
        return True
    work = Work()
    if any(work.fits(pattern, word) for group in entry.args for pattern in group):
        return True
    for section in entry.grammar:
        rules = [option.rule for option in section.options] + [operand.rule for operand in section.operands]
        if section.read(word) is not None or word in section.words:
            return True
        # Inputs and outputs are left out: their names stay within the job's own directory.
        kinds = [rule.kind for rule in rules if rule is not None]
        if any(
            isinstance(kind, Choice | Regex | TextValue) and kind.fits(word, None, work) for kind in kinds
        ):
            return True
    return False
