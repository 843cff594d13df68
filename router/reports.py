"""What GetModelInfo and GetTopology answer, from the checked configuration."""

from parallel.models.description import ModelDescription
from proto import inference_pb2
from router.capacity import Capacity
from router.plan_report import PlanReport
from router.text import ModelText


def model_info(
    description: ModelDescription, *, model: str, text: ModelText, fingerprint: str, capacity: Capacity
) -> inference_pb2.GetModelInfoResponse:
    """The model that is served."""
    return inference_pb2.GetModelInfoResponse(
        model=model,
        family=description.family,
        fingerprint=fingerprint,
        context_tokens=min(description.max_positions, capacity.context_tokens),
        vocab_size=description.vocab_size,
        eos_token_ids=sorted(text.defaults.eos_token_ids),
        has_chat_template=text.has_chat_template,
    )


def topology_message(report: PlanReport) -> inference_pb2.GetTopologyResponse:
    """The plan as messages, row by row."""
    return inference_pb2.GetTopologyResponse(
        digest=report.topology.digest,
        ranks=[
            inference_pb2.RankRow(**{name: value for name, value in vars(row).items() if value is not None})
            for row in report.ranks
        ],
        groups=[inference_pb2.GroupRow(**vars(row)) for row in report.groups],
        pools=[
            inference_pb2.PoolRow(
                pool=row.pool,
                replicas=row.replicas,
                sequence_tokens=row.sequence_tokens,
                context_tokens_per_replica=row.context_tokens_per_replica,
                exchange_bytes=row.exchange_bytes,
            )
            for row in report.pools
        ],
    )
