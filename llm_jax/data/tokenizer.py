"""The tokenizer: a SentencePiece model, trained here or given, or one imported from Hugging Face; identified by the
sha256 of its bytes.

Models trained here are lossless: decode(encode(text)) == text for every string but one that holds a literal U+2581
("▁", SentencePiece's own mark for a space), which comes back as a space. Unknown characters become bytes.
"""

import hashlib
import io
import json
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
FORMAT = "llm_jax: tokenizer imported from Hugging Face, version 1"
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
    """Text to ids and back.

    Attributes:
      model: the file's bytes: a SentencePiece model, or a record of the files of a tokenizer of Hugging Face (see
        imported)
      sha256: of these bytes, in hex
      kind: "unigram", "bpe", ...
      vocab_size: number of ids
      bos, eos: ids of the beginning and the end of a document; in models trained here, 1 and 2. They may be the same
    """

    def __init__(self, model: bytes, name: str = "the tokenizer"):
        """`name` stands for the model in errors."""
        self.model = model
        self.sha256 = hashlib.sha256(model).hexdigest()
        self._text = _HuggingFace(model, name) if model.startswith(b"{") else _SentencePiece(model, name)
        self.kind, self.vocab_size = self._text.kind, self._text.vocab_size
        self.bos, self.eos = self._text.bos, self._text.eos

    def __reduce__(self):
        return Tokenizer, (self.model,)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32 ids of each text, without bos and eos. No text becomes one of these, not even their names."""
        return self._text.encode(list(texts))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; bos, eos and pad are left out, bytes that are not UTF-8 become U+FFFD."""
        return self._text.decode(np.asarray(ids, np.int32).tolist())

    def files(self) -> dict[str, str]:
        """Those of the Hugging Face tokenizer it was imported from, by name; empty for a SentencePiece model."""
        return self._text.files

    def save(self, path: str | os.PathLike) -> None:
        """Writes the model file; a kill in the middle leaves no half of it."""
        folder = os.path.dirname(os.path.abspath(path))
        os.makedirs(folder, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".tokenizer-", delete=False) as file:
            file.write(self.model)
        os.replace(file.name, path)


class _SentencePiece:
    files: dict[str, str] = {}

    def __init__(self, model: bytes, name: str):
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError(f"tokenizer.model_file: {name} is not a SentencePiece model") from error
        self.vocab_size = self.processor.vocab_size()
        self.kind = KINDS[sentencepiece_model_pb2.ModelProto.FromString(model).trainer_spec.model_type]
        self.bos, self.eos = BOS, EOS
        ids = {"unk": self.processor.unk_id(), "bos": self.processor.bos_id(), "eos": self.processor.eos_id()}
        if ids != {"unk": UNK, "bos": BOS, "eos": EOS}:
            raise UserError(
                f"tokenizer.model_file: {name} has the special ids {ids} (-1: none) where unk={UNK}, bos={BOS}, "
                f"eos={EOS} are needed; train it again with --unk_id=0 --bos_id=1 --eos_id=2 --pad_id=3, or leave "
                "model_file out"
            )

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        return self.processor.encode(texts, return_type="numpy", num_threads=1)

    def decode(self, ids: list[int]) -> str:
        return self.processor.decode(ids)


class _HuggingFace:
    def __init__(self, model: bytes, name: str):
        try:
            import tokenizers
        except ModuleNotFoundError as error:
            raise UserError(
                f"{name} comes from Hugging Face and needs {error.name}; install it with: pip install 'llm-jax[hf]'"
            ) from error
        record = json.loads(model)
        if record.get("format") != FORMAT:
            raise UserError(f"tokenizer.model_file: {name} is no SentencePiece model and no imported tokenizer")
        self.files = record["files"]
        self.kind = json.loads(self.files["tokenizer.json"])["model"].get("type", "unknown").lower()
        self.vocab_size, self.bos, self.eos = record["vocab_size"], record["bos"], record["eos"]
        self.tokenizer = tokenizers.Tokenizer.from_str(self.files["tokenizer.json"])
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        # One by one: its batches use all cores, and `prepare` runs a process on each already.
        return [np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, np.int32) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def imported(files: dict[str, str], *, vocab_size: int, bos: int, eos: int) -> Tokenizer:
    """From the files of a Hugging Face tokenizer by their names; tokenizer.json says what it does.

    vocab_size: that of the model, which may have more rows than there are tokens.
    """
    record = {"format": FORMAT, "vocab_size": vocab_size, "bos": bos, "eos": eos, "files": files}
    return Tokenizer(json.dumps(record, ensure_ascii=False, indent=1).encode())


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
    return Tokenizer(with_exact_sums(model.getvalue()))


def with_exact_sums(model: bytes) -> bytes:
    """With the scores of unigram pieces rounded to 1/64, so that their float32 sums are exact up to 2^18 nats a text.

    Of two ways to cut a text that are equally likely, such as the same pieces in another order, SentencePiece would
    take the one that rounding favours, and no other implementation could tell which that is.
    """
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    if KINDS[proto.trainer_spec.model_type] != "unigram":
        return model
    for piece in proto.pieces:
        piece.score = round(piece.score * 64) / 64
    return proto.SerializeToString()


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
