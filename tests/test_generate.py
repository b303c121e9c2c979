"""`llm-jax generate`, from a trained run: prompts in, text out."""

import functools
import io
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CONFIG
from tiny_model import GPT2, family, make_mesh

from llm_jax.config import Parallel, UserError
from llm_jax.data.tokenizer import load_tokenizer
from llm_jax.flags import load_config_file
from llm_jax.jobs import generate as job
from llm_jax.jobs.workdir import Workdir, restore_parameters
from llm_jax.model.decoding import Sampling
from llm_jax.parallel import sharding

PROMPTS = ["The ", "A list of é", "\tdef"]


@pytest.fixture
def generate(tiny, trained, monkeypatch, capsys):
    """The standard output of the command, run in this process."""

    monkeypatch.setattr(job, "TOKENS_PER_CALL", 5)

    def run(*flags: str, stdin: str | None = None) -> str:
        monkeypatch.setattr(sys, "stdin", stdin and io.TextIOWrapper(io.BytesIO(stdin.encode())))
        assert tiny.main(monkeypatch, "generate", trained, "--max_tokens=12", *flags, num_devices=1) == 0
        return capsys.readouterr().out

    return run


def test_prompts_from_flags_a_file_and_standard_input(generate, tmp_path):
    out = generate(*(f"--prompt={prompt}" for prompt in PROMPTS))
    texts = out.removesuffix("\n").split("\n---\n")
    assert len(texts) == 3
    assert all(text.startswith(prompt) and len(text) > len(prompt) for text, prompt in zip(texts, PROMPTS, strict=True))
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", "utf-8")
    assert generate(f"--prompts_file={tmp_path / 'prompts.txt'}") == out
    assert generate(stdin="\n".join(PROMPTS)) == out
    answers = json.loads(generate("--json", "--stream", stdin="\n".join(PROMPTS)))
    assert [answer["prompt"] for answer in answers] == PROMPTS
    assert [answer["prompt"] + answer["text"] for answer in answers] == texts


def test_seed_and_sampling(generate):
    first = generate("--prompt=The", "--seed=1")
    assert generate("--prompt=The", "--seed=1") == first
    assert generate("--prompt=The", "--seed=2") != first
    greedy = generate("--prompt=The", "--temperature=0")
    assert generate("--prompt=The", "--top_k=1", "--top_p=0.000001", "--seed=3") == greedy


def test_streaming_prints_the_same(generate, monkeypatch):
    shown = []
    show = job._Printer.__call__
    monkeypatch.setattr(job._Printer, "__call__", lambda self, text: (show(self, text), shown.append(self.printed)))
    for flags in (["--prompt=The", "--seed=1"], [f"--prompt={prompt}" for prompt in PROMPTS]):
        whole = generate(*flags, "--nostream")
        assert not shown
        assert generate(*flags, "--stream") == whole
        assert len(set(shown)) > 1
        shown.clear()


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def __init__(self, tokens: bytes):
        self.tokens = tokens

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize("text", ["añb".encode(), "a€".encode(), "a€".encode()[:-1], b"a\xff", "a\ufffdb".encode()])
def test_half_a_character_waits(text, capsys):
    tokenizer = Bytes(text)
    printer = job._Printer("<")
    shown = []
    for count in range(1, len(text) + 1):
        printer(tokenizer.decode(list(text[:count])))
        shown.append(printer.printed)
    printer.finish(tokenizer.decode(list(text)))
    assert capsys.readouterr().out == "<" + tokenizer.decode(list(text))
    assert not any(one.endswith("\ufffd") for one in shown)


def test_greedy_is_the_argmax_of_the_full_forward_pass(generate, trained):
    tokenizer = load_tokenizer(trained / "tokenizer.model")
    mesh = sharding.make_mesh(Parallel(), jax.devices()[:1])

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def next_logits(model, tokens_BT, length):
        positions_BT = jnp.arange(tokens_BT.shape[1])[None]
        hidden_BTD, _ = model(tokens_BT, (positions_BT < length).astype(jnp.int32), positions_BT)
        return model.logits(hidden_BTD)[0, length - 1]

    with jax.set_mesh(mesh):
        _, model = restore_parameters(Workdir(trained), load_config_file(str(CONFIG)), tokenizer, mesh, step=None)
        for prompt in PROMPTS[:2]:
            ids = [1, *tokenizer.encode([prompt])[0].tolist()]
            start = len(ids)
            while len(ids) < start + 12 and ids[-1] != 2:
                tokens_BT = np.zeros((1, 40), np.int32)
                tokens_BT[0, : len(ids)] = ids
                ids.append(int(np.argmax(next_logits(model, tokens_BT, len(ids)))))
            expected = prompt + tokenizer.decode([token for token in ids[start:] if token != 2])
            assert generate(f"--prompt={prompt}", "--temperature=0") == expected + "\n"


def test_learned_positions_end(trained):
    """A prompt and new tokens beyond the last learned position are refused, up to it they are not."""
    tokenizer = load_tokenizer(trained / "tokenizer.model")
    tokenizer.encode = lambda texts: [np.arange(4, 14)]
    model, mesh = family("gpt2"), make_mesh()
    assert GPT2.position == "learned" and model.shape.max_length == 32
    arguments = dict(mesh=mesh, sampling=Sampling(temperature=0, eos=2), seed=0)
    with jax.set_mesh(mesh):
        with pytest.raises(UserError, match="max_tokens=22 and a prompt of 11 tokens exceed the 32 .*=21 "):
            job.generate(model, tokenizer, ["x"], max_tokens=22, **arguments)
        job.generate(model, tokenizer, ["x"], max_tokens=21, **arguments)


def test_command(tiny, trained, generate):
    """In a process of its own."""
    done = tiny.run("generate", trained, "--max_tokens=12", "--temperature=0", input="The \n")
    assert (done.returncode, done.stdout) == (0, generate("--prompt=The ", "--temperature=0")), done.stderr
