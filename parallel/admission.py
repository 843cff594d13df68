"""How many pages a sequence may come to need on one coordinate, and the sentence for one that can never fit."""

from bisect import bisect_right

from parallel.chunk import admission_bound
from parallel.settings import EngineSettings

#: Tokens of the prompt, and drawn after it, by which a replica proves that it serves.
WARM_UP_PROMPT_TOKENS, WARM_UP_NEW_TOKENS = 3, 2


def pages_needed(tokens: int, *, page_size: int, cp: int) -> int:
    """Pages that any one of `cp` coordinates may come to hold of a sequence of `tokens` tokens."""
    return admission_bound(pages=-(-tokens // page_size), cp=cp)


def longest_sequence(settings: EngineSettings, *, cp: int) -> int:
    """Tokens of the longest sequence that an empty pool admits, prompt and new tokens together."""
    held = settings.num_pages
    pages = range(cp * held + 1)
    return settings.page_size * (bisect_right(pages, held, key=lambda count: admission_bound(pages=count, cp=cp)) - 1)


def check_fits(*, prompt_tokens: int, max_new_tokens: int, settings: EngineSettings, cp: int) -> None:
    """ValueError with the numbers and the remedy where an empty pool could not hold prompt and new tokens."""
    size, held = settings.page_size, settings.num_pages
    needed = pages_needed(prompt_tokens + max_new_tokens, page_size=size, cp=cp)
    if needed > held:
        new = f" with max_new_tokens {max_new_tokens}" if max_new_tokens else ""
        raise ValueError(
            f"a prompt of {prompt_tokens} tokens{new} needs {needed} pages of {size} "
            f"tokens on one coordinate, but kv_tokens {settings.kv_tokens} gives {held}: shorten it, or raise kv_tokens"
        )
