"""The shape of Llama 3.2 1B (Meta, 2024), 1.2 billion parameters with tied embeddings, on 26 billion tokens of C4 and
Wikipedia.

Command:  llm-jax train --config=configs/llama_1b.py --workdir=DIR --config.data.data_dir=DIR
Hardware: v5e:4x4, 16 TPU chips of 16 GiB; every parameter is sharded over all of them
Plan:     --topology=v5e:4x4: 13.7 of 15.75 GiB, 2.5 s a step, 1.4 days, 551 chip-hours; by formulas, not run
Time:     not run yet
Result:   not run yet
"""

from llm_jax.config import Checkpoint, Config, Data, Evaluate, Model, Optimizer, Source, Tokenizer, Train


def get_config() -> Config:
    return Config(
        model=Model(
            num_layers=16,
            width=2048,
            num_heads=32,
            num_kv_heads=8,
            head_width=64,
            feed_forward_width=8192,
            norm_epsilon=1e-5,
            rope_theta=500_000.0,
            tie_embeddings=True,
            remat="gate",
        ),
        tokenizer=Tokenizer(vocab_size=128_000, train_bytes=2_000_000_000),
        data=Data(
            sources=(
                Source(name="c4/en", weight=0.9),
                Source(name="wikipedia/20230601.en", weight=0.1, split="train[:99%]", held_out="train[99%:]"),
            ),
        ),
        optimizer=Optimizer(peak_learning_rate=4e-4, schedule="cosine", warmup_steps=2000),
        # 0.5M tokens a step. By the formulas one microbatch would need 23 GiB.
        train=Train(steps=50_000, batch_size=128, microbatches=2, sequence_length=4096, z_loss=1e-4, loss_chunk=2048),
        checkpoint=Checkpoint(every=500, keep_every=10_000),
        evaluate=Evaluate(every=1000, batch_size=128, subset=512),
    )
