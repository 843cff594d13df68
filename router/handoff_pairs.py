"""A prefill and a decode replica that meet, and part: in which order each side hears of the other.

```
meet   decode opens an endpoint for this writer   ->  prefill connects to it
part   prefill forgets the target                 ->  decode closes the writer    ->  its target pages may be used
```
"""

from collections.abc import Callable
from typing import Protocol

from parallel.topology import ReplicaPlan
from router.peer_orders import PeerOrders


class PoolReplica(Protocol):
    """A replica of either pool, as `ReplicaClient` is one."""

    plan: ReplicaPlan
    epoch: int
    peers: PeerOrders

    @property
    def name(self) -> str:
        """pool/index."""
        ...


async def meet(source: PoolReplica, target: PoolReplica) -> None:
    """Hand-offs may go from `source` to `target` when this returns."""
    endpoints = await target.peers.open_writer(source.name, epoch=source.epoch)
    await source.peers.connect_target(target.plan, epoch=target.epoch, endpoints=endpoints)


async def part(source: PoolReplica, target: PoolReplica, *, released: Callable[[], None] = lambda: None) -> None:
    """When this returns nothing of `source` lands at `target` any more; the target's memory may be given up, and
    `released` has been called for what a failed hand-off kept out of use there.
    """
    await source.peers.forget_target(target.name, epoch=target.epoch)
    await target.peers.close_writer(source.name, epoch=source.epoch)
    released()


async def bury(source: PoolReplica, target: PoolReplica) -> None:
    """`target`'s processes are known to have ended: `source` waits for nothing of it any more."""
    await source.peers.forget_target(target.name, epoch=target.epoch, is_dead=True)
