"""What a rank keeps of its sequences, and what a prompt's chunk hands over. No kernels."""

from dataclasses import dataclass

from parallel.page_columns import PageColumns, column
from parallel.storage import CacheGroup
from proto import control_pb2


@dataclass(frozen=True, kw_only=True)
class TablePart:
    """Consecutive pages of a sequence in one cache group, from its page `first_page` on."""

    first_page: int
    columns: PageColumns


@dataclass(kw_only=True)
class RankSequence:
    """What a rank keeps of one sequence. Positions before `handed_off` are on their way to the target, whose tables, by
    cache group, are `target_pages`.
    """

    request_id: int
    sampling: control_pb2.Sampling
    prompt_end: int
    target: control_pb2.Target | None
    target_pages: tuple[TablePart, ...]
    handed_off: int = 0


@dataclass(frozen=True, kw_only=True)
class HandedChunk:
    """A prompt's chunk whose KV goes to a target: the positions [start, end) of `sequence`, which begin before the
    chunk where the prefix cache had some. `own_tokens` of them are this rank's. `sources` are, by cache group, the
    pages that hold what of these positions is handed over, with this rank's own numbers.
    """

    sequence: RankSequence
    start: int
    end: int
    own_tokens: int
    sources: tuple[TablePart, ...]

    def positions(self, group: CacheGroup) -> tuple[int, int]:
        """Those of them that a group hands over: behind a window nothing of a prompt is ever seen again."""
        return max(self.start, group.first_seen(self.sequence.prompt_end)), self.end


def table_part(pages: control_pb2.Pages) -> TablePart:
    """Pages as a message has them."""
    columns = PageColumns(cp_ranks=column(pages.cp_ranks), pages=column(pages.pages))
    return TablePart(first_page=pages.first_page, columns=columns)
