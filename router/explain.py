"""One rank's life in plain words: where it runs, what it holds, which tokens are its own, whom it talks to."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from rich.filesize import decimal

from parallel.cores import RankCores
from parallel.group_memory import link_of
from parallel.model_share import ModelShare
from parallel.models.description import ModelDescription
from parallel.peers import Peers, source_peers, target_peers
from parallel.shape import RankCoordinates
from parallel.sharding import even_interval, kv_head_interval
from parallel.topology import ReplicaPlan, Topology
from parallel.traffic import StepTraffic

#: A line of the explanation: what it is about, and the words.
Line = tuple[str, str]


def find_replica(topology: Topology, *, name: str | None, rank: int) -> ReplicaPlan:
    """The replica `name`, or the first; ValueError where there is none, or none with that rank."""
    names = [replica.name for replica in topology.replicas]
    if name is not None and name not in names:
        raise ValueError(f"there is no replica {name}: write one of {_listed(names)}")
    replica = topology.replicas[names.index(name) if name else 0]
    last = replica.shape.world_size - 1
    if not 0 <= rank <= last:
        raise ValueError(f"rank {rank} is outside {replica.name}: its ranks are {_span(0, last + 1)}")
    return replica


def explain(
    topology: Topology,
    *,
    description: ModelDescription,
    replica: ReplicaPlan,
    rank: int,
    cores: RankCores | None = None,
) -> str:
    """The lines of rank `rank` of `replica`, ready to be printed; `cores` are None where they are not known yet."""
    life = _Life(
        topology=topology,
        description=description,
        replica=replica,
        coordinates=replica.shape.coordinates(rank),
        cores=cores,
    )
    lines = list(life.lines())
    width = max(len(label) for label, _ in lines) + 2
    return "\n".join(f"{label:<{width}}{words}" for label, words in lines)


@dataclass(frozen=True, kw_only=True)
class _Life:
    topology: Topology
    description: ModelDescription
    replica: ReplicaPlan
    coordinates: RankCoordinates
    cores: RankCores | None

    @cached_property
    def _share(self) -> ModelShare:
        return ModelShare(description=self.description, shape=self.replica.shape, coordinates=self.coordinates)

    def lines(self) -> Iterator[Line]:
        yield from self._place()
        yield from self._holds()
        yield from self._bytes()
        yield from self._tokens()
        yield from self._groups()
        yield from self._handoff()

    def _place(self) -> Iterator[Line]:
        replica, mine = self.replica, self.coordinates
        place = replica.placements[mine.global_rank]
        device = f"{self.topology.host(place.host).device}:{place.device}"
        beside = len(replica.ranks_on(place.host)) - 1
        yield "rank", f"{mine.global_rank} of {replica.name}, on {device} of host {place.host}"
        others = f"{beside} other rank{'s' if beside != 1 else ''} of its replica there"
        elsewhere = len(replica.hosts) - 1
        yield "", others if not elsewhere else f"{others}, the rest on {elsewhere} more host{'s'[: elsewhere > 1]}"
        if mine.global_rank == 0:
            yield "", "it leads its replica: it plans every step"
        yield "", self._threads()
        sizes = replica.shape.attention
        yield (
            "attention",
            ", ".join(
                f"{name} coordinate {index} of {size}"
                for name, index, size in (
                    ("dp", mine.attn_dp_rank, sizes.dp),
                    ("cp", mine.attn_cp_rank, sizes.cp),
                    ("tp", mine.attn_tp_rank, sizes.tp),
                )
            ),
        )

    def _threads(self) -> str:
        if self.cores is None:
            return "its threads are dealt when the launcher of its host has said what cores it has"
        count, nodes = self.cores.num_threads, self.cores.nodes
        where = f"the cores of NUMA node{'s'[: len(nodes) > 1]} {_listed(nodes)}" if nodes else "any core of its host"
        return f"{count} thread{'s'[: count > 1]}, on {where}"

    def _holds(self) -> Iterator[Line]:
        model, mine, shape = self.description, self.coordinates, self.replica.shape
        layers = self._share.layers
        ends = [name for name, is_here in self._ends().items() if is_here]
        beside = f", and its part of the {' and the '.join(ends)}" if ends else ""
        yield (
            "layers",
            f"{_span(layers.start, layers.stop)} of {model.num_layers} (stage {mine.pp_rank} of {shape.pp}){beside}",
        )
        yield from self._heads()
        yield from self._experts()

    def _heads(self) -> Iterator[Line]:
        """One line where all layers have the same heads."""
        tp, tp_rank = self.replica.shape.attention.tp, self.coordinates.attn_tp_rank
        label = "heads"
        for heads, kv_heads in self.description.head_counts:
            queries, keys = (
                even_interval(heads, parts=tp, index=tp_rank),
                kv_head_interval(kv_heads, tp=tp, tp_rank=tp_rank),
            )
            copies = max(tp // kv_heads, 1)
            shared = f", which {copies} tp ranks hold alike" if copies > 1 else ""
            query = f"query {_span(queries.start, queries.end)} of {heads}"
            yield label, f"{query}, KV {_span(keys.start, keys.end)} of {kv_heads}{shared}"
            label = ""

    def _ends(self) -> dict[str, bool]:
        """The vocabulary's two uses, and whether this stage has them."""
        pp_rank, pp = self.coordinates.pp_rank, self.replica.shape.pp
        return {"embedding": pp_rank == 0, "output": pp_rank == pp - 1}

    def _experts(self) -> Iterator[Line]:
        model, sizes = self.description, self.replica.shape.experts
        mine = self.coordinates
        if model.experts is None or sizes is None:
            yield "experts", "none: the model is dense"
            return
        assert mine.moe_tp_rank is not None
        if not self._share.experts:
            yield "experts", "none: the layers of its stage are dense"
            return
        # The file gives one placement for all layers.
        own = next(iter(self._share.experts.values()))
        width = even_interval(model.experts.intermediate_size, parts=sizes.moe_tp, index=mine.moe_tp_rank)
        part = "" if sizes.moe_tp == 1 else f", columns {_span(width.start, width.end)} of each one's width"
        block = "" if sizes.moe_dp == 1 else f", in block {mine.moe_dp_rank} of {sizes.moe_dp}"
        yield "experts", f"{_expert_list(own)} of {model.experts.num_experts} in each layer{part}{block}"

    def _bytes(self) -> Iterator[Line]:
        engine = self.replica.engine
        weights = sum(part.num_bytes(engine) for part in self._share.slices())
        widened = "" if engine.matrix_dtype == engine.dtype else f", computed with in {engine.dtype}"
        yield "weights", f"{decimal(weights)} in {engine.matrix_dtype}{widened}"
        yield from self._kv_bytes()

    def _kv_bytes(self) -> Iterator[Line]:
        """A line for each cache group that has a layer here."""
        engine, storage = self.replica.engine, self._share.storage(self.replica.engine)
        tokens, label = self._share.token_bytes(engine), "KV"
        for group in self.description.cache_groups:
            region = storage.group(group.name)
            if region.layers:
                sees = f", of the last {group.window} tokens in {len(region.layers)} layers" if group.window else ""
                pages = f"{region.num_pages - 1} pages of {engine.page_size} tokens and a spare one"
                yield label, f"{decimal(region.num_bytes)}: {pages}, {decimal(tokens[group.name])} a token{sees}"
                label = ""

    def _tokens(self) -> Iterator[Line]:
        engine, mine, sizes = self.replica.engine, self.coordinates, self.replica.shape.attention
        yield (
            "tokens",
            (
                f"up to {engine.max_sequences} sequences belong to dp coordinate {mine.attn_dp_rank}, "
                f"and up to {engine.max_batch_tokens} new tokens of them make a step"
            ),
        )
        if sizes.cp > 1 and self.replica.pool != "decode":
            yield (
                "",
                (
                    f"a prompt's new tokens are cut into {2 * sizes.cp} blocks of pages; each of {sizes.cp} cp "
                    "coordinates takes two, one early and one late"
                ),
            )
        if sizes.cp > 1 and self.replica.pool != "prefill":
            yield (
                "",
                (
                    f"a decoding sequence's pages lie on all {sizes.cp} cp ranks; its next token is worked on by its "
                    "home, the others answer its queries, and the owner of its page stores what is new"
                ),
            )
        if sizes.tp > 1:
            yield "", f"between blocks it keeps one row in {sizes.tp}; inside attention it sees all of its coordinate"

    def _groups(self) -> Iterator[Line]:
        shape, rank = self.replica.shape, self.coordinates.global_rank
        moved = {row.axis: row for row in self._traffic().axes()}
        label = "groups"
        for axis in shape.axes:
            ranks = shape.group_of(rank, axis).ranks
            if len(ranks) == 1:
                continue
            words = f"{axis} with {_ranks([other for other in ranks if other != rank])}, {self._where(ranks)}"
            if axis in moved:
                words += f": {moved[axis].what}, {decimal(moved[axis].sent_bytes)} sent in a full step"
            yield label, words
            label = ""
        if label:
            yield label, "none: it works alone"

    def _where(self, ranks: tuple[int, ...]) -> str:
        """On which hosts the ranks of a group are, and over what they meet there."""
        places = {rank: self.replica.placements[rank].host for rank in ranks}
        hosts = list(dict.fromkeys(places.values()))
        device = self.topology.host(hosts[0]).device
        link = link_of(ranks, hosts=places, device=device, kernels=self.replica.engine.kernels)
        where = "in one host" if len(hosts) == 1 else f"across {len(hosts)} hosts ({_listed(hosts)})"
        return f"{where}, over {link.value}"

    def _traffic(self) -> StepTraffic:
        return StepTraffic(
            description=self.description,
            shape=self.replica.shape,
            settings=self.replica.engine,
            pool=self.replica.pool,
            pp_rank=self.coordinates.pp_rank,
        )

    def _handoff(self) -> Iterator[Line]:
        prefill, decode = self.topology.pool("prefill"), self.topology.pool("decode")
        if not prefill or not decode:
            yield "hand-off", "none: its pool does both"
            return
        is_source = self.replica.pool == "prefill"
        peers = (target_peers if is_source else source_peers)(
            self.coordinates, description=self.description, source=prefill[0].shape, target=decode[0].shape
        )
        others = decode if is_source else prefill
        if not peers:
            yield "hand-off", "it writes nothing: a tp rank before it holds the same KV heads and writes them"
        label = "hand-off"
        for peer in peers:
            verb = "writes to" if is_source else "is written to by"
            yield label, f"{verb} {_ranks(peer.ranks)} of {_pool_names(others)}: {_lane(peer)}"
            label = ""


def _lane(peer: Peers) -> str:
    heads = "what heads share" if peer.heads is None else f"KV heads {_span(*peer.heads)}"
    return f"layers {_layers(peer.layers)}, {heads}"


def _layers(layers: Sequence[int]) -> str:
    """A span where they follow each other."""
    if len(layers) == layers[-1] - layers[0] + 1:
        return _span(layers[0], layers[-1] + 1)
    return ", ".join(map(str, layers))


def _pool_names(replicas: Sequence[ReplicaPlan]) -> str:
    return replicas[0].name if len(replicas) == 1 else f"any of {replicas[0].name} to {replicas[-1].name}"


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {_listed(ranks)}"


def _listed(items: Sequence[object]) -> str:
    shown = [str(item) for item in items]
    return ", ".join(shown if len(shown) <= 8 else [*shown[:4], f"... {shown[-1]} ({len(shown)} in all)"])


def _span(first: int, end: int) -> str:
    """[first, end) in words; a part that is all padding has nothing."""
    if end <= first:
        return "none"
    return str(first) if end == first + 1 else f"{first} to {end - 1}"


def _expert_list(experts: tuple[int, ...]) -> str:
    """Experts in the order of their slots: as a span where they follow each other."""
    if experts == tuple(range(experts[0], experts[-1] + 1)):
        return _span(experts[0], experts[-1] + 1)
    return ", ".join(map(str, experts))
