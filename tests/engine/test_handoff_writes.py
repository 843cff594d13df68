"""Writes of one hand-off: what is still to come, and what those that came add up to."""

from proto import step_pb2
from worker.engine.handoff_writes import HandoffWrites


def test_bytes_add_up_over_ranks_and_the_slowest_rank_gives_the_seconds() -> None:
    writes = HandoffWrites(num_pending=3)
    assert writes.seconds == 0.0
    for rank, seconds in ((0, 1.0), (1, 1.5), (0, 1.0)):
        writes.take(step_pb2.WritesDone(global_rank=rank, bytes=10, seconds=seconds, may_land=rank == 1))
    assert (writes.num_pending, writes.num_bytes, writes.seconds) == (0, 30, 2.0)
    assert writes.may_land
