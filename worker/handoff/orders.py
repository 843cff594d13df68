"""A rank's word to its leader that it has carried out an order about a replica of the other pool."""

from collections.abc import Callable
from dataclasses import dataclass

from proto import control_pb2, step_pb2


@dataclass(frozen=True, kw_only=True)
class PeerAnswers:
    """Answers of one rank."""

    global_rank: int
    report: Callable[[step_pb2.FromMember], None]

    def give(self, order: control_pb2.PeerOrder, *, endpoint: bytes = b"", refusal: str = "") -> None:
        """Says that `order` is carried out, or by a sentence why not; `endpoint` is what an open_writer made."""
        answer = step_pb2.PeerAnswer(
            global_rank=self.global_rank, order_id=order.order_id, endpoint=endpoint, refusal=refusal
        )
        self.report(step_pb2.FromMember(peer_answer=answer))
