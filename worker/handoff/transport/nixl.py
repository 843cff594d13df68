"""Writes through NIXL with UCX: shared memory inside a host, TCP or RDMA between hosts, GPU memory where there is one.

On a host without a GPU the agent has no progress thread: it would spin on a core that ranks compute with. Instead the
thread that owns the transport calls `progress` while it waits.
"""

import importlib
import uuid
from collections.abc import Callable
from typing import Any

import numpy as np

from parallel.collectives.communicator import PeerLostError
from proto import control_pb2
from worker.handoff.transport.interface import MemoryRegion, WriteRuns


class NixlTransport:
    """One NIXL agent with one registered region."""

    def __init__(self, region: MemoryRegion) -> None:
        api = _load_api()
        config = api.nixl_agent_config(enable_prog_thread=region.device is not None, backends=["UCX"])
        self._agent: Any = api.nixl_agent(uuid.uuid4().hex, config)
        self._region = region
        self._kind = "DRAM" if region.device is None else "VRAM"
        self._device = region.device or 0
        descriptor = [(region.address, region.num_bytes, self._device, "")]
        self._registered = self._agent.register_memory(self._agent.get_reg_descs(descriptor, self._kind))
        self._peers: list[str] = []

    def endpoint(self) -> control_pb2.Endpoint:
        """See Transport."""
        return control_pb2.Endpoint(
            agent=self._agent.get_agent_metadata(),
            base_address=self._region.address,
            layer_bytes=self._region.layer_bytes,
            device=self._device,
        )

    def connect(self, endpoint: control_pb2.Endpoint) -> str:
        """See Transport."""
        name = self._agent.add_remote_agent(endpoint.agent)
        peer: str = name.decode() if isinstance(name, bytes) else name
        self._peers.append(peer)
        return peer

    def disconnect(self, peer: str) -> None:
        """See Transport."""
        self._peers.remove(peer)
        self._agent.remove_remote_agent(peer)

    def write(self, peer: str, runs: WriteRuns, *, target_device: int) -> object:
        """See Transport."""
        agent = self._agent
        source = agent.get_xfer_descs(_descriptors(runs[:, 0], runs[:, 2], device=self._device), self._kind)
        target = agent.get_xfer_descs(_descriptors(runs[:, 1], runs[:, 2], device=target_device), self._kind)
        handle = agent.initialize_xfer("WRITE", source, target, peer)
        self._call(agent.transfer, handle)
        return handle

    def is_done(self, handle: object) -> bool:
        """See Transport."""
        state = self._call(self._agent.check_xfer_state, handle)
        if state == "DONE":
            self._agent.release_xfer_handle(handle)
            return True
        if state == "ERR":
            raise PeerLostError("a hand-off's write failed: its peer is gone or its memory is not registered")
        return False

    def progress(self) -> None:
        """See Transport."""
        self._agent.get_new_notifs()

    @staticmethod
    def _call(function: Callable[..., Any], handle: object) -> Any:
        """NIXL raises its own errors for a peer that is gone; that peer's end is the cause, not this rank's."""
        try:
            return function(handle)
        except Exception as error:
            raise PeerLostError(f"a hand-off's write failed: {error}") from error

    def close(self) -> None:
        """See Transport."""
        for peer in self._peers:
            self._agent.remove_remote_agent(peer)
        self._peers = []
        if self._registered is not None:
            self._agent.deregister_memory(self._registered)
            self._registered = None


def _descriptors(addresses: WriteRuns, sizes: WriteRuns, *, device: int) -> WriteRuns:
    return np.stack([addresses, sizes, np.full(len(sizes), device, dtype=np.uint64)], axis=1)


def _load_api() -> Any:
    """The installed wheel's API: it is named after the CUDA version that it was built for."""
    for package in ("nixl_cu12", "nixl_cu13", "nixl"):
        try:
            return importlib.import_module(f"{package}._api")
        except ImportError:
            continue
    raise RuntimeError("hand-off needs NIXL: pip install nixl-cu12 (or nixl-cu13)")
