"""What --input names, and its bytes: against the standard library's own compressors, and files served over HTTP."""

import bz2
import functools
import gzip
import http.server
import random
import threading

import fsspec
import pyarrow as pa
import pytest

from llm_jax.config import UserError
from llm_jax.corpus import inputs

ZSTD = functools.partial(pa.Codec("zstd").compress, asbytes=True)
TEXT = "\n".join(f"{i}: one line of some length, {i * i}" for i in range(20_000)).encode()


@pytest.fixture
def folder(tmp_path):
    for name in ("b.txt", "a.jsonl", "deep/er/c.txt", "deep/d.parquet", "deep/[odd] name.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(TEXT)
    return tmp_path


def names(paths: list[str]) -> list[str]:
    return [inputs.name(path) for path in paths]


@pytest.mark.parametrize(
    "values, expected",
    [
        (["b.txt"], ["b.txt"]),
        (["*.{txt,jsonl}"], ["a.jsonl", "b.txt"]),
        (["**/*.txt"], ["[odd] name.txt", "b.txt", "c.txt"]),
        (["**/*.{txt,jsonl,jsonl.gz,parquet}"], ["[odd] name.txt", "a.jsonl", "b.txt", "c.txt", "d.parquet"]),
        (["deep/{d,er/c}.{txt,parquet}"], None),
        (["deep/d.parquet", "b.txt"], ["b.txt", "d.parquet"]),
        (["?.txt"], ["b.txt"]),
        (["[ab].*"], ["a.jsonl", "b.txt"]),
    ],
)
def test_globs(folder, values, expected):
    values = [f"{folder}/{value}" for value in values]
    if expected is None:  # each alternative must name something
        with pytest.raises(UserError, match=r"deep/d\.txt: there is no such file"):
            inputs.expand(values)
    else:
        found = inputs.expand(values)
        assert names(found) == expected
        assert all(open(path, "rb").read() == TEXT for path in found)


def test_lists_in_a_file(folder):
    listed = folder / "inputs.list"
    listed.write_text(f"# two of them\n{folder}/b.txt\n\n  {folder}/*.jsonl\n")
    assert names(inputs.expand([f"@{listed}"])) == ["a.jsonl", "b.txt"]
    with pytest.raises(UserError, match="nowhere.* cannot be read"):
        inputs.expand([f"@{folder}/nowhere"])


@pytest.mark.parametrize(
    "values, message",
    [
        (["*.warc"], r"no file matches"),
        (["nowhere/*.txt"], r"there is no folder .*nowhere"),
        (["e.txt"], r"there is no such file"),
        (["deep"], r"deep is a folder; name its files, as in .*deep/\*"),
        (["b.txt", "*.txt"], r"b\.txt is given twice"),
        ([], r"no file is given"),
    ],
)
def test_what_names_nothing_is_refused(folder, values, message):
    with pytest.raises(UserError, match=message):
        inputs.expand([f"{folder}/{value}" for value in values])


def test_two_inputs_with_one_name_are_refused(folder):
    (folder / "deep" / "b.txt").write_bytes(TEXT)
    with pytest.raises(UserError, match=r"have one name.*rename"):
        inputs.expand([f"{folder}/**/*.txt"])


def test_unknown_protocol():
    with pytest.raises(UserError, match="nonsense"):
        inputs.expand(["nonsense://bucket/file"])


def test_names_of_urls():
    assert inputs.name("https://host/folder/file.gz?token=a/b") == "file.gz"
    assert inputs.name("/folder/what? a name.txt") == "what? a name.txt"
    assert inputs.name("file.gz") == "file.gz"


def test_remote_files():
    files = fsspec.filesystem("memory")
    for name in ("part-1.txt", "part-0.txt", "other.md"):
        files.pipe(f"/remote-inputs/{name}", gzip.compress(name.encode()))
    found = inputs.expand(["memory://remote-inputs/*.txt"])
    assert names(found) == ["part-0.txt", "part-1.txt"]
    assert [inputs.open_input(path).read() for path in found] == [b"part-0.txt", b"part-1.txt"]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def test_files_over_http(folder):
    (folder / "served.txt.gz").write_bytes(gzip.compress(TEXT))
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host = f"http://127.0.0.1:{server.server_port}"
        found = inputs.expand([f"{host}/{{served.txt.gz,b.txt}}"])
        assert found == [f"{host}/b.txt", f"{host}/served.txt.gz"]
        for path in found:
            with inputs.open_input(path) as stream:
                assert stream.read() == TEXT
        with pytest.raises(UserError, match="no such file"):
            inputs.expand([f"{host}/missing.gz"])
        server.shutdown()


COMPRESSED = {
    "plain": TEXT,
    "gzip": gzip.compress(TEXT),
    "gzip members": gzip.compress(TEXT[:100_000]) + gzip.compress(b"") + gzip.compress(TEXT[100_000:]),
    "bzip2": bz2.compress(TEXT),
    "bzip2 streams": bz2.compress(TEXT[:100_000]) + bz2.compress(TEXT[100_000:]),
    "zstd": ZSTD(TEXT),
    "zstd frames": ZSTD(TEXT[:100_000]) + ZSTD(TEXT[100_000:]),
}


@pytest.mark.parametrize("kind", COMPRESSED)
def test_decompression_goes_by_content(tmp_path, kind):
    path = tmp_path / "no_suffix"
    path.write_bytes(COMPRESSED[kind])
    with inputs.open_input(str(path)) as stream:
        assert stream.read() == TEXT
    with inputs.open_input(str(path)) as stream:
        assert list(stream) == TEXT.splitlines(keepends=True)


@pytest.mark.parametrize("kind", [kind for kind in COMPRESSED if kind != "plain"])
def test_a_file_cut_off_gives_what_is_there_and_then_says_so(tmp_path, kind):
    path = tmp_path / "cut"
    path.write_bytes(COMPRESSED[kind][: -len(COMPRESSED[kind]) // 4])
    read = []
    with inputs.open_input(str(path)) as stream, pytest.raises(inputs.Damaged):
        while block := stream.read1(1 << 16):
            read.append(block)
    text = b"".join(read)
    assert TEXT.startswith(text) and len(text) < len(TEXT)


@pytest.mark.parametrize("kind", ["gzip", "bzip2", "zstd"])
def test_flipped_bytes_are_damage(tmp_path, kind):
    data = bytearray(COMPRESSED[kind])
    rng = random.Random(0)
    for _ in range(20):
        data[rng.randrange(len(data) // 2, len(data) * 3 // 4)] ^= 0xFF
    path = tmp_path / "flipped"
    path.write_bytes(data)
    with inputs.open_input(str(path)) as stream, pytest.raises(inputs.Damaged):
        while stream.read1(1 << 16):
            pass


def test_an_empty_file_is_empty(tmp_path):
    (tmp_path / "empty.gz").touch()
    assert inputs.open_input(str(tmp_path / "empty.gz")).read() == b""


def test_errors_of_the_file_itself_are_not_damage(tmp_path):
    with pytest.raises(FileNotFoundError):
        inputs.open_input(str(tmp_path / "none.gz"))
