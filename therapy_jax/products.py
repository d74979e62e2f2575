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

    def to_w(x, g):
        return product(f"{left},{out}->{right}", dtype, x, g)

    def to_w_in_halves(x, g):
        x, g = (a.reshape(2, -1, a.shape[-1]) for a in (x, g))
        return product(f"z{left},z{out}->{right}", dtype, x, g)

    if dtype == jnp.bfloat16 and x.ndim == 2 and len(x) % 2 == 0:
        # XLA's bfloat16 product for CPUs, twice as fast as its float32 one, is not used where a single axis is summed that
        # stands first; of two axes it is.
        found = jax.lax.platform_dependent(x, g, cpu=to_w_in_halves, default=to_w)
    else:
        found = to_w(x, g)
    return to_x.astype(x.dtype), jnp.asarray(found).astype(w.dtype)


product.defvjp(_product_forward, _product_backward)


def few_rows(x_BK: Array, w_NK: Array) -> Array:
    """x @ w.T of few rows, as in decoding -> f32[B,N]. A CPU multiplies up to 1.7 times faster with the many rows on the left."""
    out_NB = jnp.einsum("nk,bk->nb", w_NK, x_BK, preferred_element_type=jnp.float32)
    return jax.lax.optimization_barrier(out_NB).T  # else XLA turns it back


def dense(equation: str, x: Array, p: Any, mesh: Mesh | None) -> Array:
    """x times the kernel, plus the bias, in x's dtype. A "turned" kernel [out, in] is for one token a row: `few_rows`.

    The product is named, so that a backward pass that makes a block anew can find it. On a CPU bfloat16 is fast only in products
    that give float32, and in gradients that are such products; elsewhere what gives bfloat16 writes half as much."""
    bias = p["bias"].astype(x.dtype)
    if "turned" in p:
        out_BN = few_rows(x.reshape(x.shape[0], -1), p["turned"]).astype(x.dtype)
        return out_BN.reshape(x.shape[0], 1, *bias.shape) + bias
    if on_cpu(mesh):
        out = jnp.asarray(product(equation, x.dtype, x, p["kernel"])).astype(x.dtype)
    else:
        out = jnp.einsum(equation, x, p["kernel"].astype(x.dtype))
    return checkpoint_name(out, "product") + bias
