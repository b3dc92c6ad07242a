"""Telling devices that the database or the disk is not there now: UNAVAILABLE, so that they keep their work and retry."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from pocketfed.coordinator.leadership import Deposed
from pocketfed.coordinator.store import is_outage

log = logging.getLogger("pocketfed.coordinator")


class Outages(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Without it an outage would be UNKNOWN to a device, as a bug is."""

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        handler = await continuation(details)
        if handler is None:
            return None
        form = {"request_deserializer": handler.request_deserializer}
        form["response_serializer"] = handler.response_serializer
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(_answering(handler.unary_unary), **form)
        if handler.stream_unary:
            return grpc.stream_unary_rpc_method_handler(_answering(handler.stream_unary), **form)
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(_streaming(handler.unary_stream), **form)
        return handler


def _answering(inner: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
    async def answer(request: Any, context: Any) -> Any:
        try:
            return await inner(request, context)
        except Exception as error:
            await _tell(error, context)
            raise

    return answer


def _streaming(inner: Callable[[Any, Any], AsyncIterator[Any]]) -> Callable[[Any, Any], AsyncIterator[Any]]:
    async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            async for message in inner(request, context):
                yield message
        except Exception as error:
            await _tell(error, context)
            raise

    return stream


async def _tell(error: Exception, context: Any) -> None:
    if is_outage(error) or isinstance(error, Deposed):
        log.warning("a call failed: %s", error)
        await context.abort(grpc.StatusCode.UNAVAILABLE, "the coordinator cannot store anything now; try again later")
