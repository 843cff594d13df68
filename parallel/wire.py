"""Shapes, settings and assignments as messages, and back. The one place that names every coordinate twice."""

from collections.abc import Mapping, Sequence

from parallel.cores import Machine, Node, RankCores
from parallel.settings import EngineSettings
from parallel.shape import AttentionSizes, ExpertSizes, RankCoordinates, ReplicaShape
from parallel.topology import HostSpec, ReplicaPlan
from proto import control_pb2

_COORDINATES = ("pp_rank", "attn_dp_rank", "attn_cp_rank", "attn_tp_rank", "moe_dp_rank", "moe_ep_rank", "moe_tp_rank")


def sizes_to_wire(shape: ReplicaShape) -> control_pb2.Sizes:
    """A replica's sizes as a message."""
    attention, experts = shape.attention, shape.experts
    sizes = control_pb2.Sizes(
        pp=shape.pp,
        dp=attention.dp,
        cp=attention.cp,
        tp=attention.tp,
        draws_every_token=shape.draws_every_token,
        shares_output=shape.shares_output,
    )
    if experts is not None:
        sizes.experts.CopyFrom(
            control_pb2.ExpertSizes(
                moe_dp=experts.moe_dp,
                ep=experts.ep,
                moe_tp=experts.moe_tp,
                placements=[control_pb2.Placement(slots=slots) for slots in experts.placements],
            )
        )
    return sizes


def shape_from_wire(sizes: control_pb2.Sizes) -> ReplicaShape:
    """A replica's shape; ValueError where the two meshes do not factor the same stage."""
    experts = None
    if sizes.HasField("experts"):
        given = sizes.experts
        placements = tuple(tuple(placement.slots) for placement in given.placements)
        experts = ExpertSizes(moe_dp=given.moe_dp, ep=given.ep, moe_tp=given.moe_tp, placements=placements)
    attention = AttentionSizes(dp=sizes.dp, cp=sizes.cp, tp=sizes.tp)
    return ReplicaShape(
        pp=sizes.pp,
        attention=attention,
        experts=experts,
        draws_every_token=sizes.draws_every_token,
        shares_output=sizes.shares_output,
    )


def settings_to_wire(settings: EngineSettings) -> control_pb2.Engine:
    """Engine settings as a message."""
    return control_pb2.Engine(
        dtype=settings.dtype,
        weights=settings.weights,
        page_size=settings.page_size,
        max_batch_tokens=settings.max_batch_tokens,
        max_sequences=settings.max_sequences,
        kv_tokens=settings.kv_tokens,
        step_timeout_s=settings.step_timeout_s,
        attention_kernel=settings.attention_kernel,
        kernels=settings.kernels,
        exchange=settings.exchange,
        exchange_tokens=settings.exchange_tokens,
        dispatch=settings.dispatch,
        pipeline=settings.pipeline,
        prefix_cache=settings.prefix_cache,
    )


def settings_from_wire(engine: control_pb2.Engine) -> EngineSettings:
    """Engine settings from their message."""
    return EngineSettings(
        dtype=engine.dtype,
        weights=engine.weights,
        page_size=engine.page_size,
        max_batch_tokens=engine.max_batch_tokens,
        max_sequences=engine.max_sequences,
        kv_tokens=engine.kv_tokens,
        step_timeout_s=engine.step_timeout_s,
        attention_kernel=engine.attention_kernel,
        kernels=engine.kernels,
        exchange=engine.exchange,
        exchange_tokens=engine.exchange_tokens,
        dispatch=engine.dispatch,
        pipeline=engine.pipeline,
        prefix_cache=engine.prefix_cache,
    )


def machine_to_wire(machine: Machine) -> control_pb2.Machine:
    """What a launcher has, as a message."""
    return control_pb2.Machine(
        nodes=[control_pb2.Node(index=node.index, cores=node.cores) for node in machine.nodes],
        num_cores=machine.num_cores,
        threads_per_rank=machine.threads_per_rank or 0,
    )


def machine_from_wire(machine: control_pb2.Machine) -> Machine:
    """What a launcher has, from its message."""
    return Machine(
        nodes=tuple(Node(index=node.index, cores=tuple(node.cores)) for node in machine.nodes),
        num_cores=machine.num_cores,
        threads_per_rank=machine.threads_per_rank or None,
    )


def assign_request(
    replica: ReplicaPlan,
    *,
    host: HostSpec,
    addresses: Sequence[str],
    rendezvous_port: int,
    model: str,
    router_id: int,
    epoch: int,
    secret: int,
    start_timeout_s: float,
    cores: Mapping[int, RankCores] | None = None,
) -> control_pb2.AssignRequest:
    """The assignment of one host's ranks of one replica. `addresses` are the host's own and the leader's host's.

    `cores` are those of each global rank; one that they do not name has one thread, anywhere.
    """
    dealt = cores or {}
    own_address, leader_address = addresses
    return control_pb2.AssignRequest(
        router_id=router_id,
        replica=replica.name,
        epoch=epoch,
        pool=replica.pool,
        sizes=sizes_to_wire(replica.shape),
        engine=settings_to_wire(replica.engine),
        model=model,
        device_kind=host.device,
        host_address=own_address,
        rendezvous_address=leader_address,
        rendezvous_port=rendezvous_port,
        secret=secret,
        start_timeout_s=start_timeout_s,
        ranks=[
            _rank_assignment(
                replica.shape,
                global_rank=rank,
                device=replica.placements[rank].device,
                cores=dealt.get(rank, RankCores()),
            )
            for rank in replica.ranks_on(host.name)
        ],
    )


def check_assignment(shape: ReplicaShape, given: control_pb2.RankAssignment) -> RankCoordinates:
    """The coordinates that this rank derives itself; ValueError naming both values where the pushed ones differ."""
    if given.global_rank >= shape.world_size:
        raise ValueError(f"global_rank {given.global_rank} is outside a replica of {shape.world_size} ranks")
    derived = shape.coordinates(given.global_rank)
    for name in _COORDINATES:
        pushed = getattr(given, name) if not name.startswith("moe") or given.HasField(name) else None
        if pushed != getattr(derived, name):
            raise ValueError(
                f"rank {given.global_rank} was assigned {name} {pushed}, but its sizes and global rank give "
                f"{getattr(derived, name)}"
            )
    pushed_groups = tuple(tuple(group.ranks) for group in given.groups)
    if pushed_groups != shape.creation_order_of(given.global_rank):
        raise ValueError(
            f"rank {given.global_rank} was assigned the groups {pushed_groups}, but its sizes and global rank give "
            f"{shape.creation_order_of(given.global_rank)}"
        )
    return derived


def _rank_assignment(
    shape: ReplicaShape, *, global_rank: int, device: int, cores: RankCores
) -> control_pb2.RankAssignment:
    coordinates = shape.coordinates(global_rank)
    values = {name: getattr(coordinates, name) for name in _COORDINATES}
    return control_pb2.RankAssignment(
        global_rank=global_rank,
        device=device,
        groups=[control_pb2.Group(ranks=ranks) for ranks in shape.creation_order_of(global_rank)],
        cores=control_pb2.Cores(
            num_threads=cores.num_threads, cores=cores.cores, spins=cores.spins, machine_cores=cores.machine_cores
        ),
        **{name: value for name, value in values.items() if value is not None},
    )
