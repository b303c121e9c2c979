"""A spike in a real run: what is done about it, what is written down, and that the update can be made again."""

import json
import shutil

import pytest
from processes import Processes
from test_train import curve, record

# Batch 15, which makes update 16, is one rare token: its gradients all point one way.
PLANTED = """
from llm_jax.data.stream import TrainStream
batch = TrainStream.batch
def planted(self, number, first=0, last=None):
    found = batch(self, number, first, last)
    if number == 15:
        found.tokens_BU[:] = 399
    return found
TrainStream.batch = planted
"""
FLAGS = ("--config.spikes.window=8", "--config.spikes.rewind_steps=3", "--config.spikes.rewind_batches=4",
         "--config.spikes.threshold=13", "--config.train.steps=20", "--config.log.sample_prompt=none")  # fmt: skip


def train(tiny, workdir, folder, *flags) -> str:
    running = Processes(tiny, workdir, folder, 1, *FLAGS, *flags, programs={0: PLANTED})
    assert running.wait_for_the_end() == [0], running.text()
    return running.text()


def incident(workdir, name: str) -> tuple[dict, str]:
    def refuse(constant):
        raise ValueError(constant)

    folder = workdir / "incidents" / name
    return json.loads((folder / "incident.json").read_text(), parse_constant=refuse), (folder / "batch.txt").read_text()


@pytest.fixture(scope="module")
def rewound(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewound")
    text = train(tiny, folder / "run", folder / "out", "--config.spikes.action=rewind")
    assert "rewound from step 16 to step 12, past 4 batches" in text
    return folder / "run"


def test_rewind_goes_back_and_past_the_batches(rewound, trained, tiny, tmp_path):
    lines = record(rewound)
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert record(rewound, "rewind") == [{"kind": "rewind", "step": 12, "spike": 16, "batches": 4}]
    used, planned = ({line["step"]: line["batch"] for line in record(run)} for run in (rewound, trained))
    assert [used[step] for step in range(1, 13)] == [planned[step] for step in range(1, 13)]
    assert [used[step] for step in range(13, 21)] == [planned[step + 4] for step in range(13, 21)]

    # A start after it takes the same batches, which `inspect batch` knows.
    copy = shutil.copytree(rewound, tmp_path / "copy")
    shutil.rmtree(copy / "checkpoints" / "20")
    train(tiny, copy, tmp_path / "out", "--config.spikes.action=rewind")
    assert curve(copy) == curve(rewound)
    shown = [tiny.run("inspect batch", run, f"--step={step}").stdout for run, step in [(rewound, 14), (trained, 18)]]
    assert shown[0] == shown[1] and "row 7" in shown[0]


@pytest.mark.soak
def test_a_kill_between_rewind_and_removal(rewound, tiny, tmp_path):
    """Checkpoints of the path that was left are removed by the next start."""
    copy = shutil.copytree(rewound, tmp_path / "copy")
    saved = json.loads((copy / "rewinds.json").read_text())
    assert sorted(path.name for path in (copy / "checkpoints").iterdir()) == ["12", "16", "20"]
    (copy / "rewinds.json").write_text(json.dumps(saved | {"cleared": False}))
    text = train(tiny, copy, tmp_path / "out", "--config.spikes.action=rewind")
    assert "goes on from step 12" in text
    assert curve(copy) == curve(rewound)


def test_skip_leaves_the_update_out(trained, tiny, tmp_path):
    text = train(tiny, tmp_path / "run", tmp_path / "out", "--config.spikes.action=skip")
    lines = {line["step"]: line for line in record(tmp_path / "run")}
    assert [step for step, line in lines.items() if line.get("skipped")] == [16]
    batches = [line["batch"] for line in record(trained)[:20]]
    assert [line["batch"] for line in lines.values()] == [*batches[:15], lines[16]["batch"], *batches[16:]]
    assert lines[16]["grad_norm"] > 2 * max(lines[15]["grad_norm"], lines[17]["grad_norm"])
    assert "step 16: spike" in text

    found, batch = incident(tmp_path / "run", "16-spike")
    assert found["step"] == 16 and found["reason"] == "spike"
    assert [update["step"] for update in found["history"]] == list(range(1, 17))
    assert [update["loss"] for update in found["history"]] == [lines[step]["loss"] for step in range(1, 17)]
    assert len(found["gradient_norms"]["blocks/attention/wq"]) == 2  # layers
    assert found["gradient_norms"].keys() == found["parameter_norms"].keys()
    assert f"inspect step --workdir={tmp_path / 'run'} --step=16" in found["replay"]
    assert batch.count("row ") == 8


@pytest.mark.soak
def test_spikes_are_limited(tiny, tmp_path):
    """The 2nd of spikes.limit=1 ends the run with a line and exit code 70."""
    program = PLANTED.replace("number == 15", "number in (15, 17)")
    flags = (*FLAGS, "--config.spikes.action=skip", "--config.spikes.limit=1")
    running = Processes(tiny, tmp_path / "run", tmp_path / "out", 1, *flags, programs={0: program})
    assert running.wait_for_the_end() == [70], running.text()
    assert "step 18 is the 2th update to be skipped" in running.text() and "Traceback" not in running.text()


def test_an_update_is_made_again(trained, tiny):
    """Bit for bit as it was recorded, from the newest checkpoint before it."""
    done = tiny.run("inspect step", trained, "--step=19", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["as_recorded"] is True and found["replayed_from"] == 16
    assert found["batch"] == record(trained)[18]["batch"]
    done = tiny.run("inspect step", trained, "--step=18")
    assert "step 18, replayed from 16" in done.stdout and "bit-identical to the record" in done.stdout


def test_a_crash_is_recorded(tiny, tmp_path):
    program = """
import llm_jax.jobs.record as record
training = record.Record.training
def fail(self, step, metrics):
    if step == 7:
        raise RuntimeError("planted")
    training(self, step, metrics)
record.Record.training = fail
"""
    running = Processes(tiny, tmp_path / "run", tmp_path / "out", 1, *FLAGS, programs={0: program})
    assert running.wait_for_the_end() == [70], running.text()
    assert "RuntimeError: planted" in running.text()
    found, batch = incident(tmp_path / "run", "7-crash")
    assert [update["step"] for update in found["history"]] == list(range(1, 6))  # step 6 was not fetched yet
    assert batch.count("row ") == 8


@pytest.mark.soak
def test_hardware_that_computes_wrongly_is_noticed(tiny, tmp_path):
    """An update repeated gives the same bits; here, a stand-in for a device gives others at the second time."""
    flags = (*FLAGS, "--config.checkpoint.recompute_every=5", "--config.parallel.num_cpu_devices=2")
    running = Processes(tiny, tmp_path / "good", tmp_path / "out", 1, *flags, "--config.parallel.replica=2")
    assert running.wait_for_the_end() == [0], running.text()

    program = """
import dataclasses
import jax
import jax.numpy as jnp
from llm_jax.jobs import setup
compile = setup.Setup.compile
def unreliable(self, state, **options):
    update = compile(self, state, **options)
    calls = []
    structure = jax.tree.structure(state)
    def compute(leaves, batch):
        leaves, metrics = update(leaves, batch)
        calls.append(None)
        if len(calls) == 6:
            state = jax.tree.unflatten(structure, leaves)
            others = jax.tree.map(lambda leaf: leaf * 1.000001, state.parameters)
            leaves = jax.tree.leaves(dataclasses.replace(state, parameters=others))
        return leaves, metrics
    return compute
setup.Setup.compile = unreliable
"""
    running = Processes(tiny, tmp_path / "bad", tmp_path / "out2", 1, *FLAGS, flags[-2], programs={0: program})
    assert running.wait_for_the_end() == [70], running.text()
    assert "step 5 was computed wrongly by this hardware" in running.text() and "wq" in running.text()
    assert [path.name for path in (tmp_path / "bad" / "checkpoints").iterdir()] == ["4"]
