"""From the command line to a Config: a config file or the saved config of a workdir, and flags that change fields.

Every fault of theirs is a UserError that names the file and line, or the flag and the nearest ones that exist.
"""

import difflib
import json
import os
import pathlib
import re
import runpy
import traceback
import typing

from llm_jax.config import Config, UserError, flatten, from_dict, to_dict

OVERRIDE = re.compile(r"--?(no)?config\.([^=]+)")
LISTS = ("model.pattern",)  # given whole: --config.model.pattern=dense,moe
TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "none"}


def nearest(name: str, names) -> str:
    """'; nearest: ...' or nothing."""
    # A flag is more likely misplaced than misspelt: --steps and --config.steps mean --config.train.steps.
    last = name.lstrip("-").rpartition(".")[2]
    by_last_part = [other for other in names if name.startswith("-") and other.rpartition(".")[2] == last]
    found = list(dict.fromkeys(by_last_part + difflib.get_close_matches(name, names, n=3, cutoff=0.6)))[:3]
    return f"; nearest: {', '.join(found)}" if found else ""


def override(config: Config, arguments: list[str]) -> Config:
    """The config with each `--config.path=value` or `--config.path value` applied, in order."""
    from absl import flags
    from ml_collections import config_flags
    from ml_collections.config_flags import config_path

    problems = []
    fields = {path: value for path, value in flatten(config).items() if path.partition("[")[0] not in LISTS}
    fields |= dict.fromkeys(LISTS)
    arguments = list(arguments)
    while arguments:
        argument = arguments.pop(0)
        flag, equals, value = argument.partition("=")
        match = OVERRIDE.match(flag)
        if match is None:
            problems.append(f"unexpected argument {argument!r}; a flag is written --name=value")
            continue
        negated, path = match.groups()
        types = allowed_types(config, path) if path in fields else ()
        if not types or (negated and bool not in types):
            problems.append(
                f"{flag}: no such field{nearest(f'--config.{path}', [f'--config.{field}' for field in fields])}"
            )
            continue
        if not equals and bool not in types:
            if not arguments:
                problems.append(f"{flag} has no value; it must be {names_of(types)}")
                continue
            value = arguments.pop(0)
            argument = f"{flag}={value}"
        if path in LISTS:
            config_path.set_value(path, config, tuple(re.findall(r"\w+", value)))
            continue
        if value.lower() == "none" and type(None) in types:
            # config_flags has no way to say None for a field that holds a number or a text.
            config_path.set_value(path, config, None)
            continue
        values = flags.FlagValues()
        argv = ["llm-jax", argument]
        try:
            config_flags.DEFINE_config_dataclass("config", config, flag_values=values, sys_argv=argv)
            values(argv)
        except flags.Error:
            problems.append(f"{argument}: must be {names_of(types)}")
            continue
        config = values.config
    if problems:
        raise UserError("\n".join(problems))
    return config


def allowed_types(config: Config, path: str) -> tuple[type, ...]:
    from ml_collections.config_flags import config_path

    if path.partition("[")[0] in LISTS:
        return (str,)
    hint = config_path.get_type(path, config, normalize=False)
    return typing.get_args(hint) or (typing.cast(type, hint),)


def names_of(types: tuple[type, ...]) -> str:
    return " or ".join(TYPE_NAMES.get(t, t.__name__) for t in types)


def load_config_file(path: str) -> Config:
    if not os.path.isfile(path):
        beside = pathlib.Path(path).parent
        files = [str(file) for file in sorted(beside.glob("*.py"))] if beside.is_dir() else []
        raise UserError(f"--config={path}: no such file{nearest(path, files)}")
    try:
        module = runpy.run_path(path)
        if "get_config" not in module:
            raise UserError(f"--config={path} defines no get_config(); see configs/quickstart.py")
        config = module["get_config"]()
    except UserError:
        raise
    except SyntaxError as error:
        raise UserError(f"--config={path}: {error.filename}, line {error.lineno}: {error.msg}") from error
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        where = f"line {lines[-1]}: " if lines else ""
        message = " ".join(str(error).split())
        raise UserError(f"--config={path}: {where}{type(error).__name__}: {message}") from error
    if not isinstance(config, Config):
        raise UserError(f"--config={path}: get_config() returns {type(config).__name__}, not llm_jax.config.Config")
    return checked_types(config, f"--config={path}")


def load_saved_config(path: pathlib.Path) -> Config:
    try:
        config = from_dict(json.loads(path.read_text("utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); give --config=FILE with a new --workdir") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return checked_types(config, str(path))


def checked_types(config: Config, origin: str) -> Config:
    """The config, sources as a tuple of Source. Raises UserError with every field whose value is not of its type."""
    problems = []
    for path, value in flatten(config).items():
        if path in LISTS:  # else its elements have paths of their own
            problems.append(f"{origin}: {path}={value!r} must be a tuple of texts")
            continue
        types = allowed_types(config, path)
        if type(value) not in types and not (float in types and type(value) is int):
            problems.append(f"{origin}: {path}={value!r} must be {names_of(types)}")
    if problems:
        raise UserError("\n".join(problems))
    return from_dict(to_dict(config))
