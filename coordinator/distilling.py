"""From text to a student that can be published: settings, material, the run, its model card."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pocketfed.coordinator import model_card, pipeline
from pocketfed.model.config import BASELINES, SHARED_WITH_TEACHER, TEACHERS, ConfigError, MobileBertConfig, any_preset

if TYPE_CHECKING:  # torch takes seconds to import, and a caller may only want to be told of a mistake
    from pocketfed.model.distillation import Distillation, Place, Result, Tick
    from pocketfed.model.schedules import Schedule
    from pocketfed.model.token_store import TokenCorpus
    from pocketfed.model.tokenization import Vocabulary

Progress = Callable[["Tick"], None]
# What a student's settings say of its teacher too.
REACHES_TEACHER = (*SHARED_WITH_TEACHER, "num_hidden_layers", "initializer_range", "pad_token_id")


@dataclasses.dataclass(frozen=True)
class DistillOptions:
    """What does not change what is learnt, but `teacher`: where from, where, and what is kept.

    teacher: a folder made by `keep_teacher`, or a plain BERT's in Hugging Face's format; without it a teacher is trained
    first. keep_teacher: a folder for it.
    keep_heads: a folder for the student with its pre-training heads, a third more weights that no task needs.
    device: "cpu" or "cuda". licence: a line for the model card. tensorboard: a folder for event files.
    """

    teacher: Path | None = None
    keep_teacher: Path | None = None
    device: str = "cpu"
    licence: str = ""
    tensorboard: Path | None = None
    save_every_s: float = 60.0  # between checkpoints
    keep_heads: Path | None = None


def distill(
    corpus: Sequence[Path],
    preset: str,
    out: Path,
    steps: int | None = None,
    seed: int = 0,
    overrides: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    options: DistillOptions | None = None,
) -> dict[str, Any]:
    """Distill a student from text and write it, with its model card, as a model folder.

    What is needed to go on after a crash lies in a folder beside `out` named `OUT.work` until the student is written: the
    same call goes on from there.

    Args:
        preset: one of `config.STUDENTS` or `config.BASELINES`. steps: in all, split as the preset's schedule is; None for the preset's own.
        overrides: `KEY` of the student's config (shared sizes reach the teacher), `teacher.KEY`, `schedule.KEY`, and
            `vocabulary`, a `vocab.txt` or `tokenizer.json`; without one, a vocabulary is trained on the corpus.

    Returns what was done: folder, scores, losses, sizes, seconds.

    Raises:
        ConfigError, CorpusError, VocabularyError, DistillationError, CheckpointError: one sentence each; nothing is
            written to `out` unless everything went well.
    """
    from pocketfed.model import checkpoints, distillation, teacher
    from pocketfed.model.training_log import training_log

    options = options or DistillOptions()
    written = [Path(p) for p in (out, options.keep_teacher, options.keep_heads) if p is not None]
    places = Counter(Path(p).resolve() for p in (*written, options.teacher) if p is not None)
    twice = next((p for p in written if places[p.resolve()] > 1), None)
    if twice is not None:
        raise ConfigError(f"{twice} is named for two models, and one would replace the other; name another folder")
    for folder in written:
        checkpoints.check_writable(folder)  # better now than after the training
    try:
        material = prepare_distillation(corpus, preset, _work_folder(out), steps, seed, overrides, options)
        with training_log(options.tensorboard) as log:
            run = material.start(_work_folder(out), _both(progress, log))
            result = run.run()
    except BaseException:
        if not (_work_folder(out) / distillation.CHECKPOINT).exists():  # nothing to go on from
            shutil.rmtree(_work_folder(out), ignore_errors=True)
        raise
    report = material.report(out, result)
    if not run.place.first:
        return report
    if options.keep_teacher is not None:
        teacher.save_pretrained(run.teacher, material.vocabulary, options.keep_teacher)
    if options.keep_heads is not None:
        teacher.save_pretrained(run.student, material.vocabulary, options.keep_heads)
    command = model_card.command_line(corpus, preset, steps, seed, overrides or {}, options)
    card = model_card.model_card(material, result, report, command)
    words = material.vocabulary
    checkpoint = checkpoints.Checkpoint(material.student, result.student, words.tokens, lower_case=words.lower_case)
    checkpoints.save(checkpoint, out, card)
    shutil.rmtree(_work_folder(out), ignore_errors=True)
    report["losses"] = distillation.mean_of_last(result.losses)
    return report


def plan_distillation(
    corpus: Sequence[Path],
    preset: str,
    out: Path,
    steps: int | None = None,
    seed: int = 0,
    overrides: Mapping[str, Any] | None = None,
    options: DistillOptions | None = None,
) -> list[dict[str, Any]]:
    """What `distill` would do with the same arguments: steps, tokens, FLOPs and hours of each stage. Trains nothing.

    Raises:
        As `distill`.
    """
    from pocketfed.model.planning import plan

    options = options or DistillOptions()
    with tempfile.TemporaryDirectory(prefix="pocketfed-plan-") as folder:
        material = prepare_distillation(corpus, preset, Path(folder), steps, seed, overrides, options)
        return [dataclasses.asdict(cost) for cost in plan(material.start(None, None))]


@dataclasses.dataclass(frozen=True)
class Material:
    """Everything a distillation starts from."""

    preset: str
    student: MobileBertConfig
    teacher: MobileBertConfig
    schedule: Schedule
    seed: int
    vocabulary: Vocabulary
    tokens: TokenCorpus
    corpus: Mapping[str, Any]  # digests, counts, and its files
    teacher_weights: Mapping[str, Any] | None
    options: DistillOptions
    place: Place

    def start(self, folder: Path | None, progress: Progress | None) -> Distillation:
        from pocketfed.model import distillation

        return distillation.Distillation(
            self.student,
            self.teacher,
            self.tokens,
            self.vocabulary,
            self.schedule,
            self.seed,
            teacher=self.teacher_weights,
            folder=folder,
            place=self.place,
            progress=progress or distillation.no_progress,
            save_every_s=self.options.save_every_s,
        )

    def report(self, out: Path, result: Result) -> dict[str, Any]:
        return {
            "folder": str(out),
            "preset": self.preset,
            "rank": self.place.rank,
            "seed": self.seed,
            "corpus": dict(self.corpus),
            "schedule": dataclasses.asdict(self.schedule),
            "scores": {name: dataclasses.asdict(score) for name, score in result.scores.items()},
            "teacher_parameters": pipeline.count(self.teacher),
            "seconds": result.seconds,
            "model": pipeline.sizes(self.student),
        }


def prepare_distillation(
    corpus: Sequence[Path],
    preset: str,
    work: Path,
    steps: int | None,
    seed: int,
    overrides: Mapping[str, Any] | None,
    options: DistillOptions,
) -> Material:
    """Read settings, vocabulary and text; the encoded text lies in `work` and is used again if it is there."""
    student_changes, teacher_changes, schedule_changes, vocabulary_path = _sorted_overrides(overrides or {})
    config = any_preset(preset).with_changes(**student_changes)
    from pocketfed.model import corpus as text
    from pocketfed.model import distillation, schedules, stages, teacher, token_store, tokenization

    schedule = schedules.schedule_for(preset)
    taught_first = options.teacher is None and schedule_changes.get("strategy", schedule.strategy) != "none"
    schedule = _changed_schedule(schedule, schedule_changes, steps, config.num_hidden_layers, taught_first)
    paths = [Path(path) for path in corpus]
    weights, given = None, None
    if options.teacher is not None:
        if teacher_changes:
            key = next(iter(teacher_changes))
            raise ConfigError(
                f"teacher.{key} is set and the teacher is given; a trained teacher is what it is, so leave one out"
            )
        trained, given = teacher.load_teacher(options.teacher)
        weights, teacher_changes = trained.state_dict(), trained.config.to_dict()
    if vocabulary_path is not None:
        vocabulary = tokenization.load_vocabulary(vocabulary_path)
        if given is not None and vocabulary != given:
            raise ConfigError(
                f"{vocabulary_path} is not the vocabulary of {options.teacher}, whose teacher would read other words; leave it out"
            )
    elif given is not None:
        vocabulary = given
    else:
        sentences = (sentence for document in text.read_documents(paths) for sentence in document)
        vocabulary = tokenization.train_vocabulary(sentences, config.vocab_size)
    config = config.with_changes(vocab_size=len(vocabulary), pad_token_id=vocabulary.pad_id)
    shared = {name: getattr(config, name) for name in REACHES_TEACHER}
    taught = TEACHERS.get(preset, config).with_changes(**(shared | teacher_changes))
    if preset in BASELINES and schedule.strategy != "none":
        raise ConfigError(
            f"{preset} is pre-trained without a teacher, and schedule.strategy is {schedule.strategy!r}; leave it out"
        )
    stages.check_pair(config, taught, schedule.attention)  # before hours are spent on encoding the text
    if options.keep_teacher is not None and options.teacher is None and schedule.strategy == "none":
        raise ConfigError(
            f"schedule.strategy=none trains no teacher, so there is none to keep in {options.keep_teacher}; leave one out"
        )
    length = schedule.max_length or config.max_position_embeddings
    if length > config.max_position_embeddings:
        raise ConfigError(
            f"schedule.max_length is {length} and the student has {config.max_position_embeddings} positions; shorten it, or "
            "set max_position_embeddings too"
        )
    if schedule.strategy != "none":
        stages.check_reading(taught, length, schedule.pairs)
    place = distillation.Place.here(options.device)
    tokens, read = place.in_turn(lambda: _encoded(paths, vocabulary, work / "corpus", length, token_store))
    return Material(preset, config, taught, schedule, seed, vocabulary, tokens, read, weights, options, place)


def _encoded(
    paths: Sequence[Path], vocabulary: Vocabulary, folder: Path, length: int, store: ModuleType
) -> tuple[TokenCorpus, dict[str, Any]]:
    """The text as tokens, encoded into `folder` unless it lies there; and what it is."""
    from pocketfed.model.corpus import corpus_digest, describe_files, read_documents
    from pocketfed.model.tokenization import Tokenizer

    held = store.read_index(folder)
    if (
        held.get("vocabulary") == vocabulary.digest()
        and held.get("max_length") == length
        and held.get("text") == corpus_digest(read_documents(paths))
    ):
        tokens = store.open_corpus(folder, vocabulary)
    else:
        tokens = store.store_corpus(read_documents(paths), Tokenizer(vocabulary), folder, length)
        held = store.read_index(folder)
    read = {"documents": held["documents"], "tokens": tokens.tokens, "sha256": held["text"]}
    return tokens, {**read, "files": describe_files(paths)}


def _work_folder(out: Path) -> Path:
    return Path(out).with_name(Path(out).name + ".work")


def _both(first: Progress | None, second: Progress | None) -> Progress | None:
    def tell(tick: Tick) -> None:
        for one in (first, second):
            if one is not None:
                one(tick)

    return tell


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


def _changed_schedule(
    schedule: Schedule, changes: Mapping[str, Any], steps: int | None, layers: int, taught_first: bool
) -> Schedule:
    known = [f.name for f in dataclasses.fields(schedule)]
    unknown = next((name for name in changes if name not in known), None)
    if unknown is not None:
        raise ConfigError(f"there is no setting 'schedule.{unknown}'; there are {', '.join(known)}")
    changed = dataclasses.replace(schedule, **changes)
    return changed if steps is None else changed.scaled(steps, layers, taught_first)
