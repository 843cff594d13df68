"""The prefix cache alone: which page goes first, and the keys by which pages are found."""

from collections.abc import Sequence

import pytest

from worker.engine.prefix_cache import CachedPage, PageKeys, PrefixCache


def page_digests(tokens: Sequence[int], *, page_size: int, salt: bytes) -> list[bytes]:
    keys = PageKeys(page_size=page_size, salt=salt)
    keys.extend(tokens, end=len(tokens))
    return keys.digests


def test_the_least_recently_used_page_goes_first_and_the_end_of_a_prefix_before_its_start() -> None:
    cache = PrefixCache(cp=1)
    old, new = (page_digests(tokens, page_size=4, salt=b"") for tokens in (range(8), range(20, 28)))
    for page, digest in enumerate([*old, *new]):
        assert cache.publish(digest, CachedPage(cp_rank=0, page=page), reader=1)
    assert cache.release([*reversed(old), *reversed(new)], reader=1) == []
    assert cache.acquire(old[0], reader=2) == (CachedPage(cp_rank=0, page=0), False)
    assert [cache.evict(0), cache.evict(0), cache.evict(0)] == [1, 3, 2]
    cache.release(old[:1], reader=2)
    assert cache.num_first(old) == 1


def test_what_is_withdrawn_goes_at_once_where_nobody_reads_it_else_with_its_last_reader() -> None:
    cache = PrefixCache(cp=1)
    digests = page_digests(range(12), page_size=4, salt=b"")
    places = [CachedPage(cp_rank=0, page=page) for page in range(3)]
    for digest, place in zip(digests[:2], places[:2], strict=True):
        assert cache.publish(digest, place, reader=1)
    cache.release(digests[1:2], reader=1)
    assert cache.withdraw(digests) == places[1:2]
    assert cache.num_idle(0) == 0 and not any(map(cache.has, digests))
    for digest, place in zip(digests[1:], places[1:], strict=True):  # the third was not here to be withdrawn
        assert cache.publish(digest, place, reader=2)
    assert [cache.has(digest) for digest in digests] == [False, True, True]
    assert not cache.publish(digests[0], places[0], reader=2)
    cache.release(digests[:1], reader=1)
    assert cache.pages() == [[1, 2]]


def test_a_key_depends_on_all_tokens_before_it_and_on_the_model_and_not_on_the_page_size() -> None:
    digests = page_digests(range(16), page_size=4, salt=b"a")
    assert len(set(digests)) == 4
    assert page_digests(range(16), page_size=8, salt=b"a") == digests[1::2]
    assert page_digests((5, *range(1, 16)), page_size=4, salt=b"a")[3] != digests[3]
    assert page_digests(range(16), page_size=4, salt=b"b")[3] != digests[3]


@pytest.mark.parametrize("cut", range(17))
def test_keys_that_grow_with_their_tokens_are_those_of_the_whole(cut: int) -> None:
    keys = PageKeys(page_size=4, salt=b"a")
    for end in (cut, cut, 17):
        keys.extend(range(17), end=end)
    assert keys.digests == page_digests(range(17), page_size=4, salt=b"a")
