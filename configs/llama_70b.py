"""Llama 3 70B (arXiv:2407.21783, table 3) on C4 and Wikipedia: the largest model that is planned for.

Command:  llm-jax train --config=configs/llama_70b.py --workdir=DIR --config.data.data_dir=DIR
Hardware: v5p:8x8x8, 512 TPU chips of 95 GiB; every parameter is sharded over all of them
Plan:     --topology=v5p:8x8x8: 86.8 of 95.74 GiB, 11 s a step, 4.1 days, 50,794 chip-hours; by formulas, not run
Time:     not run yet
Result:   not run yet
"""

from llm_jax.config import Checkpoint, Config, Data, Evaluate, Model, Optimizer, Source, Tokenizer, Train


def get_config() -> Config:
    return Config(
        model=Model(
            num_layers=80,
            width=8192,
            num_heads=64,
            num_kv_heads=8,
            feed_forward_width=28_672,
            norm_epsilon=1e-5,
            rope_theta=500_000.0,
            remat="gate",
        ),
        tokenizer=Tokenizer(vocab_size=128_000, train_bytes=2_000_000_000),
        data=Data(
            sources=(
                Source(name="c4/en", weight=0.9),
                Source(name="wikipedia/20230601.en", weight=0.1, split="train[:99%]", held_out="train[99%:]"),
            ),
        ),
        optimizer=Optimizer(peak_learning_rate=1.5e-4, schedule="cosine", warmup_steps=2000),
        # One sequence a chip, 4M tokens a step. A smaller batch would leave chips without a sequence.
        train=Train(steps=33_000, batch_size=512, sequence_length=8192, z_loss=1e-4, loss_chunk=2048),
        checkpoint=Checkpoint(every=250, keep_every=5_000),
        evaluate=Evaluate(every=1000, batch_size=512, subset=512),
    )
