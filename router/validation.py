"""From a client's request to a `GenerationRequest`, or to the sentence that says what is wrong with it."""

import math
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from parallel.models.description import ModelDescription
from proto import control_pb2, inference_pb2
from router.capacity import Capacity
from router.errors import InvalidRequestError
from router.generation import GenerationRequest
from router.text import ModelText

DEFAULT_MAX_NEW_TOKENS = 256
_MAX_STOP_STRINGS = 16
_LEAST_TEMPERATURE = 1e-5


@dataclass(frozen=True, kw_only=True)
class RequestValidator:
    """Checks requests against one model."""

    description: ModelDescription
    text: ModelText
    capacity: Capacity

    def validate(self, request: inference_pb2.GenerateRequest) -> GenerationRequest:
        """The request with every default filled in; InvalidRequestError with field, value and range."""
        prompt_ids = self._prompt_ids(request)
        limit = self.description.max_positions
        if len(prompt_ids) >= limit:
            raise _invalid(
                "prompt", f"{len(prompt_ids)} tokens", f"1 to {limit - 1} tokens for this model{self._why()}"
            )
        params = request.sampling
        asked = params.max_new_tokens if params.HasField("max_new_tokens") else self._default_new(len(prompt_ids))
        if asked < 1:
            raise _invalid("sampling.max_new_tokens", asked, "1 or more")
        _check_stop_strings(list(params.stop))
        eos = frozenset() if params.ignore_eos else self.text.defaults.eos_token_ids
        return GenerationRequest(
            prompt_ids=tuple(prompt_ids),
            max_new_tokens=min(asked, limit - len(prompt_ids)),
            stop_token_ids=eos | frozenset(self._in_vocabulary("sampling.stop_token_ids", params.stop_token_ids)),
            sampling=self._sampling(params),
        )

    def _default_new(self, prompt_tokens: int) -> int:
        """What is generated where nothing is asked: never a reason to refuse a prompt that itself can be served."""
        return max(min(DEFAULT_MAX_NEW_TOKENS, self.capacity.sequence_tokens - prompt_tokens), 1)

    def _why(self) -> str:
        """Why the model's own length is not served, where it is not."""
        reason = self.description.limit_reason
        return f" ({reason})" if reason else ""

    def _prompt_ids(self, request: inference_pb2.GenerateRequest) -> list[int]:
        kind = request.WhichOneof("prompt")
        if kind is None:
            raise _invalid("prompt", "nothing", "one of text, token_ids and chat")
        if kind == "token_ids":
            ids = self._in_vocabulary("token_ids.ids", request.token_ids.ids)
        elif kind == "text":
            self._check_size("text", request.text)
            sources = {"text": request.text, "what the tokenizer adds to text": ""}
            ids = self._embedded(self.text.encode(request.text), sources)
        else:
            ids = self._chat_ids(request.chat)
        if not ids:
            raise _invalid(kind, "empty", "a prompt of one token or more")
        return ids

    def _chat_ids(self, chat: inference_pb2.Chat) -> list[int]:
        if not self.text.has_chat_template:
            raise InvalidRequestError("chat: this model has no chat template; send text or token_ids")
        if not chat.messages:
            raise _invalid("chat.messages", "empty", "one message or more")
        self._check_size("chat", "".join(item.content for item in chat.messages))
        try:
            ids = self.text.encode_chat([{"role": item.role, "content": item.content} for item in chat.messages])
        except ValueError as error:
            raise InvalidRequestError(f"chat: {error}") from error
        parts = {f"chat.messages[{index}]": f"{item.role} {item.content}" for index, item in enumerate(chat.messages)}
        return self._embedded(ids, {**parts, "the model's chat template": ""})

    def _embedded(self, ids: list[int], sources: Mapping[str, str]) -> list[int]:
        """`ids`, made of the texts in `sources`: InvalidRequestError where the model has no embedding for one of them.

        A tokenizer may know tokens that the weights do not, added ones above all. The source whose text holds the token
        is named; one whose text is empty is named where no other is.
        """
        size = self.description.vocab_size
        if max(ids, default=0) < size:
            return ids
        unknown = next(token_id for token_id in ids if token_id >= size)
        token = self.text.token(unknown)
        source = next((name for name, text in sources.items() if token in text or not text), next(iter(sources)))
        raise InvalidRequestError(
            f"{source} holds the token {token!r}, whose id is {unknown}: the model has no embedding for it, its ids "
            f"are 0 to {size - 1}"
        )

    def _check_size(self, field: str, text: str) -> None:
        """Refuses by size what no tokenisation could make short enough, before the time to tokenise it is spent."""
        most = min(self.description.max_positions, self.capacity.prompt_tokens)
        size, limit = len(text.encode()), most * self.text.longest_token_bytes
        if size > limit:
            tokens = f"{most} tokens{self._why()}"
            raise _invalid(field, f"{size} bytes", f"at most {limit} bytes: {tokens}")

    def _in_vocabulary(self, field: str, ids: Iterable[int]) -> list[int]:
        found = list(ids)
        size = self.description.vocab_size
        if max(found, default=0) >= size:
            index, token_id = next((index, token_id) for index, token_id in enumerate(found) if token_id >= size)
            raise _invalid(f"{field}[{index}]", token_id, f"0 to {size - 1}")
        return found

    def _sampling(self, params: inference_pb2.SamplingParams) -> control_pb2.Sampling:
        defaults = self.text.defaults
        temperature = params.temperature if params.HasField("temperature") else defaults.temperature
        top_p = params.top_p if params.HasField("top_p") else defaults.top_p
        top_k = params.top_k if params.HasField("top_k") else defaults.top_k
        min_p = params.min_p if params.HasField("min_p") else defaults.min_p
        if not (math.isfinite(temperature) and temperature >= 0):
            raise _invalid("sampling.temperature", temperature, "0 (greedy) or more")
        if not 0 < top_p <= 1:
            raise _invalid("sampling.top_p", top_p, "above 0, at most 1")
        if top_k < 0:
            raise _invalid("sampling.top_k", top_k, "0 (off) or more")
        if not 0 <= min_p <= 1:
            raise _invalid("sampling.min_p", min_p, "0 (off) to 1")
        # Logits over less than this leave float32's range; a draw would be of the best token alone anyway.
        temperature = temperature if temperature >= _LEAST_TEMPERATURE else 0.0
        seed = params.seed if params.HasField("seed") else secrets.randbits(64)
        return control_pb2.Sampling(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed)


def _check_stop_strings(stop: list[str]) -> None:
    if len(stop) > _MAX_STOP_STRINGS:
        raise _invalid("sampling.stop", f"{len(stop)} strings", f"at most {_MAX_STOP_STRINGS}")
    if any(not text for text in stop):
        raise _invalid("sampling.stop", "an empty string", "strings of one character or more")


def _invalid(field: str, value: object, allowed: str) -> InvalidRequestError:
    return InvalidRequestError(f"{field} is {value}: it must be {allowed}")
