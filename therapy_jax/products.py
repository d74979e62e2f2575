"""Matrix products with parameters, each in the form that is fastest where it runs.

`product` is an einsum whose gradients are products in the same dtype, `few_rows` the one of decoding, `dense` a layer. Axes as in
gpt2.py.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

Array = jax.Array


def on_gpu() -> bool:
    """The same mathematics, in the form that is fastest there; asked while a program is traced."""
    return jax.default_backend() == "gpu"


def on_cpu(mesh: Mesh | None) -> bool:
    """Of the devices of `mesh`, which may be others than this machine's (aot.py)."""
    return (jax.default_backend() if mesh is None else mesh.devices.flat[0].platform) == "cpu"


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def product(equation: str, dtype: Any, x: Array, w: Array) -> Array:
    """einsum(equation, x, w) as a product in `dtype` -> f32. What comes back for it is rounded to `dtype`, too: left in
    float32, it would make float32 products of two thirds of the work."""
    return jnp.einsum(equation, x.astype(dtype), w.astype(dtype), preferred_element_type=jnp.float32)


def _product_forward(equation, dtype, x, w):
    return product(equation, dtype, x, w), (x, w)


def _product_backward(equation, dtype, residual, g):
    left, right, out = re.split(",|->", equation)
    x, w = residual
    g = g.astype(dtype)
    to_x = jnp.asarray(product(f"{out},{right}->{left}", dtype, g, w))

    def to_w(x, g, *lead):
        """Summed over `lead` axes, which stand for the first ones of x and g; without: over those that they have."""
        rows = "".join(axis for axis in left if axis not in right)
        if lead and left.startswith(rows) and out.startswith(rows):
            x, g = (a.reshape(*lead, *a.shape[len(rows) :]) for a in (x, g))
            new = "yz"[: len(lead)]
            return product(f"{left},{out}->{right}".replace(rows, new), dtype, x, g)
        return product(f"{left},{out}->{right}", dtype, x, g)

    def to_w_on_cpu(x, g):
        # XLA turns x over before it sums over two axes, and need not before it sums over one. But its bfloat16 product, twice as
        # fast as that in float32, it takes in the former case alone.
        if dtype != jnp.bfloat16:
            return to_w(x, g, -1)
        return to_w(x, g, 2, -1) if x.ndim == 2 and x.shape[0] % 2 == 0 else to_w(x, g)

    found = jnp.asarray(jax.lax.platform_dependent(x, g, cpu=to_w_on_cpu, default=to_w))
    return to_x.astype(x.dtype), found.astype(w.dtype)


product.defvjp(_product_forward, _product_backward)


def few_rows(x_BK: Array, w_NK: Array) -> Array:
    """x @ w.T of few rows, as in decoding -> f32[B,N]. A CPU multiplies up to 1.7 times faster with the many rows on the left."""
    out_NB = jnp.einsum("nk,bk->nb", w_NK, x_BK, preferred_element_type=jnp.float32)
    return jax.lax.optimization_barrier(out_NB).T  # else XLA turns it back


def dense(equation: str, x: Array, p: Any, mesh: Mesh | None) -> Array:
    """x times the kernel, plus the bias, in x's dtype. A "turned" kernel [out, in] is for one token a row: `few_rows`.

    The product is named, so that a backward pass that makes a block anew can find it. On a CPU bfloat16 is fast only in products
    that give float32, and in gradients that are such products; elsewhere what gives bfloat16 writes half as much."""
    if "turned" in p:
        out_BN = few_rows(x.reshape(x.shape[0], -1), p["turned"]).astype(x.dtype)
        return out_BN.reshape(x.shape[0], 1, *p["bias"].shape) + p["bias"].astype(x.dtype)
    if on_cpu(mesh):
        out = jnp.asarray(product(equation, x.dtype, x, p["kernel"])) + p["bias"]
        return checkpoint_name(out.astype(x.dtype), "product")
    out = jnp.einsum(equation, x, p["kernel"].astype(x.dtype))
    return checkpoint_name(out, "product") + p["bias"].astype(x.dtype)
