"""The demo: starts `router --config examples/local.yaml`, sends a real prompt through gRPC, prints the streamed answer.

Run by `make demo`. The router is a child process; it is ended, with its launcher and ranks, before this one ends.
"""

import argparse
import signal
import subprocess
import time
from pathlib import Path

import grpc

from parallel.process.address import parse_address
from parallel.process.listening import ListenError, ensure_free
from parallel.process.own_packages import module_command
from proto import inference_pb2, inference_pb2_grpc
from router.client import describe

PROMPT = "What is gravity? Answer in two sentences."
_START_TIMEOUT_S = 300.0


def make_sure_of(to: str) -> None:
    """SystemExit where something listens at `to`: it would answer in the place of what is started here."""
    try:
        ensure_free(parse_address(to))
    except ListenError as error:
        raise SystemExit(str(error)) from None
    except ValueError as error:
        raise SystemExit(f"--to {to} {error}") from None


def wait_until_serving(router: "subprocess.Popen[bytes]", channel: grpc.Channel) -> None:
    """Blocks until the router's health is SERVING; SystemExit where it ends first."""
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    stub = health_pb2_grpc.HealthStub(channel)
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline:
        if router.poll() is not None:
            raise SystemExit(f"the router ended with exit code {router.returncode}; its messages are above")
        try:
            health = stub.Check(health_pb2.HealthCheckRequest(), timeout=2)
            if health.status == health_pb2.HealthCheckResponse.SERVING:
                return
        except grpc.RpcError:
            pass  # the port is not open yet
        time.sleep(0.1)
    raise SystemExit(f"the router does not serve after {_START_TIMEOUT_S:g} s")


def ask(channel: grpc.Channel, prompt: str, *, max_new_tokens: int) -> None:
    """Streams the answer to standard output and its timings after it."""
    request = inference_pb2.GenerateRequest(
        chat=inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role="user", content=prompt)]),
        sampling=inference_pb2.SamplingParams(max_new_tokens=max_new_tokens, temperature=0.0),
    )
    for response in inference_pb2_grpc.InferenceStub(channel).Generate(request):
        if response.WhichOneof("event") == "delta":
            print(response.delta.text, end="", flush=True)
        else:
            print(f"\n\n{describe(response.complete)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve examples/local.yaml and ask it one question.")
    parser.add_argument("--config", default=str(Path(__file__).with_name("local.yaml")))
    parser.add_argument("--to", default="127.0.0.1:30000", help="where that file says the router listens")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    options = parser.parse_args()
    make_sure_of(options.to)
    print("starting a router, a launcher and four ranks (about 15 s)", flush=True)
    started = time.perf_counter()
    router = subprocess.Popen([*module_command("router"), "--config", options.config, "--log-level", "WARNING"])
    try:
        with grpc.insecure_channel(options.to) as channel:
            wait_until_serving(router, channel)
            print(f"ready after {time.perf_counter() - started:.1f} s\n\n> {options.prompt}\n", flush=True)
            ask(channel, options.prompt, max_new_tokens=options.max_new_tokens)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    finally:
        router.send_signal(signal.SIGTERM)
        router.wait(timeout=30)


if __name__ == "__main__":
    main()
