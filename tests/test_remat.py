"""What the backward pass computes again under each remat policy, counted in the program as it is traced."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import FAST, LLAMA, RULES, make_mesh, make_model, packed_rows, put, variant

from llm_jax.model.transformer import Transformer
from llm_jax.training.state import model_shape

LENGTH = 128  # the attention kernel's least


def primitives(jaxpr) -> collections.Counter:
    """By name, of all that is within, but not what a kernel is made of."""
    found = collections.Counter()
    for equation in jaxpr.eqns:
        found[equation.primitive.name] += 1
        if equation.primitive.name != "pallas_call":
            for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    found += primitives(inner)
    return found


def traced(remat: str) -> collections.Counter:
    """Of the gradient of a model with the kernel for TPUs; layers are a loop, which counts once."""
    shape = model_shape(dataclasses.replace(LLAMA, qk_norm=False), vocab_size=64, sequence_length=LENGTH)

    def loss(model, tokens_BT):
        segments_BT = jnp.ones_like(tokens_BT)
        return jnp.sum(model(tokens_BT, segments_BT, segments_BT)[0].astype(jnp.float32))

    with jax.set_mesh(make_mesh()):
        model = jax.eval_shape(
            lambda: Transformer(
                shape, attention="splash", dtype=jnp.bfloat16, unroll=False, remat=remat, rounds=1, rules=RULES,
                key=jax.random.key(0),
            )
        )  # fmt: skip
        tokens_BT = jnp.zeros((2, LENGTH), jnp.int32, out_sharding=RULES.spec("batch", "length"))
        return primitives(jax.make_jaxpr(jax.grad(loss))(model, tokens_BT).jaxpr)


@pytest.mark.parametrize("remat, products", [("none", 0), ("dots", 0), ("gate", 1), ("feed_forward", 2), ("full", 6)])
def test_what_is_computed_again(remat, products):
    """A layer has 7 products, of which none needs what the last one made; the attention kernel's backward pass has a
    sum that is written as one. That the kernel is not run again can be seen in the compiled program: test_compiled."""
    assert traced(remat)["dot_general"] == 3 * 7 + 1 + products


@pytest.mark.soak
def test_no_policy_changes_a_gradient():
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        model, batch = make_model(LLAMA), put(packed_rows(4), mesh)

        @functools.partial(jax.jit, compiler_options=FAST)
        def gradient(model):
            rows = (batch[name][:, :-1] for name in ("tokens", "segments", "positions"))
            return jax.grad(lambda model: jnp.sum(model(*rows)[0] ** 2))(model)

        remats = ("none", "gate", "feed_forward")  # the others: tests/test_training.py
        first, *others = (jax.tree.leaves(gradient(variant(model, remat=remat))) for remat in remats)
    for gradients in others:
        for found, expected in zip(gradients, first, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
