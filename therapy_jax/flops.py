"""What the work costs in matrix products, counted on paper: XLA's own count takes a loop for one trip.

>>> f"{training_flops(Size(layers=12, width=768, heads=12), batch=8, length=128):.3g}"  # an SFT step of gpt2
'7.73e+11'
"""

from __future__ import annotations

from typing import NamedTuple


class Size(NamedTuple):
    """Of a model: L layers, D width, H heads, V words in the vocabulary."""

    layers: int
    width: int
    heads: int
    vocabulary: int = 50_257


def forward_flops(size: Size, tokens: int, seen: int, predicted: int) -> float:
    """FLOPs of one forward pass. A multiply-add is two, and nothing but matrix products counts.

    A block has 12 D^2 weights in its matrices (query, key, value and output: 4 D^2; the MLP of width 4 D: 8 D^2), each used
    once a token: 2 * 12 L D^2 a token. Attention takes two products of length D for each pair of a token and a place that
    it sees (q k, and weights v): 4 L D a pair; `seen` is the number of pairs. The head is used where something is
    predicted: 2 V D each.
    """
    blocks = 2 * 12 * size.layers * size.width**2 * tokens
    pairs = 4 * size.layers * size.width * seen
    return float(blocks + pairs + 2 * size.vocabulary * size.width * predicted)


def training_flops(size: Size, batch: int, length: int) -> float:
    """One SFT step. The backward pass makes two products for each of the forward one: 3 times the forward pass, which is
    6 (12 L D^2 + V D) tokens + 12 L T D tokens. Every pair of places counts, though causal attention needs half of them:
    that is how the utilisation of training is usually stated."""
    tokens = batch * length
    return 3 * forward_flops(size, tokens, tokens * length, tokens)


def generation_flops(size: Size, batch: int, prompt: int, new: int) -> float:
    """P prompt tokens at once, then each new one but the last, with all places before it in a cache."""
    decoded = sum(prompt + i for i in range(1, new))
    return batch * forward_flops(size, prompt + new - 1, prompt * prompt + decoded, new)


def ppo_flops(size: Size, batch: int, prompt: int, new: int, epochs: int, separate_critic: bool) -> float:
    """Generation, the reference's and the critic's reading of prompt and reply, and `epochs` passes of training. The old
    log-probs come with the sampled tokens and cost nothing more. A critic on the policy's own hidden states is free."""
    tokens = prompt + new
    policy = forward_flops(size, tokens, tokens * tokens, new)
    critic = forward_flops(size, tokens, tokens * tokens, 0) if separate_critic else 0.0
    return generation_flops(size, batch, prompt, new) + batch * (policy + critic + 3 * epochs * (policy + critic))
