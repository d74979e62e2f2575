"""Care first: what stands between a person and the model, in code, before and after every reply.

    message -> normalise -> crisis?  yes: answer(kind), and the model is not asked
                                     no:  model -> check_reply?  yes: WITHHELD instead of the reply

Nothing here knows a language model, and nothing here can be switched off. `crisis` matches rules that can be read as they
are (crisis_rules.txt). It is a coarse net: what is only hinted at in words of the person's own slips through it often.

>>> crisis("Dying laughing at this video") is None
True
>>> crisis("dying laughing, but honestly i wanna d*e").kind
'suicide'
"""

from __future__ import annotations

import functools
import json
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from importlib.resources import files
from typing import NamedTuple

from therapy_jax.config import SafetyConfig

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
KINDS = {
    "suicide": "Thank you for telling me. What you wrote sounds as if your life, or somebody else's, may be in danger.",
    "self_harm": "Thank you for telling me. What you wrote sounds as if you, or somebody you know, may be getting hurt.",
    "abuse": "Thank you for telling me. What you wrote sounds as if somebody is being hurt. Nobody deserves that.",
    "danger": "Thank you for telling me. What you wrote sounds as if somebody may get hurt.",
}
WINDOW = 30  # words; the parts of a rule with & must stand that near to one another
LOOKALIKES = str.maketrans("аеорсхуікѕ", "aeopcxyiks")  # Cyrillic letters that look like Latin ones
LEET = str.maketrans("013457@$!|", "oieastasil")


class Crisis(NamedTuple):
    kind: str
    """suicide, self_harm, abuse or danger (to others)."""
    matched: str
    """The words that a rule matched, as `normalise` leaves them."""


class Rule(NamedTuple):
    kind: str
    parts: list[re.Pattern[str]]
    unless: list[re.Pattern[str]]


def crisis(text: str, earlier_client_turns: Sequence[str] = ()) -> Crisis | None:
    """What the client's message says or hints of suicide, self-harm, abuse or danger to others; None = nothing was found.

    Where an earlier turn of the conversation fired, a message that takes it back or denies it is met with the answer again,
    and so is a word or two right after it ("yes", "tonight"). A phrase that runs over from the turn before is read as one.
    """
    found = _read(text)
    if found or not earlier_client_turns:
        return found
    before = [past for turn in earlier_client_turns if (past := _read(turn))]
    plain = normalise(text)
    if before and (short := len(plain.split()) <= 3 and _read(earlier_client_turns[-1])):
        return short
    if before and (again := next(_matches("again", plain), None)):
        return Crisis(before[-1].kind, again.matched)
    if _read(earlier_client_turns[-1]):
        return None
    last = " ".join(normalise(earlier_client_turns[-1]).split()[-8:])
    return next((hit for kind in KINDS for hit in _matches(kind, f" {last}{plain}", single=True)), None)


def answer(kind: str, config: SafetyConfig) -> str:
    """The fixed answer to a crisis of this kind, with the configured numbers."""
    emergency, line = _help(config)
    return (
        f"{KINDS[kind]} I am a computer program and cannot help with this, but a person can. If anybody is in danger now, please "
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
    return next((kind for kind in ("diagnosis", "medication", "harm") if next(_matches(kind, plain), None)), None)


def _help(config: SafetyConfig) -> tuple[str, str]:
    line = config.crisis_line or "find a free, confidential crisis line for your country at findahelpline.com"
    return config.emergency_number or "your local emergency number", line


@functools.lru_cache(4096)
def _read(text: str) -> Crisis | None:
    plain = normalise(text)
    return next((hit for kind in KINDS for hit in _matches(kind, plain)), None)


def _matches(kind: str, plain: str, single: bool = False) -> Iterator[Crisis]:
    """Hits of one section's rules in normalised text; `single`: of the rules without & alone."""
    for idiom in rules()["idioms"]:
        plain = idiom.parts[0].sub("~ ", plain)
    words = plain.split()
    for start in range(0, max(len(words) - WINDOW // 2, 1), WINDOW // 2):
        window = f" {' '.join(words[start : start + WINDOW])} "
        for rule in rules()[kind]:
            if single and len(rule.parts) + len(rule.unless) > 1:
                continue
            found = [part.search(window) for part in rule.parts]
            if all(found) and not any(part.search(window) for part in rule.unless):
                yield Crisis(kind, " ... ".join(hit[0].strip() for hit in found if hit))


# --- text: undoing what hides a word


def normalise(text: str) -> str:
    """Text -> " plain lower case words ": zero-width and lookalike characters, stars and digits for letters, stretched and
    spaced-out letters, slang and common misspellings are undone."""
    text = unicodedata.normalize("NFKD", text).casefold().translate(LOOKALIKES)
    text = "".join(c for c in text if unicodedata.category(c) not in ("Cf", "Mn"))
    text = re.sub("[‘’ʼ`´]", "'", text)
    text = re.sub(r"(?<![a-z])[a-z]+[*#][a-z*#]*", _unmask, text)
    text = re.sub(r"(?<=[a-z])[013457@$!|]+(?=[a-z])", lambda found: found[0].translate(LEET), text)
    text = re.sub(r"\b(he|she|it|that|there|what|who|where)'s\b", r"\1 is", text)
    for short, long in (
        ("'ll", " will"),
        ("'d ", " would "),
        ("'m", " am"),
        ("'ve", " have"),
        ("'re", " are"),
        ("n' t", "nt"),
    ):
        text = text.replace(short, long)
    text = re.sub(r"'s\b|'", "", text)
    text = re.sub(r"(?<![a-z0-9])[a-z](?:[^a-z0-9\n]{1,2}[a-z]){2,}(?![a-z0-9])", _join, text)
    text = " " + " ".join(re.findall(r"[^\W_]+", text)) + " "
    text = re.sub(r"\S+", _unstretch, text)
    for pattern, plain in spelling():
        text = pattern.sub(plain, text)
    return text


def _unmask(found: re.Match[str]) -> str:
    """k*ll -> kill: the first sensitive word that fits."""
    mask = re.compile(re.sub(r"[*#]+", "[a-z]+", found[0]))
    return next(
        (word for word in " ".join(sections()["masked"]).split() if mask.fullmatch(word)), re.sub("[*#]", "", found[0])
    )


def _unstretch(found: re.Match[str]) -> str:
    """killll -> kill, diiie -> die: runs of three and more become two or one, whichever the rules know."""
    if not re.search(r"([a-z])\1\1", found[0]):
        return found[0]
    two, one = (re.sub(r"([a-z])\1\1+", r"\1" * n, found[0]) for n in (2, 1))
    return two if two in vocabulary() else one


def _join(found: re.Match[str]) -> str:
    """k m s -> kms, k i l l m e -> kill me: letters typed apart."""
    letters = re.sub(r"[^a-z]", "", found[0])
    split: list[list[str] | None] = [[]]  # [n]: the first n letters as the fewest words
    for end in range(1, len(letters) + 1):
        ways = [
            [*before, letters[start:end]]
            for start in range(max(0, end - 15), end)
            if (before := split[start]) is not None and letters[start:end] in vocabulary()
        ]
        split.append(min(ways, key=len, default=None))
    return f" {' '.join(split[-1] or [letters])} "


# --- rules: crisis_rules.txt as regular expressions, read once at the first message


@functools.cache
def sections() -> dict[str, list[str]]:
    text = (files("therapy_jax") / "crisis_rules.txt").read_text(encoding="utf-8")
    text = re.sub(r"\n +", " ", re.sub(r"\|\n +", "|", text))
    parts = re.split(r"^\[(\w+)\]\n", text, flags=re.MULTILINE)
    return {
        name: [line for line in body.splitlines() if line and not line.startswith("#")]
        for name, body in zip(parts[1::2], parts[2::2], strict=True)
    }


@functools.cache
def spelling() -> list[tuple[re.Pattern[str], str]]:
    return [
        (re.compile(f"(?<= )(?:{key})(?= )"), plain) for key, plain in (s.split(" = ") for s in sections()["spelling"])
    ]


@functools.cache
def vocabulary() -> frozenset[str]:
    """Every plain word that a rule spells."""
    lines = [line for name in ("words", "spelling", "masked", *KINDS) for line in sections()[name]]
    return frozenset(re.findall("[a-z]{2,}", " ".join(lines).replace("_", " "))) | {"i", "a"}


@functools.cache
def rules() -> dict[str, list[Rule]]:
    names: dict[str, str] = {}
    for line in sections()["words"]:
        name, entries = line.split(": ")
        names[name] = f"(?:{'|'.join(_plain(entry, names) for entry in entries.split())})"
    return {
        kind: [_rule(kind, line, names) for line in sections()[kind]]
        for kind in ("idioms", "again", "diagnosis", "medication", "harm", *KINDS)
    }


def _rule(kind: str, line: str, names: dict[str, str]) -> Rule:
    parts = line.split(" & ")
    compiled = [
        re.compile("(?<= )" + "".join(_token(t, names) for t in part.removeprefix("!").split())) for part in parts
    ]
    pairs = list(zip(parts, compiled, strict=True))
    return Rule(kind, [p for part, p in pairs if part[0] != "!"], [p for part, p in pairs if part[0] == "!"])


def _token(token: str, names: dict[str, str]) -> str:
    """One token of a pattern -> a regular expression that ends after a blank."""
    if token in ("..", "..."):
        return rf"(?:\S+ ){{0,{3 if token == '..' else 8}}}"
    options = "|".join(
        "$" if option == "END" else f"{_plain(option, names)} " for option in token.strip("!?").split("|")
    )
    if token.startswith("!"):
        return rf"(?!(?:\S+ ){{0,2}}(?:{options}))"
    return f"(?:{options}){'?' if token.endswith('?') else ''}"


def _plain(entry: str, names: dict[str, str]) -> str:
    return re.sub("[A-Z]{2,}", lambda found: names[found[0]], entry.replace("_", " ").replace("*", r"\w*"))


# --- figures


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
