"""scripts/tpu_vm.sh without a TPU: what it prints is what it would run, Google's own CLI knows every flag of it, and the part
that runs on the VM is run here, with a stand-in for gcloud that takes a folder for the VM."""

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
VM = ["--name", "my-tpu", "--zone", "us-west4-a"]
RUN = ["--", "--config", "configs/a b's.yaml", "--run_dir"]
COMMANDS = {  # what is asked for: what must stand in it, of each printed command
    ("create", *VM, "--type", "v5litepod-8"): [
        "gcloud compute tpus tpu-vm create my-tpu --accelerator-type=v5litepod-8 --version=v2-alpha-tpuv5-lite --zone=us-west4-a"
    ],
    ("create", *VM, "--type", "v6e-16", "--queued", "--spot", "--project", "p"): [
        "gcloud compute tpus queued-resources create my-tpu --node-id=my-tpu --accelerator-type=v6e-16 "
        "--runtime-version=v2-alpha-tpuv6e --spot --zone=us-west4-a --project=p"
    ],
    ("create", *VM, "--type", "v9-8", "--version", "new", "--spot"): [
        "gcloud compute tpus tpu-vm create my-tpu --accelerator-type=v9-8 --version=new --spot --zone=us-west4-a"
    ],
    ("status", *VM): ["gcloud compute tpus tpu-vm describe my-tpu --format='value(state)' --zone=us-west4-a"],
    ("status", *VM, "--queued"): [
        "gcloud compute tpus queued-resources describe my-tpu --format='value(state.state)' --zone=us-west4-a"
    ],
    ("logs", *VM, "--worker", "1"): [
        "gcloud compute tpus tpu-vm ssh my-tpu --worker=1 --command='tail -n 50 -F therapy_jax/run.log' --zone=us-west4-a"
    ],
    ("stop", *VM): [
        "gcloud compute tpus tpu-vm ssh my-tpu --worker=all --command='bash therapy_jax/scripts/tpu_vm.sh host_stop' --zone=us-west4-a"
    ],
    ("collect", *VM, "--run_dir", "gs://b/r", "--to", "here"): [
        "mkdir -p here",
        "gcloud storage rsync --recursive gs://b/r here/r",
        "gcloud compute tpus tpu-vm scp my-tpu:therapy_jax/run.log here/r/run.log --worker=0 --zone=us-west4-a",
    ],
    ("collect", *VM, "--run_dir", "runs/mine"): [
        "mkdir -p runs",
        "gcloud compute tpus tpu-vm scp --recurse my-tpu:therapy_jax/runs/mine runs/ --worker=0 --zone=us-west4-a",
        "gcloud compute tpus tpu-vm scp my-tpu:therapy_jax/run.log runs/mine/run.log --worker=0 --zone=us-west4-a",
    ],
    ("delete", *VM): ["gcloud compute tpus tpu-vm delete my-tpu --zone=us-west4-a"],
    ("delete", *VM, "--queued"): ["gcloud compute tpus queued-resources delete my-tpu --force --zone=us-west4-a"],
}
LONG = [  # looked at more closely below
    ("setup", *VM, "--data", "my data/MESC.csv"),
    ("run", *VM, "--type", "v5litepod-8", *RUN, "runs/mine"),
    ("run", *VM, "--type", "v5litepod-16", *RUN, "gs://b/r"),
]
FAKE_GCLOUD = f"""#!{sys.executable}
import json, os, pathlib, shutil, subprocess, sys
args = sys.argv[1:]
vm = pathlib.Path(os.environ["VM"])
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps(["gcloud", *args]) + "\\n")
if "ssh" in args:
    command = next(a for a in args if a.startswith("--command=")).split("=", 1)[1]
    sys.exit(subprocess.call(["bash", "-c", command], cwd=vm, env={{**os.environ, "HOME": str(vm)}}))
if "scp" in args:
    source, target = (str(vm / a.split(":", 1)[1]) if ":" in a else a for a in args[4:] if not a.startswith("--"))
    if os.path.isdir(source):
        shutil.copytree(source, os.path.join(target, os.path.basename(source)), dirs_exist_ok=True)
    else:
        shutil.copy(source, target)
"""


@pytest.fixture
def machine(tmp_path) -> Path:
    """A small checkout, an empty VM, and a PATH that starts with the stand-ins."""
    for folder in ("bin", "vm", "checkout/scripts"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("scripts/tpu_vm.sh", "scripts/setup_venv.sh", "pyproject.toml", "constraints.txt", ".gitignore"):
        shutil.copy(ROOT / name, tmp_path / "checkout" / name)
    stub(tmp_path / "bin" / "gcloud", FAKE_GCLOUD)
    return tmp_path


def stub(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def tpu_vm(machine: Path, *args: str) -> subprocess.CompletedProcess:
    env = {
        **os.environ,
        "PATH": f"{machine}/bin:{os.environ['PATH']}",
        "VM": f"{machine}/vm",
        "CALLS": f"{machine}/calls",
    }
    env |= {"TMPDIR": str(machine), "HOME": str(machine)}
    script = ["bash", str(machine / "checkout" / "scripts" / "tpu_vm.sh")]
    return subprocess.run([*script, *args], cwd=machine, env=env, capture_output=True, text=True, timeout=60)


def printed(done: subprocess.CompletedProcess) -> list[list[str]]:
    """The commands as a shell would read them."""
    lines = [line for line in done.stdout.splitlines() if line.startswith("+ ")]
    return [shlex.split(line.removeprefix("+ ")) for line in lines]


def called(machine: Path) -> list[list[str]]:
    log = machine / "calls"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def dry(args: tuple[str, ...]) -> tuple[str, ...]:
    return (args[0], "--dry-run", *args[1:])


@pytest.mark.parametrize("args", COMMANDS, ids=lambda args: " ".join(args[:1] + args[5:]))
def test_dry_run_prints_the_commands_and_runs_nothing(args, machine):
    done = tpu_vm(machine, *dry(args))
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.splitlines() == ["+ " + line for line in COMMANDS[args]]
    assert called(machine) == [] and not (machine / "checkout" / "runs").exists()


def remote(words: list[str]) -> list[str]:
    """The words of the command that ssh hands to the VM's shell."""
    return shlex.split(next(w for w in words if w.startswith("--command=")).split("=", 1)[1])


def test_a_pod_slice_starts_on_all_workers_with_a_coordinator(machine):
    one, pod = (printed(tpu_vm(machine, *dry(args)))[0] for args in LONG[1:])
    assert "--worker=all" in one and "--worker=all" in pod
    common = ["bash", "therapy_jax/scripts/tpu_vm.sh", "host_run", "train_sft train_ppo evaluate", *RUN[1:]]
    assert remote(one) == [*common, "runs/mine", "--require", "tpu"]
    assert remote(pod) == [*common, "gs://b/r", "--require", "tpu", "--mesh.coordinator", "auto"]
    assert called(machine) == []


def test_what_the_user_says_is_not_said_twice(machine):
    said = ["--run_dir=gs://b/r", "--require", "cpu", "--mesh.coordinator", "10.0.0.1:8476"]
    done = tpu_vm(machine, "run", "--dry-run", *VM, "--type", "v4-32", "--stages", "train_sft", "--", *said)
    assert remote(printed(done)[0])[3:] == ["train_sft", *said]


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["create"], "create needs --name, such as therapy"),
        (["create", "--name", "a"], "create needs --zone, such as us-west4-a"),
        (["create", *VM], "create needs --type, such as v5litepod-8"),
        (["create", *VM, "--type", "v9-8"], "no TPU software is known for --type v9-8; name it with --version"),
        (["create", *VM, "--type"], "--type needs a value"),
        (["create", *VM, "--type", "--spot"], "--type needs a value"),
        (["create", *VM, "--tipe", "v6e-8"], "create knows no --tipe"),
        (["collect", *VM], "collect needs --run_dir"),
        (["delete", *VM, "--", "x"], "delete takes nothing after --"),
        (["run", *VM, "--type", "v5e"], "must end in a number"),
        (["run", *VM, "--type", "v6e-16", "--", "--run_dir", "runs/x"], "needs -- --run_dir gs://BUCKET/"),
        (["run", *VM, "--type", "v6e-8", "--", "--dry-run"], "--dry-run stands before --"),
        (["start"], "no command start"),
    ],
)
def test_mistakes_are_one_sentence(args, named, machine):
    done = tpu_vm(machine, *args)
    assert done.returncode == 2 and called(machine) == []
    assert done.stderr.splitlines()[-1].startswith("tpu_vm.sh: ") and named in done.stderr.splitlines()[-1]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck")
def test_shellcheck_has_nothing_to_say():
    done = subprocess.run(["shellcheck", str(ROOT / "scripts" / "tpu_vm.sh")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_help_shows_every_command():
    done = subprocess.run(["bash", str(ROOT / "scripts" / "tpu_vm.sh"), "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    for command in {args[0] for args in [*COMMANDS, *LONG]}:
        assert f"tpu_vm.sh {command} " in done.stdout


PYTHON = """#!/bin/bash
echo "ran" "$@"
if [[ "$*" == *train_ppo* && "$*" == *waits* ]]; then
  trap 'echo saved; exit 75' TERM
  echo waiting >waiting
  while :; do read -t 0.05 <> <(:) || true; done
fi
"""


def git(folder: Path, *args: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    return subprocess.run(
        ["git", *identity, *args], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_from_setup_to_collect_on_a_folder_that_stands_for_the_vm(machine):
    """Every remote command runs for real in the folder; only Python, pip, apt and uv are stand-ins."""
    checkout, vm = machine / "checkout", machine / "vm"
    git(checkout, "init", "-q")
    git(checkout, "add", "-A")
    git(checkout, "commit", "-qm", "one")
    stub(
        machine / "bin" / "sudo", "#!/bin/bash\necho sudo $* >>$VM/tools\nexit 1\n"
    )  # no WordNet: it goes on all the same
    stub(
        machine / "bin" / "python3",
        "#!/bin/bash\n[[ $1 == --version ]] && echo Python 3.10.12\necho python3 $* >>$VM/tools\nexit 1\n",
    )
    log = done = tpu_vm(machine, "setup", *VM)
    assert done.returncode == 1  # pip failed: it stops there, and says where
    assert "+ git bundle" in done.stdout and "doctor.py" not in done.stdout
    assert git(vm / "therapy_jax", "rev-parse", "HEAD") == git(checkout, "rev-parse", "HEAD")

    stub(machine / "bin" / "python3", "#!/bin/bash\necho python3 $* >>$VM/tools\n[[ $1 == -m ]]\n")
    uv = f"#!/bin/bash\necho uv $* >>$VM/tools\nif [[ $1 == venv ]]; then mkdir -p .venv/bin; cp {machine}/python .venv/bin/; fi\n"
    stub(vm / ".local" / "bin" / "uv", uv + f'[[ "$*" != "python find"* ]] || echo {sys.executable}\n')
    stub(machine / "python", f'#!/bin/bash\n[[ $1 == -c ]] && exec {sys.executable} "$@"\n' + PYTHON.split("\n", 1)[1])
    (checkout / "new.txt").write_text("two")
    git(checkout, "add", "-A")
    git(checkout, "commit", "-qm", "two")
    (machine / "my data").mkdir()
    (machine / "my data" / "MESC.csv").write_text("rows")
    done = tpu_vm(machine, *LONG[0][:-1], str(machine / "my data" / "MESC.csv"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (vm / "therapy_jax" / "new.txt").read_text() == "two"
    assert (vm / "therapy_jax" / "MESC.csv").read_text() == "rows"
    tools = (vm / "tools").read_text()
    assert "uv pip install --python .venv/bin/python -c constraints.txt -e .[tpu,gcs]" in tools
    assert "sudo apt-get -qq -o DPkg::Lock::Timeout=300 install -y wordnet-base wordnet-sense-index" in tools
    assert done.stdout.rstrip().endswith("ran scripts/doctor.py --require tpu")
    assert called(machine) == [w for p in (log, done) for w in printed(p) if w[0] == "gcloud"]  # as printed, so run

    options = ["--type", "v5litepod-8", "--", "--run_dir", "runs/a run"]
    run = functools.partial(tpu_vm, machine, "run", *VM, *options)
    assert run("--seed", "3").returncode == 0
    wait_for(vm / "therapy_jax" / "run.log", "finished")
    stages = [
        f"ran scripts/{s}.py --run_dir runs/a run --seed 3 --require tpu"
        for s in ("train_sft", "train_ppo", "evaluate")
    ]
    assert [line for line in (vm / "therapy_jax" / "run.log").read_text().splitlines() if line[:3] == "ran"] == stages

    assert run("--waits", "1").returncode == 0
    wait_for(vm / "therapy_jax" / "waiting", "waiting")
    again = run()
    assert again.returncode == 2 and re.search(r"process \d+ still runs here; stop it first", again.stderr)
    assert tpu_vm(machine, "stop", *VM).returncode == 0
    wait_for(vm / "therapy_jax" / "run.log", "train_ppo ended with exit code 75")
    text = (vm / "therapy_jax" / "run.log").read_text()
    assert text.count("saved") == 1 and text.count("scripts/evaluate.py") == 2  # the first run's two lines alone
    assert "nothing runs on" in tpu_vm(machine, "stop", *VM).stderr

    (vm / "therapy_jax" / "runs" / "mine").mkdir(parents=True)
    (vm / "therapy_jax" / "runs" / "mine" / "results.json").write_text("{}")
    assert tpu_vm(machine, "collect", *VM, "--run_dir", "runs/mine").returncode == 0
    assert {f.name for f in (checkout / "runs" / "mine").iterdir()} == {"results.json", "run.log"}


def wait_for(path: Path, text: str) -> None:
    """Until another process has written it; it ends by itself."""
    command = f'until grep -q "{text}" "{path}" 2>/dev/null; do read -t 0.05 <> <(:) || true; done'
    subprocess.run(["bash", "-c", command], timeout=60, check=True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcloud") is None, reason="the Google Cloud CLI is not installed")
def test_google_s_own_cli_knows_every_flag(machine):
    env = {**os.environ, "CLOUDSDK_CONFIG": str(machine / "empty"), "CLOUDSDK_CORE_CHECK_GCE_METADATA": "0"}
    used: dict[str, set[str]] = {}
    for args in [*COMMANDS, *LONG]:
        for words in printed(tpu_vm(machine, *dry(args))):
            if words[0] == "gcloud":
                depth = 3 if words[1] == "storage" else 5
                flags = {w.split("=")[0] for w in words[depth:] if w.startswith("--")}
                used.setdefault(" ".join(words[:depth]), set()).update(flags)
    assert len(used) == 9
    for command, flags in used.items():
        shown = subprocess.run(
            [*command.split(), "--help"], env=env, capture_output=True, text=True, timeout=120
        ).stdout
        known = set(re.findall(r"--[a-z-]+", re.sub(r"\x1b\[[0-9;]*m", "", shown))) | {"--format", "--project"}
        assert flags <= known, (command, flags - known)
