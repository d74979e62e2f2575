"""The report: one page that needs nothing else, on which no text of a client or a model can do anything."""

import base64
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from therapy_jax import logs, page, plots, report, results_table
from therapy_jax.config import Config
from therapy_jax.files import write_json

ROOT = Path(__file__).parent.parent
EVIL = """<script>alert(1)</script> & "quotes" 'single' <img src=x onerror=alert(2)> [bold red]rich[/] **md** </section> $x_1$"""
VOID = {"meta", "img", "input", "source"}
TAGS = VOID | set(
    "html head title style body main header section article figure figcaption picture div span p h1 h2 h3 h4 dl dt dd ul "
    "li b a code pre table thead tbody tr th td details summary label".split()
)


class Page(HTMLParser):
    """The page as a browser reads it: tags balanced, attributes, and all text."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        assert tag in TAGS, f"<{tag}> does not belong here"
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)


def check_self_contained(html: str) -> Page:
    page = Page(html)
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), f"<{tag} {name}>"
        if name in ("src", "srcset"):
            assert value.startswith("data:image/png;base64,"), f"<{tag} {name}={value[:60]}>"
            assert base64.b64decode(value.split(",")[1]).startswith(b"\x89PNG\r\n")
        if name == "href":
            assert not re.match(r"[a-z]+:|//", value), f"<a href={value}>"
        if name == "style":
            assert "url" not in value
    assert "default-src 'none'" in html and "://" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", html)
    return page


def ppo_line(step: int, **more) -> dict:
    line = {"stage": "ppo", "step": step, "score": 0.1 * step, "kl": 0.5 * step, "kl_k3": 0.4 * step, "kl_coef": 0.05,
            "reply_tokens": 9.0, "stop_rate": 0.9, "entropy": 2.0, "reward/rouge_l": 0.2, "weighted/rouge_l": 0.4,
            "share/rouge_l": 1.0, "reward/warmth <b>": 0.3, "weighted/warmth <b>": -0.1}  # fmt: skip
    return line | more


def loupe_json(tokens: list[str], **more) -> dict:
    columns = {key: [0.1 * i - 0.2 for i in range(len(tokens))] for key in page.LENSES}
    columns["ratio"] = [1.0 + 0.1 * i for i in range(len(tokens))]
    reply = {"client": EVIL, "therapist": EVIL, "tokens": tokens, "score": 0.7, "terms": {"<u>": 0.5}, **columns}
    return {"stage": "ppo", "estimator": "gae", "kl_coef": 0.05, "clip": 0.2, "learning_rate": 1e-4, "steps": 2, "batch": 4,
            "clip_fraction": 0.0, "weights": {"<u>": 2.0}, "replies": [reply], **more}  # fmt: skip


def results_json() -> dict:
    row = {"reward": 0.25, "bleu": 0.0123, "rougeL": 0.1234, "emotion_stated_accuracy": 0.5, "stop_rate": 1.0}
    return {
        "data": {"name": "mesc", "split": "test", "n": 3},
        "signature": f"tok {EVIL}",
        "reward_weights": {"rouge_l": 2.0},
        "systems": {"sft": row, "constant": {**row, "rougeL": 0.2}},
        "comparisons": {"sft - constant": {"rougeL": [0.01, -0.02, 0.03]}},
        "emotion_majority_accuracy": 0.4,
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run folder with everything in it, and markup wherever text can be."""
    folder = tmp_path_factory.mktemp("runs") / "a <b>&amp; run"
    folder.mkdir()
    losses = [
        {"stage": s, "step": k, "loss": 3.0 / k, "validation_loss": 4.0} for s in ("base", "sft") for k in (1, 2, 3)
    ]
    start = {"stage": "ppo", "step": 0, "validation/reward": 0.1, "validation/reward/rouge_l": 0.1}
    lines = [*losses, start, ppo_line(1), ppo_line(2, alarm=EVIL, **{"validation/reward": 0.3})]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"stage": "ppo", "st')
    sample = {"stage": "ppo", "client": EVIL, "reply": EVIL, "emotion": None, "therapist": EVIL}
    (folder / "samples.jsonl").write_text("".join(json.dumps({**sample, "step": k}) + "\n" for k in (0, 2)))
    answer = {"client": EVIL, "therapist": EVIL, "base": EVIL, "sft": EVIL, "ppo": EVIL, "retrieval": "not shown"}
    answers = [{"context": [{"speaker": "client", "text": EVIL}], **answer, "sft": f"reply {i}"} for i in range(45)]
    write_json(folder / "answers.json", answers)
    write_json(folder / "results.json", results_json())
    write_json(folder / "loupe.json", loupe_json(["<script>", " a\n", "&", "", "\ufffd"]))
    write_json(folder / "environment.json", {"ppo": {"commit": EVIL, "seconds": 61.0, "devices": EVIL, "cores": 2}})
    (folder / "config.yaml").write_text(f"run_dir: {EVIL}\n")
    report.write_report(folder, dataclasses.replace(Config(), run_dir=str(folder)))
    return folder


def test_markup_in_any_text_stays_text(whole):
    html = (whole / "report.html").read_text(encoding="utf-8")
    page = check_self_contained(html)
    said = "".join(page.text)
    assert said.count(EVIL) >= 20 * 5, "each of the twenty conversations shows its texts as they are"
    assert "<script" not in html and "onerror" not in re.sub(r"&lt;img src=x onerror", "", html)
    assert said.count("a <b>&amp; run") >= 2  # title and heading
    assert "not shown" not in said and "warmth <b>" in said


def test_it_shows_twenty_of_the_answers_spread_over_all(whole):
    said = "".join(check_self_contained((whole / "report.html").read_text()).text)
    shown = [int(n) for n in re.findall(r"reply (\d+)", said)]
    assert len(shown) == 20 and shown[0] == 0 and shown[-1] >= 42 and len(set(shown)) == 20
    assert "20 of 45" in said


def test_numbers_are_those_of_the_files(whole):
    html = (whole / "report.html").read_text()
    rows = re.findall(r"<tr>(.*?)</tr>", html)
    cells = [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in rows]
    assert ["ROUGE-L", "0.1234", "0.2000", "0.1317"] in cells, "and the paper's figure, since this is its data"
    assert ["rouge_l", "2", "0.200", "0.200", "0.400", "0.400", "1.000"] in cells
    assert ["&lt;script&gt;", "-0.20", "-0.20", "-0.200", "-0.200", "-0.200", "-0.20", "1.000"] in cells
    assert ["sum", "0.00", "0.00", "0.000", "0.000", "", "", ""] in cells
    assert results_table.rows(results_json())[0] == ["", "sft", "constant", "paper"]
    assert "Not here" not in html


def test_pictures_stand_beside_it(whole):
    names = {path.name for path in (whole / "figures").iterdir()}
    assert names == {"losses.png", "ppo.png", "terms.png", "weighted.png"}
    html = (whole / "report.html").read_text()
    for name in names:
        assert base64.b64encode((whole / "figures" / name).read_bytes()).decode() in html


def test_a_line_has_the_logged_points():
    records = [{"step": 1, "x": 2.0}, {"step": 2}, {"step": 3, "x": 5, "alarm": "text"}]
    assert report.lines(records, {"a": "x", "b": "nowhere", "c": "alarm"}) == {"a": ([1, 3], [2.0, 5])}
    light, dark = plots.draw(1, 1, [plots.panel("t", {"a": ([1, 3], [2.0, 5.0])}, "step")]).values()
    assert light.startswith(b"\x89PNG") and dark.startswith(b"\x89PNG") and light != dark


@pytest.mark.parametrize("present", [(), ("answers.json",), ("metrics.jsonl", "config.yaml")])
def test_what_is_missing_is_said(present, whole, tmp_path):
    for name in present:
        (tmp_path / name).write_bytes((whole / name).read_bytes())
    page = check_self_contained(report.write_report(tmp_path, Config()).read_text())
    lacking = "".join(page.text).split("Not here")[1].split("How it was made")[0]
    assert {name for name in report.MISSING if name in lacking} == set(report.MISSING) - set(present)


def test_no_report_where_none_is_wanted(tmp_path, capsys):
    report.finish(dataclasses.replace(Config(), run_dir=str(tmp_path), report=False))
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().out


def test_a_report_that_fails_says_so_and_loses_nothing(tmp_path, capsys):
    (tmp_path / "results.json").write_text("{")
    report.finish(dataclasses.replace(Config(), run_dir=str(tmp_path)))
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "report.html could not be written (ConfigError" in said
        and "results.json: not valid JSON" in said
        and "the run itself is whole" in said
    )
    assert (tmp_path / "results.json").read_text() == "{"


def test_numbers_that_left_the_numbers_and_files_of_others(tmp_path):
    """What one looks at a report for: a loss that became infinite, a log that was cut within a letter, a folder without settings."""
    lines = [{"stage": "sft", "step": 1, "loss": math.inf}, {"stage": "ppo", "step": "<b>9</b>", "alarm": "x"}]
    log = (
        "".join(json.dumps(line) + "\n" for line in lines).encode() + '{"stage": "ppo", "text": "it\u2019'.encode()[:-1]
    )
    (tmp_path / "metrics.jsonl").write_bytes(log)
    assert [line["step"] for line in logs.read_log(tmp_path / "metrics.jsonl")] == [1, "<b>9</b>"]
    html = report.write_report(tmp_path, Config()).read_text()
    assert "<b>9</b>" not in html and "&lt;b&gt;9" in html
    assert "built-in sample" not in html and "width 128" not in html, "the settings of whoever looks are not the run's"
    assert f"<h1>{tmp_path.name}</h1>" in html


def test_tints_are_the_sign_and_the_size():
    assert page.tint(1.0) == "rgba(0,114,178,0.60)" and page.tint(-0.5) == "rgba(213,94,0,0.30)"
    html = page.strip(["a", "b"], {key: [0.0, 0.0] for key in page.LENSES} | {"ratio": [1.0, 0.5]}, "lens")
    Page(html)
    assert "value=kl checked" in html, "advantages that are all the same would show nothing"
    assert "--ratio:rgba(0,114,178,0.00)" in html and "--ratio:rgba(213,94,0,0.60)" in html


def test_the_script_answers_help_without_jax_and_names_a_folder_that_is_not_there(tmp_path):
    code = "import sys, runpy; sys.argv = ['x', '--help']\n"
    code += "try: runpy.run_path('scripts/report.py', run_name='__main__')\nexcept SystemExit: pass\n"
    code += "assert 'jax' not in sys.modules and 'matplotlib' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "report.html" in done.stdout, done.stderr
    args = [sys.executable, "scripts/report.py", "--run_dir", str(tmp_path / "no")]
    done = subprocess.run(
        args, cwd=ROOT, capture_output=True, text=True, timeout=120, env={**os.environ, "COLUMNS": "200"}
    )
    assert done.returncode == 2 and "there is no such folder" in done.stdout and "Traceback" not in done.stderr
