"""A machine for the installer: its own /usr, /etc, /var and /run, and stand-ins for systemd and pip."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
# What tools/install takes from a checkout, beside the package.
TAKEN = (
    "tools/install", "tools/install.d", "tools/locks", "systemd", "etc", "docs",
    "setup.cfg", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md",
)  # fmt: skip

# The unit is active while its process runs, whose name says from which version it was started. What `check`
# would refuse does not start.
SYSTEMCTL = r"""#!/bin/bash
state() {
  if [ -e /proc/$(cat /run/fake/pid)/maps ]; then echo active; else cat /run/fake/state; fi 2>/dev/null
}
end() { kill -9 "$(cat /run/fake/pid)"; rm -f /run/fake/pid; } 2>/dev/null
while [ "$1" = --quiet ]; do shift; done
echo "$*" >>/run/fake/asked
case $1 in
  --version) echo "systemd 257" ;;
  is-active) [ "$(state)" = active ] ;;
  show)
    case $4 in
      ActiveState) state ;;
      MainPID) cat /run/fake/pid ;;
      Environment) echo "A=1 'B=2 3'" ;;
    esac ;;
  stop) end; echo inactive >/run/fake/state ;;
  start | restart)
    end
    echo failed >/run/fake/state
    ! grep -q refused /etc/aitbc/miner/config.yaml || exit 1
    version=$(readlink -f /usr/lib/aitbc-miner/current)
    bash -c 'exec -a "$0/bin/python" sleep 1000' "$version" </dev/null >/dev/null 2>&1 9>&- &
    echo $! >/run/fake/pid ;;
esac
"""
SYSUSERS = r"""#!/bin/sh
for group in aitbc aitbc-view aitbc-admin; do getent group $group >/dev/null || groupadd --system $group; done
getent passwd aitbc >/dev/null || useradd --system -g aitbc aitbc
"""
TMPFILES = "#!/bin/sh\nmkdir -p /run/aitbc-miner /var/lib/aitbc/miner\n"
# An environment and the package are made in a moment; pip stays where a test wants to meet it.
SETSID = r"""#!/bin/bash
while [ "$1" != -- ]; do shift; done
shift
case "$*" in
  *"-m venv "*)
    mkdir -p "${!#}/bin"
    printf '#!/bin/sh\nexec PYTHON "$@"\n' >"${!#}/bin/python"
    chmod 755 "${!#}/bin/python" ;;
  *"/pip install "*)
    if [ -e /run/fake/hang ]; then echo $$ >/run/fake/hanging; exec sleep 1000; fi
    init=${!#}/aitbc_miner/__init__.py
    [ -e "$init" ] || exit 0
    sed -n 's/^__version__ = "\(.*\)"/\1+/p' "$init" | tr -d '\n' >"${1%/python}/said"
    sha256sum "$init" | cut -c 1-8 >>"${1%/python}/said"
    install -m 755 /run/fake/node "${1%/python}/aitbc-miner" ;;
esac
"""
NODE = r"""#!/bin/bash
case $1 in
  --version) echo "aitbc-miner $(cat "$(dirname "$0")/said")" ;;
  slots) echo 'slots: [{name: cpu0}]' ;;
  check)
    if grep -q refused /etc/aitbc/miner/config.yaml; then echo "config.yaml:1: refused"; exit 78; fi
    if ls /etc/aitbc/miner/allowlist.d | grep -q twice; then echo "twice.yaml:1: said twice"; exit 78; fi
    if grep -q unreachable /etc/aitbc/miner/config.yaml; then echo "nobody answers"; exit 69; fi
    if grep -q "env:WORD" /etc/aitbc/miner/config.yaml && [ "$WORD$B" != "a word2 3" ]; then exit 78; fi ;;
esac
"""
# Kills the installer before the first command that fits, written as "function: command".
HOOK = r"""
set -T
step() {
  if [ -n "${building:-}" ] && [[ "${FUNCNAME[1]}: $BASH_COMMAND" == $KILL_AT ]]; then
    echo >/run/fake/killed
    kill -KILL "$BASHPID"
  fi
}
trap step DEBUG
"""


class FakeMachine:
    """A machine that is installed on by `install`; nothing of it is this machine's."""

    def __init__(self, pid: int, scratch: Path) -> None:
        self._enter = ("nsenter", f"--target={pid}", "--mount", "--pid")
        self._scratch = scratch

    def sh(self, script: str, *words: str, check: bool = True) -> str:
        """Run a script in it and give what it printed."""
        command = [*self._enter, "bash", "-euo", "pipefail", "-c", script, "sh", *words]
        done = subprocess.run(
            command,
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0 or not check, done.stdout
        return done.stdout + ("" if done.returncode == 0 else f"status {done.returncode}\n")

    def checkout(self, version: str, *, more: str = "", samples: tuple[str, ...] = ()) -> Path:
        """Make a checkout of the installer with a package of this version."""
        place = self._scratch / f"{version}{more}{len(samples)}"
        if place.exists():
            return place
        for name in TAKEN:
            source, target = CHECKOUT / name, place / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(source, target) if source.is_dir() else shutil.copy2(source, target)
        (place / "aitbc_miner").mkdir()
        (place / "aitbc_miner" / "__init__.py").write_text(f'__version__ = "{version}"\n{more}')
        for unit in place.glob("systemd/*.service"):
            unit.write_text(unit.read_text() + f"# {version}{more}\n")
        for sample in samples:
            (place / "etc" / sample).write_text("{}\n")
        return place

    def install(self, checkout: Path, *options: str, check: bool = True, **environ: str) -> str:
        """Run the installer of a checkout and give what it said."""
        given = [f"{name}={value}" for name, value in environ.items()]
        return self.sh('env "$@"', *given, str(checkout / "tools" / "install"), *options, check=check)

    def running(self) -> str:
        """Give the version whose code runs, or the state of the unit."""
        first = "tr '\\0' '\\n' </proc/$(cat /run/fake/pid)/cmdline | sed 's|/bin/.*||;q'"
        otherwise = "systemctl show --value -p ActiveState"
        said = self.sh(f'if systemctl is-active; then cat "$({first})/build"; else {otherwise}; fi')
        return said.strip().removeprefix("aitbc-miner ").partition("+")[0]


@contextmanager
def fake_machine(scratch: Path) -> Iterator[FakeMachine]:
    """Give a machine that has never seen the miner; as root only."""
    fake = scratch / "fake"
    for name in ("bin", "over"):
        (fake / name).mkdir(parents=True)
    for name, text in {
        "systemctl": SYSTEMCTL,
        "systemd-sysusers": SYSUSERS,
        "systemd-tmpfiles": TMPFILES,
        "setsid": SETSID.replace("PYTHON", sys.executable),
        "node": NODE,
        "hook": HOOK,
    }.items():
        (fake / "bin" / name).write_text(text)
        (fake / "bin" / name).chmod(0o755)
    setup = f"""
mount --make-rprivate /
mount -t tmpfs tmpfs {fake}/over
for each in usr etc var; do
  mkdir -p {fake}/over/$each {fake}/over/$each.work
  mount -t overlay overlay -o lowerdir=/$each,upperdir={fake}/over/$each,workdir={fake}/over/$each.work /$each
done
mount -t tmpfs tmpfs /run
mkdir -p /run/systemd/system /run/fake
mount -t proc proc /proc
cp {fake}/bin/{{systemctl,systemd-sysusers,systemd-tmpfiles,setsid}} /usr/bin/
cp {fake}/bin/{{node,hook}} /run/fake/
rm -rf /etc/aitbc /var/lib/aitbc /usr/lib/aitbc-miner /usr/local/lib/aitbc
echo inactive >/run/fake/state
echo up
# Not exec: who has lost his parent is collected here.
sleep infinity & wait
"""
    command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "bash", "-euc", setup]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        try:
            assert holder.stdout.readline() == "up\n"
            children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().split()
            yield FakeMachine(int(children[0]), scratch)
        finally:
            holder.kill()
