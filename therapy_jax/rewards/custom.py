"""Rewards of your own: a function in a file of yours, named by `rewards.custom.path: my.py:function`.

On the host it is plain Python on text, and the PPO program is cut in two around it:

    def warmth(samples: list[Sample]) -> dict[str, list[float]]:
        return {"warmth": [float("sorry" in s.reply) for s in samples]}

On the device it is jax on the arrays of a RewardBatch, and joins the one compiled program:

    def brevity(batch: RewardBatch) -> dict[str, jax.Array]:
        return {"brevity": -batch.words_mask.sum(-1).astype(jnp.float32) / 10}
"""

from __future__ import annotations

import importlib.util
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from therapy_jax import prompts
from therapy_jax.config import ConfigError, CustomReward, RewardWeights
from therapy_jax.dialogue import Exchange
from therapy_jax.rewards.combine import Raw


class RewardError(ValueError):
    """A reward that cannot be used; the message names the function, and the sample where there is one."""


class Sample(NamedTuple):
    """What a host reward knows of one reply."""

    client: str
    context: tuple[str, ...]  # the turns before, oldest first
    reply: str
    emotion: str | None  # that the reply states
    ended: bool  # by EOS, not by the length limit
    reference: str  # the therapist's own reply
    reference_emotion: str | None
    reference_strategy: str | None


def load(config: CustomReward) -> Callable[[Any], Any]:
    """The function that config.path names. Raises ConfigError where there is none, or where its file does not run."""
    path, _, name = config.path.rpartition(":")
    if not path or not name.isidentifier():
        raise ConfigError(f"rewards.custom.path must be file.py:function, not {config.path!r}")
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"rewards.custom.path: there is no file {file}")
    spec = importlib.util.spec_from_file_location(f"custom_reward_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"rewards.custom.path: {file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises: it is theirs to read, with its place
        raise ConfigError(f"rewards.custom.path: {file} cannot be run: {where(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"rewards.custom.path: {file} has no function {name}")
    known = {*RewardWeights.__dataclass_fields__}
    if taken := sorted(known & set(config.weights)):
        raise ConfigError(f"rewards.custom.weights: {', '.join(taken)} is a term of ours; weigh it in rewards.weights")
    return function


def where(error: BaseException) -> str:
    """ "my.py, line 7: KeyError: 'x'": the innermost place of an exception."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = "" if trace is None else f"{trace.tb_frame.f_code.co_filename}, line {trace.tb_lineno}: "
    return f"{place}{type(error).__name__}: {error}"


def make_samples(tokenizer: Any, replies: Sequence[Sequence[int]], exchanges: Sequence[Exchange]) -> list[Sample]:
    """Generated ids and what they answer -> Samples."""
    samples = []
    for ids, e in zip(replies, exchanges, strict=True):
        parsed, therapist = prompts.parse_reply(tokenizer, ids), e.therapist
        context = tuple(turn.text for turn in e.context)
        said = e.client.text, context, parsed.text, parsed.emotion, parsed.ended
        samples.append(Sample(*said, therapist.text, therapist.emotion, therapist.strategy))
    return samples


def on_host(function: Callable[[list[Sample]], Any], samples: list[Sample], name: str) -> Raw:
    """Call a host reward -> {term: f32[B]}. Raises RewardError naming the function, the term, and the sample it broke on:
    an exception, something that is no number, a NaN, a list of another length."""
    try:
        values = function(samples)
    except Exception as error:
        raise RewardError(f"reward {name} {culprit(function, samples)}: {where(error)}") from error
    if not isinstance(values, Mapping):
        raise RewardError(f"reward {name} gives a {type(values).__name__}, it must give a dict of name to list of numbers")
    for term, column in values.items():
        if not hasattr(column, "__len__") or len(column) != len(samples):
            got = f"{len(column)} values" if hasattr(column, "__len__") else f"a {type(column).__name__}"
            raise RewardError(f"reward {name}: {term} gives {got} for {len(samples)} samples")
        for i, value in enumerate(column):
            if not isinstance(value, numbers.Real) and getattr(value, "shape", None) != ():
                raise RewardError(f"reward {name}: {term} gives a {type(value).__name__} for {show(samples, i)}")
            if not math.isfinite(value):
                raise RewardError(f"reward {name}: {term} is {float(value)} for {show(samples, i)}")
    return {term: jnp.asarray([float(value) for value in column], jnp.float32) for term, column in values.items()}


def culprit(function: Callable[[list[Sample]], Any], samples: list[Sample]) -> str:
    """Which sample a function breaks on when it is given one at a time."""
    for i, sample in enumerate(samples):
        try:
            function([sample])
        except Exception:
            return f"broke on {show(samples, i)}"
    return f"broke on the batch of {len(samples)} samples (on none of them alone)"


def show(samples: list[Sample], i: int) -> str:
    return f"sample {i} (reply: {samples[i].reply[:80]!r})"


def on_device(function: Callable[[Any], Any], name: str) -> Callable[[Any], Mapping[str, Any]]:
    """A device reward whose errors while it is traced name it."""

    def traced(batch):
        try:
            return function(batch)
        except Exception as error:
            raise RewardError(f"reward {name} broke while it was compiled: {where(error)}") from error

    return traced
