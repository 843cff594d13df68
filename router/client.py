"""The client on the command line: streams one generation's text and prints its timings."""

import asyncio
import sys

import grpc

from proto import inference_pb2, inference_pb2_grpc

_NOT_REACHED = ("failed to connect", "errors resolving")


async def generate(address: str, request: inference_pb2.GenerateRequest) -> int:
    """Streams the text to standard output, the rest to standard error; returns the exit code."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        try:
            async for response in stub.Generate(request):
                if response.WhichOneof("event") == "delta":
                    print(response.delta.text, end="", flush=True)
                else:
                    print(flush=True)
                    print(describe(response.complete), file=sys.stderr)
        except grpc.aio.AioRpcError as error:
            print(f"\n{_sentence(error, address=address)}", file=sys.stderr)
            return 1
        except asyncio.CancelledError:
            print("\ncancelled", file=sys.stderr)
            return 130
    return 0


def _sentence(error: grpc.aio.AioRpcError, *, address: str) -> str:
    """What a router said as it is; what gRPC says of one that it did not reach, with a remedy."""
    details = error.details() or ""
    if error.code() is grpc.StatusCode.UNAVAILABLE and details.startswith(_NOT_REACHED):
        return f"no router answers at {address}: start one, or name another with --to ({details})"
    return f"{error.code().name}: {details}"


def describe(complete: inference_pb2.Complete) -> str:
    """Usage and timings in one line each."""
    usage, timings = complete.usage, complete.timings
    reason = inference_pb2.FinishReason.Name(complete.finish_reason).removeprefix("FINISH_REASON_").lower()
    decode_s = timings.total_s - timings.first_token_s
    rate = f"{(usage.generated_tokens - 1) / decode_s:.1f} tokens/s" if decode_s > 0 else "one token"
    return (
        f"{usage.prompt_tokens} prompt tokens, {usage.generated_tokens} generated, finished by {reason}\n"
        f"queue {timings.queue_s * 1e3:.0f} ms, prefill {timings.prefill_s * 1e3:.0f} ms, "
        f"hand-off {timings.handoff_s * 1e3:.0f} ms, first token at {timings.first_token_s * 1e3:.0f} ms, "
        f"all at {timings.total_s * 1e3:.0f} ms, {rate}"
    )
