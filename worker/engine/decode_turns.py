"""Whose turn it is: the decoding sequences of one dp coordinate, every pp-th part of them in each step."""

from itertools import islice

from worker.engine.sequence import Sequence

#: Steps in flight that one decoding sequence may be in: one that runs, one planned ahead.
_MAX_STEPS_OF_ONE = 2


class DecodeTurns:
    """By home, those first whose last turn is longest ago. Each home has a part of its own in every step, so that rows
    are as even over the cp ranks as homes are, and all stages have work.
    """

    def __init__(self, *, cp: int, pp: int) -> None:
        self._pp = pp
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

    def next_turn(self, *, budget: int) -> list[list[Sequence]]:
        """Those of the next step by home, `budget` at most over all; where that is less than wait, homes share it and
        another home is first each time.
        """
        cp = len(self._by_home)
        self._turn += 1
        taken: list[list[Sequence]] = [[] for _ in range(cp)]
        for left in range(cp, 0, -1):
            home = (self._turn + left) % cp
            taken[home] = self._take(home, most=-(-budget // left))
            budget -= len(taken[home])
        return taken

    def _take(self, home: int, *, most: int) -> list[Sequence]:
        members = self._by_home[home]
        count = min(-(-len(members) // self._pp), most)
        ready = (sequence for sequence in members if sequence.in_flight < _MAX_STEPS_OF_ONE)
        if count == len(members):
            return list(ready)
        taken = list(islice(ready, count))
        turned = set(taken)
        members[:] = [sequence for sequence in members if sequence not in turned] + taken
        return taken
