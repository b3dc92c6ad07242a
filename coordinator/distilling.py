"""From text to a student that can be published: settings, material, the run, its model card."""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocketfed.coordinator import distilling_inputs as inputs
from pocketfed.coordinator import model_card, pipeline
from pocketfed.model.config import BASELINES, SHARED_WITH_TEACHER, TEACHERS, ConfigError, MobileBertConfig

if TYPE_CHECKING:  # torch takes seconds to import, and a caller may only want to be told of a mistake
    from pocketfed.model.distillation import Distillation, Result, Tick
    from pocketfed.model.places import Place
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
    from pocketfed.model import checkpoints, distillation, places, teacher
    from pocketfed.model.training_log import training_log

    options = options or DistillOptions()
    written = [Path(p) for p in (out, options.keep_teacher, options.keep_heads) if p is not None]
    named = Counter(Path(p).resolve() for p in (*written, options.teacher) if p is not None)
    twice = next((p for p in written if named[p.resolve()] > 1), None)
    if twice is not None:
        raise ConfigError(f"{twice} is named for two models, and one would replace the other; name another folder")
    for folder in written:
        checkpoints.check_writable(folder)  # better now than after the training
    place = places.Place.here(options.device)
    with _working_in(_work_folder(out), place) as work:
        material = prepare_distillation(corpus, preset, work, steps, seed, overrides, options, place)
        with training_log(options.tensorboard if place.first else None) as log:
            run = material.start(work, _both(progress, log))
            result = run.run()
    report = material.report(out, result)
    if not place.first:
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

    Vocabulary and encoded text stay in the folder `OUT.work`, where `distill` looks for them. Of the processes of torchrun
    the first one alone gets an answer.

    Raises:
        As `distill`.
    """
    from pocketfed.model import places
    from pocketfed.model.planning import plan

    options = options or DistillOptions()
    place = places.Place.here(options.device)
    with _working_in(_work_folder(out), place) as work:
        material = prepare_distillation(corpus, preset, work, steps, seed, overrides, options, place)
        costs = plan(material.start(None, None))
    return [dataclasses.asdict(cost) for cost in costs] if place.first else []


@contextmanager
def _working_in(work: Path, place: Place) -> Iterator[Path]:
    """The work folder; where something goes wrong it is kept if there is a checkpoint to go on from."""
    from pocketfed.model.distillation import CHECKPOINT

    try:
        yield work
    except BaseException:
        if place.first and not (work / CHECKPOINT).exists():
            shutil.rmtree(work, ignore_errors=True)
        raise
    finally:
        place.leave()


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
    place: Place | None = None,
) -> Material:
    """Read settings, teacher, vocabulary and text; the last two lie in `work` and are used again if they are there."""
    from pocketfed.model import places, teacher

    settings = inputs.read_settings(preset, overrides or {}, steps, options.teacher)
    place = place or places.Place.here(options.device)
    paths = [Path(path) for path in corpus]
    trained, given = (None, None) if options.teacher is None else teacher.load_teacher(options.teacher)
    if settings.vocabulary is not None:
        vocabulary = inputs.named_vocabulary(settings.vocabulary, given, options.teacher)
    else:
        size = settings.student.vocab_size
        vocabulary = given or place.in_turn(lambda: inputs.trained_vocabulary(paths, size, work))
    student = settings.student.with_changes(vocab_size=len(vocabulary), pad_token_id=vocabulary.pad_id)
    if trained is None:
        shared = {name: getattr(student, name) for name in REACHES_TEACHER}
        taught = TEACHERS.get(preset, student).with_changes(**(shared | dict(settings.teacher)))
    else:
        taught = trained.config
    if preset in BASELINES and settings.schedule.strategy != "none":
        raise ConfigError(
            f"{preset} is pre-trained without a teacher, and schedule.strategy is {settings.schedule.strategy!r}; leave it out"
        )
    length = _checked_length(student, taught, settings.schedule, options)
    tokens, read = place.in_turn(lambda: inputs.encoded_text(paths, vocabulary, work, length))
    weights = None if trained is None else trained.state_dict()
    return Material(preset, student, taught, settings.schedule, seed, vocabulary, tokens, read, weights, options, place)


def _checked_length(
    student: MobileBertConfig, teacher: MobileBertConfig, schedule: Schedule, options: DistillOptions
) -> int:
    """The tokens of a text. What does not fit is refused here, before hours are spent on encoding the text."""
    from pocketfed.model import stages
    from pocketfed.model.schedules import LEAST_LENGTH

    stages.check_pair(student, teacher, schedule.attention)
    if options.keep_teacher is not None and options.teacher is None and schedule.strategy == "none":
        raise ConfigError(
            f"schedule.strategy=none trains no teacher, so there is none to keep in {options.keep_teacher}; leave one out"
        )
    length, most = schedule.max_length or student.max_position_embeddings, student.max_position_embeddings
    if length > most:
        raise ConfigError(
            f"schedule.max_length is {length} and the student has {most} positions; shorten it, or "
            "set max_position_embeddings too"
        )
    if length < LEAST_LENGTH:
        raise ConfigError(
            f"max_position_embeddings is {length} and texts of so few tokens teach nothing; set at least {LEAST_LENGTH}"
        )
    if schedule.strategy != "none":
        stages.check_reading(teacher, length, schedule.pairs)
    return length


def _work_folder(out: Path) -> Path:
    return Path(out).with_name(Path(out).name + ".work")


def _both(first: Progress | None, second: Progress | None) -> Progress | None:
    def tell(tick: Tick) -> None:
        for one in (first, second):
            if one is not None:
                one(tick)

    return tell
