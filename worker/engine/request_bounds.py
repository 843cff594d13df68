"""What a request may ask of a replica. Pure: sentences for what is refused, and no state."""

from collections.abc import Sequence
from dataclasses import dataclass

from parallel.admission import check_fits
from parallel.settings import EngineSettings
from parallel.storage import CacheGroup
from proto import control_pb2


@dataclass(frozen=True, kw_only=True)
class RequestBounds:
    """`vocab_size` bounds what ranks can embed, None where any id will do. `groups` are the model's cache groups."""

    settings: EngineSettings
    cp: int
    groups: Sequence[CacheGroup] = ()
    vocab_size: int | None = None

    def fault(self, token_ids: Sequence[int], message: control_pb2.Submit | control_pb2.Start) -> str | None:
        """Why ranks cannot run `token_ids`: they would break, and with them all that they run beside it."""
        if not token_ids:
            return "there is no token to begin with"
        if message.max_new_tokens < 1:
            return "max_new_tokens is 0: it must be 1 or more"
        given, forced = max(token_ids), max(message.probe.forced_ids, default=0)
        largest = max(given, forced)
        if self.vocab_size is not None and largest >= self.vocab_size:
            return f"token id {largest} has no embedding: ids are 0 to {self.vocab_size - 1}"
        return None

    def misfit(self, *, prompt_tokens: int, max_new_tokens: int) -> str | None:
        """Why an empty replica could not hold it."""
        try:
            check_fits(
                prompt_tokens=prompt_tokens,
                max_new_tokens=max_new_tokens,
                settings=self.settings,
                cp=self.cp,
                groups=self.groups,
            )
        except ValueError as error:
            return str(error)
        return None
