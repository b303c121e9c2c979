"""`llm-jax generate`: continues prompts with a trained model.

B prompt, P prompt position, M new token
"""

import json
import sys
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from llm_jax.config import Config, UserError
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.jobs.workdir import Workdir, mesh_for_reading, restore_parameters, start
from llm_jax.model import decoding
from llm_jax.model.transformer import Transformer
from llm_jax.parallel import hosts
from llm_jax.parallel.sharding import global_rows, num_shards

TOKENS_PER_CALL = 8  # of the compiled loop: what streaming waits for


def run(
    config: Config,
    workdir: str,
    prompts: list[str],
    as_json: bool = False,
    max_tokens: int = 128,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    step: int | None = None,
    stream: bool = False,
    ema: bool = False,
) -> None:
    """The verb: prints each prompt with its continuation, or a JSON list of {"prompt", "text"}.

    ema: by the averaged parameters instead of the last ones.
    """
    start(config)
    work = Workdir(workdir)
    tokenizer = work.load_tokenizer()
    mesh = mesh_for_reading(config, tokenizer.vocab_size)
    sampling = decoding.Sampling(temperature=temperature, top_k=top_k, top_p=top_p, eos=tokenizer.eos)
    with jax.set_mesh(mesh):
        step, model = restore_parameters(work, config, tokenizer, mesh, step=step, ema=ema)
        show = _Printer(prompts[0]) if stream and not as_json and hosts.is_first() else None
        texts = generate(
            model, tokenizer, prompts, mesh=mesh, sampling=sampling, max_tokens=max_tokens, seed=seed, show=show
        )
    if not hosts.is_first():
        return
    if as_json:
        print(
            json.dumps(
                [{"prompt": p, "text": t} for p, t in zip(prompts, texts, strict=True)], indent=2, ensure_ascii=False
            )
        )
        return
    if show is not None:
        show.finish(texts[0])
    else:
        sys.stdout.write(prompts[0] + texts[0])
    print("".join(f"\n---\n{prompt}{text}" for prompt, text in zip(prompts[1:], texts[1:], strict=True)))


def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: list[str],
    *,
    mesh: jax.sharding.Mesh,
    sampling: decoding.Sampling,
    max_tokens: int,
    seed: int,
    show: Callable[[str], None] | None = None,
) -> list[str]:
    """The continuations, each up to its end of document or max_tokens. `show` gets the first one's text as it grows."""
    rows = [np.array([tokenizer.bos, *ids], np.int32) for ids in tokenizer.encode(prompts)]
    longest = max(len(row) for row in rows)
    if model.shape.position == "learned" and longest + max_tokens > model.shape.max_length:
        raise UserError(
            f"--max_tokens={max_tokens} and a prompt of {longest} tokens exceed the {model.shape.max_length} learned "
            f"positions of the model; try --max_tokens={max(1, model.shape.max_length - longest)} or a shorter prompt"
        )

    def watch(new: list[list[int]]) -> bool:
        if show is not None:
            show(tokenizer.decode(new[0]))
        return False

    new = continue_rows(
        model, rows, width=longest, mesh=mesh, sampling=sampling, max_tokens=max_tokens, seed=seed, enough=watch
    )
    return [tokenizer.decode(ids) for ids in new]


def continue_rows(
    model: Transformer,
    rows: list[np.ndarray],
    *,
    width: int,
    mesh: jax.sharding.Mesh,
    sampling: decoding.Sampling,
    max_tokens: int,
    seed: int,
    enough: Callable[[list[list[int]]], bool],
) -> list[list[int]]:
    """The new tokens of each row, up to its end or max_tokens, or until enough(those so far) says so.

    width: of the compiled program, which is another one for each width, number of rows and max_tokens.
    """
    shards, count = num_shards(mesh, model.rules.batch), len(rows)
    rows = rows + [rows[0][:1]] * (-count % shards)
    tokens_BP = np.full((len(rows), width), sampling.eos, np.int32)
    for row, ids in zip(tokens_BP, rows, strict=True):
        row[width - len(ids) :] = ids
    lengths_B = np.array([len(row) for row in rows], np.int32)
    sharding = jax.NamedSharding(mesh, model.rules.spec("batch", None))
    columns = {"tokens": tokens_BP, "lengths": lengths_B[:, None]}
    arrays = global_rows(lambda first, last: {k: v[first:last] for k, v in columns.items()}, len(rows), sharding)

    state = begin(model, arrays["tokens"], arrays["lengths"][:, 0], max_tokens=max_tokens)
    key = jax.random.key(seed)
    while True:
        state = extend(model, state, key, sampling=sampling, num_tokens=TOKENS_PER_CALL)
        done = bool(np.all(_fetch(state.done_B)[:count]))
        new = [_until(sampling.eos, row) for row in _fetch(state.tokens_BM)[:count, : int(state.count)]]
        if enough(new) or done or int(state.count) >= max_tokens:
            return new


begin = jax.jit(decoding.start, static_argnames="max_tokens")
extend = jax.jit(decoding.extend, static_argnames=("sampling", "num_tokens"), donate_argnames="decoding")


def _fetch(array) -> np.ndarray:
    return multihost_utils.process_allgather(array, tiled=True)


def _until(eos: int, ids: np.ndarray) -> list[int]:
    ends = np.flatnonzero(ids == eos)
    return ids[: ends[0] if len(ends) else len(ids)].tolist()


class _Printer:
    """Prints a text as it grows; a last character that may still be half of one waits."""

    def __init__(self, prompt: str):
        self.printed = ""
        sys.stdout.write(prompt)
        sys.stdout.flush()

    def __call__(self, text: str) -> None:
        whole = text.rstrip("\N{REPLACEMENT CHARACTER}")
        if whole.startswith(self.printed):
            sys.stdout.write(whole[len(self.printed) :])
            sys.stdout.flush()
            self.printed = whole

    def finish(self, text: str) -> None:
        """What waited was no half of a character."""
        sys.stdout.write(text.removeprefix(self.printed))
