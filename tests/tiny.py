"""A config that a core trains in a second or two, on the datasets that conftest.py writes."""

from llm_jax.config import Checkpoint, Config, Data, Evaluate, Log, Model, Optimizer, Source, Tokenizer, Train


def get_config() -> Config:
    return Config(
        model=Model(num_layers=2, width=32, num_heads=4, num_kv_heads=2, dtype="float32"),
        tokenizer=Tokenizer(vocab_size=400, train_bytes=100_000),
        data=Data(sources=(Source(name="tiny", weight=0.75), Source(name="other", weight=0.25))),
        optimizer=Optimizer(peak_learning_rate=1e-2, warmup_steps=4),
        train=Train(steps=24, batch_size=8, sequence_length=32),
        checkpoint=Checkpoint(every=4),
        evaluate=Evaluate(every=8, subset=16),
        log=Log(sample_tokens=8),
    )
