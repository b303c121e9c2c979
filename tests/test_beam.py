import gzip
import pathlib
import re

import pytest
import tiny_steps
from tiny_corpus import TOPICS

from llm_jax.config import UserError
from llm_jax.corpus import engine
from llm_jax.corpus.stats import Stats

pytest.importorskip("apache_beam", reason="apache-beam is not installed (extra [beam])")
from llm_jax.corpus import beam

WET = pathlib.Path(__file__).parents[2] / "shared" / "data" / "wet"
PAGES = 20  # of each file
RUNNER = "--runner=DirectRunner"


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> list[str]:
    """Files of text: pages of the web where they are at hand, else the documentation of Python."""
    folder = tmp_path_factory.mktemp("texts")
    if WET.exists():
        files = [re.split(rb"WARC/1.0\r\n", gzip.open(path).read())[1 : PAGES + 1] for path in sorted(WET.glob("*.gz"))]
    else:
        files = [[text.encode() for text in TOPICS[i : i + PAGES]] for i in range(0, 4 * PAGES, PAGES)]
    for i, pages in enumerate(files):
        (folder / f"{i}.txt").write_bytes(b"\n".join(pages))
    return [str(path) for path in sorted(folder.iterdir())]


def test_both_engines_make_the_same_records_and_stats(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(beam, "MEMORY_BYTES", 100_000)  # so that values of a stream do not fit
    steps = tiny_steps.word_build(texts)
    local = engine.run(steps, str(tmp_path / "local"), num_workers=2, num_shards=3)
    distributed = beam.run_beam(steps, str(tmp_path / "beam"), num_shards=2, pipeline_args=[RUNNER])
    assert set(distributed.collections) == set(local.collections) == {"joined", "frequencies"}
    for name, collection in local.collections.items():
        found = distributed.collections[name]
        assert len(found) == len(collection)
        assert sorted(found) == sorted(collection)
    assert len(local.collections["joined"]) > 2000
    for step in steps:
        assert distributed.stats[step.name].to_json() == local.stats[step.name].to_json()
    assert len(local.total.examples["words/once"]) == 20
    assert {path.name for path in (tmp_path / "beam" / "joined").iterdir()} == {"00000.pairs", "00001.pairs"}


def test_the_stats_of_all_bundles_are_merged():
    """DirectRunner has one bundle of most steps."""
    parts = [Stats() for _ in range(3)]
    for i, part in enumerate(parts):
        part.count("seen", i)
        part.example("seen", str(i), "text")
    merged = Stats.from_json(beam._merge_stats(part.to_json() for part in parts))
    assert merged.counts == {"seen": 3}
    assert {key for _, key, _ in merged.examples["seen"]} == set("012")


def test_a_folder_holds_one_build(texts, tmp_path):
    steps = tiny_steps.word_build(texts)
    first = beam.run_beam(steps, str(tmp_path), num_shards=1, pipeline_args=[])
    built = (tmp_path / beam.BUILT).stat()
    again = beam.run_beam(steps, str(tmp_path), num_shards=1, pipeline_args=[])
    assert (tmp_path / beam.BUILT).stat() == built, "it was run again"
    assert {name: list(pairs) for name, pairs in again.collections.items()} == {
        name: list(pairs) for name, pairs in first.collections.items()
    }
    assert again.total.to_json() == first.total.to_json()
    with pytest.raises(UserError, match=f"^{tmp_path}/{beam.BUILT}: another build was finished here"):
        beam.run_beam(tiny_steps.word_build(texts[:1]), str(tmp_path), num_shards=1, pipeline_args=[])
