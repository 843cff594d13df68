"""Pages that a decode replica sets aside for sequences whose KV is on its way, first come first served."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from proto import control_pb2
from worker.engine.dp_state import DpState


@dataclass(frozen=True, kw_only=True)
class Granted:
    """Where a sequence will run that has pages and has not started."""

    dp: int
    slot: int
    home: int


class Reservations:
    """Queued and granted reservations of one replica."""

    def __init__(self, dp_states: Sequence[DpState], *, page_size: int) -> None:
        self._dp_states = dp_states
        self._page_size = page_size
        self._queued: dict[int, control_pb2.Reserve] = {}
        self._granted: dict[int, Granted] = {}

    def __len__(self) -> int:
        return len(self._queued) + len(self._granted)

    @property
    def num_queued(self) -> int:
        """Those that wait for pages."""
        return len(self._queued)

    def add(self, reserve: control_pb2.Reserve) -> None:
        """Queues one."""
        self._queued[reserve.request_id] = reserve

    def grant(self) -> Iterator[control_pb2.Reserved]:
        """Grants queued ones in order, until the first that fits nowhere now."""
        for reserve in list(self._queued.values()):
            granted = self._try_grant(reserve)
            if granted is None:
                return
            yield granted

    def take(self, request_id: int) -> Granted:
        """A granted one whose sequence starts: its pages, slot and home are the sequence's now."""
        assert request_id in self._granted, f"{request_id:016x} starts before it has pages"
        return self._granted.pop(request_id)

    def release(self, request_id: int) -> bool:
        """Gives one up with all that it has; False where there is none."""
        granted = self._granted.pop(request_id, None)
        if granted is None:
            return self._queued.pop(request_id, None) is not None
        state = self._dp_states[granted.dp]
        state.pages.release(request_id)
        state.give_back_slot(granted.slot)
        state.homes.give_back(granted.home)
        return True

    def _try_grant(self, reserve: control_pb2.Reserve) -> control_pb2.Reserved | None:
        request_id, prompt_tokens = reserve.request_id, reserve.prompt_tokens
        num_pages = -(-(prompt_tokens + reserve.max_new_tokens) // self._page_size)
        homes = {
            state: _home_with_room(state, prompt_tokens=prompt_tokens, num_pages=num_pages)
            for state in self._dp_states
            if state.has_slot
        }
        fitting = [(state, home) for state, home in homes.items() if home is not None]
        if not fitting:
            return None
        state, home = max(fitting, key=lambda item: (item[0].pages.num_free, -item[0].dp))
        state.pages.reserve(request_id, prompt_tokens=prompt_tokens, num_pages=num_pages, home=home)
        state.homes.take(home)
        del self._queued[request_id]
        self._granted[request_id] = Granted(dp=state.dp, slot=state.take_slot(), home=home)
        return control_pb2.Reserved(request_id=request_id, dp=state.dp, pages=state.pages.columns(request_id))


def _home_with_room(state: DpState, *, prompt_tokens: int, num_pages: int) -> int | None:
    """Where a sequence would be at home: a window's pages all lie there, and may not fit where rows would be most even.
    None where they fit nowhere.
    """
    for home in state.homes.by_evenness:
        if state.pages.can_reserve(prompt_tokens=prompt_tokens, num_pages=num_pages, home=home):
            return home
    return None
