"""What lies in the current folder is not what runs: files named as our packages, and as those that ranks use."""

import subprocess
import sys
from pathlib import Path

import grpc
import pytest

from parallel.process.own_packages import PACKAGES
from proto import inference_pb2, inference_pb2_grpc
from tests.harness.checkpoints import Oracle
from tests.harness.router_process import router_command
from tests.harness.running_router import topology

ROOT = Path(__file__).parents[2]


def strangers(folder: Path, *names: str) -> Path:
    """`folder` with a package `proto` and a file for each name; each ends the process that imports it."""
    (folder / "proto").mkdir(parents=True)
    for file in [folder / "proto" / "__init__.py", *(folder / f"{name}.py" for name in names)]:
        file.write_text("raise SystemExit(f'a stranger runs: {__file__}')\n")
    return folder


def test_a_topology_serves_from_a_folder_of_files_named_as_ours(llama: Oracle, tmp_path: Path) -> None:
    """The checkout is not installed: it is found by PYTHONPATH alone, behind the current folder."""
    folder = strangers(tmp_path / "strangers", "parallel", "attention", "moe", "worker", "torch")
    content = topology(llama.folder, pools={"unified": {}}, devices=1, engine={"kv_tokens": 512})
    request = inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=[5, 6, 7]),
        sampling=inference_pb2.SamplingParams(max_new_tokens=4, temperature=0, ignore_eos=True),
    )
    with (
        router_command(content, tmp_path, cwd=folder, environment={"PYTHONPATH": str(ROOT)}) as (_, address),
        grpc.insecure_channel(address) as channel,
    ):
        *_, last = inference_pb2_grpc.InferenceStub(channel).Generate(request)
    assert last.complete.usage.generated_tokens == 4


@pytest.mark.parametrize("command", ["router", "worker"])
def test_a_command_takes_its_own_packages_from_behind_those_of_others(command: str, tmp_path: Path) -> None:
    """As the console scripts are started, with a stranger's folder before ours on the path."""
    folder = strangers(tmp_path / "strangers", *(name for name in PACKAGES if name not in (command, "proto")))
    program = f"from {command}.__main__ import main; main()"
    environment = {"PYTHONPATH": f"{folder}:{ROOT}", "PATH": "/usr/bin:/bin"}
    arguments = [sys.executable, "-P", "-c", program, "--help"]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
