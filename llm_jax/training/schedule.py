"""Learning-rate schedules: step (updates finished so far) -> learning rate of the next update."""

import optax

from llm_jax import config


def make_schedule(optimizer: config.Optimizer, total_steps: int) -> optax.Schedule:
    """Counted in updates, 1 to total_steps: a line from 0 that reaches the peak at update warmup_steps, and then

    - cosine: half a cosine to final_fraction of the peak (Loshchilov & Hutter 2016, arXiv:1608.03983)
    - linear: a line to final_fraction of the peak
    - wsd: constant, then a line over the last decay_steps (warmup-stable-decay, Hu et al. 2024, arXiv:2404.06395)
    - rsqrt: peak * sqrt(warmup_steps / update) (Vaswani et al. 2017, arXiv:1706.03762)
    - constant

    The last update is made with final_fraction of the peak, the first one already moves.
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
        after = lambda updates: peak * (warmup / (warmup + updates)) ** 0.5  # noqa: E731
    else:
        after = optax.constant_schedule(peak)
    by_update = optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup]) if warmup else after
    return lambda step: by_update(step + 1)
