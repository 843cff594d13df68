"""Groups on gloo and in shared memory, ranks as threads: sums in order, and a wait ends with its peer's."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import pytest
import torch
from torch._C._distributed_c10d import HashStore

from native.build import Build
from native.library import NativeLibrary
from parallel.collectives.communicator import Channel, CollectiveClock, PeerLostError
from parallel.collectives.groups import GroupMemories, RankGroups, Rendezvous, build_groups
from parallel.collectives.rows import gather_rows, reduce_scatter_rows
from parallel.group_memory import GroupMemoryShape, allocate_group_memory
from parallel.shape import AttentionSizes, ReplicaShape


class OnRanks(Protocol):
    """Builds a cp group of `world` ranks in threads and runs `work(groups, rank)` on each."""

    def __call__(self, world: int, work: Callable[[RankGroups, int], Any], *, timeout_s: float = 20) -> list[Any]: ...


@pytest.fixture(params=["gloo", "shared memory"])
def on_ranks(request: pytest.FixtureRequest) -> OnRanks:
    if request.param == "gloo":
        return run_on_ranks

    def in_memory(world: int, work: Callable[[RankGroups, int], Any], *, timeout_s: float = 20) -> list[Any]:
        library = NativeLibrary(Build().make())
        descriptor = allocate_group_memory(GroupMemoryShape(size=world))
        paths = {tuple(range(world)): f"/proc/self/fd/{descriptor}"}
        memories = GroupMemories(paths=paths, library=library, spins=False)
        try:
            return run_on_ranks(world, work, timeout_s=timeout_s, memories=memories)
        finally:
            os.close(descriptor)

    return in_memory


def run_on_ranks(
    world: int,
    work: Callable[[RankGroups, int], Any],
    *,
    timeout_s: float = 20,
    memories: GroupMemories | None = None,
) -> list[Any]:
    shape = ReplicaShape(attention=AttentionSizes(cp=world), experts=None)
    store = HashStore()
    held: list[RankGroups] = []

    def rank_work(rank: int) -> Any:
        groups = build_groups(
            shape,
            global_rank=rank,
            order=shape.creation_order_of(rank),
            rendezvous=Rendezvous(
                store=store,
                device=torch.device("cpu"),
                host_address="127.0.0.1",
                build_timeout_s=20,
                timeout_s=timeout_s,
            ),
            clock=CollectiveClock(),
            memories=memories,
        )
        held.append(groups)  # a group that nobody holds is closed: it must not be while others still need it
        return work(groups, rank)

    with ThreadPoolExecutor(world) as ranks:
        return list(ranks.map(rank_work, range(world)))


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("rows", [0, 1, 4])
def test_rows_are_gathered_in_order_and_their_sums_come_back(on_ranks: OnRanks, world: int, rows: int) -> None:
    def work(groups: RankGroups, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        mine = torch.full((rows, 2), float(rank + 1))
        everyone = gather_rows(groups["attn_cp"], mine)
        return everyone, reduce_scatter_rows(groups["attn_cp"], everyone * (rank + 1))

    total = sum(range(1, world + 1))
    for rank, (everyone, mine) in enumerate(on_ranks(world, work)):
        assert everyone[:, 0].tolist() == [float(other + 1) for other in range(world) for _ in range(rows)]
        assert mine[:, 0].tolist() == [float((rank + 1) * total)] * rows


def test_a_silent_peer_ends_a_collective_after_the_groups_timeout(on_ranks: OnRanks) -> None:
    def work(groups: RankGroups, rank: int) -> str:
        if rank == 1:
            return "silent"
        with pytest.raises(PeerLostError):
            groups["attn_cp"].all_gather(torch.ones(1))
        return "told"

    assert on_ranks(2, work, timeout_s=1) == ["told", "silent"]


def test_a_peer_that_closes_its_groups_ends_a_collective_at_once(on_ranks: OnRanks) -> None:
    def work(groups: RankGroups, rank: int) -> str:
        if rank == 1:
            groups.close()
            return "closed"
        with pytest.raises(PeerLostError):
            groups["attn_cp"].all_gather(torch.ones(1))
        return "told"

    assert on_ranks(2, work, timeout_s=15) == ["told", "closed"]


def test_all_to_all_brings_each_part_to_its_rank_and_so_do_parts_of_uneven_length(on_ranks: OnRanks) -> None:
    def work(groups: RankGroups, rank: int) -> tuple[list[int], list[int]]:
        group = groups["attn_cp"]
        even = group.all_to_all(torch.tensor([[10 * rank + other] for other in range(3)]))
        # Rank r sends r rows to each rank, so r rows come from rank r.
        rows = [10 * rank + other for other in range(3) for _ in range(rank)]
        mine = torch.tensor(rows, dtype=torch.int64).view(-1, 1)
        uneven = group.all_to_all_uneven(mine, sent=[rank] * 3, received=[0, 1, 2])
        return even.flatten().tolist(), uneven.flatten().tolist()

    for rank, (even, uneven) in enumerate(on_ranks(3, work)):
        assert even == [rank, 10 + rank, 20 + rank]
        assert uneven == [10 + rank, 20 + rank, 20 + rank]


def test_messages_of_one_channel_come_in_order_and_wait_for_none_of_another(on_ranks: OnRanks) -> None:
    def work(groups: RankGroups, rank: int) -> list[int]:
        group = groups["attn_cp"]
        if rank == 0:
            for value in (1, 2):
                group.send(torch.tensor([value]), to=1, channel=Channel.HIDDEN)
            group.send(torch.tensor([3]), to=1, channel=Channel.TOKENS)
            return [int(group.receive(torch.zeros(1, dtype=torch.int64), source=1, channel=Channel.HIDDEN))]
        order = (Channel.TOKENS, Channel.HIDDEN, Channel.HIDDEN)
        found = [int(group.receive(torch.zeros(1, dtype=torch.int64), source=0, channel=which)) for which in order]
        group.send(torch.tensor([4]), to=0, channel=Channel.HIDDEN)
        return found

    assert on_ranks(2, work) == [[4], [3, 1, 2]]


@pytest.mark.parametrize("distance", [1, 2])
def test_a_shift_brings_the_tensor_of_the_rank_before_whatever_its_length(on_ranks: OnRanks, distance: int) -> None:
    def work(groups: RankGroups, rank: int) -> list[int]:
        source = (rank - distance) % 3
        mine, out = torch.full((rank,), rank), torch.zeros(source, dtype=torch.int64)
        return list(groups["attn_cp"].begin_shift(mine, out, distance=distance)().tolist())

    for rank, found in enumerate(on_ranks(3, work)):
        source = (rank - distance) % 3
        assert found == [source] * source
