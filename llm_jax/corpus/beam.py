"""The steps of a build on Apache Beam, for crawls that one machine does not hold: Dataflow, Flink, Spark, or here.

The workers need this package: give `--setup_file` or `--sdk_container_image`, as for any Beam pipeline. They sort on
their own disks what may not fit into memory.
"""

# pyright: reportMissingImports=false
# Beam is an extra of its own.

import contextlib
import functools
import json
import os
import tempfile
import uuid
import zlib
from collections.abc import Iterable, Iterator, Sequence

import apache_beam as beam
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.transforms.window import GlobalWindows

from llm_jax.config import UserError
from llm_jax.corpus import pairs
from llm_jax.corpus.engine import Built
from llm_jax.corpus.pairs import Collection, PairWriter, Run, Sorter
from llm_jax.corpus.stats import Stats
from llm_jax.corpus.steps import Group, Pair, Read, Step, check, describe, results

MEMORY_BYTES = 64_000_000  # of pairs sorted at once; runners have several threads in a process
BUILT = "built.json"  # written last


def run_beam(steps: Sequence[Step], output: str, *, num_shards: int, pipeline_args: Sequence[str]) -> Built:
    """Runs a build on Beam and waits for its end.

    The collections hold the same pairs as those of the local engine, sorted within each file.

    Args:
      output: folder for this build alone, on a file system that Beam and fsspec know and all workers reach
      num_shards: files of a collection
      pipeline_args: flags of Beam and its runner, such as `--runner=DataflowRunner`; without any, it runs here

    Raises:
      UserError: the folder holds another build. If it holds this one, nothing is run.
    """
    check(steps)
    built = FileSystems.join(output, BUILT)
    description = json.dumps([describe(step) for step in steps], sort_keys=True)
    if FileSystems.exists(built):
        return _load(built, steps, description)
    with beam.Pipeline(options=PipelineOptions(list(pipeline_args))) as pipeline:
        made: dict[str, beam.pvalue.PCollection] = {}
        reports = []
        for step in steps:
            made[step.name], stats = _apply(step, pipeline, made)
            report = stats | f"{step.name}/stats" >> beam.CombineGlobally(_merge_stats)
            reports.append(
                report | f"{step.name}/report stats" >> beam.Map(functools.partial(_stats_report, step.name))
            )
        for name in results(steps):
            reports.append(
                made[name]
                | f"{name}/shard" >> beam.Map(functools.partial(_with_shard, num_shards))
                | f"{name}/collect" >> beam.GroupByKey()
                | f"{name}/write" >> beam.ParDo(_Write(FileSystems.join(output, name)))
            )
        _ = (
            reports
            | "flatten reports" >> beam.Flatten()
            | "gather reports" >> beam.combiners.ToList()
            | "write reports" >> beam.Map(functools.partial(_write_reports, built, description))
        )
    return _load(built, steps, description)


def _load(built: str, steps: Sequence[Step], description: str) -> Built:
    """What a build has reported; UserError if it was another one."""
    with FileSystems.open(built) as file:
        saved = json.load(file)
    if saved["steps"] != description:
        raise UserError(f"{built}: another build was finished here; delete its folder, or set another workdir")
    collections = {}
    for name in results(steps):
        files = sorted(saved["files"].get(name, []))
        collections[name] = Collection(tuple(Run(path, 0, size) for path, size, _ in files), sum(n for *_, n in files))
    return Built(collections, {step.name: Stats.from_json(saved["stats"][step.name]) for step in steps}, None)


def _apply(
    step: Step, pipeline: beam.Pipeline, made: dict[str, beam.pvalue.PCollection]
) -> tuple[beam.pvalue.PCollection, beam.pvalue.PCollection]:
    """The step's pairs, and the stats of its parts as JSON."""
    sources = [made[source] for source in step.sources]
    if isinstance(step, Read):
        given = pipeline | f"{step.name}/inputs" >> beam.Create(step.inputs, reshuffle=True)
    elif not isinstance(step, Group):
        given = sources[0]
    elif len(sources) == 1:  # its values are read as a stream
        given = sources[0] | f"{step.name}/group" >> beam.GroupByKey()
    else:
        given = dict(zip(step.sources, sources, strict=True)) | f"{step.name}/group" >> beam.CoGroupByKey()
    outputs = given | step.name >> beam.ParDo(_Do(step)).with_output_types(Pair).with_outputs("stats", main="pairs")
    return outputs["pairs"], outputs["stats"]


class _Do(beam.DoFn):
    """Does a step for each element; its stats come out at the end of each bundle."""

    def __init__(self, step: Step):
        self._step = step

    def start_bundle(self):
        self._stats = Stats()

    def process(self, element):
        step = self._step
        if isinstance(step, Read):
            yield from step.function(element, self._stats)
        elif isinstance(step, Group):
            key, values = element
            sources = [values[source] for source in step.sources] if len(step.sources) > 1 else [values]
            with contextlib.ExitStack() as stack:
                given = [stack.enter_context(_stream(v)) if step.streams else sorted(v) for v in sources]
                yield from step.function(key, *given, stats=self._stats)
        else:
            yield from step.function(*element, self._stats)

    def finish_bundle(self):
        yield beam.pvalue.TaggedOutput("stats", GlobalWindows.windowed_value(self._stats.to_json()))


class _Write(beam.DoFn):
    """Writes a shard to folder/SHARD.pairs and reports it: ["files", name, [path, bytes, pairs]]."""

    def __init__(self, folder: str):
        self._folder = folder

    def process(self, element):
        shard, shard_pairs = element
        path = FileSystems.join(self._folder, f"{shard:05d}.pairs")
        temporary = f"{path}.{uuid.uuid4().hex}"  # a runner may have two workers at one shard
        with contextlib.suppress(OSError):  # there already
            FileSystems.mkdirs(self._folder)
        with FileSystems.create(temporary, compression_type="uncompressed") as file, _sort(shard_pairs) as in_order:
            writer = PairWriter(file)
            for key, value in in_order:
                writer.write(key, value)
            writer.flush()
        FileSystems.rename([temporary], [path])
        yield "files", os.path.basename(self._folder), [path, writer.position, writer.pairs]


@contextlib.contextmanager
def _sort(unsorted: Iterable[Pair]) -> Iterator[Iterator[Pair]]:
    """Pairs in order, by files of the local disk if they are many."""
    with tempfile.TemporaryDirectory() as folder:
        runs = os.path.join(folder, "runs")
        with open(runs, "wb") as file:
            sorter = Sorter(file, 1, MEMORY_BYTES)
            for key, value in unsorted:
                sorter.add(key, value)
            sorter.flush()
        scratch = os.path.join(folder, "scratch")
        os.mkdir(scratch)
        yield pairs.merge([Run(runs, start, end) for _, start, end in sorter.runs], scratch)


@contextlib.contextmanager
def _stream(values: Iterable[bytes]) -> Iterator[Iterator[bytes]]:
    with _sort((b"", value) for value in values) as in_order:
        yield (value for _, value in in_order)


def _merge_stats(texts: Iterable[str]) -> str:
    return Stats().merge(map(Stats.from_json, texts)).to_json()


def _stats_report(step: str, text: str) -> tuple[str, str, str]:
    return "stats", step, text


def _with_shard(num_shards: int, pair: Pair) -> tuple[int, Pair]:
    return zlib.crc32(pair[0]) % num_shards, pair


def _write_reports(path: str, description: str, reports: list[tuple]) -> None:
    saved = {"steps": description, "files": {}, "stats": {}}
    for kind, name, report in reports:
        if kind == "stats":
            saved["stats"][name] = report
        else:
            saved["files"].setdefault(name, []).append(report)
    with contextlib.suppress(OSError):  # there already
        FileSystems.mkdirs(os.path.dirname(path))
    temporary = f"{path}.{uuid.uuid4().hex}"
    with FileSystems.create(temporary) as file:
        file.write(json.dumps(saved).encode())
    FileSystems.rename([temporary], [path])
