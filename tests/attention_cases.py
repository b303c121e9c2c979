"""Rows of documents to attend in, and what attention makes of them, forward and backward."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from tiny_model import RULES


def packed(*, batch, length, num_heads, num_kv_heads, head_width, order=None, dtype=jnp.float32, segments=None):
    """(q_BTNH, k_BSKH, v_BSKH), segments_BS, a weight of each result. Several documents a row, and padding behind."""
    rng = np.random.default_rng(0)
    q, weights = (rng.normal(size=(batch, length, num_heads, head_width)).astype(np.float32) for _ in range(2))
    k, v = (rng.normal(size=(batch, length, num_kv_heads, head_width)).astype(np.float32) for _ in range(2))
    if segments is None:
        segments = np.sort(rng.integers(1, 5, size=(batch, length)), axis=1).astype(np.int32)
        segments[:, length - length // 5 :] = 0
    weights *= (segments > 0)[:, :, None, None]
    at = slice(None) if order is None else order
    return [jnp.asarray(x[:, at], dtype) for x in (q, k, v)], segments[:, at], weights[:, at]


def value_and_gradients(attend, arrays, segments, weights):
    def total(q, k, v):
        out_BTNH = attend(q, k, v, segments_BT=segments, key_segments_BS=segments)
        return jnp.sum(out_BTNH.astype(jnp.float32) * weights), out_BTNH

    gradients, out = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(*arrays)
    return [np.asarray(x, np.float64) for x in (out, *gradients)]


def sharded(attend):
    """`attend` of arrays that lie as it wants them, whatever they come as."""

    def run(q_BTNH, k_BSKH, v_BSKH, *, segments_BT, key_segments_BS):
        spec, key_spec = RULES.spec("batch", "length", "heads", None), RULES.spec("batch", None, "heads", None)
        out_BTNH = attend(
            jax.reshard(q_BTNH, spec), jax.reshard(k_BSKH, key_spec), jax.reshard(v_BSKH, key_spec),
            segments_BT=jax.reshard(segments_BT, jax.P(*spec[:2])),
            key_segments_BS=jax.reshard(key_segments_BS, jax.P(*key_spec[:2])),
        )  # fmt: skip
        assert jax.typeof(out_BTNH).sharding.spec == jax.typeof(jax.reshard(q_BTNH, spec)).sharding.spec
        return jax.reshard(out_BTNH, jax.P(None, None, None, None))

    return run


@dataclasses.dataclass(frozen=True)
class Case:
    row: dict  # of packed
    window: int | None


@st.composite
def document_ids(draw, length: int) -> np.ndarray:
    """[T]: documents of any lengths, and mostly padding (0) behind them."""
    cuts = draw(st.sets(st.integers(1, length - 1), max_size=8)) if length > 1 else set()
    starts = np.zeros(length, np.int32)
    starts[[0, *cuts]] = 1
    segments = np.cumsum(starts, dtype=np.int32)
    segments[draw(st.integers(1, length)) :] = 0
    return segments


@st.composite
def cases(draw, lengths, head_widths) -> Case:
    batch, length, kv_heads = draw(st.integers(1, 2)), draw(lengths), draw(st.integers(1, 2))
    return Case(
        row=dict(
            batch=batch, length=length, num_heads=kv_heads * draw(st.integers(1, 3)), num_kv_heads=kv_heads,
            head_width=draw(head_widths), dtype=draw(st.sampled_from([jnp.float32, jnp.bfloat16])),
            segments=np.stack([draw(document_ids(length)) for _ in range(batch)]),
        ),
        window=draw(st.none() | st.integers(1, length + 1)),
    )  # fmt: skip


def require_equal(case: Case, attend, reference) -> None:
    """Of values and gradients: in bfloat16 up to its rounding, against float32 of the same numbers."""
    arrays, segments, weights = packed(**case.row)
    exact = [jnp.asarray(x, jnp.float32) for x in arrays]
    expected = value_and_gradients(reference, exact, segments, weights)
    got = value_and_gradients(attend, arrays, segments, weights)
    tolerance = 4 * 2**-8 if case.row["dtype"] == jnp.bfloat16 else 1e-5  # bfloat16 keeps 8 bits
    counted = segments > 0  # what padding gets is of no use; gradients reach it by no way
    got[0], expected[0] = got[0][counted], expected[0][counted]
    for values, want in zip(got, expected, strict=True):
        np.testing.assert_allclose(values, want, atol=tolerance * max(1, np.abs(want).max()), rtol=1e-4)
