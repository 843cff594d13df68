"""One rank's life in words, against the plan that it is read from."""

import pytest

from parallel.cores import RankCores
from parallel.handoff import plan_lanes
from parallel.peers import source_peers, target_peers
from parallel.settings import EngineSettings
from parallel.shape import AttentionSizes, ExpertSizes, ReplicaShape
from parallel.topology import HostSpec, PoolSpec, Topology, plan_topology
from router.explain import explain, find_replica
from tests.tiny_models import describe, glm4_moe, llama, mixtral

MOE = describe(mixtral())
PREFILL = ReplicaShape(pp=2, attention=AttentionSizes(cp=2, tp=2), experts=ExpertSizes(ep=4))
DECODE = ReplicaShape(attention=AttentionSizes(dp=2, cp=2, tp=8), experts=ExpertSizes(ep=4, moe_tp=2, moe_dp=4))


def plan() -> Topology:
    hosts = [
        HostSpec(name=f"h{index}", address=f"h{index}:1", device="cuda", devices=tuple(range(8))) for index in range(6)
    ]
    pools = [
        PoolSpec(name="prefill", replicas=2, shape=PREFILL, engine=EngineSettings()),
        PoolSpec(name="decode", replicas=1, shape=DECODE, engine=EngineSettings()),
    ]
    return plan_topology(model="m", hosts=hosts, pools=pools)


def told(name: str, rank: int) -> str:
    topology = plan()
    replica = find_replica(topology, name=name, rank=rank)
    cores = RankCores(num_threads=8, nodes=(1,), cores=tuple(range(8, 16)))
    return explain(topology, description=MOE, replica=replica, rank=rank, cores=cores if rank else None)


@pytest.mark.parametrize(
    "words",
    [
        "rank       5 of prefill/1, on cuda:5 of host h1",
        "7 other ranks of its replica there",
        "8 threads, on the cores of NUMA node 1",
        "dp coordinate 0 of 1, cp coordinate 0 of 2, tp coordinate 1 of 2",
        "layers     2 to 3 of 4 (stage 1 of 2), and its part of the output",
        "heads      query 4 to 7 of 8, KV 2 to 3 of 4",
        "experts    2 to 3 of 8 in each layer",
        "1024 pages of 16 tokens and a spare one, 128 bytes a token",
        "cut into 4 blocks of pages; each of 2 cp coordinates takes two",
        "groups     pp with rank 1, in one host, over nccl",
        "attn_tp with rank 4, in one host, over nccl: rows gathered and scattered",
        "writes to ranks 4, 12, 20, 28 of decode/0: layers 2 to 3, KV heads 2",
    ],
)
def test_a_prefill_ranks_life_is_told(words: str) -> None:
    assert words in told("prefill/1", 5)


@pytest.mark.parametrize(
    "words",
    [
        "query 1 of 8, KV 0 of 4, which 2 tp ranks hold alike",
        "experts    0 to 1 of 8 in each layer, columns 10 to 19 of each one's width, in block 1 of 4",
        "a decoding sequence's pages lie on all 2 cp ranks; its next token is worked on by its home",
        "attn_cp with rank 1, across 2 hosts (h2, h3), over nccl: queries and their new KV out",
        "is written to by ranks 4, 6 of any of prefill/0 to prefill/1: layers 2 to 3, KV heads 0",
    ],
)
def test_a_decode_ranks_life_is_told(words: str) -> None:
    assert words in told("decode/0", 9)


def test_only_the_leader_is_said_to_lead() -> None:
    assert "it leads its replica" in told("prefill/0", 0)
    assert "it leads its replica" not in told("prefill/0", 1)


def test_threads_that_nobody_knows_yet_are_said_to_come_from_the_launcher() -> None:
    assert "its threads are dealt when the launcher of its host has said" in told("prefill/0", 0)


def test_a_rank_alone_works_alone() -> None:
    shape = ReplicaShape(attention=AttentionSizes(), experts=None)
    host = HostSpec(name="here", address="local", device="cpu", devices=(0,))
    pool = PoolSpec(name="unified", replicas=1, shape=shape, engine=EngineSettings())
    topology = plan_topology(model="m", hosts=[host], pools=[pool])
    words = explain(topology, description=describe(llama()), replica=topology.replicas[0], rank=0)
    assert "groups     none: it works alone" in words
    assert "experts    none: the model is dense" in words
    assert "hand-off   none: its pool does both" in words


@pytest.mark.parametrize(
    ("kernels", "devices", "words"),
    [
        ("auto", (4,), "attn_cp with rank 1, in one host, over shared memory"),
        ("torch", (4,), "attn_cp with rank 1, in one host, over gloo"),
        ("auto", (2, 2), "pp with rank 2, across 2 hosts (h0, h1), over gloo"),
        ("auto", (2, 2), "attn_cp with rank 1, in one host, over shared memory"),
    ],
)
def test_it_is_told_over_what_the_ranks_of_a_group_meet(kernels: str, devices: tuple[int, ...], words: str) -> None:
    shape = ReplicaShape(pp=2, attention=AttentionSizes(cp=2), experts=None)
    hosts = [
        HostSpec(name=f"h{index}", address="local", device="cpu", devices=tuple(range(count)))
        for index, count in enumerate(devices)
    ]
    pool = PoolSpec(name="unified", replicas=1, shape=shape, engine=EngineSettings(kernels=kernels))
    topology = plan_topology(model="m", hosts=hosts, pools=[pool])
    assert words in explain(topology, description=describe(llama()), replica=topology.replicas[0], rank=0)


def test_of_a_stage_whose_layers_are_dense_it_says_so() -> None:
    shape = ReplicaShape(pp=2, attention=AttentionSizes(), experts=ExpertSizes())
    host = HostSpec(name="here", address="local", device="cpu", devices=(0, 1))
    pool = PoolSpec(name="unified", replicas=1, shape=shape, engine=EngineSettings())
    topology = plan_topology(model="m", hosts=[host], pools=[pool])
    description = describe(glm4_moe(first_k_dense_replace=3))
    words = [explain(topology, description=description, replica=topology.replicas[0], rank=rank) for rank in (0, 1)]
    assert "experts    none: the layers of its stage are dense" in words[0]
    assert "experts    0 to 7 of 8 in each layer" in words[1]


def test_a_replica_or_rank_that_is_not_there_is_an_error_with_the_legal_ones() -> None:
    with pytest.raises(ValueError, match=r"no replica decode/1: write one of prefill/0, prefill/1, decode/0"):
        find_replica(plan(), name="decode/1", rank=0)
    with pytest.raises(ValueError, match=r"rank 8 is outside prefill/0: its ranks are 0 to 7"):
        find_replica(plan(), name=None, rank=8)


def test_peers_of_both_sides_are_the_lanes_of_the_hand_off() -> None:
    lanes = plan_lanes(MOE, source=PREFILL, target=DECODE)
    pairs = {
        (PREFILL.attention_rank(pp_rank=lane.source_pp, dp=0, cp=cp, tp=lane.source_tp), target)
        for lane in lanes
        for cp in range(2)
        for target in (DECODE.attention_rank(dp=dp, cp=cp, tp=lane.target_tp) for dp in range(2) for cp in range(2))
    }
    written = {
        (rank, target)
        for rank in range(PREFILL.world_size)
        for peer in target_peers(PREFILL.coordinates(rank), description=MOE, source=PREFILL, target=DECODE)
        for target in peer.ranks
    }
    received = {
        (source, rank)
        for rank in range(DECODE.world_size)
        for peer in source_peers(DECODE.coordinates(rank), description=MOE, source=PREFILL, target=DECODE)
        for source in peer.ranks
    }
    assert written == received == pairs
