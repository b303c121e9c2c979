"""Spikes against numpy's median."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.training.spikes import History, accept, empty, spike

accept, spike = jax.jit(accept), jax.jit(spike)


def is_far_above(value: float, window: list[float], threshold: float) -> bool:
    middle = np.median(window)
    deviation = max(1.4826 * np.median(np.abs(np.asarray(window) - middle)), 1e-3 * middle)
    return bool(np.isfinite(value) and value > middle + threshold * deviation)


def series(rng, length: int) -> np.ndarray:
    """float32 [length, 2]: a falling loss and a gradient norm, with outliers up and down, NaN and infinity."""
    values = np.exp(rng.normal(scale=0.1, size=(length, 2))) * np.linspace(5, 3, length)[:, None]
    odd = rng.random((length, 2))
    values = np.where(odd < 0.1, values * rng.choice([0.1, 1.5, 3, 30], size=values.shape), values)
    values[odd > 0.97] = np.nan
    values[odd > 0.985] = np.inf
    return values.astype(np.float32)


@pytest.mark.parametrize("window, threshold", [(8, 3.0), (9, 3.0), (64, 10.0)])
def test_equals_numpy_on_random_series(window, threshold):
    rng = np.random.default_rng(window)
    found, kept = [], []
    history = empty(window)
    for loss, grad_norm in series(rng, 300):
        recent = kept[-window:]
        full = len(recent) == window
        expected = full and any(
            is_far_above(value, [update[i] for update in recent], threshold)
            for i, value in enumerate((loss, grad_norm))
        )
        found.append(bool(spike(history, loss, grad_norm, threshold)))
        assert found[-1] == expected
        keep = bool(np.isfinite([loss, grad_norm]).all()) and not found[-1]
        history = accept(history, loss, grad_norm, keep)
        kept += [(loss, grad_norm)] if keep else []
        for values_W, i in ((history.loss_W, 0), (history.grad_norm_W, 1)):
            filled = [update[i] for update in kept[-window:]]
            np.testing.assert_array_equal(np.sort(values_W), np.sort(np.pad(filled, (0, window - len(filled)))))
        assert history.count == len(kept)
    assert 3 < sum(found) < 150 and len(kept) > 2 * window


def full_history(losses, grad_norms):
    return History(jnp.float32(losses), jnp.float32(grad_norms), jnp.int32(len(losses)))


def test_only_upwards_and_only_what_is_finite():
    rng = np.random.default_rng(0)
    history = full_history(rng.normal(3, 0.1, 16), rng.normal(1, 0.1, 16))
    cases = {(3, 1): False, (9, 1): True, (3, 9): True, (0, 1): False, (3, 0): False, (0, 0): False,
             (np.nan, 1): False, (np.inf, 1): False, (3, np.inf): False, (3, np.nan): False}  # fmt: skip
    assert {case: bool(spike(history, *map(jnp.float32, case), 10.0)) for case in cases} == cases


def test_a_window_that_is_not_full_has_no_spikes():
    history = empty(8)
    for _ in range(7):
        history = accept(history, jnp.float32(1), jnp.float32(1), True)
    assert not spike(history, jnp.float32(1e9), jnp.float32(1e9), 10.0)
    history = accept(history, jnp.float32(1), jnp.float32(1), True)
    assert spike(history, jnp.float32(1e9), jnp.float32(1), 10.0)


def test_equal_values_leave_a_margin_of_a_thousandth_per_deviation():
    history = full_history(np.full(8, 2.0), np.full(8, 2.0))
    assert not spike(history, jnp.float32(2.0199), jnp.float32(2), 10.0)
    assert spike(history, jnp.float32(2.0201), jnp.float32(2), 10.0)
