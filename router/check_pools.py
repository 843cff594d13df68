"""Faults of one pool: its meshes against each other and the model, its hosts, its engine's numbers."""

from collections.abc import Iterator
from dataclasses import dataclass

from parallel.admission import WARM_UP_NEW_TOKENS, WARM_UP_PROMPT_TOKENS, pages_needed
from parallel.cores import check_threads
from parallel.exchange_memory import RING_BLOCKS
from parallel.kernels import check_kernels
from parallel.models.description import ModelDescription
from parallel.process.cores import available_cores
from parallel.sharding import check_heads, experts_of
from router.config import LOCAL, Config, EngineConfig, PoolConfig
from router.config_loading import did_you_mean
from router.config_source import ConfigSource
from router.problem import KeyPath, Problem
from router.resolve import engine_settings, expert_sizes, pool_engine, pool_hosts, replica_shape


@dataclass(frozen=True, kw_only=True)
class PoolCheck:
    """One pool in its file. Without a `description` (no model was found) what needs one is left out."""

    name: str
    pool: PoolConfig
    config: Config
    source: ConfigSource
    description: ModelDescription | None

    def problems(self) -> Iterator[Problem]:
        """Every fault of the pool's meshes and engine; those of its hosts are `hosts`."""
        yield from self._meshes()
        yield from self._model_fits()
        yield from self._engine()

    def hosts(self) -> Iterator[Problem]:
        """Names in the pool's `hosts` that lead nowhere or come twice, and hosts of two kinds of device."""
        labels = [host.label for host in self.config.hosts]
        names = self.pool.hosts or ()
        for index, name in enumerate(names):
            if name not in labels:
                hint = did_you_mean(name, labels)
                yield self._problem("hosts", index, what="no such host", remedy=f"{hint}hosts are {', '.join(labels)}")
            elif name in names[:index]:
                yield self._problem("hosts", index, what="is named twice", remedy="name each host once")
        kinds = {host.label: host.device for host in pool_hosts(self.config, self.pool)}
        if len(set(kinds.values())) > 1:
            yield self._problem(
                *(["hosts"] if names else []),
                what=f"mixes kinds of device ({', '.join(f'{name} is {kind}' for name, kind in kinds.items())})",
                remedy=f"name hosts of one kind in pools.{self.name}.hosts",
            )

    def _meshes(self) -> Iterator[Problem]:
        """The expert mesh against the attention mesh, and experts where the model has none."""
        has_experts = self.pool.experts is not None
        if self.description is not None:
            has_experts = self.description.experts is not None
            if self.pool.experts is not None and not has_experts:
                yield self._problem(
                    "experts",
                    what=f"the model is dense ({self.description.family}): it has no experts to place",
                    remedy=f"remove {self._key('experts')}",
                )
        try:
            replica_shape(self.pool, has_experts=has_experts)
        except ValueError as error:
            yield self._problem("experts", **_parts(error))

    def _model_fits(self) -> Iterator[Problem]:
        """tp against the heads, pp against the layers, ep against the experts."""
        description = self.description
        if description is None:
            return
        try:
            check_heads(description, tp=self.pool.attention.tp)
        except ValueError as error:
            yield self._problem("attention", "tp", **_parts(error))
        if self.pool.pp > description.num_layers:
            yield self._problem(
                "pp",
                what=f"the model has {description.num_layers} layers, and each stage needs one or more",
                remedy=f"write a pp from 1 to {description.num_layers}",
            )
        if description.experts is not None:
            yield from self._experts_divide(description)

    def _experts_divide(self, description: ModelDescription) -> Iterator[Problem]:
        try:
            experts_of(description, expert_sizes(self.pool))
        except ValueError as error:
            parts = _parts(error)
            if self.pool.experts is None:
                parts["remedy"] += " (experts is left out, so ep = dp x cp x tp): change attention, or write experts"
            key = "placement" if str(error).startswith("placement") else "ep"
            yield self._problem("experts", key, **parts)

    def _engine(self) -> Iterator[Problem]:
        """Numbers of the engine that exclude each other, as they are after the pool's own keys."""
        engine = pool_engine(self.config, self.pool)
        page = engine.page_size
        if engine.kv_tokens % page:
            fitting = max(engine.kv_tokens // page, 1) * page
            yield self.source.problem(
                self._blame("kv_tokens", "page_size"),
                what=f"kv_tokens {engine.kv_tokens} is no multiple of page_size {page}",
                remedy=f"write kv_tokens: {fitting}, or another page_size",
            )
        if engine.max_batch_tokens < page:
            yield self.source.problem(
                self._blame("max_batch_tokens", "page_size"),
                what=f"max_batch_tokens {engine.max_batch_tokens} is less than page_size {page}",
                remedy=f"write max_batch_tokens: {page} or more, or a smaller page_size",
            )
        cp, fewest = self.pool.attention.cp, WARM_UP_PROMPT_TOKENS + WARM_UP_NEW_TOKENS
        needed_tokens = page * pages_needed(fewest, page_size=page, cp=cp)
        if engine.kv_tokens < needed_tokens:
            yield self.source.problem(
                self._blame("kv_tokens", "page_size"),
                what=f"kv_tokens {engine.kv_tokens} does not hold the {fewest} tokens by which a replica proves that "
                "it serves",
                remedy=f"write kv_tokens: {needed_tokens} or more",
            )
        if cp > 1 and engine.exchange_tokens < RING_BLOCKS * page:
            yield self.source.problem(
                self._blame("exchange_tokens", "page_size"),
                what=f"exchange_tokens {engine.exchange_tokens} is less than three pages of {page}: one comes, one is "
                "worked on, one goes",
                remedy=f"write exchange_tokens: {RING_BLOCKS * page} or more, or a smaller page_size",
            )
        hosts = pool_hosts(self.config, self.pool)
        if engine.threads is not None and any(host.address == LOCAL for host in hosts):
            try:
                check_threads(engine.threads, num_cores=available_cores())
            except ValueError as error:
                yield self.source.problem(self._blame("threads"), **_parts(error))
        if self.description is not None and hosts:
            yield from self._kernels(engine, device=hosts[0].device, description=self.description)

    def _kernels(self, engine: EngineConfig, *, device: str, description: ModelDescription) -> Iterator[Problem]:
        """The dtype, and the kernels that are to compute in it."""
        try:
            settings = engine_settings(engine, device=device, description=description)
        except ValueError as error:
            yield self.source.problem(self._blame("dtype"), **_parts(error))
            return
        try:
            check_kernels(settings, device=device)
        except ValueError as error:
            key = str(error).partition(" is ")[0]
            yield self.source.problem(self._blame(key), **_parts(error))

    def _blame(self, *keys: str) -> KeyPath:
        """The first of `keys` that the file writes, in the pool's own engine before the file's."""
        paths: list[KeyPath] = [(*above, "engine", key) for above in (("pools", self.name), ()) for key in keys]
        return next((path for path in paths if self.source.has(path)), paths[-len(keys)])

    def _problem(self, *inside: str | int, what: str, remedy: str) -> Problem:
        return self.source.problem(("pools", self.name, *inside), what=what, remedy=remedy)

    def _key(self, key: str) -> str:
        return f"pools.{self.name}.{key}"


def _parts(error: ValueError) -> dict[str, str]:
    """What is wrong and the remedy, from a ValueError of `parallel`: it tells the remedy last."""
    text = str(error)
    what, _, remedy = text.rpartition("; " if "; " in text else ": ")
    return {"what": what, "remedy": remedy}
