"""What may be loaded where: no torch in a router that has served a chat, nor in a launcher; `proto` is our own."""

import subprocess
import sys
from pathlib import Path

import pytest

import proto

ROUTER = """
import sys
from pathlib import Path
from router.check import check_file
from router.text import ModelText
import router.server, router.cli
text = ModelText(Path(".cache/models/smollm2-135m-mixtral"))
assert text.encode_chat([{"role": "user", "content": "hello"}])
assert check_file(Path("examples/local.yaml"))
print("torch" in sys.modules)
"""
LAUNCHER = """
import sys
import worker.cli, worker.launcher.server
print("torch" in sys.modules)
"""


@pytest.mark.parametrize("program", [ROUTER, LAUNCHER], ids=["router", "launcher"])
def test_torch_is_loaded_in_ranks_only(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"


def test_proto_is_our_own_package() -> None:
    assert Path(str(proto.__file__)).parent == Path("proto").resolve()
