"""The real tables of every cp rank beside the simulated ones: each plan goes to both, and what a rank reads off its own
is compared with plain lists.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from attention.exchange.choice import ExchangePolicy, Strategy
from attention.exchange.rows import ExchangeRows
from parallel.page_columns import column
from parallel.settings import EngineSettings
from parallel.shape import AttentionSizes, ReplicaShape
from parallel.storage import CacheGroup
from proto import step_pb2
from tests.engine.simulated_ranks import SimulatedRanks
from tests.engine.simulated_tables import Chunk, Known, SimulatedTables
from worker.step.rows import StepRows
from worker.step.sequence_tables import SequenceTables
from worker.step.sequences import HandedChunk

DEVICE = torch.device("cpu")
#: A slot and a position of its sequence.
Row = tuple[int, int]


@dataclass(kw_only=True)
class CheckedTables(SimulatedTables):
    """Of one dp coordinate; `ranks` by cp rank, `policies` and `spare_pages` by cache group."""

    sizes: AttentionSizes
    ranks: Sequence[SequenceTables]
    policies: Sequence[ExchangePolicy]
    spare_pages: Sequence[int]

    def apply(self, plan: step_pb2.StepPlan) -> list[Chunk]:
        """As the simulated tables alone, and proves what every rank makes of the same message."""
        chunks = super().apply(plan)
        message = plan.SerializeToString()
        rows = [rank.apply(step_pb2.StepPlan.FromString(message)) for rank in self.ranks]
        num_decoding = len(column(plan.decode_slots))
        for cp_rank in range(self.cp):
            own = self._own_rows(chunks, cp_rank, num_decoding=num_decoding)
            self._check_rank(rows[cp_rank], own, cp_rank)
        self._check_all_choose_alike(rows)
        self.examine(rows)
        return chunks

    def examine(self, rows: Sequence[StepRows]) -> None:
        """For more that is to be proven of a step; `rows` by cp rank."""

    def owner(self, number: int, slot: int, position: int) -> tuple[int, int]:
        """The cp rank and the page that hold a position in a group."""
        return self.known[slot].tables[number][position // self.settings.page_size]

    def _own_rows(self, chunks: Sequence[Chunk], cp_rank: int, *, num_decoding: int) -> list[Row]:
        """What a rank computes: decoding rows at home, those of a prompt where their page is."""
        found = []
        for index, chunk in enumerate(chunks):
            for position in range(chunk.start, chunk.end):
                home = self.known[chunk.slot].home
                computed_by = home if index < num_decoding else self.owner(0, chunk.slot, position)[0]
                if computed_by == cp_rank:
                    found.append((chunk.slot, position))
        return found

    def _check_rank(self, rows: StepRows, own: Sequence[Row], cp_rank: int) -> None:
        padding = -len(own) % self.sizes.tp
        assert rows.local_rows * self.sizes.tp == len(own) + padding
        assert rows.positions.tolist() == [position for _, position in own] + [0] * padding
        for number, exchange_rows in enumerate(rows.groups.values()):
            self._check_writes(number, exchange_rows, own, cp_rank, padding=padding)
            self._check_sight(number, exchange_rows, cp_rank)
        for handed in rows.handed:
            self._check_handed(handed, cp_rank)

    def _check_writes(self, number: int, rows: ExchangeRows, own: Sequence[Row], cp_rank: int, *, padding: int) -> None:
        """Where a rank puts those of its own rows that it stores too; padding goes to the spare page."""
        at_home = rows.take((rows.computed_by == cp_rank) & (rows.stored_by == cp_rank))
        write = at_home.where_stored(device=DEVICE)
        owners = [(position, *self.owner(number, slot, position)) for slot, position in own]
        stored = [(position, page) for position, owner, page in owners if owner == cp_rank]
        assert write.pages.tolist() == [page for _, page in stored] + [self.spare_pages[number]] * padding
        assert write.offsets.tolist() == [position % self.settings.page_size for position, _ in stored] + [0] * padding

    def _check_sight(self, number: int, rows: ExchangeRows, cp_rank: int) -> None:
        """What each segment, whoever computes it, sees of this rank's pages, and whose the others are."""
        size, over = self.settings.page_size, rows.over_pages_of(cp_rank)
        for segment, slot in enumerate(rows.slot.tolist()):
            kv_len = int(over.kv_len[segment])
            if slot == self.settings.max_sequences:
                assert kv_len == 1 and over.table_row[segment] == slot
                continue
            start, end = int(rows.start[segment]), int(rows.end[segment])
            seen = self._seen(number, self.known[slot], start=start, end=end)
            mine = [page for owner, page in seen if owner == cp_rank]
            first = int(over.first_page[segment])
            assert rows.tables.host[slot, first : first - (-kv_len // size)].tolist() == mine
            assert rows.stored_by[segment] == seen[-1][0]
            assert kv_len == len(mine) * size - (-end % size if seen[-1][0] == cp_rank else 0)
            place = int(rows.first_page[segment])
            assert rows.owners[slot, place : place + len(seen)].tolist() == [owner for owner, _ in seen]

    def _seen(self, number: int, known: Known, *, start: int, end: int) -> list[tuple[int, int]]:
        """The pages that rows [start, end) see, each with its owner."""
        window, size = self.groups[number].window, self.settings.page_size
        first = max(0, start - window + 1) if window else 0
        return [known.tables[number][place] for place in range(first // size, -(-end // size))]

    def _check_handed(self, handed: HandedChunk, cp_rank: int) -> None:
        """The pages that a hand-off reads: everybody knows whose each is, and its number on this rank."""
        (known,) = (known for known in self.known.values() if known.request_id == handed.sequence.request_id)
        for group, source, table in zip(self.groups, handed.sources, known.tables, strict=True):
            start, end = handed.positions(group)
            size, columns = self.settings.page_size, source.columns
            for place in range(start // size, -(-end // size) if start < end else 0):
                owner, page = table[place]
                index = place - source.first_page
                assert index >= 0 and columns.cp_ranks[index] == owner
                assert owner != cp_rank or columns.pages[index] == page

    def _check_all_choose_alike(self, rows: Sequence[StepRows]) -> None:
        """A rank's padding, which the others do not know, changes nothing of what it exchanges with them."""
        for group, policy in zip(self.groups, self.policies, strict=True):
            choices = [self._remote_parts(policy, rank.groups[group.name]) for rank in rows]
            assert all(choice == choices[0] for choice in choices)

    def _remote_parts(self, policy: ExchangePolicy, rows: ExchangeRows) -> list[tuple[Strategy, list[int]]]:
        is_real = rows.slot != self.settings.max_sequences
        parts = [(strategy, np.flatnonzero(index & is_real).tolist()) for strategy, index in policy.parts(rows)]
        return [part for part in parts if part[0] is not Strategy.LOCAL]


def real_tables(
    shape: ReplicaShape, *, dp: int, settings: EngineSettings, groups: Sequence[CacheGroup]
) -> list[SequenceTables]:
    """Those of each cp rank of a dp coordinate."""
    ranks = [shape.attention_rank(pp_rank=0, dp=dp, cp=cp, tp=0) for cp in range(shape.attention.cp)]
    return [
        SequenceTables(
            shape=shape, coordinates=shape.coordinates(rank), settings=settings, groups=groups, device=DEVICE
        )
        for rank in ranks
    ]


class RanksWithTables(SimulatedRanks):
    """Simulated ranks that keep real tables, all of them checked at every plan."""

    def __init__(
        self,
        *,
        shape: ReplicaShape,
        settings: EngineSettings,
        groups: Sequence[CacheGroup],
        policies: Sequence[ExchangePolicy],
        seed: int = 0,
        faults: float = 0.0,
        make_tables: Callable[..., CheckedTables] = CheckedTables,
    ) -> None:
        super().__init__(shape=shape, settings=settings, groups=groups, seed=seed, faults=faults)
        self.tables = [
            make_tables(
                cp=shape.attention.cp,
                groups=groups,
                settings=settings,
                prompts=self.prompts,
                sizes=shape.attention,
                ranks=real_tables(shape, dp=dp, settings=settings, groups=groups),
                policies=policies,
                spare_pages=[settings.pages_of(group, pp=shape.pp) for group in groups],
            )
            for dp in range(shape.attention.dp)
        ]
