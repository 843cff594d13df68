"""Groups over shared memory, ranks as processes: gloo's bits, messages of any size, and an end to every wait."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

from parallel.collectives.communicator import Channel, CollectiveClock, Communicator, PeerLostError
from parallel.collectives.gloo import GlooCommunicator
from parallel.collectives.shared_memory import SharedMemoryCommunicator
from parallel.group_memory import max_sends
from tests.parallel.memory_ranks import SMALL, Seat, on_ranks, pattern, ranks, seats

pytestmark = pytest.mark.timeout(120)

Say = Callable[[Any], None]

DTYPES = (
    torch.float32,
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)


# ---- against gloo ----


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("spins", [False, True])
def test_random_interleavings_of_all_verbs_give_the_bits_of_gloo(size: int, spins: bool, tmp_path: Path) -> None:
    answers = on_ranks(compare_with_gloo, size, str(tmp_path / "store"), 400, size, spins=spins, **SMALL)
    assert all(answer["compared"] > 120 for answer in answers)
    assert sum(answer["received"] for answer in answers) > 40


def compare_with_gloo(seat: Seat, say: Say, store: str, num_verbs: int, seed: int) -> dict[str, int]:
    """Every rank makes the same choices; what it brings is its own."""
    shared, gloo = seat.join(), join_gloo(seat, store)
    choices, messages = Random(seed), MessageScript(shared)
    compared = 0
    for step in range(num_verbs):
        verb = choices.choice(["all_gather", "reduce_scatter", "all_to_all", "uneven", *["message"] * 5])
        if verb == "message":
            messages.step(choices, step)
            continue
        make = getattr(Calls, verb)(choices, seat, step)
        mine, wanted = make(shared), make(gloo)
        assert mine.dtype == wanted.dtype and mine.shape == wanted.shape, f"{verb}: {mine.shape}, {wanted.shape}"
        assert bits(mine) == bits(wanted), f"{verb} of step {step}, {mine.dtype}, {mine.shape}"
        compared += 1
    messages.finish()
    shared.all_gather(torch.ones(1))  # nobody leaves before all have received
    return {"compared": compared, "received": messages.num_received}


class Calls:
    """A verb with arguments that all ranks choose alike and fill by themselves."""

    @staticmethod
    def all_gather(choices: Random, seat: Seat, step: int) -> Callable[[Communicator], torch.Tensor]:
        x = tensor(choices, seat, step, leading=())
        return lambda group: group.all_gather(x)

    @staticmethod
    def reduce_scatter(choices: Random, seat: Seat, step: int) -> Callable[[Communicator], torch.Tensor]:
        x = tensor(choices, seat, step, leading=(seat.shape.size,))
        return lambda group: group.reduce_scatter(x)

    @staticmethod
    def all_to_all(choices: Random, seat: Seat, step: int) -> Callable[[Communicator], torch.Tensor]:
        x = tensor(choices, seat, step, leading=(seat.shape.size,))
        return lambda group: group.all_to_all(x)

    @staticmethod
    def uneven(choices: Random, seat: Seat, step: int) -> Callable[[Communicator], torch.Tensor]:
        size, index = seat.shape.size, seat.index
        counts = [[choices.choice([0, 0, 1, 7, 40]) for _ in range(size)] for _ in range(size)]
        x = tensor(choices, seat, step, leading=(sum(counts[index]),))
        received = [counts[source][index] for source in range(size)]
        return lambda group: group.all_to_all_uneven(x, sent=counts[index], received=received)


def tensor(choices: Random, seat: Seat, step: int, *, leading: tuple[int, ...]) -> torch.Tensor:
    """Of any dtype and length, also none; at times not contiguous; with zeros of either sign among floats."""
    dtype = choices.choice(DTYPES)
    width, height = choices.choice([0, 1, 3, 17, 64, 333]), choices.choice([1, 1, 2, 9])
    is_turned = choices.random() < 0.3
    generator = torch.Generator().manual_seed(1000 * step + seat.index)
    values = torch.randn((*leading, width, height), generator=generator)
    values[values.abs() < 0.3] = -0.0
    x = (values * 100).to(dtype) if not dtype.is_floating_point else values.to(dtype)
    return x.transpose(-1, -2) if is_turned else x


class MessageScript:
    """Sends, receives and shifts at random places of one order that all ranks share."""

    def __init__(self, group: SharedMemoryCommunicator) -> None:
        self._group = group
        self._under_way: dict[tuple[int, int, Channel], deque[tuple[int, int]]] = {}
        self._shifts: list[tuple[Callable[[], torch.Tensor], torch.Tensor]] = []
        self.num_received = 0

    def step(self, choices: Random, step: int) -> None:
        size = self._group.size
        kind = choices.choice(["send", "send", "receive", "receive", "shift", "finish"])
        num_bytes = choices.choice([0, 1, 100, 511, 512, 513, 5000, 70_000])
        source, distance = choices.randrange(size), choices.randrange(1, size)
        channel = choices.choice([Channel.HIDDEN, Channel.TOKENS])
        if kind == "send":
            self._send(source, (source + distance) % size, channel, num_bytes=num_bytes, seed=step)
        elif kind == "shift":
            self._begin_shift(distance, num_bytes=num_bytes, seed=step)
        elif kind == "finish" and self._shifts:
            self._finish_shift(choices.randrange(len(self._shifts)))
        elif kind == "receive" and self._under_way:
            self._receive(choices.choice(sorted(self._under_way)))

    def finish(self) -> None:
        while self._shifts:
            self._finish_shift(0)
        while self._under_way:
            self._receive(min(self._under_way))

    def _send(self, source: int, to: int, channel: Channel, *, num_bytes: int, seed: int) -> None:
        if sum(len(queue) for queue in self._under_way.values()) >= max_sends(self._group.size):
            return
        self._under_way.setdefault((source, to, channel), deque()).append((num_bytes, seed))
        if source == self._group.index:
            self._group.send(pattern(num_bytes, seed=seed), to=to, channel=channel)

    def _receive(self, way: tuple[int, int, Channel]) -> None:
        source, to, channel = way
        num_bytes, seed = self._under_way[way].popleft()
        if not self._under_way[way]:
            del self._under_way[way]
        if to == self._group.index:
            out = torch.zeros(num_bytes, dtype=torch.uint8)
            assert self._group.receive(out, source=source, channel=channel) is out
            assert bits(out) == bits(pattern(num_bytes, seed=seed)), f"message of {num_bytes} on {channel.name}"
            self.num_received += 1

    def _begin_shift(self, distance: int, *, num_bytes: int, seed: int) -> None:
        index, size = self._group.index, self._group.size
        source = (index - distance) % size
        mine, wanted = (pattern(num_bytes * (1 + rank % 2), seed=seed + 7919 * rank) for rank in (index, source))
        finish = self._group.begin_shift(mine, torch.zeros_like(wanted), distance=distance)
        self._shifts.append((finish, wanted))

    def _finish_shift(self, place: int) -> None:
        finish, wanted = self._shifts.pop(place)
        assert bits(finish()) == bits(wanted), f"a shift of {len(wanted)} bytes"


def join_gloo(seat: Seat, store: str) -> GlooCommunicator:
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname="127.0.0.1")]
    options._timeout = timedelta(seconds=60)
    group = gloo(FileStore(store, seat.shape.size), seat.index, seat.shape.size, options)
    return GlooCommunicator(group, size=seat.shape.size, index=seat.index, clock=CollectiveClock())


def bits(x: torch.Tensor) -> bytes:
    return x.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


# ---- more than the memory holds ----


@pytest.mark.parametrize("size", [2, 4])
def test_collectives_of_more_than_the_memory_go_in_pieces(size: int) -> None:
    assert on_ranks(huge_collectives, size, **SMALL) == [True] * size


def huge_collectives(seat: Seat, say: Say) -> bool:
    group, size, index = seat.join(), seat.shape.size, seat.index
    num_bytes = seat.shape.num_bytes + 13
    everyone = [pattern(num_bytes, seed=rank) for rank in range(size)]
    assert torch.equal(group.all_gather(everyone[index]), torch.stack(everyone))
    parts = [everyone[rank].expand(size, -1) for rank in range(size)]
    assert torch.equal(group.all_to_all(parts[index]), torch.stack(everyone))
    # One rank has all that there is, and most get nothing.
    sent = [num_bytes if index == 0 and to == size - 1 else 0 for to in range(size)]
    received = [num_bytes if index == size - 1 and source == 0 else 0 for source in range(size)]
    mine = group.all_to_all_uneven(everyone[0][: sum(sent)], sent=sent, received=received)
    assert torch.equal(mine, everyone[0][: sum(received)])
    floats = [values[: num_bytes // 8 * 8].float().view(2, -1).repeat(size // 2, 1) for values in everyone]
    total = sum(floats[1:], start=floats[0])
    return torch.equal(group.reduce_scatter(floats[index]), total[index])


@pytest.mark.parametrize("size", [2, 4])
def test_a_ring_of_more_than_the_memory_turns_without_a_rank_that_receives_first(size: int) -> None:
    assert on_ranks(huge_ring, size, **SMALL) == [size - 1] * size


def huge_ring(seat: Seat, say: Say) -> int:
    group, size, index = seat.join(), seat.shape.size, seat.index
    num_bytes = 2 * seat.shape.num_bytes
    blocks = []
    for distance in range(1, size):  # all are begun before one is finished
        out = torch.zeros(num_bytes, dtype=torch.uint8)
        blocks.append((distance, group.begin_shift(pattern(num_bytes, seed=index), out, distance=distance)))
    for distance, finish in blocks:
        assert torch.equal(finish(), pattern(num_bytes, seed=(index - distance) % size)), distance
    group.all_gather(torch.ones(1))
    return len(blocks)


def test_as_many_sends_as_may_be_under_way_wait_for_nobody_and_arrive_while_their_sender_does_nothing() -> None:
    assert on_ranks(unreceived_sends, 2, **SMALL) == ["sent", "received"]


def unreceived_sends(seat: Seat, say: Say) -> str:
    group, count = seat.join(), max_sends(2) - 1
    num_bytes = 3 * seat.shape.slot_bytes * seat.shape.num_slots
    if seat.index == 0:
        for number in range(count):
            group.send(pattern(num_bytes, seed=number), to=1, channel=Channel.HIDDEN)
        # A message of another kind waits for none of those.
        group.send(pattern(num_bytes, seed=-1), to=1, channel=Channel.TOKENS)
        say("sent")
        time.sleep(60)  # the group is there, and nobody calls it
    out = torch.zeros(num_bytes, dtype=torch.uint8)
    assert torch.equal(group.receive(out, source=0, channel=Channel.TOKENS), pattern(num_bytes, seed=-1))
    for number in range(count):
        assert torch.equal(group.receive(out, source=0, channel=Channel.HIDDEN), pattern(num_bytes, seed=number))
    return "received"


# ---- the end of a wait ----


def waits(group: SharedMemoryCommunicator, verb: str) -> None:
    """Waits for the rank at index 1."""
    if verb == "receive":
        group.receive(torch.zeros(3), source=1, channel=Channel.HIDDEN)
    elif verb == "shift":
        group.begin_shift(torch.zeros(3), torch.zeros(3), distance=1)()
    elif verb == "send":
        for _ in range(2 * max_sends(group.size) + 30):
            group.send(torch.zeros(3000), to=1, channel=Channel.HIDDEN)
    elif verb == "uneven":
        zeros = [0] * group.size
        group.all_to_all_uneven(torch.zeros(0), sent=zeros, received=zeros)
    else:
        getattr(group, verb)(torch.zeros(group.size, 3))


def wait_or_die(seat: Seat, say: Say, verb: str) -> tuple[str, float]:
    """The rank at index 1 says that it has joined, and does nothing; the others tell how and when their wait ended."""
    clock = CollectiveClock()
    group = seat.join(clock)
    if seat.index == 1:
        say("joined")
        time.sleep(60)
    say("joined")
    try:
        waits(group, verb)
    except PeerLostError as error:
        assert not clock.is_inside
        return str(error), time.monotonic()
    return "no error", time.monotonic()


VERBS = ["all_gather", "reduce_scatter", "all_to_all", "uneven", "receive", "send"]


@pytest.mark.parametrize("verb", VERBS)
def test_the_death_of_a_process_ends_the_wait_for_it(verb: str) -> None:
    with ranks(wait_or_die, 2, verb, **SMALL) as pair:
        assert [pair.answer(index) for index in range(2)] == ["joined"] * 2
        time.sleep(0.2)
        killed = time.monotonic()
        os.kill(pair.processes[1].pid or 0, signal.SIGKILL)
        message, ended = pair.answer(0)
        assert message == "rank 1 of the group of 2 is gone"
        assert ended - killed < 2  # 25 to 50 ms on an idle machine


def test_every_rank_of_a_collective_learns_of_a_death_by_itself() -> None:
    with ranks(wait_or_die, 4, "all_gather") as four:
        assert [four.answer(index) for index in range(4)] == ["joined"] * 4
        killed = time.monotonic()
        os.kill(four.processes[1].pid or 0, signal.SIGKILL)
        for index in (0, 2, 3):
            message, ended = four.answer(index)
            assert message == "rank 1 of the group of 4 is gone"
            assert ended - killed < 2


def test_a_process_that_is_dead_and_not_reaped_is_gone() -> None:
    program = (
        "import sys, time; from tests.parallel.memory_ranks import GroupMemoryShape, Seat;"
        "seat = Seat(shape=GroupMemoryShape(size=2), index=1, memory=sys.argv[1], timeout_s=60);"
        "group = seat.join(); print('joined', flush=True); time.sleep(60)"
    )
    with seats(2) as (seat, _):
        command = [sys.executable, "-c", program, seat.memory]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
            try:
                group = seat.join()
                other.send_signal(signal.SIGKILL)
                with pytest.raises(PeerLostError, match="rank 1 of the group of 2 is gone"):
                    group.all_gather(torch.ones(1))
                state = Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split()[0]
                assert state == "Z", "it was reaped before it was found"
            finally:
                other.kill()


def test_a_silent_rank_ends_a_wait_after_the_groups_timeout() -> None:
    with ranks(wait_or_die, 2, "all_gather", timeout_s=0.3) as pair:
        assert pair.answer(0) == "joined"
        assert pair.answer(0)[0] == "rank 1 of the group of 2 is silent"


def test_a_rank_that_never_joins_ends_the_others_after_the_build_timeout() -> None:
    with seats(2) as (seat, _):
        started = time.monotonic()
        with pytest.raises(PeerLostError, match="rank 1 of the group of 2 is silent"):
            seat.join(build_timeout_s=0.2)
        assert time.monotonic() - started < 20


@pytest.mark.parametrize("verb", VERBS)
def test_closing_in_another_thread_ends_this_ranks_own_wait(verb: str) -> None:
    with ranks(close_while_waiting, 2, verb, **SMALL) as pair:
        assert pair.answer(0) == "this rank has closed the group"


def close_while_waiting(seat: Seat, say: Say, verb: str) -> str:
    group = seat.join()
    if seat.index == 1:
        time.sleep(60)
    closer = threading.Timer(0.2, group.close)
    closer.start()
    try:
        waits(group, verb)
        return "no error"
    except PeerLostError as error:
        return str(error)
    finally:
        closer.join()
        group.close()


def test_a_rank_that_leaves_ends_the_waits_for_it_and_what_it_sent_before_arrives() -> None:
    assert on_ranks(leave_or_wait, 2, **SMALL) == [[1.0, 2.0], "left"]


def leave_or_wait(seat: Seat, say: Say) -> Any:
    group = seat.join()
    if seat.index == 1:
        for value in (1.0, 2.0):
            group.send(torch.tensor([value]), to=0, channel=Channel.TOKENS)
        group.close()
        return "left"
    out = torch.zeros(1)
    found = [float(group.receive(out, source=1, channel=Channel.TOKENS)) for _ in range(2)]
    for verb in ("receive", "all_gather", "all_to_all", "uneven", "reduce_scatter"):
        with pytest.raises(PeerLostError, match="rank 1 of the group of 2 is gone"):
            waits(group, verb)
    with pytest.raises(PeerLostError, match="gone"):
        group.send(out, to=1, channel=Channel.HIDDEN)
    return found


def test_a_rank_that_leaves_after_its_part_leaves_the_others_their_result() -> None:
    assert on_ranks(leave_at_once, 4) == [[0.0, 1.0, 2.0, 3.0]] * 4


def leave_at_once(seat: Seat, say: Say) -> list[float]:
    group = seat.join()
    time.sleep(0.1 * seat.index)
    found: list[float] = group.all_gather(torch.tensor(float(seat.index))).tolist()
    group.close()
    return found


def test_sizes_that_do_not_fit_are_an_error_and_not_a_wrong_number() -> None:
    found = [f"ranks {index} and {1 - index} of the group gave sizes that do not fit" for index in range(2)]
    assert on_ranks(unequal, 2) == [[text] * 2 for text in found]


def unequal(seat: Seat, say: Say) -> list[str]:
    group = seat.join()
    with pytest.raises(AssertionError) as gathered:
        group.all_gather(torch.zeros(1 + seat.index))
    with pytest.raises(AssertionError) as exchanged:
        received = [2, 1] if seat.index else [1, 2]
        group.all_to_all_uneven(torch.zeros(2, 1), sent=[1, 1], received=received)
    return [str(error.value) for error in (gathered, exchanged)]


def test_the_clock_tells_that_a_rank_waits_and_for_how_long() -> None:
    assert on_ranks(watch_clock, 2)[0]


def watch_clock(seat: Seat, say: Say) -> bool:
    clock = CollectiveClock()
    group = seat.join(clock)
    if seat.index == 1:
        time.sleep(0.3)
        group.all_gather(torch.ones(1))
        return True
    seen = []
    watcher = threading.Timer(0.1, lambda: seen.append(clock.is_inside))
    watcher.start()
    before = clock.seconds
    group.all_gather(torch.ones(1))
    watcher.join()
    return seen == [True] and clock.seconds - before > 0.15 and not clock.is_inside
