"""A 10M-parameter Llama on Common Crawl (C4) and Wikipedia, 70/30, small enough for a CPU.

Both are the tfds datasets of those names, prepared as ArrayRecord; say where they lie by --config.data.data_dir=DIR or
by the environment variable TFDS_DATA_DIR.

Command:  llm-jax train --config=configs/web_wiki_small.py --workdir=runs/web_wiki_small --config.data.data_dir=DIR
Hardware: 2 CPU cores, 4 GiB
Time:     32 minutes, the cores being busy with other work, too
Result:   perplexity 239.0 on C4 (2.205 bits per byte), 221.8 on Wikipedia (2.234), on the small samples named in README
"""

from llm_jax.config import Checkpoint, Config, Data, Evaluate, Model, Optimizer, Source, Tokenizer, Train


def get_config() -> Config:
    return Config(
        model=Model(num_layers=8, width=288, num_heads=6, num_kv_heads=3, tie_embeddings=True),
        tokenizer=Tokenizer(vocab_size=8192, train_bytes=4_000_000),
        data=Data(
            sources=(
                Source(name="c4/en", weight=0.7),
                # The Wikipedia of tfds has no validation split: its last 1 % of articles are held out.
                Source(name="wikipedia/20230601.en", weight=0.3, split="train[:99%]", held_out="train[99%:]"),
            ),
        ),
        optimizer=Optimizer(peak_learning_rate=1.5e-3, schedule="cosine", warmup_steps=50),
        train=Train(steps=300, batch_size=16, sequence_length=256),
        checkpoint=Checkpoint(every=100),
        evaluate=Evaluate(every=100),
    )
