#!/usr/bin/env bash
# A Cloud TPU from nothing to a trained model, for one host and for a pod slice of many. Every step is printed as a command
# that can be read, copied and run by hand; --dry-run prints and runs nothing.
#
#   bash scripts/tpu_vm.sh create  --name N --zone Z --type v5litepod-8 [--spot] [--queued] [--version V]
#   bash scripts/tpu_vm.sh status  --name N --zone Z [--queued]
#   bash scripts/tpu_vm.sh setup   --name N --zone Z [--data FILE_OR_FOLDER]      this commit and the extra tpu, on all workers
#   bash scripts/tpu_vm.sh run     --name N --zone Z --type T [--stages "train_sft train_ppo evaluate"] -- --config C --run_dir D
#   bash scripts/tpu_vm.sh logs    --name N --zone Z [--worker 0]
#   bash scripts/tpu_vm.sh stop    --name N --zone Z                              save and end; `run` again goes on
#   bash scripts/tpu_vm.sh collect --name N --zone Z --run_dir D [--to runs]
#   bash scripts/tpu_vm.sh delete  --name N --zone Z [--queued]
#
# Everywhere: [--project P] [--dry-run]. On the VM itself `run` and `stop` are host_run and host_stop, at the end of this file.
set -euo pipefail

fail() { echo "tpu_vm.sh: $*" >&2; exit 2; }
usage() { sed -n '2,/^set/{/^#/!d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }

# Words as a shell reads them back, quoted only where they must be.
quote() {
  local word option
  local -a words=()
  for word in "$@"; do
    option=""
    if [[ "$word" =~ ^--[a-z-]+= ]]; then option=${BASH_REMATCH[0]}; word=${word#"$option"}; fi
    [[ "$word" =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    words+=("$option$word")
  done
  echo "${words[*]}"
}
step() { echo "+ $(quote "$@")"; [[ -n "$dry_run" ]] || "$@"; }

need() { local option; for option in "$@"; do [[ -n "${!option}" ]] || fail "$command needs --$option, such as ${hint[$option]}"; done; }
declare -A hint=([name]=therapy [zone]=us-west4-a [type]="v5litepod-8 (one host) or v5litepod-16 (a pod slice)"
  [run_dir]="runs/mine, or gs://BUCKET/runs/mine")

tpu() { step gcloud compute tpus "$1" "$2" "${@:3}" --zone="$zone" ${project:+--project="$project"}; }
on_workers() { tpu tpu-vm ssh "$name" --worker="$1" --command="$2"; }

# The software that Google's documentation names for each generation of chips.
version_for() {
  case "$1" in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    v[234]-*) echo tpu-ubuntu2204-base ;;
    *) fail "no TPU software is known for --type $1; name it with --version (gcloud compute tpus tpu-vm versions list)" ;;
  esac
}

# The number in a type counts chips (v5litepod, v6e) or cores (the rest); of either, one host has 8 at most.
is_pod() { [[ "$1" =~ -([0-9]+)$ ]] || fail "--type $1: must end in a number, as in v5litepod-8"; ((BASH_REMATCH[1] > 8)); }

create() {
  need name zone type
  version=${version:-$(version_for "$type")}
  if [[ -n "$queued" ]]; then # waits in Google's queue until there is room; without it, no room is an error
    tpu queued-resources create "$name" --node-id="$name" --accelerator-type="$type" --runtime-version="$version" ${spot:+--spot}
  else
    tpu tpu-vm create "$name" --accelerator-type="$type" --version="$version" ${spot:+--spot}
  fi
}

status() { # READY, ACTIVE, or PREEMPTED: then delete, create, setup and run again
  need name zone
  if [[ -n "$queued" ]]; then tpu queued-resources describe "$name" --format="value(state.state)"; else tpu tpu-vm describe "$name" --format="value(state)"; fi
}

delete() { # gcloud asks before it deletes
  need name zone
  if [[ -n "$queued" ]]; then tpu queued-resources delete "$name" --force; else tpu tpu-vm delete "$name"; fi
}

setup() {
  need name zone
  local bundle
  bundle=${TMPDIR:-/tmp}/therapy_jax.bundle
  [[ -z "$(git status --porcelain -uno)" ]] || echo "note: only what is committed is sent; git status shows more" >&2
  step git bundle create --quiet "$bundle" HEAD
  tpu tpu-vm scp "$bundle" "$name:therapy_jax.bundle" --worker=all
  on_workers all "git init -q therapy_jax && cd therapy_jax && git fetch -q ../therapy_jax.bundle HEAD && git checkout -q --detach FETCH_HEAD"
  if [[ -n "$data" ]]; then tpu tpu-vm scp --recurse "$data" "$name:therapy_jax/" --worker=all; fi
  # The images' own Python may be older than ours needs to be: uv brings one. Where WordNet fails, the doctor says so.
  on_workers all "PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install -q --user uv && ~/.local/bin/uv python install -q 3.11"
  on_workers all "sudo apt-get -qq -o DPkg::Lock::Timeout=300 install -y wordnet-base wordnet-sense-index || true"
  on_workers all "cd therapy_jax && export PATH=~/.local/bin:\$PATH && source scripts/setup_venv.sh && setup_venv tpu,gcs"
  on_workers all "cd therapy_jax && .venv/bin/python scripts/doctor.py --require tpu"
}

run() {
  need name zone type
  local -a options=("$@")
  [[ " $* " != *" --dry-run "* ]] || fail "--dry-run stands before --"
  [[ " $* " == *" --require "* ]] || options+=(--require tpu)
  if is_pod "$type"; then
    [[ " $* " == *" --run_dir gs://"* || " $* " == *" --run_dir=gs://"* ]] ||
      fail "a pod slice ($type) needs -- --run_dir gs://BUCKET/...: its hosts share no disk"
    [[ " $* " == *" --mesh.coordinator"* ]] || options+=(--mesh.coordinator auto)
  fi
  on_workers all "bash therapy_jax/scripts/tpu_vm.sh host_run $(quote "$stages" "${options[@]}")"
}

logs() { need name zone; on_workers "$worker" "tail -n 50 -F therapy_jax/run.log"; }
stop() { need name zone; on_workers all "bash therapy_jax/scripts/tpu_vm.sh host_stop"; }

collect() {
  need name zone run_dir
  local target
  target=$to/$(basename "$run_dir")
  step mkdir -p "$to"
  if [[ "$run_dir" == gs://* ]]; then
    step gcloud storage rsync --recursive "$run_dir" "$target" ${project:+--project="$project"}
  else
    [[ "$run_dir" == /* ]] || run_dir=therapy_jax/$run_dir
    tpu tpu-vm scp --recurse "$name:$run_dir" "$to/" --worker=0
  fi
  tpu tpu-vm scp "$name:therapy_jax/run.log" "$target/run.log" --worker=0
}

# ---- on the VM

# Is run.pid a script of ours, and not another process that came to have the number after a reboot?
running() { [[ -s run.pid ]] && grep -qz "^scripts/" "/proc/$(<run.pid)/cmdline" 2>/dev/null; }

# host_run STAGES OPTIONS...: the scripts one after the other, with the same options, going on when the ssh session ends.
host_run() {
  local stages=$1
  shift
  cd "$(dirname "${BASH_SOURCE[0]}")/.."
  if running; then fail "process $(<run.pid) still runs here; stop it first"; fi
  # shellcheck disable=SC2016  # for the inner shell
  nohup bash -c '
    for stage in $0; do
      echo "==> scripts/$stage.py $*"
      .venv/bin/python "scripts/$stage.py" "$@" & echo $! >run.pid
      wait $! || { echo "==> $stage ended with exit code $?"; exit; }
    done
    echo "==> finished"' "$stages" "$@" >>run.log 2>&1 </dev/null &
  echo "$(hostname): started; output goes to therapy_jax/run.log"
}

host_stop() {
  cd "$(dirname "${BASH_SOURCE[0]}")/.."
  running || fail "nothing runs on $(hostname)"
  kill -TERM "$(<run.pid)"
  echo "$(hostname): asked process $(<run.pid) to save and end; run.log says when it has"
}

command=${1:-}
case "$command" in
  create | status | setup | run | logs | stop | collect | delete) shift ;;
  host_run | host_stop) "$@"; exit ;;
  -h | --help | "") usage; [[ -n "$command" ]]; exit ;;
  *) usage >&2; fail "no command $command" ;;
esac

name="" zone="" type="" project="" version="" data="" run_dir="" to=runs worker=0 spot="" queued="" dry_run=""
stages="train_sft train_ppo evaluate"
while [[ $# -gt 0 ]]; do
  case "$1" in
    --spot | --queued) declare "${1#--}=yes"; shift ;;
    --dry-run) dry_run=yes; shift ;;
    --name | --zone | --type | --project | --version | --data | --run_dir | --to | --worker | --stages)
      [[ -n "${2:-}" && "${2:-}" != --* ]] || fail "$1 needs a value"
      declare "${1#--}=$2"; shift 2 ;;
    --) shift; break ;;
    *) fail "$command knows no $1; options of the scripts come after --" ;;
  esac
done
[[ $# -eq 0 || "$command" == run ]] || fail "$command takes nothing after --"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ -n "$dry_run" ]] || type -P gcloud >/dev/null || fail "needs the Google Cloud CLI (gcloud) on the PATH; --dry-run does without"
"$command" "$@"
