"""Writes through NIXL with UCX: shared memory inside a host, TCP or RDMA between hosts, GPU memory where there is one.

No agent has a progress thread: it would spin on a core that ranks compute with, and is known to crash on GPUs. Instead
the thread that owns a transport looks at it while it waits.

A target has one agent for each writer. Over TCP, and wherever UCX emulates a write, bytes wait in a socket of the
target until it progresses: also those of a process that has died since. Only with the agent do they go.
"""

import contextlib
import importlib
import os
import uuid
from collections.abc import MutableMapping
from typing import Any

import numpy as np

from proto import control_pb2
from worker.handoff.transport.interface import MemoryRegion, PeerEpoch, WriteFailedError, WriteRuns

#: What UCX may use for host memory; RDMA where there is any. Among all that it has it chose a slower way inside a host.
_HOST_TRANSPORTS = "shm,self,tcp,ib"


def choose_transports(environment: MutableMapping[str, str], *, on_host: bool) -> None:
    """Sets what UCX reads when an agent is made, unless it is set: it has no other way to be told. For GPU memory it
    chooses by itself, for a list would shut out what only some hosts have.
    """
    if on_host:
        environment.setdefault("UCX_TLS", _HOST_TRANSPORTS)


class _Agent:
    """A NIXL agent with one registered region."""

    def __init__(self, region: MemoryRegion) -> None:
        choose_transports(os.environ, on_host=region.device is None)
        api = _load_api()
        self.device = region.device or 0
        self.kind = "DRAM" if region.device is None else "VRAM"
        config = api.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
        self.nixl: Any = api.nixl_agent(uuid.uuid4().hex, config)
        descriptors = self.nixl.get_reg_descs([(region.address, region.num_bytes, self.device, "")], self.kind)
        self._registered = self.nixl.register_memory(descriptors)

    def close(self) -> None:
        """Ends it with its connections; nothing is read or written through it any more. Idempotent."""
        if self._registered is not None:
            self.nixl.deregister_memory(self._registered)
            # The library's object ends with its last reference, and with it the sockets.
            self._registered = self.nixl = None


class NixlSource:
    """See SourceTransport."""

    def __init__(self, region: MemoryRegion) -> None:
        self._agent = _Agent(region)
        self._reasons: dict[int, str] = {}  # of writes that have failed and could not be released yet

    def connect(self, endpoint: control_pb2.Endpoint) -> str:
        """See SourceTransport."""
        try:
            name = self._agent.nixl.add_remote_agent(endpoint.agent)
        except Exception as error:  # NIXL's own, of many kinds, whose base is Exception
            raise WriteFailedError(f"the target cannot be reached: {error}") from error
        return name.decode() if isinstance(name, bytes) else str(name)

    def disconnect(self, peer: str) -> None:
        """See SourceTransport."""
        with contextlib.suppress(Exception):  # one that has disconnected by itself is not known any more
            self._agent.nixl.remove_remote_agent(peer)

    def write(self, peer: str, runs: WriteRuns, *, target_device: int) -> object:
        """See SourceTransport."""
        nixl, kind = self._agent.nixl, self._agent.kind
        source = nixl.get_xfer_descs(_descriptors(runs[:, 0], runs[:, 2], device=self._agent.device), kind)
        target = nixl.get_xfer_descs(_descriptors(runs[:, 1], runs[:, 2], device=target_device), kind)
        try:
            # Before the first contact this is where a target that is gone shows.
            handle = nixl.initialize_xfer("WRITE", source, target, peer)
        except Exception as error:
            raise WriteFailedError(f"the write could not begin: {error}") from error
        # From here on it has a handle, and its end is told by `is_done` alone.
        try:
            nixl.transfer(handle)
        except Exception as error:
            self._reasons[id(handle)] = str(error)
        return handle

    def is_done(self, handle: object) -> bool:
        """See SourceTransport."""
        key = id(handle)
        if key not in self._reasons:
            try:
                state = self._agent.nixl.check_xfer_state(handle)
            except Exception as error:
                state, self._reasons[key] = "ERR", str(error)
            if state == "PROC":
                return False
            if state == "ERR":
                self._reasons.setdefault(key, "its target is gone, or its memory is not registered")
        try:
            self._agent.nixl.release_xfer_handle(handle)
        except Exception:  # parts of it are still under way: they are looked at again
            return False
        reason = self._reasons.pop(key, None)
        if reason is not None:
            raise WriteFailedError(f"the write failed: {reason}")
        return True

    def close(self) -> None:
        """See SourceTransport."""
        self._agent.close()


class NixlTarget:
    """See TargetTransport."""

    def __init__(self, region: MemoryRegion) -> None:
        self._region = region
        self._agents: dict[PeerEpoch, _Agent] = {}

    def open(self, writer: PeerEpoch) -> control_pb2.Endpoint:
        """See TargetTransport."""
        self.close_writer(writer)
        agent = self._agents[writer] = _Agent(self._region)
        return control_pb2.Endpoint(
            agent=agent.nixl.get_agent_metadata(),
            base_address=self._region.address,
            device=agent.device,
            groups=self._region.groups,
        )

    def close_writer(self, writer: PeerEpoch) -> None:
        """See TargetTransport."""
        agent = self._agents.pop(writer, None)
        if agent is not None:
            agent.close()

    def progress(self) -> None:
        """See TargetTransport."""
        for agent in self._agents.values():
            agent.nixl.get_new_notifs()

    def close(self) -> None:
        """See TargetTransport."""
        for writer in list(self._agents):
            self.close_writer(writer)


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
