"""Enrolment, check-ins, heartbeats and uploads over gRPC (fleet.proto)."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import math
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any, cast

import grpc
import sqlalchemy as sa
from sqlalchemy.orm import Session

from pocketfed.coordinator import store as tables
from pocketfed.coordinator.assignments import AWAY_S, Header, Receipt, UploadError, portions
from pocketfed.coordinator.batches import Batches
from pocketfed.coordinator.calls import Calls, waited_s
from pocketfed.coordinator.desk import Asked, serve
from pocketfed.coordinator.distribution import describe_release, describe_signed
from pocketfed.coordinator.enrolment import EnrolmentError, enrol
from pocketfed.coordinator.forms import read_form
from pocketfed.coordinator.gate import Refusal
from pocketfed.coordinator.operators import record
from pocketfed.coordinator.releases import open_releases, release_for
from pocketfed.coordinator.reports import hear
from pocketfed.coordinator.signing import newest_list
from pocketfed.coordinator.standing import last_refusal
from pocketfed.coordinator.store import is_outage, now, printable
from pocketfed.protos import fleet_pb2 as pb
from pocketfed.protos import fleet_pb2_grpc

log = logging.getLogger("pocketfed.coordinator")
PROTOCOL = 1
MAX_WAIT_S = 60.0
LOOK_S = 2.0  # how often somebody looks what is new for those that wait, if nothing has said so before
REVOKED = "this device was revoked; ask the operator"
KEYS = object()
TRAIN_CONFIG = frozenset(pb.TrainConfig.DESCRIPTOR.fields_by_name)
_UPLOAD_CODES = {
    "not_found": grpc.StatusCode.NOT_FOUND,
    "invalid": grpc.StatusCode.INVALID_ARGUMENT,
    "out_of_range": grpc.StatusCode.OUT_OF_RANGE,
    "data_loss": grpc.StatusCode.DATA_LOSS,
    "too_large": grpc.StatusCode.RESOURCE_EXHAUSTED,
}
_ENROLMENT_CODES = {
    "invalid": grpc.StatusCode.INVALID_ARGUMENT,
    "exists": grpc.StatusCode.ALREADY_EXISTS,
    "denied": grpc.StatusCode.PERMISSION_DENIED,
}


class FleetServicer(fleet_pb2_grpc.FleetServicer):
    """Made on the server's event loop; `offered` says that there is news, and may be called from any thread.

    One look at the database, a moment after that and every LOOK_S (another process may have published), finds whom of those
    that wait it concerns.
    """

    def __init__(self, calls: Calls) -> None:
        self.calls = calls
        self._loop = asyncio.get_running_loop()
        unknown = functools.partial(Refusal, grpc.StatusCode.UNAUTHENTICATED, REVOKED)
        work = functools.partial(serve, calls.assignments, calls.lease_s, self._answer, unknown)
        self._desk: Batches[Asked, pb.CheckInReply] = Batches(calls.run, work)
        self._counting = Batches[tuple[int, Header], Receipt](
            calls.run, lambda arrived: calls.assignments.count(arrived)
        )
        self._waiting: dict[int, list[asyncio.Event]] = {}  # device id -> its long polls
        self._stirred = asyncio.Event()
        self._refused: set[int] = set()  # releases that devices did not take
        calls.tally.polls = lambda: sum(map(len, list(self._waiting.values())))
        calls.tally.queue = lambda: len(self._desk) + len(self._counting)
        calls.assignments.on_offer.append(self.offered)
        self._looking = self._loop.create_task(self._look())

    def offered(self) -> None:
        # The loop is gone once the server has stopped; then nobody waits either.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._stirred.set)

    def close(self) -> None:
        """All that wait are answered at once."""
        self._looking.cancel()
        self._wake(self._waiting)

    def _wake(self, devices: Iterable[int]) -> None:
        for device_id in devices:
            for news in self._waiting.get(device_id, ()):
                news.set()

    async def _look(self) -> None:
        seen: Any = None
        while True:
            if self._waiting or seen is None:
                try:
                    released, devices = await self.calls.run(self._find_news, list(self._waiting))
                    self._wake(devices if released == seen or seen is None else list(self._waiting))
                    seen = released
                except Exception as error:
                    if not is_outage(error):
                        log.exception("looking for news failed")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stirred.wait(), LOOK_S)
            self._stirred.clear()

    def _find_news(self, waiting: Sequence[int]) -> tuple[Any, set[int]]:
        """What is released (those that wait hear of another), and which of these devices have work or were revoked."""
        with self.calls.store.read() as session:
            released = (
                session.scalar(sa.select(sa.func.max(tables.ReleaseEvent.id))),  # a new one, and each step it takes
                session.scalar(sa.select(sa.func.max(tables.KeyList.sequence))),
            )
            devices = self.calls.assignments.offered_to(session)
            for some in portions(waiting):
                gone = sa.select(tables.Device.id).where(tables.Device.id.in_(some))
                devices.update(session.scalars(gone.where(tables.Device.revoked_at.is_not(None))))
        return released, devices

    async def _require_protocol(self, protocol: int, context: Any) -> None:
        if protocol != PROTOCOL:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"protocol {protocol} is not spoken here, only {PROTOCOL}; update the app",
            )

    async def Enrol(self, request: pb.EnrolRequest, context: Any) -> pb.EnrolReply:  # noqa: N802
        await self._require_protocol(request.protocol, context)
        try:
            await self.calls.run(
                enrol,
                self.calls.store,
                request.name,
                request.channel,
                request.sdk_version,
                request.token,
                request.enrolment_key,
                self.calls.enrolment_key,
                self.calls.key_needed,
            )
        except EnrolmentError as error:
            await context.abort(_ENROLMENT_CODES[error.kind], str(error))
        return pb.EnrolReply()

    async def CheckIn(self, request: pb.CheckInRequest, context: Any) -> pb.CheckInReply:  # noqa: N802
        device_id, channel = await self.calls.authenticate(context)
        await self._require_protocol(request.protocol, context)
        wait_s = min(MAX_WAIT_S, max(0.0, request.wait_s)) if math.isfinite(request.wait_s) else 0.0
        end = self._loop.time() + wait_s
        if request.HasField("report") and await self.calls.run(hear, self.calls.store, device_id, request):
            self.offered()  # what some devices get has changed
        if request.refused_release and request.refused_release not in self._refused:
            await self.calls.run(self._note_refusal, device_id, request.refused_release, request.refusal)
        asked, news, answered = Asked(device_id, channel, request, wait_s + AWAY_S), asyncio.Event(), False
        self._waiting.setdefault(device_id, []).append(news)
        keys: bytes | None = None  # that the first look found: a device that refuses them is not told in haste
        try:
            while True:
                news.clear()
                reply = await self._desk.ask(asked)
                keys = bytes(reply.keys.statement) if keys is None else keys
                left = end - self._loop.time()
                answered = reply.HasField("assignment") or reply.HasField("release") or left <= 0
                answered = answered or bytes(reply.keys.statement) != keys
                if answered:
                    return reply
                if not self.calls.stopping:
                    began = self._loop.time()
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(news.wait(), left)
                    waited_s.set(waited_s.get() + self._loop.time() - began)
                if self.calls.stopping:
                    answered = True
                    return pb.CheckInReply(wait=pb.Wait(retry_after_s=1.0, reason="the coordinator is stopping"))
                asked = dataclasses.replace(asked, stays_s=None)
        finally:  # also when the device has gone: its connection's end cancels this call
            self._waiting[device_id].remove(news)
            if not self._waiting[device_id]:
                del self._waiting[device_id]
                if not answered and not self.calls.stopping:
                    gone = self._desk.ask(Asked(device_id, channel, None, 0.0))
                    gone.add_done_callback(asyncio.Future.exception)  # its time ends by itself a little later

    def _answer(
        self, session: Session, asked: Asked, found: tables.Assignment | None, offended: bool
    ) -> pb.CheckInReply:
        request = cast(pb.CheckInRequest, asked.request)
        reply = pb.CheckInReply(wait=pb.Wait(reason="there is no work for this device now"))
        known = session.info  # one for all check-ins of the transaction
        if asked.channel not in known:
            known[asked.channel] = open_releases(session, asked.channel)
        device = session.get_one(tables.Device, asked.device_id)
        release, why_not = release_for(
            session,
            asked.channel,
            device.name,
            request.sdk_version,
            request.release_id,
            device.release_id,
            known[asked.channel],
        )
        if release is not None:
            reply.release.CopyFrom(describe_release(session, release))
        if KEYS not in known:
            known[KEYS] = newest_list(session)
        keys = known[KEYS]
        if keys is not None and keys.sequence > request.key_list:
            reply.keys.MergeFrom(describe_signed(keys))
        if found is not None:
            reply.assignment.CopyFrom(self._describe(session, found))
        elif offended and (why := last_refusal(session, asked.device_id)):
            reply.wait.reason += f"; {why}"
        if found is None and why_not:
            reply.wait.reason += f"; {why_not}"
        return reply

    def _note_refusal(self, device_id: int, release_id: int, why: str) -> None:
        with self.calls.store.write() as session:
            device = session.get_one(tables.Device, device_id)
            release = session.get(tables.Release, release_id) if release_id < 1 << 31 else None
            if release is not None and device.revoked_at is None:
                self._refused.add(release_id)  # the first device that says so is enough
                record(
                    session, device.name, "release.refused", f"{release_id} {release.artifact_version}", "noticed", why
                )
                told = {"device": device.name, "release": release_id}
                log.warning(
                    "device %s refused release %d: %s", device.name, release_id, printable(why, 500), extra=told
                )

    def _describe(self, session: Any, found: tables.Assignment) -> pb.Assignment:
        run = session.get_one(tables.Run, found.run_id)
        # A Flower strategy's own (proximal-mu) stand for the run's (proximal_mu), in whatever order a database keeps them.
        own_last = sorted(found.config.items(), key=lambda item: "-" in item[0])
        config = {k.replace("-", "_"): v for k, v in own_last}
        form = {k.removeprefix("update."): v for k, v in found.config.items() if k.startswith("update.")}
        deadline_s = (found.deadline - now()).total_seconds() if found.deadline else 86400.0
        return pb.Assignment(
            id=found.id,
            kind=pb.Assignment.TRAIN if found.kind == "train" else pb.Assignment.EVALUATE,
            run=run.id,
            round=found.round,
            artifact_version=run.artifact_version,
            trainable_set=run.trainable_set,
            parameters_digest=found.parameters,
            parameters_bytes=session.get_one(tables.Blob, found.parameters).bytes,
            config=pb.TrainConfig(**{k: v for k, v in config.items() if k in TRAIN_CONFIG}),
            lease_s=self.calls.lease_s,
            deadline_s=max(0.0, deadline_s),
            form=pb.UpdateForm(**form) if form else None,
        )

    async def Heartbeat(self, request: pb.HeartbeatRequest, context: Any) -> pb.HeartbeatReply:  # noqa: N802
        device_id, _ = await self.calls.authenticate(context)
        known = request.phase in pb.HeartbeatRequest.Phase.values()
        phase = pb.HeartbeatRequest.Phase.Name(request.phase).lower() if known else "unknown"
        try:
            alive = await self.calls.run(
                self.calls.assignments.heartbeat,
                device_id,
                request.assignment_id,
                phase,
                request.progress,
                self.calls.lease_s,
            )
        except UploadError as error:
            await context.abort(_UPLOAD_CODES[error.kind], str(error))
        return pb.HeartbeatReply(cancelled=not alive)

    async def Decline(self, request: pb.DeclineRequest, context: Any) -> pb.DeclineReply:  # noqa: N802
        device_id, _ = await self.calls.authenticate(context)
        try:
            await self.calls.run(
                self.calls.assignments.decline, device_id, request.assignment_id, request.reason or "declined"
            )
        except UploadError as error:
            await context.abort(_UPLOAD_CODES[error.kind], str(error))
        return pb.DeclineReply()

    async def GetUploadStatus(self, request: pb.UploadStatusRequest, context: Any) -> pb.UploadStatusReply:  # noqa: N802
        device_id, _ = await self.calls.authenticate(context)
        try:
            count, receipt = await self.calls.run(self.calls.assignments.received, device_id, request.assignment_id)
        except UploadError as error:
            await context.abort(_UPLOAD_CODES[error.kind], str(error))
        described = (
            None
            if receipt is None
            else pb.Receipt(assignment_id=request.assignment_id, accepted=receipt.accepted, reason=receipt.reason)
        )
        return pb.UploadStatusReply(received_bytes=count, receipt=described)

    async def Upload(self, request_iterator: AsyncIterator[pb.UploadPart], context: Any) -> pb.Receipt:  # noqa: N802
        device_id, _ = await self.calls.authenticate(context)
        header: Any = None  # Header, once it has come
        try:
            async for part in request_iterator:
                if header is None:
                    header = await self._read_header(part, context)
                    limit = await self.calls.run(self._limit_bytes, header.assignment_id)
                    done = await self.calls.run(self.calls.assignments.check_header, device_id, header, limit)
                    if done is not None:
                        return pb.Receipt(
                            assignment_id=header.assignment_id, accepted=done.accepted, reason=done.reason
                        )
                elif part.WhichOneof("part") == "data":
                    await self.calls.run(self.calls.assignments.append, header, part.data)
            if header is None:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "an upload begins with a header")
            await self.calls.run(self.calls.assignments.check_arrived, header)
            receipt = await self._counting.ask((device_id, header))
        except UploadError as error:
            await context.abort(_UPLOAD_CODES[error.kind], str(error))
        return pb.Receipt(assignment_id=header.assignment_id, accepted=receipt.accepted, reason=receipt.reason)

    async def _read_header(self, part: pb.UploadPart, context: Any) -> Header:
        if part.WhichOneof("part") != "header":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "an upload begins with a header")
        h = part.header
        return Header(
            h.assignment_id, h.total_bytes, h.digest, h.offset, min(h.num_examples, 2**31 - 1), dict(h.metrics)
        )

    def _limit_bytes(self, assignment_id: str) -> int:
        """The most bytes that an update for this assignment can have."""
        with self.calls.store.read() as session:
            found = session.get(tables.Assignment, assignment_id) if assignment_id.isprintable() else None
            if found is None:
                raise UploadError("not_found", f"there is no assignment {assignment_id[:100]!r}")
            if found.kind == "evaluate":
                return 0
            run = session.get_one(tables.Run, found.run_id)
            manifest = session.get_one(tables.Artifact, run.artifact_version).manifest
            return read_form(run.config, manifest["trainable_sets"][run.trainable_set], found.config).most_bytes
