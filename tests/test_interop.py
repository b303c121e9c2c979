"""Models of Hugging Face in and out, against transformers itself; skipped where that is not installed: see setup.py."""

import functools
import io
import json
import pickle
import shutil

import jax
import numpy as np
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from test_tokenizer import HARD
from tiny_corpus import TOPICS
from tiny_model import FAST, make_mesh, put

from llm_jax import cli
from llm_jax.config import Model, UserError, from_dict
from llm_jax.data.tokenizer import Tokenizer, train_tokenizer
from llm_jax.interop import tokenizer_files, weights
from llm_jax.interop.families import FAMILIES, nearest
from llm_jax.jobs.workdir import Workdir, restore_parameters
from llm_jax.parallel import hosts
from llm_jax.safety.structure import named_leaves
from llm_jax.training.losses import Weights, loss_sums
from llm_jax.training.state import model_shape

REASON = "needs the extra [hf], and transformers and torch beside it"
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)
safetensors_torch = pytest.importorskip("safetensors.torch", reason=REASON)
tokenizers = pytest.importorskip("tokenizers", reason=REASON)

VOCAB_SIZE = 320  # more rows than the tokenizer has ids, as Qwen2
SIZES = dict(
    vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=64, rms_norm_eps=1e-5, bos_token_id=0, eos_token_id=0,
    pad_token_id=None,
)  # fmt: skip
FLOAT32 = "--config.model.dtype=float32"
LLAMA3 = dict(
    rope_type="llama3", rope_theta=10_000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=16,
)  # fmt: skip
LINEAR = dict(rope_type="linear", rope_theta=500.0, factor=4.0)
GEMMA3_ROPE = {"full_attention": LINEAR, "sliding_attention": dict(rope_type="default", rope_theta=50.0)}
UNEVEN = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
NAMES = {
    "gpt2": "GPT2", "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "olmo2": "Olmo2",
    "mixtral": "Mixtral", "qwen3_moe": "Qwen3Moe", "olmoe": "Olmoe", "gemma2": "Gemma2", "gemma3": "Gemma3Text",
}  # fmt: skip
MODELS = {
    "gpt2": dict(
        vocab_size=VOCAB_SIZE, n_embd=32, n_layer=3, n_head=4, n_positions=64, n_inner=96, bos_token_id=0,
        eos_token_id=0,
    ),
    "llama": SIZES,
    "llama tied": SIZES | dict(tie_word_embeddings=True),
    "llama linear": SIZES | dict(rope_parameters=LINEAR),
    "llama 3": SIZES | dict(rope_parameters=LLAMA3),
    "mistral": SIZES | dict(sliding_window=7),
    "qwen2": {k: v for k, v in SIZES.items() if k != "head_dim"},
    "qwen3": SIZES,
    "olmo2": {k: v for k, v in SIZES.items() if k != "head_dim"},
    "mixtral": SIZES | dict(num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": SIZES | EXPERTS | dict(norm_topk_prob=True),
    "qwen3_moe raw": SIZES | EXPERTS | dict(norm_topk_prob=False),
    "gemma2": SIZES | dict(
        num_hidden_layers=4, sliding_window=7, query_pre_attn_scalar=24, attn_logit_softcapping=2.0,
        final_logit_softcapping=5.0,
    ),
    "gemma3": SIZES | dict(
        num_hidden_layers=6, sliding_window=7, query_pre_attn_scalar=16, rope_parameters=GEMMA3_ROPE,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
    ),
    "gemma3 uneven": SIZES | dict(num_hidden_layers=5, sliding_window=7, layer_types=UNEVEN),  # as 1B, 4B and 27B
    "olmoe": {k: v for k, v in SIZES.items() if k != "head_dim"} | dict(num_experts=4, num_experts_per_tok=2),
}  # fmt: skip


def make_theirs(name: str, folder, **save):
    """A model of this name with random weights, large enough to tell all from each other, saved with a tokenizer."""
    torch.manual_seed(1)
    config = getattr(transformers, f"{NAMES[name.split()[0]]}Config")(**MODELS[name])
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    model.save_pretrained(folder, **save)
    make_tokenizer().save_pretrained(folder)
    return model


@functools.cache
def make_tokenizer():
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(TOPICS, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>", clean_up_tokenization_spaces=False
    )


@pytest.fixture
def main(monkeypatch):
    """The command in this process, on one device or more; it has to succeed."""
    monkeypatch.setattr(hosts, "start", lambda *args, **options: None)  # JAX runs already
    devices = jax.local_devices()

    def run(*argv: str, num_devices: int = 1) -> None:
        monkeypatch.setattr(jax, "devices", lambda: devices[:num_devices])
        assert cli.main([str(argument) for argument in argv]) == 0

    return run


def our_model(workdir):
    work = Workdir(workdir)
    config = from_dict(json.loads(work.config.read_text()))
    return restore_parameters(work, config, work.load_tokenizer(), make_mesh(), step=None)[1]


@functools.partial(jax.jit, compiler_options=FAST)
def our_logits(model, tokens_BT, segments_BT, positions_BT):
    return model.logits(model(tokens_BT, segments_BT, positions_BT)[0])


def logits_of_both(ours, theirs, lengths: list[int]):
    """[number of tokens, V] of each: of rows of these lengths, padded to the longest."""
    rng = np.random.default_rng(len(lengths))
    longest = max(lengths)
    mask_BT = (np.arange(longest) < np.array(lengths)[:, None]).astype(np.int32)
    tokens_BT = rng.integers(1, 300, size=mask_BT.shape).astype(np.int32) * mask_BT
    positions_BT = np.arange(longest, dtype=np.int32) * mask_BT
    found = np.asarray(our_logits(ours, *put((tokens_BT, mask_BT, positions_BT), make_mesh())))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens_BT).long(), attention_mask=torch.tensor(mask_BT)).logits.numpy()
    return found[mask_BT > 0], expected[mask_BT > 0]


LENGTHS = [[1], [13], [64], [5, 17, 40]]


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_equal_both_ways(name, main, tmp_path, capsys):
    theirs = make_theirs(name, tmp_path / "theirs")
    main("import", f"--from={tmp_path / 'theirs'}", f"--workdir={tmp_path / 'run'}", FLOAT32)
    main("export", f"--workdir={tmp_path / 'run'}", f"--to={tmp_path / 'exported'}")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported", attn_implementation="eager").eval()
    assert type(back) is type(theirs)
    assert back.config.max_position_embeddings == theirs.config.max_position_embeddings
    expected, found = theirs.state_dict(), back.state_dict()
    assert expected.keys() == found.keys()
    for tensor in expected:
        if "gemma" in name and "norm" in tensor:  # kept as 1 + this, in float32
            torch.testing.assert_close(found[tensor], expected[tensor], rtol=0, atol=1.2e-7)
        else:
            assert torch.equal(expected[tensor], found[tensor]), tensor
    worst = 0.0
    with jax.set_mesh(make_mesh()):
        ours = our_model(tmp_path / "run")
        for lengths in LENGTHS:
            mine, wanted = logits_of_both(ours, theirs, lengths)
            assert wanted.std() > 0.3
            worst = max(worst, np.abs(mine - wanted).max())
            _, again = logits_of_both(ours, back, lengths)
            np.testing.assert_array_equal(again, wanted)
    with capsys.disabled():
        print(f" {name}: {worst:.1e}", end="")
    assert worst < 1e-4


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_gradients_are_equal(name, main, tmp_path):
    theirs = make_theirs(name, tmp_path / "theirs")
    main("import", f"--from={tmp_path / 'theirs'}", f"--workdir={tmp_path / 'run'}", FLOAT32)
    tokens_BU = np.random.default_rng(0).integers(1, 300, size=(4, 33)).astype(np.int32)
    positions_BU = np.broadcast_to(np.arange(33, dtype=np.int32), tokens_BU.shape)
    batch = {"tokens": tokens_BU, "segments": np.ones_like(tokens_BU), "positions": positions_BU}

    def mean_loss(model, batch):
        objective, counts = loss_sums(model, batch, weights=Weights(), chunk=None)
        return objective / counts["tokens"]

    with jax.set_mesh(make_mesh()):
        ours = our_model(tmp_path / "run")
        loss, gradients = jax.jit(jax.value_and_grad(mean_loss))(ours, put(batch, make_mesh()))
    tokens = torch.tensor(tokens_BU).long()
    their_loss = theirs(tokens, labels=tokens).loss
    their_loss.backward()
    assert float(loss) == pytest.approx(their_loss.item(), abs=1e-5)
    rows = {row.ours: row for row in FAMILIES[name].tensors}
    sizes, parameters = ours.shape.letters(), dict(theirs.named_parameters())
    places = len(ours.shape.pattern)
    for parameter, mine in named_leaves(gradients).items():
        place = int(parameter.split("/")[1]) if places > 1 and parameter.startswith("blocks/") else 0
        row = rows[parameter.replace(f"blocks/{place}/", "blocks/")]
        per_layer = [(None, np.asarray(mine))]
        if "{L}" in row.theirs:
            per_layer = [(place + places * i, gradient) for i, gradient in enumerate(np.asarray(mine))]
        for layer, gradient in per_layer:
            expected = weights.from_theirs(parameters[row.theirs.format(L=layer)].grad.numpy(), row, sizes)
            np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-5, err_msg=parameter)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_an_exported_tokenizer_gives_the_same_ids(kind, tmp_path):
    ours = train_tokenizer(iter(TOPICS), kind=kind, vocab_size=1000)
    assert tokenizer_files.write(ours, tmp_path) is None
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.unk_token_id, theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2, 3)
    lines = [line for text in TOPICS for line in text.split("\n")]
    assert len(lines) > 10_000
    for texts in (HARD, lines, TOPICS[:20]):
        expected = [ids.tolist() for ids in ours.encode(texts)]
        found = theirs(texts, add_special_tokens=False).input_ids
        assert [text for text, a, b in zip(texts, expected, found, strict=True) if a != b] == []
        assert [theirs.decode(ids, skip_special_tokens=True) for ids in found] == [ours.decode(ids) for ids in expected]
    assert theirs("some text").input_ids == [1, *ours.encode(["some text"])[0]]


def test_a_tokenizer_whose_sums_round_is_told_of(tmp_path):
    pieces = sentencepiece_model_pb2.ModelProto.FromString(
        train_tokenizer(iter(TOPICS), kind="unigram", vocab_size=400).model
    )
    pieces.pieces[300].score += 0.001
    assert "equally likely" in tokenizer_files.write(Tokenizer(pieces.SerializeToString()), tmp_path)


def test_a_model_of_another_normalisation_is_refused():
    model = io.BytesIO()
    lines = iter("\n".join(TOPICS[:10]).split("\n"))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, vocab_size=200, minloglevel=2, pad_id=3
    )
    with pytest.raises(UserError, match="its normalisation .nmt_nfkc.* has no exact counterpart"):
        tokenizer_files.from_sentencepiece(model.getvalue())


def test_an_imported_tokenizer_gives_the_same_ids(tmp_path):
    theirs = make_tokenizer()
    theirs.save_pretrained(tmp_path)
    ours = tokenizer_files.read(tmp_path, {}, VOCAB_SIZE)
    assert (ours.kind, ours.vocab_size, ours.bos, ours.eos) == ("bpe", VOCAB_SIZE, 0, 0)
    texts = [*(text for text in HARD if text), *TOPICS[:10]]
    for text, mine, expected in zip(
        texts, ours.encode(texts), theirs(texts, add_special_tokens=False).input_ids, strict=True
    ):
        assert mine.dtype == np.int32 and mine.tolist() == expected
        assert ours.decode(mine) == text
    assert 0 not in ours.encode(["a <|end|> in a text is text"])[0]
    again = pickle.loads(pickle.dumps(ours))
    assert again.sha256 == ours.sha256 and again.encode(["abc"])[0].tolist() == ours.encode(["abc"])[0].tolist()
    (tmp_path / "again").mkdir()
    tokenizer_files.write(ours, tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


def test_training_goes_on_from_an_imported_model(main, tiny, tmp_path, monkeypatch, capsys):
    """The three lines of the README: import, train, export; what is trained is the model, on other data."""
    for name in ("LLM_JAX_CACHE", "TFDS_DATA_DIR"):
        monkeypatch.setenv(name, tiny.environment[name])
    theirs = make_theirs("llama 3", tmp_path / "theirs")
    work = tmp_path / "run"
    main("import", f"--from={tmp_path / 'theirs'}", f"--workdir={work}", FLOAT32, num_devices=2)
    assert json.loads((work / "imported.json").read_text())["family"] == "llama"
    main("generate", f"--workdir={work}", "--prompt=The", "--max_tokens=4", "--temperature=0")
    capsys.readouterr()
    main("evaluate", f"--workdir={work}", "--config.data.sources[0].name=tiny", "--json")
    before = json.loads(capsys.readouterr().out)
    count = sum(1 + len(ids) for ids in make_tokenizer()(TOPICS[30:36]).input_ids)  # each with its end
    assert before["step"] == 0 and before["all"]["tokens"] == count
    train = ("train", f"--workdir={work}", "--config.data.sources[0].name=tiny", "--config.train.batch_size=8",
             "--config.train.sequence_length=32", "--config.optimizer.warmup_steps=2", "--config.log.sample_tokens=4",
             "--config.optimizer.peak_learning_rate=1e-2", "--config.checkpoint.every=8")  # fmt: skip
    main(*train, "--config.train.steps=16", num_devices=2)
    lines = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["kind"] == "evaluate" and lines[0]["step"] == 0
    losses = [line["loss"] for line in lines if "grad_norm" in line]
    assert len(losses) >= 2 and losses[-1] < losses[0]
    main("export", f"--workdir={work}", f"--to={tmp_path / 'exported'}")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()
    with jax.set_mesh(make_mesh()):
        mine, wanted = logits_of_both(our_model(work), back, [40])
    np.testing.assert_allclose(mine, wanted, atol=1e-4)
    assert back.config.max_position_embeddings == 64  # rows of 32 were trained on
    changed = [not torch.equal(a, b) for a, b in zip(theirs.parameters(), back.parameters(), strict=True)]
    assert all(changed)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert again(TOPICS[0]).input_ids == make_tokenizer()(TOPICS[0]).input_ids


def test_our_own_run_goes_out(main, trained, tmp_path, capsys):
    """SentencePiece and the Llama shape of tests/tiny.py; text in, the same likeliest continuation out."""
    main("export", f"--workdir={trained}", f"--to={tmp_path / 'out'}", "--json")
    assert json.loads(capsys.readouterr().out) | {"files": 0} == {
        "to": str(tmp_path / "out"), "step": 24, "family": "llama", "dtype": "float32", "files": 0,
        "tokenizer": "exact",
    }  # fmt: skip
    main("generate", f"--workdir={trained}", "--prompt=The name", "--max_tokens=12", "--temperature=0", "--json")
    (ours,) = json.loads(capsys.readouterr().out)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("The name", return_tensors="pt").input_ids
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True) == ours["text"]


def test_bfloat16_is_kept_and_large_models_come_in_several_files(main, tmp_path, monkeypatch):
    theirs = make_theirs("llama", tmp_path / "float32").to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    make_tokenizer().save_pretrained(tmp_path / "theirs")
    assert (tmp_path / "theirs" / weights.INDEX).exists()
    main("import", f"--from={tmp_path / 'theirs'}", f"--workdir={tmp_path / 'run'}", FLOAT32, num_devices=4)
    monkeypatch.setattr(weights, "BYTES_PER_FILE", 30_000)
    main("export", f"--workdir={tmp_path / 'run'}", f"--to={tmp_path / 'out'}", "--bfloat16", num_devices=2)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert back.dtype == torch.bfloat16
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[name]), name


def test_gpt2_as_on_the_hub(main, tmp_path):
    """Without the prefix of names, with buffers, and with the tokens of documents in config.json alone."""
    theirs = make_theirs("gpt2", tmp_path / "theirs")
    file = tmp_path / "theirs" / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in safetensors_torch.load_file(file).items()}
    tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64) for i in range(3)}
    safetensors_torch.save_file(tensors, file)
    (tmp_path / "theirs" / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    main("import", f"--from={tmp_path / 'theirs'}", f"--workdir={tmp_path / 'run'}", FLOAT32)
    with jax.set_mesh(make_mesh()):
        mine, wanted = logits_of_both(our_model(tmp_path / "run"), theirs, [7])
    np.testing.assert_allclose(mine, wanted, atol=1e-4)
    assert Workdir(tmp_path / "run").load_tokenizer().eos == 0


def refused(capsys, *argv) -> str:
    """The one line of a command that must end with exit code 78."""
    capsys.readouterr()
    assert cli.main([str(argument) for argument in argv]) == 78
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("llm-jax: error: ")]
    return line.removeprefix("llm-jax: error: ")


def test_what_cannot_be_read_is_refused_in_one_line(tmp_path, capsys, main):
    good = tmp_path / "good"
    make_theirs("llama", good, max_shard_size="40KB")
    shards = sorted(good.glob("model-*.safetensors"))

    def attempt(change) -> str:
        folder = tmp_path / "bad"
        shutil.copytree(good, folder)
        change(folder)
        line = refused(capsys, "import", f"--from={folder}", f"--workdir={tmp_path / 'run'}")
        shutil.rmtree(folder)
        assert not (tmp_path / "run" / "checkpoints").exists()
        return line

    def pickled(folder):
        for path in folder.glob("model*"):
            path.unlink()
        (folder / "pytorch_model.bin").write_bytes(b"")

    def config(**fields):
        def change(folder):
            path = folder / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | fields))

        return change

    def tensors(change):
        def apply(folder):
            found = safetensors_torch.load_file(folder / shards[-1].name)
            change(found)
            safetensors_torch.save_file(found, folder / shards[-1].name)

        return apply

    def put_tensor(name, tensor):
        return tensors(lambda found: found.__setitem__(name, tensor))

    name = sorted(safetensors_torch.load_file(shards[-1]))[0]
    shape = safetensors_torch.load_file(shards[-1])[name].shape
    assert "pickled weights (pytorch_model.bin), which can run code when read" in attempt(pickled)
    assert f"lacks {shards[0].name}" in attempt(lambda folder: (folder / shards[0].name).unlink())
    assert "no intact safetensors file" in attempt(lambda folder: (folder / shards[0].name).write_bytes(b"xxxxxxxxxxx"))
    assert f"has no tensor {name}" in attempt(tensors(lambda found: found.pop(name)))
    assert f"tensor {name} is [7, 3]; by config.json it should be {list(shape)}" in attempt(
        put_tensor(name, torch.zeros(7, 3))
    )
    assert f"tensor {name} is I8; only F32, F16, BF16" in attempt(
        put_tensor(name, torch.zeros(shape, dtype=torch.int8))
    )
    assert "has tensors that a llama does not have here: model.layers.0.extra" in attempt(
        put_tensor("model.layers.0.extra", torch.zeros(2))
    )
    assert "model_type='mamba' is not supported" in attempt(config(model_type="mamba"))
    assert "the weights are quantised (gptq)" in attempt(config(quantization_config={"quant_method": "gptq"}))
    assert "attention_bias=True is not supported" in attempt(config(attention_bias=True))
    assert "rope_type='yarn' is not supported" in attempt(config(rope_parameters={"rope_type": "yarn", "factor": 2.0}))
    assert "has no field 'hidden_size'" in attempt(
        lambda folder: (folder / "config.json").write_text('{"model_type": "llama", "num_attention_heads": 1}')
    )
    assert "config.json is damaged" in attempt(lambda folder: (folder / "config.json").write_text("{"))
    assert "config.json does not exist" in attempt(lambda folder: (folder / "config.json").unlink())
    assert "no tokenizer.json" in attempt(lambda folder: (folder / "tokenizer.json").unlink())
    assert "is no folder" in refused(capsys, "import", "--from=./nowhere", f"--workdir={tmp_path / 'run'}")
    assert "import needs --from" in refused(capsys, "import", f"--workdir={tmp_path / 'run'}")
    main("import", f"--from={good}", f"--workdir={tmp_path / 'run'}", FLOAT32)
    assert "holds a run already" in refused(capsys, "import", f"--from={good}", f"--workdir={tmp_path / 'run'}")
    capsys.readouterr()
    assert cli.main(["train", f"--workdir={tmp_path / 'run'}", "--config.model.rope_theta=5"]) == 78
    assert "model.rope_theta: 10000.0 there, 5.0 now" in capsys.readouterr().err


GEMMA = dict(num_hidden_layers=12, hidden_size=32, num_attention_heads=2, head_dim=256, intermediate_size=64)


@pytest.mark.parametrize(
    "family, fields, message",
    [
        (
            "gemma2",
            {"hidden_activation": "gelu"},
            "hidden_activation='gelu' is not supported, only 'gelu_pytorch_tanh'",
        ),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not supported"),
        ("gemma2", {"layer_types": ["chunked_attention"] * 12}, "layer_types='chunked_attention' is not supported"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 is not supported"),
        ("gemma3_text", {"rope_parameters": {"sliding_attention": LINEAR}}, "rope_type='linear' is not supported"),
    ],
)
def test_what_gemma_does_not_compute_here_is_refused(family, fields, message):
    assert FAMILIES[family].read(GEMMA).pattern == ("local",) * (1 if family == "gemma2" else 5) + ("dense",)
    with pytest.raises(UserError) as error:
        FAMILIES[family].read(GEMMA | fields)
    assert message in str(error.value)


def test_gemma_3_as_its_files_were_first_written():
    """No layer_types, RoPE in three fields; most others may be left out."""
    old = dict(rope_theta=1_000_000, rope_local_base_freq=10_000, rope_scaling={"factor": 8.0, "rope_type": "linear"})
    m = FAMILIES["gemma3_text"].read(GEMMA | old | {"sliding_window": 1024, "sliding_window_pattern": 6})
    assert (m.rope_theta, m.local_rope_theta, m.rope_scaling, m.rope_factor) == (1e6, 1e4, "linear", 8.0)
    assert (m.window, m.tie_embeddings, m.score_width, m.logit_soft_cap) == (1024, True, None, None)
    assert m == FAMILIES["gemma3_text"].read(GEMMA | {
        "rope_parameters": {
            "full_attention": {"rope_theta": 1e6, "factor": 8.0, "rope_type": "linear"},
            "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
        },
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 2,
        "sliding_window": 1024,
    })  # fmt: skip


@pytest.mark.parametrize(
    "fields, missing",
    [
        ({"logit_soft_cap": 30.0}, "model.logit_soft_cap=30.0 has no counterpart"),
        ({"position": "sinusoidal"}, "model.position='sinusoidal'"),
        ({"activation": "gelu"}, "model.activation='gelu'"),
        ({"qk_norm": True, "window": 8}, "model.qk_norm=True has no counterpart in any family of Hugging Face"),
        ({"pattern": ("dense", "moe"), "num_experts": 4}, "model."),
        ({"pattern": ("moe",), "num_experts": 4, "num_shared_experts": 1}, "model.num_shared_experts=1"),
    ],
)
def test_what_has_no_counterpart_is_named(fields, missing):
    model = Model(num_layers=2, width=32, num_heads=4, **fields)
    with pytest.raises(UserError) as error:
        nearest(model, model_shape(model, vocab_size=300, sequence_length=64))
    assert missing in str(error.value)
