"""Small heads on what the frozen SFT model reads in a text (readings.py): emotion, strategy and meaning, for the rewards.

    reading -> small heads, trained here on annotated training turns -> emotion | strategy | the client's emotion
    reading -> whitened (Su et al. 2021, arXiv 2103.15316) -> meaning, comparable by cosine

The trunk never learns here, so every reading is computed once and a head trains in seconds. A reward that reads emotion
by one model should be judged by another: that is tfidf.py.

Axes: B batch, D width of the trunk, F width of a reading, M members of a head, C classes, W whitened width.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file

from therapy_jax import gpt2, processes, prompts, readings
from therapy_jax.config import ClassifierConfig, Config, ConfigError
from therapy_jax.dialogue import EMOTIONS, STRATEGIES, DataError, Exchange, Turn
from therapy_jax.files import fetched, flatten, share, staged, write_json
from therapy_jax.gpt2 import Array, Params
from therapy_jax.sharding import fetch
from therapy_jax.weights import write_tensors

FORMAT = 1  # of what `save` writes
REWARDING = ("emotion", "strategy")  # what reward terms need; the third head costs as much again, and reads clients
CLASSES = {"emotion": EMOTIONS, "strategy": STRATEGIES, "client_emotion": EMOTIONS}
WHITENED = 64  # at most: Su et al. find that the leading directions carry the meaning, the rest noise


class Frozen(NamedTuple):
    """What reward terms need beside the trunk, as arrays."""

    emotion: Params  # head over EMOTIONS
    strategy: Params  # head over STRATEGIES
    emotion_prior: Array  # f32[7], share of each emotion among the annotated therapist turns of train's exchanges
    strategy_prior: Array  # f32[10], likewise; both zeros where nothing is annotated
    centre: Array  # f32[D]
    whiten: Array  # f32[D, W]: cos((a - centre) @ whiten, (b - centre) @ whiten) is a usable likeness in meaning


class Classifiers(NamedTuple):
    """All that is saved in run_dir/classifiers."""

    frozen: Frozen
    client_emotion: Params | None  # head over EMOTIONS, on `readings.read_client`; None where it was not asked for
    heads: dict[str, Head]  # by the keys of CLASSES: heads["emotion"].apply({"params": frozen.emotion}, reading)
    report: dict[str, Any]


# ------------------------------------------------------------------------------------------------------------- heads


class Member(nn.Module):
    """reading -> dropout -> hidden units, ReLU -> dropout -> logits; a linear map where hidden = 0."""

    classes: int
    hidden: int
    dropout: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        noise = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))
        x = noise(x)
        if self.hidden:
            x = noise(nn.relu(nn.Dense(self.hidden, name="hidden")(x)))
        return nn.Dense(self.classes, name="classes")(x)


class Head(nn.Module):
    """M members that differ by their start and their dropout; their mean probability is the answer."""

    classes: int
    hidden: int = 0
    dropout: float = 0.5
    members: int = 4

    def setup(self):
        axes = dict(in_axes=None, out_axes=0, variable_axes={"params": 0}, split_rngs={"params": True, "dropout": True})
        many: Any = nn.vmap(Member, axis_size=self.members, **axes)  # pyright: ignore[reportArgumentType]
        self.member = many(self.classes, self.hidden, self.dropout)

    def each(self, reading: Array) -> Array:
        """reading f32[B,F] -> log probabilities of each member, f32[M,B,C]. Dropout is on where apply() is given rngs."""
        return jax.nn.log_softmax(self.member(reading))

    def __call__(self, reading: Array) -> Array:
        """log mean_m p_m(class | reading), f32[B,C]: normalised logits."""
        return jax.nn.logsumexp(self.each(reading), axis=0) - jnp.log(self.members)


def make_heads(config: ClassifierConfig) -> dict[str, Head]:
    return {name: Head(len(c), config.hidden, config.dropout, config.members) for name, c in CLASSES.items()}


def head_loss(params: Params, x: Array, labels: Array, weights: Array, key: Array, *, head: Head) -> Array:
    """Mean cross-entropy of the members, each example weighed by its class: sum_i w_{y_i} (-log p(y_i)) / sum_i w_{y_i}."""
    logp_MBC = jnp.asarray(head.apply({"params": params}, x, rngs={"dropout": key}, method="each"))
    chosen = jnp.take_along_axis(logp_MBC, labels[None, :, None], -1)[..., 0].mean(0)
    return -(weights[labels] * chosen).sum() / weights[labels].sum()


@functools.partial(jax.jit, static_argnames=("head", "tx", "batch_size"))
def _epoch(state, x, labels, weights, x_held, key, *, head: Head, tx: optax.GradientTransformation, batch_size: int):
    """One pass in random order (the last, smaller batch is left out) -> state, log probabilities of the held-out rows."""
    steps = len(labels) // batch_size
    order = jax.random.permutation(key, len(labels))[: steps * batch_size].reshape(steps, batch_size)

    def step(state, indices):
        params, opt = state
        noise = jax.random.fold_in(key, indices[0])
        grads = jax.grad(head_loss)(params, x[indices], labels[indices], weights, noise, head=head)
        updates, opt = tx.update(grads, opt, params)
        return (optax.apply_updates(params, updates), opt), None

    trained: Any = jax.lax.scan(step, state, order)[0]
    return trained, head.apply({"params": trained[0]}, x_held)


def fit_head(
    head: Head, x: np.ndarray, labels: np.ndarray, x_held: np.ndarray, labels_held: np.ndarray,
    config: ClassifierConfig, seed: int, bag_at: slice = slice(0),
) -> tuple[Params, dict[str, Any]]:  # fmt: skip
    """Readings f32[N,F] and labels i64[N] (-1 = not annotated) of train, and held-out ones -> params, what was chosen.
    `bag_at`: the entries that are a `bag`, which are not standardised.

    Cross-entropy is tried plain, balanced (w_c = N / (C N_c), as scikit-learn has it) and half-way (the root of that), and
    of all passes of the three the one with the best held-out macro-F1 is kept, the earliest of equals; the last pass where no
    held-out label is known. Without a label in train the parameters are zeros, which answers uniformly.
    """
    x, labels = x[labels >= 0], labels[labels >= 0]
    x_held, labels_held = x_held[labels_held >= 0], labels_held[labels_held >= 0]
    params = head.init(jax.random.key(seed), jnp.zeros((1, x.shape[1])))["params"]
    if not len(labels):
        return jax.tree.map(jnp.zeros_like, params), {"annotated": 0}
    gold = labels_held.astype(str).tolist()
    mean, spread = x.mean(0), x.std(0)
    spread = np.where(spread > 1e-6, spread, 1.0)
    mean[bag_at], spread[bag_at] = 0.0, 1 / 3  # by its own spread a rare token would weigh most, being known least
    x, x_held = (x - mean) / spread, (x_held - mean) / spread

    counts = np.bincount(labels, minlength=head.classes)
    balanced = np.where(counts > 0, len(labels) / ((counts > 0).sum() * np.maximum(counts, 1)), 0.0)
    tx = optax.adamw(config.learning_rate, weight_decay=config.weight_decay)
    program = functools.partial(_epoch, head=head, tx=tx, batch_size=min(config.batch_size, len(labels)))
    best: tuple[float, Params, dict[str, Any]] = (-1.0, params, {})
    for name, weights in (("plain", np.ones(head.classes)), ("half-way", np.sqrt(balanced)), ("balanced", balanced)):
        state = (params, tx.init(params))
        for epoch in range(1, config.epochs + 1):
            key = jax.random.fold_in(jax.random.key(seed), epoch)
            state, logits = program(state, x, labels, weights.astype(np.float32), x_held, key)
            f1 = scores(np.asarray(logits).argmax(-1).astype(str), gold)["macro_f1"] if gold else 0.0
            if f1 > best[0] or not gold:
                chosen = {"loss": name, "epoch": epoch, "validation_macro_f1": f1}
                best = (f1, state[0], {"annotated": len(labels), **chosen})
    return _fold(best[1], mean, spread), best[2]


def scores(predicted: Sequence[str], gold: Sequence[str]) -> dict[str, float]:
    """accuracy and macro_f1 (over the classes that occur in gold)."""
    from therapy_jax import metrics  # nltk: a second or two, and 160 MB

    found = metrics.emotion_scores(predicted, gold, prefix="head")
    return {name.removeprefix("head_"): value for name, value in found.items()}


def _fold(params: Params, mean: np.ndarray, spread: np.ndarray) -> Params:
    """A head on (x - mean) / spread -> the same head on x: standardising goes into the first layer."""
    first = "hidden" if "hidden" in params["member"] else "classes"
    kernel, bias = (np.asarray(params["member"][first][name], np.float64) for name in ("kernel", "bias"))
    kernel = kernel / spread[:, None]
    layer = {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.asarray(bias - mean @ kernel, jnp.float32)}
    return {"member": {**params["member"], first: layer}}


# ------------------------------------------------------------------------------------------------------------- train


def said(name: str, exchanges: Iterable[Exchange]) -> list[Turn]:
    """The turns that a head learns from: both speakers', the therapist's, or the client's."""
    by = {"emotion": ("client", "therapist"), "strategy": ("therapist",), "client_emotion": ("client",)}[name]
    return [getattr(e, speaker) for e in exchanges for speaker in by]


def label_ids(name: str, exchanges: Iterable[Exchange]) -> np.ndarray:
    """The labels of `said` -> i64[N]; -1 = none, or one of another set (EmpatheticDialogues' 32 emotions)."""
    classes = CLASSES[name]
    labels = [turn.strategy if name == "strategy" else turn.emotion for turn in said(name, exchanges)]
    return np.asarray([classes.index(label) if label in classes else -1 for label in labels], int)


def annotated(name: str, exchanges: Iterable[Exchange]) -> tuple[list[str], list[str]]:
    """The turns of `said` that carry a label of the head's classes -> texts, labels."""
    exchanges = list(exchanges)
    pairs = [
        (turn.text, CLASSES[name][i])
        for turn, i in zip(said(name, exchanges), label_ids(name, exchanges), strict=True)
        if i >= 0
    ]
    return [text for text, _ in pairs], [label for _, label in pairs]


def prior(labels: np.ndarray, classes: int) -> np.ndarray:
    """The share of each class among the annotated -> f32[C], zeros where nothing is."""
    counts = np.bincount(labels[labels >= 0], minlength=classes)
    return (counts / max(counts.sum(), 1)).astype(np.float32)


def whitening(x: np.ndarray, width: int = WHITENED) -> tuple[np.ndarray, np.ndarray]:
    """PCA whitening: x f32[N,D] -> centre f32[D], whiten f32[D,W] such that the rows of (x - centre) @ whiten have
    covariance I (Su et al. 2021, section 3), along the W <= width directions of most variance; those of no variance are
    left out. Raises DataError where x does not vary at all."""
    centre = x.mean(0, dtype=np.float64)
    values, vectors = np.linalg.eigh(np.cov(x.astype(np.float64), rowvar=False, bias=True))
    values, vectors = values[::-1][:width], vectors[:, ::-1][:, :width]
    keep = values > 1e-6 * max(values[0], 1e-12)
    if not keep.any():
        raise DataError("train: all turns of the therapist are alike, so no meaning can be compared; give more data")
    return centre.astype(np.float32), (vectors[:, keep] / np.sqrt(values[keep])).astype(np.float32)


def train(
    data: dict[str, list[Exchange]], params: Params, tokenizer: Any, *, model: gpt2.GPT2, config: Config,
    names: Sequence[str] = tuple(CLASSES),
) -> Classifiers:  # fmt: skip
    """The heads of these names (always those of REWARDING) and the statistics, from train and validation alone. A pure
    function of its arguments."""
    if not data["train"]:
        raise DataError("the train split is empty, so no classifier can be trained; check data.path and data.splits")
    heads, fitted, pooled = make_heads(config.classifiers), {}, 4 * model.config.n_embd
    both = {split: data.get(split, []) for split in ("train", "validation")}
    look = functools.partial(examples, params=params, tokenizer=tokenizer, model=model, config=config)
    x = {(name, split): look(name, part) for name in {"emotion", *names} - {"strategy"} for split, part in both.items()}
    x |= {("strategy", split): x["emotion", split][1::2] for split in both}  # a therapist's turn follows each client's
    for name, head in heads.items():
        if name not in (*REWARDING, *names):
            continue
        pairs = [(x[name, split], label_ids(name, part)) for split, part in both.items()]
        fitted[name] = fit_head(
            head, *pairs[0], *pairs[1], config.classifiers, config.seed, slice(pooled, pooled + readings.BAG)
        )
    statistics = (
        prior(label_ids("emotion", data["train"])[1::2], len(EMOTIONS)),
        prior(label_ids("strategy", data["train"]), len(STRATEGIES)),
        *whitening(x["strategy", "train"][:, : model.config.n_embd]),
    )
    frozen = Frozen(fitted["emotion"][0], fitted["strategy"][0], *map(jnp.asarray, statistics))
    report = {name: chosen for name, (_, chosen) in fitted.items()}
    return Classifiers(frozen, fitted.get("client_emotion", (None,))[0], heads, {"heads": report})


def examples(
    name: str, exchanges: Sequence[Exchange], params: Params, tokenizer: Any, *, model: gpt2.GPT2, config: Config
) -> np.ndarray:
    """What a head reads of each turn of `said` -> f32[N, F], for client_emotion f32[N, F + 4D]."""
    if name == "client_emotion":
        return readings.of_clients(params, exchanges, tokenizer, model=model, max_tokens=config.prompt.max_tokens)
    rows = [prompts.encode_text(tokenizer, turn.text) for turn in said(name, exchanges)]
    return readings.of_texts(params, rows, model=model)


# -------------------------------------------------------------------------------------------------------- save, load


def digest(params: Params) -> str:
    """sha256 of a model's parameters."""
    found = hashlib.sha256()
    for name, x in sorted(flatten(fetch(params)).items()):
        found.update(f"{name}{x.shape}".encode() + np.asarray(x, np.float32).tobytes())
    return found.hexdigest()


def belongs_to(config: Config, params: Params) -> dict[str, Any]:
    """What classifiers hold for: the trunk, its sizes, and the settings of their training."""
    settings = {f"classifiers.{k}": v for k, v in dataclasses.asdict(config.classifiers).items()}
    n_embd = int(params["wte"].shape[1])
    return {"format": FORMAT, "n_embd": n_embd, "trunk": digest(params), **settings,
            "prompt.max_tokens": config.prompt.max_tokens}  # fmt: skip


def save(folder: Path, found: Classifiers, belongs: dict[str, Any]) -> None:
    """-> folder/model.safetensors, then folder/report.json: what is killed in between is not taken for whole."""
    if (folder / "report.json").exists():  # of fewer heads, from before: it would belie the new file
        (folder / "report.json").unlink()
    arrays = flatten({**found.frozen._asdict(), "client_emotion": found.client_emotion or {}})
    with staged(folder, last="report.json") as here:
        write_tensors({name: np.asarray(x) for name, x in arrays.items()}, here / "model.safetensors")
        share(here / "model.safetensors")
        write_json(here / "report.json", {"belongs_to": belongs, **found.report})


def load(folder: Path, belongs: dict[str, Any], config: ClassifierConfig) -> Classifiers:
    """Raises ConfigError where the files are damaged, or were made for another trunk or with other settings."""
    again = f"delete {folder}, and the next run makes it anew"
    folder = fetched(folder)
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        then = report.pop("belongs_to")
        differing = [key for key in belongs if then.get(key) != belongs[key]]
        present = [name for name in CLASSES if name in report["heads"]]
        arrays = load_file(folder / "model.safetensors")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ConfigError(f"{folder}: damaged or foreign ({type(error).__name__}); {again}") from error
    if differing:
        raise ConfigError(f"{folder}: made with another {', '.join(differing)}; {again}")

    heads, d = make_heads(config), belongs["n_embd"]
    expected: dict[str, Any] = {name: (len(CLASSES[name.removesuffix("_prior")]),) for name in Frozen._fields[2:4]}
    expected |= {"centre": (d,), "whiten": (d, arrays["whiten"].shape[-1] if "whiten" in arrays else 0)}
    for name in present:
        reading = jnp.zeros((1, readings.width(name, d)))
        shapes: Any = jax.eval_shape(heads[name].init, jax.random.key(0), reading)["params"]
        expected |= {f"{name}.{key}": x.shape for key, x in flatten(shapes).items()}
    wrong = [name for name in expected | arrays if name not in arrays or expected.get(name) != arrays[name].shape]
    if wrong:
        raise ConfigError(f"{folder}: {', '.join(wrong[:3])} missing, unknown or of another shape; {again}")
    tree: Any = unflatten_dict({tuple(name.split(".")): jnp.asarray(x) for name, x in arrays.items()})
    frozen = Frozen(**{name: tree[name] for name in Frozen._fields})
    return Classifiers(frozen, tree.get("client_emotion"), heads, report)


def load_or_train(
    folder: Path, config: Config, data: dict[str, list[Exchange]], gpt2_config: gpt2.GPT2Config, params: Params,
    tokenizer: Any, names: Sequence[str] = tuple(CLASSES),
) -> Classifiers:  # fmt: skip
    """The classifiers of a run folder, with at least the heads of these names; whoever asks first trains and saves them."""
    where, belongs = folder / "classifiers", belongs_to(config, params)
    known = None
    if processes.shared((where / "report.json").is_file()):
        known = load(where, belongs, config.classifiers)
        if set(names) <= set(known.report["heads"]):
            return known
    found = train(data, params, tokenizer, model=gpt2.GPT2(gpt2_config), config=config, names=names)
    if known is not None:  # the heads that rewarded a policy stay as they were, whatever seed or data asks for more
        heads = {**found.report["heads"], **known.report["heads"]}
        found = found._replace(frozen=known.frozen, report={**known.report, "heads": heads})
    if processes.is_writer():
        save(where, found, belongs)
    processes.wait_for_all("classifiers")
    # Hosts may differ in the last bits: all read what process 0 has written, now as after a restart.
    return found if jax.process_count() == 1 else load(where, belongs, config.classifiers)
