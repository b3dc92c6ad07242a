"""What a distillation is given, read once: by a run that goes on, by all processes of one, and after a dry run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pocketfed.coordinator.distilling import DistillOptions, distill, plan_distillation
from pocketfed.coordinator.distilling_inputs import TEXT, VOCABULARY, encoded_text, trained_vocabulary
from pocketfed.model.checkpoints import load
from pocketfed.model.distillation import CHECKPOINT, Distillation
from pocketfed.model.places import Place
from pocketfed.model.planning import plan
from pocketfed.model.stages import MaskedWords, Terms
from pocketfed.model.teacher import PreTrainingModel

LINES = [f"the {a} sleeps {b} {c}" for a in ("cat", "dog", "owl") for b in "abcde" for c in "fghij"]
SIZES: dict[str, Any] = {"hidden_size": 32, "embedding_size": 16, "teacher.intermediate_size": 64}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(LINES))
    return path


def replaced(path: Path, old: str, new: str) -> None:
    """Other text of the same length, with the same time of change: only reading it would tell."""
    before = path.stat()
    path.write_text(path.read_text().replace(old, new))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_files_that_have_not_changed_are_not_read_again_and_others_are(text: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    words = trained_vocabulary([text], 60, work)
    tokens, what = encoded_text([text], words, work, 16)
    replaced(text, "owl", "elk")
    assert trained_vocabulary([text], 60, work) == words
    again, same = encoded_text([text], words, work, 16)
    assert (again.tokens, same) == (tokens.tokens, what)
    os.utime(text)
    assert trained_vocabulary([text], 60, work) != words
    assert encoded_text([text], words, work, 16)[1]["sha256"] != what["sha256"]
    assert len(trained_vocabulary([text], 30, work)) <= 30 < len(trained_vocabulary([text], 60, work))
    assert encoded_text([text], words, work, 12)[0].max_length == 12


@pytest.mark.parametrize("name", [VOCABULARY, TEXT])
@pytest.mark.parametrize("content", ["", "[]", '{"files": 3}'])
def test_a_damaged_note_of_what_was_read_is_written_anew(text: Path, tmp_path: Path, name: str, content: str) -> None:
    work = tmp_path / "work"
    before = encoded_text([text], trained_vocabulary([text], 60, work), work, 16)[1]
    whole = json.loads((work / name).read_text())
    (work / name).write_text(content)
    assert encoded_text([text], trained_vocabulary([text], 60, work), work, 16)[1] == before
    assert json.loads((work / name).read_text()) == whole


def test_a_dry_run_leaves_its_text_to_the_run_that_follows(text: Path, tmp_path: Path) -> None:
    out, work = tmp_path / "student", tmp_path / "student.work"
    costs = plan_distillation([text], "nano", out, 10, overrides=SIZES)
    assert [cost["steps"] for cost in costs] == [4, 3, 3]
    held = json.loads((work / TEXT).read_text())
    replaced(text, "owl", "elk")
    report = distill([text], "nano", out, 10, overrides=SIZES)
    assert report["corpus"]["sha256"] == held["text"]  # of the text as the dry run read it
    assert "owl" in load(out).vocabulary
    assert not work.exists()


def run_of(text: Path, tmp_path: Path, place: Place | None = None, **schedule: Any) -> Distillation:
    from pocketfed.coordinator.distilling import prepare_distillation

    changes = SIZES | {f"schedule.{name}": value for name, value in schedule.items()}
    material = prepare_distillation([text], "nano", tmp_path / "work", 10, 0, changes, DistillOptions(), place)
    return material.start(None, None)


class Watched(MaskedWords):
    """Notes how many texts it sees, and has memory for some only."""

    seen: list[int]
    most: int

    def terms(self, batch: Any, step: int) -> Terms:
        self.seen.append(len(batch.input_ids))
        if len(batch.input_ids) > self.most:
            raise torch.OutOfMemoryError("the device is full")
        return super().terms(batch, step)


def watched(run: Distillation, most: int = 1000) -> Watched:
    assert isinstance(run.teacher, PreTrainingModel)
    stage = Watched(run.teacher, "teacher", 1, 4, 1e-3, 0.1)
    stage.seen, stage.most = [], most
    run.stages = [stage]
    return stage


@pytest.mark.parametrize(("ranks", "accumulate", "texts"), [(1, 1, 16), (1, 4, 4), (2, 1, 8), (2, 4, 2)])
def test_a_plan_measures_what_a_process_has_at_once_in_training(
    text: Path, tmp_path: Path, ranks: int, accumulate: int, texts: int
) -> None:
    run = run_of(text, tmp_path, Place(ranks=1), batch_size=16, accumulate=accumulate)
    shared = Distillation(
        run.student.config,
        run.teacher.config,
        run.batches.corpus,
        run.batches.vocabulary,
        run.schedule,
        0,
        place=Place(ranks=ranks),
    )
    stage = watched(shared)
    before = {name: value.clone() for name, value in shared.teacher.state_dict().items()}
    (cost,) = plan(shared)
    assert set(stage.seen) <= {2, 4, 8, 16}
    assert (cost.texts, stage.seen[-1], cost.note) == (texts, texts, "")
    assert all(torch.equal(value, before[name]) for name, value in shared.teacher.state_dict().items())


def test_a_plan_says_what_does_not_fit_into_memory(text: Path, tmp_path: Path) -> None:
    run = run_of(text, tmp_path, batch_size=64)
    stage = watched(run, most=20)
    (cost,) = plan(run)
    assert stage.seen == [4, 4, 16, 64, 16, 16, 16]
    assert (cost.texts, cost.hours > 0) == (16, True)
    assert cost.note == "64 texts at once do not fit into memory, 16 do: raise schedule.accumulate"


def command(text: Path, out: Path, *more: str) -> list[str]:
    settings = [part for key, value in SIZES.items() for part in ("--set", f"{key}={value}")]
    return ["-m", "pocketfed.cli", "distill", "--corpus", str(text), "--out", str(out), *settings, *more]


# Says how often the text is read: a process that takes what another left does not.
COUNTED = """
import sys
from pocketfed.cli.main import main
from pocketfed.model import corpus
read = corpus.read_documents
def told(paths):
    print("read", file=sys.stderr)
    return read(paths)
corpus.read_documents = told
main()
"""


@pytest.mark.slow
def test_two_processes_share_a_last_batch_of_one_text_in_two_parts_each_and_read_the_text_once(
    text: Path, tmp_path: Path
) -> None:
    """75 lines, 4 of them held out: 71 texts in batches of 10 leave one over."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    script = tmp_path / "counted.py"
    script.write_text(COUNTED)
    together = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    more = ["--steps", "30", "--json", "--set", "schedule.batch_size=10", "--set", "schedule.accumulate=2"]
    shared = subprocess.run(
        [*together, *command(text, tmp_path / "two", *more)[2:]], env=environment, capture_output=True, text=True
    )
    assert shared.returncode == 0, shared.stderr
    assert shared.stderr.count("read\n") == 2  # for the vocabulary, and to encode it
    assert "destroy_process_group" not in shared.stderr
    alone = subprocess.run(
        [sys.executable, *command(text, tmp_path / "one", *more)], env=environment, capture_output=True, text=True
    )
    assert alone.returncode == 0, alone.stderr
    two, one = json.loads(shared.stdout), json.loads(alone.stdout)
    for stage, loss in one["losses"].items():
        assert two["losses"][stage] == pytest.approx(loss, rel=1e-3), stage
    assert not (tmp_path / "two.work" / CHECKPOINT).exists()
