"""Where arrays live: a mesh of devices, and one table that says along which of its axes each array is split.

    data     every device of it works on other rows of a batch
    fsdp     the same, and parameters are stored in parts, each device fetching a layer when it comes to it (ZeRO-3:
             Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models")
    tensor   a layer's heads, inner units and vocabulary are split (Shoeybi et al. 2019, "Megatron-LM")

The maths never mentions devices. It names arrays (`constrain`), jit sees how its inputs are laid out (`place`), and XLA's
partitioner splits the work and adds the communication (Xu et al. 2021, "GSPMD"). With one device all of it is the identity.

Several processes, each with its own devices, run the same program on one mesh: a process supplies its own rows of a batch
(`my_rows`, `split_batch`), and `fetch` brings an array that is spread over processes back to each of them.
"""

from __future__ import annotations

import functools
import math
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from therapy_jax.config import ConfigError, MeshConfig

T = TypeVar("T")
ROWS = ("data", "fsdp")  # a batch is split over both

AXES: dict[str, tuple[Any, ...]] = {
    # parameters, their Adam moments (which carry the same names), reference and critic; the L blocks are stacked in front
    "wte": ("tensor", "fsdp"),  # [V, D]
    "wpe": (None, "fsdp"),  # [N, D]
    "c_attn.kernel": (None, "fsdp", None, "tensor", None),  # [L, D, 3, H, K]
    "c_attn.bias": (None, None, "tensor", None),  # [L, 3, H, K]
    "attn_proj.kernel": (None, "tensor", None, "fsdp"),  # [L, H, K, D]
    "c_fc.kernel": (None, "fsdp", "tensor"),  # [L, D, F]
    "c_fc.bias": (None, "tensor"),  # [L, F]
    "mlp_proj.kernel": (None, "tensor", "fsdp"),  # [L, F, D]
    # activations
    "rows": (ROWS,),  # [B, ...], and the G parts of a batch that head.py walks side by side
    "cache": (None, ROWS, "tensor"),  # [L, B, H, S, K]
    "block_cache": (ROWS, "tensor"),  # [B, H, S, K]
    "grads_GVD": (ROWS, "tensor"),  # of wte, one for each of the G parts
}  # what is not named here is small: layer norms, biases, the value head, the classifiers. Each device has a copy.


# ------------------------------------------------------------------------------------------------------------ the mesh


def connect(config: MeshConfig) -> None:
    """Join the other processes where the config names a coordinator; before anything else asks jax for devices. Where they
    do not all come within config.timeout seconds, the process ends with a sentence and exit code 2: jax itself would abort
    it with a stack trace."""
    if config.coordinator is None or jax.distributed.is_initialized():
        return
    who = "" if config.process is None else f" (this is process {config.process} of {config.processes})"

    def give_up() -> None:
        print(
            f"error: mesh.coordinator {config.coordinator}: not all processes came within mesh.timeout ({config.timeout} s)"
            f"{who}; start all of them, with the same coordinator, or raise mesh.timeout",
            flush=True,
        )
        os._exit(2)

    timer = threading.Timer(config.timeout, give_up)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            None if config.coordinator == "auto" else config.coordinator,
            num_processes=config.processes,
            process_id=config.process,
            initialization_timeout=config.timeout + 60,
            heartbeat_timeout_seconds=config.timeout,
        )
    except (RuntimeError, ValueError) as error:  # such as `auto` where there is no cluster to ask
        raise ConfigError(f"mesh.coordinator {config.coordinator}{who}: {str(error).splitlines()[0]}") from error
    finally:
        timer.cancel()


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The axes data, fsdp, tensor over all devices, or the first data * fsdp * tensor of them; -1 takes what is left. devices:
    others than those that are here. Raises ConfigError where the devices do not suffice or do not divide."""
    devices = jax.devices() if devices is None else devices
    sizes = {name: getattr(config, name) for name in ("data", "fsdp", "tensor")}
    said = ", ".join(f"mesh.{name} {size}" for name, size in sizes.items())
    free = [name for name, size in sizes.items() if size == -1]
    given = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1 or given < 1 or min(sizes.values()) < -1:
        raise ConfigError(f"{said}: each must be 1 or more, and at most one may be -1 (what the others leave)")
    if free:
        if len(devices) % given:
            raise ConfigError(f"{said}: the {len(devices)} device(s) here are no multiple of {given}")
        sizes[free[0]] = len(devices) // given
    size = math.prod(sizes.values())
    if size > len(devices) or (jax.process_count() > 1 and size != len(devices)):
        raise ConfigError(f"{said}: that is {size} device(s), but {len(devices)} are here; -1 takes what is left")
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * 3, devices=devices[:size])


def row_shards(mesh: Mesh | None) -> int:
    """In how many parts a batch is split."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in ROWS)


def check_divides(batch_size: int, mesh: Mesh, name: str) -> None:
    size = row_shards(mesh)
    if batch_size % size:
        fits = [batch_size // size * size, (batch_size // size + 1) * size]
        raise ConfigError(
            f"{name} ({batch_size}) must be a multiple of the {size} devices of mesh.data * mesh.fsdp; "
            f"{fits[0] or fits[1]} or {fits[1]} would do"
        )


def check_model(mesh: Mesh, sizes: dict[str, tuple[str, int]]) -> None:
    """sizes: what is split -> (mesh axis, size). Raises ConfigError naming a size that its axis does not divide, and the
    sizes of the axis that would."""
    for name, (axis, size) in sizes.items():
        parts = mesh.shape[axis]
        if size % parts:
            fits = ", ".join(str(n) for n in range(1, min(size, mesh.size) + 1) if size % n == 0)
            raise ConfigError(f"mesh.{axis} {parts} does not divide {name} ({size}); of up to {mesh.size}, {fits} do")


# ------------------------------------------------------------------------------------------------------- names -> places


def axes_of(path: tuple[Any, ...]) -> tuple[Any, ...]:
    """The table's entry for a leaf of a pytree: by its own name, or by that and the one above it."""
    names = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path]
    return AXES.get(".".join(names[-2:]), AXES.get(names[-1], ()) if names else ())


def shardings(mesh: Mesh, tree: Any) -> Any:
    """A sharding for each leaf of a state (arrays or their shapes), by its name."""
    return jax.tree_util.tree_map_with_path(lambda path, _: NamedSharding(mesh, PartitionSpec(*axes_of(path))), tree)


def constrain(tree: T, name: str, mesh: Mesh | None) -> T:
    """Within a compiled program: lay arrays out as the table says for `name`. An axis that does not divide is left whole."""
    if mesh is None or mesh.size == 1:
        return tree

    def lay_out(x):
        fits = [
            axes if axes and size % math.prod(mesh.shape[a] for a in np.atleast_1d(axes).tolist()) == 0 else None
            for axes, size in zip(AXES[name], x.shape, strict=False)
        ]
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*fits)))

    return jax.tree.map(lay_out, tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _fetched(x: jax.Array, used: NamedSharding, stored: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, used)


# The transpose of a constraint is the same constraint: left to itself, a gradient is summed whole on every device.
_fetched.defvjp(
    lambda x, used, stored: (jax.lax.with_sharding_constraint(x, used), None),
    lambda used, stored, _, grad: (jax.lax.with_sharding_constraint(grad, stored),),
)


def gathered(tree: T, mesh: Mesh | None, dtype: Any = None, stacked: bool = False) -> T:
    """Parameters as they are used: whole along fsdp, split along tensor still. dtype: kernels travel in it (half the bytes in
    bfloat16). Gradients go back in parts: the transpose of gathering is to sum and scatter. stacked: a single block,
    its leading axis taken off by a scan."""
    if mesh is None or mesh.size == 1:
        return tree

    def fetch(path, x):
        stored = axes_of(path)[1:] if stacked else axes_of(path)
        used = (None if axis == "fsdp" else axis for axis in stored)
        x = x.astype(dtype) if dtype is not None and path[-1].key == "kernel" else x
        return _fetched(x, NamedSharding(mesh, PartitionSpec(*used)), NamedSharding(mesh, PartitionSpec(*stored)))

    return jax.tree_util.tree_map_with_path(fetch, tree)


# ---------------------------------------------------------------------------------------------- between host and devices


def place(mesh: Mesh, tree: T) -> T:
    """Host arrays (the same in every process), or arrays of one device -> arrays laid out over the mesh by their names.
    Always fresh: donating the result never deletes the array it came from."""
    return jax.tree.map(_put, tree, shardings(mesh, tree))


def replicate(mesh: Mesh, tree: T) -> T:
    """The same with a copy on every device, whatever its names."""
    return jax.tree.map(lambda x: _put(x, NamedSharding(mesh, PartitionSpec())), tree)


def _put(x: Any, sharding: NamedSharding) -> jax.Array:
    host = np.array(x)  # a copy
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def make_state(mesh: Mesh, make: Callable[..., T], *arguments: Any) -> T:
    """make(*arguments), compiled so that no part of the result is ever whole on one device. (Without that, optimizer moments
    of split parameters would all be made on the first device.)"""
    return jax.jit(make, out_shardings=shardings(mesh, jax.eval_shape(make, *arguments)))(*arguments)


def my_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Which rows of a batch this process supplies, i64[rows]: all of them where it is alone."""
    split = NamedSharding(mesh, PartitionSpec(ROWS))
    held: Any = split.addressable_devices_indices_map((batch_size,))
    places = {rows.indices(batch_size)[:2] for (rows,) in held.values()}
    return np.concatenate([np.arange(start, stop) for start, stop in sorted(places)])


def split_batch(mesh: Mesh, tree: Any) -> Any:
    """Host arrays [rows, ...], those of `my_rows` -> arrays [B, ...] split along their first axis."""
    split = NamedSharding(mesh, PartitionSpec(ROWS))
    if jax.process_count() == 1:
        return jax.device_put(tree, split)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(split, np.asarray(x)), tree)


def fetch(tree: Any) -> Any:
    """Arrays -> host arrays, whole, in every process (so every process must ask)."""

    def bring(x):
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return jax.device_get(x)
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(bring, tree)
