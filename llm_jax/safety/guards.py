"""A check that costs nothing and stops a run that is miswired, before it costs anything."""

import math

import numpy as np

from llm_jax.safety.structure import named_leaves


def check_first_step(loss: float, gradient_norms, vocab_size: int) -> None:
    """What must hold of an untrained model, or something is miswired: every parameter of every layer gets a gradient,
    and the loss is that of a guess. Costs nothing: the norms are made for every step anyway."""
    if abs(loss - math.log(vocab_size)) > 1.0:
        raise RuntimeError(
            f"the first loss is {loss:.3f}, but that of a guess is ln {vocab_size} = {math.log(vocab_size):.3f}"
        )
    still = [
        name
        for name, norms in named_leaves(gradient_norms).items()
        # A bias of the keys shifts all scores of a query alike, which softmax does not see: its gradient is rounding.
        # That of a router moves by the load, not by a gradient.
        if not name.endswith(("/bk", "/b_router")) and not np.all(np.asarray(norms) > 0)
    ]
    if still:
        raise RuntimeError(f"these parameters got no gradient in the first step: {', '.join(still)}")
