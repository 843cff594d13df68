"""Cache groups for tests of the leader, which looks at nothing but what they see."""

from parallel.storage import EVERYTHING, CacheGroup, Window, keys_and_values


def full_group() -> CacheGroup:
    """A group that sees everything."""
    return keys_and_values("full", layers=[0], sees=EVERYTHING, num_kv_heads=1, head_size=4)


def window_group(tokens: int) -> CacheGroup:
    """A group that sees the last `tokens` positions."""
    return keys_and_values("window", layers=[1], sees=Window(tokens=tokens), num_kv_heads=1, head_size=4)


#: What most models have.
FULL = (full_group(),)
