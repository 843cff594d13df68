"""From what the file says to what the planner takes: defaults that depend on the model, the hosts and the pool."""

import os
from collections.abc import Sequence
from pathlib import Path

from parallel.checkpoint.location import DEMO
from parallel.models.description import ModelDescription
from parallel.settings import EngineSettings
from parallel.shape import AttentionSizes, ExpertSizes, ReplicaShape
from parallel.topology import HostSpec, PoolSpec
from router.config import Config, EngineConfig, HostConfig, PoolConfig

DTYPES = ("float32", "bfloat16", "float16")


def located(config: Config, *, folder: Path) -> Config:
    """`config` with the model's path made absolute where it is a relative one: from `folder`, that of the file.

    So it means the same to the router and to every launcher, wherever each was started.
    """
    path = os.path.normpath(folder / os.path.expanduser(config.model))  # noqa: PTH111 - raises nothing
    is_path = config.model.startswith((".", "/", "~")) or os.path.isdir(path)  # noqa: PTH112 - raises nothing
    if config.model == DEMO or not is_path:
        return config
    return config.model_copy(update={"model": path})


def host_specs(config: Config) -> tuple[HostSpec, ...]:
    """Every host, in the file's order."""
    return tuple(
        HostSpec(name=host.label, address=host.address, device=host.device, devices=host.device_indices)
        for host in config.hosts
    )


def pool_hosts(config: Config, pool: PoolConfig) -> tuple[HostConfig, ...]:
    """The hosts that `pool` may use, in the order in which it fills them; a name that no host has is left out."""
    if pool.hosts is None:
        return config.hosts
    by_label = {host.label: host for host in config.hosts}
    return tuple(by_label[name] for name in pool.hosts if name in by_label)


def pool_engine(config: Config, pool: PoolConfig) -> EngineConfig:
    """The pool's own keys over the file's."""
    return config.engine.overridden_by(pool.engine)


def engine_settings(engine: EngineConfig, *, device: str, description: ModelDescription) -> EngineSettings:
    """`engine` with its dtype resolved; ValueError where the checkpoint's own is none that runs."""
    dtype: str = engine.dtype
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else description.checkpoint_dtype
        if dtype not in DTYPES:
            raise ValueError(f"the checkpoint's dtype {dtype} does not run; write one of {', '.join(DTYPES)}")
    weights = _weights(engine, dtype=dtype, device=device, description=description)
    return EngineSettings(**{**engine.model_dump(exclude={"threads"}), "dtype": dtype, "weights": weights})


def _weights(engine: EngineConfig, *, dtype: str, device: str, description: ModelDescription) -> str:
    """The dtype that matrices are held in: the checkpoint's, where kernels on a CPU widen it as they read."""
    widens = device == "cpu" and dtype == "float32" and engine.kernels != "torch" and engine.weights == "auto"
    return description.checkpoint_dtype if widens and description.checkpoint_dtype in DTYPES else dtype


def replica_shape(pool: PoolConfig, *, has_experts: bool) -> ReplicaShape:
    """The pool's meshes: ep = W where a model with experts has no `experts`. ValueError for a remainder."""
    attention = AttentionSizes(**pool.attention.model_dump())
    if not has_experts:
        return ReplicaShape(pp=pool.pp, attention=attention, experts=None)
    return ReplicaShape(pp=pool.pp, attention=attention, experts=expert_sizes(pool))


def expert_sizes(pool: PoolConfig) -> ExpertSizes:
    """The expert mesh that the pool writes, or ep = W."""
    if pool.experts is None:
        sizes = pool.attention
        return ExpertSizes(ep=sizes.dp * sizes.cp * sizes.tp)
    given = pool.experts.model_dump(exclude_none=True)
    placement = given.pop("placement", None)
    return ExpertSizes(**given, placements=(placement,) if placement else ())


def pool_specs(config: Config, *, description: ModelDescription) -> Sequence[PoolSpec]:
    """Every pool, ready to be placed: for a configuration that has been checked."""
    return [
        PoolSpec(
            name=name,
            replicas=pool.replicas,
            shape=replica_shape(pool, has_experts=description.experts is not None),
            engine=engine_settings(
                pool_engine(config, pool), device=pool_hosts(config, pool)[0].device, description=description
            ),
            hosts=pool.hosts or (),
            num_threads=pool_engine(config, pool).threads,
        )
        for name, pool in config.pools.named().items()
    ]
