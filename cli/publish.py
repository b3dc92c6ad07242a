"""publish: a model becomes an artifact in the database, released on a channel."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pocketfed.cli.database import opened
from pocketfed.cli.options import Database, Json, KeysFolder
from pocketfed.cli.output import CommandError, check_database, format_bytes, print_json


def publish(
    channel: Annotated[str, typer.Option(help="Devices follow a channel.")],
    database: Database,
    model_dir: Annotated[
        Path,
        typer.Argument(
            metavar="[MODEL]",
            show_default=False,
            help="A model folder, `shipped` for the package's own student (the default), or an artifact built with --out.",
        ),
    ] = Path("shipped"),
    labels: Annotated[
        str, typer.Option(help="What the classifier tells apart: A,B,C, or a data set to read them from.")
    ] = "",
    train: Annotated[
        list[str] | None,
        typer.Option(help="Trainable sets to build plans for; the first is released. May be repeated."),
    ] = None,
    activations: Annotated[
        str, typer.Option(help="float32, or int8: faster, a little less exact; for an int8 student.")
    ] = "float32",
    max_length: Annotated[int, typer.Option(min=3, help="Tokens; longer texts are cut.")] = 64,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    out: Annotated[Path | None, typer.Option(help="Keep the artifact's folder here.")] = None,
    keys: KeysFolder = None,
    supersede: Annotated[
        bool,
        typer.Option("--supersede", help="What the channel ran before has a fault: it is not trained on any more."),
    ] = False,
    rollout: Annotated[
        float, typer.Option(help="Percent of the channel's devices that get it at first; docs/releases.md.")
    ] = 100.0,
    margin: Annotated[
        float, typer.Option(help="It is halted if a cohort loses more accuracy than that, 0 to 1.")
    ] = 0.02,
    loss_margin: Annotated[
        float, typer.Option(help="Likewise for loss, in nats, where the accuracy is no better.")
    ] = 0.1,
    min_devices: Annotated[
        int | None,
        typer.Option(help="Judge a cohort once so many of its devices have reported; by default 5 of a rollout."),
    ] = None,
    auto: Annotated[bool, typer.Option("--auto", help="Go on to more devices while no cohort is worse.")] = False,
    min_sdk: Annotated[str, typer.Option(help="The oldest SDK that may have it.")] = "",
    max_sdk: Annotated[str, typer.Option(help="The newest; 0.3 takes in 0.3.5.")] = "",
    json: Json = False,
) -> None:
    """Build an artifact (plans, int8 backbone, tokenizer, manifest), sign it and release it on a channel."""
    import tempfile

    from pocketfed.coordinator.artifacts import MANIFEST, publish_artifact, read_artifact
    from pocketfed.coordinator.operators import acting, local_admin
    from pocketfed.coordinator.rollout import Rollout
    from pocketfed.coordinator.signing import ensure_keys, keys_folder, newest_list

    if not 0 < len(channel) <= 100:
        raise CommandError(f"--channel is {channel[:100]!r}; give a name of 1 to 100 characters")
    plan = Rollout(rollout, margin, loss_margin, min_devices, min_sdk, max_sdk, auto)
    check_database(database)
    with tempfile.TemporaryDirectory(prefix="pocketfed-") as scratch:
        if (model_dir / MANIFEST).is_file():
            if labels or out:
                raise CommandError(f"{model_dir} is an artifact already; --labels and --out are for a model folder")
            built = read_artifact(model_dir)
        else:
            folder = out or Path(scratch) / "artifact"
            built = _build(model_dir, folder, labels, train or ["lora:8"], activations, max_length, seed, quiet=json)
        with (
            opened(database) as store,
            acting(store, local_admin(), "publish", f"{channel} {built.version}") as session,
        ):
            signing = ensure_keys(session, keys or keys_folder(store))
            chosen = train[0] if train else None
            who = local_admin().name
            release = publish_artifact(session, built, channel, chosen, signing, supersede, plan, who)
            publisher = newest_list(session)
            released = {
                "release": release.id,
                "trainable_set": release.trainable_set,
                "publisher": publisher.publisher if publisher else None,
            }
    total = sum(f["bytes"] for f in built.manifest["files"].values())
    report = {
        "version": built.version,
        "channel": channel,
        "percent": rollout,
        "bytes": total,
        "sizes": built.manifest["sizes"],
        **released,
    }
    if json:
        print_json(report)
    else:
        trained = released["trainable_set"]
        to = f"{rollout:g} % of {channel!r}" if rollout < 100 else repr(channel)
        print(f"released {built.version[:12]} ({format_bytes(total)}) on {to}, training {trained}")


def _build(
    model_dir: Path,
    folder: Path,
    labels: str,
    sets: list[str],
    activations: str,
    max_length: int,
    seed: int,
    quiet: bool,
) -> Any:
    from pocketfed.coordinator.artifacts import build_artifact, label_names
    from pocketfed.model.checkpoints import load, tokens_of
    from pocketfed.model.shipped import located

    model_dir = located(model_dir)
    checkpoint = load(model_dir)
    names = label_names(checkpoint, labels, model_dir)
    return build_artifact(
        folder,
        config=checkpoint.config,
        state=checkpoint.state,
        vocabulary=tokens_of(checkpoint),
        labels=names,
        trainable_sets=sets,
        quantized=checkpoint.quantization is not None,
        keep=checkpoint.kept_float,
        activations=activations,
        max_length=max_length,
        preset=model_dir.resolve().name,
        head_labels=checkpoint.labels,
        seed=seed,
        progress=lambda step: None if quiet else print(f"{step} ...", flush=True),
    )
