"""What is printed, with a clock that the test turns."""

import io

from llm_jax.measure.progress import Progress, _duration


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def run(stream, *, steps, start=0, seconds_per_step=1.0):
    clock = Clock()
    progress = Progress(steps, start, stream=stream, clock=clock)
    clock.now += 100.0  # compilation
    for step in range(start + 1, steps + 1):
        clock.now += seconds_per_step
        progress.update({"step": step, "loss": 4 - step / steps, "tokens_per_second": 12345.6, "mfu": 0.4126})
        if step == steps // 2:
            progress.say("evaluation: perplexity 20")
    progress.close()
    return stream.getvalue()


def shown_steps(text):
    return [int(line.split()[1].split("/")[0]) for line in text.splitlines() if line.startswith("step")]


def test_lines_at_round_steps_when_steps_are_fast():
    text = run(io.StringIO(), steps=1200, seconds_per_step=0.001)
    assert shown_steps(text) == [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 1200]
    assert "evaluation: perplexity 20\n" in text and "\r" not in text


def test_lines_every_half_minute_when_steps_are_slow():
    assert shown_steps(run(io.StringIO(), steps=100, start=60, seconds_per_step=10.0)) == [
        61, 62, 65, 68, 70, 73, 76, 79, 80, 83, 86, 89, 92, 95, 98, 100
    ]  # fmt: skip


def test_the_line_and_its_time_left():
    lines = run(io.StringIO(), steps=20, seconds_per_step=5.0).splitlines()
    assert lines[0] == "step 1/20  loss 3.950  12,346 tokens/s  MFU 41.3%"
    assert lines[1] == "step 2/20  loss 3.900  12,346 tokens/s  MFU 41.3%  ETA 1:30"  # without the compilation


def test_only_what_is_known_is_shown():
    stream = io.StringIO()
    Progress(10, stream=stream, clock=Clock()).update({"step": 1, "loss": float("nan"), "mfu": None})
    assert stream.getvalue() == "step 1/10  loss nan\n"


def test_a_bar_on_a_terminal():
    text = run(Terminal(), steps=40, start=10, seconds_per_step=0.5)
    assert "40/40" in text and "loss 3.000  12,346 tokens/s  MFU 41.3%  ETA 0:00" in text
    assert "\revaluation: perplexity 20\n" in text  # at the beginning of a line
    assert not shown_steps(text.replace("\r", "\n"))


def test_duration():
    texts = {0: "0:00", 59.6: "1:00", 3600: "1:00:00", 7385: "2:03:05", 4 * 86400 + 7380: "4d 02:03"}
    assert {seconds: _duration(seconds) for seconds in texts} == texts
