"""A GPT of 6.8M parameters for benchmarks/train.py: the size at which CPU figures of several libraries are known.

The shape of nanoGPT without biases, so that PyTorch can be given the same. No data: its batches are random tokens.
"""

from llm_jax.config import Config, Model, Optimizer, Tokenizer, Train


def get_config() -> Config:
    return Config(
        model=Model(
            num_layers=6,
            width=256,
            num_heads=8,
            activation="gelu",
            norm="layernorm",
            norm_epsilon=1e-5,
            position="learned",
            tie_embeddings=True,
        ),
        tokenizer=Tokenizer(vocab_size=8192),
        optimizer=Optimizer(peak_learning_rate=3e-4, schedule="constant", warmup_steps=0),
        train=Train(batch_size=16, sequence_length=256),
    )
