import collections
import contextlib
import dataclasses
import fcntl
import glob
import os
import pathlib
import random
import re
import signal
import subprocess
import sys

import pytest
import tiny_steps
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_corpus import TOPICS

from llm_jax.config import UserError
from llm_jax.corpus import engine, pairs
from llm_jax.corpus.pairs import PairWriter, Run, read_pairs
from llm_jax.corpus.stats import Stats
from llm_jax.corpus.steps import Group, Map, Read, check, describe
from llm_jax.corpus.tasks import UNFINISHED, Place, Plan, Task, perform

TESTS = pathlib.Path(__file__).parent
SECONDS_TO_END = 120  # so that a hang is a failure
SECONDS_BETWEEN_LOOKS = 0.002
KILLS = 5


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> list[str]:
    """Six files of text, one of them empty."""
    folder = tmp_path_factory.mktemp("texts")
    paths = [folder / f"{i}.txt" for i in range(6)]
    for i, path in enumerate(paths):
        path.write_text("\n".join(TOPICS[5 * i : 5 * i + 5]) if i != 3 else "")
    return [str(path) for path in paths]


@pytest.fixture(scope="module")
def built(texts, tmp_path_factory):
    """The undisturbed build of the texts, and its workdir."""
    workdir = tmp_path_factory.mktemp("build")
    return run(tiny_steps.word_build(texts), workdir), workdir


def run(steps, workdir, **options):
    options = {"num_workers": 1, "num_shards": 3, "memory_bytes": tiny_steps.MEMORY_BYTES} | options
    return engine.run(steps, str(workdir), **options)


def run_here(steps, workdir, num_shards, memory_bytes):
    """Every task in this process."""
    check(steps)
    plan = Plan(tuple(steps), str(workdir), num_shards, memory_bytes)
    (workdir / UNFINISHED).mkdir(parents=True)
    for task in plan.tasks():
        perform(plan, task, Place(""))
    return plan


def files(workdir) -> dict[str, bytes]:
    paths = [path for path in sorted(pathlib.Path(workdir).rglob("*.*")) if path.is_file()]
    return {str(path.relative_to(workdir)): path.read_bytes() for path in paths}


def start(build, workdir, num_workers, *inputs) -> subprocess.Popen:
    """A build in a process of its own, which leads a group."""
    arguments = [build, str(workdir), str(num_workers), *map(str, inputs)]
    program = f"import tiny_steps\nif __name__ == '__main__':\n    tiny_steps.main(*{arguments!r})"
    environment = {**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"}
    return subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )


# What comes out


@dataclasses.dataclass(frozen=True)
class Given:
    """Reads nothing: input "i" is the i-th list of pairs."""

    data: tuple

    def __call__(self, input, stats):
        for key, value in self.data[int(input)]:
            stats.count("given")
            yield key, value


def turn(key, value, stats):
    """Some pairs twice, some not at all, under another key."""
    for _ in range(len(value) % 3):
        stats.example("turned", repr(key), repr(value))
        yield value[:1], key


def join(key, *values, stats):
    lists = [list(v) for v in values]
    stats.count(f"keys in {sum(map(bool, lists))} sources")
    yield key, repr(lists).encode()


def first_only(key, *values, stats):
    yield key, next(values[-1], b"none")


def reference(data, streams):
    """The same build by dictionaries; the collections as sorted pairs, and the counts."""
    first = [pair for part in data for pair in part]
    turned = [(value[:1], key) for key, value in first for _ in range(len(value) % 3)]
    groups = collections.defaultdict(lambda: ([], []))
    for place, source in enumerate((first, turned)):
        for key, value in source:
            groups[key][place].append(value)
    joined = [(key, repr([sorted(v) for v in values]).encode()) for key, values in groups.items()]
    ends = collections.defaultdict(list)
    for key, value in joined:
        ends[key[:0] if streams else key].append(value)
    firsts = [(key, min(values)) for key, values in ends.items()]
    counts = collections.Counter(f"keys in {sum(bool(v) for v in values)} sources" for values in groups.values())
    counts["given"] += len(first)
    return sorted(firsts), +counts


short = st.binary(max_size=4)


@settings(deadline=None, max_examples=30)
@given(
    data=st.lists(st.lists(st.tuples(short, short), max_size=12), max_size=4),
    num_shards=st.integers(1, 4),
    memory_bytes=st.sampled_from([1, 500, 10**6]),
    streams=st.booleans(),
)
def test_any_build_gives_what_dictionaries_give(tmp_path_factory, data, num_shards, memory_bytes, streams):
    steps = [
        Read("first", tuple(str(i) for i in range(len(data))), Given(tuple(map(tuple, data)))),
        Map("turned", "first", turn),
        Group("joined", ("first", "turned"), join, streams=streams),
        Map("keyed", "joined", tiny_steps.OneKey(b"") if streams else same_pair),
        Group("end", ("keyed",), first_only, streams=True),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "BLOCK_BYTES", 20)
        patch.setattr(pairs, "FAN_IN", 4)
        patch.setattr(os, "fsync", lambda file: None)
        plan = run_here(steps, tmp_path_factory.mktemp("build"), num_shards, memory_bytes)
    found = [pair for part in range(num_shards) for pair in plan.read(Task("end", part))]
    stats = Stats().merge(plan.record(task).stats for task in plan.tasks())
    assert (sorted(found), stats.counts) == reference(data, streams)
    assert found == sorted(found) or num_shards > 1


def same_pair(key, value, stats):
    yield key, value


def test_words_are_those_of_a_dictionary(texts, built):
    lines = [(f"{os.path.basename(path)}:{n}", line) for path in texts for n, line in enumerate(open(path, "rb"))]
    counts, places = collections.Counter(), collections.defaultdict(list)
    for place, line in lines:
        counts.update(line.lower().split())
        for word in line.lower().split():
            places[word].append(place.encode())
    result, workdir = built
    assert dict(result.collections["joined"]) == {
        word: b"%d from %s" % (count, min(places[word])) for word, count in counts.items()
    }
    assert len(result.collections["joined"]) == len(counts) > 300
    assert list(result.collections["frequencies"]) == [
        (b"", repr(sorted(collections.Counter(counts.values()).items())).encode())
    ]
    assert set(result.collections) == {"joined", "frequencies"}
    assert result.stats["lines"].counts == {"lines/read": len(lines)}
    assert result.total.counts == {
        "lines/read": len(lines),
        "words/read": counts.total(),
        "words/once": sum(count == 1 for count in counts.values()),
        "words/different": len(counts),
    }
    assert len(result.total.examples["words/once"]) == 20
    left = sum(path.stat().st_size for path in workdir.rglob("*.pairs"))
    assert left == sum(run.end for files in result.collections.values() for run in files.files)
    plan = Plan(tuple(tiny_steps.word_build(texts)), str(workdir), 3, 0)
    last_join = [Task("joined", i) for i in range(3)] + plan.inputs(Task("joined", 0))
    assert result.peak_disk_bytes >= sum(plan.record(task).size for task in last_join) > left


def test_workers_change_nothing(texts, built, tmp_path):
    result, workdir = built
    again = run(tiny_steps.word_build(texts), tmp_path, num_workers=2, memory_bytes=1000)
    assert {name: data for name, data in files(tmp_path).items() if "from-" not in name} == {
        name: data for name, data in files(workdir).items() if "from-" not in name
    }
    assert again.total.to_json() == result.total.to_json()


# Interruptions


def records(workdir) -> set[pathlib.Path]:
    return {pathlib.Path(path) for name in ("*", "*/from-*") for path in glob.glob(f"{workdir}/{name}/*.json")}


@pytest.mark.parametrize("seed", [0])
def test_killed_at_random_moments_it_gives_the_same_files(texts, built, tmp_path, seed):
    _, workdir = built
    random_moments = random.Random(seed)
    tasks = len(records(workdir))
    kept = {}
    for kill in range(KILLS):
        process = start("word_build", tmp_path, 2, *texts)
        wanted = random_moments.randint(tasks * kill // KILLS, tasks * (kill + 1) // KILLS - 1)
        while len(records(tmp_path)) < wanted:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(SECONDS_BETWEEN_LOOKS)
            assert process.poll() is None, process.communicate()[0]
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(random_moments.uniform(0, 0.02))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=SECONDS_TO_END)
        for path, inode in kept.items():
            assert path.stat().st_ino == inode, "a finished task was done again"
        kept = {path: path.stat().st_ino for path in records(tmp_path)}
    process = start("word_build", tmp_path, 1, *texts)
    assert process.communicate(timeout=SECONDS_TO_END) and process.returncode == 0
    assert files(tmp_path) == files(workdir)


def test_any_rename_may_be_the_last(texts, tmp_path, monkeypatch):
    """Stopped at each of them in turn; what has been put in place then is taken as it is."""
    monkeypatch.setattr(os, "fsync", lambda file: None)  # takes longer than all the rest
    steps = tiny_steps.word_build(texts[2:4])[:4]
    files_of_all = files(run_here(steps, tmp_path / "all", 2, 1000).workdir)
    replace = os.replace

    class Stopped(Exception):
        pass

    for stop in range(len(files_of_all)):
        renames = iter(range(len(files_of_all)))

        def stopping(old, new, stop=stop, renames=renames):
            if next(renames) == stop:
                raise Stopped
            replace(old, new)

        workdir = tmp_path / str(stop)
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(os, "replace", stopping)
            run_here(steps, workdir, 2, 1000)
        plan = Plan(tuple(steps), str(workdir), 2, 1000)
        left = plan.unfinished()
        assert len(left) == (len(files_of_all) - stop + 1) // 2
        for task in left:
            perform(plan, task, Place(""))
        assert files(workdir) == files_of_all


def test_a_finished_build_is_only_looked_up(texts, built, monkeypatch):
    result, workdir = built
    monkeypatch.setattr(engine, "_Worker", None)
    again = run(tiny_steps.word_build(texts), workdir)
    assert again.collections == result.collections
    assert again.total.to_json() == result.total.to_json()


def test_a_lost_result_is_made_anew_from_the_inputs(texts, tmp_path):
    result = run(tiny_steps.word_build(texts), tmp_path)
    before = files(tmp_path)
    os.unlink(result.collections["joined"].files[1].path)
    run(tiny_steps.word_build(texts), tmp_path)
    assert files(tmp_path) == before


@pytest.mark.parametrize("whom", ["all", "parent"])
def test_workers_end_with_their_build(tmp_path, whom):
    process = start("endless_build", tmp_path, 2, __file__, tiny_steps.__file__)
    assert process.stdout
    workers = [int(process.stdout.readline()) for _ in range(2)]
    if whom == "all":
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
    else:
        process.kill()
    output, _ = process.communicate(timeout=SECONDS_TO_END)  # ends when all of them have closed it
    assert process.returncode == -(signal.SIGINT if whom == "all" else signal.SIGKILL)
    assert ("KeyboardInterrupt" in output) == (whom == "all")
    if whom == "all":
        assert output.count("Traceback") == 1, output
        for worker in workers:
            with pytest.raises(ProcessLookupError):
                os.kill(worker, 0)


# Faults


@pytest.fixture(scope="module")
def line(texts) -> bytes:
    """That is found only in the file 4.txt, and there once."""
    found = collections.Counter(line for path in texts for line in pathlib.Path(path).read_bytes().splitlines())
    return next(line for line in pathlib.Path(texts[4]).read_bytes().splitlines() if found[line] == 1)


def test_a_killed_worker_is_replaced(texts, line, tmp_path):
    kill = tiny_steps.Kill(line, str(tmp_path / "killed"))
    result = run([Read("lines", tuple(texts), tiny_steps.read_lines), Map("same", "lines", kill)], tmp_path / "build")
    assert (tmp_path / "killed").exists() and not (tmp_path / "build" / UNFINISHED).exists()
    assert sorted(value for _, value in result.collections["same"]) == sorted(
        line for path in texts for line in pathlib.Path(path).read_bytes().splitlines()
    )


def test_a_worker_killed_again_and_again_is_an_error(texts, line, tmp_path):
    kill = tiny_steps.Kill(line)
    steps = [Read("lines", tuple(texts), tiny_steps.read_lines), Map("same", "lines", kill)]
    with pytest.raises(
        UserError, match=r"^step 'same', reading .*00004\.pairs: .*killed by signal 9, 3 times.*fewer"
    ) as e:
        run(steps, tmp_path)
    assert "\n" not in str(e.value)
    assert (tmp_path / "lines/00004.json").exists() and not list(tmp_path.glob("same/00004.*"))


@pytest.mark.parametrize("error", [ValueError, UserError])
def test_an_exception_names_step_and_input(texts, line, tmp_path, error):
    steps = [
        Read("lines", tuple(texts), tiny_steps.read_lines),
        Map("same", "lines", tiny_steps.Fail(line, error)),
    ]
    if error is UserError:
        with pytest.raises(UserError, match="^cannot do that$"):
            run(steps, tmp_path)
        return
    with pytest.raises(RuntimeError) as raised:
        run(steps, tmp_path)
    first, *others = str(raised.value).splitlines()
    assert re.fullmatch(
        r"step 'same', reading .*00004\.pairs, at the key b'4.txt:\d+': ValueError: cannot do that", first
    )
    assert any("tiny_steps.py" in line for line in others)


def test_a_missing_input_is_named(tmp_path):
    with pytest.raises(FileNotFoundError) as raised:
        run([Read("lines", (str(tmp_path / "no.txt"),), tiny_steps.read_lines)], tmp_path / "build")
    assert raised.value.filename == str(tmp_path / "no.txt")


def test_a_full_disk_is_one_line_and_the_build_goes_on_later(tmp_path):
    full = tmp_path / "full"
    full.touch()
    inputs = [tmp_path / name for name in ("a-50", "b-2000", "c-50")]
    for path in inputs:
        path.touch()
    steps = [
        Read("pairs", tuple(map(str, inputs)), tiny_steps.FullDisk(str(full), 1_000_000)),
        Group("grouped", ("pairs",), tiny_steps.same),
    ]
    with pytest.raises(UserError, match="File too large; free some space; the same command then goes on") as raised:
        run(steps, tmp_path / "build")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "build/pairs/00001.pairs").exists() and not (tmp_path / "build/pairs/00001.json").exists()
    full.unlink()
    result = run(steps, tmp_path / "build")
    assert sorted(result.collections["grouped"]) == sorted(
        pair for path in inputs for pair in tiny_steps.random_pairs(str(path), None)
    )


def test_every_changed_byte_of_a_file_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(pairs, "BLOCK_BYTES", 40)
    path = tmp_path / "pairs"
    with open(path, "wb") as file:
        writer = PairWriter(file)
        for i in range(12):
            writer.write(b"key %d" % i, b"value" * i)
        writer.flush()
    data = path.read_bytes()
    run = Run(str(path), 0, writer.position)
    assert len(list(read_pairs(run))) == writer.pairs == 12
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :])
        with pytest.raises(UserError, match=rf"{path}: the block at byte \d+ is damaged; .*delete this file"):
            list(read_pairs(run))
        path.write_bytes(data[:place])
        with pytest.raises(UserError, match="damaged"):
            list(read_pairs(run))


def test_a_damaged_file_is_named_and_made_anew_once_deleted(texts, line, tmp_path):
    repaired = tmp_path / "repaired"
    fail = tiny_steps.Fail(line, ValueError, str(repaired))
    steps = [Read("lines", tuple(texts), tiny_steps.read_lines), Map("same", "lines", fail)]
    with pytest.raises(RuntimeError, match="ValueError"):
        run(steps, tmp_path / "build")
    repaired.touch()
    damaged = tmp_path / "build/lines/00004.pairs"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(UserError, match=rf"^{damaged}: the block at byte 0 is damaged"):
        run(steps, tmp_path / "build")
    damaged.unlink()
    assert len(run(steps, tmp_path / "build").collections["same"]) == sum(
        len(pathlib.Path(path).read_bytes().splitlines()) for path in texts
    )


def test_a_workdir_holds_one_build(texts, tmp_path):
    inputs = [str(tmp_path / "0.txt"), texts[1]]
    pathlib.Path(inputs[0]).write_text("one line")
    steps = tiny_steps.word_build(inputs)
    workdir = tmp_path / "build"
    run(steps, workdir)
    others = [
        (steps[:-1], 3, "order of steps, step 'frequencies'"),
        ([*steps[:-2], Map("all", "counts", tiny_steps.OneKey(b"x")), steps[-1]], 3, "step 'all'"),
        (steps, 4, "num_shards"),
    ]
    for other, num_shards, what in others:
        with pytest.raises(
            UserError, match=rf"^workdir={workdir}: another build was begun here, with other {what}; del"
        ):
            run(other, workdir, num_shards=num_shards)
    pathlib.Path(inputs[0]).write_text("another line")
    with pytest.raises(UserError, match="with other inputs; delete it"):
        run(steps, workdir)
    with pytest.raises(UserError, match="is not empty and holds no build"):
        run(steps, tmp_path)
    with open(workdir / "lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=f"workdir={workdir}: another build is running here"):
            run(steps, workdir)


def test_steps_are_described_alike_in_every_process():
    program = (
        "import json, tiny_steps; from llm_jax.corpus.steps import Read, describe;"
        "print(json.dumps(describe(Read('x', ('a',), tiny_steps.OneKey(frozenset(map(str, range(20))))))))"
    )
    environment = {**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"}
    said = {
        subprocess.check_output([sys.executable, "-c", program], env={**environment, "PYTHONHASHSEED": seed})
        for seed in "12"
    }
    assert len(said) == 1
    assert describe(Map("x", "y", same_pair))["function"] == "test_engine.same_pair"
    with pytest.raises(AssertionError, match="no top-level function"):
        describe(Map("x", "y", lambda key, value, stats: []))
    with pytest.raises(TypeError, match="an option of type object"):
        describe(Map("x", "y", tiny_steps.OneKey(object())))


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([Map("x", "y", same_pair)], "not all of which are earlier"),
        ([Read("x", (), same_pair), Read("x", (), same_pair)], "two steps are called 'x'"),
        ([Read("a/b", (), same_pair)], "cannot name a folder"),
        ([Read("x", (), same_pair), Group("y", ("x", "x"), join)], "reads a source twice"),
    ],
)
def test_steps_that_do_not_fit_are_our_mistake(steps, message):
    with pytest.raises(AssertionError, match=message):
        check(steps)


def test_memory_does_not_grow_with_the_input(tmp_path):
    """2 MB of pairs sorted in 1 MB, and ten times as many."""
    sizes = []
    for pairs_in_all in (1000, 10_000):
        inputs = [tmp_path / f"{i}-{pairs_in_all // 2}" for i in range(2)]
        for path in inputs:
            path.touch()
        process = start("large_build", tmp_path / str(pairs_in_all), 1, *inputs)
        output, _ = process.communicate(timeout=SECONDS_TO_END)
        assert process.returncode == 0, output
        sizes.append(int(output.splitlines()[-1]) / 1000)
    assert sizes[1] - sizes[0] < 12, sizes  # MB; more is read at once while there are more runs, up to FAN_IN


def test_progress_is_told_in_lines(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "SECONDS_BETWEEN_LINES", 0)
    lines = []
    steps = [Read("lines", tuple(texts), tiny_steps.read_lines), Group("same", ("lines",), tiny_steps.same)]
    run(steps, tmp_path, progress=lines.append)
    done = [int(re.fullmatch(r"building: (\d+) of 15 tasks, [\d.]+ GB on disk", line)[1]) for line in lines]
    assert done == sorted(done) and done[-1] == 15  # 6 files read, sorted, and merged to 3
