"""How much one engine may hold and do: the settings of a pool, resolved."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """`kv_tokens` is per rank; `max_batch_tokens` and `max_sequences` are per dp coordinate.

    dtype is one of float32, bfloat16, float16 (already resolved from `auto`). step_timeout_s bounds one step of a
    replica and each of its collectives. `exchange` (auto, gather, ring, pass_q) is how queries meet the KV of other cp
    coordinates; `exchange_tokens` bounds the tokens of KV that it holds on a rank besides the pages, what is being sent
    included. `dispatch` (auto, gather, all_to_all) is how rows get to their experts.
    """

    dtype: str = "float32"
    page_size: int = 16
    max_batch_tokens: int = 2048
    max_sequences: int = 64
    kv_tokens: int = 16384
    step_timeout_s: float = 60.0
    attention_kernel: str = "auto"
    exchange: str = "auto"
    exchange_tokens: int = 32768
    dispatch: str = "auto"
    prefix_cache: bool = True

    @property
    def num_pages(self) -> int:
        """Pages of KV memory on each rank."""
        return self.kv_tokens // self.page_size

    def num_slots(self, *, dp: int) -> int:
        """Slots of sequences in a replica with `dp` coordinates, numbered over all of it."""
        return dp * self.max_sequences

    def slots_of(self, dp_rank: int) -> range:
        """The slots of one dp coordinate."""
        return range(dp_rank * self.max_sequences, (dp_rank + 1) * self.max_sequences)

    def dp_rank_of(self, slot: int) -> int:
        """The dp coordinate whose slot it is."""
        return slot // self.max_sequences

    def step_tokens(self, pool: str) -> int:
        """New tokens of a full step of one dp coordinate: in decode one of each sequence."""
        return self.max_sequences if pool == "decode" else self.max_batch_tokens

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one element."""
        return 4 if self.dtype == "float32" else 2
