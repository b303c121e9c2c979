"""What a person sees of a run: a bar on a terminal, plain lines at sensible moments elsewhere."""

import sys
import time

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Progress from start_step to total_steps. clock: seconds that only go forward."""

    def __init__(self, total_steps: int, start_step: int = 0, stream=None, clock=time.monotonic):
        self._total, self._start = total_steps, start_step
        self._stream = stream or sys.stderr
        self._clock = clock
        self._first = None  # (step, time) of the first update: the time before is compilation
        self._last_line = clock()
        self._bar = None
        if self._stream.isatty():
            self._bar = tqdm(
                total=total_steps, initial=start_step, file=self._stream, dynamic_ncols=True, unit="step",
                bar_format="{n_fmt}/{total_fmt} |{bar}| {postfix}",
            )  # fmt: skip

    def update(self, line: dict) -> None:
        """After a step: its line of metrics.jsonl. Shown are `step`, `loss`, `tokens_per_second` and `mfu` (a
        fraction), as far as it has them, and the time left."""
        step, now = line["step"], self._clock()
        if self._first is None:
            self._first = (step, now)
        text = self._describe(line, now)
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
        elif step == self._total or _is_round(step - self._start) or now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            self.say(f"step {step}/{self._total}  {text}")

    def say(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _describe(self, line: dict, now: float) -> str:
        parts = []
        if "loss" in line:
            parts.append(f"loss {line['loss']:.3f}")
        if line.get("tokens_per_second") is not None:
            parts.append(f"{line['tokens_per_second']:,.0f} tokens/s")
        if line.get("mfu") is not None:
            parts.append(f"MFU {100 * line['mfu']:.1f}%")
        first_step, first_time = self._first
        if line["step"] > first_step:
            seconds = (now - first_time) / (line["step"] - first_step) * (self._total - line["step"])
            parts.append(f"ETA {_duration(seconds)}")
        return "  ".join(parts)


def _is_round(steps: int) -> bool:
    """1, 2, 5, 10, 20, 50, 100, ..."""
    digits = str(steps)
    return digits[0] in "125" and set(digits[1:]) <= {"0"}


def _duration(seconds: float) -> str:
    """3:05, 2:03:05, 4d 02:03"""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02}:{minutes:02}"
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
