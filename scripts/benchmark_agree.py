"""Whether both sides of scripts/benchmark.py compute the same, and how nearly: what they wrote, quantity by quantity."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np


class Check(NamedTuple):
    row: str
    quantity: str
    gap: float
    tolerance: float
    agrees: bool


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest |ours - theirs|, as a share of the largest |theirs|."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape:
        return math.inf
    return float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-30))


def absolute(ours: np.ndarray, theirs: np.ndarray) -> float:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.abs(ours - theirs).max()) if ours.shape == theirs.shape else math.inf


def differing_replies(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Share of the rows that are not equal throughout: one near tie between two tokens changes all that follows it."""
    return float((ours != theirs).any(1).mean()) if ours.shape == theirs.shape else math.inf


def distance(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray], prefix: str) -> float:
    """||ours - theirs|| / ||theirs|| over all tensors named prefix/..., which must be the same ones on both sides."""
    names = sorted(name for name in theirs if name.startswith(f"{prefix}/"))
    if names != sorted(name for name in ours if name.startswith(f"{prefix}/")) or not names:
        return math.inf
    apart = sum(float(np.square(np.float64(ours[n]) - theirs[n]).sum()) for n in names)
    whole = sum(float(np.square(np.float64(theirs[n])).sum()) for n in names)
    return math.sqrt(apart / max(whole, 1e-60))


def compare(row: str, work: str, dtype: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[Check]:
    """What both sides wrote, quantity by quantity. NaN agrees with nothing."""
    exact = dtype == "float32"
    if work in ("sft", "conversations"):
        found = [("losses", relative(ours["losses"], theirs["losses"]), 1e-4 if exact else 1e-2)]
        found.append(("gradient", distance(ours, theirs, "grad"), 1e-3 if exact else 5e-2))
        if work == "sft":  # Adam divides a gradient by its size: where it is nearly 0, rounding decides its step
            found.append(("change of the parameters", distance(ours, theirs, "change"), 5e-4 if exact else 0.25))
    elif work == "generate":
        # A reply may part from the other side's where two tokens are as likely but for rounding, and only there.
        found = [
            ("replies that differ", differing_replies(ours["tokens"], theirs["tokens"]), 0.1),
            ("logits where they part", float(np.abs(theirs["tie"]).max()), 1e-4),
        ]
    elif work == "rewards":
        found = [("values", absolute(ours["rewards"], theirs["rewards"]), 1e-5)]
    else:
        assert work == "ppo"
        # TRL whitens with the unbiased variance, n - 1 in the place of n: its advantages are smaller by sqrt((n - 1) / n),
        # and Adam makes the step nearly the same again. Its entropy is the mean over the epochs, ours from before them; its
        # approximate KL is half the square of the log-ratio, ours k3, the same to second order.
        whitening = 0.5 / ours["tokens"][0].size
        found = [
            ("score", relative(ours["score"], theirs["score"]), 1e-5),
            ("surprise of the replies", relative(ours["surprise"], theirs["surprise"]), 1e-4),
            ("entropy", relative(ours["entropy"], theirs["entropy"]), 1e-2),
            ("KL to the reference", relative(ours["kl"], theirs["kl"]), 1e-2 + whitening),
            ("policy loss", relative(ours["policy_loss"], theirs["policy_loss"]), 1e-2 + whitening),
            ("value loss", relative(ours["value_loss"], theirs["value_loss"]), 1e-2),
            ("KL of the update", relative(ours["update_kl"], theirs["update_kl"]), 5e-2),
            ("change of the policy", distance(ours, theirs, "change"), 5e-2),
        ]
    return [Check(row, name, gap, tolerance, bool(gap <= tolerance)) for name, gap, tolerance in found]
