"""Serving manifests and bytes by digest (distribution.proto)."""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator
from typing import Any

import grpc
import sqlalchemy as sa

from pocketfed.coordinator.artifacts import manifest_bytes
from pocketfed.coordinator.batches import Batches
from pocketfed.coordinator.calls import Calls
from pocketfed.coordinator.releases import release_for
from pocketfed.coordinator.signing import newest_list, newest_signature
from pocketfed.coordinator.store import (
    Artifact,
    Blob,
    Chunk,
    Device,
    KeyList,
    Release,
    Signature,
    is_digest,
)
from pocketfed.protos import distribution_pb2 as pb
from pocketfed.protos import distribution_pb2_grpc

log = logging.getLogger("pocketfed.coordinator")
KEPT_BYTES = 64 << 20  # more than the released backbone as int8


def describe_release(session: Any, release: Release) -> pb.Release:
    return pb.Release(
        id=release.id,
        artifact_version=release.artifact_version,
        trainable_set=release.trainable_set,
        parameters_digest=release.parameters,
        parameters_bytes=session.get_one(Blob, release.parameters).bytes,
    )


def describe_signed(row: KeyList | Signature) -> pb.Signed:
    return pb.Signed(statement=row.statement, signature=row.signature)


class DistributionServicer(distribution_pb2_grpc.DistributionServicer):
    def __init__(self, calls: Calls) -> None:
        self.calls = calls
        self._kept = Kept(KEPT_BYTES)
        self._booking: Batches[tuple[int, int], None] = Batches(calls.run, calls.assignments.add_downloads)

    async def GetManifest(self, request: pb.GetManifestRequest, context: Any) -> pb.GetManifestReply:  # noqa: N802
        device_id, channel = await self.calls.authenticate(context)
        if not (request.version or request.channel):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "give a version or a channel")
        reply = await self.calls.run(self._get_manifest, request, device_id, channel)
        if isinstance(reply, str):
            what = (
                f"version {request.version[:80]!r}"
                if request.version
                else f"release on channel {request.channel[:100]!r}"
            )
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no {what}; {reply}")
        return reply  # type: ignore[return-value]  # abort() does not return

    def _get_manifest(self, request: pb.GetManifestRequest, device_id: int, channel: str) -> pb.GetManifestReply | str:
        """The reply, or why there is none."""
        why = "publish one with `pocketfed publish`"
        with self.calls.store.read() as session:
            if not (request.version + request.channel).isprintable():
                return why  # PostgreSQL takes no NUL
            release = None
            if not request.version:
                asks = session.get_one(Device, device_id)
                release, not_yet = release_for(session, request.channel, asks.name, asks.sdk_version)
                why = not_yet or why
            artifact = session.get(Artifact, request.version or (release.artifact_version if release else ""))
            if artifact is None:
                return why
            described = describe_release(session, release) if release else None
            signature = newest_signature(session, request.channel or channel, artifact.version)
            keys = newest_list(session)
            return pb.GetManifestReply(
                manifest=manifest_bytes(artifact.manifest),
                version=artifact.version,
                release=described,
                signed=describe_signed(signature) if signature else None,
                keys=describe_signed(keys) if keys else None,
            )

    async def Download(self, request: pb.DownloadRequest, context: Any) -> AsyncIterator[bytes]:  # noqa: N802
        device_id, _ = await self.calls.authenticate(context)
        if not is_digest(request.digest):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"{request.digest[:80]!r} is not a SHA-256")
        blob = await self.calls.run(self._blob, request.digest)
        if blob is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there are no bytes with SHA-256 {request.digest[:80]!r}")
        chunks, total = blob  # type: ignore[misc]
        if request.first_chunk > len(chunks):
            await context.abort(
                grpc.StatusCode.OUT_OF_RANGE, f"first_chunk is {request.first_chunk}; there are {len(chunks)} chunks"
            )
        sent = 0
        try:
            for digest in chunks[request.first_chunk :]:
                kept = self._kept.get((digest, total))
                held, intact = (kept, True) if kept else await self.calls.run(self._chunk, digest, total)
                if intact:
                    self._kept.put((digest, total), held)
                else:  # the device refuses it, and gets the right one once the database is mended
                    log.error(
                        "chunk %s in the database is damaged; `pocketfed db check` says what it is part of", digest
                    )
                yield held[1]
                sent += held[0]
        finally:
            if sent:
                await self._booking.ask((device_id, sent))

    def _blob(self, digest: str) -> tuple[list[str], int] | None:
        with self.calls.store.read() as session:
            blob = session.get(Blob, digest)
            return None if blob is None else (list(blob.chunks), blob.bytes)

    def _chunk(self, digest: str, total: int) -> tuple[tuple[int, bytes], bool]:
        """How many bytes a chunk has, and its message; and whether it is what its digest says."""
        with self.calls.store.read() as session:
            data = session.scalars(sa.select(Chunk.data).where(Chunk.digest == digest)).one()
        message = pb.DownloadChunk(data=data, digest=digest, total_bytes=total).SerializeToString()
        return (len(data), message), hashlib.sha256(data).hexdigest() == digest


class Kept:
    """The messages sent last, as they go over the wire: the whole fleet fetches the same few megabytes.

    >>> kept = Kept(most=10)
    >>> for name in ("a", "b", "a", "c"):
    ...     kept.put((name, 4), (4, bytes(4)))
    >>> [kept.get((name, 4)) is not None for name in ("a", "b", "c")]
    [True, False, True]
    """

    def __init__(self, most: int) -> None:
        self._most, self._held = most, 0
        self._messages: OrderedDict[tuple[str, int], tuple[int, bytes]] = OrderedDict()

    def get(self, key: tuple[str, int]) -> tuple[int, bytes] | None:
        return self._messages.get(key)

    def put(self, key: tuple[str, int], counted: tuple[int, bytes]) -> None:
        if key not in self._messages:
            self._messages[key] = counted
            self._held += len(counted[1])
        self._messages.move_to_end(key)
        while self._held > self._most:
            _, (_, message) = self._messages.popitem(last=False)
            self._held -= len(message)
