"""What differs between devices outside kernels and collectives: waiting for work that was launched."""

import queue
import threading
from collections.abc import Callable

import torch

from worker.thread_end import end_thread


def torch_device(kind: str, *, index: int) -> torch.device:
    """The torch device of a rank; ranks on a CPU share it."""
    return torch.device("cpu") if kind == "cpu" else torch.device(kind, index)


def use_device(device: torch.device) -> None:
    """Makes `device` the calling thread's own: a thread without a CUDA context finds no way between GPUs."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def to_host(x: torch.Tensor) -> torch.Tensor:
    """x in host memory once `completion` is reached: a later step's work is not waited for."""
    if x.device.type == "cpu":
        return x
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


class ResultSender:
    """Delivers the results of steps in order; on a GPU in a thread, so that the next step is launched meanwhile."""

    def __init__(self, device: torch.device, *, fail: Callable[[BaseException], None]) -> None:
        self._is_immediate = device.type == "cpu"
        self._fail = fail
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="results", daemon=True)
        self._thread.start()

    def put(self, deliver: Callable[[], None]) -> None:
        """Calls `deliver`, which may block until its step is computed, after those put before it."""
        if self._is_immediate:
            deliver()
        else:
            self._queue.put(deliver)

    def close(self) -> None:
        """Ends the thread after what was put is delivered; idempotent."""
        self._queue.put(None)
        end_thread(self._thread)

    def _run(self) -> None:
        try:
            while (deliver := self._queue.get()) is not None:
                deliver()
        except BaseException as error:  # the thread's edge: the rank must not go on without it
            self._fail(error)


def completion(device: torch.device) -> Callable[[], None]:
    """A function that blocks until all work launched so far is done; on a CPU it is done already."""
    if device.type == "cpu":
        return lambda: None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event.synchronize
