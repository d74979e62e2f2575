"""What the work costs in matrix products, counted on paper: XLA's own count takes a loop for one trip.

>>> f"{training_flops(Size(layers=12, width=768, heads=12), batch=8, length=128):.3g}"  # an SFT step of gpt2
'7.73e+11'
>>> forward_products(Size(layers=1, width=2, heads=1, vocabulary=10), tokens=5, predicted=3)[-1]
Product(rows=3, inner=2, out=10, times=1.0)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

HEAD_ROWS = (
    512  # tokens that logits are made for at a time, as head.py does on a CPU (head.CHUNK; this page needs no jax)
)


class Size(NamedTuple):
    """Of a model: L layers, D width, H heads, V words in the vocabulary."""

    layers: int
    width: int
    heads: int
    vocabulary: int = 50_257


class Product(NamedTuple):
    """[rows, inner] times [inner, out], a number of times."""

    rows: int
    inner: int
    out: int
    times: float

    @property
    def flops(self) -> float:
        """A multiply-add is two."""
        return 2.0 * self.rows * self.inner * self.out * self.times


def forward_products(size: Size, tokens: int, predicted: int, wanted: int | None = None) -> list[Product]:
    """Those with parameters, of one forward pass: a block has query, key and value, their output, and the two of the MLP of width
    4 D, 12 D^2 weights in all, each used once a token; the head is used where something is predicted. wanted: tokens whose last
    hidden state somebody reads (None: all); of the others the last block has to make keys and values alone."""
    l, d = size.layers, size.width
    rest = (d, d), (d, 4 * d), (4 * d, d)
    blocks = [Product(tokens, i, o, l if wanted is None else l - 1) for i, o in ((d, 3 * d), *rest)]
    if wanted is not None:
        blocks += [Product(tokens, d, 2 * d, 1), *(Product(wanted, i, o, 1) for i, o in ((d, d), *rest))]
    rows = min(predicted, HEAD_ROWS)
    return [*blocks, *([Product(rows, d, size.vocabulary, predicted / rows)] if predicted else [])]


def training_products(size: Size, tokens: int, predicted: int, wanted: int | None = None) -> list[Product]:
    """The same with the backward pass, which makes two of each: the gradients of what goes in and of the parameters."""
    forward = forward_products(size, tokens, predicted, wanted)
    to_input = [Product(p.rows, p.out, p.inner, p.times) for p in forward]
    to_weights = [Product(p.inner, p.rows, p.out, p.times) for p in forward]
    return [*forward, *to_input, *to_weights]


def generation_products(size: Size, batch: int, prompt: int, new: int) -> list[Product]:
    """P prompt tokens at once, of which the last one's state is read, then each new one but the last."""
    decoded = [p._replace(times=p.times * (new - 1)) for p in forward_products(size, batch, batch)]
    return [*forward_products(size, batch * prompt, batch, batch), *decoded]


def ppo_products(
    size: Size, batch: int, prompt: int, new: int, epochs: int, minibatches: int, separate_critic: bool
) -> list[Product]:
    """As `ppo_flops` counts, with the rows of a minibatch in each step."""
    tokens, steps = prompt + new, epochs * minibatches
    found, part = generation_products(size, batch, prompt, new), batch // minibatches
    for predicted in [new, 0] if separate_critic else [new]:  # a critic has no head
        found += forward_products(size, batch * tokens, batch * predicted, batch * new)
        learnt = training_products(size, part * tokens, part * predicted, part * new)
        found += [p._replace(times=p.times * steps) for p in learnt]
    return found


def forward_flops(size: Size, tokens: int, seen: int, predicted: int, wanted: int | None = None) -> float:
    """FLOPs of one forward pass; nothing but matrix products counts.

    Those with parameters are 2 * 12 L D^2 a token, and 2 V D for each that is predicted. Attention takes two products of length D
    for each pair of a token and a place that it sees (q k, and weights v): 4 L D a pair; `seen` is the number of pairs. Of tokens
    that are not `wanted` the last block has less to do (`forward_products`): no query, and so no pairs.
    """
    blocks = size.layers if wanted is None else size.layers - 1 + wanted / tokens
    return total(forward_products(size, tokens, predicted, wanted)) + 4.0 * blocks * size.width * seen


def total(products: Sequence[Product]) -> float:
    return sum(p.flops for p in products)


def training_flops(size: Size, batch: int, length: int) -> float:
    """One SFT step. The backward pass makes two products for each of the forward one: 3 times the forward pass, which is
    6 (12 L D^2 + V D) tokens + 12 L T D tokens. Every pair of places counts, though causal attention needs half of them:
    that is how the utilisation of training is usually stated."""
    tokens = batch * length
    return 3 * forward_flops(size, tokens, tokens * length, tokens)


def generation_flops(size: Size, batch: int, prompt: int, new: int) -> float:
    """P prompt tokens at once, then each new one but the last, with all places before it in a cache."""
    seen = sum(prompt + i for i in range(1, new))
    return batch * (forward_flops(size, prompt, prompt * prompt, 1, 1) + forward_flops(size, new - 1, seen, new - 1))


def ppo_flops(size: Size, batch: int, prompt: int, new: int, epochs: int, separate_critic: bool) -> float:
    """Generation, the reference's and the critic's reading of prompt and reply, and `epochs` passes of training. The old
    log-probs come with the sampled tokens and cost nothing more. A critic on the policy's own hidden states is free."""
    tokens = prompt + new
    policy = forward_flops(size, tokens, tokens * tokens, new, new)
    critic = forward_flops(size, tokens, tokens * tokens, 0, new) if separate_critic else 0.0
    return generation_flops(size, batch, prompt, new) + batch * (policy + critic + 3 * epochs * (policy + critic))
