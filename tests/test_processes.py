"""The scripts as several processes that share one mesh: the same figures, one writer, and no waiting for the dead."""

import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest

from therapy_jax import dialogue
from therapy_jax.processes import is_loss_of_another

ROOT = Path(__file__).parent.parent
TINY = {
    "model.n_layer": 1, "model.n_embd": 32, "model.n_head": 2, "tokenizer.vocab_size": 600, "pretrain.epochs": 0.3,
    "pretrain.eval_every": 50, "sft.epochs": 0.3, "sft.eval_every": 10, "sft.log_every": 2, "sft.batch_size": 16,
    "ppo.iterations": 3, "ppo.batch_size": 16, "ppo.minibatches": 2, "ppo.eval_every": 3, "ppo.eval_prompts": 8,
    "sampling.max_new_tokens": 8, "classifiers.epochs": 1, "evaluate.batch_size": 16, "evaluate.limit": 16,
    "evaluate.bootstrap": 20, "evaluate.systems": "[base, sft, ppo, retrieval]",
    "report": False,
}  # fmt: skip

# What Gloo prints as its threads connect, in pieces that come between one another.
GLOO = r"\[Gloo\] Rank |\d| is connected to | peer ranks\. |Expected number of connected peer ranks is : |\s"


def start(
    script: str,
    run_dir: Path,
    processes: int,
    devices: int,
    alone: dict | None = None,
    homes: Sequence[Path] = (),
    **changes,
) -> list[subprocess.Popen]:
    """alone: settings of the last process only; homes: the home folder of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    given = {**TINY, "run_dir": run_dir, "compilation_cache": ROOT / ".pytest_cache" / "jax", **changes}
    flags = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, f"scripts/{script}.py", "--config", "configs/quickstart.yaml", *flags]
    together = ["--mesh.coordinator", address, "--mesh.processes", str(processes)] if processes > 1 else []
    last = [part for name, value in (alone or {}).items() for part in (f"--{name}", str(value))]
    return [
        subprocess.Popen(
            [*command, *together, *(["--mesh.process", str(i)] if together else []), *(last if i == processes - 1 else [])],
            cwd=ROOT, env=environment | ({"HOME": str(homes[i])} if homes else {}),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for i in range(processes)
    ]  # fmt: skip


def logged(run_dir: Path) -> dict[tuple[str, int], dict]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    keys = [(line["stage"], line["step"]) for line in lines]
    assert len(set(keys)) == len(keys)  # one process writes
    return dict(zip(keys, lines, strict=True))


@pytest.mark.slow
def test_two_processes_train_and_evaluate_as_one_does(tmp_path):
    """fsdp over both and tensor within each; the run of one process has one device."""
    for name, processes, devices, mesh in (("one", 1, 1, {}), ("two", 2, 2, {"mesh.fsdp": 2, "mesh.tensor": 2})):
        for script in ("train_sft", "train_ppo", "evaluate"):
            changes = mesh | ({"mesh.data": 1} if mesh else {})
            running = start(script, tmp_path / name, processes, devices, **changes)
            said = [process.communicate(timeout=900)[0] for process in running]
            assert [process.returncode for process in running] == [0] * processes, said[-1][-3000:]
            for text in said[1:]:  # the second process says nothing of its own
                assert not re.sub(GLOO, "", text), text[-2000:]
    one, two = logged(tmp_path / "one"), logged(tmp_path / "two")
    assert one.keys() == two.keys()
    for key in [key for key in one if key[0] in ("base", "sft")][:10]:
        for name in ("loss", "grad_norm"):
            np.testing.assert_allclose(two[key][name], one[key][name], rtol=2e-5, err_msg=f"{key} {name}")
    # Printed with six digits; and a reply may differ where a draw falls on the border between two tokens.
    for name in ("score", "kl_k3", "entropy", "reply_tokens"):
        np.testing.assert_allclose(two["ppo", 1][name], one["ppo", 1][name], rtol=1e-3, atol=1e-5, err_msg=name)
    results = [json.loads((tmp_path / name / "results.json").read_text())["systems"] for name in ("one", "two")]
    for system in ("base", "sft", "ppo"):
        np.testing.assert_allclose(results[1][system]["perplexity"], results[0][system]["perplexity"], rtol=1e-3)
    for name in ("bleu", "rouge1", "rouge2", "rougeL", "distinct2", "reply_words"):  # of words alone
        assert results[0]["retrieval"][name] == results[1]["retrieval"][name], name


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_the_death_of_a_process_ends_the_others_and_the_run_goes_on(killed, tmp_path):
    longer = {"pretrain": "null", "sft.epochs": 50, "mesh.timeout": 20, "sft.eval_every": 5, "sft.log_every": 1}
    running = start("train_sft", tmp_path, 2, 1, **longer)
    log = tmp_path / "metrics.jsonl"
    end = time.monotonic() + 300
    while not (log.is_file() and len(log.read_text().splitlines()) > 12):
        assert time.monotonic() < end and all(process.poll() is None for process in running)
        time.sleep(0.2)
    running[killed].send_signal(signal.SIGKILL)
    text = running[1 - killed].communicate(timeout=120)[0]
    running[killed].communicate()
    # jax itself aborts a process that has lost the coordinator, with a sentence of its own; else it is ours.
    assert "another process has ended" in text or "coordination service" in text, text[-2000:]
    assert running[1 - killed].returncode not in (0, 1)

    steps = max(step for _, step in logged(tmp_path))
    again = start("train_sft", tmp_path, 2, 1, **longer)
    while max((step for _, step in logged(tmp_path)), default=0) <= steps:
        assert time.monotonic() < end + 300 and all(process.poll() is None for process in again)
        time.sleep(0.2)
    again[killed].send_signal(signal.SIGTERM)  # one is told; all save the same step
    for process in again:
        said = process.communicate(timeout=120)[0]
        assert process.returncode == 75, said[-2000:]


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (jax.errors.JaxRuntimeError("Gloo all-reduce failed: Connection closed by peer"), True),
        (ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer"), True),  # what a call of jit raises
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), False),
        (ValueError("No space left on device"), False),
        (OSError("gloo"), False),
    ],
)
def test_how_a_collective_fails_that_has_lost_a_process(error, lost, monkeypatch):
    assert not is_loss_of_another(error)  # alone
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert is_loss_of_another(error) is lost


def ended(running: list[subprocess.Popen]) -> tuple[list[int], list[str]]:
    """Long before jax gives up a process that does not come, which takes minutes -> exit codes, and what each has said."""
    try:
        said = [process.communicate(timeout=200)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    return [process.returncode for process in running], said


@pytest.mark.slow
def test_a_run_folder_in_use_ends_both_processes(tmp_path):
    """Only process 0 finds out. What lies in the folder stays of the settings before."""
    (tmp_path / "config.yaml").write_text("seed: 7")
    with (tmp_path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("4321")
        file.flush()
        codes, said = ended(start("train_sft", tmp_path, 2, 1))
    assert codes == [2, 2], said
    assert "in use by another run (process 4321)" in said[0] and "process 0: run_dir" in said[1]
    assert "in use by another run (process 4321)" in said[1] and (tmp_path / "config.yaml").read_text() == "seed: 7"


@pytest.mark.slow
def test_data_that_one_process_lacks_ends_both(tmp_path):
    homes = [tmp_path / "0", tmp_path / "1"]
    for home in homes:
        home.mkdir()
    shutil.copy(dialogue.SAMPLE, homes[0] / "data.jsonl")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text("seed: 7")
    codes, said = ended(start("train_sft", run_dir, 2, 1, homes=homes, **{"data.path": "~/data.jsonl"}))
    assert codes == [2, 2], said
    assert f"{homes[1]}/data.jsonl" in said[1] and f"{homes[1]}/data.jsonl" in said[0] and "process 1: " in said[0]
    assert (run_dir / "config.yaml").read_text() == "seed: 7"  # refused before any work


@pytest.mark.slow
def test_processes_with_different_settings_are_refused(tmp_path):
    codes, said = ended(start("train_sft", tmp_path, 2, 1, alone={"sft.learning_rate": 0.5}))
    assert codes == [2, 2] and not (tmp_path / "config.yaml").exists(), said
    assert all("the processes were started with different settings or code" in text for text in said)
    assert "sft.learning_rate is 0.5 in process 1, 0.002 in process 0" in said[1]


@pytest.mark.slow
@pytest.mark.parametrize("told", [0, 1])
def test_a_signal_to_one_process_before_the_loop_ends_both(told, tmp_path):
    running = start("train_sft", tmp_path, 2, 1)
    assert running[0].stdout is not None
    before = ""
    while "data: " not in before:
        before += (line := running[0].stdout.readline())
        assert line, before
    running[told].send_signal(signal.SIGTERM)
    codes, said = ended(running)
    assert codes == [75, 75], said
    assert "stopped by SIGTERM; the same command goes on" in said[told]
    assert f"process {told}: stopped by SIGTERM; the same command goes on" in said[1 - told]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs /dev/full, a disk that is always full")
def test_a_full_disk_of_the_writer_ends_both_processes(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    codes, said = ended(start("train_sft", tmp_path, 2, 1, pretrain="null"))
    assert codes == [2, 2] and all("No space left on device" in text for text in said), said


@pytest.mark.slow
def test_a_fault_of_one_process_ends_both_with_its_traceback_kept(tmp_path):
    """A folder where a file is to be: nobody expected it."""
    (tmp_path / "metrics.jsonl").mkdir()
    codes, said = ended(start("train_sft", tmp_path, 2, 1, pretrain="null"))
    assert codes == [1, 1] and "Traceback" in said[0], said
    assert "process 0: a fault of the program: IsADirectoryError" in said[1]
    assert "IsADirectoryError" in (tmp_path / "error.log").read_text()


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_at_the_same_step_and_the_run_goes_on(tmp_path):
    longer = {"pretrain": "null", "sft.epochs": 50, "sft.eval_every": 50, "sft.log_every": 2}
    running = start("train_sft", tmp_path, 2, 1, **longer)
    log, end = tmp_path / "metrics.jsonl", time.monotonic() + 300
    while not log.is_file() or log.read_text().count("\n") < 4:
        assert time.monotonic() < end and all(process.poll() is None for process in running)
        time.sleep(0.05)  # polls processes that end by themselves
    running[1].send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [75, 75], said
    (saved,) = [int(path.name) for path in (tmp_path / "sft" / "checkpoints").iterdir() if path.name.isdigit()]
    assert f"stopped by a signal to another process at step {saved} of" in said[0]
    assert max(step for _, step in logged(tmp_path)) == saved
    again = start("train_sft", tmp_path, 2, 1, **longer)
    while max((step for _, step in logged(tmp_path)), default=0) <= saved:
        assert time.monotonic() < end + 300 and all(process.poll() is None for process in again)
        time.sleep(0.05)
    again[0].send_signal(signal.SIGINT)
    said = [process.communicate(timeout=300)[0] for process in again]
    assert [process.returncode for process in again] == [75, 75], said
    assert f"sft: going on from step {saved} of" in said[0]
