"""scripts/doctor.py and --require, with the real thing wherever this machine can have it: locks held by processes, folders
that cannot be written, a hub that does not answer, a JAX that hangs."""

import contextlib
import fcntl
import http.server
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from therapy_jax import wordnet

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import doctor  # noqa: E402

HOLD = """
import fcntl, sys
file = open(sys.argv[1], "w")
if sys.argv[2] != "open":
    getattr(fcntl, sys.argv[2])(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def run(*args: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "", **environment}
    return subprocess.run([sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def test_a_whole_machine_gets_no_error(tmp_path):
    done = run("scripts/doctor.py", "--run_dir", str(tmp_path / "run"), "--compilation_cache", str(tmp_path))
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    assert lines[-1].startswith("0 error(s)")
    assert all(re.match(r"(ok|warning) +\S| +-> \S", line) for line in lines[:-1]), done.stdout
    assert re.search(r"ok +jax +1 x cpu \(cpu\)", done.stdout)
    assert "\033" not in done.stdout  # no colours into a pipe
    assert not (tmp_path / "run").exists()


def test_doctor_exits_with_1_where_the_required_platform_is_missing(tmp_path):
    done = run("scripts/doctor.py", "--require", "tpu", "--run_dir", "/dev/null/run", "--compilation_cache", "null")
    assert done.returncode == 1
    assert re.search(r"error +jax .*cpu.*--require tpu\n +-> install the extra \"tpu\"", done.stdout)
    assert re.search(
        r"error +run_dir +/dev/null/run cannot be written \(Not a directory\)\n +-> .*--run_dir", done.stdout
    )
    assert int(done.stdout.splitlines()[-1].split()[0]) >= 2


# ---- who holds the TPU


@contextlib.contextmanager
def holding(path: Path, how: str) -> Iterator[int]:
    """A process that opens a file, and locks it by fcntl.flock or fcntl.lockf; its pid."""
    args = [sys.executable, "-c", HOLD, str(path), how]
    with subprocess.Popen(args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout
        assert process.stdout.readline() == "held\n"
        yield process.pid
        process.stdin.close()


@pytest.mark.parametrize("how", ["flock", "lockf", "open"])  # libtpu uses lockf; a chip's device file is only open
def test_the_process_that_holds_the_lock_is_named(how, tmp_path):
    lock = tmp_path / "libtpu_lockfile"
    with holding(lock, how) as pid:
        (finding,) = doctor.tpu_holders(lock)
        assert finding.level == "error" and f"process {pid} ({sys.executable}" in finding.what
        assert finding.remedy.endswith(f"kill {pid}")
        assert [f.level for f in doctor.tpu_holders(lock, needed=False)] == ["warning"]  # no TPU here: no error
    assert lock.exists() and list(doctor.tpu_holders(lock)) == []  # a lock file that nobody holds does no harm


def test_our_own_files_are_not_another_process(tmp_path):
    lock = tmp_path / "lock"
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert doctor.holders(lock) == set()
    assert doctor.holders(tmp_path / "absent") == set()


AS_NOBODY = """
import os, sys
sys.path[:0] = ["scripts"]
import doctor
from pathlib import Path
if os.getuid() == 0:
    os.setgid(65534), os.setuid(65534)  # root may write everywhere
folder = Path(sys.argv[1])
print(doctor.show(doctor.folder("run_dir", str(folder / "closed" / "run"))))
print(doctor.show(doctor.folder("run_dir", str(folder / "dark" / "a" / "run"))))
print(*map(doctor.show, doctor.tpu_holders(folder / "left")), sep="\\n")
"""


def test_closed_folders_and_locks_of_others_are_told():
    """chmod, for a user who is not root; another user's lock shows in /proc/locks alone."""
    with tempfile.TemporaryDirectory() as name:  # not tmp_path, whose parents are closed to others
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "closed").mkdir(mode=0o555)
        (folder / "dark").mkdir(mode=0)  # not even looked into
        (folder / "left").touch()
        (folder / "left").chmod(0o644 if os.geteuid() == 0 else 0o444)
        done = run("-c", AS_NOBODY, name)
        for path in ("closed/run", "dark/a/run"):
            assert f"{name}/{path} cannot be written (Permission denied)" in done.stdout, done.stderr
        assert re.search(r"error +TPU +.*left was left behind by another user.*\n.*sudo rm", done.stdout)
        if os.geteuid() == 0:
            with holding(folder / "left", "lockf") as pid:
                assert f"held by process {pid} (" in run("-c", AS_NOBODY, name).stdout


def test_little_room_warns_and_none_is_an_error(tmp_path):
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    finding = doctor.folder("run_dir", str(tmp_path))
    assert finding.what == f"{tmp_path} can be written, {free / 1e9:.1f} GB free"
    levels = [
        doctor.folder("run_dir", str(tmp_path), *bounds).level for bounds in ((0, 0), (2 * free, 0), (0, 2 * free))
    ]
    assert levels == ["ok", "warning", "error"]


# ---- what JAX says


def test_a_jax_that_hangs_is_given_up(tmp_path, monkeypatch):
    (tmp_path / "jax.py").write_text("import signal\nsignal.pause()\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found, why = doctor.ask_jax(seconds=1)
    assert found is None and why == "it did not start within 1 s"
    finding = doctor.jax_finding(found, why, seen="tpu", wanted=None)
    assert finding.level == "error" and "on all workers at once" in finding.remedy


def test_a_jax_that_finds_nothing_says_why(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    found, why = doctor.ask_jax()
    assert found is None and "Unable to initialize backend 'tpu'" in why
    assert "JAX_PLATFORMS is tpu: unset it" in doctor.jax_finding(found, why, None, "tpu").remedy


CPU = {"platform": "cpu", "kind": "cpu", "count": 1, "processes": 1, "bytes": None}
TPU = {"platform": "tpu", "kind": "TPU v5 lite", "count": 8, "processes": 1, "bytes": 16e9}


@pytest.mark.parametrize(
    ("found", "seen", "wanted", "platforms", "level"),
    [
        (CPU, None, None, "", "ok"),
        (CPU, "tpu", None, "", "error"),  # the silent fallback
        (CPU, "tpu", None, "cpu", "warning"),  # it was asked for
        (CPU, None, "gpu", "", "error"),
        (TPU, "tpu", "tpu", "", "ok"),
        (TPU, "tpu", "gpu", "", "error"),
    ],
)
def test_a_fall_back_to_the_cpu_is_not_silent(found, seen, wanted, platforms, level, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    finding = doctor.jax_finding(found, "", seen, wanted)
    assert finding.level == level
    assert (level == "ok") == (finding.remedy == "")
    assert found is CPU or "8 x TPU v5 lite (tpu), 16.0 GB each" in finding.what


def test_nvidia_smi_names_cards_and_processes(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        '#!/bin/sh\ncase "$1" in *gpu=*) echo "A100, 40960 MiB, 31000 MiB, 580.65";; *) echo "77, python, 30900 MiB";; esac\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    card, process = doctor.gpu_holders()
    assert card.level == "ok" and card.what == "A100, 40960 MiB, 31000 MiB, 580.65"
    assert (
        process.level == "warning" and "process 77, python, 30900 MiB" in process.what and "kill 77" in process.remedy
    )
    tool.write_text("#!/bin/sh\nexit 9\n")  # the driver is not loaded
    (finding,) = doctor.gpu_holders()
    assert finding.level == "warning" and "CalledProcessError" in finding.what


# ---- packages, the hub, WordNet


def test_packages_are_held_against_the_bounds(tmp_path):
    file = tmp_path / "pyproject.toml"
    text = '[project]\ndependencies = ["jax>=0.1", "numpy<1", "no-such-package"]\n[project.optional-dependencies]\n'
    file.write_text(text + 'a = ["pytest"]\nb = ["jax[k8s]"]\nc = ["pytest>=99"]\n')
    wrong, extras = doctor.packages(file)
    assert wrong.level == "error" and "jax" not in wrong.what
    assert re.search(r"numpy is \S+, needs <1; no-such-package is missing", wrong.what)
    assert extras.what == "a yes, b no, c no"  # jax is here, what its extra asks for is not
    good, _ = doctor.packages()
    assert good.level == "ok"


class Answer(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args):
        pass


def test_the_hub_is_reached_or_not():
    code = "import sys; sys.path[:0] = ['scripts']\nimport doctor\nprint(doctor.show(doctor.hub()))"
    server = http.server.HTTPServer(("127.0.0.1", 0), Answer)
    address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "no_proxy": "127.0.0.1"}
    assert run("-c", code, **environment).stdout == f"ok       hub               {address} answers\n"
    server.shutdown()
    server.server_close()
    done = run("-c", code, **environment)
    assert re.match(rf"warning +hub +{address} cannot be reached \(.*refused\)\n.*--model.name FOLDER", done.stdout)
    assert "HF_HUB_OFFLINE is set" in run("-c", code, HF_HUB_OFFLINE="1").stdout


def test_wordnet_is_missed(tmp_path, monkeypatch):
    monkeypatch.setattr(wordnet, "DEBIAN", tmp_path / "none")
    monkeypatch.setattr(wordnet.nltk.data, "path", [str(tmp_path)])  # what an empty NLTK_DATA and no other folder leave
    monkeypatch.setenv("THERAPY_JAX_CACHE", str(tmp_path))
    wordnet.reader.cache_clear()
    try:
        finding = doctor.wordnet()
    finally:
        wordnet.reader.cache_clear()
    assert finding.level == "warning" and "meteor_exact_stem" in finding.what and "apt-get install" in finding.remedy


def test_wordnet_is_found(wordnet):
    assert doctor.wordnet().level == "ok"


def test_what_other_processes_write_cannot_steer_the_terminal():
    shown = doctor.show(doctor.Finding("ok", "TPU", "held by \033[2J\nerror"))
    assert shown == "ok       TPU               held by ?[2J?error"


# ---- --require


SLOW = [
    pytest.param(name, marks=pytest.mark.slow) for name in ("train_ppo", "evaluate", "reproduce", "train_classifiers")
]


@pytest.mark.parametrize("script", ["train_sft", *SLOW])
def test_every_script_refuses_the_wrong_platform(script, tmp_path):
    """Also where JAX only falls back to the CPU: JAX_PLATFORMS is empty."""
    config = "configs/sample_grid.yaml" if script == "reproduce" else "configs/quickstart.yaml"
    args = [f"scripts/{script}.py", "--config", config, "--run_dir", str(tmp_path / "run"), "--require", "tpu"]
    done = run(*args, JAX_PLATFORMS="", COLUMNS="300")
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("error: --require tpu, but JAX runs on cpu here") and "doctor.py" in line
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()  # nothing was written over what an earlier run left


@pytest.mark.parametrize("is_there", [False, True])
def test_a_platform_that_cannot_start_is_one_sentence(is_there, tmp_path):
    """In a new run folder, and in one whose settings must stay."""
    settings = tmp_path / "run" / "config.yaml"
    if is_there:
        settings.parent.mkdir()
        settings.write_text("seed: 3\n")
    args = ["scripts/train_sft.py", "--config", "configs/quickstart.yaml", "--run_dir", str(tmp_path / "run")]
    done = run(*args, JAX_PLATFORMS="tpu")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert not is_there or settings.read_text() == "seed: 3\n"
    assert "JAX finds no device (Unable to initialize backend 'tpu'" in " ".join(done.stdout.split())
