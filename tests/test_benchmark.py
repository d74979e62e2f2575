"""The benchmark's own arithmetic, worked by hand, and that it refuses to time what does not agree."""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import benchmark  # noqa: E402
import benchmark_agree  # noqa: E402
import benchmark_measure  # noqa: E402
import benchmark_report  # noqa: E402
import benchmark_rows  # noqa: E402
import benchmark_sides  # noqa: E402
from benchmark_rows import Shapes, Size  # noqa: E402

from therapy_jax import flops, head  # noqa: E402

SMALL = Size(layers=1, width=2, heads=1, vocabulary=10)  # a block's matrices hold 12 * 2 * 2 = 48 weights


@pytest.mark.parametrize(
    ("arguments", "by_hand"),
    [
        # 5 tokens, 7 pairs, 3 predictions: 2 * 48 * 5 + 4 * 2 * 7 + 2 * 10 * 2 * 3
        ((5, 7, 3), 480 + 56 + 120),
        ((1, 0, 0), 96),
        ((0, 1, 0), 8),
        ((0, 0, 1), 40),
    ],
)
def test_forward_flops_by_hand(arguments, by_hand):
    assert benchmark_rows.forward_flops(SMALL, *arguments) == by_hand


def test_what_nobody_reads_is_not_counted():
    # Of 5 tokens 2 are wanted: keys and values 2 * 8 * 5, the other 40 weights 2 * 40 * 2, pairs 8 * 7 * 2 / 5, 1 prediction.
    assert benchmark_rows.forward_flops(SMALL, 5, 7, 1, 2) == pytest.approx(80 + 160 + 22.4 + 40)
    deep = SMALL._replace(layers=3)  # two more blocks, with all of it
    assert benchmark_rows.forward_flops(deep, 5, 7, 1, 2) == pytest.approx(302.4 + 2 * (480 + 56))
    assert benchmark_rows.forward_flops(deep, 5, 7, 1, 5) == benchmark_rows.forward_flops(deep, 5, 7, 1)


def test_training_flops_are_the_usual_formula():
    # 2 sequences of 3: 6 tokens, 18 pairs, 6 predictions: 3 * (576 + 144 + 240)
    assert benchmark_rows.training_flops(SMALL, 2, 3) == 2880
    b, t, (l, d, _, v) = 8, 128, (12, 768, 12, 50_257)
    usual = 6 * (12 * l * d**2 + v * d) * b * t + 12 * l * t * d * b * t
    assert benchmark_rows.training_flops(benchmark_rows.SIZES["gpt2"], b, t) == usual


def test_generation_flops_by_hand():
    # Prompt of 2, then 3 new tokens. The first comes from the prompt's end: keys and values of 2 tokens (2 * 8 * 2), the rest of
    # one (2 * 40), which sees 2 places (8 * 2), a prediction (40): 168. Two more go through the block, with 3 and 4 places:
    # 2 * 48 * 2 + 8 * 7 + 40 * 2 = 328.
    assert benchmark_rows.generation_flops(SMALL, 1, 2, 3) == 168 + 328
    assert benchmark_rows.generation_flops(SMALL, 5, 2, 3) == 5 * (168 + 328)


def test_ppo_flops_by_hand():
    # Forward of 5 tokens, of which 3 are wanted, with 15 pairs and 3 predictions: 80 + 240 + 120 + 120 = 560; the critic has
    # no head: 440.
    assert benchmark_rows.ppo_flops(SMALL, 1, 2, 3, 2, False) == 496 + 560 + 2 * 3 * 560
    assert benchmark_rows.ppo_flops(SMALL, 1, 2, 3, 2, True) == 496 + 1000 + 2 * 3 * 1000


def test_products_are_what_the_flops_count_without_attention():
    # One block: 48 weights a token, 10 * 2 for each prediction; of attention's pairs (8 each) nothing.
    assert sum(p.flops for p in flops.forward_products(SMALL, 5, 3)) == 480 + 120
    assert flops.forward_products(SMALL, 5, 0) == [p for p in flops.forward_products(SMALL, 5, 3) if p.out != 10]
    many = flops.forward_products(SMALL, 2000, 1280)[-1]  # logits of at most 512 tokens at a time
    assert many == (512, 2, 10, 2.5) and flops.HEAD_ROWS == head.CHUNK
    (b, p, r), pairs = (4, 2, 3), 8
    assert sum(x.flops for x in flops.training_products(SMALL, 6, 6)) == 2880 - 3 * 18 * pairs
    assert sum(x.flops for x in flops.generation_products(SMALL, b, p, r)) == b * (496 - 9 * pairs)
    for separate, reading in ((False, 15), (True, 30)):
        whole = flops.ppo_flops(SMALL, b, p, r, 2, separate)
        found = sum(x.flops for x in flops.ppo_products(SMALL, b, p, r, 2, 2, separate))
        assert found == whole - b * (9 + 7 * reading) * pairs
    # What a gradient multiplies: [tokens, out] by [out, inner], and [inner, tokens] by [tokens, out].
    assert {(5, 2, 8), (5, 8, 2), (2, 5, 8)} <= {x[:3] for x in flops.training_products(SMALL, 5, 3)}


def test_products_alone_are_added_up(monkeypatch):
    (row,) = benchmark_rows.make_rows(["long"], ["nano"], {"nano": SMALL}, {"nano": benchmark_rows.TINY[1]}, False)
    products = [flops.Product(2, 3, 4, 5.0), flops.Product(7, 3, 4, 1.0), flops.Product(2, 3, 4, 1.0)]
    asked = []

    class Fake(benchmark_sides.Settings):
        @contextlib.contextmanager
        def worker(self, script, row=""):
            yield lambda question: asked.append(tuple(question["shape"])) or {"flops": 12.0}

    settings = Fake(None, "", 1, 1, 0.0, {})  # pyright: ignore[reportArgumentType]
    # 6 times 2 * 2 * 3 * 4 and once 2 * 7 * 3 * 4 FLOP, at 12 a second; each size is timed once
    assert benchmark_measure.time_products(row._replace(products=products), settings, "x") == 6 * 4 + 14
    assert asked == [(2, 3, 4), (7, 3, 4)]


def test_ratio_is_the_median_of_pairs():
    # 4/2, 6/2, 2/4
    assert benchmark_report.ratio_and_spread([2, 2, 4], [4, 6, 2]) == (2.0, 0.5, 3.0)


def test_baseline_fails_below_60_percent_of_what_was_kept():
    kept = {"a": 2.0, "b": 2.0, "gone": 9.0}
    compared = benchmark_report.against_baseline({"a": 1.2, "b": 1.19, "new": 0.01}, kept)
    assert compared == [("a", 1.2, 2.0, True), ("b", 1.19, 2.0, False), ("new", 0.01, None, True)]


def test_what_does_not_agree_is_seen():
    grad = {"grad/a": np.ones(3), "grad/b": np.zeros(1)}
    same = {"losses": np.ones(2), **grad, "change/a": np.ones(3)}

    def agrees(theirs):
        return [c.agrees for c in benchmark_agree.compare("row", "sft", "float32", same, theirs)]

    assert agrees(same) == [True, True, True]
    assert agrees({**same, "losses": np.asarray([1.0, 1.001])}) == [False, True, True]
    assert agrees({**same, "losses": np.asarray([1.0, np.nan])}) == [False, True, True]
    assert agrees({**same, "losses": np.ones(3)}) == [False, True, True]
    assert agrees({**same, "grad/a": np.asarray([1.0, 1.0, 1.01])}) == [True, False, True]
    assert agrees({**same, "change/a": np.asarray([1.0, 1.0, 1.001])}) == [True, True, False]
    lacking = {name: x for name, x in same.items() if name != "grad/b"}  # a tensor that one side lacks
    assert agrees(lacking) == [True, False, True]
    replies = np.zeros((10, 4), int)
    other = replies.copy()
    other[:2, 3] = 1
    assert benchmark_agree.differing_replies(replies, other) == 0.2

    def greedy(theirs, tie):
        found = {"tokens": theirs, "tie": np.asarray(tie)}
        return [c.agrees for c in benchmark_agree.compare("row", "generate", "float32", {"tokens": replies}, found)]

    one = replies.copy()
    one[0, 2:] = 1
    assert greedy(one, [9e-5] + [0.0] * 9) == [True, True], "a tie but for rounding"
    assert greedy(one, [2e-4] + [0.0] * 9) == [True, False], "another token was likelier"
    assert greedy(one, [np.nan] + [0.0] * 9) == [True, False]
    assert greedy(other, [0.0] * 10) == [False, True]


def test_batches_are_the_same_each_time_and_supervised_as_said():
    shape = Shapes(sft=(3, 5), generate=(2, 4, 3), ppo=(2, 4, 3, 1, 1), memory=(1, 6), rewards=(4, 8), long=(2, 7))
    for name in ("sft", "replies", "long", "memory", "generate", "ppo", "rewards"):
        one, two = (benchmark_rows.make_batch(name, SMALL, shape) for _ in range(2))
        assert all(np.array_equal(one[key], two[key]) for key in one)
    batch = benchmark_rows.make_batch("sft", SMALL, shape)
    assert batch["loss_mask"].tolist() == [[False, True, True, True, True]] * 3
    rows = {
        row.name: row for row in benchmark_rows.make_rows(["sft"], ["nano"], {"nano": SMALL}, {"nano": shape}, False)
    }
    (on_replies,) = [row for row in rows.values() if row.task["batch"] == "replies"]
    # A quarter of 5 tokens is 1: 15 tokens, 75 pairs, 3 predictions, and 3 times the forward pass.
    assert on_replies.useful == 3 and on_replies.flops[0] == 3 * (96 * 15 + 8 * 75 + 40 * 3)
    assert benchmark_rows.make_batch("replies", SMALL, shape)["loss_mask"].tolist() == [[False] * 4 + [True]] * 3
    assert {row.useful for row in rows.values() if row is not on_replies} == {3 * 4} and len(rows) == 4
    (row,) = benchmark_rows.make_rows(["long"], ["nano"], {"nano": SMALL}, {"nano": shape}, False)
    assert row.useful == 2 * 6 and row.task["batch"] == "long" and "2x7, bfloat16" in row.name


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--what", "sft,fly"], "unknown: fly; there are sft"),
        (["--model", "gpt3"], "unknown: gpt3"),
        (["--what", "ppo", "--compare", "torch"], "add it to --compare"),
        (["--write_baseline"], "--quick"),
        (["--repeats", "0"], "--repeats"),
        (["--seconds", "nan"], "--seconds"),
        (["--model", ""], "names none; there are nano, gpt2"),
        (["--threads", "4096"], "--threads 4096"),
        (["--out", "bench.png"], "must be a .json file"),
        (["--out", "nowhere/bench.json"], "in a folder that is there"),
        (["--quick", "--repeats", "9"], "--quick has its own --repeats"),
        (["--scaling", "--model", "nano,gpt2"], "one --model"),
        (["--what", "agree,startup"], "nothing to agree with"),
        (["--what", "rewards", "--only", "no such row"], "no row's name holds"),
        (["--what", "conversations", "--conversations", "MESC.csv"], "FORMAT:FILE"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, named, capsys):
    with pytest.raises(SystemExit) as stop:
        sys.exit(benchmark.main(arguments))
    assert stop.value.code == 2
    said = "".join(capsys.readouterr()).replace("\n", " ")
    assert named in said and "Traceback" not in said


def test_a_side_is_warm_once_it_gets_no_faster():
    seconds = iter([9.0, 4.0, 3.0, 2.9, 1.0])
    assert benchmark_measure.warm_up(lambda question: {"seconds": next(seconds)}) == 2.9


def test_the_fastest_of_each_side_is_told_by_manner():
    rows = [
        {"name": "sft, a", "work": "sft", "measure": "seconds", "ratio": 1, "sides": sides, "seconds": seconds}
        for sides, seconds in (
            (("f32", "eager"), (1.0, 3.0)),
            (("f32", "compiled"), (2.0, 2.0)),
            (("bf16", "cast"), (1.8, 1.7)),
        )
    ]
    (said,) = benchmark_report.best_of(rows)  # f32 was timed twice: what counts is its median, not its luck
    assert "ours f32, 1.5 s; of theirs cast, 1.7 s: ratio 1.13" in said


def test_what_is_asked_for():
    assert benchmark.parse([]).what == list(benchmark.WORKS)
    assert benchmark.parse(["--compare", "torch"]).what == [
        "sft", "conversations", "generate", "rewards", "startup", "memory",
    ]  # fmt: skip
    assert benchmark.parse(["--scaling"]).what == []
    assert benchmark.parse(["--what", "long"]).what == ["long"]  # only where it is named: a CPU takes minutes a step
    quick, agree = benchmark.parse(["--quick"]), benchmark.parse(["--what", "agree"])
    assert quick.what == agree.what == ["sft", "generate", "ppo", "rewards"]
    assert quick.timed and not agree.timed


STUB = """
import json, sys, time
from pathlib import Path
run_dir, cache = (Path(sys.argv[sys.argv.index(name) + 1]) for name in ("--run_dir", "--compilation_cache"))
(run_dir / "ppo").mkdir(parents=True)  # fails where an earlier start has left its own
log = run_dir / "metrics.jsonl"
assert not log.exists() or '"ppo"' not in log.read_text()
time.sleep(0.1 if cache.exists() else 3.0)
cache.mkdir(exist_ok=True)
with log.open("a") as file:
    file.write(json.dumps({"stage": "ppo", "step": 1}) + "\\n")
time.sleep(60)  # the rest of the run, which nobody waits for
"""


def test_startup_counts_an_empty_and_a_filled_cache(tmp_path, monkeypatch):
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    (scripts / "train_sft.py").write_text("")
    (scripts / "train_ppo.py").write_text(STUB)
    monkeypatch.setattr(benchmark_measure, "ROOT", tmp_path)
    settings = benchmark_sides.Settings(tmp_path, sys.executable, 1, 2, 0.0, {})
    row = benchmark_measure.measure_startup(settings)
    assert row["sides"] == ["filled cache", "empty cache"]
    filled, empty = row["all_seconds"]
    assert len(filled) == len(empty) == 2 and all(a < b for a, b in zip(filled, empty, strict=True))
    assert row["ratio"] > 1

    (scripts / "train_ppo.py").write_text("raise SystemExit(3)")
    with pytest.raises(benchmark_sides.BenchmarkError, match=r"code 3 before its first iteration"):
        benchmark_measure.measure_startup(settings)


def test_startup_flags_are_knobs():
    from therapy_jax import config

    flags = [part for name, value in benchmark_measure.STARTUP.items() for part in (f"--{name}", str(value))]
    assert config.parse(["--config", str(ROOT / "configs" / "quickstart.yaml"), *flags]).ppo.iterations == 4


def test_the_baseline_is_written_and_judged_by(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "ROOT", tmp_path)
    monkeypatch.setattr(benchmark, "BASELINE", tmp_path / "data" / "kept.json")
    made_on = {"cpu": "c", "cores": 2, "threads": 2, "commit": "x", "date": "d"}

    def judge(ratio, *flags, ours=(1.0, 1.0), theirs=None):
        options = benchmark.parse(["--quick", *flags])
        row = {"name": "a", "ratio": ratio, "all_seconds": (ours, theirs or (ratio, ratio))}
        return benchmark.judge_quick(options, [row, {"name": "b"}], made_on)

    with pytest.raises(benchmark_sides.BenchmarkError, match="not there"):
        judge(0.1)
    benchmark.BASELINE.parent.mkdir()
    assert judge(2.0, "--write_baseline")
    assert json.loads(benchmark.BASELINE.read_text())["ratios"] == {"a": 2.0}
    benchmark.files.write_json(benchmark.BASELINE, {"made_on": {}, "ratios": {"a": 1.0, "gone": 3.0}})
    assert not judge(2.0) and "MISSING gone" in capsys.readouterr().out, "a kept row that is not measured any more"
    assert judge(2.0, "--only", "a"), "nobody asked for the other one"
    assert judge(2.0, "--write_baseline", "--only", "a")
    assert json.loads(benchmark.BASELINE.read_text())["ratios"] == {"a": 2.0, "gone": 3.0}
    assert judge(2.0, "--write_baseline")
    assert judge(1.21) and not judge(1.19)
    assert judge(0.9, ours=(1.0, 3.0), theirs=(1.21, 1.3)), "what slowed us once is no change of ours"
    assert not judge(2.0, ours=(1.0, 1.1), theirs=(1.19, 9.0)), "what slowed them once hides no change of ours"
    assert "by the least times 1.19; kept 2.00, 60% of it" in capsys.readouterr().out


def test_pictures_of_rows_and_of_scaling(tmp_path):
    results = [{"name": "a", "ratio": 2.0, "spread": (1.5, 2.5)}, {"name": "b"}]
    points = [
        {"work": work, "axis": axis, "value": n, "seconds": n / 10, "peak_bytes": None if axis == "length" else n * 2**20}
        for work in benchmark_measure.SCALED for axis in ("batch", "length") for n in (2, 4)
    ]  # fmt: skip
    benchmark_report.plot_ratios(results, tmp_path / "ratios.png")
    benchmark_report.plot_scaling(points, tmp_path / "scaling.png")
    assert all((tmp_path / f"{name}.png").stat().st_size > 1000 for name in ("ratios", "scaling"))


def run(*arguments: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "XLA_FLAGS": "", "COLUMNS": "200"}
    command = [sys.executable, "scripts/benchmark.py", "--sizes", "tiny", "--threads", "1", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1200)


def test_a_python_without_torch_is_named(tmp_path):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nexec '{sys.executable}' -S \"$@\"\n")  # no site-packages
    python.chmod(0o755)
    done = run("--what", "sft", "--torch_python", str(python), "--out", str(tmp_path / "bench.json"))
    assert done.returncode == 2 and "Traceback" not in done.stdout + done.stderr
    assert "is not installed in this Python" in done.stdout or "No module named" in done.stdout


@pytest.mark.slow
def test_both_sides_agree_and_the_agreeing_ones_are_timed(tmp_path):
    pytest.importorskip("torch")
    works = ["sft", "generate", "rewards"] + ["ppo"] * bool(importlib.util.find_spec("trl"))
    peers = "torch,trl" if "ppo" in works else "torch"
    out = tmp_path / "bench.json"
    done = run("--quick", "--what", ",".join(["agree", *works]), "--compare", peers, "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert {row["work"] for row in rows} == set(works)
    assert all(row["state"] == "agrees" and row["agreement"] for row in rows)

    done = run("--quick", "--what", "rewards,generate", "--compare", "torch", "--out", str(out))
    assert done.returncode in (0, 1), done.stdout + done.stderr  # 1: below the kept ratio, which other sizes may be
    for row in json.loads(out.read_text())["rows"]:
        assert row["state"] == "timed"
        assert row["spread"][0] <= row["ratio"] <= row["spread"][1]
    assert out.with_suffix(".png").stat().st_size > 1000


SABOTAGE = """#!{python}
# A Python whose torch is a little off.
import runpy, sys
from pathlib import Path
import torch, transformers
{fault}
sys.argv = sys.argv[1:]
sys.path[0] = str(Path(sys.argv[0]).parent)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
OTHER_MODEL = """
load = transformers.GPT2LMHeadModel.from_pretrained
def from_pretrained(*arguments, **more):
    model = load(*arguments, **more)
    with torch.no_grad():
        model.transformer.ln_f.bias += torch.linspace(-0.5, 0.5, len(model.transformer.ln_f.bias))
    return model
transformers.GPT2LMHeadModel.from_pretrained = from_pretrained
"""
OTHER_OPTIMIZER = """
AdamW = torch.optim.AdamW
torch.optim.AdamW = lambda groups, **more: AdamW([dict(group, weight_decay=0.0) for group in groups], **more)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "seen"),
    [
        (
            OTHER_MODEL,
            {"losses", "gradient", "change of the parameters", "replies that differ", "logits where they part"},
        ),
        (OTHER_OPTIMIZER, {"change of the parameters"}),
    ],
    ids=["model", "optimizer"],
)
def test_a_peer_that_disagrees_is_not_timed(fault, seen, tmp_path):
    pytest.importorskip("torch")
    python, out = tmp_path / "python", tmp_path / "bench.json"
    python.write_text(SABOTAGE.format(python=sys.executable, fault=fault))
    python.chmod(0o755)
    what = "sft,generate" if fault == OTHER_MODEL else "sft"
    done = run("--quick", "--what", what, "--compare", "torch", "--torch_python", str(python), "--out", str(out))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "DISAGREES" in done.stdout and "Traceback" not in done.stdout
    rows = json.loads(out.read_text())["rows"]
    assert {check["quantity"] for row in rows for check in row["agreement"] if not check["agrees"]} == seen
    for row in rows:
        assert row["state"] == "not timed: the two sides do not agree"
        assert "ratio" not in row and "seconds" not in row
