"""The optimizer: one optax chain.

D width, N heads, H head width, F feed-forward width, L layers
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from llm_jax import config
from llm_jax.training.schedule import make_schedule


def make_optimizer(optimizer: config.Optimizer, total_steps: int) -> optax.GradientTransformationExtraArgs:
    """Clipping by global norm, then AdamW, Adafactor, Lion, SGD or Muon with decoupled weight decay on matrices only.

    update(gradient, state, parameters, step=...) takes the number of batches before this one, which gives the learning
    rate: an update that was skipped counts there, and in no moment.

    AdamW: Loshchilov & Hutter 2017, arXiv:1711.05101. Adafactor: Shazeer & Stern 2018, arXiv:1804.04235 (no momentum
    and no parameter scaling: the learning rate is the schedule's). Lion: Chen et al. 2023, arXiv:2302.06675. Muon, of
    the matrices of the blocks, and AdamW of all else: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon,
    with updates as large as AdamW's, so that its learning rates will do: Liu et al. 2025, arXiv:2502.16982.

    Moments are kept in optimizer.moment_dtype, rounded to nearest, and computed in float32.
    """
    o = optimizer
    dtype = jnp.dtype(o.moment_dtype)
    if o.name == "adamw":
        scale = _scale_by_adam(o, dtype)
    elif o.name == "adafactor":
        scale = optax.chain(optax.scale_by_factored_rms(min_dim_size_to_factor=32), optax.clip_by_block_rms(1.0))
    elif o.name == "lion":
        scale = optax.scale_by_lion(b1=o.beta1, b2=o.beta2, mu_dtype=dtype)
    elif o.name == "muon":
        by_name = {"muon": _scale_by_muon(dtype), "adamw": _scale_by_adam(o, dtype)}
        scale = optax.partition(by_name, _muon_or_adamw)
    else:
        scale = optax.trace(decay=o.beta1, accumulator_dtype=dtype)
    clip = optax.identity() if o.clip_norm is None else optax.clip_by_global_norm(o.clip_norm)
    decay = optax.add_decayed_weights(o.weight_decay, mask=is_matrix)
    return optax.chain(clip, scale, decay, _scale_by_schedule(make_schedule(o, total_steps)))


def _scale_by_schedule(schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """As optax.scale_by_learning_rate, which would count its own updates instead of taking `step`."""

    def update(updates, state, params=None, *, step, **_):
        rate = schedule(step)
        return jax.tree.map(lambda update: -rate * update, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _scale_by_adam(o: config.Optimizer, dtype: jnp.dtype) -> optax.GradientTransformation:
    """optax.scale_by_adam, whose own mu_dtype is that of the first moment only."""
    adam = optax.scale_by_adam(b1=o.beta1, b2=o.beta2, eps=o.epsilon)

    def stored(state: optax.ScaleByAdamState, dtype) -> optax.ScaleByAdamState:
        return state._replace(mu=optax.tree.cast(state.mu, dtype), nu=optax.tree.cast(state.nu, dtype))

    def update(updates, state, params=None):
        updates, state = adam.update(updates, stored(state, jnp.float32), params)
        return updates, stored(state, dtype)

    return optax.GradientTransformation(lambda params: stored(adam.init(params), dtype), update)


MUON_MOMENTUM = 0.95  # as wherever it has been used
MUON_RMS = 0.2  # of an update's elements: AdamW's, by arXiv:2502.16982, section 2.2
# Which of its dimensions, from behind, make the rows and the columns of a weight's matrix; those before are a stack.
MATRICES = {
    "wq": MuonDimensionNumbers((-3,), (-2, -1)),  # [..., D, N, H]
    "wk": MuonDimensionNumbers((-3,), (-2, -1)),
    "wv": MuonDimensionNumbers((-3,), (-2, -1)),
    "wo": MuonDimensionNumbers((-3, -2), (-1,)),  # [..., N, H, D]
    "w_gate": MuonDimensionNumbers((-2,), (-1,)),  # [..., D, F]
    "w_up": MuonDimensionNumbers((-2,), (-1,)),
    "w_down": MuonDimensionNumbers((-2,), (-1,)),
}


def _muon_or_adamw(parameters):
    def label(path, _):
        return "muon" if names(path)[-1] in MATRICES else "adamw"

    return jax.tree_util.tree_map_with_path(label, parameters)


def _scale_by_muon(dtype: jnp.dtype) -> optax.GradientTransformation:
    """Momentum, made orthogonal matrix by matrix, with elements of the size of AdamW's."""

    def dimensions(updates):
        return jax.tree_util.tree_map_with_path(lambda path, _: MATRICES[names(path)[-1]], updates)

    muon = scale_by_muon(beta=MUON_MOMENTUM, mu_dtype=dtype, weight_dimension_numbers=dimensions)

    def resize(path, update):
        matrix = MATRICES[names(path)[-1]]
        sides = [math.prod(update.shape[axis] for axis in axes) for axes in matrix]
        return MUON_RMS * math.sqrt(max(sides)) * update

    def orthogonal(updates, state):
        # Its matrices are products of themselves, five times over: in bfloat16 where that is fast. CPUs ignore it.
        with jax.default_matmul_precision("BF16_BF16_F32"):
            updates, state = muon.update(updates, state)
        return jax.tree_util.tree_map_with_path(resize, updates), state

    def update(updates, state, params=None):
        if jax.sharding.get_abstract_mesh().empty:
            return orthogonal(updates, state)
        # optax does not say how its products are to be sharded: the compiler may.
        specs = jax.tree.map(lambda leaf: jax.typeof(leaf).sharding.spec, (updates, state))
        automatic: Callable = jax.sharding.auto_axes(orthogonal, out_sharding=specs)
        return automatic(updates, state)

    return optax.GradientTransformation(muon.init, update)


def names(path) -> list[str]:
    """The names of the attributes that lead to a parameter."""
    return [key.name for key in path if hasattr(key, "name") and key.name != "value"]


def is_matrix(parameters):
    """A tree of bools: True for weights and embeddings, False for norm scales and biases, told by their names.

    By name, not by rank: stacked norms have two dimensions, and biases of heads three.
    """

    def by_name(path, _):
        name = names(path)[-1]
        return not (name == "scale" or name == "bias" or name.startswith("b"))

    return jax.tree_util.tree_map_with_path(by_name, parameters)
