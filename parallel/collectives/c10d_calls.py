"""Calls on c10d backends, whose errors mean that a peer is gone.

The groups are backends without a default process group around them; their `_base` collectives on whole tensors are
named alike in torch 2.11 and 2.13, which torch.distributed's own functions are not.
"""

from collections.abc import Callable
from typing import Any

from parallel.collectives.communicator import PeerLostError


def run_collective(collective: Callable[..., Any], *arguments: object) -> None:
    """Runs a collective and waits for it: on the host for gloo, on the device's stream for NCCL."""
    finish_collective(begin_collective(collective, *arguments))


def begin_collective(collective: Callable[..., Any], *arguments: object) -> Any:
    try:
        return collective(*arguments)
    except RuntimeError as error:
        raise PeerLostError(str(error).splitlines()[0]) from error


def finish_collective(work: Any) -> None:
    try:
        work.wait()
    except RuntimeError as error:
        raise PeerLostError(str(error).splitlines()[0]) from error
