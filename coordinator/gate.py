"""The gate before every call: who is it, how often, how many at once, how long may it take, and is it a message at all.

On the wire a call with one request looks like one with a stream of them, so every method is registered as the latter and
the request is read here: with a time limit, after the caller is known, and what does not parse is told as such.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass
from grpc import StatusCode

from pocketfed.coordinator.batches import Batches
from pocketfed.coordinator.calls import Caller, Calls, caller, waited_s
from pocketfed.coordinator.enrolment import MAX_TOKEN, MIN_TOKEN, authenticate, hash_token
from pocketfed.coordinator.leadership import Deposed
from pocketfed.coordinator.limits import ENROL_BYTES, address_of
from pocketfed.coordinator.operators import record
from pocketfed.coordinator.store import Device, Store, is_outage, now

ENROL = "Enrol"
OPEN_TO_ALL = {ENROL: "enrolments", "Check": "questions for the health"}  # methods that need no credential
LOOKS_BY_ITSELF = "CheckIn"  # asks the store whether the device is known, in the transaction that it needs anyway
INSTANCE = "pocketfed-instance"  # metadata: which process of the device is calling
RETRY_AFTER = "retry-after-s"  # trailing metadata: when a call that came too soon may come again
SHARED_AGAIN = timedelta(hours=1)  # a credential in use at two places is written down once in so long

T = TypeVar("T")
log = logging.getLogger("pocketfed.coordinator")


class Refusal(Exception):  # noqa: N818 - an answer
    """Ends a call with a status; `retry_after_s` is told in the trailing metadata."""

    def __init__(self, code: StatusCode, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.code, self.retry_after_s = code, retry_after_s


class Gate:
    """Lets calls through to the servicers that are added to a server with `add`."""

    def __init__(self, calls: Calls) -> None:
        self.calls, self.limits = calls, calls.limits
        # Hashes of tokens that were right, and whose they are. Looked up all the same, once in every call.
        self._right: OrderedDict[str, Caller | None] = OrderedDict()
        self._credentials = Batches[str, tuple[int, str] | None](calls.run, partial(authenticate, calls.store))
        self._open: Counter[int] = Counter()  # device id -> calls under way
        self._transfers: Counter[int] = Counter()  # device id -> uploads and downloads under way

    def add(self, server: grpc.aio.Server, service: Any, servicer: Any, open_to_all: Collection[str] = ()) -> None:
        """Register a service (its descriptor) with the object that has its methods.

        open_to_all: methods that need no credential; the only ones of the service that are served, if there are any.
        """
        handlers = {}
        for method in service.methods:
            if open_to_all and method.name not in open_to_all:
                continue
            target = getattr(servicer, method.name)
            if method.server_streaming:
                handlers[method.name] = grpc.stream_stream_rpc_method_handler(self._many_replies(method, target))
            else:
                handlers[method.name] = grpc.stream_unary_rpc_method_handler(self._one_reply(method, target))
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))

    def _one_reply(self, method: Any, target: Any) -> Callable[[AsyncIterator[bytes], Any], Awaitable[bytes]]:
        async def answer(raw: AsyncIterator[bytes], context: Any) -> bytes:
            with self._counted(await self._admit(method.name, context), method.client_streaming):
                if method.client_streaming:
                    parts = self._parts(raw, method)
                    return self._sent(await _within(self.limits.transfer_s, target(parts, context)))
                request = await self._one(raw, method)
                try:
                    reply = await target(request, context)
                except Refusal as refusal:
                    if refusal.code is StatusCode.UNAUTHENTICATED:
                        self._right.pop(caller.get().token_hash, None)
                    raise
                if method.name == ENROL:
                    self._remember(hash_token(request.token), None)
                return self._sent(reply)

        async def handle(raw: AsyncIterator[bytes], context: Any) -> bytes:  # gRPC asks for a function with `async`
            return await self._told(method.name, answer(raw, context), context)

        return handle

    def _many_replies(self, method: Any, target: Any) -> Callable[[AsyncIterator[bytes], Any], Awaitable[None]]:
        async def answer(raw: AsyncIterator[bytes], context: Any) -> None:
            with self._counted(await self._admit(method.name, context), transfer=True):
                request = await self._one(raw, method)
                await _within(self.limits.transfer_s, self._send(target(request, context), context))

        async def handle(raw: AsyncIterator[bytes], context: Any) -> None:
            await self._told(method.name, answer(raw, context), context)

        return handle

    # ---- who, and how often ------------------------------------------------------------------------------------------

    async def _admit(self, method: str, context: Any) -> int | None:
        """The caller's device id, None for one that enrols. Nothing of the request has been read by then."""
        address = address_of(context.peer())
        if method in OPEN_TO_ALL:
            _require(self.calls.doubtful.take(address), f"{OPEN_TO_ALL[method]} from this address")
            return None
        metadata = dict(context.invocation_metadata() or ())
        given = metadata.get("authorization", "")
        token = given.removeprefix("Bearer ") if isinstance(given, str) else ""
        digest = hash_token(token)
        if digest in self._right:
            _require(self.calls.of_credential.take(digest), "calls of this device")
        else:
            _require(self.calls.doubtful.wait_s(address), "calls with unknown tokens from this address")
        known = self._right.get(digest) if method == LOOKS_BY_ITSELF else None
        if known is None:
            usable = MIN_TOKEN <= len(token) <= MAX_TOKEN
            found = await self._credentials.ask(digest) if usable else None
            if found is None:
                self._right.pop(digest, None)
                self.calls.doubtful.take(address)
                raise Refusal(
                    StatusCode.UNAUTHENTICATED,
                    "this device is not known here; enrol it (again), with a new home folder",
                )
            known = Caller(*found, digest)
        self._remember(digest, known)
        caller.set(known)
        if self.calls.places.shared(known.device_id, str(metadata.get(INSTANCE, ""))[:64]):
            await self.calls.run(_note_shared, self.calls.store, known.device_id)
        return known.device_id

    def _remember(self, digest: str, whose: Caller | None) -> None:
        self._right[digest] = whose
        self._right.move_to_end(digest)
        if len(self._right) > self.limits.peers:
            self._right.popitem(last=False)

    @contextmanager
    def _counted(self, device_id: int | None, transfer: bool) -> Iterator[None]:
        """A place among the calls that a device, and all devices together, may have open."""
        if device_id is None:
            yield
            return
        counters = [(self._open, self.limits.calls_open)]
        if transfer:
            if self._transfers.total() >= self.limits.transfers_at_once:
                raise Refusal(StatusCode.RESOURCE_EXHAUSTED, "all places for transfers are taken; try again", 2.0)
            counters.append((self._transfers, self.limits.transfers_open))
        if any(counter[device_id] >= most for counter, most in counters):
            raise Refusal(StatusCode.RESOURCE_EXHAUSTED, "this device has too many calls open; end some", 1.0)
        for counter, _ in counters:
            counter[device_id] += 1
        try:
            yield
        finally:
            for counter, _ in counters:
                counter[device_id] -= 1
                if not counter[device_id]:
                    del counter[device_id]

    # ---- reading -----------------------------------------------------------------------------------------------------

    async def _one(self, raw: AsyncIterator[bytes], method: Any) -> Any:
        data = await self._next(raw, self.limits.request_s)
        if data is None:
            raise Refusal(StatusCode.INVALID_ARGUMENT, f"{method.name} came without a request")
        if method.name in OPEN_TO_ALL and len(data) > ENROL_BYTES:
            raise Refusal(StatusCode.INVALID_ARGUMENT, f"a request of {len(data)} bytes is more than {ENROL_BYTES}")
        return _parse(method, data)

    async def _parts(self, raw: AsyncIterator[bytes], method: Any) -> AsyncIterator[Any]:
        while (data := await self._next(raw, self.limits.part_s)) is not None:
            if not data:
                raise Refusal(StatusCode.INVALID_ARGUMENT, "a part of the upload is empty")
            yield _parse(method, data)

    async def _next(self, raw: AsyncIterator[bytes], limit_s: float) -> bytes | None:
        try:
            async with asyncio.timeout(limit_s):
                data = await anext(aiter(raw), None)
        except TimeoutError:
            raise Refusal(StatusCode.DEADLINE_EXCEEDED, f"nothing came for {limit_s:g} s; begin again") from None
        self.calls.tally.bytes_in += len(data or b"")
        return data

    # ---- answering ---------------------------------------------------------------------------------------------------

    def _sent(self, reply: Any) -> bytes:
        data = reply if isinstance(reply, bytes) else bytes(reply.SerializeToString())
        self.calls.tally.bytes_out += len(data)
        return data

    async def _send(self, replies: Any, context: Any) -> None:
        try:
            async for reply in replies:
                await context.write(self._sent(reply))
        finally:
            await replies.aclose()

    async def _told(self, method: str, work: Awaitable[T], context: Any) -> T:
        """Faults as statuses; what is unexpected is logged here and not shown to a peer."""
        code, began = "OK", time.perf_counter()
        try:
            return await work
        except Refusal as refusal:
            code = refusal.code.name
            trailing = ((RETRY_AFTER, f"{refusal.retry_after_s:.2f}"),) if refusal.retry_after_s else ()
            await context.abort(refusal.code, str(refusal), trailing)
        except grpc.aio.AbortError:
            code = _name(context.code())
            raise
        except asyncio.CancelledError:
            code = StatusCode.CANCELLED.name
            raise
        except grpc.aio.BaseError:  # gRPC's own: the peer has gone
            code = StatusCode.CANCELLED.name
            raise asyncio.CancelledError from None
        except Exception as error:
            if is_outage(error) or isinstance(error, Deposed):
                code = StatusCode.UNAVAILABLE.name
                log.warning("a call failed: %s", error, extra={"rpc": method})
                await context.abort(
                    StatusCode.UNAVAILABLE, "the coordinator cannot store anything now; try again later"
                )  # so that devices keep their work and come again
            code = StatusCode.INTERNAL.name
            log.exception("a call failed", extra={"rpc": method})
            await context.abort(StatusCode.INTERNAL, "the coordinator failed; its log says more")
        finally:
            self.calls.tally.called(method, code, time.perf_counter() - began - waited_s.get())
        raise AssertionError("abort() does not return")


def _name(code: Any) -> str:
    """A status code's name: gRPC tells what a servicer has set as a number."""
    return next((known.name for known in StatusCode if code in (known, known.value[0])), "UNKNOWN")


def _require(wait_s: float, what: str) -> None:
    if wait_s:
        raise Refusal(StatusCode.RESOURCE_EXHAUSTED, f"too many {what}; try again in {wait_s:.1f} s", wait_s)


def _parse(method: Any, data: bytes) -> Any:
    try:
        return GetMessageClass(method.input_type).FromString(data)
    except DecodeError:
        raise Refusal(StatusCode.INVALID_ARGUMENT, f"{len(data)} bytes are not a {method.input_type.name}") from None


async def _within(limit_s: float, work: Awaitable[T]) -> T:
    try:
        async with asyncio.timeout(limit_s):
            return await work
    except TimeoutError:
        raise Refusal(StatusCode.DEADLINE_EXCEEDED, f"not done after {limit_s:g} s; go on with another call") from None


def _note_shared(store: Store, device_id: int) -> None:
    with store.write() as session:
        device = session.get_one(Device, device_id)
        if device.shared_at is None or now() - device.shared_at > SHARED_AGAIN:
            device.shared_at = now()
            told = (
                "two processes use it in turns: copied home folder, or stolen token; `pocketfed devices revoke` ends it"
            )
            record(session, device.name, "credential.shared", device.name, "noticed", told)
            log.warning("the credential of %s is in use at two places", device.name, extra={"device": device.name})
