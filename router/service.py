"""The Inference service: validates, submits, streams, and gives everything back when a client goes."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from proto import inference_pb2, inference_pb2_grpc
from router.dispatcher import Dispatcher
from router.errors import InvalidRequestError, grpc_status
from router.generation import FailedEvent, FinishedEvent, Generation, TokensEvent
from router.output_text import OutputText
from router.validation import RequestValidator

logger = logging.getLogger(__name__)

_REASONS = {
    "stop": inference_pb2.FINISH_REASON_STOP,
    "length": inference_pb2.FINISH_REASON_LENGTH,
    "abort": inference_pb2.FINISH_REASON_ABORT,
}


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """Answers clients. `model_info` and `topology` are what GetModelInfo and GetTopology say."""

    def __init__(
        self,
        *,
        dispatcher: Dispatcher,
        validator: RequestValidator,
        model_info: inference_pb2.GetModelInfoResponse,
        topology: inference_pb2.GetTopologyResponse,
    ) -> None:
        self._dispatcher = dispatcher
        self._validator = validator
        self._model_info = model_info
        self._topology = topology
        self._by_request_id: dict[str, Callable[[], None]] = {}

    async def Generate(
        self,
        request: inference_pb2.GenerateRequest,
        context: "grpc.aio.ServicerContext[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse]",
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        """Streams one generation; a client that cancels, or whose deadline passes, frees all that it held."""
        try:
            # Encoding a long prompt takes seconds, and every other stream lives in this loop.
            checked = await asyncio.to_thread(self._validator.validate, request)
            # Only now: one with the same id may have come meanwhile.
            if request.request_id in self._by_request_id:
                raise InvalidRequestError(f"request_id is {request.request_id!r}: it must not be that of a running one")
            generation = self._dispatcher.submit(checked)
        except Exception as error:  # the edge of the request: one function gives every error its code
            await _abort(context, error)
        request_id = request.request_id or f"{generation.request_id:016x}"
        self._by_request_id[request_id] = lambda: self._dispatcher.abort(generation)
        try:
            text = OutputText(self._validator.text.tokenizer, stop=list(request.sampling.stop))
            async for response in self._stream(generation, text, context):
                response.request_id = request_id
                yield response
        finally:
            del self._by_request_id[request_id]
            self._dispatcher.abort(generation)

    async def Abort(self, request: inference_pb2.AbortRequest, context: Any) -> inference_pb2.AbortResponse:
        """Ends the generation of that id, where one is running."""
        del context
        end = self._by_request_id.get(request.request_id)
        if end is not None:
            end()
        return inference_pb2.AbortResponse(found=end is not None)

    async def GetModelInfo(
        self, request: inference_pb2.GetModelInfoRequest, context: Any
    ) -> inference_pb2.GetModelInfoResponse:
        """The model that is served."""
        del request, context
        return self._model_info

    async def GetTopology(
        self, request: inference_pb2.GetTopologyRequest, context: Any
    ) -> inference_pb2.GetTopologyResponse:
        """The plan that `router check` prints."""
        del request, context
        return self._topology

    async def _stream(
        self, generation: Generation, text: OutputText, context: Any
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        """Deltas, each with all tokens that have come since the one before, then the completion."""
        reason, num_sent = "", 0
        while not reason:
            delta = inference_pb2.Delta()
            event = await generation.events.get()
            while True:
                if isinstance(event, FailedEvent):
                    await _abort(context, event.error)
                elif isinstance(event, FinishedEvent):
                    delta.text += text.finish()
                    reason = event.reason
                else:
                    reason = _add_tokens(delta, event, text)
                if reason or generation.events.empty():
                    break
                event = generation.events.get_nowait()
            num_sent += len(delta.token_ids)
            if delta.token_ids or delta.text:
                yield inference_pb2.GenerateResponse(delta=delta)
        yield inference_pb2.GenerateResponse(complete=_complete(generation, reason=reason, num_sent=num_sent))


def _add_tokens(delta: inference_pb2.Delta, event: TokensEvent, text: OutputText) -> str:
    """Adds tokens and their text up to a stop string; returns the finish reason where one has appeared, else ''."""
    for token_id in event.token_ids:
        delta.token_ids.append(token_id)
        delta.text += text.add(token_id)
        if text.stopped:
            return "stop"
    return ""


def _complete(generation: Generation, *, reason: str, num_sent: int) -> inference_pb2.Complete:
    clock = generation.clock
    handed_off = max(0.0, clock.handed_off_s - clock.first_token_s) if clock.handed_off_s else 0.0
    return inference_pb2.Complete(
        finish_reason=_REASONS[reason],
        usage=inference_pb2.Usage(
            prompt_tokens=len(generation.request.prompt_ids),
            cached_tokens=generation.cached_tokens,
            generated_tokens=num_sent,
        ),
        timings=inference_pb2.Timings(
            queue_s=clock.admitted_s,
            prefill_s=max(0.0, clock.first_token_s - clock.admitted_s),
            handoff_s=handed_off,
            first_token_s=clock.first_token_s,
            total_s=clock.last_token_s,
            handoff_bytes=generation.handoff_bytes,
            handoff_write_s=generation.handoff_write_s,
        ),
    )


async def _abort(context: Any, error: Exception) -> None:
    """Ends the call with the code of `error`; does not return."""
    code, message, trailing = grpc_status(error)
    if code is grpc.StatusCode.INTERNAL:
        logger.error("request failed: %s", message, exc_info=error)
    await context.abort(code, message, trailing)
