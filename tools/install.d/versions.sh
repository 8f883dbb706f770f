# Sourced by tools/install: makes a virtual environment for each version, and switches between versions.

# Hashes the sources of a version, so that the installer need not make the same version again.
fingerprint() {
  /usr/bin/python3 --version
  if [ -n "$1" ]; then
    cd "$1" && sha256sum ./*.whl
  else
    cd "$root" && find aitbc_miner setup.cfg pyproject.toml tools/locks/{build,run}.lock -type f ! -name '*.pyc' \
      -exec sha256sum {} + | sort
  fi
}

# Completes a version in its own directory before the machine uses it. So a failure leaves the old version unchanged, and
# workers of running jobs keep the files of their version.
make_version() {
  local verb=$1 wheels=$2 print pip locks=$root/tools/locks
  print=$(fingerprint "$wheels")
  if [ "$verb" = install ] && [ "$(cat "$current/fingerprint" 2>/dev/null)" = "$print" ]; then
    say "$(build_of "$current") is installed already"
    return
  fi
  mkdir -p "$lib/versions"
  building=$(mktemp -d "$lib/versions/$(checkout_version)-$(date +%Y%m%dT%H%M%S)-XXX")
  chmod 755 "$building"
  say "making $building (a minute or two)"
  pip=$(bundled_pip)
  interruptible /usr/bin/python3 -m venv --without-pip "$building"
  if [ -n "$wheels" ]; then
    pip_install --no-index --find-links "$wheels" "aitbc-miner==$(checkout_version)"
  else
    # Builds a copy, because setuptools leaves files in the source directory.
    scratch=$(mktemp -d)
    cp -r "$root"/{aitbc_miner,setup.cfg,pyproject.toml,README.md,LICENSE} "$scratch"
    pip_install --require-hashes --requirement "$locks/build.lock"
    pip_install --require-hashes --no-build-isolation --requirement "$locks/run.lock"
    pip_install --no-deps --no-build-isolation "$scratch"
  fi
  "$building/bin/aitbc-miner" --version >"$building/build"
  printf '%s' "$print" >"$building/fingerprint"
  # The times of the commits order two builds of the same version.
  git -c safe.directory="$root" -C "$root" log -1 --format=%ct >"$building/committed" 2>/dev/null || true
  say_change
}

# Runs pip from ensurepip's wheel, because installing pip in each version takes longer than all other steps.
bundled_pip() {
  /usr/bin/python3 - <<'END'
import ensurepip, pathlib, sysconfig
place = sysconfig.get_config_var("WHEEL_PKG_DIR") or pathlib.Path(ensurepip.__file__).parent / "_bundled"
print(next(pathlib.Path(place).glob("pip-*.whl")) / "pip")
END
}

pip_install() {
  PIP_ROOT_USER_ACTION=ignore interruptible "$building/bin/python" "$pip" install --quiet --no-cache-dir --no-input \
    --disable-pip-version-check "$@" || {
    say "cannot install the packages: see pip's error above; without a network use --wheels DIR" >&2
    return 1
  }
}

# "0.1.0+3f9c2a1b"; version 0.1.0 printed only its version.
build_of() { awk '{ print $2 }' "$1/build" 2>/dev/null || "$1/bin/aitbc-miner" --version | awk '{ print $2 }'; }

say_change() {
  local from to what
  to=$(build_of "$building")
  if [ ! -e "$current" ]; then
    say "installing $to"
    return
  fi
  from=$(build_of "$current")
  what=$(order "${from%%+*}" "${to%%+*}")
  if [ "$what" = same ]; then what=$(order "$(cat "$current/committed" 2>/dev/null)" "$(cat "$building/committed")"); fi
  case $what in
    older) say "upgrading from $from to $to" ;;
    newer) say "downgrading from $from to $to" ;;
    *) if [ "$from" = "$to" ]; then say "making $to anew"; else say "changing from $from to $to"; fi ;;
  esac
}

# Prints whether the first is older, newer or the same; nothing if either is unknown.
order() {
  [ -n "$1" ] && [ -n "$2" ] || return 0
  if [ "$1" = "$2" ]; then
    echo same
  elif [ "$(printf '%s\n' "$1" "$2" | sort -V | head -n 1)" = "$1" ]; then
    echo older
  else
    echo newer
  fi
}

switch_version() {
  local name
  if [ -n "$building" ]; then link "versions/${building##*/}" "$current"; fi
  for name in aitbc-miner aitbc-minerctl; do link "$current/bin/$name" "/usr/bin/$name"; done
}

sweep_versions() {
  local version
  for version in "$lib"/versions/*; do
    [ "$version" != "$(readlink -f "$current")" ] || continue
    if in_use "$version"; then
      say "keeping $version for its running jobs; the next tools/install after their end removes the directory"
    else
      rm -rf "$version"
    fi
  done
}

# grep reads the name from standard input, because it would find its own arguments in /proc.
in_use() {
  local known=(/proc/[0-9]*/maps /proc/[0-9]*/cmdline)
  grep -aqsF -f - "${known[@]}" <<<"$1/"
}
