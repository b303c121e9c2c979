"""The model that benchmarks/train.py --against=torch runs is the same one: equal losses, update for update."""

import importlib

import jax
import numpy as np
import pytest
from conftest import ROOT
from numpy.testing import assert_allclose

from llm_jax.config import Config, Model, Optimizer, Tokenizer, Train, to_dict
from llm_jax.jobs.setup import Program
from llm_jax.parallel import hosts

torch = pytest.importorskip("torch", reason="needs PyTorch, which no extra installs")


def test_equal_losses(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    train, torch_gpt = (importlib.import_module(name) for name in ("train", "torch_gpt"))
    device = jax.devices()[0]
    monkeypatch.setattr(jax, "devices", lambda: [device])
    monkeypatch.setattr(hosts, "start", lambda *args, **options: None)  # JAX runs already
    config = Config(
        model=Model(
            num_layers=2, width=32, num_heads=4, activation="gelu", norm="layernorm", norm_epsilon=1e-5,
            position="learned", tie_embeddings=True, dtype="float32",
        ),
        tokenizer=Tokenizer(vocab_size=300),
        # The clipping and the decay have an effect.
        optimizer=Optimizer(
            peak_learning_rate=1e-2, warmup_steps=0, schedule="constant", weight_decay=0.5, clip_norm=0.1
        ),
        train=Train(batch_size=4, sequence_length=32),
    )  # fmt: skip
    ours, theirs = train.Training(), torch_gpt.Torch()
    ours.make(to_dict(config), str(tmp_path))
    options = train.argparse.Namespace(torch_compile=False)
    made = theirs.make(train.torch_sizes(config), train.torch_training(config, "float32", options))

    # From the same parameters, and the first batch, on.
    program = Program(config, 300)
    with jax.set_mesh(program.mesh):
        state = jax.jit(program.init)()
    assert made["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(state.parameters))
    copy_parameters(state.parameters, theirs.model)
    ours.leaves = jax.tree.leaves(state)
    theirs.optimizer.state.clear()
    ours.count = theirs.count = 0
    losses = [(ours.steps(1)["loss"], theirs.steps(1)["loss"]) for _ in range(6)]
    assert_allclose(*zip(*losses, strict=True), rtol=2e-4)
    assert losses[4][0] < losses[0][0] - 0.1  # of the same batch: the updates have done something


def copy_parameters(ours, theirs) -> None:
    def put(target, *values) -> None:
        value = np.concatenate([np.asarray(value) for value in values])
        assert tuple(target.shape) == value.shape
        with torch.no_grad():
            target.copy_(torch.from_numpy(value))

    width = ours.shape.width
    put(theirs.embed.weight, ours.embed[...])
    put(theirs.position.weight, ours.position_embed[...])
    put(theirs.norm.weight, ours.final_norm.scale[...])
    blocks, attention, feed_forward = ours.blocks, ours.blocks.attention, ours.blocks.feed_forward
    for i, block in enumerate(theirs.blocks):
        put(block.qkv.weight, *(w[...][i].reshape(width, width).T for w in (attention.wq, attention.wk, attention.wv)))
        put(block.out.weight, attention.wo[...][i].reshape(width, width).T)
        put(block.up.weight, feed_forward.w_up[...][i].T)
        put(block.down.weight, feed_forward.w_down[...][i].T)
        put(block.norm1.weight, blocks.attention_norm.scale[...][i])
        put(block.norm2.weight, blocks.feed_forward_norm.scale[...][i])
