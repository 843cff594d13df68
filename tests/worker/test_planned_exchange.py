"""Attention over the tables that a leader's plans led to: every row gives what its definition says, with what steps and
hand-offs before have stored.
"""

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._C._distributed_c10d import HashStore

from attention.exchange.choice import Strategy
from attention.exchange.member import CpMember
from attention.exchange.plan import plan_exchange
from attention.exchange.rows import ExchangeRows
from attention.interface import AttentionBackend, AttentionSpec
from attention.layer_memory import LayerFormat, LayerMemory, bind_layer
from attention.torch_kernel.backend import TorchAttentionBackend
from benchmarks.exchange_steps import exchange_policy
from parallel.collectives.communicator import CollectiveClock, Communicator
from parallel.collectives.groups import Rendezvous, build_groups
from parallel.page_columns import column
from parallel.settings import EngineSettings
from parallel.shape import AttentionSizes, ReplicaShape
from parallel.storage import (
    EVERYTHING,
    CacheGroup,
    Plane,
    PlaneView,
    Window,
    keys_and_values,
    lay_out_page,
)
from proto import control_pb2
from tests.attention.conftest import make_flashinfer
from tests.engine.test_leader import POOLS, VERBS, live
from tests.worker.checked_tables import DEVICE, CheckedTables, RanksWithTables
from worker.step.rows import StepRows

HEADS, KV_HEADS, SCALE = 4, 2, 0.3
#: Which kernel, and the type of what it stores.
KERNELS = {
    "torch": (TorchAttentionBackend, "float32"),
    "latent": (TorchAttentionBackend, "float32"),
    "flashinfer": (make_flashinfer, "bfloat16"),
}


def storage(kernel: str, number: int, window: int) -> CacheGroup:
    """A cache group for that kernel: keys and values, or one plane that heads share and that begins with the value."""
    name, sees = f"group {number}", Window(tokens=window) if window else EVERYTHING
    if kernel != "latent":
        head_size = 64 if kernel == "flashinfer" else 6
        return keys_and_values(name, layers=(number,), sees=sees, num_kv_heads=KV_HEADS, head_size=head_size)
    return CacheGroup(
        name=name,
        layers=(number,),
        sees=sees,
        num_kv_heads=KV_HEADS,
        planes=(Plane(name="latent", elements=6, per_head=False),),
        key=PlaneView(plane="latent", offset=0, width=6),
        value=PlaneView(plane="latent", offset=0, width=4),
    )


@lru_cache(maxsize=1 << 16)
def numbers(key: object, heads: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """[heads, width], always the same for a key of integers."""
    drawn = np.random.default_rng(hash(key) % 2**32).standard_normal((heads, width))
    return torch.from_numpy(drawn).to(dtype)


@dataclass(frozen=True, kw_only=True)
class Attended:
    """What one rank computed: its rows as slots and positions, q [T, Hq, Dk], out [T, Hq, Dv], log-sum-exp [T, Hq]."""

    rows: Sequence[tuple[int, int]]
    q: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor


@dataclass(kw_only=True)
class ComputedTables(CheckedTables):
    """Each step also attends, in one layer of each group, on a thread for each cp rank; `memory_of` and `backends` by
    group and cp rank.
    """

    kernel: str
    communicators: Sequence[Communicator]
    threads: ThreadPoolExecutor
    memory_of: list[list[LayerMemory]] = field(default_factory=list)
    backends: list[list[AttentionBackend]] = field(default_factory=list)

    def __post_init__(self) -> None:
        make_backend, dtype = KERNELS[self.kernel]
        for group, spare_page in zip(self.groups, self.spare_pages, strict=True):
            page = lay_out_page(group.planes, page_size=self.settings.page_size, num_heads=KV_HEADS, dtype=dtype)
            form = LayerFormat(page=page, key=group.key, value=group.value, scale=SCALE)
            spec = AttentionSpec(
                num_heads=HEADS, page=page, key=group.key, value=group.value, window=group.window, device=DEVICE
            )
            memory = [torch.zeros((spare_page + 1, page.page_bytes), dtype=torch.uint8) for _ in range(self.cp)]
            self.memory_of.append([bind_layer(part, form) for part in memory])
            self.backends.append([make_backend(spec) for _ in range(self.cp)])

    def receive(self, reserved: control_pb2.Reserved, *, prompt_tokens: int) -> None:
        """A hand-off writes the planes of a prompt, too."""
        super().receive(reserved, prompt_tokens=prompt_tokens)
        for number, (group, pages) in enumerate(zip(self.groups, reserved.pages, strict=True)):
            owners, numbers_of_pages = column(pages.cp_ranks), column(pages.pages)
            for position in range(max(0, prompt_tokens - group.window + 1) if group.window else 0, prompt_tokens):
                place, offset = divmod(position, self.settings.page_size)
                index = place - pages.first_page
                layer = self.memory_of[number][owners[index]]
                stored = self._planes(number, reserved.request_id, position)
                for plane, values in zip(layer.planes, stored, strict=True):
                    plane[numbers_of_pages[index], :, offset] = values

    def examine(self, rows: Sequence[StepRows]) -> None:
        """Every row of every rank, in every group."""
        for number, group in enumerate(self.groups):
            attend = partial(self._attend, number, [rank.groups[group.name] for rank in rows])
            for attended in list(self.threads.map(attend, range(self.cp))):
                self._check(number, attended)

    def _attend(self, number: int, rows_of_ranks: Sequence[ExchangeRows], cp_rank: int) -> Attended:
        """Collective over the threads."""
        group, rows, layer = self.groups[number], rows_of_ranks[cp_rank], self.memory_of[number][cp_rank]
        own = rows.take(rows.computed_by == cp_rank)
        slots = np.repeat(own.slot, own.num_rows).tolist()
        places = list(zip(slots, own.positions.tolist(), strict=True))
        ids = [self.known[slot].request_id if slot in self.known else None for slot in slots]
        positions = [position for _, position in places]
        q = torch.empty((len(places), HEADS, group.key.width), dtype=layer.key.dtype)
        planes = [
            torch.empty((len(places), *plane.shape[1:2], plane.shape[3]), dtype=q.dtype) for plane in layer.planes
        ]
        for row, (request_id, position) in enumerate(zip(ids, positions, strict=True)):
            q[row] = numbers((request_id or -1, position), HEADS, group.key.width, q.dtype)
            for plane, values in zip(planes, self._planes(number, request_id, position), strict=True):
                plane[row] = values
        member = CpMember(
            group=self.communicators[cp_rank],
            backend=self.backends[number][cp_rank],
            policy=self.policies[number],
            device=DEVICE,
        )
        exchange = plan_exchange(rows, member=member)
        out, lse = exchange.attend(q, planes, layer, with_lse=True)
        assert lse is not None
        return Attended(rows=places, q=q, out=out, lse=lse)

    def _check(self, number: int, attended: Attended) -> None:
        assert attended.out.isfinite().all()  # of padding, too
        tolerance = 2e-4 if attended.q.dtype == torch.float32 else 4e-2
        for row, (slot, position) in enumerate(attended.rows):
            if slot in self.known:
                out, lse = self._expected(number, slot, position, attended.q[row])
                torch.testing.assert_close(attended.out[row].double(), out, atol=tolerance, rtol=tolerance)
                torch.testing.assert_close(attended.lse[row].double(), lse, atol=tolerance, rtol=tolerance)

    def _expected(self, number: int, slot: int, position: int, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a row [Hq, Dk]: the output [Hq, Dv] and the log-sum-exp [Hq]."""
        group, request_id = self.groups[number], self.known[slot].request_id
        first = max(0, position + 1 - group.window) if group.window else 0
        stored = [self._planes(number, request_id, seen) for seen in range(first, position + 1)]

        def view(of: PlaneView) -> torch.Tensor:
            (index,) = (index for index, plane in enumerate(group.planes) if plane.name == of.plane)
            values = torch.stack([planes[index] for planes in stored])[..., of.offset : of.offset + of.width]
            return values.repeat_interleave(HEADS // values.shape[1], dim=1).double()

        scores = torch.einsum("hd,lhd->hl", q.double(), view(group.key)) * SCALE
        return torch.einsum("hl,lhd->hd", scores.softmax(dim=1), view(group.value)), scores.logsumexp(dim=1)

    def _planes(self, number: int, request_id: int | None, position: int) -> list[torch.Tensor]:
        """What a position stores, [heads, elements] of each plane: told by the prompt up to it, as its key is."""
        prefix = -1 if request_id is None else self._prefix(request_id, position)
        dtype = self.memory_of[number][0].key.dtype
        return [
            numbers((prefix, number, index), KV_HEADS if plane.per_head else 1, plane.elements, dtype)
            for index, plane in enumerate(self.groups[number].planes)
        ]


@pytest.fixture(scope="module")
def communicators() -> dict[int, list[Communicator]]:
    """By the number of cp ranks, which are threads with gloo between them."""
    found = {}
    for cp in (1, 2, 3):
        with ThreadPoolExecutor(cp) as threads:
            found[cp] = list(threads.map(partial(_communicator, HashStore(), cp), range(cp)))
    return found


def _communicator(store: HashStore, cp: int, rank: int) -> Communicator:
    shape = ReplicaShape(attention=AttentionSizes(cp=cp), experts=None)
    return build_groups(
        shape,
        global_rank=rank,
        order=shape.creation_order_of(rank),
        rendezvous=Rendezvous(store=store, device=DEVICE, host_address="127.0.0.1", build_timeout_s=30, timeout_s=30),
        clock=CollectiveClock(),
    )["attn_cp"]


@pytest.mark.timeout(120)
@settings(max_examples=20, deadline=None)
@given(
    cp=st.integers(1, 3),
    tp=st.integers(1, 3),
    pool=POOLS,
    windows=st.sampled_from([(0,), (0, 3), (5, 0), (0, 8), (0, 17), (2, 9), (6,), (0, 2, 5)]),
    page_size=st.sampled_from([1, 2, 4, 8]),
    kernel=st.sampled_from(sorted(KERNELS)),
    forced=st.sampled_from([None, Strategy.GATHER, Strategy.RING, Strategy.PASS_Q]),
    seed=st.integers(0, 100_000),
)
def test_every_row_attends_to_what_was_stored_wherever_the_leader_put_it(
    communicators: dict[int, list[Communicator]],
    cp: int,
    tp: int,
    pool: str,
    windows: tuple[int, ...],
    page_size: int,
    kernel: str,
    forced: Strategy | None,
    seed: int,
) -> None:
    chance = random.Random(seed)
    max_tokens = chance.choice([3 * page_size, 24, 10_000])
    policy = partial(exchange_policy, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=6, page_size=page_size)
    with ThreadPoolExecutor(cp) as threads:
        ranks = RanksWithTables(
            shape=ReplicaShape(attention=AttentionSizes(cp=cp, tp=tp), experts=None),
            settings=EngineSettings(
                page_size=page_size, max_batch_tokens=chance.choice([3, 10, 40]), max_sequences=4, kv_tokens=96
            ),
            groups=[storage(kernel, number, window) for number, window in enumerate(windows)],
            policies=[policy(max_tokens=max_tokens, forced=forced, window=window) for window in windows],
            seed=seed,
            make_tables=partial(ComputedTables, kernel=kernel, communicators=communicators[cp], threads=threads),
        )
        live(ranks, chance.choices(VERBS, k=chance.randint(10, 40)), pool=pool, chance=chance)
