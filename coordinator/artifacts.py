"""Building artifacts (plans, tokenizer, backbone, manifest) and putting them into the store."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy.orm import Session

from pocketfed.coordinator.releases import add_release, lock_channel, parent_for
from pocketfed.coordinator.rollout import Rollout
from pocketfed.coordinator.signing import Keys, sign_version, sign_way_back
from pocketfed.coordinator.store import (
    CHUNK_BYTES,
    Artifact,
    Release,
    iterate_blob,
    put_artifact,
    split_chunks,
)

if TYPE_CHECKING:  # torch is imported only where plans are built
    from pocketfed.model.heads import TextClassifier
    from pocketfed.model.plans import Plans

SCHEMA = 2
MANIFEST = "manifest.json"
TOKENIZE = "tokenize.onnx"
MIN_SDK = "0.2.0"
MAX_LABELS = 10_000


class PublishError(ValueError):
    """An artifact that cannot be built or published."""


@dataclass(frozen=True)
class BuiltArtifact:
    """version: SHA-256 of the manifest's bytes, which name every file by its own SHA-256."""

    version: str
    manifest: dict[str, Any]
    folder: Path


def build_artifact(
    folder: Path,
    *,
    config: Any,
    state: Mapping[str, Any],
    vocabulary: Any,
    labels: Sequence[str],
    trainable_sets: Sequence[str],
    quantized: bool,
    activations: str = "float32",
    keep: Sequence[str] = (),
    task: str = "classification",
    head_labels: Sequence[str] | None = None,
    max_length: int | None = None,
    preset: str | None = None,
    parent: str | None = None,
    metrics: Mapping[str, float] | None = None,
    seed: int = 0,
    progress: Callable[[str], None] = lambda step: None,
) -> BuiltArtifact:
    """Write an artifact into `folder`, which must not exist; every plan is compared with autograd before it counts.

    Args:
        config, state, vocabulary: as in `model.checkpoints.Checkpoint`; empty state: a student that starts untrained.
        quantized: hold what is frozen as int8.
        activations: "int8" lets frozen products read 8-bit activations: faster, a little less exact (`model.lean`).
        keep: layers that stay float32 in both, as in `model.quantization.Storage`.
        task: one of `model.heads.TASKS`; labels name the outputs ("spans": start and end; "regression": one).
        head_labels: what the rows of a classifier in `state` stand for, by default `labels`; for others the head starts
            untrained.
        seed: for the head, for LoRA, and for all of a student that starts untrained.

    Raises:
        PublishError: no or doubtful labels, or a vocabulary that does not fit.
        PlanError, TrainableSetError: from building the plans.
    """
    from pocketfed.model.adapters import select
    from pocketfed.model.plans import BACKBONE_FILE, Backbone, build_plans, verify_plans
    from pocketfed.model.tokenization import build_tokenize_plan

    _check_labels(labels, task)
    _check_activations(activations, quantized)
    if len(vocabulary.tokens) != config.vocab_size:
        raise PublishError(
            f"the vocabulary has {len(vocabulary.tokens)} tokens, the model {config.vocab_size}; "
            "give the vocabulary it was made with"
        )
    if folder.exists():
        raise PublishError(f"{folder} is there already; give a folder that does not exist")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        backbone = Backbone(quantized, activations, keep=tuple(keep))
        built = []
        for name in trainable_sets:
            progress(f"plans for {name}")
            classifier = _classifier(config, state, vocabulary.sep_id, labels, head_labels, task, seed)
            model = select(classifier, name, seed)
            plans = build_plans(model, name, backbone)
            built.append((model, plans, _write_set(partial, plans)))
        if backbone.data:
            (partial / BACKBONE_FILE).write_bytes(backbone.data)
        for model, plans, described in built:
            progress(f"checking {plans.trainable_set} against autograd")
            verify_plans(model, plans, partial, {name: described[name] for name in plans.files}, backbone)
        (partial / TOKENIZE).write_bytes(build_tokenize_plan(vocabulary))
        manifest: dict[str, Any] = {
            "schema": SCHEMA,
            "min_sdk": MIN_SDK,
            "chunk_bytes": CHUNK_BYTES,
            **_describe_model(config, preset),
            "task": task,
            "labels": list(labels),
            "max_length": min(max_length or config.max_position_embeddings, config.max_position_embeddings),
            "quantization": "int8" if quantized else None,
            "activations": activations,
            **({"keep": list(keep)} if keep else {}),
            "plans": {"tokenize": TOKENIZE},
            "trainable_sets": {plans.trainable_set: described for _, plans, described in built},
            "files": {p.name: describe_file(p.read_bytes()) for p in sorted(partial.iterdir())},
            "parent": parent,
            "metrics": dict(metrics or {}),
        }
        data = manifest_bytes(manifest)
        (partial / MANIFEST).write_bytes(data)
        os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return BuiltArtifact(hashlib.sha256(data).hexdigest(), manifest, folder)


def _classifier(
    config: Any,
    state: Mapping[str, Any],
    separator: int,
    labels: Sequence[str],
    head_labels: Sequence[str] | None,
    task: str,
    seed: int,
) -> TextClassifier:
    """The student with a head for the labels: the checkpoint's own, its rows put in order, where it is for the same ones."""
    import torch

    from pocketfed.model.heads import TextClassifier

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TextClassifier(config, len(labels), separator, task)
    encoder = {k: v for k, v in state.items() if not k.startswith("classifier.")}
    if encoder:
        model.mobilebert.load_state_dict(encoder)
    head = {k.removeprefix("classifier."): v for k, v in state.items() if k.startswith("classifier.")}
    stands_for = list(labels if head_labels is None else head_labels)
    if head and len(head["weight"]) == len(stands_for) and set(stands_for) == set(labels):
        rows = [stands_for.index(label) for label in labels]
        model.classifier.load_state_dict({name: values[rows] for name, values in head.items()})
    return model


def label_names(checkpoint: Any, given: str, model_dir: Path) -> list[str]:
    """What a classifier is to tell apart: `A,B,C`, a data set to read labels from, or what the model folder states.

    Raises:
        PublishError: none of them.
    """
    from pocketfed.model.tasks import read_dataset

    if given and Path(given).exists():
        names = list(read_dataset(given).labels)
    else:
        names = [n.strip() for n in given.split(",") if n.strip()] or list(checkpoint.labels or ())
    if len(names) == 1 and ("/" in given or "." in given):
        raise PublishError(f"there is no data set {given} to read labels from; give --labels A,B,C or --labels DATA")
    if not names:
        raise PublishError(
            f"{model_dir} is task-agnostic, so the artifact needs labels; give --labels A,B,C or --labels DATA"
        )
    return names


def trainable_classifier(model_dir: Path, labels: str, trainable_set: str, seed: int) -> tuple[TextClassifier, bool]:
    """The very model whose plan `build_artifact` makes for that set and seed, and whether what is frozen is int8.

    Raises:
        PublishError, CheckpointError, TrainableSetError: no or doubtful labels, no usable model, an unknown set.
    """
    from pocketfed.model.adapters import select
    from pocketfed.model.checkpoints import load, tokens_of

    checkpoint = load(model_dir)
    names = label_names(checkpoint, labels, model_dir)
    _check_labels(names, "classification")
    separator = tokens_of(checkpoint).sep_id
    model = _classifier(
        checkpoint.config, checkpoint.state, separator, names, checkpoint.labels, "classification", seed
    )
    return select(model, trainable_set, seed), checkpoint.quantization is not None


def _write_set(folder: Path, plans: Plans) -> dict[str, Any]:
    """Write a trainable set's plans and initial values; returns its entry in the manifest."""
    from pocketfed.model.parameters import encode_vector

    stem = plans.trainable_set.replace(":", "-").replace("@", "-last-")
    described: dict[str, Any] = {
        "initial": f"theta-{stem}.safetensors",
        "size": int(plans.theta.size),
        "parameters": [{"name": p.name, "shape": list(p.shape), "offset": p.offset} for p in plans.layout],
        "needs": {
            name: {"weights": needs.weights, "activations": list(needs.activations)}
            for name, needs in plans.footprints.items()
        },
    }
    if plans.depth:
        described |= {"depth": plans.depth, "hidden_size": plans.hidden_size, "keeps_tokens": plans.keeps_tokens}
    for name, plan in plans.files.items():
        described[name] = f"{name.replace('_', '-')}-{stem}.onnx"
        (folder / described[name]).write_bytes(plan)
    (folder / described["initial"]).write_bytes(encode_vector("theta", plans.theta))
    return described


def _describe_model(config: Any, preset: str | None) -> dict[str, Any]:
    from pocketfed.model.checkpoints import stored_sizes
    from pocketfed.model.mobilebert import count_flops, count_parameters

    model = {
        "preset": preset,
        "parameters": count_parameters(config),
        "flops": count_flops(config),
        "config": config.to_dict(),
    }
    return {"model": model, "sizes": stored_sizes(config)}


def _check_labels(labels: Sequence[str], task: str) -> None:
    wanted = {"regression": 1, "spans": 2}.get(task)
    if wanted is not None and len(labels) != wanted:
        raise PublishError(f"{task} has {wanted} outputs; {len(labels)} labels were given")
    if wanted is None and len(labels) < 2:
        raise PublishError(f"a classifier needs at least two labels; got {list(labels)!r}")
    if len(labels) > MAX_LABELS:
        raise PublishError(f"{len(labels)} labels are more than {MAX_LABELS}; is the label column the right one?")
    if len(set(labels)) != len(labels):
        twice = next(x for x in labels if list(labels).count(x) > 1)
        raise PublishError(f"the label {twice!r} is there twice; give each once")


def _check_activations(activations: str, quantized: bool) -> None:
    from pocketfed.model.lean import ACTIVATIONS

    if activations not in ACTIVATIONS:
        raise PublishError(f"activations are {activations!r}; choose one of {', '.join(ACTIVATIONS)}")
    if activations != "float32" and not quantized:
        raise PublishError(
            f"{activations} activations need int8 weights; run `pocketfed quantize` on the student first"
        )


def describe_file(data: bytes) -> dict[str, Any]:
    return {
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
        "chunks": [digest for digest, _ in split_chunks(data)],
    }


def manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    """The one way to write a manifest, so that the same content has the same version."""
    return json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def read_artifact(folder: Path) -> BuiltArtifact:
    """Read an artifact's folder back and check every file.

    Raises:
        PublishError: no artifact, or one that is damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise PublishError(f"{folder} holds no {MANIFEST}; give a folder made by `pocketfed publish --out`")
    data = path.read_bytes()
    try:
        manifest = json.loads(data)
        if manifest_bytes(manifest) != data:
            raise PublishError(f"{path} was changed after it was made; build the artifact again")
        if not manifest["trainable_sets"]:
            raise PublishError(f"{path} has no trainable set; build the artifact again")
        for name, stated in manifest["files"].items():
            if Path(name).name != name:
                raise PublishError(f"{path} names a file {name!r}; an artifact has no folders")
            if describe_file((folder / name).read_bytes()) != stated:
                raise PublishError(
                    f"{folder / name} is damaged: its bytes are not those of the manifest; build the artifact again"
                )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, PublishError):
            raise
        raise PublishError(f"{path} is not a readable manifest ({error}); build the artifact again") from None
    return BuiltArtifact(hashlib.sha256(data).hexdigest(), manifest, folder)


def publish_artifact(
    session: Session,
    artifact: BuiltArtifact,
    channel: str,
    trainable_set: str | None = None,
    keys: Keys | None = None,
    supersede: bool = False,
    rollout: Rollout | None = None,
    who: str = "",
) -> Release:
    """Store an artifact and release it on a channel with its initial parameters, all in the session's transaction.

    Args:
        keys: to sign with; without them only devices on this machine run it, and those that have pinned no publisher.
        supersede: what the channel ran before is not trained on any more either.
        rollout: to how many devices, and when it is to be taken back; by default it is live at once.

    Raises:
        PublishError: the artifact does not carry the set. SigningError: no key to sign with, or an older version.
        ReleaseError: it is to go out in stages, and nothing is live on the channel.
    """
    sets = artifact.manifest["trainable_sets"]
    chosen = trainable_set or next(iter(sets))
    if chosen not in sets:
        raise PublishError(f"the artifact has no trainable set {chosen!r}, only {', '.join(sets)}")
    files = ((artifact.folder / name).read_bytes() for name in artifact.manifest["files"])
    put_artifact(session, artifact.manifest, artifact.version, files)
    lock_channel(session, channel)
    parent = parent_for(session, channel, rollout or Rollout())
    if keys is not None:
        follows = parent.artifact_version if parent is not None else None
        sign_version(session, keys, channel, artifact.version, supersede=supersede, follows=follows)
    parameters = artifact.manifest["files"][sets[chosen]["initial"]]["sha256"]
    release = Release(channel=channel, artifact_version=artifact.version, trainable_set=chosen, parameters=parameters)
    add_release(session, release, rollout or Rollout(), who)
    if keys is not None and parent is not None and release.min_devices and parent.artifact_version != artifact.version:
        sign_way_back(session, keys, release, parent.artifact_version)
    return release


def export_artifact(session: Session, version: str, folder: Path) -> None:
    """Write a stored artifact back as a folder.

    Raises:
        StoreError: the database does not hold all of it.
    """
    manifest = session.get_one(Artifact, version).manifest
    folder.mkdir(parents=True)
    for name, file in manifest["files"].items():
        with (folder / name).open("wb") as stream:
            stream.writelines(iterate_blob(session, file["sha256"]))
    (folder / MANIFEST).write_bytes(manifest_bytes(manifest))
