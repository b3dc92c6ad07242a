"""pocketfed evaluate with seeds: fine-tuned students of all kinds in a table, and mistakes in a sentence."""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
import sys
from pathlib import Path

import pytest

from pocketfed.model.tasks import Dataset, Example

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
FAST = ("--epochs", 1, "--batch-size", 16, "--max-length", 24)


def pocketfed(*arguments: object) -> tuple[int, str, str]:
    """Exit code, output and errors of the command in this process."""
    from pocketfed.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["pocketfed", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
    assert isinstance(ended.value.code, int)
    return ended.value.code, out.getvalue(), err.getvalue()


def works(*arguments: object) -> str:
    code, out, err = pocketfed("evaluate", *arguments)
    assert (code, err) == (0, ""), (out, err)
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data of every kind, small: CoLA's layout, STS-B's, SNIPS's with slots, SQuAD's."""
    folder, drawn = tmp_path_factory.mktemp("data"), random.Random(0)
    names = ["anna", "ben", "clara", "david"]

    def sentence() -> str:
        return f"{drawn.choice(names)} went to {drawn.choice(['oslo', 'paris'])} with {drawn.choice(names)}"

    for split, count in (("train", 48), ("dev", 16)):
        (folder / "cola").mkdir(exist_ok=True)
        rows = "".join(
            f"x\t{i % 2}\t{'' if i % 2 else '*'}\t{'' if i % 2 else 'not '}{sentence()}\n" for i in range(count)
        )
        (folder / "cola" / f"{split}.tsv").write_text(rows)
        (folder / "stsb").mkdir(exist_ok=True)
        lines = "".join(f"{sentence()}\t{sentence()}\t{drawn.random() * 5:.2f}\n" for _ in range(count))
        (folder / "stsb" / f"{split}.tsv").write_text("sentence1\tsentence2\tscore\n" + lines)
        texts = [sentence() for _ in range(count)]
        (folder / "snips" / split).mkdir(parents=True)
        tags = [" ".join("B-city" if w in ("oslo", "paris") else "O" for w in t.split()) for t in texts]
        labels = [t.split()[0] for t in texts]
        for name, some in (("seq.in", texts), ("seq.out", tags), ("label", labels)):
            (folder / "snips" / split / name).write_text("\n".join(some) + "\n")
        passages = [sentence() for _ in range(count)]
        paragraphs = [
            {"context": p, "qas": [{"id": str(i), "question": "who went?", "is_impossible": i % 4 == 0,
             "answers": [] if i % 4 == 0 else [{"text": p.split()[0], "answer_start": 0}]}]}
            for i, p in enumerate(passages)
        ]  # fmt: skip
        (folder / "squad").mkdir(exist_ok=True)
        (folder / "squad" / f"{split}.json").write_text(
            json.dumps({"data": [{"title": "t", "paragraphs": paragraphs}]})
        )
    return folder


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    from pocketfed.model.checkpoints import Checkpoint, save
    from pocketfed.model.config import STUDENTS
    from pocketfed.model.mobilebert import MobileBert
    from pocketfed.model.tokenization import train_vocabulary

    vocabulary = train_vocabulary(["anna ben clara david went to oslo paris with not who"] * 3, 120)
    config = STUDENTS["nano"].with_changes(vocab_size=len(vocabulary), max_position_embeddings=40)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("student") / "small"
    save(Checkpoint(config, MobileBert(config).state_dict(), vocabulary.tokens), folder)
    return folder


def test_seeds_and_a_student_from_scratch_are_rows_and_a_table(student: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "cola.jsonl"
    arguments = (student, "--data", data / "cola", "--seeds", "0,1", "--from-scratch", "nano", "--out", out, *FAST)
    printed = works(*arguments)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["start"], r["seed"], r["metric"]) for r in rows if r["phase"] == "final"] == [
        ("small", 0, "matthews"), ("small", 1, "matthews"),
        ("nano, untrained", 0, "matthews"), ("nano, untrained", 1, "matthews"),
    ]  # fmt: skip
    table = out.with_suffix(".md").read_text()
    assert printed.endswith(table)
    assert "cola: 48 training, 16 test examples (dev)" in printed
    assert table.startswith("| start | seeds | matthews | accuracy |")
    mean = (rows[0]["test"]["matthews"] + rows[1]["test"]["matthews"]) / 2
    assert re.search(rf"^\| small \| 2 \| {mean:.4f} \(", table, re.M)
    assert "| always the commonest label | | 0.0000 | 0.5000 |" in table
    assert "| TF-IDF, logistic regression | | 1.0000 | 1.0000 |" in table, "not is said in every sentence of one label"
    before = out.read_bytes()
    assert works(*arguments) == printed
    assert out.read_bytes() == before, "nothing was done twice"


def test_with_fewer_examples_all_of_the_file_is_drawn_from_and_tested_on(student: Path, data: Path) -> None:
    rows = json.loads(works(student, "--data", data / "cola", "--examples", "20", "--json", *FAST))["rows"]
    assert rows[0]["train_examples"] == 20
    assert rows[0]["test_examples"] == 16
    texts = tuple(Example(str(i), "a" if i < 60 else "b") for i in range(90))
    firsts = Dataset("firsts", train=texts, dev=(), test=(), labels=("a", "b"), skipped={})
    assert [e.text for e in firsts.with_fewer(3).train] == ["0", "30", "60"]
    assert firsts.with_fewer(90) is firsts


@pytest.mark.parametrize(
    ("name", "task", "measures"),
    [
        ("stsb", "", {"pearson", "spearman", "mse"}),
        ("snips", "slots", {"f1", "precision", "recall", "accuracy"}),
        ("squad", "", {"f1", "exact", "best_f1", "best_exact", "has_answer_f1", "no_answer_f1"}),
    ],
)
def test_other_kinds_of_tasks_have_their_own_measures(
    student: Path, data: Path, name: str, task: str, measures: set[str]
) -> None:
    # Without a word on seeds too: no device trains these.
    report = json.loads(works(student, "--data", data / name, "--seed", 3, "--task", task, "--json", *FAST))
    assert measures <= set(report["rows"][0]["test"])
    assert [row["phase"] for row in report["rows"]] == ["final", "floor"]
    assert set(report["rows"][1]["test"]) <= set(report["rows"][0]["test"])
    assert report["rows"][0]["seed"] == 3


def test_answers_are_written_for_each_seed_and_again_only_where_they_are_gone(
    student: Path, data: Path, tmp_path: Path
) -> None:
    from pocketfed.model.answers import answer_scores
    from pocketfed.model.task_kinds import read_task

    out, folder = tmp_path / "rows.jsonl", tmp_path / "answers"
    arguments = (student, "--data", data / "squad", "--seeds", "0,1", "--out", out, "--predictions", folder, *FAST)
    works(*arguments)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    files = sorted(folder.glob("*/predictions.json"))
    assert [path.parent.name for path in files] == [f"small-seed{row['seed']}-{row['key'][:8]}" for row in rows]
    asked = read_task(data / "squad").dev
    for row, path in zip(rows, files, strict=True):
        said = json.loads(path.read_text())
        gold = [[text for text, _ in e.answers] for e in asked]
        assert answer_scores([said[e.fields["id"]] for e in asked], gold).items() <= row["test"].items()
    before = {path: path.stat().st_mtime_ns for path in files}
    text, kept = out.read_bytes(), files[0].read_bytes()
    files[0].unlink()
    works(*arguments)
    assert files[0].read_bytes() == kept, "the same trial again"
    assert files[1].stat().st_mtime_ns == before[files[1]]
    assert out.read_bytes() == text, "its row stands there already"


def test_a_search_is_chosen_from_and_a_preset_learns_its_vocabulary_from_the_data(data: Path) -> None:
    search = ("--search", "learning_rate=1e-3,1e-2", "--search", "epochs=1,2", "--at-most", 2)
    report = json.loads(works("nano", "--data", data / "cola", *search, "--metric", "accuracy", "--json", *FAST))
    assert [row["phase"] for row in report["rows"]] == ["search", "search", "final", "floor", "floor"]
    assert {row["metric"] for row in report["rows"][:3]} == {"accuracy"}
    assert report["rows"][0]["start"] == "nano, untrained"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--seeds", "a"), "--seeds 'a' are no whole numbers; give them as 0,1,2"),
        (("--seeds", "1,1"), "the seeds are 1, 1; give each once"),
        (("--search", "depth=3"), "--search 'depth=3' is not SETTING=A,B or paper; the settings are learning_rate, batch_size"),
        (("--search", "epochs=few"), "--search 'epochs=few' holds what is no number; give it as epochs=A,B"),
        (("--search", "epochs=inf"), "--search 'epochs=inf' needs whole numbers; give it as epochs=2,3"),
        (("--seeds", "0,9223372036854775808"), "the seed 9223372036854775808 is not a number from 0 to 2**63 - 1"),
        (("--search", "epochs=1.5"), "--search 'epochs=1.5' needs whole numbers; give it as epochs=2,3"),
        (("--task", "poetry"), "there is no task 'poetry'; choose one of classification"),
        (("--task", "spans"), "holds no questions on passages"),
        (("--metric", "beauty"), "'beauty' is not measured on cola; choose one of accuracy"),
        (("--from-scratch", "nanoo"), "there is no preset 'nanoo'; did you mean 'nano'?"),
        (("--learning-rate", 0, "--seeds", "0"), "learning_rate is 0.0; it must be a positive number"),
        (("--precision", "float16"), "precision is 'float16'; choose one of float32, bfloat16"),
        (("--max-length", 41, "--seeds", "0"), "--max-length 41 is more than the model's 40 positions; give less"),
        (("--out", "rows.md"), "rows.md is where the table would go; name the file of rows rows.jsonl"),
        (("--out", "gone/rows.jsonl"), "the folder of gone/rows.jsonl does not exist; create it, or name another file"),
        (("--predictions", "answers"), "cola is of the kind classification, and answers are written to questions on passages"),
        (("--device", "gpu"), "device is 'gpu'; choose one of cpu, cuda, mps"),
        (("--train", "head", "--seeds", "0"), "--train head is for one run by the device's plan"),
        (("--learning-rate", "1e30", "--seeds", "0", "--epochs", 2), "use a lower learning rate than 1e+30"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence(student: Path, data: Path, options: tuple[object, ...], says: str) -> None:
    code, out, err = pocketfed("evaluate", student, "--data", data / "cola", *options)
    assert (code, out) == (1, "")
    assert err.startswith("pocketfed: ")
    assert err.count("\n") == 1
    assert says in err


def test_a_preset_is_not_compared_with_itself(data: Path) -> None:
    code, out, err = pocketfed("evaluate", "nano", "--data", data / "cola", "--from-scratch", "nano", *FAST)
    assert (code, out) == (1, "")
    assert "--from-scratch nano is what is evaluated already; give another preset or a model" in err


def test_the_name_of_a_preset_is_the_preset_also_beside_a_folder_of_that_name(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nano").mkdir()
    monkeypatch.chdir(tmp_path)
    for more in ((), ("--seeds", "0")):
        assert "| nano, untrained | 1 |" in works("nano", "--data", data / "cola", *more, *FAST)


def test_the_commands_of_the_page_on_tasks_work(
    student: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shlex

    monkeypatch.chdir(tmp_path)
    (tmp_path / "STUDENT").symlink_to(student)
    for name, kind in (("CoLA", "cola"), ("snips", "snips"), ("squad", "squad")):
        (tmp_path / name).symlink_to(data / kind)
    blocks = re.findall(r"```sh\n(.*?)```", DOCUMENT, re.S)
    commands = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    assert len(commands) >= 4
    for command in commands:
        words = shlex.split(command)
        assert words[:2] == ["pocketfed", "evaluate"]
        works(*words[2:], "--epochs", 1, "--max-length", 24)


def test_the_page_and_the_help_name_the_options_that_lead_away_from_the_plan() -> None:
    from pocketfed.cli.evaluate import evaluate

    named = [
        set(re.findall(r"--[a-z-]+", re.split(r"\bWithout\s+any\s+of\b", text)[1].split(" a ")[0]))
        for text in (evaluate.__doc__ or "", DOCUMENT)
    ]
    assert named[0] == named[1]
    assert {"--at-most", "--device", "--predictions", "--out"} < named[0]


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_told_before_anything_is_read(tmp_path: Path, device: str) -> None:
    import torch

    if {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}[device]:
        pytest.skip(f"there is a {device} device here")
    code, out, err = pocketfed("evaluate", "nano", "--data", tmp_path / "nothing", "--device", device)
    assert (code, out) == (1, "")
    assert err == f"pocketfed: there is no {device} device here; leave --device out to train on the CPU\n"


def test_the_page_on_tasks_names_every_task_and_measure() -> None:
    from pocketfed.model.task_kinds import TASKS
    from pocketfed.model.trials import PAPER_SPACE

    for word in (*TASKS, *PAPER_SPACE, "matthews", "macro_f1", "pearson", "spearman", "oos_recall", "best_f1"):
        assert f"`{word}`" in DOCUMENT, word
