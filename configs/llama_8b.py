"""Llama 3 8B (arXiv:2407.21783, table 3) on C4 and Wikipedia: 160 billion tokens, Chinchilla's 20 a parameter.

That is a little less than all of C4 once, and English Wikipedia about four times, each time in another order.

Command:  llm-jax train --config=configs/llama_8b.py --workdir=DIR --config.data.data_dir=DIR
Hardware: v5p:4x4x4, 64 TPU chips of 95 GiB; every parameter is sharded over all of them
Plan:     --topology=v5p:4x4x4: 52.1 of 95.74 GiB, 2.5 s a step, 4.5 days, 6,835 chip-hours; by formulas, not run
Time:     not run yet
Result:   not run yet
"""

from llm_jax.config import Checkpoint, Config, Data, Evaluate, Model, Optimizer, Source, Tokenizer, Train


def get_config() -> Config:
    return Config(
        model=Model(
            num_layers=32,
            width=4096,
            num_heads=32,
            num_kv_heads=8,
            feed_forward_width=14_336,
            norm_epsilon=1e-5,
            rope_theta=500_000.0,
            remat="dots",
        ),
        tokenizer=Tokenizer(vocab_size=128_000, train_bytes=2_000_000_000),
        data=Data(
            sources=(
                Source(name="c4/en", weight=0.9),
                Source(name="wikipedia/20230601.en", weight=0.1, split="train[:99%]", held_out="train[99%:]"),
            ),
        ),
        optimizer=Optimizer(peak_learning_rate=3e-4, schedule="cosine", warmup_steps=2000),
        # 1M tokens a step
        train=Train(steps=153_000, batch_size=128, sequence_length=8192, z_loss=1e-4, loss_chunk=2048),
        checkpoint=Checkpoint(every=500, keep_every=10_000),
        evaluate=Evaluate(every=2000, batch_size=128, subset=512),
    )
