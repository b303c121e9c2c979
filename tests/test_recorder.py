"""Incidents as a reader finds them: strict JSON, whole or not at all."""

import datetime
import json

import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.safety.recorder import Recorder

REST = dict(batch_text="ein Satz\n", replay="llm-jax inspect step --workdir=w --step=7", extra={})


def read(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads((path / "incident.json").read_text("utf-8"), parse_constant=refuse)


def test_an_incident_tells_what_was_noted(tmp_path):
    recorder = Recorder(tmp_path / "incidents", length=3)
    for step in range(1, 8):
        loss = float("nan") if step == 7 else step / 4
        recorder.note(step, {"loss": loss, "grad_norm": np.float32(np.inf), "batch": f"{step:08x}", "spike": step == 7})
    norms = {"blocks/attention/wq": np.array([1.5, -np.inf], np.float32), "embed": np.float32(2)}
    path = recorder.incident(7, "not-finite", **{**REST, "extra": {"gradient_norms": norms}})
    assert path == tmp_path / "incidents" / "7-not-finite"
    assert (path / "batch.txt").read_text("utf-8") == "ein Satz\n"
    found = read(path)
    seconds = (datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(found.pop("time"))).total_seconds()
    assert 0 <= seconds < 3600
    assert found == {
        "step": 7,
        "reason": "not-finite",
        "replay": REST["replay"],
        "gradient_norms": {"blocks/attention/wq": [1.5, "-Infinity"], "embed": 2.0},
        "history": [
            {"step": 5, "loss": 1.25, "grad_norm": "Infinity", "batch": "00000005", "spike": False},
            {"step": 6, "loss": 1.5, "grad_norm": "Infinity", "batch": "00000006", "spike": False},
            {"step": 7, "loss": "NaN", "grad_norm": "Infinity", "batch": "00000007", "spike": True},
        ],
    }


def test_a_second_incident_of_the_same_kind_stands_beside_the_first(tmp_path):
    paths = [Recorder(tmp_path).incident(step, "spike", **REST) for step in (3, 3, 4, 3)]
    assert [path.name for path in paths] == ["3-spike", "3-spike-2", "4-spike", "3-spike-3"]
    assert Recorder(tmp_path).num_incidents("spike", "not-finite") == 4


def test_what_a_killed_process_left_is_no_incident(tmp_path, monkeypatch):
    recorder = Recorder(tmp_path / "incidents")
    assert recorder.num_incidents("spike") == 0
    with monkeypatch.context() as patch:  # killed before the last line
        patch.setattr(type(tmp_path), "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            recorder.incident(3, "spike", **REST)
    assert not (tmp_path / "incidents" / "3-spike").exists() and recorder.num_incidents("spike") == 0
    path = recorder.incident(3, "spike", **{**REST, "batch_text": "new"})
    assert [p.name for p in path.parent.iterdir()] == ["3-spike"] and (path / "batch.txt").read_text() == "new"
    assert recorder.num_incidents("spike") == 1


def test_numbers_of_jax_and_numpy_are_taken(tmp_path):
    recorder = Recorder(tmp_path)
    recorder.note(1, {"loss": jnp.float32(0.5), "skipped": np.bool_(True), "batch": np.uint32(2**32 - 1)})
    path = recorder.incident(1, "spike", **REST)
    assert read(path)["history"] == [{"step": 1, "loss": 0.5, "skipped": True, "batch": 2**32 - 1}]
