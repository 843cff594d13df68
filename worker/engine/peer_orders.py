"""Orders about replicas of the other pool, which every rank of this one carries out before the router hears of it."""

from dataclasses import dataclass, field

from proto import control_pb2, step_pb2


@dataclass(kw_only=True)
class PeerOrders:
    """What the ranks of a replica have answered, by order and rank."""

    world_size: int
    _answers: dict[int, dict[int, step_pb2.PeerAnswer]] = field(default_factory=dict)

    def take(self, answer: step_pb2.PeerAnswer) -> control_pb2.PeerAnswered | None:
        """One rank's answer; what the router is to be told where it was the last that was missing."""
        answers = self._answers.setdefault(answer.order_id, {})
        answers[answer.global_rank] = answer
        if len(answers) < self.world_size:
            return None
        del self._answers[answer.order_id]
        by_rank = [answers[rank] for rank in range(self.world_size)]
        refusals = [f"rank {answer.global_rank}: {answer.refusal}" for answer in by_rank if answer.refusal]
        return control_pb2.PeerAnswered(
            order_id=answer.order_id, endpoints=[answer.endpoint for answer in by_rank], refusal="".join(refusals[:1])
        )
