"""No figure of what was learnt by heart: the same conversations, split by another seed, must be found out."""

import dataclasses
import json

import pytest

from therapy_jax import dialogue, locate, origin, stages
from therapy_jax.config import Config, ConfigError, DataConfig, EvaluateConfig, PromptConfig


@pytest.fixture(scope="module")
def hashed(tmp_path_factory):
    """The sample without its own splits -> a function (seed) -> dialogues by split, as a hash deals them out."""
    path = tmp_path_factory.mktemp("data") / "own.jsonl"
    lines = [json.loads(line) for line in dialogue.SAMPLE.read_text(encoding="utf-8").splitlines()]
    path.write_text("".join(json.dumps({k: v for k, v in line.items() if k != "split"}) + "\n" for line in lines))
    return lambda seed: dialogue.read_dialogues(path, "jsonl", seed=seed)


def test_another_seed_is_found_out_and_the_same_is_not(hashed, tmp_path):
    first, second = hashed(0), hashed(1)
    origin.note(tmp_path, Config(seed=0), first["train"])
    origin.check(tmp_path, Config(seed=0), first["test"], "test")
    learnt = {d.conversation_id for d in first["train"]} & {d.conversation_id for d in second["test"]}
    assert learnt
    said = rf"{len(learnt)} of the {len(second['test'])} conversations of the test split .*seed 0, this is seed 1"
    with pytest.raises(ConfigError, match=said):
        origin.check(tmp_path, Config(seed=1), second["test"], "test")


def test_a_conversation_is_known_by_its_id_and_its_words(hashed):
    d = hashed(0)["train"][0]
    other_words = dataclasses.replace(d, turns=(dataclasses.replace(d.turns[0], text="Else."), *d.turns[1:]))
    other_id = dataclasses.replace(d, conversation_id="another")
    elsewhere = dataclasses.replace(d, split="test", problem=None)
    assert origin.digest(d) == origin.digest(elsewhere)
    assert len({origin.digest(x) for x in (d, other_words, other_id)}) == 3


def test_nothing_that_was_said_is_in_the_file(hashed, tmp_path):
    train = hashed(0)["train"]
    origin.note(tmp_path, Config(), train)
    text = (tmp_path / origin.NAME).read_text()
    assert not any(d.turns[0].text[:20] in text or f'"{d.conversation_id}"' in text for d in train)


def test_other_prompts_are_refused_and_a_model_without_a_note_is_taken(hashed, tmp_path):
    origin.check(tmp_path, Config(), hashed(0)["train"], "train")
    origin.note(tmp_path, Config(prompt=PromptConfig(max_tokens=96)), [])
    with pytest.raises(ConfigError, match="prompt.max_tokens was 96, now 128"):
        origin.check(tmp_path, Config(), [], "test")
    origin.check(tmp_path, Config(data=DataConfig(clean=False), prompt=PromptConfig(max_tokens=96)), [], "test")
    (tmp_path / origin.NAME).write_text("{")
    with pytest.raises(ConfigError, match="damaged"):
        origin.check(tmp_path, Config(), [], "test")


def test_a_model_inherits_what_the_one_before_it_has_learnt(hashed, tmp_path):
    """Trained on seed 0's split, fine-tuned on seed 1's: both are memory."""
    first, second = hashed(0)["train"], hashed(1)["train"]
    before, after = tmp_path / "a" / "sft" / "model", tmp_path / "b"
    origin.note(before, Config(), first)
    (before / "model.safetensors").touch()
    origin.note(after, Config(seed=1), second, locate.find(tmp_path / "a").folder)  # model.name may name a run folder
    found = origin.read(after)
    assert found and found["seed"] == 1
    assert set(found["conversations"]) == {origin.digest(d) for d in (*first, *second)}


def test_a_judge_that_has_learnt_what_it_judges_is_refused(hashed, tmp_path):
    model = tmp_path / "judge" / "sft" / "model"
    origin.note(model, Config(seed=1), hashed(1)["train"])
    (model / "model.safetensors").touch()
    (tmp_path / "judge" / "config.yaml").write_text("seed: 1\n")
    run = Config(evaluate=EvaluateConfig(language_model=str(tmp_path / "judge")))
    with pytest.raises(ConfigError, match="of the test split were in the training data of .*judge"):
        stages.load_language_model(run, hashed(0)["test"], "test")


def test_other_data_under_the_same_path_is_other_content(hashed):
    """What a checkpoint goes on with: one label that changed is enough to tell, and the same file read again is the same."""
    data = hashed(0)
    assert origin.content(data) == origin.content(hashed(0)) != origin.content(hashed(1))
    first, *rest = data["train"]
    turn = dataclasses.replace(first.turns[0], emotion="fear" if first.turns[0].emotion != "fear" else "joy")
    other = {**data, "train": [dataclasses.replace(first, turns=(turn, *first.turns[1:])), *rest]}
    assert origin.content(other) != origin.content(data)
