"""What may be loaded where: no torch in a router that has served a chat, nor in a launcher; `proto` is ours."""

import subprocess
import sys
from pathlib import Path

import pytest

import proto

ROUTER = """
import asyncio, sys
from pathlib import Path
import grpc, yaml
from rich.console import Console
import router.cli
from proto import inference_pb2, inference_pb2_grpc
from router.check import check_file
from router.errors import ClusterError
from router.server import RouterServer

content = yaml.safe_load(Path("examples/local.yaml").read_text())
path = Path(sys.argv[1]) / "topo.yaml"
path.write_text(yaml.safe_dump({**content, "listen": "127.0.0.1:0"}))

async def serve():
    server = RouterServer(check_file(path), launcher_arguments=("--mock",))
    await server.start(Console(stderr=True))
    async with grpc.aio.insecure_channel(server.address) as channel:
        chat = inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role="user", content="hello")])
        sampling = inference_pb2.SamplingParams(max_new_tokens=5)
        stub = inference_pb2_grpc.InferenceStub(channel)
        responses = [r async for r in stub.Generate(inference_pb2.GenerateRequest(chat=chat, sampling=sampling))]
    assert responses[-1].complete.usage.generated_tokens == 5
    await server.stop(ClusterError("done"))

asyncio.run(serve())
print("torch" in sys.modules)
"""
LAUNCHER = """
import sys
import worker.cli, worker.launcher.server
print("torch" in sys.modules)
"""


@pytest.mark.parametrize("program", [ROUTER, LAUNCHER], ids=["router", "launcher"])
def test_torch_is_loaded_in_ranks_only(program: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "False"


def test_proto_is_our_own_package() -> None:
    assert Path(str(proto.__file__)).parent == Path("proto").resolve()
