"""The parts of a page that needs no network and no script: tables, pictures, the strip of the loupe, one style sheet.

Whoever puts text from data or a model into a page passes it through one of these, or through `esc`.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape as esc
from pathlib import Path

LENSES = {  # Loupe -> (label, digits, what it is)
    "logprobs": ("log-prob", 2, "nats, of the policy that wrote the reply"),
    "ref_logprobs": ("reference", 2, "nats, of the frozen SFT policy"),
    "kl": ("KL", 3, "nats: log-prob less reference"),
    "rewards": ("reward", 3, "less beta times KL, and on the last token the score"),
    "values": ("value", 3, "the critic's guess before the token"),
    "advantages": ("advantage", 2, "what the update asks for: more of it, or less"),
    "ratio": ("ratio", 3, "new probability / old, after the update"),
}


def section(title: str, body: str) -> str:
    return f"<section><h2>{esc(title)}</h2>{body}</section>"


def table(rows: Sequence[Sequence[str]], text: bool = False) -> str:
    """Head and rows of plain text -> a table in a scroll box of its own; numbers to the right, `text` to the left."""

    def line(cells: Iterable[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{esc(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows[1:])
    kind = " class=text" if text else ""
    return f"<div class=scroll tabindex=0><table{kind}><thead>{line(rows[0], 'th')}</thead><tbody>{body}</tbody></table></div>"


def figure(
    name: str,
    pictures: Mapping[str, bytes],
    caption: str,
    folder: Path | None = None,
    columns: int = 3,
    wide: bool = False,
) -> str:
    """{theme: PNG} -> the picture of the reader's theme; with a folder, the light one also as figures/NAME.png."""
    if folder is not None:
        (folder / "figures").mkdir(exist_ok=True)
        (folder / "figures" / f"{name}.png").write_bytes(pictures["light"])
    uri = {theme: "data:image/png;base64," + base64.b64encode(png).decode() for theme, png in pictures.items()}
    dark = f'<source media="(prefers-color-scheme: dark)" srcset="{uri["dark"]}">' if "dark" in uri else ""
    style = f"--columns:{columns * (1.5 if wide else 1)}"
    image = f'<picture>{dark}<img src="{uri["light"]}" alt="{esc(caption)}" style="{style}"></picture>'
    box = f"<div class=scroll tabindex=0>{image}</div>"
    return f"<figure{'' if dark else ' class=paper'}>{box}<figcaption>{esc(caption)}</figcaption></figure>"


def decimals(x: float, digits: int) -> str:
    return f"{round(x, digits) + 0.0:.{digits}f}"  # + 0.0: no minus before nothing


# ----------------------------------------------------------------------------------------------------------- the loupe


def strip(words: Sequence[str], columns: Mapping[str, Sequence[float]], name: str) -> str:
    """Tokens and the columns of a Loupe -> a coloured strip. The lens in use is a radio button, the numbers of a token are
    its own child that shows on hover and on tap: no script. `name` must be the page's only one."""
    first = "advantages" if len(set(columns["advantages"])) > 1 else "kl"  # without a critic all have the same
    switch = "".join(
        f"<label><input type=radio name={name} value={key}{' checked' if key == first else ''}>{label}</label>"
        for key, (label, _, _) in LENSES.items()
    )
    ends = {key: max((abs(_signed(key, x)) for x in columns[key]), default=0.0) or 1.0 for key in LENSES}
    tokens = []
    for i, word in enumerate(words):
        tints = ";".join(f"--{key}:{tint(_signed(key, columns[key][i]) / ends[key])}" for key in LENSES)
        numbers = "".join(
            f"<span>{label} <b>{decimals(columns[key][i], n)}</b></span>" for key, (label, n, _) in LENSES.items()
        )
        tokens.append(f'<span class=t tabindex=0 style="{tints}">{visible(word)}<span class=n>{numbers}</span></span>')
    return (
        f"<div class=loupe><div class=lenses>{switch}</div><div class=strip>{''.join(tokens)}"
        "<div class=hint>Blue: above 0 (ratio: above 1). Orange: below. Hover over a token, or tap it.</div></div></div>"
    )


def loupe_table(words: Sequence[str], columns: Mapping[str, Sequence[float]]) -> str:
    """The same as rows, and the sums of what adds up."""
    rows = [["token", *(label for label, _, _ in LENSES.values())]]
    for i, word in enumerate(words):
        rows.append([word, *(decimals(columns[key][i], n) for key, (_, n, _) in LENSES.items())])
    sums = {key: sum(columns[key]) for key in ("logprobs", "ref_logprobs", "kl", "rewards")}
    rows.append(["sum", *(decimals(sums[key], n) if key in sums else "" for key, (_, n, _) in LENSES.items())])
    return table(rows)


def tint(x: float) -> str:
    """x in [-1, 1] -> a translucent colour, which works on a light and on a dark page."""
    colour = "0,114,178" if x >= 0 else "213,94,0"
    return f"rgba({colour},{min(abs(x), 1.0) * 0.6:.2f})"


def visible(word: str) -> str:
    return esc(word).replace("\n", "⏎") or "∅"


def _signed(key: str, x: float) -> float:
    return math.log(max(x, 1e-6)) if key == "ratio" else x


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""
CSS = """
:root { --page: #fff; --text: #1c1c1c; --quiet: #666; --line: #e2e2e2; --card: #f7f7f6; --alarm: #fdf3e7; --mark: #b25400; }
@media (prefers-color-scheme: dark) {
  :root { --page: #161616; --text: #e6e6e6; --quiet: #9a9a9a; --line: #333; --card: #1f1f1f; --alarm: #2b2115; --mark: #e8a25c; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 0 0 .75rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
h4 { font-size: .75rem; font-weight: 600; margin: 0 0 .2rem; color: var(--quiet); }
p { margin: 0 0 .75rem; max-width: 46rem; overflow-wrap: anywhere; }
ul { margin: 0; padding-left: 1.2rem; } li { overflow-wrap: anywhere; }
a { color: inherit; }
section { margin-top: 2.5rem; padding-top: 1.5rem; border-top: 1px solid var(--line); }
.quiet, figcaption, .hint { color: var(--quiet); font-size: .875rem; }
.alarm { border: 0; border-left: 4px solid var(--mark); background: var(--alarm); padding: 1rem 1.25rem; border-radius: 4px; }
.alarm h2 { color: var(--mark); }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 1rem 0 0; font-size: .9rem; }
.facts dt { color: var(--quiet); } .facts dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; margin: .25rem 0 .75rem; }
th, td { padding: .3rem .75rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--quiet); vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: pre; }
table.text td, table.text th { text-align: left; white-space: normal; } table.text td:last-child { min-width: 16rem; }
figure { margin: 0 0 1.5rem; } figure img { display: block; width: calc(var(--columns) * 21.8rem); max-width: 100%; height: auto; }
@media (max-width: 44rem) {
  main { padding: 1.25rem 1rem 3rem; }
  figure img { width: calc(var(--columns) * 16rem); max-width: none; }
}
figure.paper img { background: #fff; border-radius: 4px; }
details { margin: .5rem 0; } summary { cursor: pointer; color: var(--quiet); font-size: .875rem; }
pre { font-size: .8rem; line-height: 1.45; overflow-x: auto; background: var(--card); padding: 1rem; border-radius: 6px; }
article { background: var(--card); border-radius: 8px; padding: 1rem 1.25rem; margin: 0 0 1rem; }
article > :last-child { margin-bottom: 0; }
.client { border-left: 3px solid var(--line); padding-left: .75rem; font-size: 1rem; font-weight: 500; }
.replies { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .75rem 1.5rem; }
.replies p { margin: 0; font-size: .93rem; white-space: pre-line; }
.lenses { display: flex; flex-wrap: wrap; gap: .1rem 1rem; margin: .5rem 0; font-size: .85rem; }
.lenses label { display: inline-flex; align-items: center; gap: .3rem; white-space: nowrap; }
.lenses input { margin: 0; accent-color: #0072b2; }
.strip { position: relative; padding-bottom: 2.2rem; line-height: 2; overflow-wrap: anywhere; }
.t { white-space: pre-wrap; padding: .15rem .1rem; border-radius: 3px; cursor: default; background: var(--advantages); margin-right: 1px; }
.t:hover, .t:focus { outline: 2px solid var(--quiet); }
.n, .hint { position: absolute; left: 0; right: 0; bottom: 0; min-height: 1.9rem; line-height: 1.5; }
.n { display: none; flex-wrap: wrap; align-content: flex-start; gap: 0 1rem; background: var(--card); font-size: .85rem;
  font-variant-numeric: tabular-nums; z-index: 1; }
@media (max-width: 44rem) { .strip { padding-bottom: 5.2rem; } .n, .hint { min-height: 4.9rem; } }
.n b { font-weight: 600; }
.t:focus .n { display: flex; } .t:hover .n { display: flex; z-index: 2; }
""" + "\n".join(f".loupe:has(input[value={key}]:checked) .t {{ background: var(--{key}); }}" for key in LENSES)
