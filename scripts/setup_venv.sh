# Sourced by quickstart.sh and test.sh, from the repository root.
#   setup_venv EXTRA [REQUIREMENT]   makes .venv and installs the pinned packages with that extra ("" for none), after
# REQUIREMENT where pip can find it; does nothing, and needs no network, when that was done before.

fail() { echo "$(basename "$0"): $*" >&2; exit 1; }

python_ok() {  # jaxlib as pinned has no wheels for Python above 3.14
  "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' >/dev/null 2>&1
}

find_python() {
  local candidate
  for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
    if python_ok "$candidate"; then command -v "$candidate"; return; fi
  done
  if command -v uv >/dev/null && candidate=$(uv python find --no-python-downloads '>=3.11,<3.15' 2>/dev/null); then
    echo "$candidate"; return
  fi
  candidate=$(python3 --version 2>/dev/null) || candidate="no python3"
  fail "needs Python 3.11, 3.12, 3.13 or 3.14 on the PATH (found: $candidate)"
}

is_whole() {  # one that was interrupted while it was made has no pip
  [[ -e .venv/installed ]] || command -v uv >/dev/null || .venv/bin/python -c 'import pip' 2>/dev/null
}

make_venv() {
  local python
  if [[ -x .venv/bin/python ]] && python_ok .venv/bin/python && is_whole; then return; fi
  python=$(find_python) || return
  echo "==> .venv with $("$python" --version)"
  if command -v uv >/dev/null; then
    uv venv --quiet --clear --seed --python "$python" .venv
  elif "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    "$python" -m venv --clear .venv
  else
    fail "$python cannot make virtual environments; install its venv module" \
      "(Debian, Ubuntu: apt-get install $("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')) or uv"
  fi
}

pip_install() {
  if command -v uv >/dev/null; then
    uv pip install --python .venv/bin/python -c constraints.txt "$@"
  else
    .venv/bin/python -m pip install --disable-pip-version-check -c constraints.txt "$@"
  fi
}

# The stamp holds a hash of what was asked for, then the extras installed since ("+" for the core alone).
is_installed() { [[ "$(head -n 1 .venv/installed 2>/dev/null)" == "$1" ]] && grep -qx -- "+$2" .venv/installed; }

setup_venv() {
  local extra=$1 preferred=${2:-} hash
  make_venv || return
  hash=$(cat pyproject.toml constraints.txt <(pwd) | .venv/bin/python -c \
    'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
  if is_installed "$hash" "$extra"; then return; fi
  if [[ -n "$preferred" ]] && ! .venv/bin/python -m pip install --quiet -c constraints.txt "$preferred" >/dev/null 2>&1; then
    echo "==> pip finds no $preferred here: the default build comes instead"
  fi
  echo "==> installing therapy_jax${extra:+[$extra]} and its pinned packages (a minute or more)"
  pip_install -e ".${extra:+[$extra]}" || return  # said here: whoever sources this may not stop at errors
  [[ "$(head -n 1 .venv/installed 2>/dev/null)" == "$hash" ]] || printf '%s\n+\n' "$hash" >.venv/installed
  [[ -z "$extra" ]] || echo "+$extra" >>.venv/installed
}
