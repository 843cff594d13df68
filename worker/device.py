"""What differs between devices outside kernels and collectives: waiting for work that was launched."""

from collections.abc import Callable

import torch


def torch_device(kind: str, *, index: int) -> torch.device:
    """The torch device of a rank; ranks on a CPU share it."""
    return torch.device("cpu") if kind == "cpu" else torch.device(kind, index)


def completion(device: torch.device) -> Callable[[], None]:
    """A function that blocks until all work launched so far is done; on a CPU it is done already."""
    if device.type == "cpu":
        return lambda: None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event.synchronize
