#!/usr/bin/env bash
# The whole method in minutes: pre-training, SFT, PPO and evaluation of a tiny GPT-2 on the built-in sample.
#   bash scripts/quickstart.sh [cpu|cuda|tpu] [--seed 3] [--run_dir runs/mine] [...]
# Whatever follows the device goes to all three scripts. Installs into .venv on the first run only.
set -euo pipefail

device=cpu
if [[ $# -gt 0 && "$1" != --* ]]; then device=$1; shift; fi
case "$device" in
  cpu) extra="" platforms=cpu ;;
  cuda | tpu) extra=$device platforms=$device,cpu ;;
  *) echo "usage: bash scripts/quickstart.sh [cpu|cuda|tpu] [options for the three scripts]" >&2; exit 2 ;;
esac

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_venv.sh
setup_venv "$extra"

export JAX_PLATFORMS=${JAX_PLATFORMS:-$platforms}  # fails loudly where the asked-for device is missing
for stage in train_sft train_ppo evaluate; do
  echo "==> scripts/$stage.py"
  .venv/bin/python "scripts/$stage.py" --config configs/quickstart.yaml "$@"
done
