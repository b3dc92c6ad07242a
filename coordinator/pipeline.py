"""From text to a model that can be published: distill, quantize, inspect."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocketfed.model.config import STUDENTS, TEACHERS, ConfigError, MobileBertConfig
from pocketfed.model.config import preset as student_of

if TYPE_CHECKING:  # torch takes seconds to import, and a caller may only want to be told of a mistake
    from pocketfed.model.distillation import Result, Schedule
    from pocketfed.model.tokenization import Vocabulary

Progress = Callable[[str, int, int, float], None]  # stage, step done, steps in all, loss
SHARED_WITH_TEACHER = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "embedding_size",
    "trigram_input",
    "max_position_embeddings",
    "type_vocab_size",
    "initializer_range",
)
INSPECTED_TOKENS = 128  # the length at which the paper counts


def distill(
    corpus: Sequence[Path],
    preset: str,
    out: Path,
    steps: int | None = None,
    seed: int = 0,
    overrides: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Distill a student from text and write it, with its model card, as a model folder.

    Args:
        preset: one of `config.STUDENTS`. steps: in all, split as the preset's schedule is; None for the preset's own.
        overrides: `KEY` of the student's config (shared sizes reach the teacher), `teacher.KEY`, `schedule.KEY`, and
            `vocabulary`, a `vocab.txt` or `tokenizer.json`; without one, a vocabulary is trained on the corpus.

    Returns what was done: folder, scores, losses, sizes, seconds a stage.

    Raises:
        ConfigError, CorpusError, VocabularyError, DistillationError, CheckpointError: one sentence each; nothing is
            written unless everything went well.
    """
    student_changes, teacher_changes, schedule_changes, vocabulary_path = _sorted_overrides(overrides or {})
    config = student_of(preset).with_changes(**student_changes)
    from pocketfed.model import checkpoints, distillation, pretraining, tokenization

    schedule = distillation.schedule_for(preset)
    schedule = _changed_schedule(schedule, schedule_changes, steps, config.num_hidden_layers)
    checkpoints.check_writable(out)  # better now than after the training
    lines = pretraining.read_corpus([Path(path) for path in corpus])
    vocabulary = (
        tokenization.train_vocabulary(lines, config.vocab_size)
        if vocabulary_path is None
        else tokenization.load_vocabulary(vocabulary_path)
    )
    config = config.with_changes(vocab_size=len(vocabulary), pad_token_id=vocabulary.pad_id)
    shared = {name: getattr(config, name) for name in (*SHARED_WITH_TEACHER, "pad_token_id")}
    teacher = TEACHERS[preset].with_changes(**(shared | teacher_changes))
    tokens = pretraining.encode_corpus(tokenization.Tokenizer(vocabulary), lines, config.max_position_embeddings)
    result = distillation.distill(
        config, teacher, tokens, vocabulary, schedule, seed, progress or distillation.no_progress
    )
    read = {"lines": len(lines), "tokens": len(tokens.tokens), "sha256": pretraining.corpus_digest(lines)}
    report: dict[str, Any] = {
        "folder": str(out),
        "preset": preset,
        "seed": seed,
        "corpus": read,
        "schedule": dataclasses.asdict(schedule),
        "scores": {name: dataclasses.asdict(score) for name, score in result.scores.items()},
        "losses": distillation.mean_of_last(result.losses),
        "teacher_parameters": _parameters(teacher),
        "model": _sizes(config),
    }
    card = _model_card(preset, config, teacher, result, vocabulary, read)
    checkpoint = checkpoints.Checkpoint(config, result.student, vocabulary.tokens, lower_case=vocabulary.lower_case)
    checkpoints.save(checkpoint, out, card)
    return report


def quantize(model_dir: Path, out: Path, scheme: str = "int8") -> dict[str, Any]:
    """Store a model's matrices as int8, one scale an output channel.

    Returns the weight file's bytes before and after, and the largest and mean error of each quantized tensor.

    Raises:
        CheckpointError: no usable model there, no room for the new one, or an unknown scheme.
    """
    from pocketfed.model import checkpoints
    from pocketfed.model.quantization import quantize_state

    if scheme != "int8":
        raise checkpoints.CheckpointError(f"there is no quantization scheme {scheme!r}; choose int8")
    checkpoint = checkpoints.load(model_dir)
    _, errors = quantize_state(checkpoint.state)
    card = Path(model_dir) / checkpoints.CARD
    text = card.read_text(encoding="utf-8") if card.is_file() else None
    before = (Path(model_dir) / checkpoints.WEIGHTS).stat().st_size
    checkpoints.save(dataclasses.replace(checkpoint, quantization=scheme), out, text)
    after = (Path(out) / checkpoints.WEIGHTS).stat().st_size
    return {
        "folder": str(out),
        "scheme": scheme,
        "bytes_before": before,
        "bytes_after": after,
        "ratio": before / after,
        "largest_error": max((error.largest for error in errors.values()), default=0.0),
        "mean_error": sum(error.mean for error in errors.values()) / max(1, len(errors)),
        "errors": {name: dataclasses.asdict(error) for name, error in errors.items()},
    }


def inspect(name_or_dir: str | Path) -> dict[str, Any]:
    """Parameters, FLOPs (2 a multiply-add, 128 tokens) and bytes of a preset or a model folder, without its weights.

    Raises:
        ConfigError: neither a preset nor a folder. CheckpointError: a folder that holds no usable model.
    """
    if str(name_or_dir) in STUDENTS:
        return {"name": str(name_or_dir), "quantization": None, "labels": None, **_sizes(student_of(str(name_or_dir)))}
    if not Path(name_or_dir).is_dir():
        try:
            student_of(str(name_or_dir))
        except ConfigError as error:
            raise ConfigError(f"{error}; nor is there a folder of that name") from None
    from pocketfed.model import checkpoints

    checkpoint = checkpoints.load(Path(name_or_dir))
    return {
        "name": str(name_or_dir),
        "quantization": checkpoint.quantization,
        "labels": list(checkpoint.labels) if checkpoint.labels else None,
        "bytes_on_disk": sum(p.stat().st_size for p in Path(name_or_dir).iterdir() if p.is_file()),
        **_sizes(checkpoint.config),
    }


def size_table() -> list[dict[str, Any]]:
    """The paper's models, its figures beside those counted here (`model.published`)."""
    from pocketfed.model.published import PUBLISHED

    return [
        {
            "name": row.name,
            "parameters": row.parameters,
            "paper_parameters": None if row.millions is None else round(row.millions * 1e6),
            "flops": row.flops,
            "paper_flops": None if row.billions is None else round(row.billions * 1e9),
            "note": row.note,
        }
        for row in PUBLISHED
    ]


def _sizes(config: MobileBertConfig) -> dict[str, Any]:
    from pocketfed.model.checkpoints import stored_sizes
    from pocketfed.model.mobilebert import count_flops

    return {
        "parameters": _parameters(config),
        "flops": count_flops(config, INSPECTED_TOKENS),
        "tokens": INSPECTED_TOKENS,
        "bytes": stored_sizes(config),
        "config": config.to_dict(),
    }


def _parameters(config: MobileBertConfig) -> int:
    from pocketfed.model.mobilebert import count_parameters

    return count_parameters(config)


def _sorted_overrides(
    overrides: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], Path | None]:
    """Overrides by what they change: student, teacher, schedule, vocabulary. Texts are read as JSON where they are."""
    known = {f.name for f in dataclasses.fields(MobileBertConfig)}
    student: dict[str, Any] = {}
    teacher: dict[str, Any] = {}
    schedule: dict[str, Any] = {}
    vocabulary: Path | None = None
    for key, value in overrides.items():
        part, _, name = key.rpartition(".")
        if key == "vocabulary":
            vocabulary = Path(str(value))
        elif part == "schedule":
            schedule[name] = _value(value)
        elif part in ("", "teacher") and name in known:
            (teacher if part else student)[name] = _value(value)
        else:
            raise ConfigError(f"there is no setting {key!r}; set KEY, teacher.KEY, schedule.KEY or vocabulary")
    return student, teacher, schedule, vocabulary


def _value(text: Any) -> Any:
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def _changed_schedule(schedule: Schedule, changes: Mapping[str, Any], steps: int | None, layers: int) -> Schedule:
    known = [f.name for f in dataclasses.fields(schedule)]
    unknown = next((name for name in changes if name not in known), None)
    if unknown is not None:
        raise ConfigError(f"there is no setting 'schedule.{unknown}'; there are {', '.join(known)}")
    changed = dataclasses.replace(schedule, **changes)
    return changed if steps is None else changed.scaled(steps, layers)


def _model_card(
    name: str,
    config: MobileBertConfig,
    teacher: MobileBertConfig,
    result: Result,
    vocabulary: Vocabulary,
    corpus: Mapping[str, Any],
) -> str:
    from pocketfed.model.distillation import mean_of_last

    scores = [
        f"| {who} | {score.loss:.3f} | {score.accuracy:.3f} | {score.tokens} |" for who, score in result.scores.items()
    ]
    stages = [
        f"| {stage} | {len(result.losses[stage])} | {loss:.4f} |" for stage, loss in mean_of_last(result.losses).items()
    ]
    return "\n".join(
        [
            f"# MobileBERT student `{name}`",
            "",
            f"Distilled by pocketfed from an inverted-bottleneck teacher ({_parameters(teacher):,} parameters) into "
            f"{_parameters(config):,} parameters, with seed {result.seed}. Task-agnostic: it has no classifier yet.",
            "",
            f"Corpus: {corpus['lines']:,} distinct lines, {corpus['tokens']:,} tokens, sha256 `{corpus['sha256']}`. "
            f"Vocabulary: {len(vocabulary):,} WordPiece tokens, sha256 `{vocabulary.digest()}`.",
            "",
            "Guessing hidden tokens (15 %) of held-out lines, which neither teacher nor student was trained on; the "
            "vocabulary has seen them:",
            "",
            "| model | loss (nats) | accuracy | hidden tokens |",
            "|---|---|---|---|",
            *scores,
            "",
            "| stage | steps | loss, mean of the last tenth |",
            "|---|---|---|",
            *stages,
            "",
            "Student:",
            "",
            "```json",
            json.dumps(config.to_dict(), indent=2),
            "```",
            "",
            "Teacher:",
            "",
            "```json",
            json.dumps(teacher.to_dict(), indent=2),
            "```",
            "",
            "Schedule:",
            "",
            "```json",
            json.dumps(dataclasses.asdict(result.schedule), indent=2),
            "```",
            "",
        ]
    )
