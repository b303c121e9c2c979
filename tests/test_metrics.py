"""The record of a run against a killed process and numbers that JSON lacks; and its copy in TensorBoard."""

import json
import math
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from llm_jax.config import UserError
from llm_jax.measure.metrics import MetricsLog, read
from llm_jax.measure.writers import TensorBoardWriter


def test_lines_are_whole_and_valid_json(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    log = MetricsLog(path)
    lines = [
        {"step": 1, "loss": np.float32(3.5), "tokens": np.int64(8), "learning_rate": jnp.float32(0.25)},
        {"kind": "evaluate", "step": 1, "sources": {"web": {"loss": 2.0}}, "note": "no NaN", "parts": [1, None]},
        {"step": 2, "loss": math.nan, "gradient_norm": math.inf, "other": -math.inf},
    ]
    for number, line in enumerate(lines, start=1):
        log.append(line)
        assert len(path.read_text().splitlines()) == number  # without a flush or a close

    def forbidden(constant):
        raise AssertionError(f"{constant} is not JSON")

    strict = [json.loads(line, parse_constant=forbidden) for line in path.read_text().splitlines()]
    assert strict[0] == {"step": 1, "loss": 3.5, "tokens": 8, "learning_rate": 0.25}
    assert strict[2] == {"step": 2, "loss": "NaN", "gradient_norm": "Infinity", "other": "-Infinity"}
    first, second, third = read(path)
    assert first == strict[0] and second == lines[1]
    assert math.isnan(third["loss"]) and third["gradient_norm"] == math.inf and third["other"] == -math.inf


def test_rewind_drops_later_steps_and_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.append({"kind": "start", "devices": 8})
    for step in range(1, 6):
        log.append({"step": step, "loss": math.nan if step == 2 else step / 7})
        log.append({"kind": "evaluate", "step": step})
    log.close()
    before = path.read_bytes().splitlines(keepends=True)
    with open(path, "ab") as file:
        file.write(b'{"step": 6, "lo')
    assert len(read(path)) == 11

    log = MetricsLog(path)
    assert path.read_bytes() == b"".join(before)
    log.rewind(3)
    assert path.read_bytes() == b"".join(before[:7])
    log.append({"step": 4, "loss": 1.0})
    assert [line["step"] for line in read(path) if "kind" not in line] == [1, 2, 3, 4]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_errors_are_clear(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nrubbish\n{"step": 2}\n')
    with pytest.raises(UserError, match="metrics.jsonl, line 2 is not JSON"):
        read(path)
    with pytest.raises(UserError, match="cannot write .*choose another --workdir"):
        MetricsLog(path / "metrics.jsonl")


def events(directory) -> list[Event]:
    """TFRecords: length, its checksum, the data, its checksum."""
    found = []
    for path in sorted(directory.glob("events*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def test_tensorboard_gets_the_scalars(tmp_path):
    writer = TensorBoardWriter(tmp_path, start_step=4)
    writer.write({"step": 5, "loss": 2.5, "note": "text", "flag": True, "none": None}, wall_time=100.0)
    writer.write({"kind": "evaluate", "step": 5, "all": {"perplexity": np.float32(8)}}, wall_time=101.0)
    writer.write({"kind": "start", "devices": 8}, wall_time=102.0)
    writer.close()
    found = events(tmp_path / "tensorboard")
    restarts = [event.step for event in found if event.HasField("session_log")]
    assert restarts == [5]  # what was written for steps from 5 on is hidden
    scalars = [(e.wall_time, e.step, v.tag, v.simple_value) for e in found for v in e.summary.value]
    assert scalars == [(100.0, 5, "train/loss", 2.5), (101.0, 5, "evaluate/all/perplexity", 8.0)]


def test_a_writer_that_fails_does_so_once(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("a file where the directory should be")
    writer = TensorBoardWriter(tmp_path)
    for step in range(3):
        writer.write({"step": step, "loss": 1.0}, wall_time=float(step))
    writer.close()
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "the run goes on" in message

    writer = TensorBoardWriter(tmp_path / "other")
    for step in range(3):
        writer.write({"step": step, "loss": [1.0], "x": object()}, wall_time=float(step))
    writer.close()
    assert capsys.readouterr().err.count("the run goes on") == 1
