"""What a distilled student's folder says of it: whose it is, from what it was made and how, and what it was measured at."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocketfed.model.config import STUDENTS

if TYPE_CHECKING:  # torch takes seconds to import
    from pocketfed.coordinator.distilling import DistillOptions, Material
    from pocketfed.model.distillation import Result, Score

MOST_FILES = 200  # of a corpus, listed one by one
# Licences that Hugging Face's Hub knows by name, of those that models and corpora have; another is called other there.
HUB_LICENCES = frozenset({
    "apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "mpl-2.0", "isc", "unlicense", "gpl-2.0", "gpl-3.0", "lgpl-3.0",
    "agpl-3.0", "cc0-1.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0",
    "cc-by-nd-4.0", "cc-by-nc-nd-4.0", "odc-by", "odbl", "openrail",
})  # fmt: skip


def front_matter(licence: str) -> list[str]:
    """The lines that the Hub reads.

    >>> front_matter("Apache-2.0")[1:3], front_matter("")[1], front_matter("ours: ask")[1:3]
    (['license: apache-2.0', 'library_name: pocketfed'], 'license: unknown', ['license: other', 'license_name: "ours: ask"'])
    """
    known = licence.strip().lower()
    if known in HUB_LICENCES or not known:
        lines = [f"license: {known or 'unknown'}"]
    else:
        lines = ["license: other", f"license_name: {json.dumps(licence.strip())}"]
    return ["---", *lines, "library_name: pocketfed", "tags:", "- mobilebert", "- distillation", "---", ""]


def command_line(
    corpus: Sequence[Path],
    preset: str,
    steps: int | None,
    seed: int,
    overrides: Mapping[str, Any],
    options: DistillOptions,
) -> str:
    """What makes a student again. Of paths only the last part: where they lay concerns nobody else.

    The student's own folder is not named: the same run has the same card wherever it is written to.
    """
    words = ["pocketfed", "distill"]
    for path in corpus:
        words += ["--corpus", _name(path)]
    words += ["--preset", preset, "--out", "student", "--seed", str(seed)]
    words += [] if steps is None else ["--steps", str(steps)]
    for key, value in overrides.items():
        text = value if isinstance(value, str) else _name(value) if isinstance(value, Path) else json.dumps(value)
        words += ["--set", f"{key}={Path(text).name if key == 'vocabulary' else text}"]
    for flag, folder in (("teacher", options.teacher), ("keep-teacher", options.keep_teacher)):
        words += [] if folder is None else [f"--{flag}", _name(folder)]
    words += [] if options.device == "cpu" else ["--device", options.device]
    words += ["--licence", options.licence] if options.licence else []
    return shlex.join(words)


def _name(path: Path) -> str:
    return Path(path).name or Path(path).resolve().name


def _version() -> str:
    try:
        return importlib.metadata.version("pocketfed")
    except importlib.metadata.PackageNotFoundError:  # run from a folder that nobody installed
        return "(version unknown)"


def _files(files: Sequence[Mapping[str, Any]]) -> list[str]:
    listed = [f"{file['sha256']}  {' '.join(file['name'].split())}" for file in files[:MOST_FILES]]
    more = len(files) - len(listed)
    return [
        "Its files, with their sha256:",
        "",
        "```",
        *listed,
        *([f"and {more:,} more"] if more else []),
        "```",
        "",
    ]


def model_card(material: Material, result: Result, report: Mapping[str, Any], command: str) -> str:
    """A student's README.md.

    Args:
        command: as `command_line` gives it.
    """
    from pocketfed.model.distillation import mean_of_last

    corpus = material.corpus
    stages = [
        f"| {stage} | {len(result.losses[stage])} | {loss:.4f} |" for stage, loss in mean_of_last(result.losses).items()
    ]
    parameters, teacher = report["model"]["parameters"], report["teacher_parameters"]
    if material.schedule.strategy == "none":
        made = "Pre-trained by pocketfed without a teacher"
    elif material.teacher.use_bottleneck:
        made = f"Distilled by pocketfed from an inverted-bottleneck teacher ({teacher:,} parameters)"
    else:
        made = (
            f"Distilled by pocketfed from a BERT, {Path(str(material.options.teacher)).name} ({teacher:,} parameters)"
        )
    kind = "MobileBERT student " if material.preset in STUDENTS else ""
    processes = f", in {material.place.ranks} processes" if material.place.ranks > 1 else ""
    return "\n".join(
        [
            *front_matter(material.options.licence),
            f"# {kind}`{material.preset}`",
            "",
            f"{made}: {parameters:,} parameters, seed {result.seed}. Task-agnostic: it has no classifier yet.",
            "",
            f"Licence: {material.options.licence or 'not stated'}.",
            "",
            f"Corpus: {corpus['documents']:,} documents, {corpus['tokens']:,} tokens, sha256 `{corpus['sha256']}`. "
            f"Vocabulary: {len(material.vocabulary):,} WordPiece tokens, sha256 `{material.vocabulary.digest()}`.",
            "",
            *_files(corpus["files"]),
            f"Made by pocketfed {_version()}{processes}:",
            "",
            "```sh",
            command,
            "```",
            "",
            *_score_table(result.scores, result.schedule.most_hidden),
            "",
            "| stage | steps | loss, mean of the last tenth |",
            "|---|---|---|",
            *stages,
            "",
            *(line for change in result.changes for line in (f"Stopped and gone on with: {change}.", "")),
            *_as_json("Student", material.student.to_dict()),
            *([] if material.schedule.strategy == "none" else _as_json("Teacher", material.teacher.to_dict())),
            *_as_json("Schedule", dataclasses.asdict(result.schedule)),
        ]
    )


def _score_table(scores: Mapping[str, Score], most_hidden: int) -> list[str]:
    from pocketfed.model.pretraining import FeatureScore, MaskedScore

    near = {who: score for who, score in scores.items() if isinstance(score, FeatureScore)}
    if near:
        return [
            "Beside its teacher, on held-out text: the cosine of their vectors of a text, and the share of the variance of the "
            "teacher's last features that the student's explain:",
            "",
            "| model | cosine | explained | texts |",
            "|---|---|---|---|",
            *(f"| {who} | {score.cosine:.3f} | {score.explained:.3f} | {score.texts} |" for who, score in near.items()),
        ]
    rows = []
    for who, score in scores.items():
        if isinstance(score, MaskedScore):
            pairs = "" if score.next_sentence is None else f"{score.next_sentence:.3f}"
            rows.append(f"| {who} | {score.loss:.3f} | {score.accuracy:.3f} | {score.tokens} | {pairs} |")
    share = f"15 %, at most {most_hidden} a text" if most_hidden else "15 %"
    return [
        f"Guessing hidden tokens ({share}) of held-out text, which neither teacher nor student was trained on (the "
        "vocabulary has seen it), and telling next sentences from others:",
        "",
        "| model | loss (nats) | accuracy | hidden tokens | next sentence |",
        "|---|---|---|---|---|",
        *rows,
    ]


def _as_json(title: str, content: Mapping[str, Any]) -> list[str]:
    return [f"{title}:", "", "```json", json.dumps(content, indent=2), "```", ""]
