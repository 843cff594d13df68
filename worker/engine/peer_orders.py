"""Orders about replicas of the other pool, which every rank of this one carries out before the router hears of it."""

from dataclasses import dataclass, field

from proto import control_pb2, step_pb2


@dataclass(kw_only=True)
class PeerOrders:
    """What the ranks of a replica have answered, by order and rank."""

    world_size: int
    _endpoints: dict[int, dict[int, bytes]] = field(default_factory=dict)

    def take(self, answer: step_pb2.PeerAnswer) -> control_pb2.PeerAnswered | None:
        """One rank's answer; what the router is to be told where it was the last that was missing."""
        endpoints = self._endpoints.setdefault(answer.order_id, {})
        endpoints[answer.global_rank] = answer.endpoint
        if len(endpoints) < self.world_size:
            return None
        del self._endpoints[answer.order_id]
        return control_pb2.PeerAnswered(
            order_id=answer.order_id, endpoints=[endpoints[rank] for rank in range(self.world_size)]
        )
