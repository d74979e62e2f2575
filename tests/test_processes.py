"""The scripts as several processes that share one mesh: the same figures, one writer, and no waiting for the dead."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
TINY = {
    "model.n_layer": 1, "model.n_embd": 32, "model.n_head": 2, "tokenizer.vocab_size": 600, "pretrain.epochs": 0.3,
    "pretrain.eval_every": 50, "sft.epochs": 0.3, "sft.eval_every": 10, "sft.log_every": 2, "sft.batch_size": 16,
    "ppo.iterations": 3, "ppo.batch_size": 16, "ppo.minibatches": 2, "ppo.eval_every": 3, "ppo.eval_prompts": 8,
    "sampling.max_new_tokens": 8, "classifiers.epochs": 1, "evaluate.batch_size": 16, "evaluate.limit": 16,
    "evaluate.bootstrap": 20, "evaluate.systems": "[base, sft, ppo, retrieval]",
}  # fmt: skip


def start(script: str, run_dir: Path, processes: int, devices: int, **changes) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    given = {**TINY, "run_dir": run_dir, "compilation_cache": ROOT / ".pytest_cache" / "jax", **changes}
    flags = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, f"scripts/{script}.py", "--config", "configs/quickstart.yaml", *flags]
    together = ["--mesh.coordinator", address, "--mesh.processes", str(processes)] if processes > 1 else []
    return [
        subprocess.Popen(
            [*command, *together, *(["--mesh.process", str(i)] if together else [])],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
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
                assert all("Gloo" in line or "peer ranks" in line for line in text.splitlines()), text[-2000:]
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
