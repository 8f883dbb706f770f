# Sourced by tools/install: takes the miner off this machine.

uninstall() {
  local purge=$1
  [ -e "$lib" ] || say "nothing is installed in $lib; removing what else there may be"
  if is_booted && [ -e /usr/lib/systemd/system/aitbc-miner.service ]; then
    say "stopping the miner; running jobs end now (up to a minute)"
    systemctl stop aitbc-miner.service aitbc-miner-slots.service aitbc.slice ||
      die "cannot stop the miner: see above; nothing was removed"
    systemctl --quiet reset-failed "${units[@]}" 2>/dev/null || true
  fi
  if [ -e /usr/lib/systemd/system/aitbc-miner.service ]; then systemctl --quiet disable aitbc-miner.service; fi
  rm -f "${units[@]/#//usr/lib/systemd/system/}" /usr/lib/{sysusers,tmpfiles}.d/aitbc-miner.conf
  if is_booted; then systemctl daemon-reload; fi
  remove_sample_tasks
  rm -rf "$lib" "$doc" /run/aitbc-miner /usr/bin/aitbc-miner /usr/bin/aitbc-minerctl
  rm -f "$lock"
  if [ "$purge" = yes ]; then
    remove_users
    rm -rf "$etc" "$state" "$made"
    rmdir --ignore-fail-on-non-empty "${etc%/*}" "${state%/*}" 2>/dev/null || true
    say "removed"
  else
    say "removed; the configuration stays in $etc, the records of jobs in $state," \
      "and so do the users whom they belong to (--purge removes all three)"
  fi
}

# The operator's own tasks are not ours to remove.
remove_sample_tasks() {
  local sample
  for sample in "$doc"/examples/tasks/*; do
    if cmp -s "$sample" "$tasks/${sample##*/}"; then rm "$tasks/${sample##*/}"; fi
  done
  if [ -e "$made" ]; then sed -Ei "\\#^samples? $tasks(/|\$)#d" "$made"; fi
  rmdir --ignore-fail-on-non-empty "$tasks" "${tasks%/*}" "${tasks%/*/*}" 2>/dev/null || true
}

# With their files and not before: whoever got their numbers next would own what they leave.
remove_users() {
  local kind name
  [ -e "$made" ] || return 0
  while read -r kind name; do
    # A user's own group goes with him.
    case $kind in
      passwd) ! getent passwd "$name" >/dev/null || userdel "$name" ;;
      group) ! getent group "$name" >/dev/null || groupdel "$name" ;;
    esac || die "cannot remove $name ($kind): see above; then tools/install --uninstall --purge again"
  done < <(sort -ru "$made")
}
