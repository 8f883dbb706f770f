# Sourced by tools/install: users, files, and the samples of the configuration.

# A file appears under its name when it is whole and on disk: a full disk or a power cut leaves the old one.
# place MODE SOURCE TARGET [GROUP]
place() {
  install -D -m "$1" -g "${4:-root}" "$2" "$3.aitbc-new" && sync "$3.aitbc-new" && mv -T "$3.aitbc-new" "$3" || {
    rm -f "$3.aitbc-new"
    die "cannot write $3: see above; make room there, then tools/install again"
  }
}

link() {
  ln -sfn "$1" "$2.aitbc-new"
  mv -T "$2.aitbc-new" "$2"
}

# A line for each thing that was made here.
note_made() {
  { { [ ! -e "$made" ] || cat "$made"; } && printf '%s\n' "$@"; } >"$made.list"
  place 644 "$made.list" "$made"
  rm "$made.list"
}

place_files() {
  local unit
  for unit in "${units[@]}"; do place 644 "$root/systemd/$unit" "/usr/lib/systemd/system/$unit"; done
  place 644 "$root/systemd/sysusers.d/aitbc-miner.conf" /usr/lib/sysusers.d/aitbc-miner.conf
  place 644 "$root/systemd/tmpfiles.d/aitbc-miner.conf" /usr/lib/tmpfiles.d/aitbc-miner.conf
  rm -rf "$doc.aitbc-new"
  mkdir -p "$doc.aitbc-new/examples"
  cp -r "$root"/docs/. "$root/CHANGELOG.md" "$root/LICENSE" "$doc.aitbc-new"
  cp -r "$root"/etc/. "$doc.aitbc-new/examples"
  find "$doc.aitbc-new" -name __pycache__ -prune -exec rm -rf {} +
  chmod -R u=rwX,go=rX "$doc.aitbc-new"
  rm -rf "$doc"
  mv -T "$doc.aitbc-new" "$doc"
}

make_users() {
  local kind name new=() members
  # Where it was as long as the directory was root's.
  if [ -O "$state/made-here" ] && [ ! -e "$made" ]; then mv "$state/made-here" "$made"; fi
  while read -r kind name; do
    getent "$kind" "$name" >/dev/null || new+=("$kind $name")
  done <<<$'passwd aitbc\ngroup aitbc\ngroup aitbc-view\ngroup aitbc-admin'
  systemd-sysusers "$root/systemd/sysusers.d/aitbc-miner.conf"
  systemd-tmpfiles --create "$root/systemd/tmpfiles.d/aitbc-miner.conf"
  [ ${#new[@]} = 0 ] || note_made "${new[@]}"
  members=$(getent group aitbc | cut -d: -f4 | tr , '\n' | { grep -vx aitbc || true; })
  for name in $members; do
    say "$name is in the group aitbc, which reads the token; to let $name look at the miner and no more:" \
      "gpasswd -d $name aitbc; usermod -aG aitbc-view $name"
  done
}

# What is there is the operator's: a file that he changed stays changed, one that he removed stays away. What is new in
# this version arrives.
place_samples() {
  local name
  mkdir -p "$etc"
  [ -e "$etc/config.yaml" ] || place 640 "$root/etc/config.yaml" "$etc/config.yaml" aitbc
  for name in allowlist.d slots.d services.d egress.d; do place_directory "$name" "$etc/$name"; done
  place_directory tasks "$tasks"
}

place_directory() {
  local sample target known
  # 0.1 noted its directories only; which samples it knew is told by its own copy of them.
  if grep -qsxF "samples $2" "$made" && ! grep -qsF "sample $2/" "$made"; then
    known=("$doc/examples/$1"/*.*)
    [ ${#known[@]} = 0 ] || note_made "${known[@]/#*\//sample $2/}"
  fi
  if ! grep -qsxF "samples $2" "$made"; then
    mkdir -p "$2"
    note_made "samples $2"
  fi
  for sample in "$root/etc/$1"/*.*; do
    target=$2/${sample##*/}
    ! grep -qsxF "sample $target" "$made" || continue
    seen+=("sample $target")
    # Not into a directory that he removed.
    if [ -d "$2" ] && [ ! -e "$target" ]; then
      place 644 "$sample" "$target"
      arrived+=("$target")
    fi
  done
}

# Each slot's jobs are a user of their own, who owns nothing else and can log in nowhere.
make_slot_users() {
  local version=${building:-$current} layout names name
  # What else `check` would refuse is said when the users are there.
  layout=$(as_the_service "$version/bin/aitbc-miner" slots --config "$etc/config.yaml" 2>/dev/null) || {
    as_the_service "$version/bin/aitbc-miner" slots --config "$etc/config.yaml" >/dev/null || true
    die "cannot make the slots' users: the configuration has faults, see above; mend them, then tools/install again"
  }
  # Some names are in quotes, for YAML has other ideas about 0 or no.
  names=$("$version/bin/python" -c 'import sys, yaml
for slot in yaml.safe_load(sys.stdin)["slots"]: print(slot["name"])' <<<"$layout")
  for name in $names; do
    name=aitbc-job-$name
    getent passwd "$name" >/dev/null && continue
    useradd --system --user-group --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin "$name" ||
      die "cannot make the user $name: see above; names of at most 22 letters suit a slot"
    note_made "passwd $name" "group $name"
  done
}

# A power cut soon after would leave empty files, and an empty unit is a masked one to systemd.
settle() {
  local place
  for place in "$lib" /usr/lib/systemd/system /usr/bin "$etc" "$tasks" "$state"; do
    # The operator may have removed one.
    [ ! -e "$place" ] || sync -f "$place"
  done
}
