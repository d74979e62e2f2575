"""Where arrays live: batches are split over the devices of a mesh, parameters are copied to each.

jit does the rest: it sees how its inputs are laid out, splits the work accordingly and adds the sum over devices where a
loss or a gradient needs one. The maths never mentions devices.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from therapy_jax.config import ConfigError, MeshConfig


def make_mesh(config: MeshConfig) -> Mesh:
    """A mesh with the axis `data`, over all devices or the first config.data of them. Raises ConfigError."""
    devices = jax.devices()
    size = len(devices) if config.data == -1 else config.data
    if not 0 < size <= len(devices):
        raise ConfigError(f"mesh.data is {size}, but {len(devices)} device(s) are here; set it to that or to -1")
    return Mesh(np.asarray(devices[:size]), ("data",), axis_types=(AxisType.Auto,))


def check_divides(batch_size: int, mesh: Mesh, name: str) -> None:
    size = mesh.shape["data"]
    if batch_size % size:
        fits = [batch_size // size * size, (batch_size // size + 1) * size]
        raise ConfigError(
            f"{name} ({batch_size}) must be a multiple of the {size} devices of mesh.data; {fits[0] or fits[1]} or {fits[1]} would do"
        )


def split_batch(mesh: Mesh, tree: Any) -> Any:
    """Arrays [B, ...] -> split over `data` along their first axis."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec("data")))


def replicate(mesh: Mesh, tree: Any) -> Any:
    """A fresh copy on every device: donating the result never deletes the array it came from."""
    copied = jax.tree.map(lambda x: jax.numpy.array(x, copy=True), tree)
    return jax.device_put(copied, NamedSharding(mesh, PartitionSpec()))
