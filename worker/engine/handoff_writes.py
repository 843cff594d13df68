"""The writes that hand one sequence's KV over, as its leader counts them. Ranks execute them (`worker/handoff/`)."""

from dataclasses import dataclass, field

from proto import step_pb2


@dataclass(kw_only=True)
class HandoffWrites:
    """`num_pending` reports are still to come, one of each rank for each chunk. Of those that came, `num_bytes` is the
    sum; `may_land` says that bytes of one that failed may still reach the target.
    """

    num_pending: int = 0
    num_bytes: int = 0
    may_land: bool = False
    _seconds: dict[int, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """How long the rank wrote that wrote longest."""
        return max(self._seconds.values(), default=0.0)

    def take(self, done: step_pb2.WritesDone) -> None:
        """One rank's word that of its writes of one chunk none is under way any more."""
        self.num_pending -= 1
        self.num_bytes += done.bytes
        self.may_land |= done.may_land
        self._seconds[done.global_rank] = self._seconds.get(done.global_rank, 0.0) + done.seconds
