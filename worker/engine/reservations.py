"""Pages that a decode replica sets aside for sequences whose KV is on its way, first come first served."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from parallel.chunk import admission_bound
from proto import control_pb2
from worker.engine.dp_state import DpState


@dataclass(frozen=True, kw_only=True)
class Reservation:
    """A sequence before its start: pages at `dp`, or in the queue where dp is None."""

    request_id: int
    num_pages: int
    dp: int | None = None
    slot: int = -1


class Reservations:
    """Queued and granted reservations of one replica."""

    def __init__(self, dp_states: Sequence[DpState], *, cp: int) -> None:
        self._dp_states = dp_states
        self._cp = cp
        self._by_request: dict[int, Reservation] = {}

    def __len__(self) -> int:
        return len(self._by_request)

    @property
    def num_queued(self) -> int:
        """Those that wait for pages."""
        return sum(reservation.dp is None for reservation in self._by_request.values())

    def add(self, request_id: int, *, num_pages: int) -> None:
        """Queues one."""
        self._by_request[request_id] = Reservation(request_id=request_id, num_pages=num_pages)

    def grant(self) -> Iterator[control_pb2.Reserved]:
        """Grants queued ones in order, until the first that fits nowhere now."""
        for reservation in [item for item in self._by_request.values() if item.dp is None]:
            granted = self._try_grant(reservation)
            if granted is None:
                return
            yield granted

    def take(self, request_id: int) -> Reservation:
        """A granted one whose sequence starts: its pages and slot are the sequence's now."""
        reservation = self._by_request.pop(request_id)
        assert reservation.dp is not None, f"{request_id:016x} starts before it has pages"
        return reservation

    def release(self, request_id: int) -> bool:
        """Gives one up with all that it has; False where there is none."""
        reservation = self._by_request.pop(request_id, None)
        if reservation is not None and reservation.dp is not None:
            self._dp_states[reservation.dp].pages.release(request_id)
            self._dp_states[reservation.dp].give_back_slot(reservation.slot)
        return reservation is not None

    def _try_grant(self, reservation: Reservation) -> control_pb2.Reserved | None:
        request_id, num_pages = reservation.request_id, reservation.num_pages
        most = admission_bound(pages=num_pages, cp=self._cp)
        fitting = [s for s in self._dp_states if s.has_slot and s.pages.can_spread(num_pages, most=most)]
        if not fitting:
            return None
        state = max(fitting, key=lambda state: (state.pages.num_free, -state.dp))
        places = state.pages.spread(request_id, num_pages, most=most)
        self._by_request[request_id] = Reservation(
            request_id=request_id, num_pages=num_pages, dp=state.dp, slot=state.take_slot()
        )
        pages = [control_pb2.Page(coordinate=place.coordinate, page=place.page) for place in places]
        return control_pb2.Reserved(request_id=request_id, dp=state.dp, pages=pages)
