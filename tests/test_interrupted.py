"""Runs that cannot be lost: killed, stopped and started again, they end where they would have, bit for bit.

The scripts run as real processes (forks of one that has imported everything: tests/forks.py). A host reward (`HOOK`) sends
its own process a signal in the midst of a rollout or of an evaluation; other signals come at random moments.
"""

import dataclasses
import functools
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import beside

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import train_sft  # noqa: E402

from therapy_jax import batching, gpt2, sft, sharding, stopping  # noqa: E402
from therapy_jax.config import Config, ConfigError, MeshConfig, SFTConfig  # noqa: E402

HOOK = """
import inspect, json, os, signal, time

calls = 0

def length(samples):
    global calls
    at = json.loads(os.environ.get("SIGNALS", "null"))
    if at and any(frame.function == at["within"] for frame in inspect.stack()):
        calls += 1
        if calls == at["call"]:
            for name in at["signals"]:
                os.kill(os.getpid(), getattr(signal, name))
            time.sleep(at.get("seconds", 0))
    return {"letters": [len(sample.reply) / 100 for sample in samples]}
"""
WORDS = "work home mother friend sleep exam money night school dog".split()


def write_data(path: Path) -> None:
    words = random.Random(0)
    with path.open("w") as file:
        for i in range(60):
            client = {"speaker": "client", "text": f"I think of {' '.join(words.sample(WORDS, 4))}.", "emotion": "fear"}
            reply = {
                "speaker": "therapist",
                "text": f"So {' '.join(words.sample(WORDS, 5))} are hard.",
                "emotion": "neutral",
            }
            file.write(json.dumps({"id": f"c{i}", "turns": [client, reply]}) + "\n")


class Runs:
    """Starts scripts with the settings of one experiment in folders of its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        write_data(folder / "data.jsonl")
        (folder / "hook.py").write_text(HOOK)
        data = {"path": str(folder / "data.jsonl")}
        training = {"epochs": 0.5, "batch_size": 4, "eval_every": 3, "log_every": 2}
        self.settings = {
            "data": data,
            "model": {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 128, "dropout": 0.1},
            "tokenizer.vocab_size": 300,
            "prompt.max_tokens": 64,
            "pretrain": {**training, "data": [data], "block_tokens": 32},
            "sft": {**training, "epochs": 1, "pad_to": 96},
            "rewards": {"standardise": True, "custom": {"path": f"{folder}/hook.py:length", "on": "host"}},
            "ppo": {"iterations": 6, "batch_size": 4, "eval_every": 2, "eval_prompts": 4, "kl_target": 1.0,
                    "learning_rate": 1e-3},
            "sampling.max_new_tokens": 8,
            "classifiers.epochs": 1,
            "compilation_cache": str(folder / "cache"),
        }  # fmt: skip
        self.server = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "forks.py")],
            env={**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT), "COLUMNS": "300"},  # one device, as a user has
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )

    def start(self, script: str, run_dir: Path, signals: dict | None = None, kill_at: int = 0, **changes) -> int:
        """-> its process id; `ended` must be called before the next."""
        self.output = self.folder / f"{run_dir.name}.log"
        settings = {**self.settings, **changes, "run_dir": str(run_dir)}
        flags = [part for k, v in settings.items() for part in (f"--{k}", v if isinstance(v, str) else json.dumps(v))]
        ask = {"script": script, "flags": flags, "output": str(self.output),
               "environment": {"SIGNALS": json.dumps(signals), "FOLDER": str(run_dir), "KILL_AT": str(kill_at)}}  # fmt: skip
        self.server.stdin.write(json.dumps(ask).encode() + b"\n")
        return int(self.server.stdout.readline())

    def ended(self) -> int:
        return int(self.server.stdout.readline())

    def has_ended(self) -> bool:
        return bool(select.select([self.server.stdout], [], [], 0)[0])

    def run(self, script: str, run_dir: Path, signals: dict | None = None, code: int = 0, **changes) -> str:
        """-> what it said."""
        self.output = self.folder / f"{run_dir.name}.log"
        before = len(self.said())
        self.start(script, run_dir, signals, **changes)
        found, said = self.ended(), self.said()[before:]
        assert found == code, f"exit code {found}, not {code}\n{said}"
        return said

    def said(self) -> str:
        return self.output.read_text() if self.output.exists() else ""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    runs = Runs(tmp_path_factory.mktemp("interrupted"))
    yield runs
    runs.server.stdin.close()
    runs.server.wait()


@pytest.fixture(scope="module")
def finished(runs) -> Path:
    """Both scripts, never interrupted."""
    folder = runs.folder / "finished"
    for script in ("train_sft", "train_ppo"):
        runs.run(script, folder)
    return folder


def lines(path: Path) -> list[dict]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in found]


def saved(folder: Path) -> tuple[int, list[np.ndarray]]:
    """The newest checkpoint as it lies there: step, and every array of the state."""
    step = max(int(path.name) for path in folder.iterdir() if path.name.isdigit())
    tree = ocp.StandardCheckpointer().restore(folder.absolute() / str(step) / "state")
    return step, jax.tree.leaves(tree)


def assert_same(found: Path, expected: Path, stages: tuple[str, ...]) -> None:
    """Models, the whole state of each stage (parameters, moments, KL coefficient, reward statistics), and the logs."""
    for stage in stages:
        for name in ("model.safetensors", "tokenizer.json"):
            assert (found / stage / "model" / name).read_bytes() == (expected / stage / "model" / name).read_bytes()
        (step, state), (step_expected, state_expected) = (saved(f / stage / "checkpoints") for f in (found, expected))
        assert step == step_expected and len(state) == len(state_expected) > 20
        for a, b in zip(state, state_expected, strict=True):
            np.testing.assert_array_equal(a, b)
        mine = [[x for x in lines(f / "metrics.jsonl") if x["stage"] == stage] for f in (found, expected)]
        assert mine[0] == mine[1] and len({x["step"] for x in mine[0]}) == len(mine[0])
        assert {m["step"] for m in mine[0] if {"validation_loss", "validation/reward"} & set(m)}  # some are evaluated
    if "ppo" in stages:
        assert (found / "samples.jsonl").read_text() == (expected / "samples.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "kills", "stages"), [("train_sft", 10, ("base", "sft")), ("train_ppo", 10, ("ppo",))]
)
def test_killed_at_random_moments_it_ends_where_it_would_have(runs, finished, script, kills, stages):
    """SIGKILL: every other time before a random file operation (most belong to saves), else after a random time. What was
    killed is started again in the same folder; where it came to its end, a new folder is begun."""
    moments = random.Random(script)
    folders = (runs.folder / f"killed_{script}_{i}" for i in range(kills + 1))

    def fresh() -> Path:
        folder = next(folders)
        return beside(finished, folder) if script == "train_ppo" else folder

    began = time.monotonic()
    operations = int(runs.run(script, fresh()).split("file operations: ")[1])
    whole = time.monotonic() - began
    assert operations > 100
    folder, killed = fresh(), 0
    for attempt in range(kills):
        by_file = attempt % 2 == 0
        pid = runs.start(script, folder, kill_at=moments.randint(1, operations // 2) if by_file else 0)
        if not by_file:
            time.sleep(moments.uniform(0, whole))  # the random moment itself
            if not runs.has_ended():
                os.kill(pid, signal.SIGKILL)
        code = runs.ended()
        assert code in (0, -signal.SIGKILL), runs.said()
        killed += code != 0
        if code == 0:
            assert_same(folder, finished, stages)
            folder = fresh()
    runs.run(script, folder)
    assert killed >= kills // 2
    assert_same(folder, finished, stages)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("within", "call", "said"),
    [
        ("iterate", 3, "ppo: stopped by SIGTERM at iteration 3 of 6, saved"),
        ("evaluate_policy", 2, "stopped by SIGTERM"),
    ],
)
def test_sigterm_saves_at_once_and_the_same_command_goes_on(runs, finished, within, call, said):
    """In a rollout, and in the evaluation of iteration 2."""
    folder = beside(finished, runs.folder / f"stopped_{within}")
    output = runs.run(
        "train_ppo", folder, {"within": within, "call": call, "signals": ["SIGTERM"]}, code=stopping.EXIT_CODE
    )
    assert said in output and "the same command goes on" in output
    output = runs.run("train_ppo", folder)
    assert f"ppo: going on from iteration {call} of 6" in output  # nothing was lost
    assert_same(folder, finished, ("ppo",))


@pytest.mark.slow
@pytest.mark.parametrize("within", ["iterate", "evaluate_policy"])
def test_a_second_ctrl_c_ends_it_there_and_then(runs, finished, within):
    folder = beside(finished, runs.folder / f"twice_{within}")
    twice = {"within": within, "call": 3, "signals": ["SIGINT", "SIGINT"], "seconds": 600}  # it would not end by itself
    if within == "evaluate_policy":  # the first ends it already: there is nothing to save
        runs.run("train_ppo", folder, {**twice, "signals": ["SIGINT"]}, code=stopping.EXIT_CODE)
    else:
        output = runs.run("train_ppo", folder, twice, code=stopping.INTERRUPTED)
        assert "SIGINT: finishing this iteration, then saving" in output and "stopped at once" in output
    runs.run("train_ppo", folder)
    assert_same(folder, finished, ("ppo",))


@pytest.mark.slow
@pytest.mark.parametrize("within", ["iterate", "evaluate_policy"])
def test_killed_in_a_rollout_and_in_an_evaluation(runs, finished, within):
    folder = beside(finished, runs.folder / f"killed_{within}")
    for call in (2, 1, 3):
        runs.run("train_ppo", folder, {"within": within, "call": call, "signals": ["SIGKILL"]}, code=-signal.SIGKILL)
    runs.run("train_ppo", folder)
    assert_same(folder, finished, ("ppo",))


@pytest.mark.slow
def test_sigterm_in_training_saves_the_step_it_is_at(runs, finished):
    folder = runs.folder / "stopped_sft"
    pid = runs.start("train_sft", folder)
    while not runs.has_ended() and not (folder / "sft" / "checkpoints" / "3").exists():
        time.sleep(0.001)  # polls a process that ends by itself
    os.kill(pid, signal.SIGTERM)
    assert runs.ended() == stopping.EXIT_CODE, runs.said()
    assert "stopped by SIGTERM" in runs.said()
    assert "sft: going on from step" in runs.run("train_sft", folder)
    assert_same(folder, finished, ("base", "sft"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs /dev/full, a disk that is always full")
def test_a_full_disk_is_one_sentence_and_the_run_goes_on_when_there_is_room(runs, finished):
    """The log of a run that is half done cannot grow any more."""
    folder = beside(finished, runs.folder / "full")
    runs.run("train_ppo", folder, {"within": "iterate", "call": 3, "signals": ["SIGTERM"]}, code=stopping.EXIT_CODE)
    log = folder / "metrics.jsonl"
    log.rename(folder / "put_away")
    log.symlink_to("/dev/full")
    output = runs.run("train_ppo", folder, code=2)
    assert f"error: {folder}: No space left on device; what is saved stays" in output and "Traceback" not in output
    (folder / "put_away").rename(log)
    runs.run("train_ppo", folder)
    assert_same(folder, finished, ("ppo",))


@pytest.mark.slow
def test_a_folder_in_use_is_refused_with_the_process_that_has_it(runs, finished):
    folder = beside(finished, runs.folder / "used")
    holder = "import os, sys\nfrom pathlib import Path\nfrom therapy_jax import run\nrun.lock(Path(sys.argv[1]))\n"
    holder += "print(os.getpid(), flush=True)\nsys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", holder, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True
    )
    assert process.stdin and process.stdout
    pid = int(process.stdout.readline())
    output = runs.run("train_ppo", folder, code=2)
    assert f"error: run_dir {folder} is in use by another run (process {pid})" in output and "Traceback" not in output
    process.kill()
    process.wait()
    assert (folder / ".lock").exists()  # stale, and in nobody's way
    runs.run("train_ppo", folder)
    assert_same(folder, finished, ("ppo",))


# ------------------------------------------------------------------------------------------------- within this process


@pytest.mark.parametrize("crash_at", [1, 4, 5, 8])
def test_a_stage_that_crashes_and_is_called_again(tmp_path, crash_at):
    """2k steps equal k + crash + k: state, best parameters and log, whether or not step k was a checkpoint's."""
    training = SFTConfig(epochs=1, batch_size=4, eval_every=4, log_every=3, warmup_steps=2)
    config = Config(sft=training)
    sizes = gpt2.GPT2Config(vocab_size=120, n_positions=16, n_embd=16, n_layer=1, n_head=2, dropout=0.1, eos_token_id=0)
    params = gpt2.init(sizes, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(1, 120, (10, 4, 16)).astype(np.int32)
    validation = [batching.unsupervised(tokens[9])]
    mesh = sharding.make_mesh(MeshConfig(data=1))

    def fit(folder: Path, crash: int | None = None):
        def batch_of(step: int, mine: np.ndarray):
            if step == crash:
                raise KeyError("crash")
            return batching.unsupervised(tokens[step][mine])

        folder.mkdir(exist_ok=True)
        return train_sft.fit(
            "sft", folder, training, sizes, params, batch_of, 9, validation, mesh, config, {"stage": "sft"}
        )

    expected = fit(tmp_path / "whole")
    with pytest.raises(KeyError, match="crash"):
        fit(tmp_path / "again", crash_at)
    found = fit(tmp_path / "again")
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
    (step, state), (_, state_expected) = (saved(tmp_path / f / "sft" / "checkpoints") for f in ("again", "whole"))
    assert step == 9
    for a, b in zip(state, state_expected, strict=True):
        np.testing.assert_array_equal(a, b)
    found_lines, expected_lines = (lines(tmp_path / f / "metrics.jsonl") for f in ("again", "whole"))
    assert found_lines == expected_lines and [x["step"] for x in found_lines] == [1, 3, 4, 6, 8, 9]


# ---------------------------------------------------------------------------------------------- updates that are not finite


def poisoned() -> tuple[gpt2.GPT2Config, dict]:
    """A model whose last position is NaN: texts of 16 tokens give NaN, shorter ones do not."""
    sizes = gpt2.GPT2Config(vocab_size=120, n_positions=16, n_embd=16, n_layer=1, n_head=2, eos_token_id=0)
    params = gpt2.init(sizes, jax.random.key(0))
    return sizes, {**params, "wpe": params["wpe"].at[15].set(np.nan)}


def texts(lengths: list[int]) -> list[np.ndarray]:
    return [np.random.default_rng(i).integers(1, 120, (8, n)).astype(np.int32) for i, n in enumerate(lengths)]


@pytest.mark.parametrize("mesh", [MeshConfig(data=1), MeshConfig(data=2, fsdp=2, tensor=2)])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(mesh):
    """Good, bad, bad, good: the state is that of the good steps alone, but for the counts. One device, and eight."""
    sizes, params = poisoned()
    mesh = sharding.make_mesh(mesh)
    model, tx = gpt2.GPT2(dataclasses.replace(sizes, mesh=mesh)), sft.optimizer(SFTConfig(), 10)

    def run(lengths: list[int]):
        state = sharding.make_state(mesh, functools.partial(sft.init_state, tx=tx), sharding.place(mesh, params))
        step = jax.jit(functools.partial(sft.sft_step, model=model, tx=tx, cfg=SFTConfig()))
        counts = []
        for n in lengths:
            batch = sharding.split_batch(mesh, batching.unsupervised(texts([n])[0]))
            state, metrics = step(state, batch, jax.random.key(0))
            counts.append((int(metrics["bad_in_a_row"]), int(metrics["bad_updates"])))
            assert np.isfinite(metrics["loss"]) == (n < 16)
        return state, counts

    found, counts = run([12, 16, 16, 12])
    expected, _ = run([12, 12])
    assert counts == [(0, 0), (1, 1), (2, 2), (0, 2)] and int(found.step) == 4
    for a, b in zip(jax.tree.leaves(found[:2]), jax.tree.leaves(expected[:2]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_too_many_in_a_row_end_the_run_with_the_state_saved_and_the_batch_written(tmp_path):
    sizes, params = poisoned()
    tokens = texts([12, 16, 12, 16, 16, 16, 12, 16, 12])
    training = SFTConfig(epochs=1, batch_size=8, eval_every=100, log_every=1, max_bad_updates=2)
    mesh = sharding.make_mesh(MeshConfig(data=1))

    def fit():
        def batch_of(step: int, mine: np.ndarray):
            return batching.unsupervised(tokens[step][mine])

        validation = [batching.unsupervised(tokens[0])]
        return train_sft.fit(
            "sft", tmp_path, training, sizes, params, batch_of, 9, validation, mesh, Config(), {"stage": "sft"}
        )

    with pytest.raises(
        ConfigError, match=r"sft: 2 updates in a row .* step 5 is saved, its batch is in .*bad_batch.json"
    ):
        fit()
    written = json.loads((tmp_path / "bad_batch.json").read_text())
    assert (written["stage"], written["step"], written["tokens"]) == ("sft", 5, tokens[4].tolist())
    with pytest.raises(ConfigError, match="sft: 3 updates in a row .* step 6"):
        fit()  # the same command tries the batch that follows, and that is bad, too
    fit()
    logged = lines(tmp_path / "metrics.jsonl")
    assert [x["step"] for x in logged] == list(range(1, 10))
    assert [x["bad_updates"] for x in logged] == [0, 1, 1, 2, 3, 4, 4, 5, 5]


def test_the_parameters_of_the_lowest_validation_loss_come_back(tmp_path):
    """Eight steps on what is held out, then sixteen on other words. The loss is a mean over tokens, not over batches."""
    training = SFTConfig(
        epochs=1, batch_size=4, eval_every=4, log_every=4, beta1=0.0, warmup_steps=0, learning_rate=3e-2, final_learning_rate=1.0
    )  # fmt: skip
    sizes = gpt2.GPT2Config(vocab_size=120, n_positions=16, n_embd=16, n_layer=1, n_head=2, eos_token_id=0)
    params, model, mesh = gpt2.init(sizes, jax.random.key(0)), gpt2.GPT2(sizes), sharding.make_mesh(MeshConfig(data=1))
    tokens = np.random.default_rng(0).integers(1, 60, (4, 16)).astype(np.int32)
    held_out = [tokens, tokens[:, 10:]]

    def batch_of(step: int, mine: np.ndarray):
        return batching.unsupervised(tokens[mine] if step < 8 else tokens[mine] + 60)

    validation = [batching.unsupervised(x) for x in held_out]
    best = train_sft.fit(
        "sft", tmp_path, training, sizes, params, batch_of, 24, validation, mesh, Config(), {"stage": "sft"}
    )
    losses = [x["validation_loss"] for x in lines(tmp_path / "metrics.jsonl") if "validation_loss" in x]
    assert len(losses) == 6 and losses[-1] > min(losses) + 0.1
    total = count = 0.0
    for x in held_out:
        logs = np.asarray(jax.nn.log_softmax(model.apply({"params": best}, x, np.ones(x.shape, bool))), float)
        total, count = total - np.take_along_axis(logs[:, :-1], x[:, 1:, None], -1).sum(), count + x[:, 1:].size
    assert total / count == pytest.approx(min(losses), rel=1e-4)
