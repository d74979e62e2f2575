#!/usr/bin/env bash
# Linters, types and tests, in the same .venv as the quickstart plus the test extra.
#   bash scripts/test.sh [--all] [pytest arguments]      --all adds the slow tests and, with its extra, the quick benchmark
set -euo pipefail

extras=test
markers=(-m "not slow")
if [[ "${1:-}" == --all ]]; then extras=test,bench; markers=(-m ""); shift; fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_venv.sh

setup_venv $extras "torch==2.13.0+cpu"  # where pip knows the CPU build, it saves gigabytes

wordnet=/usr/share/wordnet
if [[ "${CI:-}" == true && "$(id -u)" == 0 && ! ( -f $wordnet/data.noun && -f $wordnet/index.sense ) ]] && command -v apt-get >/dev/null; then
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq && apt-get install -y -qq --no-install-recommends wordnet-base wordnet-sense-index
fi

status=0
echo "==> ruff" && .venv/bin/ruff check || status=1
echo "==> pyright" && .venv/bin/pyright || status=1
echo "==> pytest" && .venv/bin/python -m pytest "${markers[@]}" "$@" || status=1
if [[ $extras == test,bench && $# == 0 ]]; then
  echo "==> benchmark, against torch and TRL in this run" && .venv/bin/python scripts/benchmark.py --quick || status=1
fi
exit $status
