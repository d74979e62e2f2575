"""The same numbers on every mesh, and every array where the table says."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sharded_work import work

from therapy_jax import gpt2, sharding
from therapy_jax.config import ConfigError, MeshConfig

MESHES = {
    "data": MeshConfig(8),
    "fsdp": MeshConfig(1, 8),
    "tensor": MeshConfig(1, 1, 4),
    "mixed": MeshConfig(2, 2, 2),
}
WIDE = gpt2.GPT2Config(n_embd=64, n_head=4, n_layer=2)
# Parts of [V, D], [L, D, 3, H, K] and [L, F, D] on one device of a mesh of 2 x 2 x 2: by hand from the table.
PARTS = {"wte": (1 / 2, 1 / 2), "c_attn.kernel": (1, 1 / 2, 1, 1 / 2, 1), "mlp_proj.kernel": (1, 1 / 2, 1 / 2)}


@pytest.fixture(scope="module")
def alone():
    return work(MeshConfig(1))[0]


def assert_same(found, wanted):
    """Sums over devices add in another order: 1e-5 relative or 1e-6 absolute. Two numbers are differences of numbers that
    all but cancel: 1 - (a quotient near 1), and the ratio of a log-prob to itself, minus 1."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        atol = 4e-6 if name.endswith(("explained_variance", "ratio_gap_start")) else 1e-6
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=atol, err_msg=name)


def assert_laid_out(states, mesh):
    """No array on one device, none whole that the table splits."""
    split = 0
    for path, x in jax.tree_util.tree_leaves_with_path(states):
        name = jax.tree_util.keystr(path)
        assert isinstance(x, jax.Array) and len(x.sharding.device_set) == mesh.size, name
        axes = sharding.axes_of(path)
        parts = [int(np.prod([mesh.shape[a] for a in np.atleast_1d(axis)])) if axis else 1 for axis in axes]
        parts += [1] * (x.ndim - len(parts))
        wanted = tuple(n // part for n, part in zip(x.shape, parts, strict=True))
        assert {s.data.shape for s in x.addressable_shards} == {wanted}, name
        split += wanted != x.shape
    return split


def test_sft_on_a_mixed_mesh_is_that_of_one_device_and_its_state_is_split():
    found, states = work(MESHES["mixed"], only_sft=True)
    assert_same(found, work(MeshConfig(1), only_sft=True)[0])
    mesh = sharding.make_mesh(MESHES["mixed"])
    assert assert_laid_out(states, mesh) == 3 * 8  # parameters and both moments; 8 names of the table are parameters
    state = states["sft"].params
    for name, shares in PARTS.items():
        x = state["wte"] if name == "wte" else state["blocks"][name.split(".")[0]]["kernel"]
        part = tuple(int(n * share) for n, share in zip(x.shape, shares, strict=True))
        assert {s.data.shape for s in x.addressable_shards} == {part}, name


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_sft_replies_rewards_ppo_and_losses_are_those_of_one_device(name, alone):
    found, states = work(MESHES[name])
    assert_same(found, alone)
    assert len({tuple(reply) for reply in found["greedy"]}) > 3  # not one reply to all
    mesh = sharding.make_mesh(MESHES[name])
    assert (assert_laid_out(states, mesh) > 0) == (name != "data")


def in_processes(arguments, devices=4, environment=None):
    """Two processes that find each other on the loopback -> [(exit code, what each said)]."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", **(environment or {})}
    processes = [
        subprocess.Popen(
            [sys.executable, *arguments(i, f"127.0.0.1:{port}")],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        )
        for i in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=500)[0] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 2, 2), (4, 2, 1)])
def test_two_processes_of_four_devices_compute_what_one_device_does(sizes, alone, tmp_path):
    script = Path(__file__).with_name("sharded_work.py")

    def arguments(i, address):
        return [str(script), str(tmp_path / f"{i}.npz"), *map(str, sizes), address, "2", str(i)]

    for code, text in in_processes(arguments):
        assert code == 0, text[-3000:]
    for i in range(2):
        assert_same(dict(np.load(tmp_path / f"{i}.npz")), alone)


def test_meshes_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match=r"mesh.data 64, .*: that is 64 device\(s\), but 8 are here"):
        sharding.make_mesh(MeshConfig(64))
    with pytest.raises(ConfigError, match=r"mesh.tensor 3: the 8 device\(s\) here are no multiple of 3"):
        sharding.make_mesh(MeshConfig(-1, 1, 3))
    with pytest.raises(ConfigError, match="at most one may be -1"):
        sharding.make_mesh(MeshConfig(-1, -1))
    with pytest.raises(ConfigError, match="needs mesh.processes and mesh.process"):
        MeshConfig(coordinator="127.0.0.1:1")


def test_sizes_that_do_not_divide_are_named_with_sizes_that_would():
    mesh = sharding.make_mesh(MeshConfig(1, 2, 4))
    with pytest.raises(ConfigError, match=r"sft.batch_size \(5\) must be a multiple of the 2 devices .* 4 or 6 would"):
        sharding.check_divides(5, mesh, "sft.batch_size")
    sharding.check_model(mesh, WIDE.split_sizes)
    six = gpt2.GPT2Config(n_embd=66, n_head=6)
    with pytest.raises(ConfigError, match=r"mesh.tensor 4 does not divide n_head \(6\); of up to 8, 1, 2, 3, 6 do"):
        sharding.check_model(mesh, six.split_sizes)
    with pytest.raises(ConfigError, match=r"mesh.fsdp 8 does not divide n_embd \(66\); of up to 8, 1, 2, 3, 6 do"):
        sharding.check_model(sharding.make_mesh(MeshConfig(1, 8)), six.split_sizes)


def test_batches_are_split_and_copies_are_fresh():
    mesh = sharding.make_mesh(MeshConfig(4, 2))
    batch = sharding.split_batch(mesh, np.arange(32).reshape(16, 2))
    assert {s.data.shape for s in batch.addressable_shards} == {(2, 2)}
    np.testing.assert_array_equal(sharding.my_rows(mesh, 16), np.arange(16))
    for put in (sharding.replicate, sharding.place):
        source = {"wte": jnp.ones((4, 4))}
        copy = put(mesh, source)
        jax.jit(lambda x: x["wte"] + 1, donate_argnums=0)(copy)
        np.testing.assert_array_equal(source["wte"], np.ones((4, 4)))


def test_a_process_that_never_comes_is_given_up_with_a_sentence():
    script = (
        "import sys\nfrom therapy_jax import sharding\nfrom therapy_jax.config import MeshConfig\n"
        "sharding.connect(MeshConfig(coordinator=sys.argv[1], processes=3, process=int(sys.argv[2]), timeout=3))\n"
    )
    for i, (code, text) in enumerate(in_processes(lambda i, address: ["-c", script, address, str(i)], devices=1)):
        assert code == 2, text[-2000:]
        assert f"not all processes came within mesh.timeout (3 s) (this is process {i} of 3)" in text
