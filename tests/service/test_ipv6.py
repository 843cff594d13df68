"""A topology that knows IPv6 alone: the router, a launcher, the rendezvous, the groups and the star all on [::1]."""

import socket
from pathlib import Path

import grpc
import pytest

from proto import inference_pb2, inference_pb2_grpc
from tests.harness.checkpoints import Oracle
from tests.harness.parity import assert_logits_agree
from tests.harness.router_process import worker_command
from tests.harness.running_router import running_router, topology

POOLS = {"prefill": {"attention": {"cp": 2}}, "decode": {"attention": {"dp": 2}}}


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
@pytest.mark.timeout(120)
def test_a_topology_on_the_ipv6_loopback_serves_the_tokens_of_one_rank(mixtral: Oracle, tmp_path: Path) -> None:
    with worker_command(host="[::1]") as (_, host):
        content = topology(mixtral.folder, pools=POOLS, devices=4, engine={"kv_tokens": 1024}, listen="[::1]:0")
        content["hosts"] = [{"name": "six", "address": host, "devices": 4}]
        with running_router(content, tmp_path) as router:
            assert router.address.startswith("[::1]:")
            assert_logits_agree(router, mixtral, [tuple(range(5, 40)), (7, 8, 9)], n=6)
            with grpc.insecure_channel(router.address) as channel:
                request = inference_pb2.GenerateRequest(
                    token_ids=inference_pb2.TokenIds(ids=[5, 6, 7]),
                    sampling=inference_pb2.SamplingParams(max_new_tokens=4, temperature=0),
                )
                *_, last = inference_pb2_grpc.InferenceStub(channel).Generate(request)
            assert last.complete.usage.generated_tokens == 4
