"""Bad input: exit code 78, one clear line for each problem, no traceback, and nothing lost."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from test_train import curve, fixed_files
from tiny_corpus import TOPICS, shards, write_corpus

from llm_jax.data.tokenizer import train_tokenizer


@pytest.fixture
def refused(tiny, monkeypatch, capsys):
    """refused(verb, workdir, *flags) -> the messages of the command, run in this process."""

    def run(verb: str, workdir: Path, *flags: str, num_devices: int = 8) -> list[str]:
        before = fixed_files(workdir) if (workdir / "metrics.jsonl").exists() else None
        code = tiny.main(monkeypatch, verb, workdir, *flags, num_devices=num_devices)
        messages = messages_of(code, capsys.readouterr().err)
        if before:
            assert fixed_files(workdir) == before
        return messages

    return run


def messages_of(code: int, stderr: str) -> list[str]:
    assert code == 78, stderr
    assert "Traceback" not in stderr
    prefix = "llm-jax: error: "
    lines = [line for line in stderr.splitlines() if line.startswith("llm-jax:")]
    assert lines and all(line.startswith(prefix) for line in lines)
    return [line.removeprefix(prefix) for line in lines]


@pytest.fixture
def copy(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "copy")


@pytest.fixture
def half(trained, tmp_path):
    """A run that was killed behind step 16."""
    workdir = shutil.copytree(trained, tmp_path / "half")
    for step in (20, 24):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    os.unlink(workdir / "evaluate.json")
    return workdir


def test_flags_and_rules(refused, copy, tmp_path):
    """All of a kind at once; neither a new directory nor an old run is touched."""
    messages = refused("train", copy, "--config.train.stepz=3", "--config.train.steps=many")
    assert len(messages) == 2
    assert messages[0].startswith("--config.train.stepz: no such field; nearest: --config.train.steps")
    assert messages[1] == "--config.train.steps=many: must be a whole number"
    flags = ("train.steps=0", "model.norm=batchnorm", "optimizer.beta1=1", "evaluate.subset=-1")
    assert len(refused("train", tmp_path / "new", *(f"--config.{flag}" for flag in flags))) == 4
    assert not (tmp_path / "new").exists()


def test_what_was_refused_has_not_made_the_directory_its_own(refused, tmp_path):
    """After a mistake, the right command works there."""
    workdir = tmp_path / "run"
    refused("train", workdir, "--config.data.sources[0].name=nonesuch")
    refused("train", workdir, "--config.train.batch_size=6")
    (message,) = refused("train", workdir, "--config.tokenizer.vocab_size=401", "--config.parallel.tensor=2")
    assert message.startswith("tokenizer.vocab_size=401 must divide by the 2 shards of mesh axes tensor;")


def test_batch_does_not_divide_the_mesh(refused, tmp_path):
    (message,) = refused("train", tmp_path / "run", "--config.train.batch_size=12")
    assert message.startswith("train.batch_size=12 must divide by the 8 shards of mesh axes fsdp;")
    (message,) = refused("train", tmp_path / "run", "--config.train.microbatches=2")
    assert message.startswith("train.batch_size / train.microbatches=4 must divide by the 8 shards")
    (message,) = refused("train", tmp_path / "run", "--config.parallel.tensor=3")
    assert "must be the number of devices, 8; the nearest mesh that fits has parallel.tensor=4" in message


@pytest.mark.parametrize(
    "flag, message",
    [
        ("name=nonesuch", "data.sources: no dataset 'nonesuch' in {data_dir}, where there is other:1.0.0, tiny:1.0.0"),
        ("split=test", "data.sources: 'tiny' has no split 'test'; there is train (30 documents), validation (6 doc"),
        ("split=train[:0]", "data.sources: split 'train[:0]' of 'tiny' is empty; there is train (30 documents)"),
        ("held_out=train[:5]", "data.sources: split='train' and held_out='train[:5]' of 'tiny' share documents"),
        ("text_key=body", "data.sources: 'tiny' has no feature 'body'; set text_key to one of number, text"),
        ("text_key=number", "data.sources: feature 'number' of 'tiny' is Scalar"),
    ],
)
@pytest.mark.parametrize("verb", ["prepare", "train"])
def test_datasets(verb, flag, message, refused, tiny, tmp_path):
    (found,) = refused(verb, tmp_path / "run", f"--config.data.sources[0].{flag}")
    assert found.startswith(message.format(data_dir=tiny.data_dir))


def test_vocabulary_larger_than_the_corpus_allows(refused, tmp_path):
    (message,) = refused("train", tmp_path / "run", "--config.tokenizer.vocab_size=50000")
    assert message.startswith("tokenizer.vocab_size=50000 is more than the corpus allows: at most ")


@pytest.fixture
def corpus(tmp_path):
    """Makes a tfds folder of the two datasets; `tiny` with these training documents."""

    def write(texts) -> Path:
        folder = tmp_path / "corpus"
        write_corpus(folder, {"train": texts, "validation": TOPICS[30:36]})
        write_corpus(folder, {"train": TOPICS[36:60], "validation": TOPICS[60:64]}, name="other")
        return folder

    return write


def test_unreadable_shards(refused, corpus, tmp_path):
    folder = corpus(TOPICS[:30])
    (shard,) = shards(folder)
    flags = [f"--config.data.data_dir={folder}", f"--config.data.cache_dir={tmp_path / 'cache'}"]
    whole = shard.read_bytes()
    place = 3 * len(whole) // 10  # inside the first chunks: not in the index, which is at the end
    shard.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
    (message,) = refused("train", tmp_path / "run", *flags)
    assert f"of shard {shard} is damaged" in message and message.startswith("record ")
    shard.write_bytes(whole[: len(whole) // 2])
    (message,) = refused("train", tmp_path / "run", *flags)
    assert message.startswith(f"shard {shard} cannot be read: cut off or not an ArrayRecord file; restore the file")
    shard.unlink()
    (message,) = refused("train", tmp_path / "run", *flags)
    assert message.startswith(f"shard {shard} cannot be read: missing; ")


def test_text_that_is_not_utf8(refused, corpus, tiny, tmp_path, monkeypatch, capsys):
    folder = corpus([*TOPICS[:10], "Grüße".encode("latin-1"), *TOPICS[10:30]])
    flags = [f"--config.data.data_dir={folder}", f"--config.data.cache_dir={tmp_path / 'cache'}"]
    (message,) = refused("train", tmp_path / "run", *flags, "--config.tokenizer.train_bytes=1000000")
    assert message.startswith("document train:10 of 'tiny' is not UTF-8: invalid")
    assert message.endswith("set data.skip_bad_documents=true")
    assert tiny.main(monkeypatch, "prepare", tmp_path / "run", *flags, "--config.data.skip_bad_documents=true") == 0
    tiny_train = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("tiny    train"))
    assert tiny_train.split()[2] == "30" and tiny_train.split()[-2:] == ["0", "1"]  # empty, bad


@pytest.mark.parametrize("texts", [["", " \n", "\t"], [b"\xff", b"\xfe"]])
def test_only_empty_or_bad_documents(texts, refused, corpus, tmp_path):
    flags = [f"--config.data.data_dir={corpus(texts)}", f"--config.data.cache_dir={tmp_path / 'cache'}"]
    (message,) = refused("train", tmp_path / "run", *flags, "--config.data.skip_bad_documents=true")
    assert "data.sources" in message


def test_tokenizers(refused, copy, tmp_path):
    (message,) = refused("train", tmp_path / "run", "--config.tokenizer.model_file=nowhere.model")
    assert message == "tokenizer.model_file='nowhere.model' cannot be read: No such file or directory"
    (tmp_path / "bad.model").write_bytes(b"no model")
    (message,) = refused("train", tmp_path / "run", f"--config.tokenizer.model_file={tmp_path / 'bad.model'}")
    assert message == f"tokenizer.model_file: {tmp_path / 'bad.model'} is not a SentencePiece model"
    # Of the same size as that of the run, but another.
    train_tokenizer(iter(TOPICS), kind="bpe", vocab_size=400).save(copy / "tokenizer.model")
    for verb, flags in (("evaluate", []), ("generate", ["--prompt=a"])):
        (message,) = refused(verb, copy, *flags)
        assert message.startswith(
            f"{copy / 'tokenizer.model'} is not the tokenizer of the checkpoint of step 24 (sha256 "
        )
    (message,) = refused("train", copy, "--config.train.steps=25")
    assert message.startswith("the checkpoint of step 24 was trained on other data (") and "tokenizer" in message


def test_no_checkpoint_yet(refused, copy, tmp_path):
    (message,) = refused("generate", copy, "--prompt=a", "--step=3")
    assert message.startswith("there is no checkpoint of step 3 in ") and "[16, 20, 24]" in message
    shutil.rmtree(copy / "checkpoints")
    for verb, flags in (("evaluate", []), ("generate", ["--prompt=a"])):
        (message,) = refused(verb, copy, *flags)
        assert f"holds no checkpoint yet; run `llm-jax train --workdir={copy}` first" in message
    os.unlink(copy / "tokenizer.model")
    (message,) = refused("evaluate", copy)
    assert message == f"{copy} holds no checkpoint yet; run `llm-jax train --workdir={copy}` first"


def test_a_file_in_the_way(refused, trained, tmp_path):
    (tmp_path / "file").write_text("precious")
    (message,) = refused("train", tmp_path / "file")
    assert message == f"--workdir={tmp_path / 'file'} is a file; give a directory"
    (message,) = refused("train", tmp_path / "file" / "run")
    assert message.startswith(f"{tmp_path / 'file' / 'run'}: Not a directory")
    (message,) = refused("prepare", tmp_path / "run", f"--config.data.cache_dir={tmp_path / 'file'}")
    assert str(tmp_path / "file") in message
    assert (tmp_path / "file").read_text() == "precious"


def test_damaged_files_of_a_run(refused, copy):
    (copy / "config.json").write_text('{"model": ')
    (message,) = refused("train", copy)
    assert message.startswith(f"{copy / 'config.json'} is damaged")
    (message,) = refused("evaluate", copy)
    assert message.startswith(f"{copy / 'config.json'} is damaged")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, with 64 KiB; mount(options) changes it."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(options: str) -> subprocess.CompletedProcess:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk]
        return subprocess.run(command, capture_output=True, text=True)

    if shutil.which("mount") is None:
        pytest.skip("needs the command mount")
    if (done := mount("size=64k")).returncode:
        pytest.skip(f"only root may mount a small file system here: {done.stderr.strip()}")
    yield disk, mount
    subprocess.run(["umount", disk], check=True)


def on_disk(workdir: Path, disk: Path, mount) -> Path:
    mount("remount,size=64m")
    return shutil.copytree(workdir, disk / "run")


@pytest.fixture
def small_disk_for_checkpoints(half, small_disk):
    """The checkpoints of the run `half` lie on a file system with room for less than another one; mount, as above."""
    disk, mount = small_disk
    saved = on_disk(half / "checkpoints", disk, mount)
    shutil.rmtree(half / "checkpoints")
    (half / "checkpoints").symlink_to(saved)
    used = sum(path.stat().st_blocks for path in saved.rglob("*")) * 512
    assert mount(f"remount,size={used + 200_000}").returncode == 0
    return mount


def test_full_disk(half, trained, tiny, small_disk_for_checkpoints):
    """Saves that fail are told and tried again; then the run ends. The checkpoints of before stay, and with some space
    the same command goes on as ever."""
    done = tiny.run("train", half)
    assert done.returncode == 70 and "Traceback" not in done.stderr, done.stderr
    (warning,) = [line for line in done.stderr.splitlines() if line.startswith("WARNING")]
    assert "checkpoint of step 20 could not be saved" in warning and "the run goes on" in warning
    assert done.stderr.splitlines()[-1].startswith("llm-jax: stopped (exit code 70): checkpoint of step 24 could not")
    assert (half / "checkpoints" / "16").exists()
    small_disk_for_checkpoints("remount,size=64m")
    done = tiny.run("train", half)
    assert done.returncode == 0, done.stderr
    assert curve(half) == curve(trained)
    assert (half / "evaluate.json").read_bytes() == (trained / "evaluate.json").read_bytes()


def test_saves_that_fail_in_a_row_end_the_run(half, tiny, small_disk_for_checkpoints):
    done = tiny.run("train", half, "--config.checkpoint.every=1", "--config.checkpoint.max_failures=2")
    assert done.returncode == 70, done.stderr
    assert "WARNING: checkpoint of step 17" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("llm-jax: stopped (exit code 70): checkpoint of step 18 could not")


def test_full_disk_below_the_cache(refused, tiny, small_disk, tmp_path):
    disk, mount = small_disk
    (message,) = refused("prepare", tmp_path, f"--config.data.cache_dir={disk / 'cache'}")
    assert f"{disk}" in message and "No space left on device" in message
    assert "data.cache_dir" in message


def test_full_disk_for_the_record(half, tiny, small_disk, monkeypatch, capsys):
    """No room for even a line of metrics.jsonl."""
    disk, mount = small_disk
    workdir = on_disk(half, disk, mount)
    used = sum(path.stat().st_blocks for path in workdir.rglob("*")) * 512
    assert mount(f"remount,size={used}").returncode == 0
    done = tiny.run("train", workdir)
    (message,) = messages_of(done.returncode, done.stderr)
    assert str(workdir) in message and "No space left on device; free some space or choose another place" in message
    assert (workdir / "checkpoints" / "16").exists()


def test_read_only_disk(copy, tiny, small_disk, refused, monkeypatch, capsys):
    disk, mount = small_disk
    workdir = on_disk(copy, disk, mount)
    assert mount("remount,ro").returncode == 0
    (message,) = refused("train", workdir, "--config.train.steps=26")
    assert str(workdir) in message and "Read-only file system" in message
    (message,) = refused("train", disk / "new")
    assert message.startswith(f"{disk / 'new'}: Read-only file system; make it writable or choose another place")
    (message,) = refused("evaluate", workdir, num_devices=1)
    assert "evaluate.json" in message and "Read-only file system" in message
    flags = ["--prompt=a", "--max_tokens=8"]
    assert tiny.main(monkeypatch, "generate", workdir, *flags, num_devices=1) == 0  # which only reads


def test_largest_file_size(half, trained, tiny):
    """As on a disk with a quota, which a user can have without being root: a file cannot grow beyond 40 kB."""
    limit = "import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)); "
    command = [sys.executable, "-c", limit + "os.execv(sys.argv[1], sys.argv[1:])", *tiny.command("train", half)]
    done = subprocess.run(command, cwd=ROOT, env=tiny.environment, capture_output=True, text=True)
    assert done.returncode == 70 and "Traceback" not in done.stderr, done.stderr
    message = done.stderr.splitlines()[-1]
    assert str(half) in message and "File too large" in message
    assert {path.name for path in (half / "checkpoints").iterdir() if path.name.isdigit()} == {"16"}


def test_command(tiny, tmp_path):
    """In a process of its own, started as a user does."""
    done = tiny.run("train", tmp_path / "run", "--config.data.sources[1].name=nonesuch")
    (message,) = messages_of(done.returncode, done.stderr)
    assert message.startswith("data.sources: no dataset 'nonesuch'")
    done = subprocess.run(tiny.command("train", tmp_path / "run")[:4], cwd=ROOT, capture_output=True, text=True)
    assert messages_of(done.returncode, done.stderr)[0].startswith("train needs --workdir=DIR")
