"""The shape of OLMoE-1B-7B (arXiv:2409.02060): 64 experts of which each token goes to 8, 6.9 billion parameters
and 1.3 billion at work on a token, on 168 billion tokens of C4 and Wikipedia.

Command:  llm-jax train --config=configs/moe_7b.py --workdir=DIR --config.data.data_dir=DIR
Hardware: v5p:4x4x4, 64 TPU chips of 95 GiB; experts over 8 of them, every other parameter over all
Plan:     --topology=v5p:4x4x4: 7.8 of 95.74 GiB, 0.69 s a step, 1.3 days, 1,951 chip-hours; by formulas, not run
Time:     not run yet
Result:   not run yet
"""

from llm_jax.config import Checkpoint, Config, Data, Evaluate, Model, Optimizer, Parallel, Source, Tokenizer, Train


def get_config() -> Config:
    return Config(
        model=Model(
            num_layers=16,
            width=2048,
            num_heads=16,
            head_width=128,
            norm_epsilon=1e-5,
            qk_norm=True,
            pattern=("moe",),
            num_experts=64,
            experts_per_token=8,
            expert_width=1024,
            remat="full",
        ),
        tokenizer=Tokenizer(vocab_size=50_304, train_bytes=2_000_000_000),
        data=Data(
            sources=(
                Source(name="c4/en", weight=0.9),
                Source(name="wikipedia/20230601.en", weight=0.1, split="train[:99%]", held_out="train[99%:]"),
            ),
        ),
        optimizer=Optimizer(peak_learning_rate=4e-4, schedule="cosine", warmup_steps=2000),
        parallel=Parallel(expert=8),
        # 1M tokens a step.
        train=Train(
            steps=160_000,
            batch_size=256,
            sequence_length=4096,
            z_loss=1e-4,
            load_balance_loss=0.01,
            router_z_loss=0.001,
        ),
        checkpoint=Checkpoint(every=500, keep_every=10_000),
        evaluate=Evaluate(every=2000, batch_size=256, subset=512),
    )
