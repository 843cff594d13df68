"""Threads in which requests are turned into token ids: a long text takes seconds, and holds up nobody's short one."""

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from router.errors import OverloadedError

T = TypeVar("T")

#: Bytes from which a request is long: of about ten milliseconds.
LONG_BYTES = 64 << 10
_SHORT_THREADS = 2
_RETRY_S = 1.0


class Tokenising:
    """Two pools of threads: for short requests, and `long_threads` for long ones; at most `max_waiting` of each."""

    def __init__(self, *, long_threads: int, max_waiting: int) -> None:
        self._short = ThreadPoolExecutor(_SHORT_THREADS, thread_name_prefix="tokenise")
        self._long = ThreadPoolExecutor(long_threads, thread_name_prefix="tokenise-long")
        self._max_waiting = max_waiting
        self._num_waiting = {self._short: 0, self._long: 0}

    async def run(self, work: Callable[[], T], *, num_bytes: int) -> T:
        """The result of `work`, on a request of `num_bytes`; OverloadedError where too many wait.

        Cancelled, it leaves a thread that has begun to its end.
        """
        pool = self._long if num_bytes >= LONG_BYTES else self._short
        if self._num_waiting[pool] >= self._max_waiting:
            raise OverloadedError(
                f"{self._num_waiting[pool]} requests like it are being tokenised, limits.max_waiting is "
                f"{self._max_waiting}: try again later",
                retry_s=_RETRY_S,
            )
        future = pool.submit(work)
        self._num_waiting[pool] += 1
        # Counted until the thread itself is free: one that was left behind still takes its time.
        loop = asyncio.get_running_loop()
        future.add_done_callback(lambda _: self._tell_free(pool, loop))
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Begins nothing more; idempotent."""
        for pool in (self._short, self._long):
            pool.shutdown(wait=False, cancel_futures=True)

    def _tell_free(self, pool: ThreadPoolExecutor, loop: asyncio.AbstractEventLoop) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended before this thread
            loop.call_soon_threadsafe(self._one_less, pool)

    def _one_less(self, pool: ThreadPoolExecutor) -> None:
        self._num_waiting[pool] -= 1
