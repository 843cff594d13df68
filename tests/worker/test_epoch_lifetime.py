"""Nothing of an epoch outlives it: its KV, its model, its threads, its keys in the store."""

import gc
import queue
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._C._distributed_c10d import PrefixStore, TCPStore

from parallel.settings import EngineSettings
from parallel.shape import AttentionSizes, ReplicaShape
from parallel.topology import HostSpec, PoolSpec, plan_topology
from parallel.wire import assign_request
from proto import control_pb2
from tests.harness.checkpoints import Oracle
from worker.rank_runtime import RankRuntime, store_prefix
from worker.store_keys import forget_keys


def assignment(folder: Path, *, pool: str, epoch: int) -> control_pb2.AssignRequest:
    """One rank."""
    host = HostSpec(name="here", address="local", device="cpu", devices=(0,))
    spec = PoolSpec(
        name=pool,
        replicas=1,
        shape=ReplicaShape(attention=AttentionSizes(), experts=None),
        engine=EngineSettings(kv_tokens=1024),
        hosts=(),
    )
    return assign_request(
        plan_topology(model=str(folder), hosts=[host], pools=[spec]).replicas[0],
        host=host,
        addresses=("127.0.0.1", "127.0.0.1"),
        rendezvous_port=0,
        model=str(folder),
        router_id=1,
        epoch=epoch,
        secret=epoch,
        start_timeout_s=30,
    )


def build(request: control_pb2.AssignRequest, store: TCPStore) -> RankRuntime:
    """The runtime of that assignment's one rank."""
    return RankRuntime(
        request,
        global_rank=0,
        store=PrefixStore(store_prefix(request), store),
        inbox=queue.SimpleQueue(),
        tell_launcher=lambda _: None,
        fail=lambda error: pytest.fail(str(error)),
    )


@pytest.fixture
def store() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def without_collector() -> Iterator[None]:
    """What is found by counting references alone: a circle would keep an epoch until somebody looks for it."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def tensors() -> list[torch.Tensor]:
    """Every tensor that lives and has plain memory."""
    found = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
    return [tensor for tensor in found if tensor.layout is torch.strided]


def num_on(storage_bytes: int) -> int:
    """How many tensors lie in memory of that size: a view keeps all of it."""
    return sum(tensor.untyped_storage().nbytes() == storage_bytes for tensor in tensors())


def kv_regions() -> list[torch.Tensor]:
    """KV memory that lives: of all tensors of a rank the only ones that are bytes and nothing else."""
    return [tensor for tensor in tensors() if tensor.dtype == torch.uint8 and tensor.dim() == 1 and tensor.nbytes > 1e5]


def kv_bytes() -> int:
    """The size of the one KV region that lives."""
    (region,) = kv_regions()
    return region.nbytes


@pytest.mark.parametrize("pool", ["prefill", "decode", "unified"])
@pytest.mark.usefixtures("without_collector")
def test_an_epochs_kv_is_gone_when_it_is_closed(pool: str, llama: Oracle, store: TCPStore) -> None:
    threads = threading.active_count()
    for epoch in range(1, 5):
        request = assignment(llama.folder, pool=pool, epoch=epoch)
        runtime = build(request, store)
        region, model = kv_bytes(), weakref.ref(runtime._runner)
        assert num_on(region)
        runtime.close()
        runtime.close()
        assert not num_on(region) and model() is None
        assert threading.active_count() == threads


def test_an_epoch_that_could_not_be_built_leaves_nothing(llama: Oracle, store: TCPStore) -> None:
    threads = threading.active_count()
    request = assignment(llama.folder, pool="prefill", epoch=1)
    request.engine.attention_kernel = "flashinfer"  # which no CPU has
    with pytest.raises((ImportError, ValueError, RuntimeError)):
        build(request, store)
    gc.collect()
    assert threading.active_count() == threads
    assert not kv_regions()


@pytest.mark.skipif(not hasattr(TCPStore, "list_keys"), reason="this torch's store cannot list its keys")
def test_an_epochs_keys_are_forgotten_and_no_others(store: TCPStore) -> None:
    for epoch in (1, 11):
        PrefixStore("groups", PrefixStore(f"decode/0/{epoch}", store)).set("key", "value")
    forget_keys(store, prefix="decode/0/1/")
    assert store.list_keys() == ["decode/0/11/groups/key"]
