"""`llm-jax evaluate --tasks`: EleutherAI's lm-evaluation-harness asks, a model trained or imported here answers.

https://github.com/EleutherAI/lm-evaluation-harness: its tasks, prompts, metrics; nothing of it runs a model here.
"""

# pyright: reportMissingImports=false

import contextlib
import importlib.metadata
import json
import os
import pathlib
import sys

import jax
import lm_eval
import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, handle_non_serializable, make_disjoint_window, make_table

from llm_jax.config import Config, UserError
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.jobs.generate import continue_rows
from llm_jax.jobs.perplexity import longest
from llm_jax.jobs.scores import Row, padded, score
from llm_jax.jobs.workdir import Workdir, mesh_for_reading, restore_parameters, start, write_atomically
from llm_jax.model.decoding import Sampling
from llm_jax.model.transformer import Transformer
from llm_jax.parallel import hosts

BOOTSTRAPS = 1000  # for the standard errors that have no formula
MAX_NEW_TOKENS = 256  # where a task does not say it: as the harness's own backends


def run(
    config: Config,
    workdir: str,
    *,
    tasks: list[str],
    as_json: bool,
    step: int | None,
    batch_size: int | None,
    ema: bool,
    length: int | None,
    include_path: str | None,
    limit: int | None,
    num_fewshot: int | None,
) -> None:
    """Prints the scores and writes WORKDIR/evaluate_tasks.json. tasks: names, globs, or YAML files."""
    if include_path is not None and not pathlib.Path(include_path).is_dir():
        raise UserError(f"--include_path={include_path} is no folder; give one that holds tasks as YAML files")
    manager = TaskManager(include_path=include_path)
    names = find_tasks(tasks, manager)
    start(config)
    work = Workdir(workdir)
    tokenizer = work.load_tokenizer()
    mesh = mesh_for_reading(config, tokenizer.vocab_size)
    with jax.set_mesh(mesh):
        step, model = restore_parameters(work, config, tokenizer, mesh, step=step, ema=ema)
        lm = Model(
            model, tokenizer, mesh=mesh, batch_size=batch_size or config.evaluate.batch_size,
            length=longest(work, config, length), chunk=config.train.loss_chunk,
        )  # fmt: skip
        os.environ["DISABLE_MULTIPROC"] = "1"  # the harness would fork, and JAX has threads
        with contextlib.redirect_stdout(sys.stderr):
            found = lm_eval.simple_evaluate(
                lm, tasks=names, limit=limit, num_fewshot=num_fewshot, task_manager=manager, log_samples=False,
                bootstrap_iters=BOOTSTRAPS,
            )  # fmt: skip
    assert found is not None
    if hosts.is_first():
        result = {
            "step": step,
            "lm_eval": importlib.metadata.version("lm_eval"),
            "length": lm.length,
            "limit": limit,
            "tasks": found["results"],
            "versions": found["versions"],
            "num_fewshot": found["n-shot"],
        }
        written = json.dumps(result, indent=2, default=handle_non_serializable)
        write_atomically(work.path / "evaluate_tasks.json", (written + "\n").encode())
        work.push(work.path / "evaluate_tasks.json")
        print(written if as_json else make_table(found))


def find_tasks(tasks: list[str], manager: TaskManager) -> list[str]:
    """The names and files of these. UserError for what there is not."""
    names = []
    for task in tasks:
        matched = manager.match_tasks([task]) or [task] * pathlib.Path(task).is_file()
        if not matched:
            raise UserError(
                f"--tasks={task}: no such task; `lm_eval ls tasks` lists those of the harness, --include_path=DIR adds "
                "your own"
            )
        names += matched
    return names


def before_text(tokenizer: Tokenizer) -> list[int]:
    """What was trained here has seen no text without bos. Of others their own tokenizer says what stands there."""
    if not tokenizer.files():
        return [tokenizer.bos]
    import tokenizers

    return tokenizers.Tokenizer.from_str(tokenizer.files()["tokenizer.json"]).encode("").ids


class Model(TemplateLM):
    """Requests of the harness, by batches; the same in every process, and so are the answers."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        mesh: jax.sharding.Mesh,
        batch_size: int,
        length: int,
        chunk: int | None,
    ):
        """length: tokens that a prediction may see. To be used under the mesh."""
        super().__init__()
        self.model = model
        self.ours = tokenizer
        self.mesh = mesh
        self.batch_size = batch_size
        self.length = length
        self.chunk = chunk
        self.before = before_text(tokenizer)

    @property
    def eot_token_id(self) -> int:
        return self.ours.eos

    @property
    def prefix_token_id(self) -> int:
        return self.ours.bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        before = [] if add_special_tokens is False else self.before
        return [*before, *self.ours.encode([string])[0].tolist()]

    def _settings(self, kwargs: dict) -> tuple[Sampling, int, tuple[str, ...]]:
        """(how to sample, new tokens, texts that end it)"""
        known: dict = dict(normalize_gen_kwargs(kwargs, MAX_NEW_TOKENS))
        max_tokens, until = known.pop("max_gen_toks"), tuple(end for end in known.pop("until") if end)
        temperature = known.pop("temperature", 1.0)
        sampling = Sampling(
            temperature=temperature if known.pop("do_sample") else 0.0,
            top_k=known.pop("top_k", None), top_p=known.pop("top_p", None), eos=self.ours.eos,
        )  # fmt: skip
        if known:
            raise UserError(f"a task asks for generation_kwargs that are not there: {known}; leave it out")
        return sampling, max_tokens, until

    def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
        """Of continuations; what does not fit is cut off on the left."""
        rows = [
            Row([*context, *continuation][-(self.length + 1) :], len(continuation))
            for _, context, continuation in requests
        ]
        return [(-nll, greedy) for nll, greedy in self._score(rows)]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, each token once, in windows that do not overlap but for one token."""
        rows, owners = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.length, context_len=1):
                context, continuation = make_disjoint_window(window)
                rows.append(Row([*context, *continuation], len(continuation)))
                owners.append(number)
        sums = [0.0] * len(requests)
        for owner, (nll, _) in zip(owners, self._score(rows), strict=True):
            sums[owner] -= nll
        return sums

    def _score(self, rows: list[Row]):
        return score(self.model, rows, mesh=self.mesh, batch_size=self.batch_size, chunk=self.chunk)

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the first of the texts that end them, the end of the document, or max_gen_toks."""
        texts, rows = [""] * len(requests), []
        groups: dict[tuple, list[int]] = {}  # by what is compiled for them
        for number, request in enumerate(requests):
            context, kwargs = request.args
            sampling, max_tokens, until = self._settings(kwargs)
            room = self.length - max_tokens
            if room < 1:
                raise UserError(f"a task generates {max_tokens} tokens of --length={self.length} in all; raise it")
            rows.append(np.array((self.tok_encode(context) or [self.prefix_token_id])[-room:], np.int32))
            width = padded(len(rows[-1]), self.mesh, self.model)
            groups.setdefault((width, sampling, max_tokens, until), []).append(number)
        for settings, numbers in groups.items():
            for first in range(0, len(numbers), self.batch_size):
                batch = numbers[first : first + self.batch_size]
                for number, text in zip(batch, self._continue([rows[n] for n in batch], *settings), strict=True):
                    texts[number] = text
        return texts

    def _continue(
        self, rows: list[np.ndarray], width: int, sampling: Sampling, max_tokens: int, until: tuple[str, ...]
    ) -> list[str]:
        def enough(new: list[list[int]]) -> bool:
            return all(any(end in self.ours.decode(ids) for end in until) for ids in new[: len(rows)])

        new = continue_rows(
            self.model, rows + [rows[0]] * (self.batch_size - len(rows)), width=width, mesh=self.mesh,
            sampling=sampling, max_tokens=max_tokens, seed=0, enough=enough,
        )  # fmt: skip
        return [postprocess_generated_text(self.ours.decode(ids), list(until), None) for ids in new[: len(rows)]]
