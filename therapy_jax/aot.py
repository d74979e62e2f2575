"""The programs of a run, compiled for a TPU that is not there: from shapes alone, nothing is allocated.

libtpu carries the compiler and knows every topology; jax lowers the same functions that the scripts call, on a mesh of the
topology's devices. A program that does not fit its chips' memory is refused by the compiler, so that fit is proved here,
not estimated. What the programs would compute is never run.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from therapy_jax import classifiers, gpt2, hlo, ppo, readings, sft, sharding
from therapy_jax.attention import Layout
from therapy_jax.batching import Batch, Prompt, round_up
from therapy_jax.config import Config, ConfigError
from therapy_jax.dialogue import EMOTIONS, STRATEGIES
from therapy_jax.flops import Size, generation_flops, ppo_flops, training_flops
from therapy_jax.rewards import combine, scoring
from therapy_jax.rewards.batch import CONTEXT_TOKENS, PAD_TO, Fixed, References
from therapy_jax.rewards.words import Vocabulary
from therapy_jax.sampling import generate

SIZES = {  # Radford et al. 2019, table 2: layers, width, heads
    "gpt2": (12, 768, 12),
    "gpt2-medium": (24, 1024, 16),
    "gpt2-large": (36, 1280, 20),
    "gpt2-xl": (48, 1600, 25),
}
SPECIAL = 6  # tokens that the prompts add to a vocabulary
GIB = 2**30


class Chip(NamedTuple):
    """Public figures of a chip."""

    name: str
    memory: float  # bytes that the compiler may use, as it says where a program needs more
    flops: float  # bfloat16, per second
    link: float  # bytes a second that it can send to its neighbours, all links together


CHIPS = {  # by what jax calls them; docs.cloud.google.com/tpu/docs/v5e and /v6e, half of the bidirectional ICI bandwidth
    "TPU v5 lite": Chip("v5e", 15.75 * GIB, 197e12, 200e9),
    "TPU v6 lite": Chip("v6e", 31.25 * GIB, 918e12, 400e9),
}


class Program(NamedTuple):
    """One program of a run, ready to be compiled for any batch size."""

    name: str
    lower: Callable[[int], Any]  # batch size -> jax.stages.Lowered
    flops: Callable[[int], float]  # of all chips together
    multiple: int  # batch sizes are multiples of it
    batch_size: int  # the config's


class Report(NamedTuple):
    """What the compiler says of a program at one batch size. Bytes are those of one chip."""

    program: str
    batch: int
    fits: bool
    seconds: float  # that it took to compile
    total: int  # at the peak, code included; temporaries that follow one another share memory, so less than the sum of what follows
    arguments: int
    outputs: int
    aliased: int  # of the outputs, what takes the place of a donated argument
    temporaries: int
    sent: dict[str, float]  # bytes over the links by kind of collective
    count: dict[str, int]  # collectives by kind
    uncertain: float  # of the bytes sent, how many are in loops whose trips depend on data
    flops: float  # of one chip, in matrix products


def topology_devices(name: str) -> list[Any]:
    """`v5e:2x4` -> its devices. Raises ConfigError without libtpu, or for a topology that it does not know."""
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except Exception as error:  # jax raises whatever the plug-in gives it
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        if not has_libtpu():
            raise ConfigError(
                "compiling for a TPU needs libtpu, which is not installed: pip install 'therapy_jax[tpu]'"
            ) from error
        raise ConfigError(
            f"topology {name!r} is not one that libtpu knows, such as v5e:2x4 or v6e:4x4 ({told})"
        ) from error


def has_libtpu() -> bool:
    import importlib.util

    return importlib.util.find_spec("libtpu") is not None


def gpt2_config(config: Config, mesh: Mesh) -> gpt2.GPT2Config:
    """The sizes of the config's model: of a name of GPT-2's family without a download, or from scratch."""
    sizes = config.model
    how = {"dropout": sizes.dropout, "remat": sizes.remat, "mesh": mesh}
    how["compute_dtype"] = "bfloat16" if sizes.compute_dtype == "auto" else sizes.compute_dtype
    if sizes.name is None:
        names = ("n_positions", "n_embd", "n_layer", "n_head")
        own = {name: getattr(sizes, name) for name in names}
        return gpt2.GPT2Config(vocab_size=config.tokenizer.vocab_size + SPECIAL, **own, **how)
    known = SIZES.get(sizes.name.rsplit("/", 1)[-1])
    if known is None:
        raise ConfigError(f"model.name {sizes.name}: only the sizes of {', '.join(SIZES)} are known without a download")
    own = dict(zip(("n_layer", "n_embd", "n_head"), known, strict=True))
    return gpt2.GPT2Config(vocab_size=50_257 + SPECIAL, **own, **how)


# ---------------------------------------------------------------------------------------------------------- shapes


def laid_out(mesh: Mesh, tree: Any) -> Any:
    """Shapes -> the same with their places, as sharding.place would give them."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, sharding.shardings(mesh, tree)
    )


def everywhere(mesh: Mesh, tree: Any) -> Any:
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), tree)


def rows(mesh: Mesh, *shape: int, dtype: Any = jnp.int32) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(sharding.ROWS)))


def shape_of(*shape: int, dtype: Any = jnp.float32) -> Any:  # an array, as far as a type checker is to know
    return jax.ShapeDtypeStruct(shape, dtype)


def params_of(config: gpt2.GPT2Config) -> Any:
    return jax.eval_shape(
        functools.partial(gpt2.init, dataclasses.replace(config, mesh=None)), jax.eval_shape(lambda: jax.random.key(0))
    )


def references_of(mesh: Mesh, prompts: int, reply: int, width: int) -> References:
    """The therapists' replies, and the clients' turns, taken as long as ours."""
    length = round_up(reply, PAD_TO)
    tokens, mask = rows(mesh, prompts, length), rows(mesh, prompts, length, dtype=bool)
    client, client_mask = rows(mesh, prompts, CONTEXT_TOKENS), rows(mesh, prompts, CONTEXT_TOKENS, dtype=bool)
    reading, number = rows(mesh, prompts, width, dtype=jnp.float32), rows(mesh, prompts)
    return References(
        number, tokens, mask, client, client_mask, reading, reading, reading, emotion=number, strategy=number
    )


def fixed_of(config: Config, model: gpt2.GPT2Config) -> Fixed:
    size, width = model.padded_vocab_size, model.n_embd
    flags, hashes, number = shape_of(size, dtype=bool), shape_of(size, dtype=jnp.uint32), shape_of(dtype=jnp.int32)
    words = shape_of(len(EMOTIONS), 3, dtype=jnp.int32)
    vocabulary = Vocabulary(flags, flags, flags, hashes, hashes, flags, flags, words, number, number, number)
    heads = classifiers.make_heads(config.classifiers)
    emotion, strategy = (
        jax.eval_shape(heads[name].init, jax.random.key(0), shape_of(1, readings.width(name, width)))["params"]
        for name in ("emotion", "strategy")
    )
    priors = shape_of(len(EMOTIONS)), shape_of(len(STRATEGIES))
    whiten = shape_of(width, classifiers.WHITENED)
    return Fixed(vocabulary, classifiers.Frozen(emotion, strategy, *priors, shape_of(width), whiten))


# -------------------------------------------------------------------------------------------------------- programs


def programs(config: Config, mesh: Mesh) -> dict[str, Program]:
    """The SFT step, the sampler and the PPO iteration of a config, with every reward that the device computes. Raises
    ConfigError for sizes that the mesh does not divide."""
    at = gpt2_config(config, mesh)
    sharding.check_model(mesh, at.split_sizes)
    ppo.check(config.sampling)
    quiet = gpt2.GPT2(dataclasses.replace(at, dropout=0.0))
    size = Size(at.n_layer, at.n_embd, at.n_head, at.vocab_size)
    prompt, reply, cfg = config.prompt.max_tokens, config.sampling.max_new_tokens, config.ppo
    length = config.sft.row_tokens or round_up(min(prompt + reply, at.n_positions), config.sft.pad_to)
    shards, replies = sharding.row_shards(mesh), cfg.replies_per_prompt
    params, key = params_of(at), everywhere(mesh, jax.eval_shape(lambda: jax.random.key(0)))

    def prompts(n: int) -> Prompt:
        return Prompt(rows(mesh, n, prompt), rows(mesh, n, prompt, dtype=bool))  # pyright: ignore

    def lower_sft(batch: int):
        tx = sft.optimizer(config.sft, 1000)
        state = laid_out(mesh, jax.eval_shape(functools.partial(sft.init_state, tx=tx), params))
        step = functools.partial(sft.sft_step, model=gpt2.GPT2(at), tx=tx, cfg=config.sft)
        numbers, mask = rows(mesh, batch, length), rows(mesh, batch, length, dtype=bool)
        layout = Layout(*(numbers for _ in range(4))) if config.sft.row_tokens else None
        seen = None if layout is None else mask  # as batching.without_mask leaves it
        out = (sharding.shardings(mesh, state), None)
        return jax.jit(step, donate_argnums=0, out_shardings=out).lower(state, Batch(numbers, seen, mask, layout), key)

    def lower_sampler(batch: int):
        sample = functools.partial(generate, model=quiet, cfg=config.sampling, times=replies)
        return jax.jit(sample).lower(laid_out(mesh, params), prompts(batch // replies), key)

    def lower_ppo(batch: int):
        tx = ppo.optimizer(cfg)
        device_custom, host = scoring.load(config.rewards)
        if host:
            raise ConfigError("rewards: a reward on the host cuts the iteration in two; leave it out to see the whole")
        names = list(combine.TERMS)
        make = functools.partial(ppo.init_state, config=at, tx=tx, cfg=cfg, stats=combine.init_stats(names))
        state = laid_out(mesh, jax.eval_shape(make, params))
        weights = combine.weights_of(config.rewards)
        iteration = functools.partial(
            ppo.ppo_iteration,
            model=quiet,
            tx=tx,
            cfg=cfg,
            sampling=config.sampling,
            score_fn=functools.partial(scoring.score, model=quiet, device_custom=device_custom),
            combine_fn=lambda raw, stats: combine.combine(raw, weights, stats, standardise=config.rewards.standardise),
        )
        out = (sharding.shardings(mesh, state), None)
        return jax.jit(iteration, donate_argnums=0, out_shardings=out).lower(
            state, prompts(batch // replies), references_of(mesh, batch // replies, reply, at.n_embd),
            everywhere(mesh, fixed_of(config, at)), key,
        )  # fmt: skip

    separate = cfg.value_head == "separate" and cfg.estimator == "gae"
    made = (
        Program("sft", lower_sft, lambda b: training_flops(size, b, length), shards * config.sft.accumulate, config.sft.batch_size),
        Program("sampler", lower_sampler, lambda b: generation_flops(size, b, prompt, reply), shards * replies, cfg.batch_size),
        Program(
            "ppo", lower_ppo, lambda b: ppo_flops(size, b, prompt, reply, cfg.epochs, separate),
            shards * replies * cfg.minibatches, cfg.batch_size,
        ),
    )  # fmt: skip
    return {program.name: program for program in made}


def compile_program(program: Program, batch: int, mesh: Mesh) -> tuple[Report, str]:
    """-> (report, the program's text; "" where it does not fit). Raises what the compiler raises for other reasons."""
    lowered, began = program.lower(batch), time.monotonic()
    flops = program.flops(batch) / mesh.size
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        took = time.monotonic() - began
        return Report(program.name, batch, False, took, needed(str(error)), 0, 0, 0, 0, {}, {}, 0.0, flops), ""
    took, text, memory = time.monotonic() - began, compiled.as_text() or "", compiled.memory_analysis()
    sent: dict[str, float] = {}
    count: dict[str, int] = {}
    uncertain = 0.0
    for c in hlo.collectives(text):
        sent[c.kind] = sent.get(c.kind, 0.0) + c.bytes * c.times
        count[c.kind] = count.get(c.kind, 0) + c.times
        uncertain += 0.0 if c.certain else c.bytes * c.times
    arguments, outputs = memory.argument_size_in_bytes, memory.output_size_in_bytes
    aliased, temporaries = memory.alias_size_in_bytes, memory.temp_size_in_bytes
    total = memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes
    report = Report(
        program.name, batch, True, took, total, arguments, outputs, aliased, temporaries, sent, count, uncertain, flops
    )
    return report, text


def needed(message: str) -> int:
    """What a program that did not fit would have needed, as the compiler's message says; 0 where it does not."""
    said = re.search(r"Used ([\d.]+)([KMGT]) of|\(([\d.]+)([KMGT])\) exceeds", message)
    if said is None:
        return 0
    size, unit = said.group(1) or said.group(3), said.group(2) or said.group(4)
    return int(float(size) * 1024 ** ("KMGT".index(unit) + 1))


def line(small: Report, large: Report, memory: float) -> int:
    """The largest batch that fits `memory` bytes, on a straight line through two reports."""
    slope = (large.total - small.total) / (large.batch - small.batch)
    return large.batch if slope <= 0 else int(small.batch + (memory - small.total) / slope)
