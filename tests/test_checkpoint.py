"""Checkpoints: what is kept, what is refused, what comes back."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from therapy_jax import checkpoint, sharding
from therapy_jax.config import MeshConfig

BELONGS = {"model": {"n_layer": 2}, "seed": 0}


def state(value: float):
    tx = optax.adamw(1e-3)
    params = {"w": jnp.full((8, 4), value), "b": jnp.full(4, -value)}
    return {"params": params, "opt": tx.init(params), "step": jnp.int32(value)}


@pytest.mark.parametrize(("mode", "best"), [("min", 2), ("max", 3)])
def test_the_newest_two_and_the_best_are_kept(tmp_path, mode, best):
    manager = checkpoint.manager(tmp_path, best="x", mode=mode)
    for step, x in enumerate([4.0, 1.0, 9.0, 5.0, 3.0, 6.0], start=1):
        checkpoint.save(manager, step, state(step), BELONGS, {"x": x})
    assert list(manager.all_steps()) == [best, 5, 6]
    reopened = checkpoint.manager(tmp_path, best="x", mode=mode)
    assert reopened.best_step() == best
    assert checkpoint.metric_of(reopened, best, "x") == {"min": 1.0, "max": 9.0}[mode]


def test_state_comes_back_bit_for_bit_and_on_another_mesh(tmp_path):
    manager = checkpoint.manager(tmp_path, best="x", mode="min")
    assert checkpoint.restore(manager, state(0), BELONGS) is None
    saved = jax.tree.map(lambda x: x * jnp.pi if x.dtype == jnp.float32 else x, state(7))
    checkpoint.save(manager, 7, saved, BELONGS, {"x": 0.0})
    for devices in (1, 4):
        target = sharding.replicate(sharding.make_mesh(MeshConfig(devices)), state(0))
        found = checkpoint.restore(checkpoint.manager(tmp_path, best="x", mode="min"), target, BELONGS)
        assert found is not None and found[1] == 7
        assert jax.tree.structure(found[0]) == jax.tree.structure(saved)  # optax's own types, not lists
        for a, b in zip(jax.tree.leaves(found[0]), jax.tree.leaves(saved), strict=True):
            np.testing.assert_array_equal(a, b)
            assert len(a.sharding.device_set) == devices


def test_a_checkpoint_of_another_run_is_refused_with_the_differing_keys(tmp_path):
    manager = checkpoint.manager(tmp_path, best="x", mode="min")
    checkpoint.save(manager, 1, state(1), BELONGS, {"x": 0.0})
    with pytest.raises(checkpoint.CheckpointError, match=r"model.n_layer was 2, now 3; seed was 0, now 1"):
        checkpoint.restore(manager, state(1), {"model": {"n_layer": 3}, "seed": 1})


def test_saving_the_same_step_twice_keeps_the_first(tmp_path):
    manager = checkpoint.manager(tmp_path, best="x", mode="min")
    checkpoint.save(manager, 1, state(1), BELONGS, {"x": 0.0})
    checkpoint.save(manager, 1, state(2), BELONGS, {"x": 5.0})
    found = checkpoint.restore(manager, state(0), BELONGS)
    assert found is not None and int(found[0]["step"]) == 1
