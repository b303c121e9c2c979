"""The tokenizer: a SentencePiece model, trained here or given, identified by the sha256 of its bytes.

Models trained here are lossless: decode(encode(text)) == text for every string but one that holds a literal U+2581
("▁", SentencePiece's own mark for a space), which comes back as a space. Unknown characters become bytes.
"""

import hashlib
import io
import math
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from llm_jax.config import UserError
from llm_jax.data.sources import Documents

UNK, BOS, EOS, PAD = 0, 1, 2, 3
KINDS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}  # TrainerSpec.ModelType
LONGEST_LINE = 16_384  # characters; SentencePiece would drop a longer line (in bytes: 4 times that) without a word
SETTINGS: dict[str, Any] = dict(
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
    add_dummy_prefix=False,
    allow_whitespace_only_pieces=True,
    byte_fallback=True,
    split_digits=True,
    character_coverage=0.9999,
    user_defined_symbols=["\n"],  # the trainer reads lines, so it would never learn one
    unk_id=UNK,
    bos_id=BOS,
    eos_id=EOS,
    pad_id=PAD,
    max_sentence_length=4 * LONGEST_LINE,
    # The result depends on it (sums of floats per thread), so it is not the number of cores.
    num_threads=8,
    minloglevel=2,
)


class Tokenizer:
    """Text to ids and back. `unk`, `bos`, `eos` have the ids 0, 1, 2 always; `pad` has 3 in models trained here.

    Attributes:
      model: the SentencePiece model file's bytes
      sha256: of these bytes, in hex
      kind: "unigram", "bpe", ...
      vocab_size: number of ids
    """

    def __init__(self, model: bytes, name: str = "the tokenizer"):
        """`name` stands for the model in errors."""
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError(f"tokenizer.model_file: {name} is not a SentencePiece model") from error
        self.model = model
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.vocab_size = self.processor.vocab_size()
        self.kind = KINDS[sentencepiece_model_pb2.ModelProto.FromString(model).trainer_spec.model_type]
        ids = {"unk": self.processor.unk_id(), "bos": self.processor.bos_id(), "eos": self.processor.eos_id()}
        if ids != {"unk": UNK, "bos": BOS, "eos": EOS}:
            raise UserError(
                f"tokenizer.model_file: {name} has the special ids {ids} (-1: none) where unk={UNK}, bos={BOS}, "
                f"eos={EOS} are needed; train it again with --unk_id=0 --bos_id=1 --eos_id=2 --pad_id=3, or leave "
                "model_file out"
            )

    def __reduce__(self):
        return Tokenizer, (self.model,)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32 ids of each text, without bos and eos."""
        return self.processor.encode(list(texts), return_type="numpy", num_threads=1)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; bos, eos and pad are left out, bytes that are not UTF-8 become U+FFFD."""
        return self.processor.decode(np.asarray(ids, np.int32).tolist())

    def save(self, path: str | os.PathLike) -> None:
        """Writes the model file; a kill in the middle leaves no half of it."""
        folder = os.path.dirname(os.path.abspath(path))
        os.makedirs(folder, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".tokenizer-", delete=False) as file:
            file.write(self.model)
        os.replace(file.name, path)


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    try:
        with open(path, "rb") as file:
            model = file.read()
    except OSError as error:
        raise UserError(f"tokenizer.model_file={str(path)!r} cannot be read: {error.strerror}") from error
    return Tokenizer(model, name=os.fspath(path))


def train_tokenizer(texts: Iterator[str], *, kind: str, vocab_size: int) -> Tokenizer:
    """Trains on the texts; the same texts and settings give the same bytes on every machine.

    Args:
      texts: documents; they are cut into lines
      kind: "unigram" | "bpe"
      vocab_size: ids in all, with 4 special ones, 256 bytes and the newline

    Raises:
      UserError: the texts are too few for that many pieces, or have more characters than it has room for, or cannot
        be read
    """
    bad_text = []  # SentencePiece turns what the iterator raises into a RuntimeError

    def lines() -> Iterator[str]:
        try:
            for text in texts:
                for line in filter(str.strip, text.split("\n")):
                    yield from (line[i : i + LONGEST_LINE] for i in range(0, len(line), LONGEST_LINE))
        except UserError as error:
            bad_text.append(error)
            raise

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines(), model_writer=model, model_type=kind, vocab_size=vocab_size, **SETTINGS
        )
    except RuntimeError as error:
        if bad_text:
            raise bad_text[0] from error
        if match := re.search(r"Vocabulary size too high.*<= (\d+)", str(error)):
            raise UserError(
                f"tokenizer.vocab_size={vocab_size} is more than the corpus allows: at most {match[1]}; lower it "
                "or give more text (tokenizer.train_bytes, data.sources)"
            ) from error
        if match := re.search(r"required_chars.* (\d+) vs (\d+)", str(error)):
            raise UserError(
                f"tokenizer.vocab_size={vocab_size} has no room for the characters of the corpus; "
                f"set at least {match[2]}"
            ) from error
        if "sentences_.empty()" in str(error):
            raise UserError("data.sources hold no text to train a tokenizer on; give other sources") from error
        raise
    return Tokenizer(model.getvalue())


def sample_texts(
    documents: Sequence[Documents],
    weights: Sequence[float],
    num_bytes: int,
    seed: int,
    skip_bad_documents: bool = False,
) -> Iterator[str]:
    """A sample of about num_bytes of text, shared among the sources by weight; no document comes twice.

    A source that has less than its share gives all it has.
    """
    for source, weight in zip(documents, weights, strict=True):
        quota = num_bytes * weight / sum(weights)
        # Steps of the golden ratio visit every document once, spread evenly, with no permutation to keep in memory.
        n = len(source)
        step = max(1, round(n * 0.6180339887))
        while math.gcd(step, n) > 1:
            step += 1
        i = seed % n
        for _ in range(n):
            if quota <= 0:
                break
            text = source.read_strings([i], skip_bad_documents)[0]
            i = (i + step) % n
            if text is not None:
                quota -= len(text.encode())
                yield text
