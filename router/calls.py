"""Calls that have been accepted, by the id that their client knows: each can be ended from then on, in every phase."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from router.errors import InvalidRequestError

T = TypeVar("T")


class Call:
    """One accepted call. `on_abort` is what ends it where it is now."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self._aborted = asyncio.Event()
        self._on_abort: Callable[[], None] = lambda: None

    @property
    def is_aborted(self) -> bool:
        """Whether its client is to be told that it was aborted."""
        return self._aborted.is_set()

    def abort(self) -> None:
        """Ends it; idempotent."""
        self._aborted.set()
        self._on_abort()

    def ends_by(self, on_abort: Callable[[], None]) -> None:
        """From now on an abort does `on_abort`."""
        self._on_abort = on_abort

    async def unless_aborted(self, work: Awaitable[T]) -> T | None:
        """The result of `work`, or None as soon as the call is aborted: what is still running then is left behind."""
        task, aborted = asyncio.ensure_future(work), asyncio.ensure_future(self._aborted.wait())
        task.add_done_callback(_look_at)
        try:
            await asyncio.wait({task, aborted}, return_when=asyncio.FIRST_COMPLETED)
            return None if self.is_aborted else await task
        finally:
            task.cancel()
            aborted.cancel()


def _look_at(task: "asyncio.Future[Any]") -> None:
    """What becomes of work that was left behind is nobody's concern."""
    if not task.cancelled():
        task.exception()


class Calls:
    """The calls of one server."""

    def __init__(self) -> None:
        self._by_id: dict[str, Call] = {}

    @contextmanager
    def accepted(self, request_id: str) -> Iterator[Call]:
        """A call for as long as it runs; an empty id gets one. InvalidRequestError where that id is running."""
        call = Call(request_id or f"{secrets.randbits(64):016x}")
        if call.request_id in self._by_id:
            raise InvalidRequestError(f"request_id is {request_id!r}: it must not be that of a running one")
        self._by_id[call.request_id] = call
        try:
            yield call
        finally:
            del self._by_id[call.request_id]

    def abort(self, request_id: str) -> bool:
        """Ends the call of that id; False where none is running."""
        call = self._by_id.get(request_id)
        if call is not None:
            call.abort()
        return call is not None
