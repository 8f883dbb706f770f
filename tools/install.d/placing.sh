# Sourced by tools/install: users, files, and the samples of the configuration.

# Writes a file completely before it gets its name, so that a full disk or a power cut leaves the old file.
# place MODE SOURCE TARGET [GROUP]
place() {
  install -D -m "$1" -g "${4:-root}" "$2" "$3.aitbc-new" && sync "$3.aitbc-new" && mv -T "$3.aitbc-new" "$3" || {
    rm -f "$3.aitbc-new"
    die "cannot write $3: see above; make room on the disk, then run tools/install again"
  }
}

link() {
  ln -sfn "$1" "$2.aitbc-new"
  mv -T "$2.aitbc-new" "$2"
}

# Adds a line to $made for each user, group or sample.
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
  # Earlier versions kept the list here, while the directory belonged to root.
  if [ -O "$state/made-here" ] && [ ! -e "$made" ]; then mv "$state/made-here" "$made"; fi
  while read -r kind name; do
    getent "$kind" "$name" >/dev/null || new+=("$kind $name")
  done <<<$'passwd aitbc\ngroup aitbc\ngroup aitbc-view\ngroup aitbc-admin'
  systemd-sysusers "$root/systemd/sysusers.d/aitbc-miner.conf"
  systemd-tmpfiles --create "$root/systemd/tmpfiles.d/aitbc-miner.conf"
  [ ${#new[@]} = 0 ] || note_made "${new[@]}"
  members=$(getent group aitbc | cut -d: -f4 | tr , '\n' | { grep -vx aitbc || true; })
  for name in $members; do
    say "$name is in the group aitbc and can read the token; to let $name only read the miner's state:" \
      "gpasswd -d $name aitbc; usermod -aG aitbc-view $name"
  done
}

# Existing files belong to the operator: a changed file stays changed, and a removed file stays removed. Only the new
# samples of this version are added.
place_samples() {
  local name
  mkdir -p "$etc"
  [ -e "$etc/config.yaml" ] || place 640 "$root/etc/config.yaml" "$etc/config.yaml" aitbc
  for name in allowlist.d slots.d services.d egress.d; do place_directory "$name" "$etc/$name"; done
  place_directory tasks "$tasks"
}

place_directory() {
  local sample target known
  # Version 0.1 noted only directories; its copy of the samples shows which samples it had placed.
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
    # Not into a directory that the operator removed.
    if [ -d "$2" ] && [ ! -e "$target" ]; then
      place 644 "$sample" "$target"
      arrived+=("$target")
    fi
  done
}

# The jobs of each slot run as their own user, who owns no other files and cannot log in.
make_slot_users() {
  local version=${building:-$current} layout names name
  # `check`, which needs the users, reports all other faults later.
  layout=$(as_the_service "$version/bin/aitbc-miner" slots --config "$etc/config.yaml" 2>/dev/null) || {
    as_the_service "$version/bin/aitbc-miner" slots --config "$etc/config.yaml" >/dev/null || true
    die "cannot make the slots' users: the configuration has faults, see above; correct them, then tools/install again"
  }
  # A parser reads the names, because YAML quotes names such as 0 or no.
  names=$("$version/bin/python" -c 'import sys, yaml
for slot in yaml.safe_load(sys.stdin)["slots"]: print(slot["name"])' <<<"$layout")
  for name in $names; do
    name=aitbc-job-$name
    getent passwd "$name" >/dev/null && continue
    useradd --system --user-group --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin "$name" ||
      die "cannot make the user $name: see above; a slot's name may have at most 22 characters"
    note_made "passwd $name" "group $name"
  done
}

# Without this a power cut could leave empty files; systemd treats an empty unit as masked.
settle() {
  local place
  for place in "$lib" /usr/lib/systemd/system /usr/bin "$etc" "$tasks" "$state"; do
    # The operator may have removed a directory.
    [ ! -e "$place" ] || sync -f "$place"
  done
}
