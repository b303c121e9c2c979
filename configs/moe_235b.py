"""The shape of Qwen3-235B-A22B (arXiv:2505.09388): 128 experts of which each token goes to 8, 235 billion
parameters and 22 billion at work on a token, on C4 and Wikipedia. The load is evened out by a bias, without a loss.

Command:  llm-jax train --config=configs/moe_235b.py --workdir=DIR --config.data.data_dir=DIR
Hardware: v5p:8x8x8, 512 TPU chips of 95 GiB; experts over 8 of them, every other parameter over all
Plan:     --topology=v5p:8x8x8: 20.8 of 95.74 GiB, 6.2 s a step, 4.3 days, 52,581 chip-hours; by formulas, not run
Time:     not run yet
Result:   not run yet
"""

from llm_jax.config import Checkpoint, Config, Data, Evaluate, Model, Optimizer, Parallel, Source, Tokenizer, Train


def get_config() -> Config:
    return Config(
        model=Model(
            num_layers=94,
            width=4096,
            num_heads=64,
            num_kv_heads=4,
            head_width=128,
            qk_norm=True,
            rope_theta=1_000_000.0,
            pattern=("moe",),
            num_experts=128,
            experts_per_token=8,
            expert_width=1536,
            remat="full",
        ),
        tokenizer=Tokenizer(vocab_size=128_000, train_bytes=2_000_000_000),
        data=Data(
            sources=(
                Source(name="c4/en", weight=0.9),
                Source(name="wikipedia/20230601.en", weight=0.1, split="train[:99%]", held_out="train[99%:]"),
            ),
        ),
        optimizer=Optimizer(peak_learning_rate=2e-4, schedule="cosine", warmup_steps=2000),
        parallel=Parallel(expert=8),
        # 4M tokens a step.
        train=Train(
            steps=60_000,
            batch_size=1024,
            sequence_length=4096,
            z_loss=1e-4,
            load_balance_loss=0.0,
            router_bias_rate=0.001,
        ),  # fmt: skip
        checkpoint=Checkpoint(every=250, keep_every=5_000),
        evaluate=Evaluate(every=1000, batch_size=1024, subset=512),
    )
