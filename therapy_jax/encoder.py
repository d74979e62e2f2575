"""A sentence encoder of the BERT family (all-MiniLM-L6-v2 and its kin): how near are two texts in meaning?

    x = layer_norm(word[token] + position[i] + token_type[0])
    for each layer:  x = layer_norm(x + attention(x));  x = layer_norm(x + mlp(x))
    e = mean of x over the real tokens;  e / |e|

BERT (Devlin et al. 2019, section 3) normalises after each sum, where GPT-2 does so before; every token sees every other.
Mean pooling is Sentence-BERT's (Reimers & Gurevych 2019, section 3). All is float32, and the dot product of two
embeddings is their cosine.

Axes: B batch, T tokens, D hidden_size, F intermediate_size, H heads, K = D/H.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from therapy_jax import gpt2
from therapy_jax.attention import attention
from therapy_jax.batching import pad
from therapy_jax.gpt2 import Array, Params
from therapy_jax.locate import WeightsError, resolve
from therapy_jax.weights import read_tensors

OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}  # BERT's own, of 2018


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of one encoder; the names and defaults are Hugging Face's."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12


class Encoder(NamedTuple):
    config: EncoderConfig
    params: Params  # float32, on the device; the layers stacked, matrices (in, out)
    tokenizer: Any  # Hugging Face's


def read_config(folder: Path) -> EncoderConfig:
    """config.json -> EncoderConfig. Raises WeightsError for another architecture, or an option that we do not compute."""
    path, pooling = folder / "config.json", folder / "1_Pooling" / "config.json"  # the second is Sentence-BERT's
    if not path.is_file():
        raise WeightsError(f"{folder}: no config.json, so this is no Hugging Face model folder")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        pools = json.loads(pooling.read_text(encoding="utf-8")) if pooling.is_file() else {"pooling_mode": "mean"}
    except ValueError as error:
        raise WeightsError(f"{folder}: config.json or 1_Pooling/config.json is not valid JSON ({error})") from error
    if raw.get("model_type") != "bert":
        raise WeightsError(f"{path}: model_type is {raw.get('model_type')!r}; only 'bert' can be an encoder here")
    fixed = {"hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False}
    for key, value in fixed.items():
        if raw.get(key, value) != value:
            raise WeightsError(f"{path}: {key} = {raw[key]} is not supported (only {value})")
    config = EncoderConfig(**{f.name: raw[f.name] for f in dataclasses.fields(EncoderConfig) if f.name in raw})
    d, heads = config.hidden_size, config.num_attention_heads
    if d % heads:
        raise WeightsError(f"{path}: hidden_size {d} is not a multiple of num_attention_heads {heads}")
    modes = [k.removeprefix("pooling_mode_") for k, v in pools.items() if k.startswith("pooling_mode_") and v]
    modes = modes or [str(pools.get("pooling_mode"))]
    if modes not in (["mean_tokens"], ["mean"]):
        raise WeightsError(f"{pooling}: pools by {' + '.join(modes)}; only the mean over tokens is supported")
    return config


def read_tokenizer(folder: Path, config: EncoderConfig) -> Any:
    import transformers  # two seconds; here, so that importing this module stays cheap

    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        raise WeightsError(f"{folder}: no tokenizer here (neither tokenizer.json nor vocab.txt)")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # damaged files raise many kinds, and messages of many lines: they stay in the cause
        raise WeightsError(f"{folder}: the tokenizer cannot be read ({type(error).__name__})") from error
    if len(tokenizer) > config.vocab_size:
        raise WeightsError(f"{folder}: the tokenizer has {len(tokenizer)} tokens, the encoder only {config.vocab_size}")
    return tokenizer


def load(folder_or_hub_id: str | os.PathLike) -> Encoder:
    """An encoder in Hugging Face's layout, every key and shape checked. Raises WeightsError.

    Hub files come with and without the `bert.` prefix. What stands on top of the encoder (pooler, cls) is not read.
    """
    folder = resolve(folder_or_hub_id)
    config = read_config(folder)
    tensors = {k.removeprefix("bert."): v for k, v in read_tensors(folder).items()}
    for old, new in OLD_NAMES.items():
        tensors = {k.replace(old, new): v for k, v in tensors.items()}
    tensors.pop("embeddings.position_ids", None)  # 0, 1, 2, ...: a buffer of old files

    def take(name: str, *shape: int) -> np.ndarray:
        if name not in tensors:
            raise WeightsError(f"{folder}: {name} is missing")
        if tensors[name].shape != shape:
            raise WeightsError(f"{folder}: {name} has shape {tensors[name].shape}, its config.json asks for {shape}")
        return tensors.pop(name)

    def norm(name: str) -> Params:
        return {"scale": take(f"{name}.weight", d), "bias": take(f"{name}.bias", d)}

    def dense(name: str, n_in: int, n_out: int) -> Params:
        return {"kernel": take(f"{name}.weight", n_out, n_in).T, "bias": take(f"{name}.bias", n_out)}

    d, f = config.hidden_size, config.intermediate_size
    layers = [
        {
            "query": dense(f"encoder.layer.{i}.attention.self.query", d, d),
            "key": dense(f"encoder.layer.{i}.attention.self.key", d, d),
            "value": dense(f"encoder.layer.{i}.attention.self.value", d, d),
            "attn_proj": dense(f"encoder.layer.{i}.attention.output.dense", d, d),
            "ln_1": norm(f"encoder.layer.{i}.attention.output.LayerNorm"),
            "c_fc": dense(f"encoder.layer.{i}.intermediate.dense", d, f),
            "mlp_proj": dense(f"encoder.layer.{i}.output.dense", f, d),
            "ln_2": norm(f"encoder.layer.{i}.output.LayerNorm"),
        }
        for i in range(config.num_hidden_layers)
    ]
    params = {
        "word": take("embeddings.word_embeddings.weight", config.vocab_size, d),
        "position": take("embeddings.position_embeddings.weight", config.max_position_embeddings, d),
        "token_type": take("embeddings.token_type_embeddings.weight", config.type_vocab_size, d),
        "ln": norm("embeddings.LayerNorm"),
        "layers": jax.tree.map(lambda *rows: np.stack(rows), *layers),
    }
    unread = sorted(name for name in tensors if name.startswith(("embeddings.", "encoder.")))
    if unread:
        raise WeightsError(f"{folder}: unexpected tensors {', '.join(unread[:5])}; this is not a plain BERT")
    return Encoder(config, jax.device_put(params), read_tokenizer(folder, config))


def embed(params: Params, tokens: Array, mask: Array, *, config: EncoderConfig) -> Array:
    """tokens i32[B,T], mask bool[B,T] (True = a real token; padding may stand anywhere) -> f32[B,D], each of length 1.

    A row without tokens gives zeros. Raises ValueError where T is more than the encoder has positions.
    """
    if tokens.shape[1] > config.max_position_embeddings:
        raise ValueError(f"{tokens.shape[1]} tokens, but the encoder has {config.max_position_embeddings} positions")
    positions = jnp.clip(jnp.cumsum(mask, -1) - 1, 0)
    x_BTD = params["word"][tokens] + params["position"][positions] + params["token_type"][0]
    x_BTD = gpt2.layer_norm(x_BTD, params["ln"], config.layer_norm_eps)
    visible_BTT = jnp.broadcast_to(mask[:, None, :], (*mask.shape, mask.shape[1]))

    def dense(x, p):
        return x @ p["kernel"] + p["bias"]

    def heads(x_BTD):
        return x_BTD.reshape(*mask.shape, config.num_attention_heads, -1).swapaxes(1, 2)

    def layer(x_BTD, p):
        q_BHTK, k_BHTK, v_BHTK = (heads(dense(x_BTD, p[name])) for name in ("query", "key", "value"))
        mixed_BHTK = attention(q_BHTK, k_BHTK, v_BHTK, visible_BTT, 0.0, None)
        mixed_BTD = mixed_BHTK.swapaxes(1, 2).reshape(x_BTD.shape)
        x_BTD = gpt2.layer_norm(x_BTD + dense(mixed_BTD, p["attn_proj"]), p["ln_1"], config.layer_norm_eps)
        h_BTF = jax.nn.gelu(dense(x_BTD, p["c_fc"]), approximate=False)
        return gpt2.layer_norm(x_BTD + dense(h_BTF, p["mlp_proj"]), p["ln_2"], config.layer_norm_eps), None

    x_BTD, _ = jax.lax.scan(layer, x_BTD, params["layers"])
    summed = jnp.where(mask[..., None], x_BTD, 0.0).sum(1)  # scaled to length 1, the sum is the mean
    return summed / jnp.maximum(jnp.linalg.norm(summed, axis=-1, keepdims=True), 1e-12)


_embed = jax.jit(embed, static_argnames="config")


def bucket(n: int, least: int, most: int) -> int:
    """The power of two that holds n >= 1, within [least, most]: few shapes, so few programs are compiled."""
    return min(most, max(least, 1 << (n - 1).bit_length()))


def embed_texts(encoder: Encoder, texts: Sequence[str], batch_size: int = 64) -> np.ndarray:
    """Texts -> f32[N,D] on the host, in their order, each of length 1. A text longer than the encoder's positions is cut;
    an empty one is [CLS] [SEP], a vector like any other, and says nothing."""
    config, params, tokenizer = encoder
    out = np.zeros((len(texts), config.hidden_size), np.float32)
    if len(texts) == 0:  # the tokenizer refuses an empty list
        return out
    limit = config.max_position_embeddings
    # padding=False: a tokenizer.json may carry a fixed length, and its padding would be taken for words
    rows = tokenizer(list(texts), truncation=True, max_length=limit, padding=False)["input_ids"]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # like lengths together: little padding
    for start in range(0, len(rows), batch_size):
        chosen = order[start : start + batch_size]
        spare = bucket(len(chosen), 8, batch_size) - len(chosen)
        length = bucket(len(rows[chosen[-1]]), 16, limit)
        tokens, mask = pad([rows[i] for i in chosen] + [[]] * spare, length, "right")
        out[chosen] = np.asarray(_embed(params, tokens, mask, config=config))[: len(chosen)]
    return out
