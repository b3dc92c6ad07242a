"""Enrolment, check-ins, heartbeats and uploads over gRPC (fleet.proto)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncIterator
from typing import Any

import grpc

from pocketfed.coordinator import store as tables
from pocketfed.coordinator.assignments import AWAY_S, Header, UploadError
from pocketfed.coordinator.calls import Calls
from pocketfed.coordinator.distribution import describe_release, describe_signed
from pocketfed.coordinator.enrolment import EnrolmentError, enrol, is_revoked, mark_gone, mark_seen
from pocketfed.coordinator.forms import read_form
from pocketfed.coordinator.gate import Refusal
from pocketfed.coordinator.operators import record
from pocketfed.coordinator.releases import release_for
from pocketfed.coordinator.reports import hear
from pocketfed.coordinator.signing import newest_list
from pocketfed.coordinator.standing import last_refusal
from pocketfed.coordinator.store import now, printable
from pocketfed.protos import fleet_pb2 as pb
from pocketfed.protos import fleet_pb2_grpc

log = logging.getLogger("pocketfed.coordinator")
PROTOCOL = 1
MAX_WAIT_S = 60.0
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
    """Made on the server's event loop; `offered` wakes all long polls and may be called from any thread."""

    def __init__(self, calls: Calls) -> None:
        self.calls = calls
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._refused: set[int] = set()  # releases that devices did not take
        self._runs: dict[int, tuple[int, int]] = {}  # what devices run, as they said last: written down when it changes
        calls.assignments.on_offer.append(self.offered)

    def offered(self) -> None:
        # The loop is gone once the server has stopped; then nobody waits either.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

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
        device_id, _ = await self.calls.authenticate(context)
        await self._require_protocol(request.protocol, context)
        wait_s = min(MAX_WAIT_S, max(0.0, request.wait_s)) if math.isfinite(request.wait_s) else 0.0
        end = self._loop.time() + wait_s
        stays_s = wait_s + AWAY_S
        await self.calls.run(mark_seen, self.calls.store, device_id, request.examples, request.sdk_version, stays_s)
        runs = (request.release_id, request.refused_release)
        if request.HasField("report") or self._runs.get(device_id) != runs:
            if await self.calls.run(hear, self.calls.store, device_id, request):
                self.offered()  # what some devices get has changed
            if len(self._runs) >= self.calls.limits.peers:
                self._runs.clear()
            self._runs[device_id] = runs
        if request.refused_release and request.refused_release not in self._refused:
            await self.calls.run(self._note_refusal, device_id, request.refused_release, request.refusal)
        self.calls.asking[device_id] += 1
        answered = False
        try:
            await self.calls.run(
                self.calls.assignments.notify_changed
            )  # whoever waits holds its lock while asking the store
            while True:
                news = self._news
                reply = await self.calls.run(self._answer, device_id, request)
                left = end - self._loop.time()
                answered = reply.HasField("assignment") or reply.HasField("release") or left <= 0
                if answered:
                    return reply
                if self.calls.stopping:
                    answered = True
                    return pb.CheckInReply(wait=pb.Wait(retry_after_s=1.0, reason="the coordinator is stopping"))
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(news.wait(), left)
        finally:  # also when the device has gone: its connection's end cancels this call
            self.calls.asking[device_id] -= 1
            if not self.calls.asking[device_id]:
                del self.calls.asking[device_id]
                if not answered:
                    self._loop.run_in_executor(self.calls.threads, self._mark_gone, device_id)

    def _mark_gone(self, device_id: int) -> None:
        with contextlib.suppress(*tables.OUTAGES, tables.StoreError):  # it ends by itself a little later
            mark_gone(self.calls.store, device_id)

    def _answer(self, device_id: int, request: pb.CheckInRequest) -> pb.CheckInReply:
        """
        Raises:
            Refusal: the device was revoked, be it while it waited.
        """
        reply = pb.CheckInReply(wait=pb.Wait(reason="there is no work for this device now"))
        with self.calls.store.read() as session:
            if is_revoked(session, device_id):
                raise Refusal(grpc.StatusCode.UNAUTHENTICATED, "this device was revoked; ask the operator")
        found = self.calls.assignments.next_for(device_id, self.calls.lease_s)
        with self.calls.store.read() as session:
            device = session.get_one(tables.Device, device_id)
            known, sdk = request.release_id, request.sdk_version
            release, why_not = release_for(session, device.channel, device.name, sdk, known, device.release_id)
            if release is not None:
                reply.release.CopyFrom(describe_release(session, release))
            keys = newest_list(session)
            if keys is not None and keys.sequence > request.key_list:
                reply.keys.MergeFrom(describe_signed(keys))
            if found is not None:
                reply.assignment.CopyFrom(self._describe(session, found))
            elif why := last_refusal(session, device_id):
                reply.wait.reason += f"; {why}"
            if found is None and why_not:
                reply.wait.reason += f"; {why_not}"
        return reply

    def _note_refusal(self, device_id: int, release_id: int, why: str) -> None:
        with self.calls.store.write() as session:
            device = session.get_one(tables.Device, device_id)
            release = session.get(tables.Release, release_id) if release_id < 1 << 31 else None
            if release is not None:
                self._refused.add(release_id)  # the first device that says so is enough
                record(
                    session, device.name, "release.refused", f"{release_id} {release.artifact_version}", "noticed", why
                )
                log.warning("device %s refused release %d: %s", device.name, release_id, printable(why, 500))

    def _describe(self, session: Any, found: tables.Assignment) -> pb.Assignment:
        run = session.get_one(tables.Run, found.run_id)
        fields = {f.name: f for f in pb.TrainConfig.DESCRIPTOR.fields}
        config = {k.replace("-", "_"): v for k, v in found.config.items()}
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
            config=pb.TrainConfig(**{k: v for k, v in config.items() if k in fields}),
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
            receipt = await self.calls.run(self.calls.assignments.finish, device_id, header)
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
            return read_form(run.config, manifest["trainable_sets"][run.trainable_set]).most_bytes
