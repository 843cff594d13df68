"""How many pages a sequence may come to need on one rank, and the sentence for one that can never fit."""

from bisect import bisect_right
from collections.abc import Sequence

from parallel.chunk import admission_bound
from parallel.settings import EngineSettings
from parallel.storage import CacheGroup

#: Tokens of the prompt, and drawn after it, by which a replica proves that it serves.
WARM_UP_PROMPT_TOKENS, WARM_UP_NEW_TOKENS = 3, 2


def pages_needed(tokens: int, *, page_size: int, cp: int) -> int:
    """Pages that any one of `cp` coordinates may come to hold of a sequence of `tokens` tokens."""
    return admission_bound(pages=-(-tokens // page_size), cp=cp)


def longest_sequence(settings: EngineSettings, *, cp: int, groups: Sequence[CacheGroup]) -> int:
    """Tokens of the longest sequence that an empty pool admits, prompt and new tokens together."""
    held = settings.num_pages
    pages = range(cp * held + 1)
    longest = bisect_right(pages, held, key=lambda count: admission_bound(pages=count, cp=cp)) - 1
    if any(_window_pages(longest, group, page_size=settings.page_size) > held for group in groups):
        longest = held
    return settings.page_size * longest


def check_fits(
    *,
    prompt_tokens: int,
    max_new_tokens: int,
    settings: EngineSettings,
    cp: int,
    groups: Sequence[CacheGroup] = (),
) -> None:
    """ValueError with the numbers and the remedy where an empty pool could not hold prompt and new tokens; with the
    model's cache `groups`, also where a window, which lies whole on one rank, is longer than that rank's memory.
    """
    size, held = settings.page_size, settings.num_pages
    new = f" with max_new_tokens {max_new_tokens}" if max_new_tokens else ""
    what = f"a prompt of {prompt_tokens} tokens{new}"
    pages = -(-(prompt_tokens + max_new_tokens) // size)
    needed = {"": admission_bound(pages=pages, cp=cp)}
    for group in groups:
        needed[f" for its window of {group.window}"] = _window_pages(pages, group, page_size=size)
    for why, count in needed.items():
        if count > held:
            raise ValueError(
                f"{what} needs {count} pages of {size} tokens on one rank{why}, but kv_tokens "
                f"{settings.kv_tokens} gives {held}: shorten it, or raise kv_tokens"
            )


def _window_pages(pages: int, group: CacheGroup, *, page_size: int) -> int:
    """Pages of a sequence of `pages` pages that one rank holds in a window's group; 0 in another."""
    return min(pages, -(-group.window // page_size) + 2) if group.window else 0
