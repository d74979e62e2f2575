"""Hugging Face safetensors <-> our parameters, both ways, every key and shape checked, torch never needed.

Hugging Face stores GPT-2's matrices as (in, out), like us, one entry per block (`h.3.attn.c_attn.weight`); we stack the
blocks and split the heads: c_attn (D, 3D) -> (L, D, 3, H, K), attn.c_proj (D, D) -> (L, H, K, D).
Hub files come with and without the `transformer.` prefix; old ones carry causal-mask buffers (`attn.bias`), which are no
weights. The head is tied to the embedding; a file that says otherwise is refused.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from therapy_jax import processes
from therapy_jax.files import flatten, share, staged, write_text
from therapy_jax.gpt2 import ACTIVATIONS, GPT2Config, Params
from therapy_jax.locate import ACCEPTED, WeightsError, find, holds, read_checkpoint
from therapy_jax.sharding import fetch

BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)$")  # causal masks that old checkpoints carry

# ours (path in params) -> theirs; those under "blocks" exist once per block
NAMES = {
    ("wte",): "wte.weight",
    ("wpe",): "wpe.weight",
    ("ln_f", "scale"): "ln_f.weight",
    ("ln_f", "bias"): "ln_f.bias",
    ("blocks", "ln_1", "scale"): "ln_1.weight",
    ("blocks", "ln_1", "bias"): "ln_1.bias",
    ("blocks", "c_attn", "kernel"): "attn.c_attn.weight",
    ("blocks", "c_attn", "bias"): "attn.c_attn.bias",
    ("blocks", "attn_proj", "kernel"): "attn.c_proj.weight",
    ("blocks", "attn_proj", "bias"): "attn.c_proj.bias",
    ("blocks", "ln_2", "scale"): "ln_2.weight",
    ("blocks", "ln_2", "bias"): "ln_2.bias",
    ("blocks", "c_fc", "kernel"): "mlp.c_fc.weight",
    ("blocks", "c_fc", "bias"): "mlp.c_fc.bias",
    ("blocks", "mlp_proj", "kernel"): "mlp.c_proj.weight",
    ("blocks", "mlp_proj", "bias"): "mlp.c_proj.bias",
}

NOT_SAVED = {"dropout", "compute_dtype", "remat", "mesh"}  # how a model is trained and computed, not what it is


def read_config(folder: Path) -> GPT2Config:
    """config.json -> GPT2Config. Raises WeightsError for another architecture, or an option that we do not compute."""
    path = folder / "config.json"
    if not path.is_file():
        raise WeightsError(f"{folder}: no config.json; it holds {holds(folder)}. Accepted is {ACCEPTED}")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(raw, dict):
        raise WeightsError(f"{path}: not a JSON object")
    if raw.get("model_type") != "gpt2":
        raise WeightsError(f"{path}: model_type is {raw.get('model_type')!r}; only 'gpt2' can be loaded")
    fixed = {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    }
    for key, value in fixed.items():
        if raw.get(key, value) != value:
            raise WeightsError(f"{path}: {key} = {raw[key]} is not supported (only {value})")
    activation = raw.get("activation_function", "gelu_new")
    activation = "gelu_new" if activation == "gelu_pytorch_tanh" else activation
    if activation not in ACTIVATIONS:
        raise WeightsError(f"{path}: activation_function {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    known = {f.name for f in dataclasses.fields(GPT2Config)} - NOT_SAVED
    values: dict[str, Any] = {k: v for k, v in raw.items() if k in known and v is not None} | {
        "activation_function": activation
    }
    sizes = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner")
    for name, value in values.items():
        if name in sizes and (type(value) is not int or value < 1):
            raise WeightsError(f"{path}: {name} is {value!r}; it must be a whole number above 0")
    config = GPT2Config(**values)
    if config.n_embd % config.n_head:
        raise WeightsError(f"{path}: n_embd {config.n_embd} is not a multiple of n_head {config.n_head}")
    return config


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of model.safetensors (or of the shards that its index names), as float32."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        files = ["model.safetensors"]
    elif index.is_file():
        try:
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise WeightsError(f"{index}: not a valid index of safetensors shards ({error})") from error
        if outside := [name for name in files if Path(name).name != name]:
            raise WeightsError(f"{index}: names {outside[0]}, which does not lie beside it")
    else:
        pickled = [p.name for p in folder.glob("*.bin")]
        why = f"; {pickled[0]} is a pickle, which is not read: convert it to safetensors" if pickled else ""
        raise WeightsError(f"{folder}: no model.safetensors{why}")
    tensors: dict[str, np.ndarray] = {}
    for name in files:
        try:
            with safe_open(folder / name, framework="flax") as file:  # flax: numpy alone has no bfloat16
                for key in file.keys():  # noqa: SIM118 (not a dict)
                    tensors[key.removeprefix("transformer.")] = np.asarray(file.get_tensor(key), np.float32)
        except (OSError, ValueError) as error:
            raise WeightsError(f"{folder / name}: cannot be read ({error})") from error
        except Exception as error:  # safetensors' own error type is not importable by a stable name
            raise WeightsError(f"{folder / name}: not a sound safetensors file ({error})") from error
    return {k: v for k, v in tensors.items() if not BUFFERS.match(k)}


def shapes(config: GPT2Config) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Hugging Face's shape and ours, per name of NAMES (one block's)."""
    d, f, h = config.n_embd, config.inner, config.n_head
    theirs = {
        "wte.weight": (config.vocab_size, d),
        "wpe.weight": (config.n_positions, d),
        "attn.c_attn.weight": (d, 3 * d),
        "attn.c_attn.bias": (3 * d,),
        "attn.c_proj.weight": (d, d),
        "mlp.c_fc.weight": (d, f),
        "mlp.c_fc.bias": (f,),
        "mlp.c_proj.weight": (f, d),
    }
    ours = {
        "attn.c_attn.weight": (d, 3, h, d // h),
        "attn.c_attn.bias": (3, h, d // h),
        "attn.c_proj.weight": (h, d // h, d),
    }
    return {name: (theirs.get(name, (d,)), ours.get(name, theirs.get(name, (d,)))) for name in NAMES.values()}


def load_pretrained(folder_or_hub_id: str | os.PathLike) -> tuple[GPT2Config, Params]:
    """A GPT-2 in Hugging Face's layout, or one of our runs (locate.py) -> (config, float32 params on the host). Raises
    WeightsError."""
    folder, checkpoint = find(folder_or_hub_id)
    config = read_config(folder)
    if checkpoint is not None:
        return config, checked(read_checkpoint(checkpoint), config, checkpoint)
    tensors = read_tensors(folder)
    head = tensors.pop("lm_head.weight", None)
    if head is not None and "wte.weight" in tensors and not np.array_equal(head, tensors["wte.weight"]):
        raise WeightsError(f"{folder}: lm_head.weight differs from wte.weight; only tied heads are supported")

    params: dict[str, Any] = {}
    for path, name in NAMES.items():
        stacked = path[0] == "blocks"
        theirs, ours = shapes(config)[name]
        rows = []
        for key in [f"h.{i}.{name}" for i in range(config.n_layer)] if stacked else [name]:
            if key not in tensors:
                raise WeightsError(f"{folder}: {key} is missing")
            if tensors[key].shape != theirs:
                raise WeightsError(f"{folder}: {key} has shape {tensors[key].shape}, its config.json asks for {theirs}")
            rows.append(tensors.pop(key).reshape(ours))
        leaf = np.stack(rows) if stacked else rows[0]
        parent = params
        for part in path[:-1]:
            parent = parent.setdefault(part, {})
        parent[path[-1]] = leaf
    if tensors:
        raise WeightsError(f"{folder}: unexpected tensors {', '.join(sorted(tensors)[:5])}; this is not a plain GPT-2")
    params["wte"] = np.pad(params["wte"], ((0, config.padded_vocab_size - config.vocab_size), (0, 0)))
    return config, params


def checked(params: Params, config: GPT2Config, checkpoint: Path) -> Params:
    """The parameters as they are, once every name and shape is what the config asks for."""
    wanted = {".".join(path): shapes(config)[name][1] for path, name in NAMES.items()}
    wanted = {k: (config.n_layer, *shape) if k.startswith("blocks") else shape for k, shape in wanted.items()}
    wanted["wte"] = (config.padded_vocab_size, config.n_embd)
    found = {k: leaf.shape for k, leaf in flatten(params).items()}
    if differing := sorted(k for k in wanted | found if wanted.get(k) != found.get(k)):
        key = differing[0]
        raise WeightsError(
            f"{checkpoint}: {key} has shape {found.get(key)}, its run's config.json asks for {wanted.get(key)}"
        )
    return params


def save_pretrained(folder: str | os.PathLike, config: GPT2Config, params: Params, tokenizer=None) -> None:
    """Write a folder that torch's GPT2LMHeadModel.from_pretrained (and load_pretrained) reads: safetensors + config.json,
    and the tokenizer's files where one is given. The weights come last and by rename: a folder with weights is whole. Where
    there are several processes all of them call this, and process 0 writes."""
    params = fetch(params)
    if processes.is_writer():
        with staged(folder, last="model.safetensors") as here:
            write(here, config, params, tokenizer)
    processes.wait_for_all(f"saved {folder}")


def write(folder: Path, config: GPT2Config, params: Params, tokenizer: Any) -> None:
    tensors: dict[str, np.ndarray] = {}
    for path, name in NAMES.items():
        leaf = params
        for part in path:
            leaf = leaf[part]
        leaf = np.asarray(leaf, np.float32)
        if path[0] == "blocks":
            for i in range(config.n_layer):
                tensors[f"transformer.h.{i}.{name}"] = np.ascontiguousarray(leaf[i].reshape(shapes(config)[name][0]))
        else:
            leaf = leaf[: config.vocab_size] if name == "wte.weight" else leaf
            tensors[f"transformer.{name}"] = np.ascontiguousarray(leaf)
    saved = {k: v for k, v in dataclasses.asdict(dataclasses.replace(config, mesh=None)).items() if k not in NOT_SAVED}
    saved |= {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "bos_token_id": config.eos_token_id,
        "tie_word_embeddings": True,
        "dtype": "float32",
        **{name: config.dropout for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop")},
    }
    write_text(folder / "config.json", json.dumps(saved, indent=2) + "\n")  # whole or not at all, as the weights
    if tokenizer is not None:
        save_tokenizer(folder, tokenizer)
    partial = folder / "model.safetensors.partial"
    write_tensors(tensors, partial)
    share(partial)
    os.replace(partial, folder / "model.safetensors")


def write_tensors(tensors: dict[str, np.ndarray], path: Path) -> None:
    """A safetensors file. Raises WeightsError where it cannot be written."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk, in its own words
        raise WeightsError(f"{path}: cannot be written ({error})") from error


def save_tokenizer(folder: Path, tokenizer: Any) -> None:
    """Its files each by rename, tokenizer.json last: where that one is, all are, and whole."""
    made = folder / "tokenizer.partial"
    shutil.rmtree(made, ignore_errors=True)
    tokenizer.save_pretrained(made)
    for path in sorted(made.iterdir(), key=lambda path: path.name == "tokenizer.json"):
        os.replace(path, folder / path.name)
    made.rmdir()


def resize_vocabulary(config: GPT2Config, params: Params, vocab_size: int) -> tuple[GPT2Config, Params]:
    """Room for new tokens at the end of the vocabulary: their rows start as the mean of the old embeddings, so that they
    are likely and unlikely like an average word (Hewitt 2021, "Initializing New Word Embeddings")."""
    if vocab_size < config.vocab_size:
        raise WeightsError(f"the tokenizer has {vocab_size} tokens, fewer than the model's {config.vocab_size}")
    new = dataclasses.replace(config, vocab_size=vocab_size)
    old = np.asarray(params["wte"])[: config.vocab_size]
    rows = np.tile(old.mean(0), (vocab_size - config.vocab_size, 1))
    spare = np.zeros((new.padded_vocab_size - vocab_size, config.n_embd), np.float32)
    return new, {**params, "wte": jnp.asarray(np.concatenate([old, rows, spare]))}
