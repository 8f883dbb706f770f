# Sourced by tools/install: checks that the new version would start, and restarts the miner.

is_booted() { [ -d /run/systemd/system ]; }

is_sample() { grep -q '^ *base_url: https://coordinator\.example/' "$etc/config.yaml"; }

# `check` finds every fault that would stop `run`, before the machine uses the new version.
check_configuration() {
  local status=0 sample
  if is_sample; then return; fi
  passes_check || status=$?
  if [ "$status" != 0 ] && [ ${#arrived[@]} -gt 0 ]; then
    # A new sample may be the cause, such as a second rule for a command of the operator.
    rm "${arrived[@]}"
    if passes_check >/dev/null; then
      say "samples not installed, because they would cause the faults above: ${arrived[*]}"
      arrived=()
      return
    fi
  fi
  [ "$status" = 0 ] ||
    die "cannot install: $(build_of "${building:-$current}") does not accept the configuration, see above;" \
      "correct the faults, then run tools/install again"
  [ -e "$complete" ] || return 0
  for sample in "${arrived[@]}"; do say "new sample: $sample (you may remove the file; it will not come back)"; done
}

# Status 69 (the coordinator does not answer) is no fault of the configuration.
passes_check() {
  local said status=0
  said=$(as_the_service "${building:-$current}/bin/aitbc-miner" check --config "$etc/config.yaml" 2>&1) || status=$?
  [ "$status" != 69 ] || status=0
  [ "$status" = 0 ] || say "$said"
  return "$status"
}

# Runs a command with the environment that systemd gives the service, such as tokens named env:NAME.
as_the_service() {
  local unit=
  if is_booted; then unit=$(systemctl show --value -p Environment aitbc-miner.service); fi
  /usr/bin/python3 -c '
import os, shlex, sys
from pathlib import Path

file, unit, *command = sys.argv[1:]
lines = Path(file).read_text().splitlines() if os.path.exists(file) else []
given = shlex.split(unit)
for line in lines:
    name, found, value = line.strip().partition("=")
    if found and name[0] not in "#;":
        given.append(name.strip() + "=" + (shlex.split(value)[0] if value[:1] in ("\"", "\x27") else value))
os.execve(command[0], command, {**os.environ, **dict(each.split("=", 1) for each in given)})
' "$etc/environment" "$unit" "$@"
}

# Before any change, the disk notes that this run or a later run must restart the miner.
note_owed() {
  if [ "$1" = upgrade ] && is_booted && is_wanted; then
    : >"$owed"
    sync "$owed"
  fi
}

# Whether the operator wants the miner to run: always, unless the operator stopped the service.
is_wanted() { [[ $(systemctl show --value -p ActiveState aitbc-miner.service) == @(active|activating|reloading|failed) ]]; }

# Whether the running miner was started from the installed version.
runs_current() {
  local pid
  pid=$(systemctl show --value -p MainPID aitbc-miner.service)
  grep -aqsF "$(readlink -f "$current")/" "/proc/$pid/cmdline" "/proc/$pid/maps"
}

take_units() {
  if is_booted; then systemctl daemon-reload; fi
  # Only at the first installation, because the operator may disable the service later.
  if [ "$1" = yes ]; then systemctl --quiet enable aitbc-miner.service; fi
}

# start_or_restart VERB FIRST
start_or_restart() {
  local why="see journalctl -u aitbc-miner; correct the cause, then run tools/install again"
  if systemctl --quiet is-active aitbc-miner.service; then
    if [ "$1" = upgrade ] || { [ -e "$owed" ] && ! runs_current; }; then
      say "restarting the miner; running jobs continue"
      systemctl restart aitbc-miner.service || die "cannot restart the miner: $why"
    elif ! runs_current; then
      say "the old version still runs; run systemctl restart aitbc-miner to change; running jobs continue"
    fi
  elif [ -e "$owed" ] || is_wanted || { [ "$2" = yes ] && ! is_sample; }; then
    systemctl reset-failed aitbc-miner.service 2>/dev/null || true
    systemctl start aitbc-miner.service || die "cannot start the miner: $why"
    say "started"
  fi
  rm -f "$owed"
}
