"""Whose turn it is: the decoding sequences of one dp coordinate, all of them in each step or a part."""

from itertools import islice

from worker.engine.sequence import Sequence

#: Steps in flight that one decoding sequence may be in: one that runs, one planned ahead.
_MAX_STEPS_OF_ONE = 2


class DecodeTurns:
    """By home, those first whose last turn is longest ago. Each home has a part of its own in every step, so that rows
    are as even over the cp ranks as homes are.
    """

    def __init__(self, *, cp: int) -> None:
        self._by_home: list[list[Sequence]] = [[] for _ in range(cp)]
        self._turn = 0

    def add(self, sequence: Sequence) -> None:
        """One more, behind all others."""
        self._by_home[sequence.home].append(sequence)

    def discard(self, sequence: Sequence) -> None:
        """It decodes no more, if it did."""
        members = self._by_home[sequence.home]
        if sequence in members:
            members.remove(sequence)

    @property
    def num_sequences(self) -> int:
        """How many decode."""
        return sum(map(len, self._by_home))

    @property
    def num_rows(self) -> int:
        """Of a step that has all of them, on the cp rank that has most."""
        return max(map(len, self._by_home))

    @property
    def num_tokens(self) -> int:
        """That all of them have been computed for, or are in steps in flight."""
        return sum(sequence.planned_tokens for members in self._by_home for sequence in members)

    def next_turn(self, *, parts: int, budget: int) -> list[list[Sequence]]:
        """Those of the next step by home: one of `parts` of all, `budget` at most over all; where that is less, homes
        share it and another home is first each time.
        """
        cp = len(self._by_home)
        self._turn += 1
        taken: list[list[Sequence]] = [[] for _ in range(cp)]
        for left in range(cp, 0, -1):
            home = (self._turn + left) % cp
            taken[home] = self._take(home, parts=parts, most=-(-budget // left))
            budget -= len(taken[home])
        return taken

    def _take(self, home: int, *, parts: int, most: int) -> list[Sequence]:
        members = self._by_home[home]
        count = min(-(-len(members) // parts), most)
        ready = (sequence for sequence in members if sequence.in_flight < _MAX_STEPS_OF_ONE)
        if count == len(members):
            return list(ready)
        taken = list(islice(ready, count))
        turned = set(taken)
        members[:] = [sequence for sequence in members if sequence not in turned] + taken
        return taken
