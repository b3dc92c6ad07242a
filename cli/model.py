"""distill, quantize, inspect, export: what concerns a model on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pocketfed.cli.options import Json, Seed
from pocketfed.cli.output import (
    CommandError,
    format_bytes,
    fraction_teller,
    print_json,
    print_table,
    progress_bar,
    stage_teller,
)


def distill(
    corpus: Annotated[
        list[Path], typer.Option(help="Text files, folders of them, or data with a text column. May be repeated.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the student; made whole or not at all.")],
    more: Annotated[list[Path] | None, typer.Argument(metavar="PATH", help="Further corpus files and folders.")] = None,
    preset: Annotated[
        str,
        typer.Option(
            help="nano (seconds), micro (minutes), pocket (an hour, from a BERT), mini (one GPU), reference (the paper's) "
            "or a published size."
        ),
    ] = "nano",
    steps: Annotated[int | None, typer.Option(min=1, help="All stages together; the preset's own by default.")] = None,
    seed: Seed = 0,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="KEY=VALUE: a size of the student, teacher.KEY, schedule.KEY, or vocabulary=FILE."),
    ] = None,
    teacher: Annotated[
        Path | None,
        typer.Option(help="Folder of a trained teacher or of a plain BERT; else a teacher is trained first."),
    ] = None,
    keep_teacher: Annotated[Path | None, typer.Option(help="Folder for the teacher, to distill from again.")] = None,
    keep_heads: Annotated[
        Path | None, typer.Option(help="Folder for the student with its pre-training heads, to fill in hidden words.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda; under torchrun each process takes its own.")] = "cpu",
    licence: Annotated[str, typer.Option(help="For the model card.")] = "",
    tensorboard: Annotated[Path | None, typer.Option(help="Folder for event files; needs TensorBoard.")] = None,
    save_every: Annotated[float, typer.Option(min=0.0, help="Seconds between checkpoints.")] = 60.0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print steps, tokens, FLOPs and hours; train nothing.")
    ] = False,
    json: Json = False,
) -> None:
    """Distill a task-agnostic student from an inverted-bottleneck teacher, on your text. Goes on where it was stopped."""
    from pocketfed.coordinator import distilling

    options = distilling.DistillOptions(teacher, keep_teacher, device, licence, tensorboard, save_every, keep_heads)
    paths, settings = [*corpus, *(more or [])], key_values(set_ or [])
    if dry_run:
        costs = distilling.plan_distillation(paths, preset, out, steps, seed, settings, options)
        if costs:  # torchrun: the first process speaks for all
            _print_plan(costs, json)
        return
    with progress_bar() as bar:
        report = distilling.distill(paths, preset, out, steps, seed, settings, stage_teller(bar), options)
    if report["rank"]:  # torchrun: the first process speaks for all
        return
    if json:
        print_json(report)
        return
    scores = report["scores"]
    shown = ["cosine", "explained"] if "cosine" in scores["student"] else ["loss", "accuracy"]
    print_table(
        "Beside the teacher, on held-out text" if "cosine" in shown else "Hidden tokens of held-out text",
        ["model", *shown],
        [[who, *(f"{score[key]:.3f}" for key in shown)] for who, score in scores.items()],
    )
    print(f"{out}: {report['model']['parameters']:,} parameters (teacher {report['teacher_parameters']:,})")


def _print_plan(costs: list[dict[str, Any]], json: bool) -> None:
    whole = {key: sum(cost[key] for cost in costs) for key in ("steps", "tokens", "flops", "hours")}
    if json:
        print_json({"stages": costs, "all": whole})
        return
    rows = [*costs, {"name": "all", **whole}]
    print_table(
        "What it would take, at the speed measured on this machine now",
        ["stage", "steps", "tokens", "FLOPs", "hours"],
        [[r["name"], f"{r['steps']:,}", f"{r['tokens']:,}", f"{r['flops']:.2e}", f"{r['hours']:,.2f}"] for r in rows],
    )
    for cost in costs:
        if cost["note"]:
            print(f"{cost['name']}: {cost['note']}")


def quantize(
    model_dir: Annotated[Path, typer.Argument(help="A model folder.")],
    out: Annotated[Path, typer.Option(help="Folder for the quantized model.")],
    scheme: Annotated[
        str,
        typer.Option(help="int8 (the default), int8-dynamic, int8-static, int8-qat or int4; docs/quantization.md."),
    ] = "",
    dev: Annotated[
        Path | None, typer.Option(metavar="DATA", help="Measure the loss on this task's dev, else test split.")
    ] = None,
    task: Annotated[str, typer.Option(help="Where DATA is good for several: intents or slots, oos:label, ...")] = "",
    calibrate: Annotated[
        Path | None,
        typer.Option(metavar="DATA", help="Texts to fix activations' ranges by; by default what --dev trains on."),
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option(metavar="LAYER", help="Keep it wider: a name, a part of one. May be repeated.")
    ] = None,
    group: Annotated[int, typer.Option(min=8, max=4096, help="int4: weights that share a scale.")] = 64,
    budget: Annotated[
        float | None,
        typer.Option(min=0.0, help="Take the smallest scheme that loses no more points on --dev, or fail."),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Of what is trained: int8-qat, or a head to measure with.")] = 3,
    learning_rate: Annotated[
        float | None,
        typer.Option(min=0.0, help="As for evaluate, by default the same; int8-qat takes half, a head ten times it."),
    ] = None,
    max_length: Annotated[int, typer.Option(min=3, help="Tokens; longer texts are cut.")] = 64,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Store a model's weights in eight or four bits, and say what that costs."""
    from pocketfed.coordinator.quantizing import QuantizeOptions
    from pocketfed.coordinator.quantizing import quantize as by_options

    options = QuantizeOptions(
        scheme=scheme,
        dev=dev,
        task=task,
        calibrate=calibrate,
        keep=tuple(keep or ()),
        group=group,
        budget=budget,
        epochs=epochs,
        learning_rate=learning_rate,
        max_length=max_length,
        seed=seed,
    )
    with progress_bar() as bar:
        report = by_options(model_dir, out, options, fraction_teller(bar))
    if json:
        print_json(report)
        return
    _print_quantized(report, out)


def _print_quantized(report: dict[str, Any], out: Path) -> None:
    if len(report["tried"]) > 1:
        print_table(
            "Tried",
            ["scheme", "kept wider", "bytes", "points lost"],
            [[t["scheme"], str(len(t["keep"])), format_bytes(t["bytes"]), f"{t['lost']:.2f}"] for t in report["tried"]],
        )
    before, after = report["bytes_before"], report["bytes_after"]
    print(
        f"{out}: {report['scheme']}, {format_bytes(before)} -> {format_bytes(after)} ({report['ratio']:.2f} x smaller), "
        f"largest error of a weight {report['largest_error']:.2g}, mean {report['mean_error']:.2g}"
    )
    if report["dev"]:
        dev = report["dev"]
        print(
            f"{dev['metric']} on {dev['data']} ({dev['split']}, {dev['examples']} examples): {dev['float']:.2f} -> "
            f"{dev['quantized']:.2f}, {dev['lost']:.2f} points lost"
        )

    def told(name: str) -> str:
        error = report["errors"].get(f"{name}.weight", {"relative": 0.0, "output": None})
        lost = error["relative"] if error["output"] is None else error["output"]
        return f"{name} ({lost:.1%})"

    print(f"Layers that lose most: {', '.join(told(name) for name in report['worst'])}")


def inspect(
    model: Annotated[str, typer.Argument(help="A preset or a model folder.")] = "",
    table: Annotated[
        bool, typer.Option("--table", help="The paper's models, its figures beside those counted.")
    ] = False,
    json: Json = False,
) -> None:
    """Parameters, FLOPs (2 a multiply-add, 128 tokens) and bytes of a model."""
    from pocketfed.coordinator import pipeline

    if table:
        _print_size_table(pipeline.size_table(), json)
        return
    if not model:
        raise CommandError("which model is not said; give a preset or a model folder, or --table")
    report = pipeline.inspect(model)
    if json:
        print_json(report)
        return
    rows = [["parameters", f"{report['parameters']:,}"], ["FLOPs, 128 tokens", f"{report['flops'] / 1e9:.3f} G"]]
    rows += [[f"bytes {kind}", format_bytes(count)] for kind, count in report["bytes"].items()]
    if "bytes_on_disk" in report:
        stored = report["quantization"] or "not quantized"
        rows.append(["as it is stored", f"{stored}, {format_bytes(report['bytes_on_disk'])}"])
        rows.append(["labels", str(len(report["labels"])) if report["labels"] else "none: a backbone"])
    print_table(report["name"], ["", "value"], rows)


def _print_size_table(rows: list[dict[str, Any]], json: bool) -> None:
    if json:
        print_json(rows)
        return

    def cell(count: int, paper: int | None, unit: float) -> list[str]:
        if paper is None:
            return [f"{count / unit:.2f}", "", ""]
        return [f"{count / unit:.2f}", f"{paper / unit:.1f}", f"{count / paper - 1:+.1%}"]

    print_table(
        "Parameters in millions, FLOPs in billions (2 a multiply-add, 128 tokens)",
        ["model", "parameters", "paper", "off", "FLOPs", "paper", "off"],
        [
            [
                row["name"],
                *cell(row["parameters"], row["paper_parameters"], 1e6),
                *cell(row["flops"], row["paper_flops"], 1e9),
            ]
            for row in rows
        ],
    )
    for row in rows:
        if row["note"]:
            print(f"{row['name']}: {row['note']}")


def export(
    model_dir: Annotated[Path, typer.Argument(help="A model folder.")],
    out: Annotated[Path, typer.Option(help="The file or folder to write; written whole and checked, or not at all.")],
    to: Annotated[
        str,
        typer.Option(
            help="onnx, openvino, executorch: to predict with. huggingface, tf1: a folder for transformers, for Google's code."
        ),
    ] = "executorch",
    plan: Annotated[
        str, typer.Option(help="predict, or train: the training step, for executorch alone, where it is the default.")
    ] = "",
    scheme: Annotated[
        str, typer.Option(help="predict: float32, int8 (weights), int8-dynamic (onnx), int8-static (onnx, openvino).")
    ] = "float32",
    calibrate: Annotated[
        Path | None, typer.Option(help="int8-static: texts like those it will read, one a line.")
    ] = None,
    labels: Annotated[
        str, typer.Option(help="train: what the classifier tells apart: A,B,C, or a data set to read them from.")
    ] = "",
    train: Annotated[str, typer.Option("--train", "--set", help="train: the trainable set.")] = "lora:8",
    batch: Annotated[int | None, typer.Option(min=1, help="executorch: texts at a time; fixed in the file.")] = None,
    length: Annotated[int | None, typer.Option(min=3, help="executorch: tokens a text; fixed in the file.")] = None,
    task: Annotated[
        str, typer.Option(help="What the head does: classification, regression, tokens, spans; by default as labelled.")
    ] = "",
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Write a model for another runtime: to predict with, a training step for ExecuTorch, or as Hugging Face has it."""
    from pocketfed.cli import exports

    plan = plan or ("train" if to == "executorch" else "predict")
    if to == "huggingface":
        exports.to_huggingface(model_dir, out, task, json)
    elif to == "tf1":
        exports.to_tf1(model_dir, out, json)
    elif plan == "predict":
        exports.prediction(model_dir, out, to, scheme, calibrate, task, batch or 1, length or 128, json)
    elif plan == "train" and to == "executorch":
        exports.training_step(model_dir, out, labels, train, batch or 4, length or 64, seed, json)
    elif plan == "train":
        raise CommandError(
            f"a training step is not exported to {to!r}; devices get it as a plan, see pocketfed publish"
        )
    else:
        raise CommandError(f"--plan {plan!r} is nothing to export; choose predict or train")


def key_values(pairs: list[str]) -> dict[str, str]:
    """
    >>> key_values(["hidden_size=64"])
    {'hidden_size': '64'}
    """
    values = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise CommandError(f"--set {pair!r} is not KEY=VALUE, e.g. hidden_size=64")
        values[key.strip()] = value
    return values
