"""Subtitles -> sentences: the traces that subtitling leaves in a line, each with the rule that removes it.

What stays is what was said. A rule that fires is counted by its name, so that a reader of the log sees what cleaning did.

>>> clean_line("(Sighs) : i don't know ♪")
"I don't know"
"""

import re
from collections import Counter

# Sounds and gestures in brackets: "(Sighs)", "( Speaks Dutch )", and "Laughs)" at the start of a line. Any other
# bracket is something that was said, "a)" too, unless it is all there is on the line.
_GESTURE = (
    "(?:sigh|laugh|chuckl|giggl|scoff|sniffl?|sob|cry|cri|weep|gasp|groan|exhal|inhal|cough|yawn|clear|mumbl|"
    "mutter|whisper|shout|yell|scream|speak|sing|hum|whistl|paus|nod|shrug|smil|ring|buzz|open|clos|knock)(?:e?s|ing)"
)
_STAGE = rf"(?:(?:\w+ )?{_GESTURE}(?: \w+){{0,2}}|both \w+|pause|silence|inaudible|indistinct|crosstalk|music)"
_RULES = (
    ("blanks at the ends removed", r"^\s+|\s+$", ""),
    ("runs of blanks joined", r"\s\s+|[^\S ]", " "),
    ("markup removed", r"</?(?i:i|b|u|em|strong|font|span|p|br)(?:\s+\w+=[^<>]*)?\s*/?>|\{\\[^{}]*\}", ""),
    ("music notes removed", "[♩♪♫♬]+", ""),
    ("stage direction removed", rf"^[(\[] ?[\w']+(?: [\w']+){{0,3}} ?[)\]]$|(?: ?[(\[]|^)(?i: ?{_STAGE}) ?[)\]]", ""),
    ("leading colon removed", r"^ ?: +(?=\w)", ""),
    ("full-width punctuation replaced", r"，\s*", ", "),
    ("full-width punctuation replaced", r"。\s*", ". "),
    ("vertical bar replaced", r" ?(?<![:;=|])\|+ ?", ", "),  # but ":|" is a face
    ("lone i capitalised", r"(?<!\w)(?<!\w\.)i(?![\w)]|\.\w)", "I"),  # but "i)" counts and "i.e." explains
)


def clean_line(text: str, counts: Counter[str] | None = None) -> str:
    """One English utterance without the traces of subtitling, or "" if it holds nothing else.

    Removes markup, stage directions, music notes, a leading ": " and needless blanks; writes full-width comma and stop
    and vertical bars in ASCII, and a lone "i" as "I". `counts` goes up by one for each kind of change made.
    """
    result, kinds = text, set[str]()
    for kind, pattern, replacement in _RULES:
        result, changes = re.subn(pattern, replacement, result)  # re caches the compiled pattern
        kinds |= {kind} if changes else set()
    if counts is not None:
        counts.update(kinds)
    result = " ".join(result.split())
    return "" if kinds and not re.search(r"\w", result) and result != text.strip() else result
