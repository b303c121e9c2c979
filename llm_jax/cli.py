"""`llm-jax VERB`: finds the job, parses its flags, turns errors into one line each and an exit code.

Exit codes are the contract with whatever started the command: 0 done; 75 stopped and saved after a preemption notice,
so start again; 70 crashed; 78 bad flags, config or data, so starting again is useless; 130 interrupted by Ctrl-C.

Nothing here imports JAX, numpy or a data library: help and messages about flags answer at once. The jobs do, in `run`.
"""

import dataclasses
import errno
import importlib
import os
import pathlib
import select
import shlex
import signal
import sys
import textwrap
import traceback
import typing

import llm_jax
from llm_jax import environment
from llm_jax.config import Config, RunFailed, UserError, flatten, validate
from llm_jax.flags import OVERRIDE, load_config_file, load_saved_config, nearest, override
from llm_jax.safety.remote import Store, is_url

CRASHED = 70
PREEMPTED = 75
BAD_INPUT = 78
INTERRUPTED = 130
BROKEN_PIPE = 141  # as a shell reports SIGPIPE: whoever read our output went away

ELSEWHERE = "or choose another place by --workdir, --config.data.cache_dir or --config.data.data_dir"
MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
OS_ERROR_ADVICE = {
    errno.ENOSPC: f"free some space {ELSEWHERE}; the same command then goes on",
    errno.EDQUOT: f"free some space {ELSEWHERE}; the same command then goes on",
    errno.EROFS: f"make it writable {ELSEWHERE}",
    errno.EACCES: f"change its permissions {ELSEWHERE}",
    errno.EPERM: f"change its permissions {ELSEWHERE}",
    **dict.fromkeys(MISSING, "check the path"),
}


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag besides --config; `kind` names the absl.flags.DEFINE_ function, `options` are its keyword arguments."""

    name: str
    kind: str
    help: str
    options: dict = dataclasses.field(default_factory=dict)
    default: object = None


@dataclasses.dataclass(frozen=True)
class Verb:
    """llm_jax.jobs.VERB.run(config=, workdir=, as_json=, and one keyword for each flag) -> exit code, or None for 0.

    Of a verb of two words the second is the function: llm_jax.jobs.inspect.batch.
    """

    summary: str
    explanation: str
    example: str
    flags: tuple[Flag, ...] = ()
    reads_config_file: bool = True  # else the config is that of the workdir
    needs_workdir: bool = True
    makes_workdir: bool = False  # from the default config, if none is given
    of_a_run: bool = True  # else there is no config, and a workdir only as a flag of its own
    extra: str | None = None  # of setup.py, that it needs


PROCESSES = (
    Flag("coordinator", "string", "HOST:PORT of process 0, for a run of several processes"),
    Flag("num_processes", "integer", "of the run; 1 alone: a process by itself", {"lower_bound": 1}),
    Flag("process_id", "integer", "of this process: 0, 1, ...", {"lower_bound": 0}),
)
EMA = Flag("ema", "boolean", "use the average of the parameters; see train.ema_decay", default=False)
STEP = Flag("step", "integer", "of the checkpoint; default: the newest", {"lower_bound": 0})

INPUT = Flag(
    "input",
    "multi_string",
    "path, glob (** for any folders, {a,b} for either), gs://, s3:// or https:// URL, or "
    "@FILE with one of these a line; may be repeated",
)
DATA_DIR = Flag("data_dir", "string", "where the dataset goes, as for tfds", default="~/tensorflow_datasets")
WORKERS = Flag("workers", "integer", "processes; changes no result", {"lower_bound": 1}, os.cpu_count())
BUILD = (
    INPUT,
    DATA_DIR,
    Flag("name", "string", "of the dataset, optionally with /CONFIG"),
    Flag("version", "string", "of the dataset", default="1.0.0"),
    Flag("workdir", "string", "for files on the way, up to twice the text; default: in --data_dir"),
    WORKERS,
    Flag("languages", "list", "ISO codes that the rule `language` keeps; default: en for common_crawl, else all"),
    Flag("bad_words", "string", "a file with one word a line, for the rule bad_words: pages with one of them go"),
    Flag("threshold", "multi_string", "RULE.FIELD=NUMBER, such as c4.min_sentences=5; may be repeated", default=[]),
    Flag("near_duplicates", "boolean", "remove near-duplicates (MinHash)", default=True),
    Flag("validation", "float", "share of the documents", {"lower_bound": 0.0, "upper_bound": 1.0}, 0.005),
    Flag("test", "float", "share of the documents", {"lower_bound": 0.0, "upper_bound": 1.0}, 0.005),
    Flag(
        "together",
        "string",
        "what no two splits share parts of: document, site, or cluster (of near-duplicates)",
        default="document",
    ),
    Flag(
        "evaluation",
        "multi_string",
        "a .txt or .jsonl file whose texts training must not hold; may be repeated",
        default=[],
    ),
    Flag(
        "contamination",
        "string",
        "drop or mask training documents that share 13 words with those or with held-out ones, or keep them",
        default="drop",
    ),
    Flag(
        "runner",
        "string",
        "run on Apache Beam: its flags in one text, such as '--runner=FlinkRunner --flink_master=...'",
    ),
)


def rules(default: str) -> Flag:
    names = "language, c4, gopher_quality, gopher_repetition, fineweb, bad_words, personal"
    return Flag("rules", "list", f"in their order, of {names}", default=default)


VERBS = {
    "build common_crawl": Verb(
        summary="make a clean, de-duplicated dataset of Common Crawl's WET or WARC files",
        explanation="Extracts text, keeps pages by language and rules, the newest copy of each address, one of equal "
        "or nearly equal pages, and nothing that overlaps held-out or evaluation texts; writes a tfds dataset "
        "(ArrayRecord) and a card of what was left out. Killed, the same command goes on. Needs the extra [build].",
        example="llm-jax build common_crawl --input='CC-MAIN-*.warc.wet.gz' --data_dir=data",
        flags=(
            *BUILD,
            rules("language,c4,gopher_quality,gopher_repetition,fineweb,personal"),
            Flag("lines", "boolean", "keep a line in one page of the build only, as C4", default=True),
        ),
        of_a_run=False,
        extra="build",
    ),
    "build wikipedia": Verb(
        summary="make a dataset of the articles of a Wikipedia dump, of any date and language",
        explanation="Redirects, disambiguation and other non-articles are left out, templates, tables and references "
        "stripped, sections kept as text. Killed, the same command goes on. Needs the extra [build].",
        example="llm-jax build wikipedia --input=enwiki-20261101-pages-articles.xml.bz2 --data_dir=data",
        flags=(*BUILD, rules("")),
        of_a_run=False,
        extra="build",
    ),
    "build text": Verb(
        summary="make a dataset of text files, JSON lines or Parquet tables",
        explanation="One document a .txt file, line (.jsonl) or row (.parquet), compressed or not. Killed, the same "
        "command goes on. Needs the extra [build].",
        example="llm-jax build text --input='corpus/**/*.{txt,jsonl.gz}' --name=my_corpus --data_dir=data",
        flags=(
            *BUILD,
            rules(""),
            Flag("text_key", "string", "the field or column that holds the text", default="text"),
        ),
        of_a_run=False,
        extra="build",
    ),
    "build convert": Verb(
        summary="convert a prepared tfds dataset from TFRecord to ArrayRecord, record for record",
        explanation="Without TensorFlow. By default the new files go beside the old ones. Needs the extra [build].",
        example="llm-jax build convert --input=data/c4/en/3.0.1",
        flags=(INPUT, dataclasses.replace(DATA_DIR, default=None), WORKERS),
        of_a_run=False,
        extra="build",
    ),
    "prepare": Verb(
        summary="train the tokenizer and tokenize the data sets, once",
        explanation="The result lies in data.cache_dir and is shared by all runs with the same data. `train` does this "
        "by itself; do it beforehand to keep it off expensive machines. Interrupted, the same command goes on. Several "
        "hosts that see the same data.cache_dir share the work: start it on each, with its --process_id.",
        example="llm-jax prepare --config=configs/quickstart.py",
        flags=PROCESSES[1:],
        needs_workdir=False,
    ),
    "plan": Verb(
        summary="say whether a run fits on a machine, how fast it will be and what it costs, before it is paid for",
        explanation="By formulas, at once and on any computer: memory by class, seconds of an update, which exchanges "
        "are waited for, days and chip-hours. A run that does not fit is an answer, too: with what to change.",
        example="llm-jax plan --config=configs/llama_8b.py --topology=v5p:4x4x4 --search",
        flags=(
            Flag("topology", "string", "CHIP:SHAPE of one slice, such as v5e:4x4, v5p:4x4x8, v7x:4x4x4; or h100:64"),
            Flag("slices", "integer", "how many of it, joined by the data-centre network", {"lower_bound": 1}, 1),
            Flag("search", "boolean", "rank the meshes, with remat policies and microbatches", default=False),
            Flag("compile", "boolean", "compile the update for it, too; needs the extra [tpu], no TPU", default=False),
            Flag("price", "float", "of a chip-hour, in any currency", {"lower_bound": 0.0}),
            Flag("tokens", "float", "to train on, such as 2e12; default: train.steps updates", {"lower_bound": 1.0}),
        ),
        needs_workdir=False,
    ),
    "train": Verb(
        summary="train a model, and go on where an earlier start of the same command stopped",
        explanation="Prepares the data if need be, resumes from the newest intact checkpoint in WORKDIR, evaluates at "
        "the end. With a WORKDIR that has been started, --workdir alone is enough.",
        example="llm-jax train --config=configs/quickstart.py --workdir=runs/quickstart --config.train.steps=500",
        flags=PROCESSES,
    ),
    "evaluate": Verb(
        summary="measure loss, perplexity and bits per byte on all held-out text",
        explanation="Prints a table and writes WORKDIR/evaluate.json. Or on one text, by sliding windows (--text), or "
        "on tasks of EleutherAI's lm-evaluation-harness (--tasks; needs the extra [eval]).",
        example="llm-jax evaluate --workdir=runs/quickstart",
        flags=(
            STEP,
            EMA,
            Flag("batch_size", "integer", "in sequences; changes no result", {"lower_bound": 1}),
            Flag("text", "string", "the perplexity of this file, or of tfds:NAME/SPLIT, document by document"),
            Flag("stride", "integer", "of its windows, in tokens; default: half of --length", {"lower_bound": 1}),
            Flag("wikitext", "boolean", "undo the tokenization of WikiText first", default=False),
            Flag("tasks", "list", "names or globs of tasks of the harness, or YAML files of your own"),
            Flag("include_path", "string", "a folder with tasks of your own, to be named in --tasks"),
            Flag("limit", "integer", "so many examples of each task", {"lower_bound": 1}),
            Flag("num_fewshot", "integer", "examples in a prompt; default: as the task says", {"lower_bound": 0}),
            Flag("length", "integer", "tokens that a prediction sees, at most", {"lower_bound": 1}),
        ),
        reads_config_file=False,
    ),
    "generate": Verb(
        summary="continue prompts with a trained model",
        explanation="Prompts come from --prompt, from --prompts_file, or from standard input, one per line; blank "
        "lines are skipped.",
        example='llm-jax generate --workdir=runs/quickstart --prompt="The list is" --temperature=0.7',
        flags=(
            Flag("prompt", "multi_string", "text to continue; may be repeated"),
            Flag("prompts_file", "string", "a file with one prompt per line; - is standard input"),
            Flag("max_tokens", "integer", "new tokens per prompt, at most", {"lower_bound": 1}, default=128),
            Flag(
                "temperature", "float", "1 samples as the model says; 0 takes the likeliest", {"lower_bound": 0.0}, 1.0
            ),
            Flag("top_k", "integer", "sample from the k likeliest tokens only", {"lower_bound": 1}),
            Flag("top_p", "float", "sample from the likeliest tokens that hold this probability"),
            Flag("seed", "integer", "of the sampling", {"lower_bound": 0}, 0),
            STEP,
            EMA,
            Flag("stream", "boolean", "print while generating; default: on a terminal, for one prompt"),
        ),
        reads_config_file=False,
    ),
    "import": Verb(
        summary="make a workdir of a Hugging Face model, to train on, evaluate and generate with",
        explanation="Reads config.json, the tokenizer and safetensors files of GPT-2, Llama, Mistral, Qwen2, Qwen3, "
        "OLMo 2, Mixtral, Qwen3-MoE, OLMoE and Gemma 2 and 3 (text). The config's sections model and tokenizer become "
        "the model's own; the others come from --config. Needs the extra [hf].",
        example="llm-jax import --from=openai-community/gpt2 --workdir=runs/gpt2",
        flags=(Flag("from", "string", "a folder with config.json, or OWNER/NAME on the hub"),),
        makes_workdir=True,
        extra="hf",
    ),
    "export": Verb(
        summary="write a checkpoint as a folder that Hugging Face transformers loads",
        explanation="config.json, safetensors and a tokenizer with the same ids. A model that no family there can "
        "express is refused, with the fields that have no counterpart. Needs the extra [hf].",
        example="llm-jax export --workdir=runs/quickstart --to=exported",
        flags=(
            Flag("to", "string", "a folder that is new or empty"),
            STEP,
            EMA,
            Flag("bfloat16", "boolean", "round the weights, which are float32, to it", default=False),
        ),
        reads_config_file=False,
        extra="hf",
    ),
    "status": Verb(
        summary="say how a run is doing, from its workdir alone",
        explanation="Step, loss, speed, time to go, last sign of life, checkpoints, starts, goodput. For a run on "
        "another machine, too; touches no device and changes nothing.",
        example="llm-jax status --workdir=runs/quickstart",
        reads_config_file=False,
    ),
    "report": Verb(
        summary="write a run, or several beside each other, as one HTML page that needs no network",
        explanation="Curves with restarts, spikes and evaluations, held-out text, where the time went, incidents, "
        "config and what differs in it. Needs the extra [report].",
        example="llm-jax report --workdir=runs/quickstart --compare=runs/other",
        flags=(
            Flag("compare", "multi_string", "the workdir of another run; may be repeated"),
            Flag("by", "string", "lay runs over step, tokens, flops or time; default: step, of several runs tokens"),
            Flag("out", "string", "the file; default: WORKDIR/report.html"),
        ),
        reads_config_file=False,
        extra="report",
    ),
    "verify-resume": Verb(
        summary="prove that a killed run goes on bit for bit, on this machine",
        explanation="Trains a few steps undisturbed, and again with kills and restarts, compares batches, losses and "
        "checkpoints, and writes WORKDIR/certificate.json. Exit code 70 if they differ.",
        example="llm-jax verify-resume --config=configs/quickstart.py --workdir=runs/certificate",
        flags=(
            Flag("steps", "integer", "how far the runs are compared", {"lower_bound": 3}, 20),
            Flag("kills", "integer", "by SIGKILL, at random steps", {"lower_bound": 1}, 2),
            Flag("seed", "integer", "of those steps", {"lower_bound": 0}, 0),
            Flag("processes", "integer", "of the killed runs, on this machine", {"lower_bound": 1}, 1),
            Flag("mesh", "string", "go on with these axes, too, such as fsdp=4,tensor=2"),
            Flag("other_devices", "integer", "of that mesh, simulated; for runs on CPU", {"lower_bound": 1}),
        ),
    ),
    "inspect batch": Verb(
        summary="show the text that makes, or made, an update",
        explanation="Documents, their keys and the tokens of each row. A batch is a function of the step, so any "
        "can be shown at any time.",
        example="llm-jax inspect batch --workdir=runs/quickstart --step=100",
        flags=(
            Flag("step", "integer", "number of the update; the first is 1", {"lower_bound": 1}),
            Flag("text", "boolean", "show whole texts", default=False),
        ),
        reads_config_file=False,
    ),
    "inspect step": Verb(
        summary="make one update of a run again, and show what it did",
        explanation="From the newest checkpoint before it. Loss, gradient and parameter norms of each layer, compared "
        "with the record. Nothing is changed.",
        example="llm-jax inspect step --workdir=runs/quickstart --step=120",
        flags=(Flag("step", "integer", "number of the update; the first is 1", {"lower_bound": 1}),),
        reads_config_file=False,
    ),
    "inspect goodput": Verb(
        summary="show what the time of a run went into, over all its starts",
        explanation="Useful steps, compilation, waiting for data, saves, evaluation, work that was lost, time between "
        "two starts.",
        example="llm-jax inspect goodput --workdir=runs/quickstart",
        reads_config_file=False,
    ),
    "inspect checkpoints": Verb(
        summary="verify every checkpoint of a run",
        explanation="Reads all arrays and compares their digests. Exit code 70 if one is damaged; nothing is changed.",
        example="llm-jax inspect checkpoints --workdir=runs/quickstart",
        reads_config_file=False,
    ),
    "inspect params": Verb(
        summary="list the parameters of a checkpoint",
        explanation="Names, shapes, types and the root mean square of each array.",
        example="llm-jax inspect params --workdir=runs/quickstart",
        flags=(STEP,),
        reads_config_file=False,
    ),
    "inspect diff": Verb(
        summary="compare two runs: config, losses, parameters",
        explanation="Losses and parameters are compared to the last bit, where both runs have the step.",
        example="llm-jax inspect diff --workdir=runs/quickstart --other=runs/other",
        flags=(Flag("other", "string", "the workdir of the other run"),),
        reads_config_file=False,
    ),
}


def help_text() -> str:
    lines = [
        f"llm-jax {llm_jax.__version__}: {llm_jax.__doc__}",
        "",
        "Usage: llm-jax VERB [--config=FILE] [--config.SECTION.FIELD=VALUE ...] [--workdir=DIR] [--json]",
        "",
        *(f"  {name:21}{verb.summary}" for name, verb in VERBS.items()),
        "",
        "`llm-jax VERB --help` shows the flags of a verb. Examples:",
        "",
        *(f"  {verb.example}" for verb in VERBS.values()),
    ]
    return "\n".join(lines)


def verb_help_text(name: str) -> str:
    verb = VERBS[name]

    def row(flag: str, text: str) -> str:
        return textwrap.fill(text, 110, initial_indent=f"  {flag:30}", subsequent_indent=" " * 32)

    lines = [
        f"llm-jax {name}: {verb.summary}",
        "",
        textwrap.fill(verb.explanation, 110),
        "",
        f"  {verb.example}",
        "",
        "Flags:",
    ]
    if verb.of_a_run and verb.reads_config_file:
        lines.append(row("--config=FILE", "a Python file with get_config() -> llm_jax.config.Config; see configs/"))
    if verb.of_a_run:
        lines.append(
            row(
                "--workdir=DIR",
                "where the run lies, or gs://BUCKET/PATH"
                + ("" if verb.needs_workdir else "; not needed with --config"),
            )
        )
    for flag in verb.flags:
        shown = f"--[no]{flag.name}" if flag.kind == "boolean" else f"--{flag.name}=..."
        lines.append(row(shown, flag.help + ("" if flag.default in (None, "", []) else f"; default: {flag.default}")))
    lines.append(row("--json", "print the result as JSON"))
    if not verb.of_a_run:
        return "\n".join(lines)
    origin = "default" if verb.reads_config_file else "default; the workdir has its own value"
    lines += [
        row("--config.SECTION.FIELD=...", "change one field, `none` where it may be off"),
        "",
        f"Fields ({origin}); llm_jax/config.py says what they mean:",
    ]
    for section in dataclasses.fields(Config):
        fields = {path: value for path, value in flatten(Config()).items() if path.startswith(section.name + ".")}
        text = " ".join(f"{path.removeprefix(section.name + '.')}={value}" for path, value in fields.items())
        options = {"break_long_words": False, "break_on_hyphens": False, "subsequent_indent": " " * 14}
        lines.append(textwrap.fill(text, 110, initial_indent=f"  {section.name:12}", **options))
    return "\n".join(lines)


def parse(name: str, argv: list[str]) -> dict:
    """The keyword arguments of the verb's job. Raises UserError with every flag or field that is wrong."""
    from absl import flags

    verb = VERBS[name]
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    flags.DEFINE_boolean("json", False, "", flag_values=values)
    if verb.of_a_run:
        flags.DEFINE_string("workdir", None, "", flag_values=values)
        flags.DEFINE_string("config", None, "", flag_values=values)
    for flag in verb.flags:
        define = getattr(flags, f"DEFINE_{flag.kind}")
        define(flag.name, flag.default, flag.help, flag_values=values, **flag.options)
    try:
        rest = values(["llm-jax", *argv], known_only=True)[1:]
    except (flags.Error, ValueError) as error:
        raise UserError(" ".join(str(error).removeprefix("flag ").split())) from error

    unknown = [
        argument.partition("=")[0]
        for argument in rest
        if argument.startswith("-") and not (verb.of_a_run and OVERRIDE.match(argument))
    ]
    if unknown:
        names = [f"--{flag}" for flag in values]
        names += [f"--config.{path}" for path in flatten(Config())] if verb.of_a_run else []
        raise UserError("\n".join(f"{flag}: no such flag{nearest('--' + flag.lstrip('-'), names)}" for flag in unknown))
    arguments = {flag.name: values[flag.name].value for flag in verb.flags} | {"as_json": values.json}
    if not verb.of_a_run:
        if rest:
            raise UserError(f"unexpected argument {rest[0]!r}; a flag is written --name=value; put globs into quotes")
        if not arguments["input"]:
            raise UserError(f"{name} needs --input=FILES, such as: {verb.example}")
        return arguments
    if values.workdir == "":
        raise UserError("--workdir is empty; give a directory")
    if values.workdir is None and verb.needs_workdir:
        raise UserError(f"{name} needs --workdir=DIR, such as: {verb.example}")
    if values.config is not None and not verb.reads_config_file:
        raise UserError(
            f"--config={values.config}: {name} reads the config of the run in --workdir; leave --config out "
            "(single fields can be changed by --config.SECTION.FIELD=VALUE)"
        )
    workdir = values.workdir and os.path.expanduser(values.workdir)  # the shell leaves the ~ of --workdir=~/runs
    saved = pathlib.Path(workdir or ".") / "config.json"
    if workdir is not None and is_url(workdir):
        workdir, saved = open_store(workdir)
    if values.config is not None:
        config = load_config_file(values.config)
    elif workdir is not None and saved.exists():
        config = load_saved_config(saved)
    elif verb.makes_workdir:
        config = Config()
    elif verb.reads_config_file:
        raise UserError(f"{name} needs --config=FILE, such as: {verb.example}")
    else:
        raise UserError(f"--workdir={workdir} holds no run: {saved} does not exist; `llm-jax train` makes one")
    config = override(config, rest)
    return {"config": config, "workdir": workdir, **arguments}


def open_store(url: str):
    """(the URL as it is written everywhere, the path of the config there); UserError with what is amiss."""
    from etils import epath

    url = Store(url).url
    return url, epath.Path(url) / "config.json"


def complete_generate(arguments: dict) -> None:
    """Checks and settles what absl flags cannot: `prompts`, `top_p`, `stream`."""
    top_p = arguments["top_p"]
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"--top_p={top_p} must lie in (0, 1]; leave it out to sample from all tokens")
    arguments["prompts"] = read_prompts(arguments.pop("prompt"), arguments.pop("prompts_file"))
    if arguments["stream"] is None:
        arguments["stream"] = sys.stdout.isatty() and len(arguments["prompts"]) == 1 and not arguments["as_json"]


def read_prompts(prompt: list[str] | None, prompts_file: str | None) -> list[str]:
    """The prompts, from the first that applies: --prompt, --prompts_file, standard input."""
    if prompt and prompts_file:
        raise UserError(f"--prompt and --prompts_file={prompts_file} exclude each other; leave one out")
    if prompt:
        return prompt
    if prompts_file and prompts_file != "-":
        origin = f"--prompts_file={prompts_file}"
        data = pathlib.Path(prompts_file).read_bytes()
    elif sys.stdin is None or (sys.stdin.isatty() and prompts_file is None):
        raise UserError("generate needs a prompt: --prompt=TEXT, --prompts_file=FILE, or lines on standard input")
    else:
        origin = "standard input"
        data = sys.stdin.buffer.read()
    try:
        prompts = [line for line in data.decode("utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"{origin} is not UTF-8 text: byte {error.start}: {error.reason}") from error
    if not prompts:
        raise UserError(f"{origin} holds no prompt; give --prompt=TEXT, or one prompt per line")
    return prompts


def find_job(name: str) -> typing.Callable[..., int | None]:
    module, _, function = name.partition(" ")
    try:
        return getattr(importlib.import_module(f"llm_jax.jobs.{module.replace('-', '_')}"), function or "run")
    except ModuleNotFoundError as error:
        extra = VERBS[name].extra
        if extra is None or str(error.name).startswith("llm_jax"):
            raise
        raise UserError(f"{name} needs {error.name}; install it with: pip install 'llm-jax[{extra}]'") from error


def run(name: str, argv: list[str]) -> int:
    """Runs the job; its exit code. Raises UserError for whatever the user can mend."""
    given = []
    try:
        arguments = parse(name, argv)
        if not VERBS[name].of_a_run:
            given = [arguments["data_dir"], arguments.get("workdir")]
            return find_job(name)(**arguments) or 0
        data, model_file = arguments["config"].data, arguments["config"].tokenizer.model_file
        given = [arguments["workdir"], data.data_dir, data.cache_dir, model_file, arguments.get("prompts_file")]
        if name == "generate":
            complete_generate(arguments)
        validate(arguments["config"])
        if name in ("prepare", "train"):  # JAX takes over when it starts; until then there is nothing to save
            signal.signal(signal.SIGTERM, lambda *_: os._exit(PREEMPTED))
        return find_job(name)(**arguments) or 0
    except OSError as error:
        advice = OS_ERROR_ADVICE.get(error.errno or 0)
        path = os.path.abspath(error.filename) if isinstance(error.filename, str) else ""
        is_given = any(path.startswith(os.path.abspath(os.path.expanduser(place))) for place in given if place)
        # A file that is missing elsewhere is a fault of ours, and wants the traceback.
        if advice is None or (error.errno in MISSING and not is_given):
            raise
        raise UserError(f"{path + ': ' if path else ''}{error.strerror}; {advice}") from error


def main(argv: list[str] | None = None) -> int:
    """Runs one command, reports its errors on standard error and returns its exit code (see the top of this file)."""
    argv = sys.argv[1:] if argv is None else argv
    given, name = argv, argv[0] if argv else "--help"
    if " ".join(argv[:2]) in VERBS:
        name, argv = " ".join(argv[:2]), argv[1:]
    try:
        if name in ("--help", "-h", "help"):
            print(help_text())
            return 0
        if name == "--version":
            print(llm_jax.__version__)
            return 0
        if name not in VERBS:
            verbs = ", ".join(VERBS)
            raise UserError(f"{name}: no such verb{nearest(name, VERBS)}; the verb comes first, and is one of {verbs}")
        if "--help" in argv or "-h" in argv:
            print(verb_help_text(name))
            return 0
        return run(name, argv[1:])
    except UserError as error:
        for problem in str(error).splitlines():
            print(f"llm-jax: error: {problem}", file=sys.stderr)
        return BAD_INPUT
    except RunFailed as error:
        print(f"llm-jax: stopped (exit code {CRASHED}): {error}", file=sys.stderr)
        return CRASHED
    except KeyboardInterrupt:
        print("llm-jax: interrupted; the same command goes on from what has been saved", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        if stdout_is_closed():
            return BROKEN_PIPE
        return report_crash(given)
    except (Exception, SystemExit):  # nobody but entry ends the process
        return report_crash(given)


def report_crash(argv: list[str]) -> int:
    """Prints the exception being handled."""
    traceback.print_exc()
    print(
        f"llm-jax: crashed (exit code {CRASHED}), traceback above: {shlex.join(['llm-jax', *argv])}\n"
        "llm-jax: what was saved lies in the --workdir; the same command goes on there",
        file=sys.stderr,
    )
    return CRASHED


def stdout_is_closed() -> bool:
    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def set_environment(verb: str) -> None:
    """Sets what the user has left open and says so; where the C library must see it, starts this command again."""
    if verb not in ("train", "evaluate", "generate"):
        return
    gpu = environment.has_gpu(os.environ)
    added = environment.for_gpu(os.environ) if gpu else environment.for_malloc(os.environ)
    os.environ.update(added)
    for name, value in added.items():
        print(f"llm-jax: sets {name}={value}, since the environment does not", file=sys.stderr, flush=True)
    if added and not gpu:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def entry() -> typing.NoReturn:
    """The command itself."""
    set_environment(sys.argv[1] if len(sys.argv) > 1 else "")
    code = main()
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = BROKEN_PIPE
    # After a failure an orderly exit would wait for the other hosts in the shutdown barrier of jax.distributed, and
    # they for this one in their next collective: leave at once. After a notice all of them leave, in order. And with a
    # broken pipe the interpreter would complain about the output that it cannot flush.
    if code == BROKEN_PIPE or (code not in (0, PREEMPTED) and "jax" in sys.modules):
        sys.stderr.flush()
        os._exit(code)
    # All that could be saved has been. On its way out Python would take back JAX's handler, and a second notice then
    # end this by the signal instead of by its code.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(code)
