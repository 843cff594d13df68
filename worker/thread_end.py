"""The end of a thread that was told to end."""

import threading

_TIMEOUT_S = 10.0


def end_thread(thread: threading.Thread) -> None:
    """Blocking: RuntimeError where it lives on, as what it works with must not be freed then."""
    thread.join(timeout=_TIMEOUT_S)
    if thread.is_alive():
        raise RuntimeError(f"thread {thread.name} has not ended within {_TIMEOUT_S:g} s of being told to")
