"""Products with parameters, and their gradients, against numpy in float64.

Relative errors, of norms: float32 keeps 24 bits and sums a few dozen terms (1e-6); bfloat16 keeps 8 bits of each factor
and of what comes back (1e-2; one rounding is 4e-3 at most), and sums in float32.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from therapy_jax import products

SHAPES = {  # equation: shapes of x and w
    "bd,vd->bv": [((6, 8), (20, 8)), ((7, 8), (20, 8))],  # an even and an odd number of rows
    "btd,vd->btv": [((2, 3, 8), (20, 8))],
    "btd,df->btf": [((2, 5, 8), (8, 12)), ((3, 5, 8), (8, 12))],
    "btd,dchk->btchk": [((2, 5, 8), (8, 3, 2, 4))],
    "bhtk,hkd->btd": [((2, 2, 5, 4), (2, 4, 8))],
}
CASES = [(equation, *shapes) for equation, found in SHAPES.items() for shapes in found]


def numpy_gradients(equation, x, w, g):
    """By hand: what an entry of x moves is the sum over all of the result of g times what that entry is multiplied with."""
    d = np.eye(x.size).reshape(x.size, *x.shape), np.eye(w.size).reshape(w.size, *w.shape)
    to_x = np.array([(np.einsum(equation, unit, w) * g).sum() for unit in d[0]]).reshape(x.shape)
    to_w = np.array([(np.einsum(equation, x, unit) * g).sum() for unit in d[1]]).reshape(w.shape)
    return to_x, to_w


def distance(ours, oracle):
    return np.linalg.norm(np.asarray(ours, np.float64) - oracle) / np.linalg.norm(oracle)


@pytest.mark.parametrize("equation,x_shape,w_shape", CASES)
@pytest.mark.parametrize("dtype,tolerance", [("float32", 1e-6), ("bfloat16", 1e-2)])
def test_product_and_its_gradients_are_numpys(equation, x_shape, w_shape, dtype, tolerance):
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=x_shape), rng.normal(size=w_shape)
    oracle = np.einsum(equation, x, w)
    g = rng.normal(size=oracle.shape)

    @jax.jit
    def ours(x, w):
        out, pull = jax.vjp(lambda x, w: products.product(equation, jnp.dtype(dtype), x, w), x, w)
        return out, *pull(g.astype(np.float32))

    out, to_x, to_w = ours(x.astype(np.float32), w.astype(np.float32))
    assert out.dtype == to_x.dtype == to_w.dtype == jnp.float32
    assert distance(out, oracle) < tolerance
    for found, expected in zip((to_x, to_w), numpy_gradients(equation, x, w, g), strict=True):
        assert distance(found, expected) < tolerance


def test_gradients_have_the_dtype_of_what_they_are_for():
    x, w = jnp.ones((4, 8), jnp.bfloat16), jnp.ones((8, 8), jnp.float32)
    to_x, to_w = jax.grad(lambda x, w: products.product("td,df->tf", jnp.bfloat16, x, w).sum(), argnums=(0, 1))(x, w)
    assert (to_x.dtype, to_w.dtype) == (jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_layer_is_the_same_with_its_kernel_turned_over(dtype):
    rng = np.random.default_rng(1)
    x, kernel, bias = (rng.normal(size=s).astype(np.float32) for s in ((3, 1, 8), (8, 3, 2, 4), (3, 2, 4)))
    turned = {"turned": jnp.asarray(kernel.reshape(8, -1).T, dtype), "bias": bias}
    x = jnp.asarray(x, dtype)
    plain = products.dense("btd,dchk->btchk", x, {"kernel": kernel, "bias": bias}, None)
    other = products.dense("btd,dchk->btchk", x, turned, None)
    oracle = (
        np.einsum(
            "btd,dchk->btchk",
            np.asarray(x, np.float64),
            np.asarray(turned["turned"], np.float64).T.reshape(kernel.shape),
        )
        + bias
    )
    assert plain.dtype == other.dtype == x.dtype
    for found in (plain, other):
        assert distance(found, oracle) < (1e-6 if dtype == "float32" else 1e-2)
