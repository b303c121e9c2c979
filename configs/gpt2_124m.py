"""GPT-2 small, 124M parameters (Radford et al. 2019), on C4: its shape by plain switches, today's data and schedule.

10 billion tokens in sequences of 1024. Its vocabulary of 50,257 becomes 50,304 SentencePiece pieces, a multiple of 128.

Command:  llm-jax train --config=configs/gpt2_124m.py --workdir=DIR --config.data.data_dir=DIR
Hardware: one host with 8 accelerators of 16 GiB or more
Plan:     --topology=v5e:2x4: 10.7 of 15.75 GiB, 0.49 s a step, 2.7 hours, 22 chip-hours; by formulas, not run
Time:     not run yet
Result:   not run yet
"""

from llm_jax.config import Checkpoint, Config, Data, Evaluate, Model, Optimizer, Source, Tokenizer, Train


def get_config() -> Config:
    return Config(
        model=Model(
            num_layers=12,
            width=768,
            num_heads=12,
            activation="gelu",
            norm="layernorm",
            norm_epsilon=1e-5,
            position="learned",
            use_bias=True,
            tie_embeddings=True,
        ),
        tokenizer=Tokenizer(kind="bpe", vocab_size=50_304, train_bytes=1_000_000_000),
        data=Data(sources=(Source(name="c4/en"),)),
        optimizer=Optimizer(peak_learning_rate=6e-4, schedule="cosine", warmup_steps=700),
        # 0.5M tokens a step, in parts that fit into 16 GiB.
        train=Train(steps=20_000, batch_size=512, sequence_length=1024, microbatches=4),
        checkpoint=Checkpoint(every=1000),
        evaluate=Evaluate(every=1000, batch_size=256, subset=1024),
    )
