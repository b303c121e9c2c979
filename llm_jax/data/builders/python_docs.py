"""The built-in corpus `python_docs`: the documentation of Python and of the packages installed beside it.

It needs no download, so it is there on every machine: about 10 MB of technical English in the core installation.
A document is what one module says about itself: its docstrings in order, each below its qualified name. Sources are
read with `ast` and never imported. The topics of Python's own `help()` are added. Run twice on the same installation,
it gives the same records.
"""

import ast
import hashlib
import inspect
import os
import pydoc_data.topics
import re
import sysconfig
import warnings
from collections.abc import Iterator

import tensorflow_datasets as tfds

MIN_CHARACTERS = 200  # of a docstring: shorter ones say little more than the name does
MIN_LETTERS = 0.7  # share of letters and spaces: below it, a docstring is a table or code rather than English
MIN_SHARE = 0.2  # of docstrings in the source: files below it would take most of the time for a quarter of the text
VALIDATION_PERCENT = 2
SKIPPED_FOLDERS = {"__pycache__", "site-packages", "_vendor", "test", "tests", "testing", "idle_test"}
SURROGATE = re.compile("[\ud800-\udfff]")
TRIPLE_QUOTED = re.compile(rb'"""(?:[^"]|"(?!""))*"""|' rb"'''(?:[^']|'(?!''))*'''")


class PythonDocs(tfds.core.GeneratorBasedBuilder):
    """Docstrings of the installed packages, one document a module; de-duplicated; about 2 % of the modules validate."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description="Documentation of Python and of the installed packages, one document a module.",
            features=tfds.features.FeaturesDict(
                {
                    "text": tfds.features.Text(),
                    "module": tfds.features.Text(doc="qualified name of the module, or topics.NAME; unique"),
                    "package": tfds.features.Text(),
                }
            ),
            license="of the packages it is read from, mostly BSD, MIT, Apache-2.0 and PSF",
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        del dl_manager  # nothing is downloaded
        splits = {"train": [], "validation": []}
        paths = sysconfig.get_paths()
        for module, text in documents([paths["stdlib"], paths["purelib"], paths["platlib"]]):
            example = {"text": text, "module": module, "package": module.partition(".")[0]}
            splits[split_of(module)].append((module, example))
        return {split: iter(examples) for split, examples in splits.items()}

    def _generate_examples(self):
        raise NotImplementedError("_split_generators gives the examples: one pass over the sources serves both splits")


def split_of(module: str) -> str:
    """The split of a module depends on its name alone, so it stays there as packages come and go."""
    bucket = int.from_bytes(hashlib.sha256(module.encode()).digest()[:4], "big") % 100
    return "validation" if bucket < VALIDATION_PERCENT else "train"


def documents(folders: list[str]) -> Iterator[tuple[str, str]]:
    """(module, text) of each documented module below the folders, each module and each docstring once."""
    seen, modules = set(), set()

    def new(text: str) -> bool:
        digest = hashlib.sha256(" ".join(text.lower().split()).encode()).digest()
        return digest not in seen and not seen.add(digest)

    for name, text in sorted(pydoc_data.topics.topics.items()):
        text = inspect.cleandoc(text)
        if is_english(text) and new(text):
            yield f"topics.{name}", text + "\n"
    for folder in dict.fromkeys(map(os.path.realpath, folders)):
        for module, path in python_files(folder):
            if module in modules:  # name.py beside name/__init__.py, or a backport of a module of the standard library
                continue
            with open(path, "rb") as file:
                source = file.read()
            # Counting quotes is 20 times faster than parsing.
            quoted = sum(len(match) for match in TRIPLE_QUOTED.findall(source) if len(match) >= MIN_CHARACTERS)
            if quoted < MIN_CHARACTERS or quoted < MIN_SHARE * len(source):
                continue
            parts = [(name, text) for name, text in docstrings(source, module) if is_english(text) and new(text)]
            if parts:
                modules.add(module)
                yield module, "\n\n".join(f"{name}\n\n{text}" for name, text in parts) + "\n"


def python_files(folder: str) -> Iterator[tuple[str, str]]:
    """(qualified module name, path) of the sources below a folder, always in the same order."""
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name.isidentifier() and name not in SKIPPED_FOLDERS)
        prefix = os.path.relpath(parent, folder).split(os.sep) if parent != folder else []
        for file in sorted(files):
            stem, extension = os.path.splitext(file)
            is_test = stem.startswith("test_") or stem.endswith("_test")
            if extension == ".py" and stem.isidentifier() and not is_test:
                parts = prefix if stem == "__init__" else [*prefix, stem]
                if parts:
                    yield ".".join(parts), os.path.join(parent, file)


def docstrings(source: bytes, module: str) -> list[tuple[str, str]]:
    """(qualified name, docstring) of the module and of its classes, methods and functions, in order of the source."""
    found = []

    def visit(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> None:
        text = ast.get_docstring(node)
        if text:
            found.append((name, text.strip()))
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                visit(child, f"{name}.{child.name}")

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escape sequences
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return []  # a template, or Python of another version: nobody can import it either
    visit(tree, module)
    return found


def is_english(text: str) -> bool:
    """Long enough, mostly letters, and valid Unicode (a docstring may hold lone surrogates)."""
    if len(text) < MIN_CHARACTERS or SURROGATE.search(text):
        return False
    return sum(map(str.isalpha, text)) + sum(map(str.isspace, text)) >= MIN_LETTERS * len(text)
