"""Bytes that are no message: answered with INVALID_ARGUMENT and one line of log, where the library has a traceback."""

import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Undecodable:
    """Stands for a message whose bytes could not be read."""

    reason: str


class RefuseUndecodable(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Of every method of a server, whatever streams."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The method's handler with a reader that never fails, before it one that looks at what was read."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_deserializer is None:
            return handler
        kind = ("unary", "stream")[handler.request_streaming] + ("_unary", "_stream")[handler.response_streaming]
        wrap = _streamed if handler.response_streaming else _single
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(
            wrap(getattr(handler, kind), method=str(handler_call_details.method)),
            request_deserializer=_reader(handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )


def _reader(deserialise: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def read(payload: bytes) -> Any:
        try:
            return deserialise(payload)
        except DecodeError as error:
            return _Undecodable(reason=str(error))

    return read


def _single(behaviour: Callable[..., Any], *, method: str) -> Callable[..., Any]:
    async def answer(request: Any, context: Any) -> Any:
        return await behaviour(await _checked(request, context, method=method), context)

    return answer


def _streamed(behaviour: Callable[..., Any], *, method: str) -> Callable[..., Any]:
    if not inspect.isasyncgenfunction(behaviour):  # it writes to its context
        return _single(behaviour, method=method)

    async def answer(request: Any, context: Any) -> AsyncIterator[Any]:
        # Closed with this: a call that ends in the middle gives back what it holds at once.
        async with aclosing(behaviour(await _checked(request, context, method=method), context)) as responses:
            async for response in responses:
                yield response

    return answer


async def _checked(request: Any, context: Any, *, method: str) -> Any:
    """The request, or the stream of requests; the call ends where bytes of it are no message."""
    if hasattr(request, "__aiter__"):
        return _each_checked(request, context, method=method)
    if isinstance(request, _Undecodable):
        logger.info("refused bytes that are no message: method=%s peer=%s", method, context.peer())
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, request.reason)
    return request


async def _each_checked(requests: AsyncIterator[Any], context: Any, *, method: str) -> AsyncIterator[Any]:
    async for request in requests:
        yield await _checked(request, context, method=method)
