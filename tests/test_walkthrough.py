"""The walkthrough: a real iteration on a tiny model, from nothing and from the models of a run folder."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from therapy_jax import config, gpt2, ppo, safety, sampling, sharding, weights
from therapy_jax.config import Config, ConfigError, MeshConfig, ModelConfig, TokenizerConfig
from therapy_jax.dialogue import Exchange, Turn
from therapy_jax.rewards.batch import RewardBatch

ROOT = Path(__file__).parent.parent
EVIL = "Work was [bold]hard[/] & <script>alert(1)</script>, *twice*."  # nothing that the gate would answer


@pytest.fixture(scope="module")
def walkthrough():
    sys.path.insert(0, str(ROOT / "scripts"))
    import walkthrough  # type: ignore[import-not-found]

    return walkthrough


@pytest.fixture
def tiny(tmp_path) -> Config:
    quick = config.load(ROOT / "configs" / "quickstart.yaml")
    return dataclasses.replace(
        quick,
        run_dir=str(tmp_path / "run"),
        model=ModelConfig(n_layer=1, n_embd=32, n_head=2, n_positions=256),
        tokenizer=TokenizerConfig(vocab_size=600),
        classifiers=dataclasses.replace(quick.classifiers, epochs=1, members=1),
        sampling=dataclasses.replace(quick.sampling, max_new_tokens=8),
        ppo=dataclasses.replace(quick.ppo, kl_coef=0.2),
        pretrain=None,
        compilation_cache=None,
    )


def number_after(name: str, said: str) -> float:
    found = re.search(rf"{re.escape(name)}\s+(-?[\d.]+(?:e[-+]\d+)?)", said)
    assert found, name
    return float(found[1])


def check(said: str) -> None:
    """The laws that the screen itself must show."""
    lines = said.splitlines()
    assert max(map(len, lines)) <= 100
    assert "\x1b" not in said, "piped, it is plain text"
    sections = [line for line in lines if re.match(r"\d+\. ", line)]
    assert [int(line.split(".")[0]) % 13 for line in sections] == [*range(1, 13), 0]
    left, right = number_after("sum of rewards", said), float(re.findall(r"= (-?[\d.]+)\s*\n", said)[0])
    assert left == pytest.approx(right, abs=2e-6)
    assert number_after("largest |ratio - 1|", said) < 1e-5
    assert number_after("ratio_gap_start", said) < 1e-5 < number_after("ratio_gap ", said)
    loupe = said.split("The loupe: reply 0")[1].splitlines()
    rows = [line.split()[-7:] for line in loupe if len(re.findall(r"-?\d+\.\d{4}", line)) == 7]
    assert rows, "the loupe has a row for each token"
    total = sum(float(row[3]) for row in rows)
    assert total == pytest.approx(left, abs=1e-4 * len(rows)), "its rewards are the shaped ones"
    for row in rows:
        assert float(row[2]) == pytest.approx(float(row[0]) - float(row[1]), abs=2e-4)
    assert any(abs(float(row[6]) - 1) > 1e-4 for row in rows), "and the update has moved something"


@pytest.mark.slow
def test_from_nothing_it_says_so_and_leaves_nothing(walkthrough, tiny, capsys):
    walkthrough.main(tiny, walkthrough.Options())
    said = capsys.readouterr().out
    check(said)
    assert "LEARNT NOTHING" in said and "The policy has not moved yet" in said
    assert not Path(tiny.run_dir).exists()


@pytest.mark.slow
def test_from_a_run_folder_with_ones_own_sentence(walkthrough, tiny, tmp_path, capsys):
    """sft/ and ppo/ differ and the critic has an opinion: KL and values must show. Markup in the sentence stays as typed."""
    from safetensors.numpy import save_file

    folder = Path(tiny.run_dir)
    dialogues = walkthrough.run.read_data(tiny.data, tiny.seed)
    import train_sft  # type: ignore[import-not-found]

    one_device = dataclasses.replace(tiny, mesh=MeshConfig(data=1))
    made = train_sft.make_base(one_device, folder, dialogues, [], sharding.make_mesh(one_device.mesh))
    gpt2_config, params, tokenizer = made
    weights.save_pretrained(folder / "sft" / "model", gpt2_config, params, tokenizer)
    other = jax.tree.map(lambda x: x * 1.3, params)
    weights.save_pretrained(folder / "ppo" / "model", gpt2_config, other, tokenizer)
    kernel = 0.1 * jax.random.normal(jax.random.key(0), (32, 1))
    save_file(
        {"value.kernel": jax.device_get(kernel), "value.bias": jax.device_get(kernel[0])},
        folder / "ppo" / "model" / "value_head.safetensors",
    )
    capsys.readouterr()
    _, options = config.parse_with(walkthrough.Options, ["--text", EVIL, "--emotion", "anger"])
    walkthrough.main(tiny, options)
    said = capsys.readouterr().out
    check(said)
    said = " ".join(said.split())  # lines break where the folder's name is long
    assert "after SFT and PPO" in said and "LEARNT NOTHING" not in said and "The critic starts at 0" not in said
    assert EVIL in said and "the nearest client of train stands in" in said
    assert abs(float(re.search(r"k1 (-?[\d.]+)", said)[1])) > 1e-3  # type: ignore[index]
    assert not (folder / "config.yaml").exists() and not (folder / "report.html").exists()


def test_a_message_of_crisis_is_met_before_any_model(walkthrough, tiny, capsys, monkeypatch):
    monkeypatch.setattr(walkthrough, "models", None)  # nobody gets that far
    _, options = config.parse_with(walkthrough.Options, ["--text", "I want to kill my<b></b>self tonight"])
    walkthrough.main(tiny, options)
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith(safety.DISCLOSURE[:40]) and "a person can" in said


def test_meanings_are_the_comments_in_the_source(walkthrough):
    assert walkthrough.meanings(sampling.Reply)["tokens"] == "[B, R] padded on the right"
    assert list(walkthrough.meanings(ppo.Rollout)) == list(ppo.Rollout._fields)
    for kind in (sampling.Reply, ppo.Rollout, gpt2.KVCache, RewardBatch):
        assert list(walkthrough.meanings(kind)) == list(kind._fields)
        assert all(walkthrough.meanings(kind).values()), kind


def test_ones_own_sentence_borrows_the_reply_to_the_nearest_client(walkthrough):
    def exchange(text, reply):
        return Exchange("c", (), Turn("client", text, "joy"), Turn("therapist", reply, "joy"))

    data = {
        "train": [exchange("I lost my keys", "keys"), exchange("my dog is ill", "dog")],
        "test": [exchange("x", "y")],
    }
    chosen, where = walkthrough.choose(data, "The dog again", "fear")
    assert (chosen.client.text, chosen.client.emotion, chosen.therapist.text) == ("The dog again", "fear", "dog")
    assert "stands in" in where
    assert walkthrough.choose(data, None, None)[0].client.text == "x"


@pytest.mark.parametrize(("own", "named"), [({"emotion": "sad"}, "sadness"), ({"text": " "}, "--text is empty")])
def test_a_mistake_in_its_own_options_is_named(walkthrough, tiny, own, named):
    with pytest.raises(config.ConfigError, match=named):
        walkthrough.main(tiny, walkthrough.Options(**own))


def test_help_names_its_own_options_without_jax():
    code = "import sys, runpy; sys.argv = ['x', '--help']\n"
    code += "try: runpy.run_path('scripts/walkthrough.py', run_name='__main__')\nexcept SystemExit: pass\n"
    code += "assert 'jax' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "What the client says" in done.stdout and "--emotion" in done.stdout


@pytest.mark.slow
def test_a_sentence_that_leaves_no_room_for_a_reply_is_refused(walkthrough, tiny):
    long = walkthrough.Options(text="no " * 400)
    with pytest.raises(ConfigError, match=r"a prompt of \d+ tokens leaves no room for a reply of 8"):
        walkthrough.main(tiny, long)
