"""Reading a message by the rules of crisis_rules.txt: first what hides a word is undone, then the rules are matched.

    text -> normalise -> words -> idioms taken out -> windows of 30 words -> the rules of one section

>>> normalise("Fine, I wanna k*ll myyyself")
' fine i want to kill myself '
>>> next(matches("suicide", normalise("honestly: better off without me")))
'better off without ... me'
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterator
from importlib.resources import files
from typing import NamedTuple

KINDS = ("suicide", "self_harm", "abuse", "danger")
WINDOW = 30  # words; the parts of a rule with & must stand that near to one another
LOOKALIKES = str.maketrans("аеорсхуікѕ", "aeopcxyiks")  # Cyrillic letters that look like Latin ones
LEET = str.maketrans("013457@$!|", "oieastasil")


class Rule(NamedTuple):
    kind: str
    parts: list[re.Pattern[str]]
    unless: list[re.Pattern[str]]


def matches(kind: str, plain: str, single: bool = False) -> Iterator[str]:
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
                yield " ... ".join(hit[0].strip() for hit in found if hit)


def normalise(text: str) -> str:
    """Text -> " plain lower case words ": zero-width and lookalike characters, stars and digits for letters, stretched and
    spaced-out letters, slang and common misspellings are undone."""
    text = unicodedata.normalize("NFKD", text).casefold().translate(LOOKALIKES)
    text = "".join(c for c in text if unicodedata.category(c) not in ("Cf", "Mn"))
    text = re.sub("[‘’ʼ`´]", "'", text)
    text = re.sub(r"(?<![a-z])[a-z]+[*#][a-z*#]*", _unmask, text)
    text = re.sub(r"(?<=[a-z])[013457@$!|]+(?=[a-z])", lambda found: found[0].translate(LEET), text)
    text = re.sub(r"\b(he|she|it|that|there|what|who|where)'s\b", r"\1 is", text)
    for short, long in (("ll", "will"), ("d", "would"), ("m", "am"), ("ve", "have"), ("re", "are")):
        text = re.sub(rf"'{short}\b", f" {long}", text)
    text = text.replace("n' t", "nt")
    text = re.sub(r"'s\b|'", "", text)
    text = re.sub(r"(?<![a-z0-9])[a-z](?:[^a-z0-9\n]{1,2}[a-z]){2,}(?![a-z0-9])", _join, text)
    text = " " + " ".join(re.findall(r"[^\W_]+", text)) + " "
    if re.search(r"([a-z])\1\1", text):
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
