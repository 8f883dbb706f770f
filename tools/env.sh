# Sourced by tools/demo, tools/test and others: finds a Python, and makes a virtual environment at the first run.
# Sets $root (the checkout) and $venv.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

say() { printf '%s\n' "$*" >&2; }

# As root, jobs run as unprivileged users, who must be able to read the interpreter and this code.
stranger() { runuser -u nobody -- "$@" 2>/dev/null; }

leave_private_checkout() {
  [ "$(id -u)" = 0 ] || return 0
  stranger test -r "$root/setup.cfg" && return 0
  local mirror
  mirror=/var/cache/aitbc-miner-checkout/$(printf %s "$root" | sha256sum | cut -c1-12)
  say "other users cannot read $root; using a copy in $mirror"
  mkdir -p "$mirror"
  chmod 755 "${mirror%/*}" "$mirror"
  # Keep the virtual environment, which takes long to make and cannot move.
  find "$mirror" -mindepth 1 -maxdepth 1 ! -name '.venv*' -exec rm -rf {} +
  tar -C "$root" --exclude='./.venv*' --exclude=./.git -cf - . | tar -C "$mirror" --no-same-owner -xf -
  chmod -R go+rX "$mirror"
  export AITBC_CHECKOUT="$root"
  exec "$mirror/tools/$(basename "$0")" "$@"
}

suits() {
  "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || return 1
  [ "$(id -u)" != 0 ] || stranger "$("$1" -c 'import sys; print(sys._base_executable)')" -c pass
}

find_python() {
  local candidate
  for candidate in ${PYTHON:-} python3 /usr/bin/python3; do
    if command -v "$candidate" >/dev/null && suits "$candidate"; then
      command -v "$candidate"
      return 0
    fi
  done
  return 1
}

# ensure_packages USE...: the command's Debian packages, by the list in tools/vm_lab/debian.py. As root, the function
# installs missing packages. For another user it prints the command to install them, and the rest runs without them.
ensure_packages() {
  local missing=() line
  if ! find_python >/dev/null; then
    line="apt-get install --no-install-recommends python3 python3-venv"
    if [ "$(id -u)" = 0 ]; then apt_install python3 python3-venv; fi
    if ! find_python >/dev/null; then
      say "cannot set up: no python3 from 3.11 on with venv, which other users may run; as root: $line"
      exit 1
    fi
  fi
  mapfile -t missing < <("$(find_python)" "$root/tools/vm_lab/debian.py" "$@")
  [ ${#missing[@]} -gt 0 ] || return 0
  if [ "$(id -u)" = 0 ]; then
    apt_install "${missing[@]}"
  else
    say "packages are missing, and the parts that need them will not run: ${missing[*]}; as root:"
    say "  apt-get install --no-install-recommends ${missing[*]}"
  fi
}

apt_install() {
  local log
  say "installing Debian's $*"
  log=$(mktemp)
  if ! { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends "$@"; } \
    >"$log" 2>&1 </dev/null; then
    cat "$log" >&2
    say "cannot install $*: see the error of apt-get above"
    exit 1
  fi
  rm "$log"
}

# ensure_venv EXTRA: makes the virtual environment .venv with the package and the requirements of EXTRA (if given), in
# the versions and with the hashes of tools/locks.
ensure_venv() {
  venv=$root/.venv
  made "$1" && return 0
  # A second command that starts meanwhile waits, so that it never finds a half-made environment.
  (
    flock 9
    made "$1" || make_venv "$1"
  ) 9>"$root/.venv.lock"
}

pip_install() {
  # Drops pip's warnings: about root outside a virtual environment, and about the packaging of cgroupspy. Errors pass.
  PIP_ROOT_USER_ACTION=ignore "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@" \
    2> >(grep -vE '^(WARNING|  DEPRECATION)' >&2)
}

# made EXTRA: whether the environment is complete already; sets the variables of make_venv.
made() {
  python=$(find_python) || exit 1
  base=$("$python" -c 'import sys; print(sys.version, sys._base_executable)')
  wanted="$base $(cat "$root/setup.cfg" "$root"/tools/locks/*)"
  stamp=$venv/.made-for-$1
  [ -e "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]
}

make_venv() {
  umask 022
  if [ "$(cat "$venv/.made-by" 2>/dev/null)" = "$base" ]; then
    local whose=${1:+the tests}
    say "adding the requirements of ${whose:-the package} to the virtual environment in $venv (a minute or two)"
  else
    say "first run: making a virtual environment in $venv with $python (a minute or two)"
    "$python" -m venv --clear "$venv"
    printf '%s' "$base" >"$venv/.made-by"
  fi
  pip_install --require-hashes --requirement "$root/tools/locks/build.lock"
  pip_install --require-hashes --no-build-isolation --requirement "$root/tools/locks/${1:-run}.lock"
  pip_install --no-deps --no-build-isolation --editable "$root"
  if [ "$1" = test ] && [ -z "$(command -v cc gcc clang)" ]; then
    say "no C compiler found: installing ziglang into the virtual environment, for the stub of the GPU library"
    pip_install --require-hashes --requirement "$root/tools/locks/compiler.lock"
  fi
  printf '%s' "$wanted" >"$stamp"
}

# ensure_versions newest|lowest: makes a separate environment with the newest or lowest versions of setup.cfg's bounds.
# `newest` ignores upper bounds, so that the tests meet a new release before users do.
ensure_versions() {
  local change
  case ${1:-} in
    newest) change='s/,<[^,]*//' ;;
    lowest) change='s/>=([^,]+).*/==\1/' ;;
    *)
      say "unknown versions: ${1:-none}; use --versions newest or --versions lowest"
      exit 2
      ;;
  esac
  venv=$root/.venv-$1
  say "making a virtual environment with the $1 versions in $venv (a minute)"
  "$(find_python)" -m venv --clear "$venv"
  sed -nE '/^(install_requires|test) =/,/^([^ ]|$)/ s/^    //p' "$root/setup.cfg" | sed -E "$change" >"$venv/requirements"
  pip_install --require-hashes --requirement "$root/tools/locks/build.lock"
  pip_install --no-build-isolation --requirement "$venv/requirements"
  pip_install --no-deps --no-build-isolation --editable "$root"
  "$venv/bin/python" -m pip list --disable-pip-version-check --format freeze | paste -sd ' '
}

# Whether this environment has the versions of tools/locks, with which all other tests run.
has_locked_versions() {
  local others
  others=$(comm -23 <("$venv/bin/python" -m pip list --disable-pip-version-check --format freeze | names) \
    <(sed -nE 's/^([^ ]+==[^ ;]+).*/\1/p' "$root"/tools/locks/*.lock | names) | grep -vE '^(aitbc-miner|pip)==' || true)
  [ -z "$others" ]
}

# Normalizes the names of packages: lower case, dashes instead of underscores, no extras.
names() { sed 's/\[.*\]//' | tr 'A-Z_' 'a-z-' | sort -u; }
