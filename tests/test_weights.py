"""Hugging Face folders in and out: every variant that the hub holds loads, every fault is one clear sentence."""

import json
import shutil
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from therapy_jax import gpt2, weights

SIZES: dict[str, Any] = {"vocab_size": 150, "n_positions": 16, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_inner": 40}
TOKENS = np.random.default_rng(0).integers(0, 150, (2, 16)).astype(np.int32)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder that torch wrote, and torch's logits; all weights are random, so that none can be swapped unseen."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.set_num_threads(1)  # tiny matrices: a second thread only waits, for minutes where cores are busy
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES, bos_token_id=0, eos_token_id=7)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
        logits = model(torch.tensor(TOKENS).long()).logits.numpy()
    folder = tmp_path_factory.mktemp("torch")
    model.save_pretrained(folder)
    return folder, model, logits


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written[0], tmp_path / "copy")


def logits_of(config, params):
    return np.asarray(gpt2.GPT2(config).apply({"params": params}, jnp.asarray(TOKENS), jnp.ones(TOKENS.shape, bool)))


def rewrite(folder, change):
    """The folder's tensors, changed by a function on a dict."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def bare_names(tensors):
    for key in list(tensors):
        tensors[key.removeprefix("transformer.")] = tensors.pop(key)


def add_buffers(tensors):
    for i in range(2):
        tensors[f"transformer.h.{i}.attn.bias"] = np.tril(np.ones((1, 1, 16, 16), np.float32))
        tensors[f"transformer.h.{i}.attn.masked_bias"] = np.array(-1e4, np.float32)


def add_head(tensors):
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].copy()


def original(tensors):  # the file of the hub's "gpt2": no prefix, buffers, no head
    add_buffers(tensors)
    bare_names(tensors)


def test_config_and_logits(written):
    config, params = weights.load_pretrained(str(written[0]))
    assert config == gpt2.GPT2Config(**SIZES, eos_token_id=7)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
    logits = logits_of(config, params)
    assert np.abs(logits - written[2]).max() < 1e-5 * np.abs(written[2]).max()  # float32 rounding is near 1e-6


@pytest.mark.parametrize("change", [bare_names, add_buffers, add_head, original])
def test_variants_of_the_file(written, folder, change):
    rewrite(folder, change)
    same(weights.load_pretrained(folder), weights.load_pretrained(written[0]))


def test_shards(written, tmp_path):
    written[1].save_pretrained(tmp_path, max_shard_size="20KB")
    assert not (tmp_path / "model.safetensors").exists() and len(list(tmp_path.glob("*.safetensors"))) > 2
    same(weights.load_pretrained(tmp_path), weights.load_pretrained(written[0]))
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(weights.WeightsError, match=r"model-00002.*cannot be read"):
        weights.load_pretrained(tmp_path)


def test_bfloat16_file(written, tmp_path):
    torch = pytest.importorskip("torch")
    model = type(written[1])(written[1].config)
    model.load_state_dict(written[1].state_dict())
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    rounded = jax.tree.map(
        lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32), weights.load_pretrained(written[0])[1]
    )
    same(weights.load_pretrained(tmp_path)[1], rounded)


def test_export_loads_in_torch(written, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config, params = weights.load_pretrained(written[0])
    # Small moves of every weight: what torch reads must be what we wrote, not what it had.
    moved = jax.tree.map(
        lambda x: x + np.random.default_rng(x.size).normal(0, 0.05, x.shape).astype(np.float32), params
    )
    weights.save_pretrained(tmp_path, config, moved)
    model, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert {
        kind for kind, found in info.items() if found
    } == set()  # missing, unexpected, mismatched keys, error messages
    with torch.no_grad():
        theirs = model.eval()(torch.tensor(TOKENS).long()).logits.numpy()
    assert theirs.shape == (2, 16, 150) and np.abs(theirs - written[2]).max() > 0.1
    assert np.abs(logits_of(config, moved) - theirs).max() < 1e-5 * np.abs(theirs).max()
    assert not list(tmp_path.glob("*.partial"))

    spare = moved["wte"].copy()  # rows past the vocabulary are ours alone
    spare[150:] = 0
    again = weights.load_pretrained(tmp_path)
    same(again, (config, {**moved, "wte": spare}))  # bit for bit
    weights.save_pretrained(tmp_path / "second", *again)
    assert (tmp_path / "second/model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


FAULTS = {
    "a missing key": (lambda t: t.pop("transformer.h.1.mlp.c_fc.bias"), r"h\.1\.mlp\.c_fc\.bias is missing"),
    "a wrong shape": (
        lambda t: t.update({"transformer.wpe.weight": np.zeros((8, 24), np.float32)}),
        r"wpe\.weight has shape \(8, 24\), its config\.json asks for \(16, 24\)",
    ),
    "a transposed matrix": (
        lambda t: t.update({"transformer.h.0.mlp.c_fc.weight": np.zeros((40, 24), np.float32)}),
        r"h\.0\.mlp\.c_fc\.weight has shape \(40, 24\)",
    ),
    "an unexpected key": (
        lambda t: t.update({"score.weight": np.zeros(2, np.float32)}),
        r"unexpected tensors score\.weight",
    ),
    "a layer too many": (
        lambda t: t.update({"transformer.h.2.ln_1.bias": np.zeros(24, np.float32)}),
        r"unexpected tensors h\.2\.ln_1",
    ),
    "an untied head": (
        lambda t: t.update({"lm_head.weight": np.zeros((150, 24), np.float32)}),
        r"lm_head\.weight differs from wte\.weight",
    ),
}
SETTINGS = {
    "another architecture": ({"model_type": "llama"}, r"model_type is 'llama'; only 'gpt2'"),
    "an activation": ({"activation_function": "silu"}, r"activation_function 'silu' is not one of"),
    "scaling by layer": (
        {"scale_attn_by_inverse_layer_idx": True},
        r"scale_attn_by_inverse_layer_idx = True is not supported",
    ),
    "no scaling": ({"scale_attn_weights": False}, r"scale_attn_weights = False is not supported"),
    "cross-attention": ({"add_cross_attention": True}, r"add_cross_attention = True is not supported"),
    "heads that do not divide": ({"n_head": 5}, r"n_embd 24 is not a multiple of n_head 5"),
}


def refused(folder, sentence):
    with pytest.raises(weights.WeightsError, match=sentence) as caught:
        weights.load_pretrained(folder)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400 and str(folder) in message  # one sentence, and it says where


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_the_tensors(folder, fault):
    rewrite(folder, FAULTS[fault][0])
    refused(folder, FAULTS[fault][1])


@pytest.mark.parametrize("fault", SETTINGS)
def test_faults_of_the_config(folder, fault):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | SETTINGS[fault][0]))
    refused(folder, SETTINGS[fault][1])


def test_faults_of_the_folder(folder):
    raw = json.loads((folder / "config.json").read_text())
    sound = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(sound[: len(sound) // 2])
    refused(folder, r"model\.safetensors: (not a sound safetensors file|cannot be read)")
    (folder / "model.safetensors").write_bytes(b"<html>not found</html>")
    refused(folder, r"model\.safetensors: (not a sound safetensors file|cannot be read)")
    (folder / "model.safetensors").unlink()
    refused(folder, r"no model\.safetensors$")
    (folder / "pytorch_model.bin").write_bytes(sound)
    refused(folder, r"pytorch_model\.bin is a pickle, which is not read")
    (folder / "config.json").write_text("{")
    refused(folder, r"config\.json: not valid JSON")
    (folder / "config.json").write_text("[]")
    refused(folder, r"config\.json: not a JSON object")
    for value in ("4", 0, -1, True):
        (folder / "config.json").write_text(json.dumps({**raw, "n_head": value}))
        refused(folder, r"config\.json: n_head is .*; it must be a whole number above 0")
    (folder / "config.json").unlink()
    refused(folder, r"no config\.json")
    refused(folder / "config.json.txt", "no such folder")
    (folder / "config.json.txt").touch()
    refused(folder / "config.json.txt", "is a file; give the folder")


def test_unreachable_hub_id(tmp_path):
    """In a process of its own: the hub's client reads these variables once, when it is imported."""
    code = (
        "import time; from therapy_jax import weights as w; start = time.monotonic()\n"
        "try: w.load_pretrained('nobody/no-such-model')\n"
        "except w.WeightsError as e: print(e); print(time.monotonic() - start)"
    )
    variables = {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": ":".join(sys.path),
    }
    run = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=300)
    message, seconds = run.stdout.splitlines()  # one line of message
    assert (
        message.startswith("nobody/no-such-model is no local folder, and the hub could not give it") and not run.stderr
    )
    assert float(seconds) < 10  # no retries; a second or so when the machine is free


def test_resize_vocabulary(written):
    config, params = weights.load_pretrained(written[0])
    params["wte"][150:] = 5.0  # leftovers in the spare rows count for nothing
    for size in (150, 153, 300):
        new_config, new = weights.resize_vocabulary(config, params, size)
        assert new_config.vocab_size == size and new["wte"].shape == (new_config.padded_vocab_size, 24)
        np.testing.assert_array_equal(new["wte"][:150], params["wte"][:150])
        rows = np.asarray(new["wte"][150:size])
        np.testing.assert_allclose(rows, np.tile(params["wte"][:150].mean(0), (size - 150, 1)), rtol=1e-5, atol=1e-7)
        assert (np.asarray(new["wte"][size:]) == 0).all()
    before, after = logits_of(config, params), logits_of(new_config, new)
    assert after.shape == (2, 16, 300)
    np.testing.assert_allclose(after[..., :150], before, rtol=1e-6, atol=1e-6 * np.abs(before).max())
    with pytest.raises(weights.WeightsError, match="149 tokens, fewer than the model's 150"):
        weights.resize_vocabulary(config, params, 149)
