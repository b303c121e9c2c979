"""The command line, with the jobs replaced by recorders; and help in a fresh process, where nothing heavy may load."""

import collections
import errno
import inspect
import io
import os
import pathlib
import shlex
import subprocess
import sys
import types

import pytest

import llm_jax
from llm_jax import cli
from llm_jax import config as c

ROOT = pathlib.Path(__file__).parents[1]
QUICKSTART = str(ROOT / "configs" / "quickstart.py")
HEAVY = ("jax", "numpy", "flax", "optax", "orbax", "tensorflow_datasets", "grain", "sentencepiece")


@pytest.fixture
def jobs(monkeypatch):
    """{verb: a function that `run` calls with its keyword arguments}; `jobs["calls"]` holds what came."""
    table = {"calls": []}

    def fake(verb):
        def run(**arguments):
            table["calls"].append(arguments)
            return table[verb]() if verb in table else None

        return run

    modules = collections.defaultdict(types.SimpleNamespace)
    for verb in cli.VERBS:
        module, _, function = verb.partition(" ")
        setattr(modules[module.replace("-", "_")], function or "run", fake(verb))
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, f"llm_jax.jobs.{name}", module)
    return table


@pytest.fixture
def started(tmp_path):
    """A workdir whose run has been started with the quickstart config."""
    config = c.Config()
    config.train.steps = 777
    (tmp_path / "config.json").write_text(c.dumps(config))
    return tmp_path


def fails_with(capsys, argv, *messages):
    assert cli.main(argv) == 78
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("llm-jax: error: ") for line in lines)
    assert len(lines) == len(messages), lines
    for line, message in zip(lines, messages, strict=True):
        assert message in line


def python(code: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, **options)


@pytest.mark.parametrize("argv", [[], ["--help"], ["train", "--help"], ["generate", "-h"], ["train", "--stepz=3"]])
def test_help_and_messages_load_nothing_heavy(argv):
    code = f"import sys; from llm_jax.cli import main; main({argv}); print('LOADED', set({HEAVY}) & set(sys.modules))"
    assert python(code).stdout.endswith("LOADED set()\n")


def test_help_shows_every_verb_and_every_flag(capsys):
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    assert all(verb in out for verb in cli.VERBS)
    for name, verb in cli.VERBS.items():
        assert cli.main([name, "--help"]) == 0
        out = capsys.readouterr().out
        assert verb.example in out
        assert all(flag.name in out for flag in verb.flags)
        assert ("warmup_steps=100" in out) == verb.of_a_run


@pytest.mark.parametrize("verb", cli.VERBS)
def test_examples_of_the_help_parse(verb, jobs, tmp_path, monkeypatch):
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    (tmp_path / "runs" / "quickstart" / "config.json").write_text(c.dumps(c.Config()))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    assert cli.main(shlex.split(cli.VERBS[verb].example)[1:]) == 0


@pytest.mark.parametrize("verb", cli.VERBS)
def test_jobs_take_what_the_command_line_gives(verb):
    given = {"as_json", *(flag.name for flag in cli.VERBS[verb].flags)}
    if cli.VERBS[verb].of_a_run:
        given |= {"config", "workdir"}
    if verb == "generate":
        given = given - {"prompt", "prompts_file"} | {"prompts"}
    inspect.signature(cli.find_job(verb)).bind(**dict.fromkeys(given))


def test_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "llm_jax", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{llm_jax.__version__}\n")


def test_overrides(jobs, tmp_path):
    code = cli.main(
        [
            "train",
            f"--config={QUICKSTART}",
            "--workdir",
            str(tmp_path),
            "--config.train.steps=500",
            "--config.train.batch_size",
            "4",
            "--config.model.num_kv_heads=none",
            "--config.data.sources[0].weight=0.4",
            "--noconfig.log.tensorboard",
            "--config.model.qk_norm",
            "--config.model.pattern=dense,dense",
            "--config.optimizer.clip_norm=2",
            "--config.data.data_dir=/data",
            "--config.checkpoint.keep_every=7",
            "--config.checkpoint.keep_every",
            "None",
            "--config.model.head_width=none",
            "--config.model.head_width=32",
            "--json",
        ]
    )
    assert code == 0
    (call,) = jobs["calls"]
    config = call["config"]
    assert (call["workdir"], call["as_json"]) == (str(tmp_path), True)
    assert (config.train.steps, config.train.batch_size) == (500, 4)
    assert config.model.num_kv_heads is None
    assert config.data.sources[0].weight == 0.4
    assert not config.log.tensorboard and config.model.qk_norm
    assert config.model.pattern == ("dense", "dense")
    assert config.optimizer.clip_norm == 2.0 and isinstance(config.optimizer.clip_norm, float)
    assert config.data.data_dir == "/data"
    assert config.checkpoint.keep_every is None
    assert config.model.head_width == 32


def test_unknown_fields_and_wrong_types_are_all_named(jobs, capsys, tmp_path):
    fails_with(
        capsys,
        [
            "train",
            f"--config={QUICKSTART}",
            f"--workdir={tmp_path}",
            "--config.train.stepz=4",
            "--config.steps=4",
            "--config.data.sources[1].weight=3",
            "--config.train=build",
            "--noconfig.train.steps",
            "--config.train.steps=many",
            "--config.log.tensorboard=maybe",
            "--config.model.width=none",
            "--config.data.num_workers=x",
            "astray",
        ],
        "--config.train.stepz: no such field; nearest: --config.train.steps",
        "--config.steps: no such field; nearest: --config.train.steps",
        "--config.data.sources[1].weight: no such field; nearest: --config.data.sources[0].weight",
        "--config.train: no such field",
        "--noconfig.train.steps: no such field",
        "--config.train.steps=many: must be a whole number",
        "--config.log.tensorboard=maybe: must be true or false",
        "--config.model.width=none: must be a whole number",
        "--config.data.num_workers=x: must be a whole number or none",
        "unexpected argument 'astray'",
    )
    assert not jobs["calls"]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["trian"], "trian: no such verb; nearest: train"),
        (["--workdir=x", "train"], "the verb comes first"),
        (["train"], "train needs --workdir=DIR, such as: llm-jax train"),
        (["train", "--workdir=missing"], "train needs --config=FILE"),
        (["train", "--workdir="], "--workdir is empty"),
        (["train", "--workdir"], "Missing value for flag --workdir"),
        (["train", "--workdr=x"], "--workdr: no such flag; nearest: --workdir"),
        (["train", "--train.steps=4"], "--train.steps: no such flag; nearest: --config.train.steps"),
        (["train", "--workdir=x", "--config=configs/quikstart.py"], "no such file; nearest: configs/quickstart.py"),
        (["evaluate", "--workdir=missing"], "missing/config.json does not exist; `llm-jax train` makes one"),
        (["evaluate", "--workdir=x", "--config=configs/quickstart.py"], "leave --config out"),
        (["evaluate", "--workdir=x", "--step=-1"], "--step=-1"),
    ],
)
def test_bad_flags(argv, message, jobs, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    fails_with(capsys, argv, message)


@pytest.mark.parametrize(
    "text, message",
    [
        ("def get_config(:\n", "bad.py, line 1: "),
        ("x = 1\n", "defines no get_config(); see configs/quickstart.py"),
        ("def get_config():\n    return {}\n", "get_config() returns dict, not llm_jax.config.Config"),
        ("x = 1\ny = 1 / 0\n", "line 2: ZeroDivisionError: division by zero"),
        (
            "from llm_jax.config import Config\n\ndef get_config():\n    c = Config()\n    c.train.stepz = 3\n",
            "line 5: AttributeError: 'Train' object has no attribute 'stepz'",
        ),
        (
            "from llm_jax.config import *\ndef get_config():\n    return Config(train=Train(steps='9'))\n",
            "train.steps='9' must be a whole number",
        ),
        (
            "from llm_jax.config import *\ndef get_config():\n    return Config(model=None)\n",
            "model=None must be Model",
        ),
    ],
)
def test_bad_config_files(text, message, jobs, capsys, tmp_path):
    (tmp_path / "bad.py").write_text(text)
    fails_with(capsys, ["train", f"--config={tmp_path / 'bad.py'}", f"--workdir={tmp_path}"], message)


def test_broken_rules_are_reported_before_the_job_starts(jobs, capsys, tmp_path):
    argv = ["train", f"--config={QUICKSTART}", f"--workdir={tmp_path}"]
    argv += ["--config.model.norm=batch", "--config.train.steps=0"]
    fails_with(capsys, argv, "model.norm='batch'", "train.steps=0")
    assert not jobs["calls"]


def test_train_goes_on_with_the_config_of_the_workdir(jobs, started):
    assert cli.main(["train", f"--workdir={started}", "--config.checkpoint.every=9"]) == 0
    config = jobs["calls"][0]["config"]
    assert (config.train.steps, config.checkpoint.every) == (777, 9)


@pytest.mark.parametrize("text", ["", "[1]", '{"train": {}}', "\xff"])
def test_damaged_saved_config(text, jobs, capsys, tmp_path):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    fails_with(capsys, ["evaluate", f"--workdir={tmp_path}"], "config.json")


def test_evaluate_and_generate_take_the_workdir_alone(jobs, started):
    assert cli.main(["evaluate", f"--workdir={started}", "--batch_size=4", "--config.data.data_dir=/elsewhere"]) == 0
    assert cli.main(["generate", f"--workdir={started}", "--prompt=a, b", "--prompt=c", "--temperature=0"]) == 0
    evaluate, generate = jobs["calls"]
    assert (evaluate["batch_size"], evaluate["step"]) == (4, None)
    assert evaluate["config"].train.steps == 777 and evaluate["config"].data.data_dir == "/elsewhere"
    del generate["config"]
    assert generate == {
        "workdir": str(started),
        "prompts": ["a, b", "c"],
        "max_tokens": 128,
        "temperature": 0.0,
        "top_k": None,
        "top_p": None,
        "seed": 0,
        "step": None,
        "ema": False,
        "stream": False,
        "as_json": False,
    }


def test_prompts_from_a_file_or_standard_input(jobs, started, tmp_path, monkeypatch):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Ein Gruß \n\nzwei\n", encoding="utf-8")
    for flags in ([f"--prompts_file={prompts}"], ["--prompts_file=-"], []):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(prompts.read_bytes()), encoding="ascii"))
        assert cli.main(["generate", f"--workdir={started}", *flags, "--stream"]) == 0
        assert jobs["calls"][-1]["prompts"] == ["Ein Gruß ", "zwei"]
        assert jobs["calls"][-1]["stream"] is True


@pytest.mark.parametrize(
    "flags, stdin, message",
    [
        ([], b"", "standard input holds no prompt"),
        ([], b"caf\xe9", "standard input is not UTF-8 text: byte 3"),
        (["--prompts_file=nowhere.txt"], b"", "nowhere.txt: No such file or directory"),
        (["--prompts_file=-", "--prompt=a"], b"", "exclude each other"),
        (["--prompt=a", "--top_p=0"], b"", "--top_p=0.0 must lie in (0, 1]"),
        (["--prompt=a", "--top_k=0"], b"", "--top_k=0"),
        (["--prompt=a", "--temperature=-1"], b"", "--temperature=-1"),
        (["--prompt=a", "--max_tokens=x"], b"", "--max_tokens=x"),
    ],
)
def test_bad_prompts(flags, stdin, message, jobs, started, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    fails_with(capsys, ["generate", f"--workdir={started}", *flags], message)


def raiser(error):
    def run():
        raise error

    return run


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT])
def test_disk_errors_take_one_line(code, jobs, capsys, tmp_path):
    jobs["train"] = raiser(OSError(code, os.strerror(code), "/disk/file"))
    fails_with(
        capsys, ["train", f"--config={QUICKSTART}", f"--workdir={tmp_path}"], f"/disk/file: {os.strerror(code)}; "
    )


def test_a_missing_file_is_an_input_error_only_where_the_user_named_the_place(jobs, capsys, tmp_path):
    argv = ["train", f"--config={QUICKSTART}", f"--workdir={tmp_path}"]
    jobs["train"] = raiser(FileNotFoundError(errno.ENOENT, "No such file", str(tmp_path / "x")))
    fails_with(capsys, argv, f"{tmp_path}/x: No such file; check the path")
    jobs["train"] = raiser(FileNotFoundError(errno.ENOENT, "No such file", "/usr/lib/ours"))
    assert cli.main(argv) == 70
    assert "Traceback" in capsys.readouterr().err


def test_exit_codes_of_jobs(jobs, capsys, tmp_path):
    argv = ["train", f"--config={QUICKSTART}", f"--workdir={tmp_path}"]
    jobs["train"] = lambda: 75
    assert cli.main(argv) == 75
    jobs["train"] = raiser(c.UserError("a=1 is wrong\nb=2 is wrong"))
    fails_with(capsys, argv, "a=1 is wrong", "b=2 is wrong")
    jobs["train"] = raiser(KeyboardInterrupt())
    assert cli.main(argv) == 130
    assert len(capsys.readouterr().err.splitlines()) == 1
    jobs["train"] = raiser(ValueError("our mistake"))
    assert cli.main(argv) == 70
    err = capsys.readouterr().err
    assert "Traceback" in err and "ValueError: our mistake" in err and str(tmp_path) in err


@pytest.mark.parametrize("jax_loaded", [False, True])
def test_a_failing_process_does_not_wait_for_an_orderly_exit_once_jax_is_loaded(jax_loaded):
    code = (
        "import atexit, sys, types; from llm_jax import cli; "
        f"atexit.register(print, 'orderly'); {jax_loaded} and sys.modules.update(jax=types.ModuleType('jax')); "
        "cli.main = lambda: (print('output'), 70)[1]; cli.entry()"
    )
    done = python(code)
    assert done.returncode == 70
    assert done.stdout == ("output\n" if jax_loaded else "output\norderly\n")


@pytest.mark.parametrize("buffering", [{}, {"PYTHONUNBUFFERED": "1"}])
def test_a_reader_that_goes_away_is_no_crash(buffering):
    reader, writer = os.pipe()
    os.close(reader)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"} | buffering
    command = [sys.executable, "-m", "llm_jax", "train", "--help"]
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, env=environment)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")
