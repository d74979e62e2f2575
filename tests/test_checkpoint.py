"""Checkpoints: what is kept, what is refused, what comes back."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from therapy_jax import checkpoint, sharding
from therapy_jax.config import MeshConfig

ROOT = Path(__file__).parent.parent
BELONGS = {"model": {"n_layer": 2}, "seed": 0}


def state(value: float):
    tx = optax.adamw(1e-3)
    params = {"w": jnp.full((8, 4), value), "b": jnp.full(4, -value)}
    return {"params": params, "opt": tx.init(params), "step": jnp.int32(value)}


def opened(folder, scores=None, mode="min"):
    return checkpoint.manager(folder, mode, {} if scores is None else scores)


@pytest.mark.parametrize(("mode", "best"), [("min", 2), ("max", 3)])
def test_the_newest_two_and_the_best_are_kept(tmp_path, mode, best):
    scores = {}
    manager = opened(tmp_path, scores, mode)
    for step, x in enumerate([4.0, 1.0, 9.0, 5.0, 3.0, 6.0], start=1):
        checkpoint.save(manager, step, state(step), BELONGS)
        scores[step] = x  # known only after the save: the step is evaluated then
    assert list(manager.all_steps()) == [best, 5, 6]
    reopened = opened(tmp_path, scores, mode)
    assert checkpoint.best(reopened.all_steps(), scores, mode) == best
    found = checkpoint.restore(reopened, state(0), BELONGS, rank=checkpoint.ranking(scores, mode))
    assert found is not None and found.step == best == int(found.state["step"])


@pytest.mark.parametrize("mode", ["min", "max"])
def test_through_many_saves_what_is_kept_is_newest_and_best(tmp_path, mode, rng):
    """Random scores, some missing, some NaN, against the plain definition over all that was ever saved."""
    scores, manager = {}, None
    manager = opened(tmp_path, scores, mode)
    for step in range(1, 25):
        checkpoint.save(manager, step, {"x": jnp.int32(step)}, BELONGS)
        known = {k: v for k, v in scores.items() if v == v}
        top = (min if mode == "min" else max)(known.values(), default=None)
        kept = {step, step - 1} | ({max(k for k, v in known.items() if v == top)} if known else set())
        assert set(manager.all_steps()) == kept - {0}
        if rng.random() < 0.8:
            scores[step] = float(rng.choice([rng.integers(5), np.nan]))


def test_state_comes_back_bit_for_bit_and_on_another_mesh(tmp_path):
    manager = opened(tmp_path)
    assert checkpoint.restore(manager, state(0), BELONGS) is None
    saved = jax.tree.map(lambda x: x * jnp.pi if x.dtype == jnp.float32 else x, state(7))
    checkpoint.save(manager, 7, saved, BELONGS, {"loss": 0.5, "gone": float("nan")})
    for devices in (1, 4):
        target = sharding.replicate(sharding.make_mesh(MeshConfig(devices)), state(0))
        found = checkpoint.restore(opened(tmp_path), target, BELONGS)
        assert found is not None and found.step == 7
        assert found.line is not None and found.line["loss"] == 0.5 and np.isnan(found.line["gone"])
        assert jax.tree.structure(found.state) == jax.tree.structure(saved)  # optax's own types, not lists
        for a, b in zip(jax.tree.leaves(found.state), jax.tree.leaves(saved), strict=True):
            np.testing.assert_array_equal(a, b)
            assert len(a.sharding.device_set) == devices


RESTORE = """
import sys, jax, jax.numpy as jnp, numpy as np
from therapy_jax import checkpoint
assert len(jax.devices()) == 1
found = checkpoint.restore(checkpoint.manager(sys.argv[1], "min", {}), {"split": jnp.zeros((8, 4)), "whole": jnp.zeros(3)}, {})
np.testing.assert_array_equal(found.state["split"], np.arange(32, dtype=np.float32).reshape(8, 4))
np.testing.assert_array_equal(found.state["whole"], np.arange(3, dtype=np.float32))
"""


def test_eight_devices_saved_and_another_process_with_one_goes_on(tmp_path):
    mesh = sharding.make_mesh(MeshConfig(8))
    split = sharding.split_batch(mesh, np.arange(32, dtype=np.float32).reshape(8, 4))
    whole = sharding.replicate(mesh, np.arange(3, dtype=np.float32))
    assert len(split.addressable_shards) == 8 and split.addressable_shards[0].data.shape == (1, 4)
    checkpoint.save(opened(tmp_path), 1, {"split": split, "whole": whole}, {})
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", RESTORE, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def test_a_checkpoint_of_another_run_is_refused_with_the_differing_keys(tmp_path):
    manager = opened(tmp_path)
    checkpoint.save(manager, 1, state(1), BELONGS)
    with pytest.raises(checkpoint.CheckpointError, match=r"model.n_layer was 2, now 3; seed was 0, now 1"):
        checkpoint.restore(manager, state(1), {"model": {"n_layer": 3}, "seed": 1})


@pytest.mark.parametrize("manifest", [True, False])  # before format 2 there was none
def test_a_checkpoint_of_another_format_is_refused_and_stays(tmp_path, manifest, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 1)
    checkpoint.save(opened(tmp_path), 1, state(1), BELONGS)
    monkeypatch.undo()
    if not manifest:
        (tmp_path / "1" / checkpoint.MANIFEST).unlink()
    with pytest.raises(checkpoint.CheckpointError, match=f"written in format 1, this is format {checkpoint.FORMAT}"):
        checkpoint.restore(opened(tmp_path), state(1), BELONGS)
    assert (tmp_path / "1").is_dir()


def test_saving_the_same_step_twice_keeps_the_first(tmp_path):
    manager = opened(tmp_path)
    checkpoint.save(manager, 1, state(1), BELONGS)
    checkpoint.save(manager, 1, state(2), BELONGS)
    found = checkpoint.restore(manager, state(0), BELONGS)
    assert found is not None and int(found.state["step"]) == 1


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def truncate(path: Path) -> str:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return "is damaged"


def flip(path: Path) -> str:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return "is damaged"


def delete(path: Path) -> str:
    path.unlink()
    return "is missing"


@pytest.mark.parametrize("harm", [truncate, flip, delete])
def test_a_damaged_newest_checkpoint_is_named_put_aside_and_the_one_before_used(tmp_path, harm):
    """Each file of a checkpoint in its turn."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for step in (1, 2):
        checkpoint.save(opened(whole), step, state(step), BELONGS)
    names = files_of(whole / "2")
    assert len(names) > 5
    for name in names:
        shutil.copytree(whole, broken)
        said, fault = [], harm(broken / "2" / name)
        if name == checkpoint.MANIFEST:
            fault = "was cut off while it was being saved" if harm is delete else ""  # whichever file it now belies
        found = checkpoint.restore(opened(broken), state(0), BELONGS, say=said.append)
        assert found is not None and found.step == 1 == int(found.state["step"]), name
        (line,) = said
        assert str(broken / "2") in line and fault in line, line
        assert name == checkpoint.MANIFEST or name in line
        assert len(files_of(broken / "damaged-2")) == len(names) - (harm is delete)  # put aside, not deleted
        manager = opened(broken)
        checkpoint.save(manager, 2, state(2), BELONGS)  # the run comes to this step again
        found = checkpoint.restore(manager, state(0), BELONGS, say=said.append)
        assert found is not None and found.step == 2 and len(said) == 1
        shutil.rmtree(broken)


def test_where_all_are_damaged_the_run_begins_anew(tmp_path):
    for step in (1, 2):
        checkpoint.save(opened(tmp_path), step, state(step), BELONGS)
        flip(tmp_path / str(step) / "info" / "metadata")
    said = []
    assert checkpoint.restore(opened(tmp_path), state(0), BELONGS, say=said.append) is None
    assert len(said) == 2


FULL = """
import resource, sys, jax.numpy as jnp
from therapy_jax import checkpoint
manager = checkpoint.manager(sys.argv[1], "min", {})
checkpoint.save(manager, 1, {"x": jnp.arange(1000.0)}, {})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # as a full disk: a write fails, part of it done
try:
    checkpoint.save(manager, 2, {"x": jnp.sin(jnp.arange(1_000_000.0))}, {})
except checkpoint.CheckpointError as error:
    print(error)
"""


def test_a_save_that_cannot_be_written_is_one_sentence_and_the_one_before_stays(tmp_path):
    command = [sys.executable, "-c", FULL, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path}: step 2 could not be saved (" in done.stdout, done.stdout + done.stderr
    found = checkpoint.restore(opened(tmp_path), {"x": jnp.zeros(1000)}, {})
    assert found is not None and found.step == 1
    np.testing.assert_array_equal(found.state["x"], np.arange(1000.0))


def test_the_loss_of_another_process_during_a_save_is_no_full_disk(tmp_path, monkeypatch):
    manager, lost = opened(tmp_path), jax.errors.JaxRuntimeError("UNAVAILABLE: Gloo: Connection closed by peer")

    def save(*args, **kwargs):
        raise lost

    monkeypatch.setattr(manager, "save", save)
    with pytest.raises(checkpoint.CheckpointError, match="make room"):  # alone, nobody can be lost
        checkpoint.save(manager, 1, state(1), BELONGS)
    monkeypatch.setattr(checkpoint.processes, "is_loss_of_another", lambda error: error is lost)
    with pytest.raises(jax.errors.JaxRuntimeError) as raised:
        checkpoint.save(manager, 1, state(1), BELONGS)
    assert raised.value is lost


def test_the_steps_of_process_0_count_and_all_must_see_them(tmp_path, monkeypatch):
    manager = opened(tmp_path)
    checkpoint.save(manager, 3, state(3), BELONGS)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(checkpoint.processes, "shared", lambda value: [] if value == [3] else value)
        assert checkpoint.restore(manager, state(0), BELONGS) is None
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(checkpoint.processes, "in_any", lambda flag: True)
        with pytest.raises(checkpoint.CheckpointError, match="choose a run_dir that all hosts share"):
            checkpoint.restore(manager, state(0), BELONGS)
