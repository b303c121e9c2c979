"""What a training run reports, while it runs."""

import math
import time

import numpy as np
from jax.experimental import multihost_utils

from llm_jax.config import Config
from llm_jax.jobs.workdir import Workdir
from llm_jax.measure.flops import Peak, flops_per_token
from llm_jax.measure.metrics import MetricsLog, read
from llm_jax.measure.progress import Progress
from llm_jax.measure.writers import TensorBoardWriter
from llm_jax.model.transformer import Shape
from llm_jax.parallel import hosts
from llm_jax.safety.guards import check_first_step


class Record:
    """metrics.jsonl, TensorBoard, the terminal. The metrics of a step are fetched when the next one is under way, so
    that reporting never keeps the devices waiting. Only the first process writes."""

    def __init__(self, work: Workdir, config: Config, shape: Shape, peak: Peak, num_devices: int, first_step: int):
        self.work = work
        self.config = config
        self.vocab_size = shape.vocab_size
        self.log = self.tensorboard = None
        if hosts.is_first():
            self.log = MetricsLog(work.metrics)
            self.log.rewind(first_step)
            self.tensorboard = TensorBoardWriter(work.path, start_step=first_step) if config.log.tensorboard else None
        self.progress = Progress(config.train.steps, first_step)
        self.flops_per_token = flops_per_token(
            num_layers=shape.num_layers,
            width=shape.width,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_width=shape.head_width,
            feed_forward_width=shape.feed_forward_width,
            gated=shape.gated,
            vocab_size=shape.vocab_size,
            sequence_length=config.train.sequence_length,
            causal=True,
        )
        self.peak_flops = peak.value * num_devices
        self.say(
            f"MFU counts causal attention, against {self.peak_flops / 1e12:.3g} TFLOP/s of all devices; {peak.source}"
        )
        self.tokens_per_step = config.train.batch_size * config.train.sequence_length
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
        """Writes the step taken last, waiting for it."""
        if self.pending is None:
            return
        step, metrics = self.pending
        self.pending = None
        loss = float(metrics["loss"])
        now = time.monotonic()
        seconds, self.last = now - self.last, now
        if step == 1:
            check_first_step(loss, metrics["gradient_norms"], self.vocab_size)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss of step {step} is {loss}; the newest checkpoint is from before")
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
        if not hosts.is_first():
            return
        self.progress.update(line)
        if step % self.config.log.every == 0 or step in (1, self.config.train.steps):
            self._write(line)

    def has_evaluation(self, step: int) -> bool:
        """Whether an earlier start has evaluated at this step; the same answer in every process."""
        lines = read(self.work.metrics) if hosts.is_first() else []
        found = any(line.get("kind") == "evaluate" and line["step"] == step for line in lines)
        return bool(multihost_utils.broadcast_one_to_all(np.int32(found)))

    def evaluation(self, step: int, result: dict) -> None:
        """Takes the result of an evaluation of the fixed subset."""
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
