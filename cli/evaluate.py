"""evaluate: how well a model does a task, once as a device would, or fine-tuned with several seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from pocketfed.cli.options import Json, Seed
from pocketfed.cli.output import CommandError, format_skipped, fraction_teller, print_json, progress_bar

WHOLE = ("epochs", "batch_size")  # settings of a search that are whole numbers


@dataclass(frozen=True)
class _Asked:
    """What the command was told; what it was not told is "", 0 or None."""

    model: str
    data: Path
    train: str
    epochs: int
    learning_rate: float | None
    batch_size: int
    max_length: int | None
    seed: int
    seeds: str
    task: str
    metric: str
    from_scratch: str
    search: tuple[str, ...]
    at_most: int
    examples: int
    precision: str
    device: str
    predictions: Path | None
    out: Path | None
    json: bool

    @property
    def in_torch(self) -> bool:
        """Whether something is asked for that no device's plan does."""
        words = (self.seeds, self.task, self.metric, self.from_scratch, self.search, self.precision, self.device)
        return any(words) or any((self.at_most, self.examples, self.predictions, self.out))


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, or a preset that starts untrained.")],
    data: Annotated[Path, typer.Option(help="Examples of a task: a file or folder, see the docs on tasks.")],
    train: Annotated[
        str,
        typer.Option(
            help="What to fine-tune if the model has no classifier for the labels: head, norms, lora:R, last:K, full."
        ),
    ] = "full",
    epochs: Annotated[int, typer.Option(min=1)] = 3,
    learning_rate: Annotated[
        float | None, typer.Option(min=0.0, help="By default 1e-3; 4e-5 from 512 wide on.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    max_length: Annotated[
        int | None,
        typer.Option(min=3, help="Tokens; longer texts are cut. By default 64; of questions on passages 384."),
    ] = None,
    seed: Seed = 0,
    seeds: Annotated[str, typer.Option(help="0,1,2,...: fine-tune the whole model with each, in PyTorch.")] = "",
    task: Annotated[
        str, typer.Option(help="Where the data is good for several: intents or slots, oos:label, ...")
    ] = "",
    metric: Annotated[str, typer.Option(help="What is chosen by; by default what the task is usually told by.")] = "",
    from_scratch: Annotated[str, typer.Option(metavar="PRESET", help="Compare with this preset, untrained.")] = "",
    search: Annotated[
        list[str] | None,
        typer.Option(help="SETTING=A,B,...: try each combination and keep the best on dev; or paper. May be repeated."),
    ] = None,
    at_most: Annotated[int, typer.Option(min=0, help="So many combinations of a search, drawn by the first seed.")] = 0,
    examples: Annotated[int, typer.Option(min=0, help="Train on at most so many; by default on all.")] = 0,
    precision: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "",
    device: Annotated[str, typer.Option(help="cpu, cuda or mps; by default cpu.")] = "",
    predictions: Annotated[
        Path | None, typer.Option(help="A folder for the answers to questions on passages, for SQuAD's own script.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="A JSON-lines file of trials, gone on with if it is there; the table beside it.")
    ] = None,
    json: Json = False,
) -> None:
    """Measures on a data set's test split. A student without a classifier is fine-tuned on the training split first.

    Without any of --seeds, --task, --metric, --from-scratch, --search, --at-most, --examples, --precision, --device,
    --predictions and --out a classifier is trained as a device would, by its plan; with one of them, and for other kinds
    of tasks, in PyTorch, each seed anew.
    """
    from pocketfed.model.config import STUDENTS
    from pocketfed.model.task_kinds import read_task

    asked = _Asked(
        model=model,
        data=data,
        train=train,
        epochs=epochs,
        learning_rate=learning_rate,
        batch_size=batch_size,
        max_length=max_length,
        seed=seed,
        seeds=seeds,
        task=task,
        metric=metric,
        from_scratch=from_scratch,
        search=tuple(search or ()),
        at_most=at_most,
        examples=examples,
        precision=precision,
        device=device,
        predictions=predictions,
        out=out,
        json=json,
    )
    # The name of a preset comes before a folder's, as in every command.
    if not asked.in_torch and model not in STUDENTS and read_task(data).kind == "classification":
        _as_a_device(asked)
    elif train != "full":
        raise CommandError(
            f"--train {train} is for one run by the device's plan; leave it out, or --seeds and the like"
        )
    else:
        _trials(asked)


def _as_a_device(asked: _Asked) -> None:
    from pocketfed.client_sdk.trainer import TrainConfig
    from pocketfed.simulations.central import evaluate_model

    config = TrainConfig(
        epochs=asked.epochs,
        batch_size=asked.batch_size,
        learning_rate=1e-3 if asked.learning_rate is None else asked.learning_rate,
        max_length=asked.max_length or 64,
        seed=asked.seed,
    )
    with progress_bar() as bar:
        tell = fraction_teller(bar)
        report = evaluate_model(
            Path(asked.model), asked.data, asked.train, config, lambda fraction: tell("fine-tuning", fraction)
        )
    if asked.json:
        print_json(report)
        return
    how = (
        f"fine-tuned ({report['trainable_set']}) on {report['train_examples']} examples"
        if report["fine_tuned"]
        else "as it is"
    )
    print(
        f"accuracy {report['accuracy']:.4f}, loss {report['loss']:.4f} on {report['test_examples']} test examples "
        f"({report['test_source']}), {how}; always the commonest label: {report['majority_accuracy']:.4f}"
    )


def _trials(asked: _Asked) -> None:
    from pocketfed.model.finetuning import Recipe
    from pocketfed.model.task_kinds import read_task
    from pocketfed.model.trial_rows import best_metric, floor_rows, markdown
    from pocketfed.model.trials import Plan, run_trials, start_of, untrained

    out = asked.out
    if out is not None and out.suffix == ".md":
        raise CommandError(f"{out} is where the table would go; name the file of rows {out.with_suffix('.jsonl')}")
    if out is not None and not out.resolve().parent.is_dir():
        raise CommandError(f"the folder of {out} does not exist; create it, or name another file")
    if asked.predictions is not None and asked.predictions.exists() and not asked.predictions.is_dir():
        raise CommandError(f"--predictions {asked.predictions} is a file; name a folder")
    Recipe(device=asked.device or "cpu").place()  # better now than once the data is read
    seeds, space = _seeds(asked.seeds) if asked.seeds else (asked.seed,), _space(asked.search)
    dataset = best_metric(read_task(asked.data, asked.task).with_test(), asked.metric)
    dataset = dataset.with_fewer(asked.examples) if asked.examples else dataset
    starts = [start_of(asked.model, dataset)]
    if asked.from_scratch:
        starts.append(untrained(asked.from_scratch, starts[0]))
        if starts[0].digest() == starts[1].digest():
            raise CommandError(
                f"--from-scratch {asked.from_scratch} is what is evaluated already; give another preset or a model"
            )
    wide = starts[0].config.hidden_size >= 512
    longest = min(start.config.max_position_embeddings for start in starts)
    max_length = asked.max_length or min(longest, 384 if dataset.reads_passages else 64)
    if max_length > longest:
        raise CommandError(f"--max-length {max_length} is more than the model's {longest} positions; give less")
    recipe = Recipe(
        epochs=asked.epochs,
        batch_size=asked.batch_size,
        learning_rate=(4e-5 if wide else 1e-3) if asked.learning_rate is None else asked.learning_rate,
        max_length=max_length,
        precision=asked.precision or "float32",
        device=asked.device or "cpu",
    )
    with progress_bar() as bar:
        tell = fraction_teller(bar)
        rows = run_trials(dataset, starts, Plan(recipe, seeds, space, asked.at_most), out, tell, asked.predictions)
        tell("floors", 0.0)
        rows += floor_rows(dataset, out)
    table = markdown(dataset, rows)
    if out is not None:
        out.with_suffix(".md").write_text(table, encoding="utf-8")
    if asked.json:
        print_json({"rows": rows, "skipped": dict(dataset.skipped)})
        return
    if dataset.skipped:
        print(format_skipped(dataset.skipped))
    size = f"{len(dataset.train)} training, {len(dataset.test)} test examples ({dataset.test_source})"
    print(f"{dataset.name}: {size}; mean (least to greatest) over seeds\n\n{table}", end="")


def _seeds(given: str) -> tuple[int, ...]:
    """
    >>> _seeds("0, 1,2")
    (0, 1, 2)
    """
    words = given.split(",")
    if not all(word.strip().isdecimal() for word in words):
        raise CommandError(f"--seeds {given!r} are no whole numbers; give them as 0,1,2")
    return tuple(int(word) for word in words)


def _space(given: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """
    >>> _space(["learning_rate=1e-3,3e-3", "epochs=3"])
    {'learning_rate': (0.001, 0.003), 'epochs': (3.0,)}
    """
    from pocketfed.model.trials import PAPER_SPACE

    space: dict[str, tuple[float, ...]] = {}
    for word in given:
        if word == "paper":
            space |= PAPER_SPACE
            continue
        name, _, values = word.partition("=")
        if name not in PAPER_SPACE:
            raise CommandError(
                f"--search {word!r} is not SETTING=A,B or paper; the settings are {', '.join(PAPER_SPACE)}"
            )
        try:
            space[name] = tuple(float(value) for value in values.split(","))
        except ValueError:
            raise CommandError(f"--search {word!r} holds what is no number; give it as {name}=A,B") from None
        if name in WHOLE and not all(value.is_integer() for value in space[name]):
            raise CommandError(f"--search {word!r} needs whole numbers; give it as {name}=2,3")
    return space
