"""The optimizer: one optax chain."""

import jax
import optax

from llm_jax import config
from llm_jax.training.schedule import make_schedule


def make_optimizer(optimizer: config.Optimizer, total_steps: int) -> optax.GradientTransformationExtraArgs:
    """Clipping by global norm, then AdamW, Adafactor, Lion or SGD with decoupled weight decay on matrices only.

    update(gradient, state, parameters, step=...) takes the number of batches before this one, which gives the learning
    rate: an update that was skipped counts there, and in no moment.

    AdamW: Loshchilov & Hutter 2017, arXiv:1711.05101. Adafactor: Shazeer & Stern 2018, arXiv:1804.04235 (no momentum
    and no parameter scaling: the learning rate is the schedule's). Lion: Chen et al. 2023, arXiv:2302.06675.
    """
    o = optimizer
    if o.name == "adamw":
        scale = optax.scale_by_adam(b1=o.beta1, b2=o.beta2, eps=o.epsilon)
    elif o.name == "adafactor":
        scale = optax.chain(optax.scale_by_factored_rms(min_dim_size_to_factor=32), optax.clip_by_block_rms(1.0))
    elif o.name == "lion":
        scale = optax.scale_by_lion(b1=o.beta1, b2=o.beta2)
    else:
        scale = optax.trace(decay=o.beta1)
    clip = optax.identity() if o.clip_norm is None else optax.clip_by_global_norm(o.clip_norm)
    decay = optax.add_decayed_weights(o.weight_decay, mask=is_matrix)
    return optax.chain(clip, scale, decay, _scale_by_schedule(make_schedule(o, total_steps)))


def _scale_by_schedule(schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """As optax.scale_by_learning_rate, which would count its own updates instead of taking `step`."""

    def update(updates, state, params=None, *, step, **_):
        rate = schedule(step)
        return jax.tree.map(lambda update: -rate * update, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


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
