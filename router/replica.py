"""What the dispatcher knows of a replica, whatever carries the messages."""

from typing import Protocol

from parallel.topology import ReplicaPlan
from proto import control_pb2


class Replica(Protocol):
    """One replica under one epoch; its leader takes messages in the order of `send`."""

    plan: ReplicaPlan
    epoch: int
    load: control_pb2.Load

    @property
    def name(self) -> str:
        """pool/index."""
        ...

    def send(self, message: control_pb2.ToReplica) -> None:
        """Queues a message for the leader."""
        ...
