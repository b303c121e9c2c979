"""`llm-jax evaluate --text`: the perplexity of any text, as papers report it: by sliding windows."""

import json
import math
import pathlib
import re

import jax

from llm_jax.config import Config, Source, UserError
from llm_jax.data.sources import open_documents
from llm_jax.jobs.prepare import cache_dir
from llm_jax.jobs.scores import score, windows
from llm_jax.jobs.workdir import Workdir, mesh_for_reading, restore_parameters, start, write_atomically
from llm_jax.parallel import hosts

TFDS = "tfds:"


def run(
    config: Config,
    workdir: str,
    *,
    text: str,
    as_json: bool,
    step: int | None,
    batch_size: int | None,
    ema: bool,
    stride: int | None,
    length: int | None,
    wikitext: bool,
) -> None:
    """Prints the measures and writes WORKDIR/evaluate_text.json. text: a file, or tfds:NAME/SPLIT."""
    texts = read_texts(text, config)
    start(config)
    work = Workdir(workdir)
    tokenizer = work.load_tokenizer()
    mesh = mesh_for_reading(config, tokenizer.vocab_size)
    with jax.set_mesh(mesh):
        step, model = restore_parameters(work, config, tokenizer, mesh, step=step, ema=ema)
        length = longest(work, config, length)
        stride = stride or max(1, length // 2)
        if stride > length:
            raise UserError(f"--stride={stride} must not exceed the {length} tokens of a window; see --length")
        shown = [detokenized(text) for text in texts] if wikitext else texts
        rows = [
            row
            for ids in tokenizer.encode(shown)
            for row in windows([tokenizer.bos, *ids.tolist()], length, stride)
            if row.scored
        ]
        found = score(
            model,
            rows,
            mesh=mesh,
            batch_size=batch_size or config.evaluate.batch_size,
            chunk=config.train.loss_chunk,
        )
    nll, tokens = math.fsum(score.nll for score in found), sum(row.scored for row in rows)
    result = {"step": step, "text": text, "length": length, "stride": stride, "wikitext": wikitext}
    result |= measures(nll, tokens, texts)
    if hosts.is_first():
        written = json.dumps(result, indent=2)
        write_atomically(work.path / "evaluate_text.json", (written + "\n").encode())
        work.push(work.path / "evaluate_text.json")
        print(written if as_json else "\n".join(f"{name:16}{_shown(value)}" for name, value in result.items()))


def _shown(value) -> str:
    return f"{value:,.4f}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)


def measures(nll: float, tokens: int, texts: list[str]) -> dict[str, float]:
    """Words, separated by white space, and bytes are those of the texts as they were given."""
    words, num_bytes = sum(len(text.split()) for text in texts), sum(len(text.encode()) for text in texts)
    return {
        "loss": nll / tokens,
        "perplexity": math.exp(min(nll / tokens, 700.0)),  # what a float can hold
        "word_perplexity": math.exp(min(nll / words, 700.0)),
        "bits_per_byte": nll / math.log(2) / num_bytes,
        "tokens": tokens,
        "words": words,
        "bytes": num_bytes,
    }


def read_texts(text: str, config: Config) -> list[str]:
    """Of a file one text; of a split of a tfds dataset one for each document. UserError if there is no word in it."""
    if text.startswith(TFDS):
        name, slash, split = text.removeprefix(TFDS).rpartition("/")
        if not slash:
            raise UserError(f"--text={text} names no split; write it as --text=tfds:NAME/SPLIT")
        documents = open_documents(
            Source(name=name), split, data_dir=config.data.data_dir, cache_dir=cache_dir(config.data)
        )
        read = documents.read_strings(range(len(documents)), config.data.skip_bad_documents)
        texts = [document for document in read if document]
    else:
        try:
            texts = [pathlib.Path(text).expanduser().read_bytes().decode("utf-8")]
        except UnicodeDecodeError as error:
            raise UserError(f"--text={text} is not UTF-8: {error.reason} at byte {error.start}; convert it") from error
        except OSError as error:
            raise UserError(
                f"--text={text} cannot be read: {error.strerror}; give a file, or tfds:NAME/SPLIT"
            ) from error
    if not any(text.split() for text in texts):
        raise UserError(f"--text={text} holds no word; give another one")
    return texts


def longest(work: Workdir, config: Config, wanted: int | None) -> int:
    """Tokens that a prediction may see: as wanted, or those of the longest rows of training, here or before."""
    length = config.train.sequence_length
    if work.imported.exists():
        before = json.loads(work.imported.read_text("utf-8"))["config"].get("max_position_embeddings", length)
        length = max(before, length) if work.metrics.exists() else before
    if wanted and config.model.position == "learned" and wanted > length:
        raise UserError(f"--length={wanted} exceeds the {length} learned positions of the model")
    return wanted or length


# WikiText has punctuation, contractions and the parts of numbers apart, and marks the last ones (Merity et al. 2016,
# arXiv:1609.07843, section 4). Models of text as it is written are measured on text without that (Radford et al. 2019,
# section 3.1): what this leaves apart, or joins wrongly, costs them something.
JOINED = [
    (re.compile(r" @([-,.])@ "), r"\1"),
    (re.compile(r"(?<==) (?==)"), ""),
    (re.compile(r'" ([^"\n]*?) "'), r'"\1"'),
    (re.compile(r"(?<= )' ([^'\n]*?) '(?= )"), r"'\1'"),
    (re.compile(r" (n't|'(?:s|re|ve|ll|d|m))\b"), r"\1"),
    (re.compile(r" '(?= )"), "'"),
    (re.compile(r"([(\[{]) "), r"\1"),
    (re.compile(r" ([)\]}])"), r"\1"),
    (re.compile(r" ([.,:;!?])(?=\s|$|[\"')\]}])"), r"\1"),
    (re.compile(r" *\n *"), "\n"),
]


def detokenized(text: str) -> str:
    """The text of WikiText as it was written, as far as that can be told."""
    for pattern, replacement in JOINED:
        text = pattern.sub(replacement, text)
    return text
