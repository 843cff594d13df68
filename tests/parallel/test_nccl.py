"""What NCCL's communicator asks of a c10d backend, without a GPU: names and arguments that one has, in order."""

from typing import Any

import pytest
import torch
from torch._C._distributed_c10d import Backend

from parallel.collectives.communicator import Channel
from parallel.collectives.nccl import NcclCommunicator


class Work:
    def wait(self) -> bool:
        return True


class RecordingGroup:
    """Notes each call; a name that the real backend lacks is an error."""

    def __init__(self, name: str, calls: list[tuple[str, str]]) -> None:
        self._name = name
        self._calls = calls

    def __getattr__(self, method: str) -> Any:
        # `abort` is NCCL's own, and no part of the bindings of a build without it.
        assert method == "abort" or hasattr(Backend, method), f"no backend has {method}"

        def call(*arguments: object) -> Work:
            if method in ("_start_coalescing", "_end_coalescing"):
                assert not arguments, "a backend takes no device here; a ProcessGroup does"
            self._calls.append((self._name, method))
            return Work()

        return call


@pytest.fixture
def calls() -> list[tuple[str, str]]:
    return []


def communicator(calls: list[tuple[str, str]], *, size: int = 2, channels: tuple[Channel, ...]) -> NcclCommunicator:
    return NcclCommunicator(
        RecordingGroup("collectives", calls),
        channels={channel: RecordingGroup(channel.name, calls) for channel in channels},
        size=size,
        index=0,
    )


@pytest.fixture
def group(calls: list[tuple[str, str]]) -> NcclCommunicator:
    return communicator(calls, channels=tuple(Channel))


def coalesced(*methods: str) -> list[str]:
    return ["_start_coalescing", *methods, "_end_coalescing"]


def test_both_halves_of_a_shift_are_one_call(group: NcclCommunicator, calls: list[tuple[str, str]]) -> None:
    x, out = torch.ones(2), torch.zeros(2)
    assert group.begin_shift(x, out, distance=1)() is out
    assert calls == [("KV", name) for name in coalesced("send", "recv")]


def test_messages_that_may_overtake_each_other_have_groups_of_their_own(
    group: NcclCommunicator, calls: list[tuple[str, str]]
) -> None:
    group.send(torch.ones(1), to=1, channel=Channel.HIDDEN)
    group.receive(torch.zeros(1), source=1, channel=Channel.TOKENS)
    group.all_gather(torch.ones(1))
    group.all_to_all(torch.ones(2, 1))
    group.all_to_all_uneven(torch.ones(1, 1), sent=[0, 1], received=[1, 1])
    group.reduce_scatter(torch.ones(2, 1))
    group.close()
    group.close()
    assert [call for call in calls if call[1] != "abort"] == [
        *(("HIDDEN", name) for name in coalesced("send")),
        *(("TOKENS", name) for name in coalesced("recv")),
        ("collectives", "_allgather_base"),
        ("collectives", "alltoall_base"),
        ("collectives", "alltoall_base"),
        ("collectives", "_reduce_scatter_base"),
    ]
    aborted = sorted(name for name, method in calls if method == "abort")
    assert aborted == ["HIDDEN", "KV", "TOKENS", "collectives"]


def test_what_is_empty_is_not_sent(group: NcclCommunicator, calls: list[tuple[str, str]]) -> None:
    group.send(torch.ones(0, 3), to=1, channel=Channel.HIDDEN)
    group.receive(torch.ones(0, 3), source=1, channel=Channel.HIDDEN)
    group.begin_shift(torch.ones(0), torch.ones(0), distance=1)()
    assert not calls


def test_each_rank_is_connected_with_whom_it_will_send_to_before_the_first_step(calls: list[tuple[str, str]]) -> None:
    communicator(calls, size=3, channels=(Channel.HIDDEN, Channel.KV)).connect(torch.device("cpu"))
    shift = coalesced("send", "recv")
    assert calls == [
        ("collectives", "_allgather_base"),
        *(("HIDDEN", name) for name in ("_allgather_base", *shift)),
        *(("KV", name) for name in ("_allgather_base", *shift, *shift)),
    ]
