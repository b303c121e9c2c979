"""`llm-jax evaluate --tasks` against the harness's own backend for Hugging Face models, on tasks made here; skipped
where these are not installed: see setup.py."""

import json
import math

import pytest
from test_interop import FLOAT32, main, make_theirs  # noqa: F401  main: a fixture
from tiny_corpus import TOPICS

from llm_jax import cli

REASON = "needs the extras [eval] and [hf], and transformers, torch and accelerate beside them"
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)
datasets = pytest.importorskip("datasets", reason=REASON)
pytest.importorskip("accelerate", reason=REASON)
lm_eval = pytest.importorskip("lm_eval", reason=REASON)
huggingface = pytest.importorskip("lm_eval.models.huggingface", reason=REASON)
tasks_of = pytest.importorskip("lm_eval.tasks", reason=REASON)

QUESTIONS = [text[:n] for n, text in zip((9, 40, 23, 70, 31, 15), TOPICS[70:76], strict=True)]
TASKS = {
    "local_choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
num_fewshot: 0
metric_list:
  - metric: acc
  - metric: acc_norm
""",
    "local_perplexity": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
  - metric: bits_per_byte
""",
    "local_answer": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{reply}}"
generation_kwargs:
  until: ["e", "zz"]
  max_gen_toks: 10
metric_list:
  - metric: exact_match
""",
}


def greedy(model, tokenizer, prompt: str) -> str:
    """As the task local_answer asks, one token after the other."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids[:, -(model.config.max_position_embeddings - 10) :]
    new = []
    for _ in range(10):
        with torch.no_grad():
            new.append(int(model(torch.cat([ids, torch.tensor([new]).long()], 1)).logits[0, -1].argmax()))
        if new[-1] == tokenizer.eos_token_id:
            break
    text = tokenizer.decode(new, skip_special_tokens=True)
    return text.split("e")[0].split("zz")[0]


@pytest.fixture
def make_tasks(tmp_path, monkeypatch):
    """make_tasks(model, tokenizer): the folder of tasks; the replies to the first four questions are the model's."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")

    def make(model, tokenizer):
        folder = tmp_path / "tasks"
        folder.mkdir()
        lines = []
        for number, question in enumerate(QUESTIONS):
            rest = TOPICS[70 + number][len(question) :]
            reply = greedy(model, tokenizer, question)
            choices = [rest[:3], rest[20:50], " " + rest[7:11], "x"]
            lines.append({
                "question": question, "choices": choices, "answer": number % 4, "text": TOPICS[number][: 50 * number],
                "reply": reply if number < 4 else reply + "?",
            })  # fmt: skip
        lines[0]["text"] = "One word"
        (folder / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
        data = f"{{data_files: {{test: {folder / 'lines.jsonl'}}}}}"
        head = f"dataset_path: json\ndataset_kwargs: {data}\ntest_split: test\n"
        for name, rest in TASKS.items():
            (folder / f"{name}.yaml").write_text(f"task: {name}\n{head}{rest}")
        return folder

    return make


def same_scores(main, capsys, workdir, folder, make_tasks):  # noqa: F811
    """Of the workdir here, and of the folder there."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).float().eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tasks = make_tasks(model, tokenizer)
    theirs = lm_eval.simple_evaluate(
        huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2), tasks=list(TASKS), bootstrap_iters=1000,
        task_manager=tasks_of.TaskManager(include_path=str(tasks), include_defaults=False),
    )["results"]  # fmt: skip
    capsys.readouterr()
    main(
        "evaluate", f"--workdir={workdir}", f"--tasks={','.join(TASKS)}", f"--include_path={tasks}", "--json",
        "--batch_size=4",
    )  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    assert json.loads((workdir / "evaluate_tasks.json").read_text()) == found
    assert set(found["tasks"]) == set(TASKS)
    numbers = 0
    for task in TASKS:
        for metric, value in theirs[task].items():
            if isinstance(value, float):
                numbers += 1
                assert found["tasks"][task][metric] == pytest.approx(value, rel=1e-5), (task, metric)
    assert numbers >= 8
    assert found["tasks"]["local_answer"]["exact_match,none"] == pytest.approx(4 / 6)
    assert 0 < found["tasks"]["local_choice"]["acc,none"] < 1
    return tasks


def test_scores_of_an_imported_model(main, make_tasks, tmp_path, capsys):  # noqa: F811
    make_theirs("gemma2", tmp_path / "theirs")
    main("import", f"--from={tmp_path / 'theirs'}", f"--workdir={tmp_path / 'run'}", FLOAT32)
    tasks = same_scores(main, capsys, tmp_path / "run", tmp_path / "theirs", make_tasks)
    file = tasks / "local_choice.yaml"
    main("evaluate", f"--workdir={tmp_path / 'run'}", f"--tasks={file}", "--limit=2", "--num_fewshot=1")
    assert "local_choice" in capsys.readouterr().out


def test_scores_of_a_run_of_ours(main, trained, make_tasks, tmp_path, capsys):  # noqa: F811
    """With SentencePiece, and a token before each text."""
    main("export", f"--workdir={trained}", f"--to={tmp_path / 'out'}")
    same_scores(main, capsys, trained, tmp_path / "out", make_tasks)
    (trained / "evaluate_tasks.json").unlink()


def test_perplexity_of_an_imported_model(main, tmp_path, capsys):  # noqa: F811
    """Windows of 64 tokens, 24 apart, by transformers."""
    model = make_theirs("gpt2", tmp_path / "theirs")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")
    main("import", f"--from={tmp_path / 'theirs'}", f"--workdir={tmp_path / 'run'}", FLOAT32)
    text = TOPICS[5][:700]
    (tmp_path / "text.txt").write_bytes(text.encode())
    capsys.readouterr()
    main("evaluate", f"--workdir={tmp_path / 'run'}", f"--text={tmp_path / 'text.txt'}", "--stride=24", "--json")
    found = json.loads(capsys.readouterr().out)
    ids = torch.tensor([tokenizer.bos_token_id, *tokenizer(text).input_ids])
    nll, reached = 0.0, 0
    for first in range(0, len(ids), 24):
        last = min(first + 64, len(ids) - 1)
        with torch.no_grad():
            logits = model(ids[None, first:last]).logits[0].double().log_softmax(-1)
        targets = ids[first + 1 : last + 1]
        new = last - reached
        nll -= logits[torch.arange(len(targets)), targets][len(targets) - new :].sum().item()
        reached = last
        if last == len(ids) - 1:
            break
    assert found["tokens"] == len(ids) - 1 > 100 and found["length"] == 64
    assert found["loss"] == pytest.approx(nll / found["tokens"], rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nll / found["tokens"]), rel=1e-4)


def test_an_unknown_task_is_one_line(trained, capsys):
    assert cli.main(["evaluate", f"--workdir={trained}", "--tasks=no_such_task"]) == 78
    assert "--tasks=no_such_task: no such task" in capsys.readouterr().err
    assert cli.main(["evaluate", f"--workdir={trained}", "--tasks=a", "--include_path=nowhere"]) == 78
    assert "--include_path=nowhere is no folder" in capsys.readouterr().err
