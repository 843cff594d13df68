"""Every strategy gives each row what one rank with all pages would, and leaves its K and V with the page's owner."""

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch._C._distributed_c10d import HashStore

from attention.exchange.choice import ExchangePolicy, Strategy
from attention.exchange.member import CpMember
from attention.exchange.plan import plan_exchange
from attention.exchange.rows import ExchangeRows
from attention.interface import AttentionSpec
from attention.layer_memory import LayerFormat, LayerMemory, bind_layer
from attention.torch_kernel.backend import TorchAttentionBackend
from benchmarks.exchange_steps import NUM_PAGES, StepChunk, cache_group, exchange_policy, step_rows
from parallel.collectives.communicator import CollectiveClock, Communicator
from parallel.collectives.groups import Rendezvous, build_groups
from parallel.shape import AttentionSizes, ReplicaShape
from parallel.storage import EVERYTHING, PageLayout, Window, lay_out_page
from tests.attention.reference import positions_apart

PAGE, HEADS, KV_HEADS, DIM = 4, 4, 2, 8
SCALE = DIM**-0.5
DEVICE = torch.device("cpu")

PROMPTS = [
    StepChunk(cached_tokens=0, new_tokens=3),
    StepChunk(cached_tokens=0, new_tokens=37),
    StepChunk(cached_tokens=22, new_tokens=1),
    StepChunk(cached_tokens=30, new_tokens=25),
]
#: At any home, whoever owns the page: some begin a page, some continue one, one has a page alone.
DECODING = [
    StepChunk(cached_tokens=cached, new_tokens=1, home=home)
    for cached, home in ((1, 0), (1, 1), (16, 1), (17, 0), (40, 0), (43, 1), (51, 0), (8, 1))
]


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """What a chunk's sequence has: q of its new positions, k and v of all."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


def numbers_of(chunks: Sequence[StepChunk]) -> list[Numbers]:
    generator = torch.Generator().manual_seed(0)
    return [
        Numbers(
            q=torch.randn(chunk.new_tokens, HEADS, DIM, generator=generator),
            k=torch.randn(chunk.cached_tokens + chunk.new_tokens, KV_HEADS, DIM, generator=generator),
            v=torch.randn(chunk.cached_tokens + chunk.new_tokens, KV_HEADS, DIM, generator=generator),
        )
        for chunk in chunks
    ]


def expected(chunk: StepChunk, numbers: Numbers, position: int, *, window: int) -> torch.Tensor:
    """What the row at `position` gives: [Hq, D]."""
    seen = slice(max(position + 1 - window, 0) if window else 0, position + 1)
    k, v = (part[seen].repeat_interleave(HEADS // KV_HEADS, dim=1).double() for part in (numbers.k, numbers.v))
    scores = torch.einsum("hd,lhd->hl", numbers.q[position - chunk.cached_tokens].double(), k) * SCALE
    return torch.einsum("hl,lhd->hd", scores.softmax(dim=1), v)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One step: its chunks, how they are exchanged and how memory lies."""

    chunks: Sequence[StepChunk]
    cp: int
    forced: Strategy | None
    window: int = 0
    max_tokens: int = 1 << 20
    tp: int = 1
    lay_out: Callable[[PageLayout], PageLayout] = lambda page: page

    def run(self, rank: int, group: Communicator) -> None:
        """On one cp rank: asserts on its own rows and pages."""
        sees = Window(tokens=self.window) if self.window else EVERYTHING
        storage = cache_group(sees=sees, num_kv_heads=KV_HEADS, head_size=DIM)
        steps = step_rows(self.chunks, cp=self.cp, cp_rank=rank, page_size=PAGE, group=storage, tp=self.tp)
        rows, numbers = steps.groups["full"], numbers_of(self.chunks)
        page = self.lay_out(lay_out_page(storage.planes, page_size=PAGE, num_heads=KV_HEADS, dtype="float32"))
        spec = AttentionSpec(
            num_heads=HEADS, page=page, key=storage.key, value=storage.value, window=self.window, device=DEVICE
        )
        form = LayerFormat(page=page, key=storage.key, value=storage.value, scale=SCALE)
        # The spare page is the last one that there is.
        layer = bind_layer(torch.zeros((NUM_PAGES + 1, page.page_bytes), dtype=torch.uint8), form)
        self._fill(layer, rows, numbers, rank)
        own = rows.take((rows.computed_by == rank) & (np.arange(len(rows.chunk)) < len(rows.chunk) - rows.padding))
        chunk_of_row = np.repeat(own.chunk, own.num_rows).tolist()
        places = list(zip(chunk_of_row, own.positions.tolist(), strict=True))
        member = CpMember(group=group, backend=TorchAttentionBackend(spec), policy=self._policy(), device=DEVICE)
        exchange = plan_exchange(rows, member=member)
        padding = [torch.zeros(rows.padding, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
        q = [numbers[chunk].q[position - self.chunks[chunk].cached_tokens] for chunk, position in places]
        k, v = ([getattr(numbers[chunk], plane)[position] for chunk, position in places] for plane in ("k", "v"))
        q_TH, k_TH, v_TH = (
            torch.cat([*(row[None] for row in part), pad]) for part, pad in zip((q, k, v), padding, strict=True)
        )
        output, lse = exchange.attend(q_TH, (k_TH, v_TH), layer, with_lse=True)
        assert lse is not None and lse.shape == (len(places) + rows.padding, HEADS)
        assert output.isfinite().all()
        for row, (chunk, position) in enumerate(places):
            wanted = expected(self.chunks[chunk], numbers[chunk], position, window=self.window)
            torch.testing.assert_close(output[row].double(), wanted, atol=1e-5, rtol=1e-5)
        self._check_stored(layer, rows, numbers, rank)

    def _policy(self) -> ExchangePolicy:
        return exchange_policy(
            num_heads=HEADS,
            num_kv_heads=KV_HEADS,
            head_dim=DIM,
            page_size=PAGE,
            max_tokens=self.max_tokens,
            window=self.window,
            forced=self.forced,
        )

    def _fill(self, layer: LayerMemory, rows: ExchangeRows, numbers: Sequence[Numbers], rank: int) -> None:
        """What earlier steps stored on this rank."""
        for chunk, position, page in self._own_positions(rows, rank):
            if position < self.chunks[chunk].cached_tokens:
                layer.key[page, :, position % PAGE] = numbers[chunk].k[position]
                layer.value[page, :, position % PAGE] = numbers[chunk].v[position]

    def _check_stored(self, layer: LayerMemory, rows: ExchangeRows, numbers: Sequence[Numbers], rank: int) -> None:
        """Every position is with the owner of its page, the new ones too."""
        for chunk, position, page in self._own_positions(rows, rank):
            assert torch.equal(layer.key[page, :, position % PAGE], numbers[chunk].k[position]), (chunk, position)
            assert torch.equal(layer.value[page, :, position % PAGE], numbers[chunk].v[position])

    def _own_positions(self, rows: ExchangeRows, rank: int) -> list[tuple[int, int, int]]:
        """(chunk, position, page) of all that lies on this rank, read off the tables alone."""
        found = []
        for slot, chunk in enumerate(self.chunks):
            own = 0
            for place in range(-(-(chunk.cached_tokens + chunk.new_tokens) // PAGE)):
                if rows.owners[slot, place] == rank:
                    page = int(rows.tables.host[slot, own])
                    own += 1
                    end = min((place + 1) * PAGE, chunk.cached_tokens + chunk.new_tokens)
                    found += [(slot, position, page) for position in range(place * PAGE, end)]
        return found


def run_on_all(settings: Sequence[Setting], *, cp: int) -> None:
    """Runs each on `cp` ranks, which are threads with gloo between them."""
    shape, store = ReplicaShape(attention=AttentionSizes(cp=cp), experts=None), HashStore()

    def rank_main(rank: int) -> None:
        group = build_groups(
            shape,
            global_rank=rank,
            order=shape.creation_order_of(rank),
            rendezvous=Rendezvous(
                store=store, device=DEVICE, host_address="127.0.0.1", build_timeout_s=30, timeout_s=30
            ),
            clock=CollectiveClock(),
        )["attn_cp"]
        for setting in settings:
            setting.run(rank, group)

    with ThreadPoolExecutor(cp) as pool:
        for done in [pool.submit(rank_main, rank) for rank in range(cp)]:
            done.result(timeout=60)


STRATEGIES = (None, Strategy.GATHER, Strategy.RING, Strategy.PASS_Q)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("cp", [1, 2, 3])
@pytest.mark.parametrize("max_tokens", [3 * PAGE, 1 << 20])
def test_every_strategy_gives_what_one_rank_would_and_stores_where_the_page_is(cp: int, max_tokens: int) -> None:
    chunks = [*[replace(chunk, home=(chunk.home or 0) % cp) for chunk in DECODING], *PROMPTS]
    run_on_all([Setting(chunks=chunks, cp=cp, forced=forced, max_tokens=max_tokens) for forced in STRATEGIES], cp=cp)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("cp", [1, 2, 3])
def test_a_window_shorter_or_longer_than_what_a_rank_has_is_seen_whole(cp: int) -> None:
    chunks = [*[replace(chunk, home=(chunk.home or 0) % cp) for chunk in DECODING], *PROMPTS]
    windows = itertools.product((1, 3, 4, 9, 30, 200), (PAGE, 1 << 20))
    run_on_all(
        [
            Setting(chunks=chunks, cp=cp, forced=None, window=window, max_tokens=max_tokens)
            for window, max_tokens in windows
        ],
        cp=cp,
    )


@pytest.mark.timeout(120)
@pytest.mark.parametrize("cp", [1, 2])
@pytest.mark.parametrize("window", [0, 9])
def test_rows_that_do_not_share_out_over_tp_are_padded_with_rows_that_touch_no_other(cp: int, window: int) -> None:
    decoding = [replace(chunk, home=(chunk.home or 0) % cp) for chunk in DECODING]
    steps = [[*decoding[:5], *PROMPTS], decoding[2:3], PROMPTS[1:2], decoding[:7]]
    run_on_all(
        [
            Setting(chunks=chunks, cp=cp, forced=forced, window=window, tp=4)
            for chunks, forced in itertools.product(steps, STRATEGIES)
        ],
        cp=cp,
    )


@pytest.mark.timeout(120)
def test_the_strides_of_pages_are_the_storages_alone() -> None:
    chunks = [*DECODING, *PROMPTS]
    settings = [Setting(chunks=chunks, cp=2, forced=forced, lay_out=positions_apart) for forced in STRATEGIES]
    run_on_all([*settings, replace(settings[0], window=9)], cp=2)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("chunks", [DECODING[:1], PROMPTS[:1], DECODING[4:5], [*DECODING[2:3], *PROMPTS[2:3]]])
def test_a_rank_without_rows_takes_part_all_the_same(chunks: Sequence[StepChunk]) -> None:
    run_on_all([Setting(chunks=chunks, cp=3, forced=forced) for forced in STRATEGIES], cp=3)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("window", [0, 5])
def test_a_step_without_chunks_here_plans_and_runs(window: int) -> None:
    run_on_all([Setting(chunks=[], cp=2, forced=forced, window=window) for forced in STRATEGIES], cp=2)
