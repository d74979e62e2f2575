"""The README is run: every command in it is taken, by the script that it names, in the form that costs no work."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
STAGES = ("train_sft", "train_ppo", "evaluate")  # what the README's loop over $stage stands for
FREE = ("benchmark.py", "doctor.py")  # their own test files run these
# The scripts that a person starts; what benchmark.py starts for itself (benchmark_*.py), no.
SCRIPTS = sorted(
    path.name
    for path in (ROOT / "scripts").glob("*.py")
    if "__main__" in path.read_text(encoding="utf-8") and not path.name.startswith("benchmark_")
)


def commands() -> list[str]:
    """The lines of the README's bash blocks, continued lines joined, comments and shell around them off."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            line = re.sub(r"(^|\s)#.*", "", line).split("||")[0].strip()
            found += [line.replace("$stage", stage) for stage in STAGES] if "$stage" in line else [line]
    found += [f"python {text}" for text in re.findall(r"`python (scripts/[^`]+)`", README)]
    return list(dict.fromkeys(line for line in found if line.startswith(("python scripts/", "bash scripts/"))))


PYTHON = [line for line in commands() if line.startswith("python")]
TPU_VM = [line for line in commands() if line.startswith("bash scripts/tpu_vm.sh")]


def test_the_readme_has_commands_and_names_every_script():
    assert len(PYTHON) > 15 and len(TPU_VM) > 8
    assert [name for name in SCRIPTS if f"scripts/{name}" not in README] == []
    named = set(re.findall(r"scripts/(\w+\.(?:py|sh))", README))
    assert [name for name in named if not (ROOT / "scripts" / name).is_file()] == []


@pytest.mark.parametrize("line", [line for line in PYTHON if not any(name in line for name in FREE)])
def test_a_command_is_understood(line):
    """--print_config reads the command line and the file as the script does, and stops there. MESC's path is the reader's."""
    _, script, *arguments = shlex.split(line)
    done = subprocess.run(
        [sys.executable, script, *arguments, "--print_config"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("run_dir: ")


@pytest.mark.parametrize("line", [line for line in PYTHON if "benchmark.py" in line])
def test_a_benchmark_command_is_understood(line, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import benchmark

    assert benchmark.parse(shlex.split(line)[2:]).repeats >= 5


@pytest.mark.parametrize("line", TPU_VM)
def test_a_command_for_a_tpu_vm_would_be_run(line):
    script = 'vm="--name therapy --zone us-west4-a"; ' + re.sub(r"(tpu_vm.sh \w+)", r"\1 --dry-run", line)
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "gcloud" in done.stdout + done.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_explains_and_does_not_wait_for_jax(name):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", f"scripts/{name}", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "usage:" in done.stdout
    assert not re.search(r"\| +(jax|matplotlib|torch|sklearn|transformers)$", done.stderr, re.MULTILINE)


def test_a_misspelt_key_is_one_sentence_with_the_nearest_name():
    done = subprocess.run(
        [sys.executable, "scripts/train_ppo.py", "--ppo.learning_rat", "1"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "learning_rat" in done.stderr and "ppo.learning_rate" in done.stderr and "Traceback" not in done.stderr


def test_every_link_within_the_repository_leads_somewhere():
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert targets and [t for t in targets if not (ROOT / t).exists()] == []
