"""What the training loops cost beside their steps: no program is compiled twice, and nothing crosses between host and device
but the batch on its way in and logged numbers on their way out."""

import functools
import itertools
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax._src.array import ArrayImpl  # jax has no public word for "a device array's value on the host"

from therapy_jax import config, ppo, sft, sharding

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import train_ppo  # noqa: E402
import train_sft  # noqa: E402

TINY = {
    "mesh.data": 1, "model.n_layer": 1, "model.n_embd": 32, "model.n_head": 2, "tokenizer.vocab_size": 600,
    "pretrain.epochs": 0.5, "sft.epochs": 0.6, "sft.eval_every": 100, "sft.log_every": 5, "sft.batch_size": 16,
    "ppo.iterations": 4, "ppo.batch_size": 16, "ppo.minibatches": 2, "ppo.eval_every": 2, "ppo.eval_prompts": 8,
    "sampling.max_new_tokens": 8, "classifiers.epochs": 1, "compilation_cache": "null",
}  # fmt: skip


def parse(run_dir: Path, **changes) -> config.Config:
    overrides = {**TINY, "run_dir": run_dir, **changes}
    flags = [part for name, value in overrides.items() for part in (f"--{name}", str(value))]
    return config.parse(["--config", "configs/quickstart.yaml", *flags])


def watch(monkeypatch, module, name: str) -> dict[str, list]:
    """Replaces a step by itself with a count of its traces (one a compiled program), and jit by one whose calls run under a
    guard: an argument that was not put on the device by name raises. Fetches are counted by size."""
    seen: dict[str, list] = {"traced": [], "calls": [], "fetched": [], "put": [], "events": []}
    step, jit, get, put = getattr(module, name), jax.jit, jax.device_get, sharding.split_batch
    value, getting = ArrayImpl._value, []

    @functools.wraps(step)
    def traced(*args, **kwargs):
        seen["traced"].append([np.shape(x) for x in jax.tree.leaves(args[1])])
        return step(*args, **kwargs)

    def guarded_jit(function, **options):
        program = jit(function, **options)
        if getattr(function, "func", None) is not traced:
            return program

        def call(*args):
            seen["calls"].append(1)
            seen["events"].append("step")
            with jax.transfer_guard_host_to_device("disallow"):
                return program(*args)

        return call

    def counted_get(tree):
        seen["fetched"].append(sum(np.size(x) for x in jax.tree.leaves(tree)))
        seen["events"].append(seen["fetched"][-1])
        getting.append(1)
        try:
            return get(tree)
        finally:
            getting.pop()

    def counted_value(array):  # what float(), np.asarray() and print() of an array on the device come to
        if not getting:
            seen["events"].append("read without device_get")
        return value.fget(array)

    def counted_put(mesh, tree):
        seen["put"].append(1)
        seen["events"].append("put")
        return put(mesh, tree)

    monkeypatch.setattr(module, name, traced)
    monkeypatch.setattr(jax, "jit", guarded_jit)
    monkeypatch.setattr(jax, "device_get", counted_get)
    monkeypatch.setattr(sharding, "split_batch", counted_put)
    monkeypatch.setattr(ArrayImpl, "_value", property(counted_value))
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("row_tokens", ["null", 512])
def test_sft_compiles_once_a_shape_and_fetches_what_it_logs(row_tokens, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    batch_size = 16 if row_tokens == "null" else 2
    given = parse(tmp_path, **{"sft.row_tokens": row_tokens, "sft.batch_size": batch_size, "pretrain.epochs": 0.05})
    train_sft.main(given)  # base, and a first SFT, unwatched
    other = parse(
        tmp_path / "again", **{"sft.row_tokens": row_tokens, "sft.batch_size": batch_size, "pretrain": "null"}
    )
    seen = watch(monkeypatch, sft, "sft_step")
    train_sft.main(other)
    steps, shapes = len(seen["calls"]), {str(shapes) for shapes in seen["traced"]}
    assert steps > 10 and len(seen["traced"]) == len(shapes)  # no shape is compiled twice
    assert len(shapes) == 1 if row_tokens == 512 else len(shapes) <= 8
    logged = [
        json_line
        for json_line in (tmp_path / "again" / "metrics.jsonl").read_text().splitlines()
        if '"sft"' in json_line
    ]
    first, *_, last = (i for i, event in enumerate(seen["events"]) if event == "step")
    within = [event for event in seen["events"][first:last] if not isinstance(event, int)]
    assert within == ["step", "put"] * (steps - 1), "one batch in a step; what comes out is fetched by name"
    small = [size for size in seen["fetched"] if size <= 10]
    assert len(small) == len(logged) < steps  # the numbers of a logged step, and of no other


@pytest.mark.slow
def test_ppo_compiles_once_and_fetches_what_it_logs(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    given = parse(tmp_path, **{"ppo.eval_every": 4})
    train_sft.main(given)
    seen = watch(monkeypatch, ppo, "ppo_iteration")
    train_ppo.main(given)
    assert len(seen["calls"]) == 4 and len(seen["traced"]) == 1
    starts = [i for i, event in enumerate(seen["events"]) if event == "step"]
    for a, b in itertools.pairwise(starts):  # no evaluation in between: scalars alone, never replies or parameters
        *puts, size = sorted(seen["events"][a + 1 : b], key=str, reverse=True)
        assert 30 < size < 200 and puts == ["put"], "one batch in, one handful of numbers out"
