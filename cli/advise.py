"""advise: which trainable set suits the data and the devices, from a short trial."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pocketfed.cli.output import CommandError, format_bytes, print_json, print_table

if TYPE_CHECKING:
    from pocketfed.simulations.advise import Advice

COLUMNS = ("set", "accuracy", "rate", "CPU s, first round", "later", "peak MB", "update")


def advise(
    data: Annotated[Path, typer.Option(help="Labelled texts: a file or folder, see the README.")],
    model: Annotated[
        str, typer.Option(help="A model folder, `shipped` (the default), or a preset that starts untrained.")
    ] = "shipped",
    memory: Annotated[float | None, typer.Option(help="MB the device's process may hold.")] = None,
    bytes_: Annotated[float | None, typer.Option("--bytes", help="kB a device may send a round.")] = None,
    time: Annotated[float | None, typer.Option(help="CPU seconds a local round may take, as on this machine.")] = None,
    sets: Annotated[str, typer.Option(help="Sets to try, separated by commas; by default all that fit.")] = "",
    devices: Annotated[int, typer.Option(min=1, help="So many share the training examples.")] = 10,
    epochs: Annotated[int, typer.Option(min=1, help="Of a local round.")] = 1,
    examples: Annotated[int, typer.Option(min=3, help="For the trial; a third of them to measure on.")] = 1500,
    steps: Annotated[int, typer.Option(min=1, help="Of the trial, at each learning rate.")] = 300,
    rates: Annotated[str, typer.Option(help="Learning rates to try, separated by commas.")] = "1e-3,4e-3,1.6e-2",
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    max_length: Annotated[int, typer.Option(min=3, help="Tokens of a text.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same accuracies.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
) -> None:
    """Try trainable sets on your data for a short time, and say which to choose within the given limits."""
    from pocketfed.simulations.advise import AdviseConfig, Limits
    from pocketfed.simulations.advise import advise as run_trials

    config = AdviseConfig(
        data=data,
        model=model,
        sets=tuple(filter(None, (name.strip() for name in sets.split(",")))),
        limits=Limits(memory, bytes_, time),
        devices=devices,
        epochs=epochs,
        examples=examples,
        steps=steps,
        rates=_numbers(rates),
        batch_size=batch_size,
        max_length=max_length,
        seed=seed,
    )
    advice = run_trials(config, (lambda step: None) if json else (lambda step: print(f"{step} ...", flush=True)))
    if json:
        print_json(advice.to_dict())
    else:
        _show(advice, epochs)
    if advice.choice is None:
        raise typer.Exit(1)


def _show(advice: Advice, epochs: int) -> None:
    rows = [
        (
            c.trainable_set,
            f"{c.accuracy:.3f} ± {c.standard_error:.3f}",
            f"{c.learning_rate:g}",
            f"{c.first_round_cpu_s:.2f}",
            f"{c.later_round_cpu_s:.2f}",
            f"{c.peak_mb:.0f}{' (in parts)' if c.in_parts else ''}",
            format_bytes(c.update_bytes),
        )
        for c in advice.candidates
    ]
    title = f"{advice.train_examples} examples to train on, {advice.held_out_examples} held out"
    print_table(title, COLUMNS, rows)
    print("± is one standard error, of the held-out examples alone: another seed may differ by more.")
    if advice.at_an_end and len(advice.rates) > 2:
        print(f"Best at the lowest or highest rate tried: {', '.join(advice.at_an_end)}; --rates tries others.")
    if advice.is_thin:
        each = advice.train_examples / advice.labels
        print(f"{each:.1f} examples a label are few: with more --examples and --steps the order may be another.")
    plural = "s" * (epochs != 1)
    print(f"A local round: {epochs} epoch{plural} over a device's {advice.round_examples} examples.")
    print(f"choice: {advice.choice or 'none'}\n{advice.why}")


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(n) for n in text.split(",") if n.strip())
    except ValueError:
        raise CommandError(f"--rates {text!r} are not numbers separated by commas, e.g. 1e-3,1e-2") from None
