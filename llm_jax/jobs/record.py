"""What a training run reports, while it runs."""

import math
import shlex
import time
from collections.abc import Callable

import jax
import numpy as np

from llm_jax.config import Config, RunFailed
from llm_jax.jobs.sections import Sections
from llm_jax.jobs.setup import Setup
from llm_jax.jobs.workdir import Workdir
from llm_jax.measure.flops import peak_flops
from llm_jax.measure.metrics import MetricsLog, read
from llm_jax.measure.progress import Progress
from llm_jax.measure.writers import TensorBoardWriter
from llm_jax.parallel import hosts
from llm_jax.plan.costs import model_flops
from llm_jax.safety.guards import check_first_step
from llm_jax.safety.recorder import Recorder
from llm_jax.safety.rewinds import Rewind
from llm_jax.training.state import compute_dtype


class Spike(Exception):
    """An update that the run is to go back before (spikes.action=rewind)."""

    def __init__(self, step: int):
        super().__init__(f"spike at step {step}")
        self.step = step


class Record:
    """metrics.jsonl, TensorBoard, the terminal, incidents. The metrics of a step are fetched when the next one is under
    way, so that reporting never keeps the devices waiting. Only the first process writes; all decide alike."""

    def __init__(
        self,
        work: Workdir,
        config: Config,
        setup: Setup,
        first_step: int,
        sections: Sections,
        describe_batch: Callable[[int], str],
    ):
        """describe_batch: the texts that made an update, for an incident."""
        shape = setup.shape
        self.work = work
        self.config = config
        self.sections = sections
        self.describe_batch = describe_batch
        self.vocab_size = shape.vocab_size
        self.recorder = Recorder(work.incidents)
        self.log = self.tensorboard = None
        self._begin(first_step)
        self.progress = Progress(config.train.steps, first_step)
        self.flops_per_token = model_flops(setup.shape, config.train.sequence_length, causal=True)
        self.peak_flops = math.nan  # of the first process, which reports
        if hosts.is_first():
            device = jax.local_devices()[0]
            peak = peak_flops(device, compute_dtype(config.model, setup.mesh))
            self.peak_flops = peak.value * setup.mesh.size
            total = f"{self.peak_flops / 1e12:.3g} TFLOP/s"
            self.say(f"MFU counts causal attention, against {total} of all devices; {peak.source}")
        self.tokens_per_step = config.train.batch_size * config.train.sequence_length

    def _begin(self, step: int) -> None:
        """The record goes on from this step: what an earlier start wrote of later ones is dropped."""
        lines = []
        if hosts.is_first():
            self.log = self.log or MetricsLog(self.work.metrics)
            self.log.rewind(step)
            lines = read(self.work.metrics)
            if self.config.log.tensorboard:
                self.tensorboard = TensorBoardWriter(self.work.path, start_step=step)
        self.num_skipped = hosts.first_says(sum(line.get("skipped", False) for line in lines))
        evaluations = [line["step"] for line in lines if line.get("kind") == "evaluate"]
        self.last_evaluation = hosts.first_says(max(evaluations, default=-1))
        self.pending = None
        self.last = time.monotonic()

    def say(self, text: str) -> None:
        if hosts.is_first():
            self.progress.say(text)

    def training(self, step: int, metrics: dict) -> None:
        """Takes the metrics of a step that may still be running, and writes those of the step before."""
        self.flush()
        self.pending = (step, metrics)

    def flush(self) -> None:
        """Writes the step taken last, waiting for it. Raises RunFailed or Spike, by spikes.action."""
        if self.pending is None:
            return
        step, metrics = self.pending
        self.pending = None
        begin = time.monotonic()
        with self.sections("step"):  # also where an evaluation or a save begins with waiting for it
            loss = float(metrics["loss"])
        now = time.monotonic()
        seconds, self.last = now - self.last, now
        self.sections.step(step, waited=now - begin)
        rate = self.tokens_per_step / seconds
        line = {
            "step": step,
            "loss": loss,
            "tokens": int(metrics["tokens"]),
            "seconds": seconds,
            "grad_norm": float(metrics["grad_norm"]),
            "learning_rate": float(metrics["learning_rate"]),
            "batch": f"{int(metrics['batch']):08x}",
            "tokens_per_second": rate,
            "mfu": rate * self.flops_per_token / self.peak_flops,
        }
        if "max_load" in metrics:
            line["max_load"] = float(metrics["max_load"])  # of an expert, over the mean
        finite = math.isfinite(loss) and math.isfinite(line["grad_norm"])
        spikes = bool(metrics["spike"])
        if step == 1 and finite and not self.work.imported.exists():
            check_first_step(loss, metrics["gradient_norms"], self.vocab_size)
        if spikes or not finite:
            line |= {"spike": spikes, "skipped": bool(metrics["skipped"])}
        self.recorder.note(step, line)
        if hosts.is_first():
            self.progress.update(line)
            if step % self.config.log.every == 0 or step in (1, self.config.train.steps) or "spike" in line:
                self._write(line)
        if "spike" in line:
            self._react(step, "spike" if finite else "not-finite", metrics, line)

    def _react(self, step: int, reason: str, metrics: dict, line: dict) -> None:
        """To a spike, or to a loss or gradient that is not finite."""
        spikes = self.config.spikes
        what = f"step {step}: {reason}, loss {line['loss']:.4g}, gradient norm {line['grad_norm']:.4g}"
        if hosts.is_first() and self.recorder.num_incidents("spike", "not-finite") < spikes.limit:
            what += f": {self.incident(step, reason, metrics)}"
        self.say(what)
        if spikes.action == "stop" and reason == "not-finite":
            what = f"loss of step {step} is {line['loss']}, its gradient norm {line['grad_norm']}"
            raise RunFailed(f"the {what}; the newest checkpoint is from before")
        if spikes.action == "rewind":
            raise Spike(step)
        if line["skipped"]:
            self.num_skipped += 1
            if self.num_skipped > spikes.limit:
                raise RunFailed(
                    f"step {step} is the {self.num_skipped}th update to be skipped, of spikes.limit={spikes.limit}"
                )

    def incident(self, step: int, reason: str, metrics: dict | None) -> str:
        """Writes WORKDIR/incidents/STEP-REASON and returns its path, or why it could not; metrics: of that very update,
        if they are known."""
        try:
            text = self.describe_batch(step)
        except Exception as error:  # that may be what the incident is about
            text = f"the batch cannot be read: {type(error).__name__}: {error}"
        norms = {}
        if metrics is not None:
            norms = {
                key: {name: np.asarray(norm).tolist() for name, norm in metrics[key].items()}
                for key in ("gradient_norms", "parameter_norms")
            }
        replay = shlex.join(["llm-jax", "inspect", "step", f"--workdir={self.work.name}", f"--step={step}"])
        try:
            return self.work.shown(self.recorder.incident(step, reason, batch_text=text, replay=replay, extra=norms))
        except OSError as error:  # such as a full disk, which is not what the run should end by
            return f"the incident cannot be written ({error.strerror})"

    def crashed(self, step: int) -> None:
        """The update of this step, or the one before, did not come to an end."""
        if hosts.is_first() and self.recorder.num_incidents("crash") < self.config.spikes.limit:
            self.say(f"what is known about the crash: {self.incident(step, 'crash', None)}")

    def rewound(self, rewind: Rewind, step: int) -> None:
        """step: that the run goes on from; less than rewind.to if that checkpoint was damaged."""
        if self.tensorboard is not None:
            self.tensorboard.close()
        self._begin(step)
        if self.log is not None:
            self.log.append({"kind": "rewind", "step": step, "spike": rewind.spike, "batches": rewind.batches})
        self.say(f"rewound from step {rewind.spike} to step {step}, past {rewind.batches} batches")

    def has_evaluation(self, step: int) -> bool:
        """Whether an earlier start has evaluated at this step; the same answer in every process."""
        return self.last_evaluation == step

    def evaluation(self, step: int, result: dict) -> None:
        """Takes the result of an evaluation of the fixed subset."""
        self.last_evaluation = step
        if hosts.is_first():
            measures = result["all"]
            what = "untrained" if step == 0 else f"step {step}"
            self.say(f"held-out subset, {what}: loss {measures['loss']:.4f}, perplexity {measures['perplexity']:,.2f}")
            self._write({"kind": "evaluate", "step": step, **measures, "sources": result["sources"]})
        self.last = time.monotonic()

    def close(self) -> None:
        self.flush()
        self.progress.close()
        if self.log is not None:
            self.log.close()
        if self.tensorboard is not None:
            self.tensorboard.close()

    def _write(self, line: dict) -> None:
        if self.log is not None:
            self.log.append(line)
        if self.tensorboard is not None:
            self.tensorboard.write(line, time.time())


def untrained_perplexity(work: Workdir) -> tuple[float, float] | None:
    """(untrained, trained) perplexity of the fixed subset, from the record."""
    values = [line["perplexity"] for line in read(work.metrics) if line.get("kind") == "evaluate"]
    return (values[0], values[-1]) if len(values) > 1 else None
