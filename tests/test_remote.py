"""Run folders on an object store, with fsspec's memory in its place: what it holds is put and fetched whole, and never
appended to, as with gs://. (Checkpoints go there by orbax and tensorstore, which speak to Google's servers alone.)"""

import json
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from therapy_jax import checkpoint, dialogue, files, gpt2, logs, origin, prompts, weights
from therapy_jax.config import Config


class Bucket(MemoryFileSystem):
    """Answers gs:// names; refuses what an object store cannot do."""

    protocol = ("gcs", "gs")
    store: dict = {}  # noqa: RUF012  fsspec's way: shared by all instances
    pseudo_dirs = [""]  # noqa: RUF012

    def _open(self, path, mode="rb", **kwargs):
        assert "a" not in mode and "+" not in mode, f"{path}: objects are not appended to"
        return super()._open(path, mode, **kwargs)


@pytest.fixture
def bucket(monkeypatch):
    Bucket.store.clear()
    monkeypatch.setitem(_registry, "gcs", Bucket)


def test_what_is_local_and_what_is_remote():
    assert files.is_remote("gs://b/run") and not files.is_remote("/tmp/run") and not files.is_remote("runs/gs")
    assert isinstance(files.as_path("runs/x"), Path) and files.as_path("~/x") == Path.home() / "x"
    assert str(files.as_path("gs://b/run") / "x") == "gs://b/run/x"


def test_a_log_grows_here_and_is_copied_whole(bucket):
    folder, began = files.as_path("gs://b/run"), time.monotonic()
    for step in (1, 2):
        logs.log(folder, "sft", step, {"loss": np.float32(0.1)}, began)
    assert not (folder / "metrics.jsonl").is_file(), "only at a save"
    logs.copy_logs(folder)
    logs.log(folder, "sft", 3, {"loss": 0.3}, began)  # written after the last save: a kill loses it

    logs.local_logs.cache_clear()  # as another process sees it, on another machine
    assert [line["step"] for line in logs.read_log(folder / "metrics.jsonl")] == [1, 2]
    kept = logs.take_up(folder, "sft", 1)
    assert list(kept) == [1] and kept[1]["loss"] == 0.1
    logs.log(folder, "sft", 2, {"loss": 0.2}, began)
    logs.copy_logs(folder)
    assert [(x["step"], x["loss"]) for x in logs.read_log(folder / "metrics.jsonl")] == [(1, 0.1), (2, 0.2)]


def test_a_model_comes_back_as_it_was_put(bucket):
    sizes = gpt2.GPT2Config(vocab_size=300, n_positions=16, n_embd=16, n_layer=1, n_head=2, eos_token_id=0)
    params = gpt2.init(sizes, jax.random.key(0))
    tokenizer = prompts.train_tokenizer(["a few words to learn an alphabet from"], 300)
    weights.save_pretrained("gs://b/run/sft/model", sizes, params, tokenizer)
    here = files.fetched("gs://b/run/sft/model")
    _, found = weights.load_pretrained(here)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(
            a[:300], b[:300]
        )  # the embedding has rows beyond the vocabulary, which are padding
    assert prompts.load_tokenizer(here).encode("a few words") == tokenizer.encode("a few words")


def test_a_manifest_there_holds_sizes_alone(bucket):
    step = files.as_path("gs://b/run/sft/checkpoints/7")
    for name in ("state/d/0", "info/metadata"):
        (step / name).write_text("content")
    files.write_json(step / checkpoint.MANIFEST, checkpoint.measure(step))
    assert json.loads((step / checkpoint.MANIFEST).read_text()) == {"state/d/0": [7], "info/metadata": [7]}
    assert checkpoint.damage(step) is None
    (step / "state/d/0").write_text("conten")
    assert checkpoint.damage(step) == "state/d/0 is damaged"
    (step / "state/d/0").unlink()
    assert checkpoint.damage(step) == "state/d/0 is missing"


def test_what_a_model_has_learnt_is_noted_and_inherited_there(bucket):
    first, second = (dialogue.read_dialogues(None, "jsonl")[split] for split in ("train", "validation"))
    base, sft = (files.as_path(f"gs://b/run/{stage}/model") for stage in ("base", "sft"))
    origin.note(base, Config(), first)
    origin.note(sft, Config(), second, base)
    found = origin.read(sft)
    assert found and set(found["conversations"]) == {origin.digest(d) for d in (*first, *second)}
