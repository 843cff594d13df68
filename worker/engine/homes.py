"""Where decoding sequences are at home: the cp rank that computes a sequence's rows from its first token to its end."""


class Homes:
    """How many sequences of one dp coordinate are at home on each cp rank. One that only prefills has no home."""

    def __init__(self, cp: int) -> None:
        self._counts = [0] * cp

    @property
    def counts(self) -> tuple[int, ...]:
        """By cp rank."""
        return tuple(self._counts)

    @property
    def next(self) -> int:
        """The cp rank that fewest are at home on: so rows are even over cp."""
        return self._counts.index(min(self._counts))

    @property
    def by_evenness(self) -> list[int]:
        """All cp ranks: `next`, and where one is to go that finds no room there."""
        return sorted(range(len(self._counts)), key=self._counts.__getitem__)

    def take(self, home: int) -> None:
        """One more is at home there."""
        self._counts[home] += 1

    def give_back(self, home: int) -> None:
        """One that was at home there has ended."""
        self._counts[home] -= 1
