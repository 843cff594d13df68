"""A higher epoch in living processes: other sizes and groups, the same tokens, and nothing heard of the old one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from proto import control_pb2
from tests.harness.checkpoints import Oracle
from tests.harness.epochs import PROMPT, Replica, assign, running_launcher
from tests.harness.process_usage import Usage, usage
from tests.harness.router_process import rank_pids

NUM_TOKENS = 12


@pytest.fixture
def launcher(mixtral: Oracle) -> Iterator[tuple[Any, list[int], int]]:
    """A launcher with real ranks: its stub, its ports, its process."""
    with running_launcher(mixtral) as (stub, ports, command):
        yield stub, ports, command.pid


@pytest.mark.timeout(120)
def test_a_higher_epoch_rebuilds_a_replica_in_its_living_processes(
    launcher: tuple[Any, list[int], int], mixtral: Oracle
) -> None:
    stub, ports, pid = launcher
    wanted = list(mixtral.answer(PROMPT, 64).token_ids[:NUM_TOKENS])
    processes: list[int] = []
    for epoch, dp in enumerate((2, 4, 1, 2), 1):
        assign(stub, ports, mixtral, epoch=epoch, dp=dp)
        replica = Replica(stub, epoch=epoch)
        replica.submit(epoch, count=NUM_TOKENS)
        assert replica.tokens(epoch) == wanted
        # This one is under way when the next epoch comes; no token of it may be heard there.
        replica.submit(100 + epoch, count=1500)
        assert rank_pids(pid)[: len(processes)] == processes
        processes = rank_pids(pid)
        # The groups of this epoch, ep of all ranks, and none of an earlier one.
        assert [num_group_memories(process) for process in processes] == [int(rank < dp > 1) for rank in range(4)][
            : len(processes)
        ]
        replica.close()
    assert len(processes) == 4


def num_group_memories(pid: int) -> int:
    """Mapped by that process."""
    return Path(f"/proc/{pid}/maps").read_text().count("memfd:muster-group")


@pytest.mark.timeout(120)
def test_twenty_epochs_take_no_more_than_the_first_ones(launcher: tuple[Any, list[int], int], mixtral: Oracle) -> None:
    stub, ports, pid = launcher
    early: list[Usage] = []
    for epoch in range(1, 21):
        assign(stub, ports, mixtral, epoch=epoch, dp=2)
        replica = Replica(stub, epoch=epoch)
        replica.submit(epoch, count=2)
        replica.tokens(epoch)
        replica.close()
        if epoch == 5:
            early = [usage(rank) for rank in rank_pids(pid)]
    late = [usage(rank) for rank in rank_pids(pid)]
    for before, after in zip(early, late, strict=True):
        assert after.resident_bytes < 1.05 * before.resident_bytes
        assert after.threads <= before.threads
        assert after.files <= before.files


@pytest.mark.timeout(60)
def test_a_second_reader_of_a_replicas_stream_is_refused(launcher: tuple[Any, list[int], int], mixtral: Oracle) -> None:
    stub, ports, _ = launcher
    assign(stub, ports, mixtral, epoch=1, dp=1)
    replica = Replica(stub, epoch=1)
    replica.submit(1, count=2)
    replica.tokens(1)
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Attach(iter([control_pb2.ToReplica(replica="unified/0", epoch=1)]), timeout=10))
    assert "is attached already" in str(caught.value.details())
    replica.close()
