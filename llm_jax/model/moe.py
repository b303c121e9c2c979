"""Mixture of experts: a feed-forward layer of many experts, of which each token goes to a few (Shazeer et al. 2017,
arXiv:1701.06538). Dropless: every token is computed by all the experts it chose, however unevenly they are chosen.

B batch, T position, D width, F expert width, E experts (within the exchange: those of this device), L layers,
K choices of a token, N tokens (of this device, or within the exchange of all that share its experts),
P (token, choice) pairs in the order of their experts, C pairs of a chunk
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from llm_jax.model.feed_forward import FeedForward
from llm_jax.model.parameter import constant, weight
from llm_jax.parallel.sharding import Rules

# A device computes its experts' pairs in pieces of so many times its even share: mostly one, more where they crowd.
CHUNK_SHARES = 1.25
# Of an expert's pairs, in one matrix product of the gradient of its weights. Fewer are read and written more often than
# computed with, more are padding.
GRADIENT_ROWS = 512


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterSums:
    """Sums over all counted tokens of the batch, float32; of several layers with a leading dimension L."""

    load_E: jax.Array  # (token, choice) pairs that went to each expert
    probability_E: jax.Array
    z: jax.Array  # squares of log(Z), the partition sum of a token's probabilities


def load_balance_loss(sums: RouterSums, experts_per_token: int, num_tokens: jax.Array) -> jax.Array:
    """1 where experts are chosen evenly, up to their number where not (Fedus et al. 2021, arXiv:2101.03961, eq. 4-6).

    Of K choices a token, each counts 1/K. The mean over layers; the gradient flows through the probabilities only.
    """
    share_E = jax.lax.stop_gradient(sums.load_E) / (experts_per_token * num_tokens)
    return jnp.mean(share_E.shape[-1] * jnp.sum(share_E * sums.probability_E / num_tokens, axis=-1))


def router_z_loss(sums: RouterSums, num_tokens: jax.Array) -> jax.Array:
    """Mean log(Z)^2 over tokens and layers: keeps the logits small (Zoph et al. 2022, arXiv:2202.08906, eq. 5)."""
    return jnp.mean(sums.z / num_tokens)


def max_load(sums: RouterSums) -> jax.Array:
    """Load of the fullest expert over the mean load; the mean over layers."""
    return jnp.mean(
        jnp.max(sums.load_E, axis=-1) / jnp.maximum(jnp.mean(sums.load_E, axis=-1), 1 / sums.load_E.shape[-1])
    )


class MixtureOfExperts(nnx.Module):
    """Experts are feed-forward layers without bias: SwiGLU if `gated`, else GELU. Shared experts see every token."""

    def __init__(
        self,
        *,
        width: int,
        expert_width: int,
        num_experts: int,
        experts_per_token: int,
        num_shared_experts: int,
        out_scale: float,
        gated: bool,
        normalize_gates: bool = True,
        dtype: jnp.dtype,
        rules: Rules,
        key: jax.Array,
    ):
        """normalize_gates: the weights of a token's choices sum to 1, if there are several."""
        router_key, gate_key, up_key, down_key, shared_key = jax.random.split(key, 5)
        shape = (num_experts, width, expert_width)
        into = rules.spec("experts", "expert_embed", "feed_forward")
        out = rules.spec("experts", "feed_forward", "expert_embed")
        self.w_router = weight(router_key, (width, num_experts), rules.spec("embed", None), width=width)
        self.b_router = constant(0.0, (num_experts,), jax.P(None))
        self.w_gate = weight(gate_key, shape, into, width=width) if gated else None
        self.w_up = weight(up_key, shape, into, width=width)
        self.w_down = weight(down_key, (num_experts, expert_width, width), out, width=width, scale=out_scale)
        shared = functools.partial(
            FeedForward,
            width=width,
            feed_forward_width=num_shared_experts * expert_width,
            out_scale=out_scale,
            activation="swiglu" if gated else "gelu",
            use_bias=False,
            dtype=dtype,
            rules=rules,
            key=shared_key,
        )
        self.shared = shared() if num_shared_experts else None
        self.experts_per_token = experts_per_token
        # Of a single one the router would learn nothing (Fedus et al. 2021, eq. 2).
        self.normalize_gates = normalize_gates and experts_per_token > 1
        self.dtype = dtype
        self.rules = rules

    def __call__(self, x_BTD: jax.Array, counted_BT: jax.Array, spec: jax.P) -> tuple[jax.Array, RouterSums]:
        """The result is sharded as `spec`: the sequence as between layers, or, in decoding, not at all.

        x_BTD has its sequence sharded as within a layer, in decoding not at all. counted_BT (float32) is 1 for tokens
        and 0 for padding, which is in no sum and goes to no routed expert: alike as it is, all would crowd one.

        Tokens are exchanged over the devices that share the experts: each gathers the tokens of all, computes those
        that chose its experts, and the results are summed back to where the tokens came from.
        """
        rules = self.rules
        sequence_sharded = spec[1] is not None
        length = "length" if sequence_sharded else None
        token_axes = rules.batch + (rules.length if sequence_sharded else ())
        into = [weight_EDF[...] for weight_EDF in (self.w_gate, self.w_up) if weight_EDF is not None]

        def shard(x_BTD, counted_BT, w_router_DE, b_router_E, into, w_down_EFD):
            x_ND, counted_N = x_BTD.reshape(-1, x_BTD.shape[-1]), counted_BT.reshape(-1)
            w_router_DE = jax.lax.all_gather(w_router_DE, rules.embed, axis=0, tiled=True)
            choice_NK, gate_NK, sums = _route(
                x_ND, counted_N, w_router_DE, b_router_E, self.experts_per_token, self.normalize_gates
            )

            # Cast first: half the bytes to gather. A remat policy can name `all_gather` to have this done again in the
            # backward pass instead of keeping each layer's weights and exchanged tokens until then.
            into = [_gather(w_EDF.astype(self.dtype), rules.expert_embed, axis=1) for w_EDF in into]
            w_down_EFD = _gather(w_down_EFD.astype(self.dtype), rules.expert_embed, axis=2)
            chunk = math.ceil(CHUNK_SHARES * choice_NK.size)
            x_ND, gate_NK, choice_NK = (_gather(a, rules.experts, axis=0) for a in (x_ND, gate_NK, choice_NK))
            first = jax.lax.axis_index(rules.experts) * w_down_EFD.shape[0]
            pair_P, end_E = _sort(choice_NK - first, w_down_EFD.shape[0])
            out_ND = _experts(min(chunk, pair_P.size), x_ND, gate_NK, (*into, w_down_EFD), pair_P, end_E)

            out_BTD = out_ND.reshape(-1, *x_BTD.shape[1:])
            if sequence_sharded:
                out_BTD = jax.lax.psum_scatter(out_BTD, rules.feed_forward, scatter_dimension=1, tiled=True)
            else:
                out_BTD = jax.lax.psum(out_BTD, rules.feed_forward)
            out_BTD = jax.lax.psum_scatter(out_BTD, rules.experts, scatter_dimension=0, tiled=True)
            return out_BTD, jax.lax.psum(sums, token_axes)

        in_specs = (
            rules.spec("batch", length, None),
            rules.spec("batch", length),
            rules.spec("embed", None),
            jax.P(None),
            rules.spec("experts", "expert_embed", "feed_forward"),
            rules.spec("experts", "feed_forward", "expert_embed"),
        )
        out_BTD, sums = jax.shard_map(shard, in_specs=in_specs, out_specs=(spec, jax.P()), check_vma=False)(
            x_BTD,
            jax.reshard(counted_BT, rules.spec("batch", length)),
            self.w_router[...],
            self.b_router[...],
            into,
            self.w_down[...],
        )
        return out_BTD if self.shared is None else out_BTD + self.shared(x_BTD, spec), sums


def _gather(array, axes, *, axis):
    return jax.lax.all_gather(array, axes, axis=axis, tiled=True)


def _route(x_ND, counted_N, w_router_DE, b_router_E, experts_per_token, normalize_gates):
    """(choice_NK: experts, -1 for padding; gate_NK: their weights; the sums of these tokens)."""
    # The default precision of a TPU or GPU would round the factors, and with them the choice.
    logits_NE = jnp.einsum("ND,DE->NE", x_ND.astype(jnp.float32), w_router_DE, precision=jax.lax.Precision.HIGHEST)
    probability_NE = jax.nn.softmax(logits_NE)
    # The bias evens out the load without a loss, so it has a say in the choice only (Wang et al. 2024,
    # arXiv:2408.15664; DeepSeek-V3, arXiv:2412.19437, section 2.1.2).
    _, choice_NK = jax.lax.top_k(jax.lax.stop_gradient(probability_NE + b_router_E), experts_per_token)
    gate_NK = jnp.take_along_axis(probability_NE, choice_NK, axis=1)
    if normalize_gates:
        gate_NK /= jnp.sum(gate_NK, axis=1, keepdims=True)
    chosen_NKE = jax.nn.one_hot(choice_NK, logits_NE.shape[1])
    sums = RouterSums(
        load_E=jnp.sum(counted_N[:, None, None] * chosen_NKE, axis=(0, 1)),
        probability_E=jnp.sum(counted_N[:, None] * probability_NE, axis=0),
        z=jnp.sum(counted_N * jax.nn.logsumexp(logits_NE, axis=1) ** 2),
    )
    return jnp.where(counted_N[:, None] > 0, choice_NK, -1), gate_NK, sums


def _sort(local_NK, num_experts):
    """Which pairs (indices into local_NK, flat) go to this device's experts 0 to num_experts.

    (pair_P: in the order of their experts; end_E: where those of each expert end). P is the most there can be.
    """
    local_P = jnp.where((local_NK >= 0) & (local_NK < num_experts), local_NK, num_experts).reshape(-1)
    expert_P, pair_P = jax.lax.sort((local_P, jnp.arange(local_P.size)), num_keys=1)
    end_E = jnp.searchsorted(expert_P, jnp.arange(num_experts), side="right").astype(jnp.int32)
    num_tokens, num_choices = local_NK.shape
    return pair_P[: num_tokens * min(num_choices, num_experts)], end_E


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _experts(chunk, x_ND, gate_NK, weights, pair_P, end_E):
    """The gate-weighted sum of each token's experts, of those on this device; weights: ([w_gate,] w_up, w_down).

    `chunk` pairs are computed at a time, as often as there are pairs: memory is bounded and no token dropped. The
    backward pass has only the inputs and computes each chunk again.
    """

    def add_chunk(i, out_ND):
        pair_C, token_C, sizes_E = _chunk(i, chunk, gate_NK, pair_P, end_E)
        y_CD = _chunk_of_experts(_rows(x_ND, token_C), _rows(gate_NK.reshape(-1), pair_C), weights, sizes_E)
        return out_ND.at[token_C].add(y_CD, mode="drop")

    return jax.lax.fori_loop(0, -(-end_E[-1] // chunk), add_chunk, jnp.zeros_like(x_ND))


def _experts_forward(chunk, *inputs):
    return _experts(chunk, *inputs), inputs


def _experts_backward(chunk, inputs, d_out_ND):
    x_ND, gate_NK, weights, pair_P, end_E = inputs
    gate_P = gate_NK.reshape(-1)

    def add_chunk(i, gradients):
        d_x_ND, d_gate_P, d_weights = gradients
        pair_C, token_C, sizes_E = _chunk(i, chunk, gate_NK, pair_P, end_E)
        compute = functools.partial(_chunk_of_experts, sizes_E=sizes_E)
        _, pullback = jax.vjp(compute, _rows(x_ND, token_C), _rows(gate_P, pair_C), weights)
        d_x_CD, d_gate_C, d_chunk_weights = pullback(_rows(d_out_ND, token_C))
        return (
            d_x_ND.at[token_C].add(d_x_CD, mode="drop"),
            d_gate_P.at[pair_C].set(d_gate_C, mode="drop"),
            jax.tree.map(jnp.add, d_weights, d_chunk_weights),
        )

    start = jax.tree.map(jnp.zeros_like, (x_ND, gate_P, weights))
    d_x_ND, d_gate_P, d_weights = jax.lax.fori_loop(0, -(-end_E[-1] // chunk), add_chunk, start)
    return d_x_ND, d_gate_P.reshape(gate_NK.shape), d_weights, None, None


_experts.defvjp(_experts_forward, _experts_backward)


def _chunk(i, chunk, gate_NK, pair_P, end_E):
    """(pair_C, token_C, sizes_E: how many of them each expert has). What is beyond the last pair is out of bounds."""
    position_C = i * chunk + jnp.arange(chunk)
    pair_C = pair_P.at[position_C].get(mode="clip")
    pair_C = jnp.where(position_C < end_E[-1], pair_C, gate_NK.size)
    sizes_E = jnp.diff(jnp.clip(end_E - i * chunk, 0, chunk), prepend=0)
    return pair_C, pair_C // gate_NK.shape[1], sizes_E


def _rows(array, index_C):
    return array.at[index_C].get(mode="fill", fill_value=0)


def _chunk_of_experts(x_CD, gate_C, weights, sizes_E):
    *into, w_down_EFD = weights
    # ragged_dot promises nothing for the rows behind the last group.
    has_expert_C = jnp.arange(x_CD.shape[0]) < jnp.sum(sizes_E)
    projected = [jnp.where(has_expert_C[:, None], _expert_dot(x_CD, w_EDF, sizes_E), 0) for w_EDF in into]
    hidden_CF = jax.nn.silu(projected[0]) * projected[1] if len(into) == 2 else jax.nn.gelu(projected[0])
    # Weighted here, not behind the contraction: the gradient of the gate then needs no third contraction again.
    hidden_CF = (hidden_CF * gate_C[:, None]).astype(hidden_CF.dtype)
    return _expert_dot(hidden_CF, w_down_EFD, sizes_E)


@jax.custom_vjp
def _expert_dot(x_CD, w_EDF, sizes_E):
    """Each row times the matrix of its expert: the first sizes_E[0] rows have expert 0, and so on."""
    return jax.lax.ragged_dot(x_CD, w_EDF, sizes_E)


def _expert_dot_forward(x_CD, w_EDF, sizes_E):
    return _expert_dot(x_CD, w_EDF, sizes_E), (x_CD, w_EDF, sizes_E)


def _expert_dot_backward(inputs, d_y_CF):
    """Without this XLA's TPU compiler (libtpu 0.0.42) multiplies all rows, masked, for the weights of each expert."""
    x_CD, w_EDF, sizes_E = inputs
    rows = min(GRADIENT_ROWS, x_CD.shape[0])

    def of_expert(bounds):
        start, end = bounds

        def add_rows(i, d_w_DF):
            first = start + i * rows
            offset = jnp.minimum(first, x_CD.shape[0] - rows)
            index_C = offset + jnp.arange(rows)
            mine_C = (index_C >= first) & (index_C < end)
            part_CD = jnp.where(mine_C[:, None], jax.lax.dynamic_slice_in_dim(x_CD, offset, rows), 0)
            d_part_CF = jax.lax.dynamic_slice_in_dim(d_y_CF, offset, rows)
            return d_w_DF + jnp.einsum("CD,CF->DF", part_CD, d_part_CF, preferred_element_type=jnp.float32)

        zeros_DF = jnp.zeros(w_EDF.shape[1:], jnp.float32)
        return jax.lax.fori_loop(0, -(-(end - start) // rows), add_rows, zeros_DF).astype(w_EDF.dtype)

    end_E = jnp.cumsum(sizes_E)
    d_w_EDF = jax.lax.map(of_expert, (end_E - sizes_E, end_E))
    return jax.lax.ragged_dot(d_y_CF, w_EDF.swapaxes(1, 2), sizes_E), d_w_EDF, None


_expert_dot.defvjp(_expert_dot_forward, _expert_dot_backward)
