"""The shape of the package: what CONTRIBUTING.md asks for, read off the source."""

import ast
import pathlib

import pytest

from llm_jax import config

PACKAGE = pathlib.Path(config.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text("utf-8")) for path in FILES}

FLOORS = [
    {"__main__"},
    {"cli"},
    {"flags"},
    {"jobs"},
    {"plan", "report"},
    {"interop"},
    {"training", "data", "corpus", "safety", "measure"},
    {"model"},
    {"kernels"},
    {"parallel"},
    {"config", "environment"},
]
RANK = {room: rank for rank, floor in enumerate(FLOORS) for room in floor}
MESH_AXES = {"replica", "stage", "fsdp", "expert", "context", "tensor"}


def room(name: str) -> str:
    return name.split("/")[0].removesuffix(".py")


def imported_modules(tree: ast.AST) -> set[str]:
    """Full names of all modules and names imported, wherever in the file."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_room_has_a_floor():
    assert {room(name) for name in TREES} - {"__init__"} <= set(RANK)


@pytest.mark.parametrize("name", TREES)
def test_imports_go_down(name):
    here = room(name)
    for module in imported_modules(TREES[name]):
        parts = module.split(".")
        if parts[0] != "llm_jax" or len(parts) < 2 or parts[1] not in RANK:
            continue
        inside = parts[1] == here
        assert here != "__init__" and (inside or RANK[parts[1]] > RANK[here]), f"{name} imports {module}"


def test_nnx_is_only_modules_parameters_and_initializers():
    for name, tree in TREES.items():
        for module in imported_modules(tree):
            if module.startswith("flax"):
                assert room(name) == "model" and module == "flax.nnx", f"{name} imports {module}"
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "nnx":
                assert node.attr in {"Module", "Param", "initializers"}, f"{name}:{node.lineno}: nnx.{node.attr}"


def test_training_and_safety_do_not_mention_nnx():
    for path in FILES:
        if room(path.relative_to(PACKAGE).as_posix()) in {"training", "safety"}:
            assert "nnx" not in path.read_text("utf-8"), path


def test_only_sharding_names_mesh_axes():
    for name, tree in TREES.items():
        if name in {"parallel/sharding.py", "config.py"} or room(name) in {"jobs", "plan", "corpus"}:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant):
                assert not (isinstance(node.value, str) and node.value in MESH_AXES), f"{name}:{node.lineno}"


def test_nothing_is_pickled():
    for name, tree in TREES.items():
        tops = {module.split(".")[0] for module in imported_modules(tree)}
        assert not tops & {"pickle", "cloudpickle", "dill", "shelve", "marshal"}, name
        assert not any(isinstance(n, ast.keyword) and n.arg == "allow_pickle" for n in ast.walk(tree)), name


def test_no_exception_is_swallowed():
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"{name}:{node.lineno}: bare except"
                broad = ast.unparse(node.type) in {"Exception", "BaseException"}
                silent = all(isinstance(s, ast.Pass | ast.Continue | ast.Constant) for s in node.body)
                assert not (broad and silent), f"{name}:{node.lineno}: swallows everything"
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
                assert not {ast.unparse(a) for a in node.args} & {"Exception", "BaseException"}, f"{name}:{node.lineno}"


def test_files_are_named_for_a_subject():
    assert not {path.stem for path in FILES} & {"utils", "util", "common", "helpers", "misc", "base"}


def test_number_of_knobs():
    assert len(config.flatten(config.Config())) < 120


def test_every_knob_is_used():
    used = {
        node.attr
        for name, tree in TREES.items()
        if name not in {"config.py", "flags.py", "cli.py"}
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
    }
    knobs = {path.rpartition(".")[2].partition("[")[0] for path in config.flatten(config.Config())}
    assert not knobs - used
