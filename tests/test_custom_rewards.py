"""Rewards of a user's own: real files, loaded, called and checked; on the host and on the device."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from therapy_jax import batching, classifiers, dialogue, gpt2, prompts, readings, run
from therapy_jax.config import ConfigError, CustomReward, PromptConfig, RewardConfig
from therapy_jax.dialogue import EMOTIONS, STRATEGIES
from therapy_jax.rewards import combine, custom, scoring
from therapy_jax.rewards.batch import Fixed, make_references
from therapy_jax.rewards.custom import RewardError, Sample
from therapy_jax.rewards.words import make_vocabulary
from therapy_jax.sampling import Reply

ROOT = Path(__file__).parent.parent
HOST = """
    import re

    def brevity(samples):
        return {"brevity": [-len(re.findall("[a-z0-9]+", s.reply.lower())) / 7 for s in samples]}
"""
DEVICE = """
    import jax.numpy as jnp

    def brevity(batch):
        return {"brevity": -batch.words_mask.sum(-1).astype(jnp.float32) / 7}
"""


def write(folder, code, on: Literal["host", "device"] = "host", **kwargs):
    """A file of the user's -> (RewardConfig that names its first function, the path in it)."""
    file, code = folder / "mine.py", textwrap.dedent(code)
    file.write_text(code, encoding="utf-8")
    found = re.search(r"^def (\w+)", code, re.M)
    path = f"{file}:{found.group(1) if found else 'f'}"
    return RewardConfig(custom=CustomReward(path, on, **kwargs))


@pytest.fixture(scope="module")
def scored():
    """What scoring needs: six exchanges of the sample, replies to them (the therapists' own, in other places), a tiny trunk."""
    tokenizer = prompts.train_tokenizer(
        [prompts.plain_text(d.turns) for d in dialogue.read_dialogues(None, "jsonl")["train"]], 600
    )
    prompts.add_special_tokens(tokenizer)
    size = len(tokenizer)
    config = gpt2.GPT2Config(vocab_size=size, n_positions=256, n_embd=4, n_layer=1, n_head=1, eos_token_id=0)
    model, trunk = gpt2.GPT2(config), gpt2.init(config, jax.random.key(0))
    exchanges = dialogue.read(None, "jsonl")["test"][:6]
    replies = [
        prompts.encode_reply(tokenizer, e.therapist, None, PromptConfig()) for e in exchanges[3:] + exchanges[:3]
    ]
    replies[4] = replies[4][:-1]  # cut before EOS
    reading = readings.of_texts(trunk, replies, model=model)
    heads = [classifiers.Head(len(names), hidden=0, members=2) for names in (EMOTIONS, STRATEGIES)]
    params: Any = [head.init(jax.random.key(1), jnp.asarray(reading))["params"] for head in heads]
    shares: Any = [jnp.full(len(names), 1 / len(names)) for names in (EMOTIONS, STRATEGIES)]
    frozen = classifiers.Frozen(*[*params, *shares, jnp.zeros(4), jnp.eye(4)])
    fixed = Fixed(make_vocabulary(tokenizer, config.padded_vocab_size), frozen)
    tokens, mask = batching.pad(replies, max(map(len, replies)), "right")
    reply = Reply(jnp.asarray(tokens), jnp.asarray(mask), jnp.zeros(tokens.shape))
    references = make_references(exchanges, trunk, tokenizer, model=model)
    score = jax.jit(scoring.score, static_argnames=("model", "device_custom"))

    def run(config):
        device_custom, host = scoring.load(config)
        batch, raw = score(trunk, reply, references, fixed, model=model, device_custom=device_custom)
        assert bool(host) == (config.custom is not None and config.custom.on == "host")
        return scoring.host_terms(host, batch, raw, tokenizer, replies, exchanges) if host else raw

    return run, tokenizer, replies, exchanges


def test_a_reward_on_the_host_and_the_same_on_the_device_are_equal(scored, tmp_path):
    run, _, _, exchanges = scored
    (tmp_path / "device").mkdir()
    weights = {"brevity": 2.5}
    configs = write(tmp_path, HOST, weights=weights), write(tmp_path / "device", DEVICE, "device", weights=weights)
    host, device = map(run, configs)
    said = [e.therapist.text for e in exchanges[3:] + exchanges[:3]]
    expected = [-len(re.findall("[a-z0-9]+", text.lower())) / 7 for text in said]
    scores = []
    for config, raw in zip(configs, (host, device), strict=True):
        assert set(raw) == {*combine.TERMS, "brevity"}
        np.testing.assert_allclose(raw["brevity"], expected, rtol=1e-6)
        args = raw, combine.weights_of(config), combine.init_stats(raw)
        score, _, metrics = combine.combine(*args, standardise=False)
        np.testing.assert_allclose(metrics["weighted/brevity"], 2.5 * np.mean(expected), rtol=1e-5)
        scores.append(score)
    np.testing.assert_allclose(*scores, rtol=1e-6)
    plain = run(RewardConfig())
    for name in combine.TERMS:  # ours are what they are without it
        np.testing.assert_allclose(host[name], plain[name], rtol=1e-6, atol=1e-7)


def test_samples_say_what_was_said(scored):
    _, tokenizer, replies, exchanges = scored
    samples = custom.make_samples(tokenizer, replies, exchanges)
    for i, (sample, e, said) in enumerate(zip(samples, exchanges, exchanges[3:] + exchanges[:3], strict=True)):
        assert (sample.client, sample.context) == (e.client.text, tuple(turn.text for turn in e.context))
        assert (sample.reply, sample.emotion) == (said.therapist.text, said.therapist.emotion)
        answer = sample.reference, sample.reference_emotion, sample.reference_strategy
        assert answer == (e.therapist.text, e.therapist.emotion, e.therapist.strategy)
        assert sample.ended == (i != 4)


SAMPLES = [Sample("I am sad.", (), f"Reply {i}.", None, True, "Oh.", None, None) for i in range(5)]


def called(code, folder):
    config = write(folder, code).custom
    assert config is not None
    return custom.on_host(custom.load(config), SAMPLES, config.path), config.path


@pytest.mark.parametrize(
    "values",
    [
        "[0, 1, 2, 3, -4]", "(0.7, 1.9, True, False, 0)", "[True] * 5", "np.arange(5)", "np.linspace(-1, 1, 5)",
        "[np.float16(0.1), np.float64(0.7), np.int8(3), np.bool_(True), np.array(1.9)]", "np.arange(5) > 2",
        "jnp.arange(5) * 0.3", "list(jnp.arange(5) * 0.3)", "[3.4e38, -3.4e38, 1e-30, 0.1, 2**30]", "range(5)",
    ],
)  # fmt: skip
def test_numbers_of_every_kind_are_taken_as_they_are(values, tmp_path):
    head = "import jax.numpy as jnp\nimport numpy as np\n"
    raw, _ = called(f"{head}\ndef f(samples):\n    return {{'mine': {values}}}\n", tmp_path)
    assert set(raw) == {"mine"} and raw["mine"].shape == (5,) and raw["mine"].dtype == jnp.float32
    np.testing.assert_array_equal(raw["mine"], np.asarray([float(x) for x in eval(values)], np.float32))


@pytest.mark.parametrize(
    ("returned", "named"),
    [
        ("{'mine': [1.0 / (i - 3) for i in numbers(samples)]}", "broke on sample 3 .*line 8: ZeroDivisionError"),
        ("{'mine': [[][i] if i == 3 else 1 for i in numbers(samples)]}", "sample 3 .*'Reply 3.'.*line 8: IndexError"),
        ("{'mine': [json.loads(s.reply[i:]) if i == 3 else 1 for i, s in zip(numbers(samples), samples)]}",
         "sample 3 .*mine.py, line 8: JSONDecodeError"),  # the user's line, not one of the library's
        ("{'mine': numbers([*samples, None])}", "broke on sample 0 .*mine.py, line 7: AttributeError"),  # in a helper
        ("{'mine': [1 / (6 - len(samples))] * 5 if len(samples) < 5 else 1 / 0}", "broke on the batch of 5 samples"),
        ("{'mine': [0.0, 1.0, float('nan'), 1.0, 1.0]}", "mine is nan for sample 2 .*'Reply 2.'"),
        ("{'mine': [0.0, float('-inf'), 0.0, 1.0, 1.0]}", "mine is -inf for sample 1"),
        ("{'mine': [0.0, 0.0, 0.0, 1.0, 1e39]}", "mine is 1e\\+39 for sample 4"),  # beyond float32
        ("{'mine': [0, 10**400, 0, 0, 0]}", "mine gives a int for sample 1"),
        ("{'mine': [1.0] * 4}", "mine gives 4 values for 5 samples"),
        ("{'fine': [1.0] * 5, 'mine': []}", "mine gives 0 values for 5 samples"),
        ("{'mine': 1.0}", "mine gives a float for 5 samples"),
        ("{'mine': np.array(1.0)}", "mine gives a ndarray for 5 samples"),
        ("{'mine': (1.0 for s in samples)}", "mine gives a generator for 5 samples"),
        ("{'mine': [1.0, '2', 3.0, 4.0, 5.0]}", "mine gives a str for sample 1"),
        ("{'mine': np.array(['1', '2', '3', '4', '5'])}", "mine gives a str_ for sample 0"),
        ("{'mine': 'three'}", "mine gives a str for sample 0"),
        ("{'mine': [1.0, 2.0, None, 4.0, 5.0]}", "mine gives a NoneType for sample 2"),
        ("{'mine': np.ones((5, 1))}", "mine gives a ndarray for sample 0"),
        ("[1.0] * 5", "gives a list, it must give a dict"),
        ("None", "gives a NoneType, it must give a dict"),
        ("{1: [1.0] * 5}", "1 cannot name a term"),
    ],
)  # fmt: skip
def test_a_broken_reward_is_named_with_the_sample_it_broke_on(returned, named, tmp_path):
    code = f"""
        import json
        import numpy as np

        def f(samples):
            def numbers(samples):
                return [int(s.reply[6]) for s in samples]
            return {returned}
    """
    with pytest.raises(RewardError, match=named) as error:
        called(code, tmp_path)
    assert f"reward {tmp_path / 'mine.py'}:f" in str(error.value) and "\n" not in str(error.value)


def test_a_name_of_ours_is_refused_on_either_side(scored, tmp_path):
    run, *_ = scored
    with pytest.raises(RewardError, match=r"mine.py:f gives rouge_l, which is a term of ours"):
        run(write(tmp_path, "def f(samples):\n    return {'rouge_l': [1.0] * 6}\n"))
    code = "import jax.numpy as jnp\ndef f(batch):\n    return {'rouge_l': jnp.ones(6), 'own': jnp.ones(6)}\n"
    with pytest.raises(ValueError, match="gives rouge_l, which is a term of ours"):
        run(write(tmp_path, code, "device"))
    with pytest.raises(ConfigError, match="rewards.custom.weights: rouge_l is a term of ours"):
        scoring.load(write(tmp_path, HOST, weights={"rouge_l": 1.0, "brevity": 1.0}))


@pytest.mark.parametrize(
    ("returned", "named"),
    [
        ("{'mine': batch.words_mask.sum(-1)}", r"reward term mine gives int32\[6\], it must give float32\[6\]"),
        ("{'mine': jnp.float32(1)}", r"reward term mine gives float32\[\], it must give"),
        ("{'mine': batch.no_such_field}", r"mine.py:f broke while it was compiled: \S*mine.py, line 4: AttributeError"),
        (
            "{'mine': jnp.zeros(3) + batch.meaning}",
            r"mine.py:f broke while it was compiled: \S*mine.py, line 4: ValueError",
        ),
        ("[1.0]", "the custom reward gives a list, it must give a dict"),
    ],
)
def test_a_broken_device_reward_is_named(returned, named, scored, tmp_path):
    run, *_ = scored
    with pytest.raises(ValueError, match=named) as error:
        run(write(tmp_path, f"import jax.numpy as jnp\n\ndef f(batch):\n    return {returned}\n", "device"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("{0}/mine.py", "must be file.py:function"), ("{0}/mine.py:", "must be file.py:function"), (":f", "must be file.py"),
        ("{0}/mine.py:f()", "must be file.py:function"), ("{0}/other.py:f", "there is no file .*other.py"),
        ("{0}:f", "there is no file"), ("{0}/mine.py:g", "mine.py has no function g"), ("{0}/mine.py:x", "has no function x"),
        ("{0}/note.txt:f", "note.txt is not a Python file"), ("{0}/raises.py:f", "raises.py, line 2: KeyError: 'x'"),
        ("{0}/syntax.py:f", r"cannot be run: SyntaxError: .*syntax.py, line 1"),
        ("{0}/imports.py:f", "imports.py, line 1: ModuleNotFoundError: No module named 'no_such_module'"),
    ],
)  # fmt: skip
def test_a_path_that_names_no_reward_is_one_clear_sentence(path, named, tmp_path):
    files = {
        "mine.py": "x = 3\ndef f(samples): ...",
        "note.txt": "",
        "raises.py": "\n{}['x']\n",
        "syntax.py": "def f(:\n",
    }
    for name, code in {**files, "imports.py": "import no_such_module\n"}.items():
        (tmp_path / name).write_text(code)
    with pytest.raises(ConfigError, match=named) as error:
        scoring.load(RewardConfig(custom=CustomReward(path.format(tmp_path))))
    assert str(error.value).startswith("rewards.custom.path") and "\n" not in str(error.value)


def test_a_file_may_hold_dataclasses_and_objects_that_can_be_called(tmp_path):
    code = """
        from __future__ import annotations
        import dataclasses

        @dataclasses.dataclass
        class Longest:
            limit: float

            def __call__(self, samples):
                return {"longest": [min(len(s.reply), self.limit) for s in samples]}

        f = Longest(7.5)
    """
    raw, _ = called(code, tmp_path)
    assert raw["longest"].tolist() == [7.5] * 5  # "Reply 0." has eight characters


@pytest.mark.slow
def test_ppo_with_a_reward_on_the_host_learns_what_it_learns_with_it_on_the_device(tmp_path):
    """The program cut in two, and in one piece: the same replies, scores and update. (Later iterations drift apart in their
    last digits, until one of them draws another token.)"""
    first = {
        "--config": "configs/quickstart.yaml",
        "--model.n_layer": "1",
        "--model.n_embd": "32",
        "--model.n_head": "2",
    }
    first |= {
        "--tokenizer.vocab_size": "600",
        "--pretrain.epochs": "0.3",
        "--sft.epochs": "0.3",
        "--ppo.iterations": "1",
    }
    first |= {
        "--ppo.batch_size": "8",
        "--ppo.minibatches": "2",
        "--ppo.eval_prompts": "8",
        "--sampling.max_new_tokens": "12",
        "--classifiers.epochs": "1",
        "--report": "false",
    }

    def script(name, run_dir, **more):
        flags = [part for pair in {**first, "--run_dir": str(run_dir), **more}.items() for part in pair]
        env = {**os.environ, "XLA_FLAGS": ""}  # one device, as a user has
        args = [sys.executable, f"scripts/{name}.py", *flags]
        done = subprocess.run(args, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr

    script("train_sft", tmp_path / "host")
    shutil.copytree(tmp_path / "host", tmp_path / "device")
    logs = []
    for on, code in ("host", HOST), ("device", DEVICE):
        config = write(tmp_path / on, code).custom
        assert config is not None
        custom = {
            "--rewards.custom.path": config.path,
            "--rewards.custom.on": on,
            "--rewards.custom.weights": "{brevity: 2.0}",
        }
        script("train_ppo", tmp_path / on, **custom)
        lines = [json.loads(line) for line in (tmp_path / on / "metrics.jsonl").read_text().splitlines()]
        logs.append([line for line in lines if line["stage"] == "ppo" and "reward/brevity" in line])
    (host,), (device,) = logs
    names = {name for name in host if name.startswith(("reward", "weighted", "share", "score", "kl"))}
    assert {"reward/brevity", "weighted/brevity", "share/brevity", "score"} <= names
    for name in names | {"reply_tokens", "policy_loss", "grad_norm"}:
        assert host[name] == pytest.approx(device[name], rel=1e-4, abs=1e-5), name  # the log holds six digits
    assert host["weighted/brevity"] == pytest.approx(2 * host["reward/brevity"], rel=1e-5)


def test_a_term_that_is_nan_is_named_before_the_loss_that_it_spoils():
    nan = float("nan")
    with pytest.raises(ConfigError, match="reward term warmth is nan"):
        run.check_finite({"grad_norm": nan, "loss": nan, "reward/rouge_l": 0.1, "reward/warmth": nan})
    with pytest.raises(ConfigError, match="grad_norm is inf"):
        run.check_finite({"grad_norm": float("inf"), "reward/warmth": 0.5})
