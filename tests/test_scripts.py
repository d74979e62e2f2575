"""The scripts as a user runs them: real processes, the real sample, real mistakes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import beside

from therapy_jax import config, origin, weights
from therapy_jax.dialogue import SAMPLE, read_dialogues
from therapy_jax.files import flatten

ROOT = Path(__file__).parent.parent
SCRIPTS = ("train_sft", "train_ppo", "evaluate")
TINY = {  # the whole way in seconds: what it learns does not matter here
    "model.n_layer": 1,
    "model.n_embd": 32,
    "model.n_head": 2,
    "tokenizer.vocab_size": 600,
    "pretrain.epochs": 0.5,
    "sft.epochs": 0.5,
    "sft.eval_every": 4,
    "ppo.iterations": 4,
    "ppo.batch_size": 8,
    "ppo.minibatches": 2,
    "ppo.eval_every": 2,
    "ppo.eval_prompts": 8,
    "sampling.max_new_tokens": 12,
    "classifiers.epochs": 1,
    "evaluate.limit": 12,
    "report": False,  # a third of a run of this size; test_report.py looks at it
}


def command(script: str, run_dir: Path, **changes) -> list[str]:
    overrides = {**TINY, **changes}
    flags = [f"--{name}={value}" for name, value in overrides.items() if value is not None]
    args = ["--config", "configs/quickstart.yaml", "--run_dir", str(run_dir), *flags]
    return [sys.executable, f"scripts/{script}.py", *args]


def conversation(name: str, client: str, split: str) -> dict:
    turns = [("client", client), ("therapist", "What happened?"), ("client", "It rained."), ("therapist", "I see.")]
    return {"id": name, "split": split, "turns": [{"speaker": who, "text": text} for who, text in turns]}


def run(args: list[str], **kwargs) -> subprocess.CompletedProcess:
    env = {**os.environ, "XLA_FLAGS": "", "COLUMNS": "200"}  # one device, as a user has
    return subprocess.run(args, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600, **kwargs)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_config_loads_and_round_trips(path, tmp_path):
    loaded = config.load(path)
    again = tmp_path / "config.yaml"
    again.write_text(config.to_yaml(loaded), encoding="utf-8")
    assert config.load(again) == loaded
    assert loaded.run_dir == f"runs/{path.stem}"


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--sft.learning_rat", "1"], "sft.learning_rat"),  # an abbreviation must not pass for the whole name
        (["--rewards.weights.rouge_x", "1"], "rewards.weights.rouge_x"),
        (["--ppo.iterations", "many"], "ppo.iterations"),
        (["--prompt.format", "everything"], "prompt.format"),
        (["--config", "configs/missing.yaml"], "missing.yaml"),
        (["--ppo.minibatches", "5"], "ppo.minibatches"),
        (["--ppo.estimator", "rloo"], "ppo.replies_per_prompt"),
        (["--ppo.critic_learning_rate", "-1"], "ppo.critic_learning_rate"),
        (["--ppo.critic_warmup", "30"], "ppo.critic_warmup"),
        (["--prompt.format", "utterance", "--prompt.emotion", "inferred"], "prompt.emotion"),
        (["--model.n_head", "3"], "model.n_head"),
        (["--prompt.max_tokens", "5000"], "n_positions"),
        (["--evaluate.limit", "0"], "evaluate.limit must be above 0"),
        (["--evaluate.batch_size", "-4"], "evaluate.batch_size"),
        (["--evaluate.bootstrap", "0"], "evaluate.bootstrap"),
        (["--evaluate.temperature", "-1"], "temperature must be"),
        (["--ppo.clip", "-0.2"], "ppo.clip"),
        (["--ppo.kl_coef", "-1"], "ppo.kl_coef"),
        (["--ppo.max_update_kl", "-1"], "ppo.max_update_kl"),
        (["--seed", "-1"], "seed must be"),
        (["--model.n_head", "0"], "model.n_head"),
        (["--model.n_layer", "-1"], "model.n_layer"),
        (["--tokenizer.vocab_size", "-5"], "tokenizer.vocab_size"),
        (["--prompt.max_tokens", "-3"], "prompt.max_tokens"),
        (["--mesh.data", "0"], "mesh.data"),
        (["--judge.systems", "[]"], "judge.systems"),
        (["--pretrain", '{"block_tokens": 0}'], "block_tokens"),
        (["--sft.epochs", ".inf"], "sft.epochs"),
        (["--ppo.kl_target", "3", "--ppo.kl_horizon", "6"], "ppo.kl_horizon"),
        (["--ppo.kl_target", "3", "--ppo.kl_coef", "0"], "ppo.kl_coef, which must be above 0"),
        (["--sampling.temperature", "1e-40"], "at least 1e-4"),
        (["--sft", "null"], "sft"),
    ],
)
def test_a_mistake_is_named_and_exits_with_2(args, named, capsys):
    with pytest.raises(SystemExit) as stop:
        config.parse(args)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert named in message and "Traceback" not in message
    assert len(message.splitlines()) <= 6, message


BROKEN = [  # the word after the last brace is what the message must name
    "sft:\n# {sft:",  # all that stood in it is a comment now
    "ppo: [1, 2]  # {ppo:",
    "ppo:\n  clip: 0.2\nppo:\n  epochs: 1  # {ppo stands there twice:",
    "sft:\n  epochs: 1\n  epochs: 2  # {epochs stands there twice:",
    "run_dir: [unclosed  # {broken.yaml:",
    "sft:\n\tepochs: 1  # {broken.yaml:",
    "seed: 1\nrun_dir: caf\udce9  # {the file of --config is not UTF-8 text:",  # Latin-1
]


@pytest.mark.parametrize(
    "text", ["rewards: {weights: {rouge_x: 1.0}}", "sft: {learning_rat: 1.0}", "ppo: {clip: big}", *BROKEN]
)
def test_a_mistake_in_the_file_is_named(text, tmp_path, capsys):
    path = tmp_path / "broken.yaml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(SystemExit) as stop:
        config.parse(["--config", str(path)])
    assert stop.value.code == 2
    assert text.split("{")[-1].split(":")[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    "args", [["--seed", "3", "--config", "FILE"], ["--config=FILE", "--seed=3"], ["--config", "FILE", "--seed", "3"]]
)
def test_a_flag_outranks_the_file_wherever_it_stands(args, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("seed: 1\nrun_dir: runs/a\n")
    parsed = config.parse([word.replace("FILE", str(path)) for word in args])
    assert (parsed.seed, parsed.run_dir) == (3, "runs/a")


@pytest.mark.parametrize("word", ["08001111", "1e-4", "on", "[sighs] call", "my line: 112", "*112", "2026-01-01"])
def test_text_stays_text(word, tmp_path):
    """On the command line, and read back from the file that a run writes."""
    parsed = config.parse([f"--safety.crisis_line={word}"])
    assert parsed.safety.crisis_line == word
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml(parsed), encoding="utf-8")
    assert config.load(path) == parsed


def test_help_needs_no_jax():
    code = "import sys; sys.argv = ['x', '--help']\nfrom therapy_jax import config\n"
    code += "try: config.parse()\nexcept SystemExit: pass\nassert 'jax' not in sys.modules\n"
    done = run([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
    assert "Peak of the schedule" in done.stdout  # each knob is explained


@pytest.mark.parametrize(
    ("script", "changes", "named"),
    [
        ("train_ppo", {}, "sft model"),
        ("evaluate", {}, "sft model"),
        ("train_ppo", {"sampling.top_k": 5}, "top_k"),
        ("train_sft", {"data.path": "nowhere.jsonl"}, "nowhere.jsonl"),
        ("train_sft", {"model.name": "nobody/no-such-model"}, "nobody/no-such-model"),
        ("train_sft", {"mesh.data": 64}, "mesh.data"),
        ("train_sft", {"pretrain.batch_size": 4096}, "pretrain: the train split has"),
        ("train_sft", {"pretrain.block_tokens": 512}, "more than the model's 256 positions"),
        ("train_sft", {"pretrain": "null", "data.path": "{few}"}, "sft: the validation split has no exchange"),
        ("train_sft", {"data.path": "{few}"}, "sft: the validation split has no exchange"),  # before the pre-training
    ],
)
def test_a_mistake_that_shows_later_is_one_sentence_too(script, changes, named, tmp_path):
    (tmp_path / "few.jsonl").write_text(json.dumps(conversation("a", "Hello.", "train")) + "\n")
    changes = {name: str(value).replace("{few}", str(tmp_path / "few.jsonl")) for name, value in changes.items()}
    if "pretrain" in changes:
        changes["pretrain.epochs"] = None
    done = run(command(script, tmp_path / "run", **changes))
    assert done.returncode == 2, done.stdout + done.stderr
    assert named in " ".join(done.stdout.split()) and "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """One run of all scripts, end to end."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    for script in SCRIPTS:
        done = run(command(script, folder, report=script == "evaluate"))
        assert done.returncode == 0, done.stdout + done.stderr
        assert (folder / "report.html").exists() == (script == "evaluate")
    return folder


@pytest.mark.slow
def test_the_whole_way_leaves_what_design_promises(finished):
    learnt = []
    for stage in ("base", "sft", "ppo"):
        assert (finished / stage / "model" / "model.safetensors").stat().st_mode & 0o044  # others may load it
        learnt.append(set(origin.read(finished / stage / "model")["conversations"]))
        assert (finished / stage / "model" / "tokenizer.json").is_file()
        assert list((finished / stage / "checkpoints").iterdir())
    assert (finished / "ppo" / "model" / "value_head.safetensors").is_file()
    train = {origin.digest(d) for d in read_dialogues(None, "jsonl")["train"]}
    assert learnt == [train, train, train]
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert len({(line["stage"], line["step"]) for line in lines}) == len(lines)
    last = lines[-1]
    assert last["stage"] == "ppo" and last["step"] == 4
    weights = flatten({"rewards": config.load(finished / "config.yaml").rewards.__dict__["weights"].__dict__})
    total = sum(weight * last[name.replace("rewards.", "reward/")] for name, weight in weights.items())
    assert last["score"] == pytest.approx(total, rel=1e-4, abs=1e-5)  # the log holds six digits
    results = json.loads((finished / "results.json").read_text())
    assert set(results["systems"]) == {"base", "sft", "ppo", "constant", "retrieval", "random"}
    assert results["data"]["n"] == 12 and len(results["data"]["sha256"]) == 64
    wanted = {"reward", "bleu", "rouge1", "rouge2", "rougeL", "distinct1", "distinct2", "commonest_share", "perplexity"}
    for name, row in results["systems"].items():
        assert wanted <= set(row), name
    assert results["systems"]["constant"]["commonest_share"] == 1.0
    config.load(finished / "config.yaml")


@pytest.mark.slow
def test_our_models_load_in_torch(finished):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    for stage in ("base", "sft", "ppo"):
        _, info = transformers.GPT2LMHeadModel.from_pretrained(finished / stage / "model", output_loading_info=True)
        assert not any(info.values()), info


@pytest.mark.slow
def test_a_finished_run_started_again_changes_nothing(finished):
    before = {p: p.read_bytes() for p in finished.rglob("*.safetensors")}
    log = (finished / "metrics.jsonl").read_bytes()
    for script in SCRIPTS[:2]:
        done = run(command(script, finished))
        assert done.returncode == 0, done.stdout + done.stderr
    assert {p: p.read_bytes() for p in finished.rglob("*.safetensors")} == before
    assert (finished / "metrics.jsonl").read_bytes() == log


@pytest.mark.slow
def test_another_config_in_the_same_folder_is_refused(finished):
    done = run(command("train_ppo", finished, **{"ppo.kl_coef": 0.5}))
    assert done.returncode == 2
    assert "ppo.kl_coef was 0.01, now 0.5" in " ".join(done.stdout.split())


@pytest.mark.slow
def test_ppo_killed_and_started_again_ends_where_it_would_have(finished, tmp_path):
    """SIGKILL after the first checkpoint, then the same command: the same policy, bit for bit, and the same log."""
    other = tmp_path / "other"
    (other / "sft").mkdir(parents=True)
    (other / "sft" / "model").symlink_to(finished / "sft" / "model")
    args = command("train_ppo", other)
    process = subprocess.Popen(args, cwd=ROOT, env={**os.environ, "XLA_FLAGS": ""}, stdout=subprocess.DEVNULL)
    while process.poll() is None and not (other / "ppo" / "checkpoints" / "2").is_dir():
        time.sleep(0.05)  # polls a process that ends by itself
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = run(args)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "going on from iteration" in done.stdout
    for name in ("model.safetensors", "value_head.safetensors"):
        assert (other / "ppo" / "model" / name).read_bytes() == (finished / "ppo" / "model" / name).read_bytes()

    def log(folder: Path) -> list[dict]:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if k != "seconds"} for line in lines if line["stage"] == "ppo"]

    assert log(other) == log(finished)
    assert (other / "samples.jsonl").read_text() == (finished / "samples.jsonl").read_text()


@pytest.mark.slow
def test_a_policy_that_leaves_its_reference_is_stopped_and_stays_so(finished, tmp_path):
    """KL is 0 at the first iteration and above 1e-9 nats at the second: the limit must end the run there, state saved."""
    args = command("train_ppo", beside(finished, tmp_path / "run"), **{"ppo.max_kl": 1e-9, "ppo.warmup_steps": 1})
    for _ in range(2):  # the second start finds it stopped
        done = run(args)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "stopped at iteration 2" in done.stdout and "ppo.max_kl" in done.stdout
        lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [0, 1, 2]
    assert (tmp_path / "run" / "ppo" / "model" / "model.safetensors").is_file()


@pytest.mark.slow
def test_mistakes_in_what_judges_are_one_sentence(finished, tmp_path):
    folder = beside(finished, tmp_path / "run")
    (tmp_path / "my.py").write_text("def f(samples):\n    return {'warmth': [0.5] * len(samples)}\n")
    (tmp_path / "whole.py").write_text("def f(batch):\n    return {'words': batch.words_mask.sum(-1)}\n")
    custom = {"path": f"{tmp_path}/my.py:f", "on": "host", "weights": {"warmht": 1.0}}
    whole = {"path": f"{tmp_path}/whole.py:f", "on": "device"}  # gives whole numbers, which would lose every fraction
    for changes, named in (
        ({"ppo.keep_best": "rougeX"}, "keep_best"),
        ({"rewards.custom": json.dumps(custom)}, "gives no warmht; it gives warmth"),
        ({"rewards.custom": json.dumps(whole)}, "reward term words gives int32[2], it must give float32[2]"),
        ({"evaluate.language_model": str(finished)}, "seed"),
        ({"rewards.encoder": str(tmp_path)}, str(tmp_path)),
    ):
        done = run(command("train_ppo", folder, **changes))
        assert done.returncode == 2, done.stdout + done.stderr
        assert named in " ".join(done.stdout.split()) and "Traceback" not in done.stderr


@pytest.mark.slow
def test_several_draws_begin_with_the_one_of_a_single_draw_and_are_averaged(finished, tmp_path):
    folder = beside(finished, tmp_path / "run")
    (folder / "ppo").symlink_to(finished / "ppo")
    done = run(
        command("evaluate", folder, **{"evaluate.draws": 3, "evaluate.systems": "[sft, ppo, retrieval, random]"})
    )
    assert done.returncode == 0, done.stdout + done.stderr
    single, several = (json.loads((place / "results.json").read_text()) for place in (finished, folder))
    for name, rows in several["draws"].items():
        first, alone = (
            {k: v for k, v in flatten(x).items() if v is not None} for x in (rows[0], single["systems"][name])
        )
        assert first == pytest.approx(alone, rel=1e-6)
        assert len(rows) == (1 if name == "retrieval" else 3)  # what is not drawn is not drawn thrice
        for key in ("bleu", "reward", "distinct2"):
            values = [row[key] for row in rows]
            assert several["systems"][name][key] == pytest.approx(sum(values) / len(values), rel=1e-9)
        assert len({row["reward"] for row in rows}) == len(rows)  # each draw has a key of its own
    other = beside(finished, tmp_path / "other")
    done = run(command("evaluate", other, **{"seed": 1, "evaluate.systems": "[sft, random]"}))
    assert done.returncode == 0, done.stdout + done.stderr
    alone = json.loads((other / "results.json").read_text())["systems"]
    for name in ("sft", "random"):  # draw i is what seed + i would have answered
        for key in ("bleu", "distinct2", "reply_words"):
            assert several["draws"][name][1][key] == pytest.approx(alone[name][key], rel=1e-6)
    for other in ("sft", "retrieval", "random"):
        means = [several["systems"][name] for name in ("ppo", other)]
        for key, (difference, low, high) in several["comparisons"][f"ppo - {other}"].items():
            assert difference == pytest.approx(means[0][key] - means[1][key], abs=1e-9)
            assert low <= difference <= high


@pytest.mark.slow
def test_evaluation_asks_for_every_model_before_it_begins(finished, tmp_path):
    done = run(command("evaluate", beside(finished, tmp_path / "run"), **{"evaluate.systems": "[sft, ppo]"}))
    assert done.returncode == 2 and "no ppo model here" in done.stdout
    assert "answering" not in done.stdout


@pytest.mark.slow
def test_a_prompt_that_leaves_no_room_for_a_reply_is_left_out_for_all(finished, tmp_path):
    """Its utterance alone fills the model's 256 positions but for a few; the reply that is on record fits."""
    folder, data = beside(finished, tmp_path / "run"), tmp_path / "own.jsonl"
    data.write_text(SAMPLE.read_text() + json.dumps(conversation("long", "no " * 300, "test")) + "\n")
    changes = {"data.path": data, "evaluate.systems": "[sft, retrieval]", "evaluate.limit": 400}
    done = run(command("evaluate", folder, **changes))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((folder / "results.json").read_text())["data"]
    assert found["left_out"] == 1 and found["n"] == 183 and "1 exchanges left out, for all systems" in done.stdout


@pytest.mark.slow
def test_ppo_of_another_sft_model_is_not_gone_on_with(finished, tmp_path):
    """The SFT model is replaced behind PPO's back: what its checkpoints hold is no policy of it."""
    folder = tmp_path / "run"
    (folder / "sft").mkdir(parents=True)
    (folder / "sft" / "model").symlink_to(finished / "base" / "model")
    shutil.copytree(finished / "ppo", folder / "ppo")
    (folder / "config.yaml").write_text("seed: 5\n")
    done = run(command("train_ppo", folder))
    assert done.returncode == 2, done.stdout + done.stderr
    assert "trunk was" in " ".join(done.stdout.split())
    assert (folder / "config.yaml").read_text() == "seed: 5\n"  # what was refused leaves the folder as it was


@pytest.mark.slow
def test_a_tokenizer_of_other_settings_is_not_taken_up(finished, tmp_path):
    (tmp_path / "run" / "base").mkdir(parents=True)
    (tmp_path / "run" / "base" / "model").symlink_to(finished / "base" / "model")
    done = run(command("train_sft", tmp_path / "run", **{"tokenizer.vocab_size": 700}))
    assert done.returncode == 2, done.stdout + done.stderr
    assert "vocab_size was 600, now 700" in " ".join(done.stdout.split())


@pytest.mark.slow
def test_other_prompts_than_those_of_the_training_are_refused(finished, tmp_path):
    folder = beside(finished, tmp_path / "run")
    (folder / "config.yaml").write_text("seed: 0\n")
    for script in ("train_ppo", "evaluate"):
        done = run(command(script, folder, **{"prompt.format": "utterance", "evaluate.systems": "[sft]"}))
        assert done.returncode == 2, done.stdout + done.stderr
        assert "prompt.format was context_emotion, now utterance" in " ".join(done.stdout.split())
        assert (folder / "config.yaml").read_text() == "seed: 0\n"  # what was refused is not what the folder is of


@pytest.mark.slow
def test_the_sft_model_is_held_once_beside_policy_and_moments(finished, tmp_path):
    """A host reward counts the arrays of wte's shape that are alive while PPO runs: policy, reference, two moments."""
    (tmp_path / "my.py").write_text(
        "import jax\n"
        "def f(samples):\n"
        "    largest = max((x.shape for x in jax.live_arrays() if x.ndim == 2 and x.shape[1] == 32), default=None)\n"
        "    alive = {x.unsafe_buffer_pointer() for x in jax.live_arrays() if x.shape == largest}\n"  # orbax's views share one
        "    return {'copies': [float(len(alive))] * len(samples)}\n"
    )
    custom = {"path": f"{tmp_path}/my.py:f", "on": "host", "weights": {"copies": 0.0}}
    done = run(command("train_ppo", beside(finished, tmp_path / "run"), **{"rewards.custom": json.dumps(custom)}))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {line["reward/copies"] for line in lines if "reward/copies" in line} == {4.0}


@pytest.mark.slow  # one of the two has a best step that is not the last
@pytest.mark.parametrize(("keep", "choose"), [("reward", max), ("-reward", min)])
def test_the_policy_that_validation_chose_is_the_one_that_is_left(finished, tmp_path, keep, choose):
    folder = beside(finished, tmp_path / "run")
    done = run(command("train_ppo", folder, **{"ppo.keep_best": keep, "ppo.learning_rate": 1e-2}))
    assert done.returncode == 0, done.stdout + done.stderr
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = {x["step"]: x["validation/reward"] for x in log if "validation/reward" in x}
    best = max(step for step, value in found.items() if value == choose(found.values()))
    (_, a), (_, b) = (weights.load_pretrained(folder / "ppo" / p) for p in ("model", f"checkpoints/{best}"))
    np.testing.assert_array_equal(a["blocks"]["c_fc"]["kernel"], b["blocks"]["c_fc"]["kernel"])


@pytest.mark.slow
def test_what_was_pretrained_on_is_noted_also_through_model_name(tmp_path):
    own = tmp_path / "own.jsonl"
    own.write_text(SAMPLE.read_text() + json.dumps(conversation("own", "My cat ran away.", "train")) + "\n")
    extra = next(d for d in read_dialogues(own, "jsonl")["train"] if d.conversation_id == "own")
    first, second = tmp_path / "first", tmp_path / "second"
    anew = {"pretrain.epochs": None, "pretrain": "null", "model.name": first / "base", "tokenizer.name": first / "base"}
    for folder, changes in ((first, {"pretrain.data": json.dumps([{"path": str(own)}])}), (second, anew)):
        done = run(command("train_sft", folder, **changes))
        assert done.returncode == 0, done.stdout + done.stderr
        assert origin.digest(extra) in origin.read(folder / "sft" / "model")["conversations"]
