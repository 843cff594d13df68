"""Orders to a replica: each is answered by its own number, and none waits on a stream that has ended."""

import asyncio

import pytest

from proto import control_pb2
from router.errors import ClusterError
from router.peer_orders import PeerOrders


def test_equal_orders_are_told_apart_and_late_answers_change_nothing() -> None:
    async def work() -> None:
        sent: list[control_pb2.ToReplica] = []
        orders = PeerOrders(sent.append)
        first, second = (asyncio.ensure_future(orders.open_writer("prefill/0", epoch=1)) for _ in range(2))
        await asyncio.sleep(0)
        numbers = [message.peer_order.order_id for message in sent]
        assert len(set(numbers)) == 2
        orders.take(control_pb2.PeerAnswered(order_id=numbers[1], endpoints=[b"second"]))
        orders.take(control_pb2.PeerAnswered(order_id=numbers[1], endpoints=[b"late"]))
        orders.take(control_pb2.PeerAnswered(order_id=99))
        assert await second == [b"second"] and not first.done()
        orders.take(control_pb2.PeerAnswered(order_id=numbers[0], endpoints=[b"first"]))
        assert await first == [b"first"]

    asyncio.run(asyncio.wait_for(work(), timeout=10))


def test_an_order_fails_when_the_stream_ends_and_so_does_each_one_after_it() -> None:
    async def work() -> None:
        orders = PeerOrders(lambda _: None)
        waiting = asyncio.ensure_future(orders.forget_target("decode/0", epoch=1))
        await asyncio.sleep(0)
        orders.fail(ClusterError("the stream has ended"))
        for order in (waiting, orders.close_writer("prefill/0", epoch=1)):
            with pytest.raises(ClusterError, match="has ended"):
                await order

    asyncio.run(asyncio.wait_for(work(), timeout=10))


def test_an_order_that_a_rank_cannot_carry_out_fails_with_its_sentence() -> None:
    async def work() -> None:
        sent: list[control_pb2.ToReplica] = []
        orders = PeerOrders(sent.append)
        waiting = asyncio.ensure_future(orders.open_writer("prefill/0", epoch=1))
        await asyncio.sleep(0)
        refusal = "rank 1: plane k of group full has dtype float32 here and float16 there"
        orders.take(control_pb2.PeerAnswered(order_id=sent[0].peer_order.order_id, refusal=refusal))
        with pytest.raises(ClusterError, match="rank 1: plane k"):
            await waiting

    asyncio.run(asyncio.wait_for(work(), timeout=10))
