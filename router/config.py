"""What `topo.yaml` may say: its keys, types, ranges and defaults. Reading is config_loading.py's, sense check.py's."""

from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag
from pydantic.json_schema import SkipJsonSchema

from parallel.process.address import parse_address
from parallel.settings import EngineSettings
from parallel.topology import POOL_NAMES

LOCAL = "local"

_ENGINE = EngineSettings()
#: Token and byte counts travel as 32-bit integers.
_LARGEST_COUNT = 2**31 - 1
_LARGEST_SIZE = 4096


def _listen(text: str) -> str:
    parse_address(text)
    return text


def _launcher(text: str) -> str:
    if text == LOCAL:
        return text
    try:
        address = parse_address(text)
    except ValueError as error:
        raise ValueError(f"{error}, or 'local'") from None
    if address.port == 0:
        raise ValueError("has port 0; write the port that the running `worker` listens on")
    if address.is_any:
        raise ValueError("stands for every interface; write the address by which the router reaches the host")
    return text


def _distinct(devices: tuple[int, ...]) -> tuple[int, ...]:
    twice = sorted(device for device, count in Counter(devices).items() if count > 1)
    if twice:
        raise ValueError(f"names device {', '.join(map(str, twice))} twice; name each device once")
    return devices


def _devices_form(value: object) -> str:
    return "list" if isinstance(value, list | tuple) else "count"


AxisSize = Annotated[int, Field(ge=1, le=_LARGEST_SIZE)]
Count = Annotated[int, Field(ge=1, le=_LARGEST_COUNT)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1)]
DeviceIndex = Annotated[int, Field(ge=0, le=_LARGEST_SIZE)]
# Strictness is for what an operator writes ("4", true); that YAML gives lists where frozen data wants tuples is ours.
ExpertIndex = Annotated[int, Field(ge=0, le=_LARGEST_SIZE)]
DeviceList = Annotated[tuple[DeviceIndex, ...], Field(strict=False, min_length=1), AfterValidator(_distinct)]
Devices = Annotated[
    Annotated[AxisSize, Tag("count")] | Annotated[DeviceList, Tag("list")],
    Discriminator(_devices_form),
]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class HostConfig(_Strict):
    """A machine that holds ranks, reached through its launcher."""

    name: Name | SkipJsonSchema[None] = Field(
        default=None, description="what messages and the pools' `hosts` call it; the address when left out"
    )
    address: Annotated[str, AfterValidator(_launcher)] = Field(
        description="'local': the router starts this launcher itself; else host:port of a running `worker`"
    )
    devices: Devices = Field(description="how many ranks it may hold, or the list of its device indices")
    device: Literal["cpu", "cuda"] = Field(default="cpu", description="the kind of its devices")

    @property
    def label(self) -> str:
        """Its name, or the address where it has none."""
        return self.name or self.address

    @property
    def device_indices(self) -> tuple[int, ...]:
        """The indices of its devices."""
        return tuple(range(self.devices)) if isinstance(self.devices, int) else self.devices


class AttentionConfig(_Strict):
    """The attention mesh over the W = dp x cp x tp ranks of a stage."""

    dp: AxisSize = Field(default=1, description="data-parallel coordinates: each has sequences of its own")
    cp: AxisSize = Field(default=1, description="context-parallel coordinates: they share each sequence's tokens")
    tp: AxisSize = Field(default=1, description="tensor-parallel ranks: they share the attention heads")


class ExpertsConfig(_Strict):
    """The expert mesh over the same W = moe_dp x ep x moe_tp ranks; for a model with experts."""

    moe_dp: AxisSize = Field(default=1, description="blocks that each hold every expert")
    ep: AxisSize = Field(default=1, description="shares that a block's experts are dealt into")
    moe_tp: AxisSize = Field(default=1, description="ranks that share each expert's width")
    placement: Annotated[tuple[ExpertIndex, ...], Field(strict=False, min_length=1)] | SkipJsonSchema[None] = Field(
        default=None, description="the expert of each slot, ep slots a share; an expert may have several"
    )


class EngineConfig(_Strict):
    """How much one engine may hold and do."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="of weights and KV; auto is float32 on cpu, the checkpoint's own on cuda"
    )
    weights: Literal["auto", "float32"] = Field(
        default="auto",
        description="what weights are held in on cpu while arithmetic is float32; auto is as the checkpoint has them",
    )
    page_size: Count = Field(default=_ENGINE.page_size, description="positions in one page of KV memory")
    max_batch_tokens: Count = Field(
        default=_ENGINE.max_batch_tokens, description="new tokens in one step, per dp coordinate"
    )
    max_sequences: Count = Field(default=_ENGINE.max_sequences, description="running sequences, per dp coordinate")
    kv_tokens: Count = Field(
        default=_ENGINE.kv_tokens, description="tokens whose KV one rank holds: a multiple of page_size"
    )
    step_timeout_s: Seconds = Field(
        default=_ENGINE.step_timeout_s, description="seconds after which a step that has not ended counts as hung"
    )
    attention_kernel: Literal["auto", "torch", "native", "flashinfer"] = Field(
        default="auto", description="who computes attention; auto is flashinfer on cuda, and on cpu what `kernels` says"
    )
    kernels: Literal["auto", "torch", "native"] = Field(
        default="auto", description="who computes on cpu; auto is native where it could be built, else torch"
    )
    threads: AxisSize | SkipJsonSchema[None] = Field(
        default=None, description="cpu threads of each rank; left out, the ranks of a machine share its cores"
    )

    exchange: Literal["auto", "gather", "ring", "pass_q"] = Field(
        default="auto", description="how queries meet the KV of other cp ranks; auto chooses for each chunk"
    )
    exchange_tokens: Count = Field(
        default=_ENGINE.exchange_tokens,
        description="tokens of KV that an exchange may hold besides a rank's pages",
    )

    dispatch: Literal["auto", "gather", "all_to_all"] = Field(
        default="auto", description="how rows get to their experts; auto chooses for each step"
    )

    pipeline: Literal["auto", "whole", "parts"] = Field(
        default="auto",
        description="how a batch of decode goes through pp stages, whole or in a part for each; auto chooses",
    )

    prefix_cache: bool = Field(
        default=True, description="whether pools that prefill keep full pages for prompts that begin alike"
    )

    def overridden_by(self, pool: "EngineConfig | None") -> "EngineConfig":
        """These settings with the keys that `pool` says in the file."""
        if pool is None:
            return self
        return self.model_copy(update={key: getattr(pool, key) for key in pool.model_fields_set})


class PoolConfig(_Strict):
    """A pool: equal replicas of the model, each of pp stages of W ranks."""

    replicas: AxisSize = Field(default=1, description="complete copies of the model in this pool")
    pp: AxisSize = Field(default=1, description="pipeline stages of each replica")
    attention: AttentionConfig = Field(
        default_factory=AttentionConfig, description="sizes of the attention mesh; what is left out is 1"
    )
    experts: ExpertsConfig | SkipJsonSchema[None] = Field(
        default=None,
        description="sizes of the expert mesh; what is left out is 1, and the whole mapping left out is ep = W",
    )
    hosts: Annotated[tuple[Name, ...], Field(strict=False, min_length=1)] | SkipJsonSchema[None] = Field(
        default=None,
        description="names of the hosts that its ranks fill, in order; left out, any host, groups kept together",
    )
    engine: EngineConfig | SkipJsonSchema[None] = Field(
        default=None, description="keys that differ from the file's `engine` in this pool"
    )


class PoolsConfig(_Strict):
    """`prefill` and `decode`, or `unified` alone."""

    prefill: PoolConfig | SkipJsonSchema[None] = Field(
        default=None, description="computes the KV of prompts, handed to decode"
    )
    decode: PoolConfig | SkipJsonSchema[None] = Field(default=None, description="generates from the KV of prefill")
    unified: PoolConfig | SkipJsonSchema[None] = Field(
        default=None, description="both in one, without hand-off; alone in its file"
    )

    def named(self) -> dict[str, PoolConfig]:
        """The pools that the file has by name, in the order in which they take devices, whatever the file's order."""
        found = {name: getattr(self, name) for name in POOL_NAMES}
        return {name: pool for name, pool in found.items() if pool is not None}


class TimeoutsConfig(_Strict):
    """How long the router waits."""

    start_s: Seconds = Field(default=600.0, description="seconds from assignment to a replica that serves")
    heartbeat_s: Seconds = Field(default=10.0, description="seconds of silence after which a launcher counts as lost")


class LimitsConfig(_Strict):
    """What the router takes from its clients."""

    max_waiting: Count = Field(default=256, description="requests that may wait; one more is RESOURCE_EXHAUSTED")
    max_message_bytes: Annotated[int, Field(ge=1024, le=_LARGEST_COUNT)] = Field(
        default=4194304, description="bytes of the largest message that a client may send"
    )


class Config(_Strict):
    """A whole `topo.yaml`."""

    model: Name = Field(
        description="'demo', a folder (relative to this file) with config.json and *.safetensors, or a hub id"
    )
    listen: Annotated[str, AfterValidator(_listen)] = Field(
        default="127.0.0.1:30000", description="host:port where clients reach the router; port 0 takes a free one"
    )
    hosts: Annotated[tuple[HostConfig, ...], Field(strict=False, min_length=1)] = Field(
        description="the machines that hold ranks; those that come first are filled first where all is equal"
    )
    pools: PoolsConfig = Field(description="prefill and decode, or unified alone")
    engine: EngineConfig = Field(
        default_factory=EngineConfig, description="settings of every pool, unless its own `engine` says otherwise"
    )
    timeouts: TimeoutsConfig = Field(default_factory=TimeoutsConfig, description="how long the router waits")
    limits: LimitsConfig = Field(default_factory=LimitsConfig, description="what the router takes from its clients")


def config_schema() -> dict[str, Any]:
    """The JSON schema of `topo.yaml`; editors check and complete with it."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}
