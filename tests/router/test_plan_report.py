"""The plan as rows: coordinates, groups, bytes and what fits, for every axis."""

import io
from dataclasses import replace

from rich.console import Console

from parallel.cores import Machine, Node
from parallel.group_memory import GroupMemoryShape
from parallel.model_share import ModelShare
from parallel.models.description import ModelDescription
from parallel.settings import EngineSettings
from parallel.shape import AttentionSizes, ExpertSizes, ReplicaShape
from parallel.topology import HostSpec, PoolSpec, Topology, plan_topology
from router.machines import plan_cores
from router.plan_report import PlanReport, plan_report
from router.plan_table import render
from tests.tiny_models import describe, gpt_oss, llama, mixtral

MOE = describe(mixtral())
EVERY_AXIS = ReplicaShape(
    pp=2, attention=AttentionSizes(dp=2, cp=2, tp=2), experts=ExpertSizes(moe_dp=2, ep=2, moe_tp=2)
)


def topology(shape: ReplicaShape, *, replicas: int = 1, dtype: str = "float32") -> Topology:
    host = HostSpec(name="here", address="local", device="cuda", devices=tuple(range(replicas * shape.world_size)))
    engine = EngineSettings(dtype=dtype, page_size=16, kv_tokens=160)
    pool = PoolSpec(name="unified", replicas=replicas, shape=shape, engine=engine)
    return plan_topology(model="m", hosts=[host], pools=[pool])


def weight_bytes(description: ModelDescription, shape: ReplicaShape, *, rank: int) -> int:
    slices = ModelShare(description=description, shape=shape, coordinates=shape.coordinates(rank)).slices()
    return sum(part.num_elements for part in slices) * 4


def test_there_is_one_row_a_rank_with_its_place_and_every_coordinate() -> None:
    report = plan_report(topology(EVERY_AXIS, replicas=2), description=MOE)
    assert len(report.ranks) == 32
    row = report.ranks[16 + 13]
    assert (row.pool, row.replica, row.host, row.device, row.global_rank) == ("unified", 1, "here", "cuda:29", 13)
    assert (row.pp_rank, row.attn_dp_rank, row.attn_cp_rank, row.attn_tp_rank) == (1, 1, 0, 1)
    assert (row.moe_dp_rank, row.moe_ep_rank, row.moe_tp_rank) == (1, 0, 1)


def test_weight_bytes_are_those_of_the_ranks_own_slices() -> None:
    report = plan_report(topology(EVERY_AXIS), description=MOE)
    assert [row.weight_bytes for row in report.ranks] == [
        weight_bytes(MOE, EVERY_AXIS, rank=rank) for rank in range(16)
    ]


def test_a_rank_that_holds_an_expert_twice_loads_it_once() -> None:
    sizes = ExpertSizes(ep=2, moe_tp=2, placements=((0, 0, 0, 1, 2, 3, 1, 2, 3, 4, 5, 6, 7, 0),))
    shape = ReplicaShape(pp=2, attention=AttentionSizes(dp=4), experts=sizes)
    report = plan_report(topology(shape), description=MOE)
    assert [row.weight_bytes for row in report.ranks] == [weight_bytes(MOE, shape, rank=rank) for rank in range(8)]
    assert report.ranks[0].weight_bytes < report.ranks[2].weight_bytes


def test_memory_is_counted_for_groups_that_a_host_holds_whole_once_for_each_set_of_ranks() -> None:
    shape = ReplicaShape(pp=2, attention=AttentionSizes(dp=2, tp=2), experts=ExpertSizes(moe_dp=1, ep=4))

    def group_bytes(*devices: int, kind: str = "cpu", kernels: str = "auto") -> int:
        hosts = [
            HostSpec(name=f"h{index}", address="local", device=kind, devices=tuple(range(count)))
            for index, count in enumerate(devices)
        ]
        engine = EngineSettings(page_size=16, kv_tokens=160, kernels=kernels)
        pool = PoolSpec(
            name="unified", replicas=2, shape=shape, engine=engine, hosts=tuple(host.name for host in hosts)
        )
        return plan_report(plan_topology(model="m", hosts=hosts, pools=[pool]), description=MOE).pools[0].group_bytes

    of_two, of_four = (GroupMemoryShape(size=size, has_messages=False).num_bytes for size in (2, 4))
    stage = 4 * of_two + of_four  # two pairs each of dp and of tp; ep, the block and the output are one set
    of_stages = GroupMemoryShape(size=2).num_bytes
    assert group_bytes(16) == 2 * (2 * stage + 4 * of_stages)  # and four pairs of pp, which send
    assert group_bytes(4, 4, 4, 4) == 4 * stage
    assert group_bytes(16, kind="cuda") == group_bytes(16, kernels="torch") == 0


def test_what_the_exchange_holds_is_told_apart_and_bounded_by_its_key() -> None:
    def exchange_bytes(cp: int, *, exchange_tokens: int, max_batch_tokens: int) -> int:
        engine = EngineSettings(
            page_size=16, kv_tokens=1600, exchange_tokens=exchange_tokens, max_batch_tokens=max_batch_tokens
        )
        shape = ReplicaShape(attention=AttentionSizes(cp=cp), experts=None)
        host = HostSpec(name="here", address="local", device="cuda", devices=tuple(range(cp)))
        pool = PoolSpec(name="unified", replicas=1, shape=shape, engine=engine)
        plan = plan_topology(model="m", hosts=[host], pools=[pool])
        return plan_report(plan, description=describe(llama())).pools[0].exchange_bytes

    assert exchange_bytes(1, exchange_tokens=800, max_batch_tokens=16) == 0
    # K and V of 4 heads of 4 float32 numbers a token.
    assert exchange_bytes(2, exchange_tokens=800, max_batch_tokens=16) == 800 * 2 * 4 * 4 * 4
    # Of 1600 tokens a rank there are 3200 in all, and its own are sent: no more can be held.
    assert exchange_bytes(2, exchange_tokens=80000, max_batch_tokens=16) == 4800 * 2 * 4 * 4 * 4
    # Passed queries: 8 heads of 4 numbers there, an output with a log-sum-exp each out and back.
    assert exchange_bytes(2, exchange_tokens=48, max_batch_tokens=1001) == 1002 * 8 * (16 + 2 * 20)


def test_bytes_follow_the_dtype_but_for_gates_which_stay_in_float32() -> None:
    wide, narrow = (plan_report(topology(EVERY_AXIS, dtype=dtype), description=MOE) for dtype in ("float32", "float16"))
    gates = 2 * 8 * 32 * 4  # of two layers, 8 experts, 32 numbers a row
    for first, second in zip(wide.ranks, narrow.ranks, strict=True):
        assert first.weight_bytes - gates == 2 * (second.weight_bytes - gates)
        assert first.kv_bytes == 2 * second.kv_bytes


def test_each_cache_group_is_told_with_its_pages_and_what_a_token_takes() -> None:
    model = describe(gpt_oss(sliding_window=32))
    shape = replace(EVERY_AXIS, experts=ExpertSizes(ep=8))
    report = plan_report(topology(shape), description=model)
    rows = {row.window: row for row in report.storage}
    # Of 4 layers in turn each stage has one of both kinds; 4 KV heads over tp 2, K and V of 4 elements of 4 bytes.
    assert [(row.layers, row.token_bytes) for row in rows.values()] == [(1, 2 * 2 * 4 * 4)] * 2
    assert [(row.pages, row.tokens) for row in (rows[0], rows[32])] == [(10, 160), (10, 160)]
    assert rows[0].num_bytes == (10 + 1) * 16 * 64
    console = Console(file=io.StringIO(), width=200)
    render(report, console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "the last 32 tokens" in said and "everything" in said


def test_kv_bytes_count_layers_and_heads_of_the_rank() -> None:
    report = plan_report(topology(EVERY_AXIS), description=MOE)
    # 4 layers over 2 stages, 4 KV heads over tp 2, K and V of 4 elements, 4 bytes each, 160 tokens and a spare page.
    assert sum(row.kv_bytes for row in report.ranks) == (160 + 16) * 4 * (4 * 2 * 4 * 4) * 4
    assert {row.kv_bytes % ((160 + 16) * 2 * 2 * 4 * 4) for row in report.ranks} == {0}


def test_every_group_of_every_replica_is_listed_also_those_of_one_rank() -> None:
    report = plan_report(topology(EVERY_AXIS, replicas=2), description=MOE)
    for replica in (0, 1):
        for axis in EVERY_AXIS.axes:
            found = [row.ranks for row in report.groups if (row.replica, row.axis) == (replica, axis)]
            assert found == [group.ranks for group in EVERY_AXIS.groups(axis)]
    alone = plan_report(topology(ReplicaShape(attention=AttentionSizes(), experts=None)), description=describe(llama()))
    assert [(row.axis, row.ranks) for row in alone.groups] == [
        (axis, (0,)) for axis in ("pp", "attn_dp", "attn_cp", "attn_tp")
    ]


def test_what_fits_grows_with_cp_for_a_sequence_and_with_dp_for_a_replica() -> None:
    (pool,) = plan_report(topology(EVERY_AXIS, replicas=2), description=MOE).pools
    assert (pool.replicas, pool.ranks_per_replica) == (2, 16)
    assert (pool.context_tokens_per_replica, pool.context_tokens) == (640, 1280)
    # 10 pages on each of 2 coordinates; admission wants half of a sequence's pages and 2 more on each.
    assert pool.sequence_tokens == 16 * 16


def test_a_dense_model_has_no_expert_coordinates() -> None:
    shape = ReplicaShape(attention=AttentionSizes(dp=2), experts=None)
    report = plan_report(topology(shape), description=describe(llama()))
    assert {(row.moe_dp_rank, row.moe_ep_rank, row.moe_tp_rank) for row in report.ranks} == {(None, None, None)}


def test_the_printed_plan_names_every_rank_on_one_line_where_nobody_reads_a_terminal() -> None:
    console = Console(file=io.StringIO(), width=40)
    render(plan_report(topology(EVERY_AXIS), description=MOE), console)
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert sum("cuda:" in line and "unified/0" in line and "here" in line for line in lines) == 16
    assert any(line.split()[:2] == ["unified/0", "attn_tp"] and "(0 1) (2 3)" in line for line in lines)


def printed(report: PlanReport) -> list[str]:
    console = Console(file=io.StringIO(), width=200)
    render(report, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_threads_are_printed_for_hosts_that_are_known_and_others_are_named() -> None:
    plan = topology(ReplicaShape(attention=AttentionSizes(dp=4), experts=None))
    plan = replace(plan, hosts=(replace(plan.hosts[0], device="cpu"),))
    nodes = tuple(Node(index=index, cores=tuple(range(8 * index, 8 * index + 8))) for index in range(2))
    cores = plan_cores(plan, machines={"here": Machine(nodes=nodes, num_cores=16)})
    lines = printed(plan_report(plan, description=describe(llama()), cores=cores))
    assert "here unified    16     4       4 2 to node 0, 2 to node 1" in lines
    unknown = printed(plan_report(plan, description=describe(llama())))
    assert "cores of here: dealt, and logged, when their launchers have said what they have" in unknown
