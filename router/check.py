"""`router check`: everything that an operator can get wrong, answered before anything starts.

Faults of structure come first, from config_loading.py; a file without any is looked at here for its sense, and all
that is independent is told at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from parallel.checkpoint.location import is_hub_id, resolve_model
from parallel.models.description import ModelDescription
from parallel.settings import EngineSettings
from parallel.topology import PoolSpec, Topology, check_devices, plan_topology
from router.check_hosts import check_hosts
from router.check_pools import PoolCheck
from router.config import Config
from router.config_loading import parse_config
from router.config_source import ConfigSource, read_source
from router.model_check import check_config, check_model
from router.problem import ConfigError, Problem
from router.resolve import engine_settings, host_specs, located, pool_engine, pool_hosts, pool_specs, replica_shape

_ON_HUB = "the weights of {model} are on the hub and were not looked at: the router checks them before it starts a rank"
_CONFIG_ALONE = "of {model} only config.json was looked at: weights and tokenizer may have faults, or be missing"


@dataclass(frozen=True, kw_only=True)
class CheckedConfig:
    """A configuration that can run: what the file says, the model that it leads to, and the whole plan."""

    config: Config
    description: ModelDescription
    topology: Topology
    warnings: tuple[str, ...] = ()  # of the model: it runs, but perhaps not as its operator thinks


def check_file(path: Path, *, config_alone: bool = False) -> CheckedConfig:
    """Reads and checks `path`; ConfigError with every problem of it. Fetches a hub model's small files, no weights.

    With `config_alone` nothing of the model but its config.json is looked at.
    """
    source = read_source(path)
    config = located(parse_config(source), folder=path.absolute().parent)
    try:
        on_hub = is_hub_id(config.model)
        folder = resolve_model(config.model, weights=False)
        found = check_config(folder) if config_alone else check_model(folder, weights=not on_hub)
    except (ValueError, OSError) as error:  # a name can be too long for any file, a folder closed to this user
        what = " ".join(str(error).split())  # the hub's own errors have lines
        missing = source.problem(("model",), what=what, remedy="name a model that is there and runs")
        raise ConfigError([missing, *find_problems(config, source=source, description=None)]) from error
    faults = [source.problem(("model",), what=fault.what, remedy=fault.remedy) for fault in found.faults]
    if faults or found.description is None:
        raise ConfigError([*faults, *find_problems(config, source=source, description=found.description)])
    topology = check(config, source=source, description=found.description)
    unread = [_CONFIG_ALONE] if config_alone else [_ON_HUB] if on_hub else []
    warnings = (*found.warnings, *(sentence.format(model=config.model) for sentence in unread))
    return CheckedConfig(config=config, description=found.description, topology=topology, warnings=warnings)


def check(config: Config, *, source: ConfigSource, description: ModelDescription) -> Topology:
    """The plan of `config`, whose file is `source`; ConfigError with every problem."""
    problems = list(find_problems(config, source=source, description=description))
    if problems:
        raise ConfigError(problems)
    return plan_topology(
        model=config.model, hosts=host_specs(config), pools=pool_specs(config, description=description)
    )


def find_problems(config: Config, *, source: ConfigSource, description: ModelDescription | None) -> Iterator[Problem]:
    """Every problem of sense; without a description, those that need none."""
    pools = [
        PoolCheck(name=name, pool=pool, config=config, source=source, description=description)
        for name, pool in config.pools.named().items()
    ]
    host_problems = [*check_hosts(config, source=source), *(found for pool in pools for found in pool.hosts())]
    yield from host_problems
    yield from _which_pools(config, source=source)
    for pool in pools:
        yield from pool.problems()
    if description is not None:
        yield from _one_dtype(config, source=source, description=description)
    if not host_problems:
        yield from _devices_suffice(config, source=source)


def _which_pools(config: Config, *, source: ConfigSource) -> Iterator[Problem]:
    """prefill and decode, or unified alone."""
    names = list(config.pools.named())
    if not names:
        yield source.problem(("pools",), what="has no pool", remedy="write prefill and decode, or unified alone")
    elif "unified" in names and len(names) > 1:
        others = " and ".join(names[:-1])
        yield source.problem(
            ("pools", "unified"), what=f"stands beside {others}", remedy=f"remove {others}, or remove unified"
        )
    elif names in (["prefill"], ["decode"]):
        other = "decode" if names == ["prefill"] else "prefill"
        yield source.problem(
            ("pools", names[0]),
            what=f"there is no {other} pool beside it",
            remedy=f"add pools.{other}, or name the one pool unified",
        )


def _one_dtype(config: Config, *, source: ConfigSource, description: ModelDescription) -> Iterator[Problem]:
    """The hand-off copies bytes of KV as they are, so both of its sides store one dtype."""
    prefill, decode = config.pools.prefill, config.pools.decode
    if prefill is None or decode is None:
        return
    found: list[str] = []
    for pool in (prefill, decode):
        hosts = pool_hosts(config, pool)
        if not hosts:
            return
        engine = pool_engine(config, pool)
        try:
            found.append(engine_settings(engine, device=hosts[0].device, description=description).dtype)
        except ValueError:
            return  # told by the pool's own check
    if found[0] != found[1]:
        yield source.problem(
            ("pools", "decode", "engine", "dtype"),
            what=f"prefill stores {found[0]} and decode {found[1]}, but KV is handed over as it is",
            remedy=f"write one dtype for both, for example engine.dtype: {found[0]}",
        )


def _devices_suffice(config: Config, *, source: ConfigSource) -> Iterator[Problem]:
    """Counts devices pool by pool. Experts take none of their own, so this hangs on no expert mesh."""
    placed: list[PoolSpec] = []
    for name, pool in config.pools.named().items():
        shape = replica_shape(pool, has_experts=False)
        placed.append(
            PoolSpec(name=name, replicas=pool.replicas, shape=shape, engine=EngineSettings(), hosts=pool.hosts or ())
        )
        try:
            check_devices(hosts=host_specs(config), pools=placed)
        except ValueError as error:
            what, _, remedy = str(error).rpartition(": ")
            yield source.problem(("pools", name), what=what, remedy=remedy)
            return
