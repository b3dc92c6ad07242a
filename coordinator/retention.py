"""What the database may forget: bytes that nothing names any more, and the details of rounds long past."""

from __future__ import annotations

from collections.abc import Set

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pocketfed.coordinator.store import (
    Artifact,
    Assignment,
    Blob,
    Checkpoint,
    Chunk,
    History,
    Release,
    Round,
    Store,
    Update,
)


def delete_blobs(session: Session, digests: Set[str]) -> None:
    """Delete those blobs that nothing names, and those of their chunks that no other blob has."""
    named = set[str]()
    for column in (Round.parameters, Release.parameters, Assignment.parameters, Checkpoint.state):
        named.update(d for d in session.scalars(sa.select(column).where(column.in_(digests)).distinct()) if d)
    for manifest in session.scalars(sa.select(Artifact.manifest)):
        named.update(entry["sha256"] for entry in manifest.get("files", {}).values())
    gone = list(digests - named)
    chunks = {c for held in session.scalars(sa.select(Blob.chunks).where(Blob.digest.in_(gone))) for c in held}
    session.execute(sa.delete(Blob).where(Blob.digest.in_(gone)))
    if chunks:
        shared = {c for held in session.scalars(sa.select(Blob.chunks)) for c in held}
        session.execute(sa.delete(Chunk).where(Chunk.digest.in_(chunks - shared)))


def forget_rounds(store: Store, run_id: int, before: int) -> None:
    """Delete assignments, updates, history and parameters of a run's rounds 1 to `before` - 1; their numbers stay."""
    with store.write() as session:
        past = sa.and_(Assignment.run_id == run_id, Assignment.counted_in < before)
        held = set(session.scalars(sa.select(Assignment.parameters).where(past).distinct()))
        session.execute(sa.delete(Update).where(Update.assignment_id.in_(sa.select(Assignment.id).where(past))))
        session.execute(sa.delete(Assignment).where(past))
        session.execute(sa.delete(History).where(History.run_id == run_id, History.round < before))
        rounds = sa.and_(Round.run_id == run_id, Round.number > 0, Round.number < before, Round.parameters.is_not(None))
        held |= set(session.scalars(sa.select(Round.parameters).where(rounds)))
        session.execute(sa.update(Round).where(rounds).values(parameters=None))
        delete_blobs(session, {digest for digest in held if digest})
