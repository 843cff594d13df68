"""The rule by which a layout's tokens and logits are compared with transformers' (DESIGN's second invariant)."""

from collections.abc import Sequence

import numpy as np

from proto import control_pb2
from router.generation import Generation, GenerationRequest
from tests.harness.checkpoints import Oracle, OracleAnswer
from tests.harness.local_replica import LocalReplica
from tests.harness.near_ties import TOLERANCE, first_near_draw
from tests.harness.running_router import RunningRouter, greedy

_LEAST_COMPARED = 0.8


def assert_logits_agree(router: RunningRouter, oracle: Oracle, prompts: Sequence[tuple[int, ...]], *, n: int) -> None:
    """Along the oracle's own tokens, the logits of every position agree to the tolerance."""
    assert_probes_agree(router.generate_all(probes(oracle, prompts, n=n)), oracle, n=n)


def probes(oracle: Oracle, prompts: Sequence[tuple[int, ...]], *, n: int) -> list[GenerationRequest]:
    """For each prompt a request that is forced along the oracle's own tokens and returns its logits."""
    return [
        greedy(prompt, max_new_tokens=n, forced_ids=oracle.answer(prompt, n).token_ids, logits=True)
        for prompt in prompts
    ]


def assert_probes_agree(generations: Sequence[Generation], oracle: Oracle, *, n: int) -> None:
    """Every logit that the forced `generations` returned is the oracle's to the tolerance."""
    for generation in generations:
        answer = oracle.answer(generation.request.prompt_ids, n)
        assert tuple(generation.token_ids) == answer.token_ids
        got = [np.frombuffer(values, dtype=np.float32) for values in generation.logits]
        _assert_agree(got, answer, length=len(generation.request.prompt_ids))


def assert_replica_agrees(replica: LocalReplica, oracle: Oracle, prompts: Sequence[tuple[int, ...]], *, n: int) -> None:
    """The same of a local replica: a probe along the oracle's own tokens for each prompt, all at once."""
    answers = [oracle.answer(prompt, n) for prompt in prompts]
    found = replica.run(
        [
            control_pb2.Submit(
                request_id=index,
                prompt_ids=prompt,
                max_new_tokens=n,
                sampling=control_pb2.Sampling(top_p=1),
                probe=control_pb2.Probe(forced_ids=answer.token_ids, logits=True),
            )
            for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True), 1)
        ]
    )
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True), 1):
        _assert_agree(found[index], answer, length=len(prompt))


def _assert_agree(logits: Sequence[np.ndarray], answer: OracleAnswer, *, length: int) -> None:
    error = np.abs(np.stack(logits) - answer.logits).max(axis=1) / np.abs(answer.logits).max(axis=1)
    where = int(error.argmax())
    assert error[where] <= TOLERANCE, f"prompt of {length}: output {where} is off by {error[where]:.2e}"


def assert_tokens_agree(generations: Sequence[Generation], oracle: Oracle, *, n: int) -> None:
    """Tokens, greedy or drawn, are the oracle's up to the first near tie, and enough of them are compared."""
    compared = 0
    for generation in generations:
        prompt, sampling = generation.request.prompt_ids, generation.request.sampling
        answer = oracle.drawn(prompt, n, sampling)
        end = first_near_draw(answer.logits, sampling, position=len(prompt))
        assert len(generation.token_ids) == n
        assert tuple(generation.token_ids[:end]) == answer.token_ids[:end], (len(prompt), sampling.temperature)
        compared += end
    share = compared / (n * len(generations))
    assert share >= _LEAST_COMPARED, f"near ties left only {share:.0%} of the tokens to compare: choose other seeds"
