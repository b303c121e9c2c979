import dataclasses
import functools

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import FAMILIES, FAST, LLAMA, VOCAB_SIZE, family, make_mesh, make_model, put

from llm_jax.model import decoding
from llm_jax.model.decoding import Sampling, narrow

LENGTHS = np.array([5, 1, 8, 3], np.int32)  # of the prompts
MAX_TOKENS = 12
NEVER = -1  # an eos that no token is
GREEDY = Sampling(temperature=0.0, eos=NEVER)


def prompts(lengths=LENGTHS, seed=0) -> np.ndarray:
    """[B, P], padded on the left with a token that must not matter."""
    rng = np.random.default_rng(seed)
    tokens_BP = np.full((len(lengths), max(lengths)), 7, np.int32)
    for row, length in zip(tokens_BP, lengths, strict=True):
        row[max(lengths) - length :] = rng.integers(VOCAB_SIZE, size=length)
    return tokens_BP


start = jax.jit(decoding.start, static_argnames="max_tokens", compiler_options=FAST)
extend = jax.jit(decoding.extend, static_argnames=("sampling", "num_tokens"), compiler_options=FAST)


def generate(model, mesh, tokens_BP, lengths_B, sampling, *, num_tokens=MAX_TOKENS, seed=0) -> np.ndarray:
    with jax.set_mesh(mesh):
        state = start(model, *put((tokens_BP, lengths_B), mesh), max_tokens=num_tokens)
        state = extend(model, state, jax.random.key(seed), sampling=sampling, num_tokens=num_tokens)
    return np.asarray(state.tokens_BM)


@functools.partial(jax.jit, compiler_options=FAST)
def all_logits(model, tokens_BT, lengths_B):
    """By the full forward pass, of rows padded on the right."""
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    segments_BT = (positions_BT < lengths_B[:, None]).astype(jnp.int32)
    return model.logits(model(tokens_BT, segments_BT, positions_BT)[0])


@pytest.mark.parametrize("name", FAMILIES)
def test_cached_decoding_equals_the_full_forward_pass(name):
    """At each position, for prompts of different lengths in one batch."""
    model, mesh, num_tokens = family(name), make_mesh(), 6
    tokens_BP = prompts()
    with jax.set_mesh(mesh):
        state = start(model, *put((tokens_BP, LENGTHS), mesh), max_tokens=num_tokens)
        stepwise = [state.logits_BV]
        for _ in range(num_tokens):
            state = extend(model, state, jax.random.key(0), sampling=GREEDY, num_tokens=1)
            stepwise.append(state.logits_BV)
        rows = np.zeros((len(LENGTHS), max(LENGTHS) + num_tokens), np.int32)
        for b, length in enumerate(LENGTHS):
            rows[b, : length + num_tokens] = [*tokens_BP[b, max(LENGTHS) - length :], *np.asarray(state.tokens_BM)[b]]
        full = np.asarray(all_logits(model, *put((rows, LENGTHS + num_tokens), mesh)))
    for b, length in enumerate(LENGTHS):
        for m, logits_BV in enumerate(stepwise):
            expected = full[b, length - 1 + m]
            np.testing.assert_allclose(logits_BV[b], expected, rtol=1e-4, atol=1e-5)
            if m < num_tokens:
                assert np.asarray(state.tokens_BM)[b, m] == np.argmax(expected)


def test_what_lies_in_the_padding_does_not_matter():
    model, mesh, tokens_BP = family("llama"), make_mesh(), prompts()
    other = np.where(np.arange(max(LENGTHS)) < max(LENGTHS) - LENGTHS[:, None], 33, tokens_BP)
    assert (other != tokens_BP).any()
    expected = generate(model, mesh, tokens_BP, LENGTHS, GREEDY)
    np.testing.assert_array_equal(generate(model, mesh, other, LENGTHS, GREEDY), expected)


def test_a_row_has_the_same_tokens_whatever_the_other_rows():
    model, mesh, sampling = family("llama"), make_mesh(), Sampling(temperature=1.5, top_p=0.9, eos=NEVER)
    tokens_BP, others = prompts(), prompts(seed=1)
    others[2] = tokens_BP[2]
    expected = generate(model, mesh, tokens_BP, LENGTHS, sampling)
    result = generate(model, mesh, others, np.array([2, 8, 8, 1], np.int32), sampling)
    np.testing.assert_array_equal(result[2], expected[2])
    assert (result != expected).any()
    alone = generate(model, mesh, tokens_BP[:1, max(LENGTHS) - LENGTHS[0] :], LENGTHS[:1], sampling)  # without padding
    np.testing.assert_array_equal(alone[0], expected[0])


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_one_row_of_any_number_of_groups(num_kv_heads):
    """Dimensions of size 1 must not lose their sharding."""
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        model = make_model(dataclasses.replace(LLAMA, num_heads=4, num_kv_heads=num_kv_heads))
        tokens_BP, lengths_B = put((prompts()[2:3], LENGTHS[2:3]), mesh)
        expected = np.asarray(all_logits(model, tokens_BP, lengths_B))[:, -1]
        np.testing.assert_allclose(start(model, tokens_BP, lengths_B, max_tokens=1).logits_BV, expected, atol=1e-5)


def test_the_seed_decides_and_rows_differ():
    model, mesh, sampling = family("llama"), make_mesh(), Sampling(temperature=1.0, eos=NEVER)
    tokens_BP, lengths = np.full((4, 3), 5, np.int32), np.full(4, 3, np.int32)
    first, again, other = (generate(model, mesh, tokens_BP, lengths, sampling, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert len({tuple(row) for row in first.tolist()}) == 4


def test_a_mesh_changes_nothing():
    mesh = make_mesh(fsdp=4, tensor=2)
    with jax.set_mesh(mesh):
        model = make_model(LLAMA)
    for sampling in (GREEDY, Sampling(temperature=1.0, top_k=20, eos=NEVER)):
        expected = generate(family("llama"), make_mesh(), prompts(), LENGTHS, sampling)
        np.testing.assert_array_equal(generate(model, mesh, prompts(), LENGTHS, sampling), expected)


def test_generation_in_pieces_is_generation_in_one():
    model, mesh, sampling = family("llama"), make_mesh(), Sampling(temperature=1.0, eos=NEVER)
    expected = generate(model, mesh, prompts(), LENGTHS, sampling)
    with jax.set_mesh(mesh):
        state = start(model, *put((prompts(), LENGTHS), mesh), max_tokens=MAX_TOKENS)
        for count in (5, 10, MAX_TOKENS):  # the last call finds room for two only
            state = extend(model, state, jax.random.key(0), sampling=sampling, num_tokens=5)
            assert int(state.count) == count
    np.testing.assert_array_equal(state.tokens_BM, expected)


def test_eos_ends_a_row_and_the_loop_once_all_have_ended():
    model, mesh = family("llama"), make_mesh()
    free = generate(model, mesh, prompts(), LENGTHS, GREEDY)
    eos = int(free[0, 3])
    first = [list(row).index(eos) if eos in row else MAX_TOKENS for row in free]
    sampling = dataclasses.replace(GREEDY, eos=eos)
    stopped = generate(model, mesh, prompts(), LENGTHS, sampling)
    for row, free_row, end in zip(stopped, free, first, strict=True):
        np.testing.assert_array_equal(row[:end], free_row[:end])
        if max(first) == MAX_TOKENS:
            assert (row[end:] == eos).all()
    with jax.set_mesh(mesh):
        state = start(model, *put((prompts()[:1], LENGTHS[:1]), mesh), max_tokens=MAX_TOKENS)
        state = extend(model, state, jax.random.key(0), sampling=sampling, num_tokens=MAX_TOKENS)
    assert int(state.count) == first[0] + 1 < MAX_TOKENS
    assert np.asarray(state.done_B).all()


def test_sampled_frequencies_are_the_probabilities():
    """4096 rows of the same prompt: the first tokens are a sample of softmax(logits / temperature)."""
    model, mesh, num_rows = family("llama"), make_mesh(), 4096
    tokens_BP, lengths = np.full((num_rows, 1), 5, np.int32), np.ones(num_rows, np.int32)
    with jax.set_mesh(mesh):
        state = start(model, *put((tokens_BP, lengths), mesh), max_tokens=1)
        logits_V = np.asarray(state.logits_BV, np.float64)[0]
        state = extend(model, state, jax.random.key(0), sampling=Sampling(temperature=0.5, eos=NEVER), num_tokens=1)
    probability_V = np.exp(logits_V / 0.5) / np.exp(logits_V / 0.5).sum()
    counts_V = np.bincount(np.asarray(state.tokens_BM)[:, 0], minlength=VOCAB_SIZE)
    chi_squared = np.sum((counts_V - num_rows * probability_V) ** 2 / (num_rows * probability_V))
    assert chi_squared < 103.4  # of 63 degrees of freedom: exceeded with probability 0.001


narrowed = jax.jit(narrow, static_argnames=("top_k", "top_p"))


@hypothesis.given(hnp.arrays(np.int32, (2, 12), elements=st.integers(-16, 16)))
@hypothesis.settings(max_examples=50, deadline=None)
@pytest.mark.parametrize("top_k, top_p", [(3, None), (100, None), (None, 0.7), (5, 0.4), (None, 1e-6), (None, None)])
def test_narrow_equals_numpy(top_k, top_p, quarters_BV):
    logits_BV, expected = np.float32(quarters_BV / 4), []  # with many equals
    for logits_V in logits_BV.astype(np.float64):
        kept = np.ones(12, bool)
        if top_k is not None and top_k < 12:
            kept = logits_V >= sorted(logits_V)[-top_k]  # equals at the edge stay
        if top_p is not None:
            probability_V = np.where(kept, np.exp(logits_V), 0) / np.exp(logits_V)[kept].sum()
            order = np.argsort(-probability_V, kind="stable")
            held = np.cumsum(probability_V[order])
            hypothesis.assume(np.abs(held - top_p).min() > 1e-5)  # else rounding decides
            last = order[np.argmax(held >= top_p)]
            kept &= logits_V >= logits_V[last]
        expected.append(np.where(kept, logits_V, -np.inf))
    np.testing.assert_array_equal(narrowed(logits_BV, top_k=top_k, top_p=top_p), np.array(expected, np.float32))
