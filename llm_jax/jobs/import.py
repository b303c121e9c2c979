"""`llm-jax import`: a model of Hugging Face becomes a workdir that can be trained, evaluated and asked to generate.

Its checkpoint of step 0 holds the parameters alone: `train` begins there, with a fresh optimizer and the user's data.
"""

import dataclasses
import json
import pathlib

import jax

from llm_jax.config import TOKENIZERS, Config, UserError, validate
from llm_jax.interop import tokenizer_files, weights
from llm_jax.interop.families import family_of
from llm_jax.jobs.workdir import Workdir, mesh_for_reading, start, write_atomically
from llm_jax.measure.flops import parameter_count
from llm_jax.parallel import hosts
from llm_jax.parallel.sharding import Rules
from llm_jax.safety.checkpoint import Checkpoints
from llm_jax.safety.structure import named_leaves
from llm_jax.training.optimizer import make_optimizer
from llm_jax.training.state import abstract_state, make_init, model_shape


def run(config: Config, workdir: str, as_json: bool = False, **flags) -> None:
    """The verb. flags["from"]: a folder, or OWNER/NAME on the hub.

    The sections model and tokenizer of the config become the model's own.
    """
    if not flags["from"]:
        raise UserError("import needs --from=DIR or --from=OWNER/NAME, such as: --from=openai-community/gpt2")
    folder = fetch(flags["from"])
    theirs = weights.read_json(folder / "config.json")
    family = family_of(theirs)
    try:
        model, vocab_size = family.read(theirs), theirs["vocab_size"]
    except KeyError as error:
        raise UserError(f"{folder / 'config.json'} has no field {error}; a {family.name} needs it") from error
    source = weights.Folder(folder, "transformer." if family.name == "gpt2" else "model.")
    tokenizer = tokenizer_files.read(folder, theirs, vocab_size)

    config = dataclasses.replace(
        config,
        model=dataclasses.replace(
            model,
            **{field: getattr(config.model, field) for field in ("attention", "dtype", "layers", "remat")},
        ),
        tokenizer=dataclasses.replace(
            config.tokenizer,
            vocab_size=vocab_size,
            model_file=None,
            kind=tokenizer.kind if tokenizer.kind in TOKENIZERS else config.tokenizer.kind,
        ),
    )
    if model.position == "learned":
        # The table of positions is part of the model.
        config.train = dataclasses.replace(config.train, sequence_length=theirs["n_positions"])
    validate(config)
    start(config)
    work = Workdir(workdir)
    if work.has_begun():
        raise UserError(f"--workdir={work.path} holds a run already; take another")
    if hosts.is_first():
        work.claim(config)

    mesh = mesh_for_reading(config, vocab_size)
    shape = model_shape(config.model, vocab_size=vocab_size, sequence_length=config.train.sequence_length)
    with jax.set_mesh(mesh):
        init = make_init(
            config.model, shape, make_optimizer(config.optimizer, config.train.steps), mesh=mesh, rules=Rules(),
            seed=0, window=config.spikes.window, ema=False,
        )  # fmt: skip
        target = abstract_state(init, mesh).parameters
        arrays = weights.load(source, family, named_leaves(target), shape.letters())
        parameters = jax.tree.unflatten(jax.tree.structure(target), list(arrays.values()))
        checkpoints = Checkpoints(work.checkpoints, keep=1)
        checkpoints.save(0, {"parameters": parameters}, {"data": {"tokenizer": tokenizer.sha256}, "rewinds": []})
        checkpoints.close()
    if not hosts.is_first():
        return
    work.save_tokenizer(tokenizer)
    result = {"from": flags["from"], "family": family.name, "parameters": parameter_count(parameters)}
    write_atomically(work.imported, (json.dumps(result | {"config": theirs}, indent=2) + "\n").encode())
    print(
        json.dumps({"workdir": str(work.path), **result}, indent=2)
        if as_json
        else f"{work.path}: a {family.name} of {result['parameters']:,} parameters, checked and saved as step 0\n"
        f"Try: llm-jax generate --workdir={work.path} --prompt='The'\n"
        f"     llm-jax train --workdir={work.path} --config.data.sources[0].name=DATASET"
    )


def fetch(origin: str) -> pathlib.Path:
    """The folder itself, or that of a model of the hub, once downloaded."""
    folder = pathlib.Path(origin).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or origin.count("/") != 1 or origin.startswith((".", "~", "/")):
        raise UserError(f"--from={origin} is no folder; give one with config.json, or OWNER/NAME of the hub")
    import huggingface_hub

    try:
        return pathlib.Path(
            huggingface_hub.snapshot_download(
                origin, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja", "tokenizer.model"]
            )
        )
    except (huggingface_hub.errors.HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--from={origin} is no folder here, and cannot be fetched from the hub: {reason}") from error
