"""Keys of a rendezvous store that serves one epoch after the other."""

from typing import Any


def forget_keys(store: Any, *, prefix: str) -> None:
    """Deletes every key that begins with `prefix`; nothing where the store cannot list its keys (torch before 2.13)."""
    list_keys = getattr(store, "list_keys", None)
    if list_keys is None:
        return
    for key in list_keys():
        if key.startswith(prefix):
            store.delete_key(key)
