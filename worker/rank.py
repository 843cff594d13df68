"""A rank process: one device, one socket to its launcher, one assignment at a time.

The main thread runs torch. A reader thread answers the launcher's pings, so that a step of any length does not look
like a hang, and hands messages on. The process ends with its launcher: by the end of the socket or, should it be
stopped then, by the kernel.
"""

import argparse
import ctypes
import gc
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

from torch._C._distributed_c10d import PrefixStore, TCPStore

from parallel.collectives.communicator import PeerLostError
from parallel.process.logs import LogLevel, start_logging
from proto import control_pb2
from worker.frames import FrameSocket
from worker.rank_cores import ProcessCores
from worker.rank_runtime import Inbox, RankRuntime, store_prefix
from worker.store_keys import forget_keys

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1


#: How long a rank whose peer is gone waits to hear that its replica is being rebuilt.
_REPLACED_GRACE_S = 2.0


@dataclass(frozen=True, kw_only=True)
class _Order:
    """An assignment, or None to be without one, in the order of arrival."""

    number: int
    assign: control_pb2.AssignRank | None


class RankProcess:
    """The process's state: its current runtime, and the store that it serves where it leads a replica."""

    def __init__(self, link: FrameSocket, *, rendezvous_fd: int) -> None:
        self._link = link
        self._rendezvous_fd = rendezvous_fd
        self._inbox: Inbox = queue.SimpleQueue()
        self._cores = ProcessCores()
        self._runtime: RankRuntime | None = None
        self._store: TCPStore | None = None
        self._prefix = ""  # of the epoch's keys in the store
        self._num_orders = 0  # received; counted by the reader thread alone
        self._order = 0  # the one that the current runtime was built by

    def run(self) -> None:
        """Blocking: serves until the launcher is gone."""
        threading.Thread(target=self._read, name="launcher", daemon=True).start()
        while True:
            self._take_next()

    def _take_next(self) -> None:
        """Waits for one order or message and carries it out: when this returns, nothing here refers to it."""
        item = self._inbox.get()
        try:
            if isinstance(item, _Order):
                self._take_order(item)
            else:
                runtime, message = item
                # What the leader of a runtime that is about to be replaced still says would fail half-way.
                if self._runtime is not None and runtime is self._runtime and not self._is_replaced(self._order):
                    self._runtime.handle(message)
        except Exception as error:  # the process's edge
            self._fail_of(self._order, error)

    def _fail_of(self, order: int, error: BaseException) -> None:
        """Ends the process for an error of the runtime built by `order`, unless another order has replaced it.

        Where a replica is rebuilt, a peer may close its groups before this rank has heard why: it waits a moment.
        """
        deadline = time.monotonic() + (_REPLACED_GRACE_S if isinstance(error, PeerLostError) else 0.0)
        while not self._is_replaced(order) and time.monotonic() < deadline:
            time.sleep(0.01)
        if self._is_replaced(order):
            logger.info("left behind by a new assignment: %s", error)
        else:
            self.fail(error)

    def _is_replaced(self, order: int) -> bool:
        return self._num_orders > order

    def fail(self, error: BaseException) -> None:
        """Tells the launcher why this rank ends, and ends it: what it holds cannot be trusted any more."""
        logger.error("rank failed: %s", error, exc_info=error)
        status = "FAILED_PRECONDITION" if isinstance(error, ValueError) else "INTERNAL"
        failure = control_pb2.RankFailure(
            reason=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            cause=not isinstance(error, PeerLostError),
            status=status,
        )
        self._tell(control_pb2.FromRank(failure=failure))
        logging.shutdown()
        os._exit(1)

    def _take_order(self, order: "_Order") -> None:
        """Closes what is there, then builds what the order asks for, if anything."""
        self._order = order.number
        self._end_epoch()
        # One that another has replaced meanwhile is not carried out: what it names on the host may be gone by now, or
        # be another's.
        if order.assign is not None and not self._is_replaced(order.number):
            self._assign(order.assign)

    def _end_epoch(self) -> None:
        """Nothing of an epoch outlives it, nor of one that could not be built: its KV may be most of the memory."""
        if self._runtime is not None:
            self._runtime.close()
            self._runtime = None
        if self._store is not None and self._prefix:
            forget_keys(self._store, prefix=f"{self._prefix}/")
        # What refers to itself in a circle, a traceback for one, is not seen by the count of references.
        gc.collect()

    def _assign(self, message: control_pb2.AssignRank) -> None:
        started = time.perf_counter()
        assignment, rank = message.assignment, message.global_rank
        self._prefix = store_prefix(assignment)
        self._cores.take(next(given.cores for given in assignment.ranks if given.global_rank == rank))
        self._runtime = RankRuntime(
            assignment,
            global_rank=rank,
            shared_groups=message.shared_groups,
            store=PrefixStore(self._prefix, self._connect_store(assignment, rank=rank)),
            inbox=self._inbox,
            tell_launcher=partial(self._tell_of, assignment),
            fail=partial(self._fail_of, self._order),
        )
        logger.info("assigned replica=%s rank=%d epoch=%d", assignment.replica, rank, assignment.epoch)
        ready = control_pb2.RankReady(global_rank=rank, seconds=time.perf_counter() - started)
        self._tell_of(assignment, control_pb2.FromRank(ready=ready))

    def _connect_store(self, assignment: control_pb2.AssignRequest, *, rank: int) -> Any:
        """The replica's store: the leader serves it on its device's reserved port for as long as its process lives."""
        timeout = timedelta(seconds=assignment.start_timeout_s)
        address, port = assignment.rendezvous_address, assignment.rendezvous_port
        if rank != 0:
            return TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout)
        if self._store is None:
            self._store = TCPStore(
                address,
                port,
                is_master=True,
                wait_for_workers=False,
                timeout=timeout,
                master_listen_fd=self._rendezvous_fd,
            )
        return self._store

    def _read(self) -> None:
        try:
            self._read_messages()
        except Exception as error:  # the thread's edge: a rank that hears nothing must not go on
            self.fail(error)
        os._exit(0)  # the launcher is gone

    def _read_messages(self) -> None:
        for payload in self._link:
            message = control_pb2.ToRank.FromString(payload)
            kind = message.WhichOneof("message")
            if kind == "ping":
                self._tell(control_pb2.FromRank(pong=control_pb2.Pong()))
            elif kind in ("assign", "unassign"):
                self._num_orders += 1
                assign = message.assign if kind == "assign" else None
                self._inbox.put(_Order(number=self._num_orders, assign=assign))
            elif self._runtime is not None:
                self._runtime.to_leader(message.replica)

    def _tell_of(self, assignment: control_pb2.AssignRequest, message: control_pb2.FromRank) -> None:
        message.of_replica, message.of_epoch = assignment.replica, assignment.epoch
        self._tell(message)

    def _tell(self, message: control_pb2.FromRank) -> None:
        try:
            self._link.send(message.SerializeToString())
        except OSError:
            os._exit(0)  # the launcher is gone


def main() -> None:
    """The process's entry: `python -m worker.rank --link-fd N --rendezvous-fd N`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--link-fd", type=int, required=True)
    parser.add_argument("--rendezvous-fd", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--log-level", type=LogLevel, default=LogLevel.WARNING)
    parser.add_argument("--device", type=int, help="the host's device; for those who read the process table")
    options = parser.parse_args()
    _die_with_parent(options.parent)
    # Ctrl-C reaches the whole foreground group; the launcher decides when its ranks end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    start_logging(options.log_level)
    logging.getLogger("nixl_cu12").setLevel(logging.WARNING)
    # The main thread comes back from every operator for Python's lock: half a millisecond is as long as it may wait.
    sys.setswitchinterval(0.0005)
    RankProcess(FrameSocket(socket.socket(fileno=options.link_fd)), rendezvous_fd=options.rendezvous_fd).run()


def _die_with_parent(parent: int) -> None:
    """The kernel kills this process when its launcher ends, even where it is stopped and cannot read its socket."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


if __name__ == "__main__":
    main()
