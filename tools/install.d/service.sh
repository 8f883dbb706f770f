# Sourced by tools/install: whether the new version would start, and that what ran before runs again.

is_booted() { [ -d /run/systemd/system ]; }

is_sample() { grep -q '^ *base_url: https://coordinator\.example/' "$etc/config.yaml"; }

# Whatever `run` would refuse, `check` refuses, and before anything points to the new version.
check_configuration() {
  local status=0 sample
  if is_sample; then return; fi
  passes_check || status=$?
  if [ "$status" != 0 ] && [ ${#arrived[@]} -gt 0 ]; then
    # Perhaps it is a sample that has just arrived, such as a second rule for a command that the operator has.
    rm "${arrived[@]}"
    if passes_check >/dev/null; then
      say "left out, for with them the configuration would have the faults above: ${arrived[*]}"
      arrived=()
      return
    fi
  fi
  [ "$status" = 0 ] ||
    die "cannot go on: $(build_of "${building:-$current}") does not accept the configuration, see above;" \
      "mend it, then tools/install again"
  [ -e "$complete" ] || return 0
  for sample in "${arrived[@]}"; do say "new: $sample (if you do not want it, remove it: it will not come back)"; done
}

# A coordinator that does not answer (69) is no fault of the configuration.
passes_check() {
  local said status=0
  said=$(as_the_service "${building:-$current}/bin/aitbc-miner" check --config "$etc/config.yaml" 2>&1) || status=$?
  [ "$status" != 69 ] || status=0
  [ "$status" = 0 ] || say "$said"
  return "$status"
}

# With what systemd adds to the environment, such as tokens named env:NAME.
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

# What this run or a later one still has to do is on disk before anything is changed.
note_owed() {
  if [ "$1" = upgrade ] && is_booted && is_wanted; then
    : >"$owed"
    sync "$owed"
  fi
}

# It runs, is about to, or would if it could: only who stops it by hand does not want it.
is_wanted() { [[ $(systemctl show --value -p ActiveState aitbc-miner.service) == @(active|activating|reloading|failed) ]]; }

# Whether what runs was started from the version that is installed.
runs_current() {
  local pid
  pid=$(systemctl show --value -p MainPID aitbc-miner.service)
  grep -aqsF "$(readlink -f "$current")/" "/proc/$pid/cmdline" "/proc/$pid/maps"
}

take_units() {
  if is_booted; then systemctl daemon-reload; fi
  # Once only: whether the miner starts with the machine is the operator's to change.
  if [ "$1" = yes ]; then systemctl --quiet enable aitbc-miner.service; fi
}

# start_or_restart VERB FIRST
start_or_restart() {
  local why="journalctl -u aitbc-miner tells why; mend it, then tools/install again"
  if systemctl --quiet is-active aitbc-miner.service; then
    if [ "$1" = upgrade ] || { [ -e "$owed" ] && ! runs_current; }; then
      say "restarting the miner; running jobs go on"
      systemctl restart aitbc-miner.service || die "cannot restart the miner: $why"
    elif ! runs_current; then
      say "the old version still runs; systemctl restart aitbc-miner changes to the new one, running jobs go on"
    fi
  elif [ -e "$owed" ] || is_wanted || { [ "$2" = yes ] && ! is_sample; }; then
    systemctl reset-failed aitbc-miner.service 2>/dev/null || true
    systemctl start aitbc-miner.service || die "cannot start the miner: $why"
    say "started"
  fi
  rm -f "$owed"
}
