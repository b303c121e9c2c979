"""`llm-jax export`: a checkpoint becomes a folder that `transformers` loads as it is."""

import json
import pathlib

import jax
import ml_dtypes
import numpy as np

from llm_jax.config import Config, UserError
from llm_jax.interop import tokenizer_files, weights
from llm_jax.interop.families import nearest
from llm_jax.jobs.perplexity import longest
from llm_jax.jobs.workdir import Workdir, mesh_for_reading, restore_parameters, start
from llm_jax.parallel import hosts
from llm_jax.safety.structure import named_leaves


def run(
    config: Config,
    workdir: str,
    to: str | None,
    as_json: bool = False,
    step: int | None = None,
    ema: bool = False,
    bfloat16: bool = False,
) -> None:
    """The verb. UserError if the model has what no family has. ema: the averaged parameters."""
    if not to:
        raise UserError("export needs --to=DIR, such as: llm-jax export --workdir=runs/quickstart --to=exported")
    folder = pathlib.Path(to).expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--to={to} exists already; give a folder that is new or empty")
    dtype = np.dtype(ml_dtypes.bfloat16 if bfloat16 else np.float32)
    start(config)
    work = Workdir(workdir)
    tokenizer = work.load_tokenizer()
    mesh = mesh_for_reading(config, tokenizer.vocab_size)
    with jax.set_mesh(mesh):
        step, model = restore_parameters(work, config, tokenizer, mesh, step=step, ema=ema)
        family, theirs = nearest(config.model, model.shape)
        folder.mkdir(parents=True, exist_ok=True)
        files = weights.save(folder, family, named_leaves(model), model.shape.letters(), dtype)
    if not hosts.is_first():
        return
    if "max_position_embeddings" in theirs:
        theirs["max_position_embeddings"] = longest(work, config, None)
    theirs |= {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos}
    theirs |= {"dtype": dtype.name, "torch_dtype": dtype.name}
    (folder / "config.json").write_text(json.dumps(theirs, indent=2) + "\n", "utf-8")
    doubt = tokenizer_files.write(tokenizer, folder)
    if doubt and not as_json:
        print(f"WARNING: {doubt}")
    result = {
        "to": str(folder),
        "step": step,
        "family": family.name,
        "dtype": dtype.name,
        "files": files,
        "tokenizer": doubt or "exact",
    }
    print(
        json.dumps(result, indent=2)
        if as_json
        else f"{folder}: step {step} as {family.architecture}, {dtype.name}, {len(files)} file(s) of weights\n"
        f"Try: transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r})"
    )
