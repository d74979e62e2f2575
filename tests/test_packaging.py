"""The first five minutes of a user: the scripts that install and start, the pins, and what a wheel carries."""

import importlib.resources
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = dict(re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
SHELL_SCRIPTS = [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci" / "run"]
COREUTILS = "bash basename cat dirname grep head mkdir cp chmod".split()


def canonical(requirement: str) -> str:
    """The package's name alone, as the pins spell it: "jsonargparse[signatures]>=4.53" -> "jsonargparse"."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~; ]", requirement)[0]).lower()


# ---- the scripts, run as real processes in a small tree, with stubs in the place of Python and pip


@pytest.fixture
def tree(tmp_path) -> Path:
    """A checkout in miniature: the real shell scripts, and stages that only say how they were called. PATH is `bin`."""
    root = tmp_path / "a checkout"  # a space in the path must not matter
    for folder in ("scripts", "configs", "bin"):
        (root / folder).mkdir(parents=True)
    for script in (ROOT / "scripts").glob("*.sh"):
        shutil.copy(script, root / "scripts")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, root)
    for stage in ("train_sft", "train_ppo", "evaluate"):
        (root / "scripts" / f"{stage}.py").write_text(
            "import os, sys\nprint('RAN', *sys.argv, os.environ['JAX_PLATFORMS'])\n"
        )
    for tool in COREUTILS:
        found = shutil.which(tool)
        assert found, tool
        (root / "bin" / tool).symlink_to(found)
    return root


def stub(path: Path, body: str) -> None:
    path.write_text(f"#!{shutil.which('bash')}\n{body}\n")
    path.chmod(0o755)


def stub_python(root: Path) -> None:
    """python3: `-m venv` copies itself into .venv, `-m pip` and the tools are only logged, all else is the real Python."""
    log = root / "calls.log"
    stub(
        root / "bin" / "python3",
        f"""case "$1 $2" in
  "-m venv") echo "$*" >>"{log}"; mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
  "-m pip") echo "$*" >>"{log}" ;;
  "-m pytest") echo "$*" >>"{log}"; exit "${{PYTEST_STATUS:-0}}" ;;
  *) exec "{sys.executable}" "$@" ;;
esac""",
    )


def run_script(root: Path, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(root / "scripts" / script), *arguments],
        cwd=root.parent,  # never the root: the scripts find it themselves
        env={"PATH": str(root / "bin"), "HOME": str(root), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def installs(root: Path) -> list[str]:
    """The pip calls since the last look."""
    log = root / "calls.log"
    calls = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return [call for call in calls if call.startswith("-m pip")]


@pytest.mark.parametrize("script", SHELL_SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_parse(script):
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_ci_entry_is_executable():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


@pytest.mark.parametrize("device", ["gpu", "-h", ""])
def test_quickstart_refuses_an_unknown_device(tree, device):
    stub_python(tree)
    done = run_script(tree, "quickstart.sh", device)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"usage: .*\[cpu\|cuda\|tpu\].*\n", done.stderr)
    assert not (tree / ".venv").exists()


def stub_version(path: Path, version: tuple[int, int]) -> None:
    """A Python that says it is `version`; any real use of it fails."""
    stub(
        path,
        f"""case "$1" in
  --version) echo "Python {version[0]}.{version[1]}.0" ;;
  -c) exec "{sys.executable}" -c "import sys; sys.version_info = (*{version}, 0); $2" ;;
  *) exit 3 ;;
esac""",
    )


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh"])
@pytest.mark.parametrize("version", [(2, 7), (3, 9), (3, 10), (3, 15)])
def test_an_unfit_python_gets_one_clear_line(tree, script, version):
    for name in ("python3", "python3.12"):  # a name promises nothing: pyenv's python3.12 may be another
        stub_version(tree / "bin" / name, version)
    done = run_script(tree, script)
    assert done.returncode == 1
    found = f"Python {version[0]}.{version[1]}.0"
    assert done.stderr == f"{script}: needs Python 3.11, 3.12, 3.13 or 3.14 on the PATH (found: {found})\n"
    assert not (tree / ".venv").exists()


@pytest.mark.parametrize("version", [(3, 11), (3, 14)])
def test_a_fit_python_is_taken(tree, version):
    stub_version(tree / "bin" / "python3", version)
    done = run_script(tree, "quickstart.sh")
    assert f"==> .venv with Python {version[0]}.{version[1]}.0" in done.stdout
    assert done.returncode == 3  # and then asked to make .venv


def test_no_python_at_all_gets_one_clear_line(tree):
    done = run_script(tree, "quickstart.sh")
    assert done.returncode == 1
    assert done.stderr.endswith("(found: no python3)\n") and done.stderr.count("\n") == 1


def test_a_later_python_serves_where_python3_is_old(tree):
    stub_python(tree)
    (tree / "bin" / "python3").rename(tree / "bin" / "python3.13")
    stub(tree / "bin" / "python3", "exit 1")
    assert run_script(tree, "quickstart.sh").returncode == 0
    assert (tree / ".venv" / "bin" / "python").exists()


def test_a_python_without_venv_says_what_to_install(tree):
    real = f'exec "{sys.executable}" "$@"'
    stub(tree / "bin" / "python3", f'[[ "$*" == *ensurepip* ]] && exit 1\n{real}')
    done = run_script(tree, "quickstart.sh")
    assert done.returncode == 1
    assert f"apt-get install python{sys.version_info[0]}.{sys.version_info[1]}-venv" in done.stderr


def test_quickstart_runs_the_three_stages_with_the_extra_arguments(tree):
    stub_python(tree)
    done = run_script(tree, "quickstart.sh", "--seed", "3", "--run_dir", "a run")
    assert done.returncode == 0, done.stderr
    ran = [line for line in done.stdout.splitlines() if line.startswith("RAN")]
    expected = "RAN scripts/{}.py --config configs/quickstart.yaml --seed 3 --run_dir a run cpu"
    assert ran == [expected.format(stage) for stage in ("train_sft", "train_ppo", "evaluate")]


def test_quickstart_stops_at_a_stage_that_fails(tree):
    stub_python(tree)
    (tree / "scripts" / "train_ppo.py").write_text("raise SystemExit(7)\n")
    done = run_script(tree, "quickstart.sh")
    assert done.returncode == 7
    assert "evaluate.py" not in done.stdout


def test_it_installs_once_and_again_when_something_changed(tree):
    stub_python(tree)
    pip = "-m pip install --disable-pip-version-check -c constraints.txt -e "
    run_script(tree, "quickstart.sh")
    assert installs(tree) == [pip + "."]
    run_script(tree, "quickstart.sh", "cpu")
    assert installs(tree) == []
    run_script(tree, "quickstart.sh", "cuda")
    assert installs(tree) == [pip + ".[cuda]"]
    run_script(tree, "quickstart.sh", "tpu")
    assert installs(tree) == [pip + ".[tpu]"]
    run_script(tree, "quickstart.sh", "cuda")
    assert installs(tree) == []
    run_script(tree, "quickstart.sh")
    assert installs(tree) == []  # the core came with the extras
    with (tree / "constraints.txt").open("a") as file:
        file.write("another==1.0\n")
    run_script(tree, "quickstart.sh", "tpu")
    run_script(tree, "quickstart.sh", "cuda")
    assert installs(tree) == [pip + ".[tpu]", pip + ".[cuda]"]


def test_a_failed_install_is_tried_again(tree):
    stub_python(tree)
    python = tree / "bin" / "python3"
    working = python.read_text()
    python.write_text(working.replace('"-m pip") ', '"-m pip") exit 9; '))
    done = run_script(tree, "quickstart.sh")
    assert done.returncode == 9 and "RAN" not in done.stdout
    # Also in a shell that does not stop at errors, as tpu_vm.sh opens one on each host.
    sourced = ["bash", "-c", "source scripts/setup_venv.sh && setup_venv tpu"]
    environment = {"PATH": str(tree / "bin"), "HOME": str(tree)}
    assert subprocess.run(sourced, cwd=tree, env=environment, capture_output=True).returncode == 9
    assert not (tree / ".venv" / "installed").exists()
    shutil.rmtree(tree / ".venv")
    python.write_text(working)
    run_script(tree, "quickstart.sh")
    assert len(installs(tree)) == 1


def test_a_broken_environment_is_made_anew(tree):
    stub_python(tree)
    run_script(tree, "quickstart.sh")
    installs(tree)
    stub(tree / ".venv" / "bin" / "python", "exit 1")
    run_script(tree, "quickstart.sh")
    assert (tree / ".venv" / "bin" / "python").read_text() == (tree / "bin" / "python3").read_text()


def test_uv_is_used_where_there_is_one(tree):
    stub_python(tree)
    body = f"""echo "uv $*" >>"{tree}/calls.log"
if [[ "$1" == venv ]]; then mkdir -p .venv/bin; cp "{tree}/bin/python3" .venv/bin/python; fi"""
    stub(tree / "bin" / "uv", body)
    done = run_script(tree, "quickstart.sh")
    assert done.returncode == 0, done.stderr
    calls = (tree / "calls.log").read_text().splitlines()
    assert [call.split()[1] for call in calls] == ["venv", "pip"]
    assert calls[1] == "uv pip install --python .venv/bin/python -c constraints.txt -e ."


def with_tools(root: Path, ruff: int, pyright: int) -> None:
    """The environment as scripts/test.sh leaves it, with linters that end so."""
    stub_python(root)
    (root / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(root / "bin" / "python3", root / ".venv" / "bin" / "python")
    stub(root / ".venv" / "bin" / "ruff", f'echo "ruff $*" >>"{root}/calls.log"; exit {ruff}')
    stub(root / ".venv" / "bin" / "pyright", f'echo "pyright $*" >>"{root}/calls.log"; exit {pyright}')


@pytest.mark.parametrize(("ruff", "pyright", "tests"), [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)])
def test_test_script_runs_all_three_and_fails_if_any_does(tree, ruff, pyright, tests):
    with_tools(tree, ruff, pyright)
    done = run_script(tree, "test.sh", PYTEST_STATUS=str(tests))
    assert (done.returncode != 0) == bool(ruff or pyright or tests)
    called = (tree / "calls.log").read_text()
    assert "ruff check" in called and "pyright" in called and "-m not slow" in called


def test_test_script_all_clears_the_marker_and_passes_arguments_on(tree):
    with_tools(tree, 0, 0)
    run_script(tree, "test.sh", "--all", "tests/test_ppo.py", "-x")
    assert " -m  tests/test_ppo.py -x\n" in (tree / "calls.log").read_text()


def test_test_script_tries_the_cpu_build_of_torch_first(tree):
    with_tools(tree, 0, 0)
    run_script(tree, "test.sh")
    torch, ours = installs(tree)
    assert torch.endswith("-c constraints.txt torch==2.13.0+cpu") and ours.endswith("-e .[test]")
    run_script(tree, "test.sh")
    assert installs(tree) == []


@pytest.mark.parametrize(("ci", "uid", "installed"), [("true", "0", True), ("true", "1000", False), ("", "0", False)])
def test_debian_packages_come_only_in_ci_and_as_root(tree, ci, uid, installed):
    with_tools(tree, 0, 0)
    script = tree / "scripts" / "test.sh"
    script.write_text(script.read_text().replace("/usr/share/wordnet", str(tree / "wordnet").replace(" ", r"\ ")))
    stub(tree / "bin" / "id", f"echo {uid}")
    stub(tree / "bin" / "apt-get", f'echo "apt-get $DEBIAN_FRONTEND $*" >>"{tree}/calls.log"')
    done = run_script(tree, "test.sh", CI=ci)
    assert done.returncode == 0, done.stderr
    calls = [line for line in (tree / "calls.log").read_text().splitlines() if line.startswith("apt-get")]
    assert [line.split()[2] for line in calls] == (["update", "install"] if installed else [])
    assert not installed or calls[1].endswith("--no-install-recommends wordnet-base wordnet-sense-index")


# ---- the pins


def test_every_dependency_is_pinned():
    wanted = [*PYPROJECT["project"]["dependencies"], *PYPROJECT["project"]["optional-dependencies"]["test"]]
    assert [name for name in map(canonical, wanted) if name not in PINS and name != "torch"] == []


def test_torch_and_its_kin_are_not_pinned():
    assert [name for name in PINS if re.match(r"torch|triton|nvidia|trl$|cuda", name)] == []


def test_pins_satisfy_the_lower_bounds():
    def parts(version: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", version)]

    bounds = [re.match(r"([\w.-]+)(?:\[\w+\])?>=([\d.]+)", r) for r in PYPROJECT["project"]["dependencies"]]
    assert all(bounds)
    assert [b[0] for b in bounds if b and parts(PINS[canonical(b[1])]) < parts(b[2])] == []


def test_the_torch_that_is_tried_satisfies_the_extra():
    tried = re.search(r"torch==(\d+)\.(\d+)", (ROOT / "scripts" / "test.sh").read_text())
    bound = re.search(r"torch>=(\d+)\.(\d+)", " ".join(PYPROJECT["project"]["optional-dependencies"]["test"]))
    assert tried and bound and tuple(map(int, tried.groups())) >= tuple(map(int, bound.groups()))


def test_no_file_names_a_package_index():
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    index = re.compile(r"https?://\S+/(?:simple|packages|whl)/|find-links|index.?url\b|file://", re.IGNORECASE)
    files = [
        ROOT / name
        for name in listed.stdout.splitlines()
        if (ROOT / name).is_file() and name != "tests/test_packaging.py"
    ]
    assert [str(f.relative_to(ROOT)) for f in files if index.search(f.read_bytes().decode(errors="ignore"))] == []


# ---- what the package carries


def test_sample_and_official_splits_are_in_the_package():
    package = importlib.resources.files("therapy_jax")
    assert (package / "sample" / "dialogues.jsonl").read_text(encoding="utf-8").startswith("{")
    assert (package / "official_splits" / "mesc.json").read_text().startswith(("{", "["))


@pytest.mark.slow
def test_a_wheel_carries_the_package_and_its_data_and_nothing_else(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode and re.search(
        "connection|temporary failure|no matching distribution", built.stderr, re.IGNORECASE
    ):
        pytest.skip("the build backend cannot be fetched here")
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    here = [p for p in (ROOT / "therapy_jax").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert names == {str(p.relative_to(ROOT)) for p in here}
