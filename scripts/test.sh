#!/usr/bin/env bash
# Linters, types and tests, in the same .venv as the quickstart plus the test extra.
#   bash scripts/test.sh [--all] [pytest arguments]      --all adds the slow tests and, with their extras, page and quick benchmark
set -euo pipefail

extras=test
markers=(-m "not slow")
if [[ "${1:-}" == --all ]]; then extras=test,bench,ui-test; markers=(-m ""); shift; fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_venv.sh

setup_venv $extras "torch==2.13.0+cpu"  # where pip knows the CPU build, it saves gigabytes

# The compiler for TPUs stands apart: beside jax it would look for a chip at every start.
if [[ $extras != test && ! -d .venv/tpu/libtpu ]] &&
  ! .venv/bin/python -m pip install --quiet --no-deps --target .venv/tpu -c constraints.txt libtpu >/dev/null 2>&1; then
  echo "==> pip finds no libtpu here: nothing will be compiled for a TPU"
fi

wordnet=/usr/share/wordnet packages=()
[[ -f $wordnet/data.noun && -f $wordnet/index.sense ]] || packages+=(wordnet-base wordnet-sense-index)
[[ $extras == test ]] || command -v chromium >/dev/null || packages+=(chromium)
if [[ "${CI:-}" == true && "$(id -u)" == 0 && ${#packages[@]} != 0 ]] && command -v apt-get >/dev/null; then
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq && apt-get install -y -qq --no-install-recommends "${packages[@]}"
fi

status=0
echo "==> ruff" && .venv/bin/ruff check || status=1
echo "==> pyright" && .venv/bin/pyright || status=1
# Two at a time, each with files of its own: what a file compiles and trains serves all of its tests. In conftest.py's order.
echo "==> pytest" && .venv/bin/python -m pytest -n auto --maxprocesses 2 --dist loadfile --no-loadscope-reorder --durations 25 "${markers[@]}" "$@" || status=1
if [[ $extras != test && $# == 0 ]]; then
  echo "==> benchmark, against torch and TRL in this run" && .venv/bin/python scripts/benchmark.py --quick || status=1
fi
exit $status
