"""Does a database hold together: every byte that a row names is there and has its digest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import sqlalchemy as sa

from pocketfed.coordinator.assignments import Assignments
from pocketfed.coordinator.store import (
    Artifact,
    Assignment,
    Blob,
    Checkpoint,
    Chunk,
    Release,
    Round,
    Run,
    Store,
    Update,
)


def find_problems(store: Store, assignments: Assignments) -> Iterator[str]:
    """A sentence for everything that is missing or not what it should be; none for a sound database."""
    yield from _file_problems(store)
    yield from _chunk_problems(store)
    yield from _reference_problems(store)
    yield from _spool_problems(store, assignments)


def _file_problems(store: Store) -> Iterator[str]:
    if store.is_sqlite:
        with store.read() as session:
            for found in session.scalars(sa.text("PRAGMA integrity_check")):
                if found != "ok":
                    yield f"SQLite finds the file damaged: {found}; restore a backup"


def _chunk_problems(store: Store) -> Iterator[str]:
    held = set[str]()
    with store.read() as session:
        for digest, data in session.execute(sa.select(Chunk.digest, Chunk.data).execution_options(yield_per=16)):
            held.add(digest)
            if hashlib.sha256(data).hexdigest() != digest:
                yield f"chunk {digest[:12]} holds other bytes than its name says; restore a backup"
        for blob, chunks in session.execute(sa.select(Blob.digest, Blob.chunks)):
            if not held.issuperset(chunks):
                yield f"of blob {blob[:12]} {len(set(chunks) - held)} chunks are missing; restore a backup"


def _reference_problems(store: Store) -> Iterator[str]:
    with store.read() as session:
        blobs = set(session.scalars(sa.select(Blob.digest)))
        for version, manifest in session.execute(sa.select(Artifact.version, Artifact.manifest)):
            for name, entry in manifest.get("files", {}).items():
                if entry["sha256"] not in blobs:
                    yield f"file {name} of artifact {version[:12]} is missing; publish it again"
        named = (
            ("release", sa.select(Release.id, Release.parameters)),
            ("run", sa.select(Checkpoint.run_id, Checkpoint.state)),
            ("round", sa.select(Round.number, Round.parameters)),
        )
        for what, statement in named:
            for number, digest in session.execute(statement):
                if digest is not None and digest not in blobs:
                    yield f"the bytes {digest[:12]} of {what} {number} are missing; restore a backup"


def _spool_problems(store: Store, assignments: Assignments) -> Iterator[str]:
    waiting = sa.select(Update).join(Assignment).join(Run, Run.id == Assignment.run_id)
    waiting = waiting.where(Assignment.status == "uploaded", Run.status.in_(("waiting", "running")))
    with store.read() as session:
        for update in session.scalars(waiting):
            if not assignments.holds(update):
                yield (
                    f"the update of assignment {update.assignment_id} is not in {assignments.spool}; "
                    "its device will be asked again when the run goes on"
                )
