"""A GPT of 42M parameters for benchmarks/train.py: as tiny.py, wider, deeper and longer, with a real vocabulary."""

from llm_jax.config import Config, Model, Optimizer, Tokenizer, Train


def get_config() -> Config:
    return Config(
        model=Model(
            num_layers=8,
            width=512,
            num_heads=8,
            activation="gelu",
            norm="layernorm",
            norm_epsilon=1e-5,
            position="learned",
            tie_embeddings=True,
        ),
        tokenizer=Tokenizer(vocab_size=32_000),
        optimizer=Optimizer(peak_learning_rate=3e-4, schedule="constant", warmup_steps=0),
        train=Train(batch_size=8, sequence_length=512),
    )
