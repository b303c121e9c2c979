"""Tokenizers from and to the files of Hugging Face."""

import json
import pathlib
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from llm_jax.config import UserError
from llm_jax.data.tokenizer import Tokenizer, imported, load_tokenizer, with_exact_sums

FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja",
)  # fmt: skip
SPACE = "\u2581"
Piece = sentencepiece_model_pb2.ModelProto.SentencePiece


def read(folder: pathlib.Path, config: dict, vocab_size: int) -> Tokenizer:
    """The tokenizer of a model with this config.json and so many rows in its table."""
    if (folder / "tokenizer.json").exists():
        files = {name: (folder / name).read_text("utf-8") for name in FILES if (folder / name).exists()}
        import tokenizers

        tokenizer = tokenizers.Tokenizer.from_str(files["tokenizer.json"])
        settings = json.loads(files.get("tokenizer_config.json", "{}"))
        ids = {name: _special_id(name, tokenizer, settings, config) for name in ("bos", "eos")}
        eos = ids["eos"]
        if eos is None:
            raise UserError(f"{folder}: neither tokenizer_config.json nor config.json says which token ends a document")
        most = max(tokenizer.get_vocab().values()) + 1
        if most > vocab_size:
            raise UserError(f"{folder}: the tokenizer has {most} ids, but config.json has vocab_size={vocab_size}")
        bos = ids["bos"] if ids["bos"] is not None else eos
        return imported(files, vocab_size=vocab_size, bos=bos, eos=eos)
    if (folder / "tokenizer.model").exists():
        found = load_tokenizer(folder / "tokenizer.model")
        if found.vocab_size != vocab_size:
            raise UserError(
                f"{folder}: tokenizer.model has {found.vocab_size} ids, but config.json has vocab_size={vocab_size}; "
                "save the tokenizer as tokenizer.json"
            )
        return found
    raise UserError(
        f"{folder} has no tokenizer.json or tokenizer.model; save it by "
        "transformers.AutoTokenizer.from_pretrained(...).save_pretrained(...)"
    )


def _special_id(name: str, tokenizer, settings: dict, config: dict) -> int | None:
    token = settings.get(f"{name}_token")
    token = token["content"] if isinstance(token, dict) else token
    if token is not None and tokenizer.token_to_id(token) is not None:
        return tokenizer.token_to_id(token)
    found = config.get(f"{name}_token_id")
    return found[0] if isinstance(found, list) else found


def write(tokenizer: Tokenizer, to: pathlib.Path) -> str | None:
    """The files from which transformers.AutoTokenizer makes one with the same ids; or how these may differ."""
    for name, text in (tokenizer.files() or from_sentencepiece(tokenizer.model)).items():
        (to / name).write_text(text, "utf-8")
    if tokenizer.files() or with_exact_sums(tokenizer.model) == tokenizer.model:
        return None
    return "where two ways to cut a text are equally likely, the exported tokenizer may take the other one"


def from_sentencepiece(model: bytes) -> dict[str, str]:
    """{file name: text} of a tokenizer with the same ids. UserError for what only SentencePiece can do."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    normalizer, trainer = proto.normalizer_spec, proto.trainer_spec
    if trainer.model_type not in (1, 2):
        raise UserError("tokenizer: only SentencePiece models of the kinds unigram and bpe have a counterpart")
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces or trainer.treat_whitespace_as_suffix:
        raise UserError(
            f"tokenizer: its normalisation ({normalizer.name}, remove_extra_whitespaces="
            f"{normalizer.remove_extra_whitespaces}) has no exact counterpart; models trained here have none"
        )
    pieces = list(proto.pieces)
    steps: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
    if normalizer.add_dummy_prefix:
        steps.insert(0, {"type": "Prepend", "prepend": SPACE})
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if normalizer.add_dummy_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    added = [
        {
            "id": i, "content": piece.piece, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": piece.type != Piece.USER_DEFINED,
        }
        for i, piece in enumerate(pieces)
        if piece.type in (Piece.UNKNOWN, Piece.CONTROL, Piece.USER_DEFINED)
    ]  # fmt: skip
    bos, eos, unk = (pieces[i].piece for i in (trainer.bos_id, trainer.eos_id, trainer.unk_id))
    single = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": single,
            "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [trainer.bos_id], "tokens": [bos]}},
        },
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _unigram(pieces, trainer) if trainer.model_type == 1 else _bpe(pieces, trainer),
    }
    settings = {
        # By its name, or the class of the model's family would build another one.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "unk_token": unk,
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # a text that holds "<s>" is text, as in SentencePiece
    }
    if trainer.pad_id >= 0:
        settings["pad_token"] = pieces[trainer.pad_id].piece
    return {
        "tokenizer.json": json.dumps(tokenizer, ensure_ascii=False, indent=1) + "\n",
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
    }


def _unigram(pieces: list, trainer) -> dict[str, Any]:
    # In SentencePiece only normal pieces are found in texts; here all are, so the others get a score that never wins.
    never = 1e3 * min(piece.score for piece in pieces) - 1e3
    vocab = [[piece.piece, piece.score if piece.type == Piece.NORMAL else never] for piece in pieces]
    return {"type": "Unigram", "unk_id": trainer.unk_id, "vocab": vocab, "byte_fallback": trainer.byte_fallback}


def _bpe(pieces: list, trainer) -> dict[str, Any]:
    # SentencePiece merges any two neighbours that make a piece, that of the best score first.
    normal = {piece.piece: piece.score for piece in pieces if piece.type == Piece.NORMAL}
    merges = []
    for piece in sorted(normal, key=lambda piece: -normal[piece]):
        cuts = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        merges += [[left, right] for left, right in cuts if left in normal and right in normal]
    return {
        "type": "BPE",
        "unk_token": pieces[trainer.unk_id].piece,
        "fuse_unk": True,
        "byte_fallback": trainer.byte_fallback,
        "ignore_merges": False,
        "vocab": {piece.piece: i for i, piece in enumerate(pieces)},
        "merges": merges,
    }
