# Sourced by tools/install: removes the miner from this machine.

uninstall() {
  local purge=$1
  [ -e "$lib" ] || say "$lib is missing; removing the other files of the miner, if any"
  if is_booted && [ -e /usr/lib/systemd/system/aitbc-miner.service ]; then
    say "stopping the miner and ending all running jobs (up to a minute)"
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
    say "removed, except the configuration in $etc, the records of jobs in $state" \
      "and the users of the miner and its jobs (--purge removes all three)"
  fi
}

# Removes only unchanged samples; the operator's own tasks stay.
remove_sample_tasks() {
  local sample
  for sample in "$doc"/examples/tasks/*; do
    if cmp -s "$sample" "$tasks/${sample##*/}"; then rm "$tasks/${sample##*/}"; fi
  done
  if [ -e "$made" ]; then sed -Ei "\\#^samples? $tasks(/|\$)#d" "$made"; fi
  rmdir --ignore-fail-on-non-empty "$tasks" "${tasks%/*}" "${tasks%/*/*}" 2>/dev/null || true
}

# Only together with their files: the next users with the same numbers would own the files.
remove_users() {
  local kind name
  [ -e "$made" ] || return 0
  while read -r kind name; do
    # userdel also removes the user's own group.
    case $kind in
      passwd) ! getent passwd "$name" >/dev/null || userdel "$name" ;;
      group) ! getent group "$name" >/dev/null || groupdel "$name" ;;
    esac || die "cannot remove $name ($kind): see above; then run tools/install --uninstall --purge again"
  done < <(sort -ru "$made")
}
