"""The control star while it forms: strangers are turned away and keep nobody waiting."""

import socket
import struct
import threading
import time
from collections.abc import Callable

import pytest
from torch._C._distributed_c10d import HashStore

from parallel.process.address import parse_address
from proto import step_pb2
from worker.star import LeaderStar, MemberStar

JOIN = step_pb2.Join(epoch=7, secret=5)


class Forming:
    """A leader of `world_size` ranks that waits for its members in a thread."""

    def __init__(self, *, world_size: int, timeout_s: float = 20, address: str = "127.0.0.1") -> None:
        self.store = HashStore()
        self.told: dict[int, list[step_pb2.ToMember]] = {rank: [] for rank in range(world_size)}
        self.heard: list[step_pb2.FromMember] = []
        self.error: BaseException | None = None
        self._star: LeaderStar | None = None

        def form() -> None:
            try:
                self._star = LeaderStar(
                    store=self.store,
                    address=address,
                    join=JOIN,
                    dp_ranks=[rank // 2 for rank in range(world_size)],
                    timeout_s=timeout_s,
                    deliver=self.heard.append,
                    deliver_own=self.told[0].append,
                )
            except TimeoutError as error:
                self.error = error

        self._thread = threading.Thread(target=form, daemon=True)
        self._thread.start()

    def connect(self, payload: bytes = b"") -> socket.socket:
        address = parse_address(self.store.get("star").decode())
        connection = socket.create_connection((address.host, address.port))
        connection.sendall(payload)
        return connection

    def member(self, rank: int) -> MemberStar:
        join = step_pb2.Join(global_rank=rank, epoch=JOIN.epoch, secret=JOIN.secret)
        return MemberStar(store=self.store, join=join, timeout_s=10, deliver=self.told[rank].append)

    def star(self) -> LeaderStar | None:
        self._thread.join(timeout=15)
        assert not self._thread.is_alive()
        return self._star


def framed(join: step_pb2.Join) -> bytes:
    payload = step_pb2.FromMember(join=join).SerializeToString()
    return struct.pack("<I", len(payload)) + payload


STRANGERS: dict[str, bytes] = {
    "says nothing": b"",
    "garbage": struct.pack("<I", 4) + b"\xff\xff\xff\xff",
    "another protocol": b"GET / HTTP/1.1\r\n\r\n",
    "another epoch": framed(step_pb2.Join(global_rank=1, epoch=6, secret=5)),
    "another secret": framed(step_pb2.Join(global_rank=1, epoch=7, secret=4)),
    "a rank that there is not": framed(step_pb2.Join(global_rank=9, epoch=7, secret=5)),
    "the leader's own rank": framed(step_pb2.Join(global_rank=0, epoch=7, secret=5)),
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_stranger_keeps_no_rank_from_joining(stranger: str) -> None:
    forming = Forming(world_size=2)
    with forming.connect(STRANGERS[stranger]):
        star, member = (forming.star, forming.member(1))
        assert star() is not None
        member.send(step_pb2.FromMember(result=step_pb2.StepResult(step_id=3)))
        wait_until(lambda: bool(forming.heard))
        assert [message.result.step_id for message in forming.heard] == [3]


@pytest.mark.parametrize("address", ["::1", "127.0.0.1", "localhost"])
def test_ranks_meet_at_any_kind_of_address(address: str) -> None:
    forming = Forming(world_size=2, address=address)
    member = forming.member(1)
    assert forming.star() is not None
    member.send(step_pb2.FromMember(result=step_pb2.StepResult(step_id=3)))
    wait_until(lambda: bool(forming.heard))


def test_a_rank_joins_once() -> None:
    forming = Forming(world_size=3)
    first = forming.member(1)
    with forming.connect(framed(step_pb2.Join(global_rank=1, epoch=7, secret=5))) as second:
        second.settimeout(10)
        assert second.recv(1) == b""  # turned away
    forming.member(2)
    assert forming.star() is not None
    first.send(step_pb2.FromMember(result=step_pb2.StepResult(step_id=4)))
    wait_until(lambda: bool(forming.heard))


def test_each_rank_gets_the_plan_of_its_own_dp_coordinate_and_all_get_an_order() -> None:
    forming = Forming(world_size=4)
    members = [forming.member(rank) for rank in (1, 2, 3)]
    star = forming.star()
    assert star is not None
    star.send_plans([step_pb2.StepPlan(step_id=5, leaves=[dp]) for dp in range(2)])
    star.broadcast(step_pb2.ToMember(where=step_pb2.Where()))
    wait_until(lambda: all(len(told) == 2 for told in forming.told.values()))
    assert [told[0].plan.leaves[0] for told in forming.told.values()] == [0, 0, 1, 1]
    assert all(told[0].plan.step_id == 5 and told[1].HasField("where") for told in forming.told.values())
    for member in members:
        member.close()


def test_ranks_that_do_not_come_are_named() -> None:
    forming = Forming(world_size=4, timeout_s=1)
    forming.member(2)
    assert forming.star() is None
    assert "ranks 1, 3 did not join" in str(forming.error)


def wait_until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.01)
