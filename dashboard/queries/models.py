"""What was published, and which channel was given what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pocketfed.coordinator.store import Artifact, Blob, Release, Run


@dataclass(frozen=True)
class ArtifactLine:
    """A published model as its manifest describes it; what the manifest lacks is None or empty."""

    version: str
    preset: str | None
    parameters: int | None
    flops: int | None
    quantization: str | None
    sizes: Mapping[str, int]  # bytes by precision: fp32, fp16, int8
    trainable_sets: Mapping[str, int]  # parameters by set
    labels: int
    parent: str | None
    bytes: int
    created_at: datetime


@dataclass(frozen=True)
class ReleaseLine:
    """Values of a trainable set that a channel was given. `current`: the newest of its channel."""

    id: int
    channel: str
    artifact_version: str
    trainable_set: str
    bytes: int
    run_id: int | None
    run: str | None
    current: bool
    created_at: datetime


def artifacts(session: Session, limit: int = 20, offset: int = 0) -> list[ArtifactLine]:
    """Published models, newest first."""
    query = sa.select(Artifact).order_by(Artifact.created_at.desc(), Artifact.version).limit(limit).offset(offset)
    return [_artifact_line(artifact) for artifact in session.scalars(query)]


def _artifact_line(artifact: Artifact) -> ArtifactLine:
    """What the page needs of a manifest, whatever the manifest lacks or holds besides."""
    manifest = _mapping(artifact.manifest)
    model = _mapping(manifest.get("model"))
    labels = manifest.get("labels")
    sets = {str(name): _mapping(value) for name, value in _mapping(manifest.get("trainable_sets")).items()}
    return ArtifactLine(
        version=artifact.version,
        preset=_text(model.get("preset")),
        parameters=_whole(model.get("parameters")),
        flops=_whole(model.get("flops")),
        quantization=_text(manifest.get("quantization")),
        sizes={
            k: n for k in ("fp32", "fp16", "int8") if (n := _whole(_mapping(manifest.get("sizes")).get(k))) is not None
        },
        trainable_sets={name: size for name, value in sets.items() if (size := _whole(value.get("size"))) is not None},
        labels=len(labels) if isinstance(labels, list) else 0,
        parent=_text(manifest.get("parent")),
        bytes=artifact.bytes,
        created_at=artifact.created_at,
    )


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _whole(value: Any) -> int | None:
    return int(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0 else None


def releases(session: Session, limit: int = 20, offset: int = 0) -> list[ReleaseLine]:
    """What channels were given, newest first."""
    current = sa.select(sa.func.max(Release.id)).where(Release.state == "live").group_by(Release.channel)
    query = (
        sa.select(Release, Run.name, Blob.bytes, Release.id.in_(current).label("current"))
        .outerjoin(Run, Run.id == Release.run_id)
        .outerjoin(Blob, Blob.digest == Release.parameters)
        .order_by(Release.id.desc())
        .limit(limit)
        .offset(offset)
    )
    return [
        ReleaseLine(
            id=release.id, channel=release.channel, artifact_version=release.artifact_version,
            trainable_set=release.trainable_set, bytes=size or 0, run_id=release.run_id, run=name,
            current=bool(is_current), created_at=release.created_at,
        )
        for release, name, size, is_current in session.execute(query)
    ]  # fmt: skip
