"""Care first: what stands between a person and the model, in code, before and after every reply.

    message -> normalise -> crisis?  yes: answer(kind), and the model is not asked
                                     no:  model -> check_reply?  yes: WITHHELD instead of the reply

Nothing here knows a language model, and nothing here can be switched off. Two readers look at each message: rules that can
be read as they are (crisis_rules.txt), and a classifier that learnt from labelled messages (crisis_hints.py); a rule that fires
adds to the classifier's odds. It is a coarse net: README says how much slips through.

>>> crisis("Dying laughing at this video") is None
True
>>> crisis("dying laughing, but honestly i wanna d*e").kind
'suicide'
"""

from __future__ import annotations

import functools
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from therapy_jax import crisis_hints
from therapy_jax.config import SafetyConfig
from therapy_jax.crisis_rules import KINDS, matches, normalise

DISCLOSURE = (
    "Before you start: this is a research demo. You are talking to a computer program, not to a person and not to a therapist. "
    "What it writes is not care, not a diagnosis and not advice, and it can be wrong or hurtful. Nothing you type here is "
    "promised to stay confidential. If you are in distress, please talk to a human being: somebody you trust, a doctor, or a "
    "crisis line."
)
WITHHELD = (
    "The program wrote something that it must not say (a diagnosis, advice on medication, or something harmful), so it is not "
    "shown. Please ask a doctor or somebody else you trust about this."
)
HEARD = {
    "suicide": "Thank you for telling me. What you wrote sounds as if your life, or somebody else's, may be in danger.",
    "self_harm": "Thank you for telling me. What you wrote sounds as if you, or somebody you know, may be getting hurt.",
    "abuse": "Thank you for telling me. What you wrote sounds as if somebody is being hurt. Nobody deserves that.",
    "danger": "Thank you for telling me. What you wrote sounds as if somebody may get hurt.",
    "concern": "Thank you for telling me. I may have misread it, but what you wrote sounds as if somebody may not be safe.",
}


class Crisis(NamedTuple):
    kind: str
    """suicide, self_harm, abuse or danger (to others), by a rule; concern: by its hints."""
    matched: str
    """The words that a rule matched, or that weighed most, as `normalise` leaves them."""


def crisis(text: str, earlier_client_turns: Sequence[str] = ()) -> Crisis | None:
    """What the client's message says or hints of suicide, self-harm, abuse or danger to others; None = nothing was found.

    Where an earlier turn of the conversation fired, a message that takes it back or denies it is met with the answer again,
    and so are up to three words right after it ("yes", "tonight"). A phrase that runs over from the turn before is read as one.
    """
    found = _read(text)
    if found or not earlier_client_turns:
        return found
    before = [past for turn in earlier_client_turns if (past := _read(turn))]
    plain = normalise(text)
    if before and (short := len(plain.split()) <= 3 and _read(earlier_client_turns[-1])):
        return short
    if before and (again := next(matches("again", plain), None)):
        return Crisis(before[-1].kind, again)
    if _read(earlier_client_turns[-1]):
        return None
    last = " ".join(normalise(earlier_client_turns[-1]).split()[-8:])
    # What stands in one of them alone has been read above, with the hints that may overrule a rule.
    alone = {hit for part in (f" {last} ", plain) for kind in KINDS for hit in matches(kind, part, True)}
    over = ((kind, hit) for kind in KINDS for hit in matches(kind, f" {last}{plain}", True) if hit not in alone)
    return next(itertools.starmap(Crisis, over), None)


def answer(kind: str, config: SafetyConfig) -> str:
    """The fixed answer to a crisis of this kind, with the configured numbers."""
    emergency, line = _help(config)
    return (
        f"{HEARD[kind]} I am a computer program and cannot help with this, but a person can. If anybody is in danger now, please "
        f"call {emergency}. You can talk to somebody at any time of day: {line}. If there is a person near you whom you trust, "
        "tell them what you told me. You do not have to go through this alone."
    )


def reminder(config: SafetyConfig) -> str:
    """The line that stays on for the rest of a conversation in which `crisis` has fired once."""
    emergency, line = _help(config)
    return f"A person can help, this program cannot: {emergency}; {line}."


def check_reply(text: str) -> str | None:
    """Why the model's reply must not be shown ("diagnosis", "medication", "harm"; show WITHHELD instead); None = it may."""
    plain = normalise(text)
    return next((kind for kind in ("diagnosis", "medication", "harm") if next(matches(kind, plain), None)), None)


def _help(config: SafetyConfig) -> tuple[str, str]:
    line = config.crisis_line or "find a free, confidential crisis line for your country at findahelpline.com"
    return config.emergency_number or "your local emergency number", line


@functools.lru_cache(4096)
def _read(text: str) -> Crisis | None:
    plain = normalise(text)
    found = _first(plain)
    if crisis_hints.read(plain, found is not None) < crisis_hints.THRESHOLD:
        return None
    return found or Crisis("concern", ", ".join(crisis_hints.why(plain)))


def _first(plain: str) -> Crisis | None:
    return next((Crisis(kind, hit) for kind in KINDS for hit in matches(kind, plain)), None)


def measure(cases: Iterable[dict]) -> tuple[dict[str, tuple[int, int]], list[dict]]:
    """Labelled cases {"text", "class", "gate"} -> class -> (times fired, cases), and the cases that went wrong."""
    fired, total, wrong = Counter(), Counter(), []
    for case in cases:
        hit = crisis(case["text"]) is not None
        fired[case["class"]] += hit
        total[case["class"]] += 1
        wrong += [case] if hit != case["gate"] else []
    return {name: (fired[name], total[name]) for name in total}, wrong


if __name__ == "__main__":  # python -m therapy_jax.safety CASES.jsonl
    with open(sys.argv[1], encoding="utf-8") as file:
        table, wrong = measure(map(json.loads, file))
    for name, (hits, total) in sorted(table.items()):
        print(f"{name:14}{hits:5}/{total:<5}{hits / total:6.1%}")
    for case in wrong:
        print(f"{'missed' if case['gate'] else 'false alarm'} ({case['class']}): {case['text']}")
