"""What was published, and which channel was given what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pocketfed.coordinator.releases import shares
from pocketfed.coordinator.reports import comparisons
from pocketfed.coordinator.rollout import Comparison
from pocketfed.coordinator.store import (
    Artifact,
    Blob,
    Release,
    ReleaseEvent,
    Round,
    Run,
    Signature,
    StoreError,
    get_blob,
    latest_release,
)
from pocketfed.dashboard.queries.learning import MIN_COHORT


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
    metrics: Mapping[str, float]  # what its publisher has measured
    files: Mapping[str, str]  # name -> sha256


@dataclass(frozen=True)
class ReleaseLine:
    """Values of a trainable set that a channel was given. `current`: the newest live one of its channel."""

    id: int
    channel: str
    artifact_version: str
    trainable_set: str
    bytes: int
    run_id: int | None
    run: str | None
    current: bool
    created_at: datetime
    state: str
    percent: float
    parent_id: int | None
    undoes_id: int | None
    sdks: str  # which versions may have it; "" for any
    accuracy: float | None  # of the run that it came from, at its end


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
        metrics=_numbers(manifest.get("metrics")),
        files={str(name): sha for name, of in _mapping(manifest.get("files")).items() if (sha := _sha256(of))},
    )


def _numbers(value: Any) -> dict[str, float]:
    return {str(k): float(v) for k, v in _mapping(value).items() if isinstance(v, int | float)}


def _sha256(value: Any) -> str | None:
    return _text(_mapping(value).get("sha256"))


def _sdks(least: str, most: str) -> str:
    return f"{least or 'any'} to {most or 'newest'}" if least or most else ""


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _whole(value: Any) -> int | None:
    return int(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0 else None


def releases(session: Session, limit: int = 20, offset: int = 0) -> list[ReleaseLine]:
    """What channels were given, newest first."""
    current = sa.select(sa.func.max(Release.id)).where(Release.state == "live").group_by(Release.channel)
    known = sa.select(Round.accuracy).where(Round.run_id == Release.run_id, Round.accuracy.is_not(None))
    reached = known.order_by(Round.number.desc()).limit(1).scalar_subquery()
    query = (
        sa.select(Release, Run.name, Blob.bytes, Release.id.in_(current).label("current"), reached.label("reached"))
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
            current=bool(is_current), created_at=release.created_at, state=release.state, percent=release.percent,
            parent_id=release.parent_id, undoes_id=release.undoes_id,
            sdks=_sdks(release.min_sdk, release.max_sdk), accuracy=accuracy,
        )
        for release, name, size, is_current, accuracy in session.execute(query)
    ]  # fmt: skip


@dataclass(frozen=True)
class EventLine:
    """What a release came to be."""

    release_id: int
    at: datetime
    state: str
    percent: float
    who: str
    reason: str


def release_events(session: Session, limit: int = 50, offset: int = 0) -> list[EventLine]:
    """What became of all releases, the newest first."""
    query = sa.select(ReleaseEvent).order_by(ReleaseEvent.id.desc()).limit(limit).offset(offset)
    return [EventLine(e.release_id, e.at, e.state, e.percent, e.who, e.reason) for e in session.scalars(query)]


def running(session: Session, channel: str) -> dict[int, int]:
    """Release -> how many of the channel's devices run it, as they say; 0: none yet."""
    return shares(session, channel)


def judged(session: Session, release_id: int) -> list[Comparison]:
    """A release beside its parent, cohort by cohort, as the coordinator judges it; cohorts of a few devices left out."""
    release = session.get(Release, release_id)
    if release is None or release.parent_id is None:
        return []
    return [c for c in comparisons(session, release) if c.devices >= MIN_COHORT]


def live(session: Session, channel: str) -> Release | None:
    """The newest release that is for all of the channel's devices."""
    return latest_release(session, channel)


def signatures(session: Session, versions: Sequence[str]) -> dict[str, str]:
    """Version -> the key that signed it last."""
    query = sa.select(Signature.artifact_version, Signature.key).where(Signature.artifact_version.in_(versions))
    return {row.artifact_version: row.key for row in session.execute(query.order_by(Signature.sequence))}


def file_bytes(session: Session, digest: str) -> bytes | None:
    """A file of an artifact; None where the database does not hold it."""
    try:
        return get_blob(session, digest)
    except StoreError:
        return None
