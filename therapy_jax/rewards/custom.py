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
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from therapy_jax import prompts
from therapy_jax.config import ConfigError, CustomReward, RewardWeights
from therapy_jax.dialogue import Exchange
from therapy_jax.rewards.combine import Raw, RewardError


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
    sys.modules[spec.name] = module  # dataclasses and pickle look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises: it is theirs to read, with its place
        raise ConfigError(f"rewards.custom.path: {file} cannot be run: {where(error, file)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"rewards.custom.path: {file} has no function {name}")
    known = {*RewardWeights.__dataclass_fields__}
    if taken := sorted(known & set(config.weights)):
        raise ConfigError(f"rewards.custom.weights: {', '.join(taken)} is a term of ours; weigh it in rewards.weights")
    return function


def where(error: BaseException, file: str | Path) -> str:
    """ "my.py, line 7: KeyError: 'x'": an exception with the innermost line of the user's file that it came through."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename) == Path(file).expanduser().absolute()]
    place = f"{file}, line {lines[-1]}: " if lines else ""  # none where the file does not even parse
    return f"{place}{type(error).__name__}: {str(error).partition(chr(10))[0]}"  # jax adds lines about itself


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
        file = name.rpartition(":")[0]
        raise RewardError(f"reward {name} {culprit(function, samples)}: {where(error, file)}") from error
    if not isinstance(values, Mapping):
        raise RewardError(
            f"reward {name} gives a {type(values).__name__}, it must give a dict of name to list of numbers"
        )
    terms = {}
    for term, column in values.items():
        if not isinstance(term, str):
            raise RewardError(f"reward {name}: {term!r} cannot name a term; give it a name in words")
        length = len(column) if hasattr(column, "__len__") and getattr(column, "shape", None) != () else None
        if length != len(samples):
            got = f"a {type(column).__name__}" if length is None else f"{length} values"
            raise RewardError(f"reward {name}: {term} gives {got} for {len(samples)} samples")
        terms[term] = [
            number(value, f"reward {name}: {term}", f"for {show(samples, i)}") for i, value in enumerate(column)
        ]
    return {term: jnp.asarray(column, jnp.float32) for term, column in terms.items()}


def number(value: Any, who: str, which: str) -> float:
    """Whatever is one number (Python's, numpy's, an array without dimensions) -> float. Raises RewardError for anything
    else, and for what float32 does not hold."""
    try:
        if isinstance(value, str | bytes) or getattr(value, "shape", ()) != ():
            raise TypeError
        real = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise RewardError(f"{who} gives a {type(value).__name__} {which}") from error
    if not abs(real) <= float(np.finfo(np.float32).max):  # so written, a NaN is caught as well
        raise RewardError(f"{who} is {real} {which}")
    return real


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
            file = name.rpartition(":")[0]
            raise RewardError(f"reward {name} broke while it was compiled: {where(error, file)}") from error

    return traced
