"""Which sequences share a padded batch. Pure; sizes in pages, costs measured on the CPU."""

from collections.abc import Sequence


def plan_batches(num_pages: Sequence[int], *, max_batch_pages: int, max_padding_pages: int) -> list[list[int]]:
    """Parts the sequences, by index, into batches padded to their longest member.

    A batch holds at most `max_batch_pages` with its padding (one sequence may have more) and at most
    `max_padding_pages` of padding: about what one more batch costs, so a long sequence does not pad the short ones.
    """
    batches: list[list[int]] = []
    longest = padding = 0
    for index in sorted(range(len(num_pages)), key=lambda index: -num_pages[index]):
        padding += longest - num_pages[index]
        fits = batches and (len(batches[-1]) + 1) * longest <= max_batch_pages and padding <= max_padding_pages
        if not fits:
            batches.append([])
            longest, padding = num_pages[index], 0
        batches[-1].append(index)
    return batches
