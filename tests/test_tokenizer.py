import io
import pickle

import hypothesis
import pytest
import sentencepiece
from hypothesis import strategies
from tiny_corpus import TOPICS, write_corpus

from llm_jax.config import Source, UserError
from llm_jax.data.sources import open_documents
from llm_jax.data.tokenizer import BOS, EOS, PAD, UNK, Tokenizer, load_tokenizer, sample_texts, train_tokenizer

HARD = [
    "",
    " ",
    "  two  spaces  ",
    "\n\n\n",
    "tab\there\r\nand CRLF\r\n",
    "nul\0byte, bell\a, escape\x1b[0m",
    "e\u0301 is not \u00e9",
    "non-breaking\u00a0space, \u3000 and \u200b",
    "日本語 العربية हिन्दी 👩‍👩‍👧‍👦 🏳️‍🌈",
    "1234567890 0x7fffffff",
    "<s> </s> <unk> <pad> <0x41>",
    "\ufffd \ufeff \U0010ffff",
    "x" * 100_000,
]


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def tokenizer(request):
    return train_tokenizer(iter(TOPICS), kind=request.param, vocab_size=800)


def foreign_model(**settings) -> bytes:
    model = io.BytesIO()
    lines = iter("\n".join(TOPICS[:10]).split("\n"))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, vocab_size=200, minloglevel=2, **settings
    )
    return model.getvalue()


def test_ids_and_kind(tokenizer):
    model = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    assert (model.unk_id(), model.bos_id(), model.eos_id(), model.pad_id()) == (UNK, BOS, EOS, PAD) == (0, 1, 2, 3)
    assert tokenizer.vocab_size == model.get_piece_size() == 800
    assert tokenizer.kind in ("unigram", "bpe")


@pytest.mark.parametrize("text", HARD, ids=ascii)
def test_round_trip(tokenizer, text):
    (ids,) = tokenizer.encode([text])
    assert ids.dtype == "int32" and UNK not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([BOS, *ids, EOS, PAD]) == text


def test_round_trip_of_real_text(tokenizer):
    encoded = tokenizer.encode(TOPICS)
    assert [tokenizer.decode(ids) for ids in encoded] == TOPICS
    assert sum(len(text.encode()) for text in TOPICS) / sum(map(len, encoded)) > 2.3  # bytes a token


@hypothesis.settings(
    max_examples=200, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(text=strategies.text().filter(lambda text: "\u2581" not in text))
def test_round_trip_of_anything(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode([text])[0]) == text


def test_the_one_loss(tokenizer):
    assert tokenizer.decode(tokenizer.encode(["a\u2581b"])[0]) == "a b"


def test_the_same_texts_give_the_same_model(tokenizer):
    again = train_tokenizer(iter(TOPICS), kind=tokenizer.kind, vocab_size=800)
    assert again.model == tokenizer.model and again.sha256 == tokenizer.sha256
    assert train_tokenizer(iter(TOPICS[1:]), kind=tokenizer.kind, vocab_size=800).sha256 != tokenizer.sha256


def test_a_line_of_any_length_is_learned_from():
    line = " ".join(" ".join(TOPICS).split())[:300_000]
    cut = train_tokenizer(iter([line]), kind="bpe", vocab_size=800)
    assert len(line.encode()) / len(cut.encode([line])[0]) > 2.3


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new" / "folder.model")
    loaded = load_tokenizer(tmp_path / "new" / "folder.model")
    assert loaded.model == tokenizer.model and loaded.sha256 == tokenizer.sha256
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["folder.model"]
    assert (
        pickle.loads(pickle.dumps(tokenizer)).encode(["some text"])[0].tolist()
        == tokenizer.encode(["some text"])[0].tolist()
    )


def test_a_vocabulary_larger_than_the_corpus_allows():
    with pytest.raises(
        UserError, match="tokenizer.vocab_size=50000 is more than the corpus allows: at most "
    ) as raised:
        train_tokenizer(iter(TOPICS[:20]), kind="unigram", vocab_size=50_000)
    largest = int(str(raised.value).split("at most ")[1].split(";")[0])
    assert train_tokenizer(iter(TOPICS[:20]), kind="unigram", vocab_size=largest).vocab_size == largest


def test_a_vocabulary_too_small_for_the_characters():
    with pytest.raises(
        UserError, match="tokenizer.vocab_size=262 has no room for the characters of the corpus; set at least "
    ):
        train_tokenizer(iter(TOPICS), kind="bpe", vocab_size=262)


def test_no_text_at_all():
    with pytest.raises(UserError, match="no text to train a tokenizer on"):
        train_tokenizer(iter(["", " \n "]), kind="unigram", vocab_size=300)


def test_a_given_model_needs_our_special_ids(tmp_path):
    with pytest.raises(UserError, match=r"special ids {'unk': 0, 'bos': -1, 'eos': 2}"):
        Tokenizer(foreign_model(bos_id=-1))
    with pytest.raises(UserError, match=r"special ids {'unk': 2, 'bos': 0, 'eos': 1}"):
        Tokenizer(foreign_model(unk_id=2, bos_id=0, eos_id=1))
    llama = Tokenizer(foreign_model(byte_fallback=False, pad_id=-1, model_type="bpe"))  # the ids of Llama 2
    assert llama.decode(llama.encode(["the name"])[0]) == "the name"


def test_a_given_file_that_is_no_model(tmp_path):
    (tmp_path / "text").write_text("no model")
    with pytest.raises(UserError, match="tokenizer.model_file: .*text is not a SentencePiece model"):
        load_tokenizer(tmp_path / "text")
    with pytest.raises(UserError, match="tokenizer.model_file='.*absent' cannot be read: No such file"):
        load_tokenizer(tmp_path / "absent")


def test_sample_is_weighted_and_never_repeats(tmp_path):
    first, second = [f"a{i:03} " * 250 for i in range(100)], [f"b{i:03} " * 25 for i in range(1000)]
    write_corpus(tmp_path, {"train": first, "validation": second})
    documents = [
        open_documents(Source(name="tiny"), split, data_dir=str(tmp_path), cache_dir="unused")
        for split in ("train", "validation")
    ]
    sample = list(sample_texts(documents, [3, 1], 80_000, seed=5))
    sizes = [sum(len(text) for text in sample if text[0] == letter) for letter in "ab"]
    assert abs(sizes[0] - 60_000) < 1250 and abs(sizes[1] - 20_000) < 125
    assert len(set(sample)) == len(sample)
    assert sample == list(sample_texts(documents, [3, 1], 80_000, seed=5))
    assert sample != list(sample_texts(documents, [3, 1], 80_000, seed=6))
    everything = sorted(sample_texts(documents, [1, 1], 10**9, seed=0))
    assert everything == sorted(first + second)
