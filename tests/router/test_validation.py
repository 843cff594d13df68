"""What a client asks is checked against the positions that the model's rope serves."""

from pathlib import Path

import pytest

from parallel.models.registry import describe_checkpoint
from proto import inference_pb2
from router.capacity import Capacity
from router.errors import InvalidRequestError
from router.text import ModelText
from router.validation import RequestValidator
from tests.harness.checkpoints import tiny_scaled_llama

ROOMY = Capacity(prompt_tokens=1 << 20, sequence_tokens=1 << 20)


def request(length: int) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=[1] * length))


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_a_prompt_beyond_where_the_frequencies_move_is_refused_with_the_reason(tmp_path: Path, rope: str) -> None:
    folder = tiny_scaled_llama(tmp_path, rope=rope).folder
    validator = RequestValidator(description=describe_checkpoint(folder), text=ModelText(folder), capacity=ROOMY)
    found = validator.validate(request(600))
    assert len(found.prompt_ids) + found.max_new_tokens == 640
    with pytest.raises(InvalidRequestError) as caught:
        validator.validate(request(640))
    assert "prompt is 640 tokens: it must be 1 to 639 tokens for this model" in str(caught.value)
    assert f"rope type '{rope}' changes its frequencies beyond 640 positions" in str(caught.value)
    assert "how a prompt is cut into chunks" in str(caught.value)
