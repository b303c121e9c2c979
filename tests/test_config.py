import dataclasses
import importlib.util
import json
import pathlib
import re

import pytest

from llm_jax import config as c

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = ("quickstart", "web_wiki_small", "gpt2_124m", "llama_1b", "llama_8b", "llama_70b", "moe_7b", "moe_235b")


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"configs_{name}", ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", CONFIGS)
def test_config_is_valid_and_says_what_it_is(name):
    module = load(name)
    c.validate(module.get_config())
    for heading in ("Command:", "Hardware:", "Time:", "Result:"):
        assert re.search(rf"^{heading} +\S", module.__doc__, re.MULTILINE), heading
    assert f"--config=configs/{name}.py" in module.__doc__


def test_no_config_is_left_out():
    assert {path.stem for path in (ROOT / "configs").glob("*.py")} == set(CONFIGS)


def matrix_parameters(m: c.Model, vocab_size: int) -> int:
    """By hand, from the shapes in the papers; norms and biases left out."""
    head_width = m.head_width or m.width // m.num_heads
    attention = m.width * head_width * (2 * m.num_heads + 2 * (m.num_kv_heads or m.num_heads))
    matrices = 3 if m.activation == "swiglu" else 2
    if m.pattern == ("moe",):
        feed_forward = m.num_experts * m.width * (matrices * m.expert_width + 1)
    else:
        feed_forward = matrices * m.width * (m.feed_forward_width or 4 * m.width)
    return m.num_layers * (attention + feed_forward) + vocab_size * m.width * (1 if m.tie_embeddings else 2)


@pytest.mark.parametrize(
    "name, published",
    [
        ("gpt2_124m", 124.4e6),
        ("llama_1b", 1.236e9),
        ("llama_8b", 8.03e9),
        ("llama_70b", 70.6e9),
        ("moe_7b", 6.92e9),
        ("moe_235b", 235e9),
    ],
)
def test_config_has_the_published_size(name, published):
    config = load(name).get_config()
    assert matrix_parameters(config.model, config.tokenizer.vocab_size) == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize(
    "section, field, value, message",
    [
        ("model", "norm", "batchnorm", "model.norm='batchnorm' must be one of rmsnorm, layernorm"),
        ("model", "width", 0, "model.width=0 must be at least 1"),
        ("model", "num_heads", 7, "model.width=256 must divide by model.num_heads=7"),
        ("model", "num_kv_heads", 3, "model.num_heads=8 must divide by model.num_kv_heads=3"),
        ("model", "head_width", 31, "head width 31 must be even"),
        ("model", "logit_soft_cap", -1.0, "model.logit_soft_cap=-1.0 must be a positive number"),
        ("tokenizer", "vocab_size", 200, "tokenizer.vocab_size=200 must be at least"),
        ("optimizer", "beta1", 1.0, "optimizer.beta1=1.0 must lie in [0, 1)"),
        ("optimizer", "peak_learning_rate", float("nan"), "optimizer.peak_learning_rate=nan must be a positive number"),
        ("optimizer", "warmup_steps", 1000, "optimizer.warmup_steps=1000 must be less than train.steps=1000"),
        ("optimizer", "decay_steps", 10, "has an effect only with optimizer.schedule=wsd"),
        ("model", "pattern", (), "model.pattern is empty"),
        ("model", "pattern", ("dense", "sparse"), "model.pattern='sparse' must be one of dense, local, moe"),
        ("model", "pattern", ("moe",), "model.num_experts=None and model.pattern=('moe',) contradict each other"),
        ("model", "pattern", ("dense",) * 4, "model.num_layers=6 must be a multiple of the 4 layers"),
        ("train", "router_bias_rate", 0.1, "has an effect only on layers of the kind moe"),
        ("parallel", "expert", 2, "parallel.expert=2 shards the experts, and there are none"),
        ("parallel", "rounds", 2, "parallel.rounds=2 has an effect only with parallel.stage above 1"),
        ("parallel", "stage", 4, "must divide the 6 repetitions of model.pattern"),
        ("parallel", "stage", 2, "train.microbatches=1 must be a multiple of parallel.stage=2"),
        ("train", "microbatches", 3, "train.batch_size=16 must divide by train.microbatches=3"),
        ("data", "sources", (), "data.sources is empty"),
        ("data", "sources", (c.Source(name="a", weight=0.0),), "data.sources[0].weight=0.0 must be positive"),
        ("data", "sources", (c.Source(name="a", held_out="train"),), "is the training split"),
        ("data", "sources", (c.Source(name="a"), c.Source(name="a")), "names a dataset and split twice"),
    ],
)
def test_a_broken_rule_is_named(section, field, value, message):
    config = c.Config()
    setattr(getattr(config, section), field, value)
    with pytest.raises(c.UserError, match=re.escape(message)):
        c.validate(config)


def test_all_broken_rules_are_named_at_once():
    config = c.Config()
    config.model.norm = "x"
    config.train.steps = 0
    config.data.sources[0].weight = -1.0
    with pytest.raises(c.UserError) as error:
        c.validate(config)
    assert [line.split("=")[0] for line in str(error.value).splitlines()] == [
        "model.norm",
        "train.steps",
        "data.sources[0].weight",
    ]


def test_saved_config_comes_back():
    config = load("web_wiki_small").get_config()
    again = c.from_dict(json.loads(c.dumps(config)))
    assert again == config
    assert isinstance(again.data.sources[1], c.Source)


def test_saved_config_of_another_version_is_refused():
    values = c.to_dict(c.Config())
    values["train"]["epochs"] = values["train"].pop("steps")
    with pytest.raises(c.UserError, match=r"missing \['steps'\].*unknown \['epochs'\]"):
        c.from_dict(values)


def test_flatten_and_differences():
    old, new = c.Config(), c.Config()
    assert c.flatten(old)["data.sources[0].name"] == "python_docs"
    new.train.steps = 5
    new.data.sources = (*new.data.sources, c.Source(name="c4/en"))
    changes = c.differences(old, new)
    assert changes["train.steps"] == (1000, 5)
    assert changes["data.sources[1].name"] == (None, "c4/en")
    assert len(changes) == 1 + len(dataclasses.fields(c.Source))


def test_automatic_meshes_have_no_sizes():
    config = c.Config(parallel=c.Parallel(auto=True, tensor=2))
    with pytest.raises(c.UserError, match="parallel.auto=true picks the sizes of all axes"):
        c.validate(config)


def test_sections_of_two_configs_are_not_shared():
    c.Config().train.steps = 5
    c.Config().data.sources[0].weight = -1.0
    c.validate(c.Config())
    assert c.Config().train.steps == 1000
