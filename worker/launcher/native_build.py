"""Builds native kernels before ranks start: a rank loads them, and never compiles inside a step."""

import asyncio
import logging

from native.build import Build, BuildError
from parallel.group_memory import may_share
from proto import control_pb2

logger = logging.getLogger(__name__)


def may_load_native(request: control_pb2.AssignRequest) -> bool:
    """Whether the ranks of `request` load native kernels where they are built."""
    return may_share(device=request.device_kind, kernels=request.engine.kernels)


async def build_native(request: control_pb2.AssignRequest) -> None:
    """Builds what the ranks of `request` may load, where it is not there; a failure is a warning, for ranks do without.

    A few seconds once a machine.
    """
    if not may_load_native(request):
        return
    try:
        await asyncio.to_thread(Build().make)
    except BuildError as error:
        logger.warning("no native kernels, ranks use torch's: %s", error)
