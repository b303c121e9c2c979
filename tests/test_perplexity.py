"""`llm-jax evaluate --text`: sliding windows, against one forward pass for each token."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from conftest import CONFIG
from test_evaluate import all_logits
from tiny_corpus import TOPICS
from tiny_model import LLAMA, VOCAB_SIZE, make_mesh, make_model

from llm_jax.data.tokenizer import load_tokenizer
from llm_jax.flags import load_config_file
from llm_jax.jobs.perplexity import detokenized
from llm_jax.jobs.scores import Row, losses, score, windows
from llm_jax.jobs.workdir import Workdir, restore_parameters

LENGTH = 32  # of tests/tiny.py
TEXT = TOPICS[31][:400] + " é\r\n"


@pytest.fixture
def evaluate(tiny, trained, tmp_path, monkeypatch, capsys):
    """The result of the command, run in this process."""

    def run(*flags: str, code: int = 0) -> dict | str:
        found = tiny.main(monkeypatch, "evaluate", trained, "--json", *flags, num_devices=1)
        out = capsys.readouterr()
        assert found == code, out.err
        return out.err if code else json.loads(out.out)

    yield run
    (trained / "evaluate_text.json").unlink(missing_ok=True)


@pytest.fixture(scope="module")
def nll_of(trained):
    """nll_of(ids): of the last id, given the others, by the full softmax."""
    tokenizer, mesh = load_tokenizer(trained / "tokenizer.model"), make_mesh()
    config = load_config_file(str(CONFIG))
    with jax.set_mesh(mesh):
        _, model = restore_parameters(Workdir(trained), config, tokenizer, mesh, step=None)

    def nll(ids: list[int]) -> float:
        tokens, is_text = np.zeros((2, 1, LENGTH), np.int32)
        tokens[0, : len(ids) - 1], is_text[0, : len(ids) - 1] = ids[:-1], 1
        with jax.set_mesh(mesh):
            logits_V = np.asarray(all_logits(model, tokens, is_text), np.float64)[0, len(ids) - 2]
        return float(np.log(np.sum(np.exp(logits_V))) - logits_V[ids[-1]])

    return nll


@pytest.mark.parametrize("flags, length, stride", [((), 32, 16), (("--stride=5", "--length=12"), 12, 5)])
def test_equals_one_forward_pass_for_each_token(flags, length, stride, evaluate, nll_of, trained, tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes(TEXT.encode())
    found = evaluate(f"--text={file}", *flags)
    assert json.loads((trained / "evaluate_text.json").read_text()) == found
    ids = [1, *load_tokenizer(trained / "tokenizer.model").encode([TEXT])[0].tolist()]
    assert len(ids) > 3 * length
    total = 0.0
    for target in range(1, len(ids)):
        window = max(0, math.ceil((target - length) / stride))  # the first one that reaches it
        total += nll_of(ids[window * stride : target + 1])
    assert found["loss"] == pytest.approx(total / (len(ids) - 1), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(total / (len(ids) - 1)), rel=1e-4)
    assert found["word_perplexity"] == pytest.approx(math.exp(total / len(TEXT.split())), rel=1e-3)
    assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / len(TEXT.encode()), rel=1e-5)
    assert (found["tokens"], found["words"], found["bytes"]) == (len(ids) - 1, len(TEXT.split()), len(TEXT.encode()))
    assert (found["length"], found["stride"], found["step"]) == (length, stride, 24)


def test_documents_of_a_dataset_one_by_one(evaluate, tmp_path):
    whole = evaluate("--text=tfds:tiny/validation[:2]", "--stride=32")
    nll = 0.0
    for text in TOPICS[30:32]:
        (tmp_path / "one.txt").write_bytes(text.encode())
        one = evaluate(f"--text={tmp_path / 'one.txt'}", "--stride=32", "--batch_size=3")
        nll += one["loss"] * one["tokens"]
    assert whole["loss"] == pytest.approx(nll / whole["tokens"], rel=1e-6)
    assert whole["bytes"] == sum(len(text.encode()) for text in TOPICS[30:32])


@pytest.mark.parametrize(
    "number, length, stride", [(1, 4, 2), (4, 4, 4), (5, 4, 4), (23, 4, 1), (30, 8, 3), (31, 8, 8)]
)
def test_every_token_is_scored_once(number, length, stride):
    tokens = list(range(number + 1))
    found = windows(tokens, length, stride)
    scored = [token for row in found for token in row.tokens[len(row.tokens) - row.scored :]]
    assert scored == tokens[1:]
    assert all(len(row.tokens) <= length + 1 for row in found)
    assert all(len(row.tokens) - row.scored == length + 1 - stride for row in found[1:-1])
    assert windows([7], length, stride) == [Row([7], 0)]


def test_rows_of_any_length_in_few_programs_on_any_mesh():
    rng, before = np.random.default_rng(0), losses._cache_size()
    rows = [Row(rng.integers(VOCAB_SIZE, size=n).tolist(), max(1, n // 3)) for n in (*range(2, 40, 3), 129, 130, 200)]
    found = []
    for mesh, batch_size in ((make_mesh(), 5), (make_mesh(fsdp=2, tensor=2), 3)):
        with jax.set_mesh(mesh):
            model = make_model(dataclasses.replace(LLAMA, num_layers=1))
            found.append(score(model, rows, mesh=mesh, batch_size=batch_size, chunk=None))
            alone = score(model, rows[3:4], mesh=mesh, batch_size=batch_size, chunk=None)
        assert alone[0].nll == pytest.approx(found[-1][3].nll, rel=1e-5)
    assert losses._cache_size() - before == 2 * 2  # rows of 128 and of 256 tokens, on two meshes
    assert [one.nll for one in found[0]] == pytest.approx([one.nll for one in found[1]], rel=1e-4)
    assert [one.greedy for one in found[0]] == [one.greedy for one in found[1]]


@pytest.mark.parametrize(
    "given, written",
    [
        (" = Some Title = \n \n A line . \n", " = Some Title =\n\nA line.\n"),
        (" = = A Part = = \n", " == A Part ==\n"),
        ("It cost 1 @,@ 234 @.@ 5 dollars , well @-@ spent .", "It cost 1,234.5 dollars, well-spent."),
        ('He said , " It is mine . " and left ; she did n\'t .', 'He said, "It is mine." and left; she didn\'t.'),
        ("the game 's end ( or so : the last one ) of the players ' choice", "the game's end (or so: the last one) of"
         " the players' choice"),
        ("an <unk> word of 3 . 5 % stays", "an <unk> word of 3. 5 % stays"),
    ],
)  # fmt: skip
def test_wikitext_as_it_was_written(given, written):
    assert detokenized(given) == written


def test_words_and_bytes_are_those_of_the_file(evaluate, tmp_path):
    text = "A line , of 1 @,@ 000 words .\n" * 5
    (tmp_path / "wiki.txt").write_text(text)
    plain, joined = (evaluate(f"--text={tmp_path / 'wiki.txt'}", *flags) for flags in ((), ("--wikitext",)))
    assert (joined["words"], joined["bytes"]) == (plain["words"], plain["bytes"]) == (9 * 5, len(text))
    assert joined["tokens"] < plain["tokens"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--text=nowhere.txt"], "--text=nowhere.txt cannot be read: No such file or directory"),
        (["--text=tfds:tiny"], "names no split"),
        (["--text=tfds:tiny/nosplit"], "has no split 'nosplit'"),
        (["--stride=4"], "--stride=4 has an effect only with --text"),
        (["--length=4"], "--length=4 has an effect only with --text or --tasks"),
        (["--text=a", "--tasks=b"], "exclude each other"),
        (["--text=a", "--limit=3"], "--limit=3 has an effect only with --tasks"),
        (["--text={folder}/empty.txt"], "holds no word"),
        (["--text={folder}/bytes.txt"], "is not UTF-8: invalid start byte at byte 1"),
        (["--text={folder}/a.txt", "--stride=33"], "--stride=33 must not exceed the 32 tokens"),
    ],
)
def test_errors_in_one_line(flags, message, evaluate, tmp_path):
    for name, data in {"empty.txt": b" \n", "bytes.txt": b"a\xff", "a.txt": b"a text"}.items():
        (tmp_path / name).write_bytes(data)
    error = evaluate(*(flag.format(folder=tmp_path) for flag in flags), code=78)
    assert message in error and len(error.splitlines()) == 1
