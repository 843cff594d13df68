"""Which experts each ep coordinate of a block holds: the placement table.

A block has a number of slots that ep divides, each with one expert; an expert has one slot or more, so that a busy one
may be held twice. Without a table the slots are the experts in order.
"""

from dataclasses import dataclass
from functools import cached_property

from parallel.mesh import divisors


@dataclass(frozen=True, kw_only=True)
class ExpertTable:
    """`slots[s]` is the expert in slot s; ep coordinate c has the slots [c * slots_per_rank, (c + 1) * slots_per_rank).

    ValueError with the numbers where a slot names no expert, an expert has no slot, or ep does not divide the slots.
    """

    num_experts: int
    ep: int
    slots: tuple[int, ...]

    def __post_init__(self) -> None:
        for slot, expert in enumerate(self.slots):
            if not 0 <= expert < self.num_experts:
                raise ValueError(
                    f"placement[{slot}] is {expert}, but the model has {self.num_experts} experts: "
                    f"write 0 to {self.num_experts - 1}"
                )
        missing = sorted(set(range(self.num_experts)) - set(self.slots))
        if missing:
            raise ValueError(f"placement leaves out expert {missing[0]}: every expert needs a slot")
        if len(self.slots) % self.ep:
            legal = ", ".join(map(str, divisors(len(self.slots))))
            what = "experts" if len(self.slots) == self.num_experts else "slots of its placement"
            raise ValueError(f"ep {self.ep} does not divide {len(self.slots)} {what}: ep may be {legal}")

    @property
    def slots_per_rank(self) -> int:
        """Slots of each ep coordinate."""
        return len(self.slots) // self.ep

    def held_by(self, ep_rank: int) -> tuple[int, ...]:
        """The experts in the slots of `ep_rank`, slot by slot."""
        return self.slots[ep_rank * self.slots_per_rank : (ep_rank + 1) * self.slots_per_rank]

    @cached_property
    def slots_of(self) -> tuple[tuple[int, ...], ...]:
        """For each expert its slots, ascending."""
        found: list[list[int]] = [[] for _ in range(self.num_experts)]
        for slot, expert in enumerate(self.slots):
            found[expert].append(slot)
        return tuple(map(tuple, found))


def expert_table(*, num_experts: int, ep: int, placement: tuple[int, ...]) -> ExpertTable:
    """The table of `placement`, or of the experts in order where that is empty."""
    return ExpertTable(num_experts=num_experts, ep=ep, slots=placement or tuple(range(num_experts)))
