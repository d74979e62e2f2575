"""The grid: which cells a config means, what their figures say together, and a whole one run, killed and gone on with."""

import dataclasses
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from therapy_jax import config, gpt2, grid, grid_results, plots, stopping
from therapy_jax.checkpoint import flatten
from therapy_jax.config import Config, ConfigError, GridConfig, PretrainConfig, PromptConfig

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def reproduce():
    sys.path.insert(0, str(ROOT / "scripts"))
    import reproduce  # type: ignore[import-not-found]

    return reproduce


def experiment(sft: dict, ppo: dict, **changes) -> Config:
    return Config(run_dir="runs/x", seed=10, pretrain=PretrainConfig(), grid=GridConfig(sft, ppo), **changes)


# ---------------------------------------------------------------------------------------------------- config -> cells


def changed(before: Config, after: Config, but: tuple[str, ...]) -> dict:
    """{dotted key: new value} of all that differs outside the sections `but`."""
    trees = [{k: v for k, v in dataclasses.asdict(c).items() if k not in but} for c in (before, after)]
    old, new = map(flatten, trees)
    return {key: new.get(key) for key in old.keys() | new.keys() if old.get(key) != new.get(key)}


def test_each_cell_is_the_config_with_what_the_grid_says_changed():
    sft = {"both": {}, "alone": {"prompt.format": "utterance", "sft": {"epochs": 5}}}
    ppo = {"full": {}, "other": {"from": "alone", "rewards.weights.rouge_l": 0, "ppo.kl_coef": 0.5}}
    asked = experiment(sft, ppo, prompt=PromptConfig(max_tokens=64))
    cells = grid.expand(asked, seeds=2)
    assert [(c.name, c.number, c.source, c.config.seed) for c in cells] == [
        ("both", 0, None, 10),
        ("alone", 0, None, 10),
        ("full", 0, "both", 10),
        ("other", 0, "alone", 10),
        ("both", 1, None, 11),
        ("alone", 1, None, 11),
        ("full", 1, "both", 11),
        ("other", 1, "alone", 11),
    ]
    shared = {"model.name": "runs/x/pretrained/base/model", "evaluate.language_model": "runs/x/language_model"}
    alone = {"prompt.format": "utterance", "sft.epochs": 5}
    own = {
        "both": {"evaluate.systems": ["sft"]},
        "alone": {"evaluate.systems": ["sft"], **alone},
        "full": {"evaluate.systems": ["ppo"]},
        "other": {"evaluate.systems": ["ppo"], **alone, "rewards.weights.rouge_l": 0, "ppo.kl_coef": 0.5},
    }
    for i, cell in enumerate(cells):
        expected = {**shared, **own[cell.name], "run_dir": f"runs/x/seed{cell.number}/{cell.name}"}
        if cell.number:
            expected["seed"] = 11
        if i == 0:  # the trivial systems are answered once
            expected["evaluate.systems"] = ["sft", "base", "constant", "retrieval", "random"]
        assert cell.config.pretrain is None and cell.config.grid == GridConfig()
        assert changed(asked, cell.config, but=("pretrain", "grid")) == expected, cell


def test_the_judge_of_language_is_the_first_sft_cell_from_another_seed():
    asked = experiment({"first": {"sft.epochs": 7}, "second": {}}, {})
    judge = grid.language_model(asked)
    assert judge is not None
    assert (judge.seed, judge.run_dir, judge.sft.epochs) == (1010, "runs/x/language_model", 7)
    assert judge.pretrain == asked.pretrain and judge.model.name is None, "it shares nothing with what it judges"
    given = dataclasses.replace(asked, evaluate=dataclasses.replace(asked.evaluate, language_model="runs/judge"))
    assert grid.language_model(given) is None
    assert {c.config.evaluate.language_model for c in grid.expand(given, 1)} == {"runs/judge"}


@pytest.mark.parametrize(
    ("sft", "ppo", "message"),
    [
        ({}, {"a": {}}, "grid.sft names no cell"),
        ({"a": {"sft.learning_rat": 1}}, {}, "^grid.sft.a: .*learning_rat"),
        ({"a": {"nonsense.b": 1}}, {}, "^grid.sft.a: .*nonsense"),
        ({"a": {"sft.epochs": "many"}}, {}, "^grid.sft.a: .*sft.epochs.*many"),
        ({"a": {"sft.epochs": {"b": 1}}}, {}, "^grid.sft.a: .*sft.epochs"),
        ({"a": {"prompt.format": "utterance", "prompt.emotion": "inferred"}}, {}, "^grid.sft.a: prompt.emotion"),
        ({"a": {"prompt.max_tokens": 5000}}, {}, None),  # a model from a folder has its own n_positions
        ({"a": {}}, {"b": {"rewards.weights.rouge_x": 1.0}}, "^grid.ppo.b: .*rouge_x"),
        ({"a": {}}, {"b": {"ppo.estimator": "rloo"}}, "^grid.ppo.b: .*replies_per_prompt"),
        ({"a": {}}, {"b": {"ppo.minibatches": 5}}, "^grid.ppo.b: ppo.batch_size"),
        ({"a": {}}, {"b": {"from": "c"}}, "^grid.ppo.b.from: 'c' is no SFT cell; choose from a"),
        ({"a": {}}, {"b": {"prompt.format": "utterance"}}, "^grid.ppo.b: prompt.format is the same"),
        ({"a": {}}, {"b": {"classifiers.epochs": 1}}, "^grid.ppo.b: classifiers.epochs is the same"),
        ({"a": {"model.n_layer": 2}}, {}, "^grid.sft.a: model.n_layer is the same for all cells"),
        ({"a": {"pretrain": {"epochs": 2}}}, {}, "^grid.sft.a: pretrain.epochs is the same for all cells"),
        ({"a": {"seed": 2}}, {}, "^grid.sft.a: seed is the same for all cells"),
        ({"a": {"model.dropout": 0.1}}, {}, None),
        ({"a": {}}, {"a": {}}, "a names an SFT cell and a PPO cell"),
        ({"../a": {}}, {}, "'../a' cannot name a folder"),
        ({1: {}}, {}, "1 cannot name a folder"),
        ({"a": {"sft.max_grad_norm": math.inf}}, {}, None),  # no clipping
        ({"a": {"sft.epochs": math.inf}}, {}, "^grid.sft.a: sft.epochs"),
    ],
)
def test_a_mistake_in_a_cell_is_found_at_once_and_named(sft, ppo, message, capsys):
    if message is None:
        grid.expand(experiment(sft, ppo), 1)
        return
    with pytest.raises(ConfigError, match=message) as error:
        grid.expand(experiment(sft, ppo), 1)
    assert "\n" not in str(error.value) and not capsys.readouterr().err


@pytest.mark.parametrize("name", ["mesc_grid", "sample_grid"])
def test_the_shipped_grids(name):
    asked = config.load(ROOT / "configs" / f"{name}.yaml")
    cells = grid.expand(asked, 3)
    assert len(cells) == 30 and {c.source for c in cells} == {None, "context_emotion"}
    sizes = {key: getattr(asked.model, key) for key in ("n_layer", "n_embd", "n_head", "n_positions")}
    model = gpt2.GPT2Config(vocab_size=asked.tokenizer.vocab_size, **sizes)
    D, L, V, P = model.n_embd, model.n_layer, model.vocab_size, model.n_positions
    assert (V + P) * D + L * (12 * D * D + 13 * D) + 2 * D <= 2_000_000  # GPT-2's parameters, embeddings tied


# ------------------------------------------------------------------------------------------------- folders -> figures


def test_aggregate_is_what_statistics_says():
    rows = [
        {"bleu": 0.1, "terms": {"length": -1.0}, "perplexity": None, "name": "x", "good": True, "rare": 1.0},
        {"bleu": 0.3, "terms": {"length": -2.0}, "perplexity": 2.0, "name": "y", "good": True},
        {"bleu": 0.8, "terms": {"length": 0}, "perplexity": 3.0, "name": "z", "good": False},
    ]
    found = grid_results.aggregate(rows)
    assert set(found) == {"bleu", "terms.length"}
    for key, values in {"bleu": [0.1, 0.3, 0.8], "terms.length": [-1.0, -2.0, 0.0]}.items():
        assert found[key]["values"] == values
        assert found[key]["mean"] == pytest.approx(statistics.mean(values))
        assert found[key]["sd"] == pytest.approx(statistics.stdev(values))
    assert grid_results.aggregate(rows[:1])["bleu"] == {"values": [0.1], "mean": 0.1, "sd": None}


def written(folder: Path, cells: list[grid.Cell], replies: dict[tuple[str, int], list[str]]) -> None:
    """answers.json of each cell to three exchanges."""
    said = ["How do you feel about that today?", "What happened then on the way?", "I hear how tired you are now."]
    for cell in cells:
        # The trivial systems answer in the first cell alone, as reproduce.py has them answer.
        shared = [{"retrieval": "", "random": text, "base": "zzz"} if cell is cells[0] else {} for text in said]
        rows = [{"context": [], "client": f"c{i}", "therapist": text, **shared[i]} for i, text in enumerate(said)]
        own = [{cell.system: reply or row["therapist"]} for reply, row in zip(replies[cell[:2]], rows, strict=True)]
        cell.folder.mkdir(parents=True)
        (cell.folder / "answers.json").write_text(json.dumps([a | b for a, b in zip(rows, own, strict=True)]))


def test_comparisons_are_of_means_over_seeds(tmp_path):
    """The PPO cell says the therapist's own words in one seed and nothing that counts in the other: 0.5 an exchange."""
    asked = dataclasses.replace(experiment({"a": {}}, {"b": {}}), run_dir=str(tmp_path))
    cells = grid.expand(asked, 2)
    nothing, same = ["zzz"] * 3, [""] * 3
    written(tmp_path, cells, {("a", 0): nothing, ("a", 1): nothing, ("b", 0): same, ("b", 1): nothing})
    of_name = {name: [c for c in cells if c.name == name] for name in ("a", "b")}
    found = grid_results.compare(of_name, asked)
    assert set(found) == {"b"} and set(found["b"]) == {"a", "retrieval", "random"}
    assert found["b"]["a"]["rouge1"] == pytest.approx([0.5] * 3), "each exchange gains as much: no width"
    assert found["b"]["random"]["rougeL"] == pytest.approx([-0.5] * 3)
    assert found["b"]["retrieval"]["bleu"] == pytest.approx([0.5] * 3)
    (cells[3].folder / "answers.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"seed1.b.answers.json: not the exchanges that a answered"):
        grid_results.compare(of_name, asked)


def of(mean: float, sd: float | None = None) -> dict:
    return {"values": [], "mean": mean, "sd": sd}


RESULTS = {
    "data": {"name": "mesc", "split": "test", "n": 454},
    "signature": "tok|v1",
    "emotion_majority_accuracy": 0.5,
    "seeds": [0, 1],
    "commit": "abc",
    "hardware": "1 x cpu, 2 cores",
    "hours": 1.5,
    "versions": {"jax": "1.0"},
    "trivial": {"base": {"bleu": of(0.01)}},
    "cells": {"a": {"metrics": {"bleu": of(0.25, 0.125), "reply_words": of(9.96, 0.04), "terms.x": of(1.0)}}},
    "comparisons": {"p": {"a": {"bleu": [0.25, 0.125, 0.5], "rougeL": [-0.1, -0.2, 0.1]}}},
    "paper": {"bleu": 0.0111},
}


def test_tables():
    assert grid_results.main_rows(RESULTS) == [
        ["", "BLEU", "words"],
        ["base", "0.0100", ""],
        ["a", "0.2500 ± 0.1250", "10.0 ± 0.0"],
        ["paper", "0.0111", ""],
    ]
    assert grid_results.main_rows({**RESULTS, "data": {"name": "jsonl"}})[-1][0] == "a", "the paper measured MESC"
    assert grid_results.comparison_rows(RESULTS) == [
        ["", "BLEU", "ROUGE-L"],
        ["p - a", "+0.2500 [+0.1250, +0.5000]", "-0.1000 [-0.2000, +0.1000]"],
    ]
    assert grid_results.comparison_rows(RESULTS, intervals=False)[1] == ["p - a", "+0.2500*", "-0.1000 "]
    lines = grid_results.markdown(RESULTS).splitlines()
    assert "| a | 0.2500 ± 0.1250 | 10.0 ± 0.0 |" in lines and "| --- | ---: | ---: |" in lines
    assert lines[-1] == "Commit abc; 1 x cpu, 2 cores; 1.50 h; jax 1.0."
    assert "Differences" not in grid_results.markdown({**RESULTS, "comparisons": {}})


def test_a_curve_goes_as_far_as_every_seed_got():
    logs = [
        [{"step": 0, "x": 1.0}, {"step": 1, "y": 5.0}, {"step": 2, "x": 3.0}, {"step": 4, "x": 7.0}],
        [{"step": 0, "x": 2.0}, {"step": 2, "x": 4.0}],
    ]
    steps, values = plots.series(logs, "x")
    assert steps == [0, 2] and values.tolist() == [[1.0, 3.0], [2.0, 4.0]]


# ------------------------------------------------------------------------------------------------------- the script


def test_seeds_is_a_flag_of_this_script_alone(reproduce):
    argv = ["--config", "configs/sample_grid.yaml", "--mesh.data", "-1", "--ppo.iterations=3"]
    parsed, options = config.parse_with(reproduce.Options, argv)
    assert options.seeds == 1 and parsed.ppo.iterations == 3
    for flag in (["--seeds", "3"], ["--seeds=3"]):
        assert config.parse_with(reproduce.Options, [*argv[:2], *flag, *argv[2:]]) == (parsed, reproduce.Options(3))


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5", ""])
def test_a_bad_number_of_seeds(value, reproduce, capsys):
    with pytest.raises(SystemExit) as stop:
        config.parse_with(reproduce.Options, [f"--seeds={value}"])
    assert stop.value.code == 2
    assert "seeds" in capsys.readouterr().err


def test_nothing_runs_before_every_cell_is_sound(reproduce, tmp_path):
    asked = experiment({"a": {}}, {"b": {"ppo.clap": 1}})
    with pytest.raises(ConfigError, match="grid.ppo.b: .*clap"):
        reproduce.main(dataclasses.replace(asked, run_dir=str(tmp_path / "run")), reproduce.Options())
    assert not (tmp_path / "run").exists()


def test_splits_that_follow_the_seed_are_refused(reproduce, tmp_path):
    turns = [{"speaker": "client", "text": "Hello there."}, {"speaker": "therapist", "text": "What brings you here?"}]
    for turn, emotion in zip(turns, ("fear", "neutral"), strict=True):
        turn["emotion"] = emotion
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"id": f"c{i}", "turns": turns}) + "\n" for i in range(60)), encoding="utf-8")
    asked = experiment({"a": {}}, {})
    asked = dataclasses.replace(
        asked, run_dir=str(tmp_path / "run"), data=dataclasses.replace(asked.data, path=str(data))
    )
    with pytest.raises(ConfigError, match="data.splits"):
        reproduce.main(asked, reproduce.Options())
    assert not (tmp_path / "run").exists()


def test_what_is_finished_is_not_run_again(reproduce, tmp_path):
    ran = []

    def stage(cfg: Config) -> None:
        Path(cfg.run_dir).mkdir(exist_ok=True)
        ran.append(cfg.seed)
        if cfg.seed == 3:
            raise KeyboardInterrupt

    asked = Config(run_dir=str(tmp_path / "cell"), seed=1)
    reproduce.finish(asked, stage)
    reproduce.finish(asked, stage)
    assert ran == [1]
    reproduce.finish(dataclasses.replace(asked, seed=2), stage)
    assert ran == [1, 2], "other settings are another run"
    with pytest.raises(KeyboardInterrupt):
        reproduce.finish(dataclasses.replace(asked, seed=3), stage)
    reproduce.finish(dataclasses.replace(asked, seed=2), stage)
    assert ran == [1, 2, 3, 2], "what was stopped half-way has spoilt what was finished before"


def test_lent_models_are_found_after_a_move(reproduce, tmp_path):
    for name in ("sft/model", "classifiers"):
        (tmp_path / "run/seed0/a" / name).mkdir(parents=True)
        (tmp_path / "run/seed0/a" / name / "weights").write_text(name)
    for _ in range(2):  # a second start finds its links
        reproduce.lend(tmp_path / "run/seed0/a", tmp_path / "run/seed0/b")
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    for name in ("sft/model", "classifiers"):
        assert (tmp_path / "elsewhere/seed0/b" / name / "weights").read_text() == name


TINY = {  # the whole way in seconds: what it learns does not matter here
    "model": {"n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 128},
    "tokenizer": {"vocab_size": 600},
    "prompt": {"max_tokens": 64},
    "pretrain": {"epochs": 0.1, "batch_size": 16, "eval_every": 1},
    "sft": {"epochs": 0.1, "eval_every": 1, "learning_rate": 1e-2},
    "sampling": {"max_new_tokens": 12},
    "ppo": {"iterations": 6, "batch_size": 8, "eval_every": 1, "eval_prompts": 8, "learning_rate": 1e-3},
    "classifiers": {"epochs": 1, "hidden": 8},
    "evaluate": {"limit": 12, "batch_size": 12, "bootstrap": 100},
    "grid": {"sft": {"both": {}, "alone": {"prompt.format": "utterance"}}, "ppo": {"full": {}}},
}


def start(folder: Path) -> subprocess.Popen:
    args = [sys.executable, "scripts/reproduce.py", "--config", str(folder / "tiny.yaml"), "--seeds", "2"]
    env = {**os.environ, "XLA_FLAGS": "", "COLUMNS": "200"}  # one device, as a user has
    return subprocess.Popen(args, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(folder: Path) -> str:
    process = start(folder)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    return output


def run_until(folder: Path, mark: str, number: signal.Signals) -> int:
    """Start, and send a signal once `mark` is there -> the exit code."""
    process = start(folder)
    while process.poll() is None and not (folder / "run" / mark).exists():
        time.sleep(0.02)  # polls a process that ends by itself
    assert process.poll() is None, f"it ended before it could be killed at {mark}"
    process.send_signal(number)
    process.communicate()
    return process.returncode


def prepared(folder: Path, **changes) -> Path:
    folder.mkdir()
    text = yaml.safe_dump({"run_dir": str(folder / "run"), **TINY, **changes}, sort_keys=False)
    (folder / "tiny.yaml").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = prepared(tmp_path_factory.mktemp("grid") / "whole")
    run(folder)
    return folder / "run"


def figures(run_dir: Path) -> dict:
    """results.json without the time that it took, and the commit: a checkout may move on between two runs."""
    results = json.loads((run_dir / "results.json").read_text(encoding="utf-8"))
    return {key: value for key, value in results.items() if key not in ("seconds", "hours", "commit")}


@pytest.mark.slow
def test_a_grid_leaves_a_table(finished):
    results = json.loads((finished / "results.json").read_text(encoding="utf-8"))
    assert set(results["cells"]) == {"both", "alone", "full"} and results["seeds"] == [0, 1]
    assert set(results["trivial"]) == {"base", "constant", "retrieval", "random", "therapist"}
    assert set(results["comparisons"]["full"]) == {"both", "retrieval", "random"}
    for name, cell in results["cells"].items():
        for k in (0, 1):
            folder = finished / f"seed{k}" / name
            alone = json.loads((folder / "results.json").read_text(encoding="utf-8"))
            assert cell["metrics"]["rougeL"]["values"][k] == alone["systems"][cell["stage"]]["rougeL"]
            assert (folder / cell["stage"] / "model" / "model.safetensors").is_file()
            config.load(folder / "config.yaml")
    bases = {p.read_bytes() for p in finished.glob("seed*/both/base/model/model.safetensors")}
    assert bases == {(finished / "pretrained/base/model/model.safetensors").read_bytes()}, "all start from one base"
    judge = (finished / "language_model/base/model/model.safetensors").read_bytes()
    assert judge not in bases, "the judge of language is another model"
    assert {"base"} == set(results["seconds"]["pretrained"]) and results["hours"] > 0
    spent = [s for part in results["seconds"].values() for stage in part.values() for s in stage]
    assert results["hours"] == pytest.approx(sum(spent) / 3600, abs=1e-3)
    assert "| full | " in (finished / "table.md").read_text(encoding="utf-8")
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_grid_killed_and_started_again_ends_where_it_would_have(finished, tmp_path):
    other = prepared(tmp_path / "killed", report=False)
    assert run_until(other, "pretrained/base/checkpoints/2", signal.SIGKILL) == -signal.SIGKILL
    assert run_until(other, "seed0/full/ppo/checkpoints/1", signal.SIGTERM) == stopping.EXIT_CODE
    output = run(other)
    assert output.count("finished before") == 4, "pretrained, language_model, both, alone"
    assert re.search(r"ppo: going on from iteration [1-5] of 6", output), output
    assert figures(other / "run") == figures(finished)
    weights = [p.relative_to(finished) for p in finished.rglob("model.safetensors")]
    assert len(weights) >= 10
    for path in weights:
        assert (other / "run" / path).read_bytes() == (finished / path).read_bytes(), path


@pytest.mark.slow
def test_a_finished_grid_started_again_trains_nothing(finished):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file() and "seed" in p.as_posix()}
    results = (finished / "results.json").read_bytes()
    output = run(finished.parent)
    assert output.count("finished before") == 8 and "going on" not in output
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert (finished / "results.json").read_bytes() == results
