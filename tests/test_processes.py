"""Several processes train as one, stop as one, and do not outlive each other."""

import json
import shutil
import signal

import pytest
from processes import Processes, by_open_mpi, by_slurm
from test_train import curve, record

NO_SAMPLE = "--config.log.sample_prompt=none"
# Until something happens; a schedule that does not depend on the number of steps.
LONG = ("--config.train.steps=1000000", "--config.optimizer.schedule=constant", NO_SAMPLE)


@pytest.mark.soak
def test_another_number_of_processes_goes_on_as_one(trained, tiny, tmp_path):
    """From the checkpoint of one process: two processes take the same batches, and lose 1e-6 of the loss at most."""
    flags = ("--config.train.steps=32", NO_SAMPLE)
    for name in ("one", "two"):
        shutil.copytree(trained, tmp_path / name)
    two = Processes(tiny, tmp_path / "two", tmp_path / "out", 2, *flags)
    assert two.wait_for_the_end() == [0, 0], two.text()
    done = tiny.run("train", tmp_path / "one", *flags)
    assert done.returncode == 0, done.stderr
    for name in ("kind", "step", "batch", "tokens"):
        assert [line.get(name) for line in record(tmp_path / "one")] == [
            line.get(name) for line in record(tmp_path / "two")
        ]
    losses = [[line["loss"] for line in record(tmp_path / name)] for name in ("one", "two")]
    assert len(losses[1]) == 32
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    evaluations = [json.loads((tmp_path / name / "evaluate.json").read_text())["all"] for name in ("one", "two")]
    assert evaluations[1]["tokens"] == evaluations[0]["tokens"]
    assert evaluations[1]["loss"] == pytest.approx(evaluations[0]["loss"], rel=1e-6)
    assert "Perplexity" in two.text(0) and "Perplexity" not in two.text(1)  # one of them tells

    # And back: what two have saved, one goes on from.
    done = tiny.run("train", tmp_path / "two", "--config.train.steps=34", NO_SAMPLE)
    assert done.returncode == 0, done.stderr
    assert "goes on from step 32" in done.stdout


@pytest.mark.parametrize(
    "number, then, launcher",
    [(2, 1, by_open_mpi), pytest.param(4, 2, by_slurm, marks=pytest.mark.soak)],
)
def test_processes_of_a_launcher_train_as_one(number, then, launcher, trained, tiny, tmp_path):
    """Without flags, they know of each other, make the batches of one process and lose 1e-6 of its losses at most; so
    do another number of them that go on from a checkpoint of theirs."""
    run = tmp_path / "run"

    def check():
        exact = [[(line["step"], line["batch"], line["tokens"]) for line in record(path)] for path in (trained, run)]
        assert exact[1] == exact[0] and len(exact[1]) == 24
        losses = [[line["loss"] for line in record(path)] for path in (trained, run)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-6)
        losses = [[line["loss"] for line in record(path, "evaluate")] for path in (trained, run)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-6)

    first = Processes(tiny, run, tmp_path / "first", number, NO_SAMPLE, launcher=launcher)
    assert first.wait_for_the_end() == [0] * number, first.text()
    assert f"processes: {number} (" in first.text(number - 1) and f"this is {number - 1}, coor" in first.text(
        number - 1
    )
    check()
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"16", "20", "24"}
    for step in ("20", "24"):  # as if it had not come so far
        shutil.rmtree(run / "checkpoints" / step)
    others = Processes(tiny, run, tmp_path / "others", then, NO_SAMPLE, launcher=launcher)
    assert others.wait_for_the_end() == [0] * then, others.text()
    assert "goes on from step 16" in others.text()
    check()


def test_a_notice_to_one_stops_all_at_the_same_step(tiny, tmp_path):
    running = Processes(tiny, tmp_path / "run", tmp_path / "out", 2, *LONG, "--config.checkpoint.every=1000000")
    running.wait_for("step 5/")
    running.processes[1].send_signal(signal.SIGTERM)
    assert running.wait() == [75, 75], running.text()
    saved = record(tmp_path / "run")[-1]["step"]
    assert f"preempted: saved step {saved}" in running.text()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [str(saved)]


@pytest.mark.soak
@pytest.mark.parametrize("moment", ["prepare", "compile"])
def test_a_notice_before_the_first_step_ends_all(moment, tiny, tmp_path):
    cache = tmp_path / "cache"  # with nothing prepared and nothing compiled
    flags = (f"--config.data.cache_dir={cache}", *LONG)
    running = Processes(tiny, tmp_path / "run", tmp_path / "out", 2, *flags)
    if moment == "prepare":
        running.wait_until((cache / "tokenizers.lock").exists, moment)
    else:
        running.wait_for("model: ")
    running.processes[1].send_signal(signal.SIGTERM)
    assert running.wait() == [75, 75], running.text()
    assert not list((tmp_path / "run").glob("metrics.jsonl"))


@pytest.mark.soak
def test_a_notice_during_an_evaluation(tiny, tmp_path):
    """It is given up, what has been trained is saved, and the next start evaluates."""
    flags = (*LONG, "--config.evaluate.batch_size=1", "--config.checkpoint.every=1000000")
    long = "--config.evaluate.subset=1000000"
    running = Processes(tiny, tmp_path / "run", tmp_path / "out", 1, *flags, "--config.evaluate.every=none")
    running.wait_for("step 5/")
    running.kill()
    running = Processes(tiny, tmp_path / "run", tmp_path / "out", 1, *flags, "--config.evaluate.every=3", long)
    running.wait_until(lambda: len(curve(tmp_path / "run")) == 3, "the evaluation of step 3")
    running.processes[0].send_signal(signal.SIGTERM)
    assert running.wait() == [75], running.text()
    assert "preempted: saved step" in running.text()


FAULTS = {
    "killed": (None, signal.SIGKILL),
    "stopped": (None, signal.SIGSTOP),
    "raises": ("raise RuntimeError('planted')", None),
    "exits": ("import sys; sys.exit(3)", None),
    "exits at once": ("import os; os._exit(3)", None),
}


@pytest.mark.parametrize(
    "fault, num_processes, victim",
    [("killed", 2, 0)]
    + [
        pytest.param(*case, marks=pytest.mark.soak)
        for case in [("killed", 4, 2), ("stopped", 4, 2), ("raises", 2, 1), ("exits", 2, 1), ("exits at once", 2, 1)]
    ],
)
def test_one_fault_ends_all(fault, num_processes, victim, tiny, tmp_path):
    """The default would be to wait for minutes. One that was stopped ends when it is continued."""
    code, number = FAULTS[fault]
    programs = {}
    if code:  # in the loop, between two updates
        programs[victim] = f"""
import llm_jax.parallel.hosts as hosts
reached = hosts.Preemption.reached
def fail(self):
    import threading
    if threading.current_thread() is threading.main_thread() and self._count > 40:
        {code}
    return reached(self)
hosts.Preemption.reached = fail
"""
    running = Processes(tiny, tmp_path / "run", tmp_path / "out", num_processes, *LONG, programs=programs)
    if number:
        running.wait_for("step 5/")
        running.processes[victim].send_signal(number)
    codes = running.wait(but=victim if number == signal.SIGSTOP else None)
    others = [code for process, code in enumerate(codes) if process != victim]
    assert all(others), (codes, running.text())
    if number == signal.SIGSTOP:
        running.processes[victim].send_signal(signal.SIGCONT)
        assert running.wait()[victim] != 0
    elif fault == "raises":
        assert codes[victim] == 70 and "RuntimeError: planted" in running.text(victim)
    if number == signal.SIGKILL:
        assert set(others) == {70}, codes  # one clear message, not an abort


def test_a_hang_ends_the_run_and_tells_where(tiny, tmp_path):
    """By the watchdog; the main thread waits for ever in its 6th step."""
    program = """
import threading
import llm_jax.jobs.record as record
training = record.Record.training
def wait_for_ever(self, step, metrics):
    if step == 6:
        threading.Event().wait()
    training(self, step, metrics)
record.Record.training = wait_for_ever
"""
    flags = (*LONG, "--config.watchdog.step=1")
    running = Processes(tiny, tmp_path / "run", tmp_path / "out", 1, *flags, programs={0: program})
    assert running.wait_for_the_end() == [70], running.text()
    assert "no progress in section 'step'" in running.text()
    (stacks,) = (tmp_path / "run" / "stacks").iterdir()
    assert "in wait_for_ever" in stacks.read_text() and str(stacks) in running.text()


@pytest.mark.soak
def test_different_configs_are_refused(tiny, tmp_path):
    """Each process was started by somebody's script."""
    program = "import sys; sys.argv.append('--config.optimizer.peak_learning_rate=1')"
    running = Processes(tiny, tmp_path / "run", tmp_path / "out", 2, programs={1: program})
    assert running.wait() == [78, 78], running.text()
    assert "--config: process 1 was given another one than process 0" in running.text(0) + running.text(1)


def test_flags_that_belong_together(tiny, tmp_path):
    done = tiny.run("train", tmp_path / "run", "--num_processes=2")
    assert done.returncode == 78
    assert "belong together; give --coordinator and --process_id, too" in done.stderr


def test_one_workdir_twice_at_once_is_refused(tiny, tmp_path):
    running = Processes(tiny, tmp_path / "run", tmp_path / "out", 1, *LONG)
    running.wait_for("model: ")
    done = tiny.run("train", tmp_path / "run", *LONG)
    running.kill()
    assert done.returncode == 78
    assert "is being trained by another process" in done.stderr
