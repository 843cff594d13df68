"""The Inference service: validates, submits, streams, and gives everything back when a client goes."""

import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from functools import partial
from typing import Any

import grpc

from proto import inference_pb2, inference_pb2_grpc
from router.calls import Call, Calls
from router.dispatcher import Dispatcher
from router.errors import ModelFailedError, grpc_status
from router.generation import FailedEvent, FinishedEvent, Generation, TokensEvent
from router.output_text import OutputText
from router.tokenising import Tokenising
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
        tokenising: Tokenising,
        model_info: inference_pb2.GetModelInfoResponse,
        topology: inference_pb2.GetTopologyResponse,
    ) -> None:
        self._dispatcher = dispatcher
        self._validator = validator
        self._model_info = model_info
        self._topology = topology
        self._tokenising = tokenising
        self._calls = Calls()

    async def Generate(
        self,
        request: inference_pb2.GenerateRequest,
        context: "grpc.aio.ServicerContext[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse]",
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        """Streams one generation; a client that cancels, or whose deadline passes, frees all that it held."""
        try:
            with self._calls.accepted(request.request_id) as call:
                # Closed with this: what ends the call in the middle gives everything back at once.
                async with aclosing(self._answer(request, call)) as responses:
                    async for response in responses:
                        response.request_id = call.request_id
                        yield response
        except Exception as error:  # the edge of the request: one function gives every error its code
            await _abort(context, await self._dispatcher.cause(error))

    async def Abort(self, request: inference_pb2.AbortRequest, context: Any) -> inference_pb2.AbortResponse:
        """Ends the generation of that id, where one is running."""
        del context
        return inference_pb2.AbortResponse(found=self._calls.abort(request.request_id))

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

    async def _answer(
        self, request: inference_pb2.GenerateRequest, call: Call
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        """Everything that a client gets for a call; raises what ends it."""
        validate = partial(self._validator.validate, request)
        checked = await call.unless_aborted(self._tokenising.run(validate, num_bytes=_text_bytes(request)))
        if checked is None:
            yield inference_pb2.GenerateResponse(
                complete=inference_pb2.Complete(finish_reason=inference_pb2.FINISH_REASON_ABORT)
            )
            return
        generation = self._dispatcher.submit(checked)
        call.ends_by(partial(self._dispatcher.abort, generation))
        try:
            # An answer begins a text of its own; what continues a prompt goes on from it.
            continued = () if request.HasField("chat") else checked.prompt_ids
            tokens = self._validator.text.output_tokens
            text = OutputText(tokens, stop=list(request.sampling.stop), prompt_ids=continued)
            async for response in _stream(generation, text):
                yield response
        finally:
            self._dispatcher.abort(generation)


def _text_bytes(request: inference_pb2.GenerateRequest) -> int:
    """Bytes that are to be tokenised, about."""
    return 0 if request.HasField("token_ids") else request.ByteSize()


async def _stream(generation: Generation, text: OutputText) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
    """Deltas, each with all tokens that have come since the one before, then the completion."""
    reason, num_sent = "", 0
    while not reason:
        delta = inference_pb2.Delta()
        event = await generation.events.get()
        while True:
            if isinstance(event, FailedEvent):
                raise event.error
            if isinstance(event, FinishedEvent):
                delta.text += text.finish()
                reason = "stop" if text.stopped else event.reason
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
    if code is grpc.StatusCode.INTERNAL and not isinstance(error, ModelFailedError):
        logger.error("request failed: %s", message, exc_info=error)
    await context.abort(code, message, trailing)
