"""Learning-rate schedules: step (updates finished so far) -> learning rate."""

import optax

from llm_jax import config


def make_schedule(optimizer: config.Optimizer, total_steps: int) -> optax.Schedule:
    """Linear warm-up from 0 to the peak over warmup_steps, then to the end of the run:

    - cosine: half a cosine to final_fraction of the peak (Loshchilov & Hutter 2016, arXiv:1608.03983)
    - linear: a line to final_fraction of the peak
    - wsd: constant, then a line over the last decay_steps (warmup-stable-decay, Hu et al. 2024, arXiv:2404.06395)
    - rsqrt: peak * sqrt(warmup_steps / step) (Vaswani et al. 2017, arXiv:1706.03762)
    - constant
    The first update (step 0) already moves: the warm-up reaches 1 / warmup_steps of the peak there.
    """
    peak, warmup = optimizer.peak_learning_rate, optimizer.warmup_steps
    final = peak * optimizer.final_fraction
    rest = total_steps - warmup
    if optimizer.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, optimizer.final_fraction)
    elif optimizer.schedule == "linear":
        after = optax.linear_schedule(peak, final, rest)
    elif optimizer.schedule == "wsd":
        decay = optimizer.decay_steps or max(1, total_steps // 10)
        after = optax.linear_schedule(peak, final, decay, transition_begin=rest - decay)
    elif optimizer.schedule == "rsqrt":
        after = lambda step: peak * (warmup / (warmup + step)) ** 0.5
    else:
        after = optax.constant_schedule(peak)
    if not warmup:
        return after
    rise = optax.linear_schedule(peak / warmup, peak, warmup - 1) if warmup > 1 else optax.constant_schedule(peak)
    return optax.join_schedules([rise, after], [warmup])
