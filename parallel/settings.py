"""How much one engine may hold and do: the settings of a pool, resolved."""

from dataclasses import dataclass

from parallel.storage import DTYPE_BYTES, CacheGroup


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """`kv_tokens` is per rank; `max_batch_tokens` and `max_sequences` are per dp coordinate.

    dtype is one of float32, bfloat16, float16 (already resolved from `auto`); `weights` is the one that matrices may be
    held in where kernels widen them as they read, empty for dtype itself. step_timeout_s bounds one step of a
    replica and each of its collectives. `exchange` (auto, gather, ring, pass_q) is how queries meet the KV of other cp
    coordinates; `exchange_tokens` bounds the tokens of KV that it holds on a rank besides the pages, what is being sent
    included. `dispatch` (auto, gather, all_to_all) is how rows get to their experts; `pipeline` (auto, whole, parts) is
    how a batch of decode goes through the stages: at once, or in a part for each. `kernels`
    (auto, torch, native) is who computes on a CPU; `attention_kernel` (those, and flashinfer) may differ from it.
    """

    dtype: str = "float32"
    weights: str = ""
    page_size: int = 16
    max_batch_tokens: int = 2048
    max_sequences: int = 64
    kv_tokens: int = 16384
    step_timeout_s: float = 60.0
    attention_kernel: str = "auto"
    kernels: str = "auto"
    exchange: str = "auto"
    exchange_tokens: int = 32768
    dispatch: str = "auto"
    pipeline: str = "auto"
    prefix_cache: bool = True

    @property
    def num_pages(self) -> int:
        """Pages on each rank of a cache group that sees everything."""
        return self.kv_tokens // self.page_size

    def pages_of(self, group: CacheGroup, *, pp: int) -> int:
        """Pages of `group` on each rank.

        Behind a window pages are free again: so many sequences each hold their window's, and those of the chunks of the
        steps in flight, pp of them running and one planned, come beside them.
        """
        if not group.window:
            return self.num_pages
        of_windows = self.max_sequences * self.window_pages(group)
        return min(of_windows + (pp + 1) * -(-self.max_batch_tokens // self.page_size), self.num_pages)

    def window_pages(self, group: CacheGroup) -> int:
        """Pages of `group` that one sequence may hold between its chunks, all of them on one rank at worst."""
        return min(-(-group.window // self.page_size) + 2, self.num_pages)

    def step_tokens(self, pool: str) -> int:
        """New tokens of a full step of one dp coordinate: in decode one of each sequence."""
        return self.max_sequences if pool == "decode" else self.max_batch_tokens

    @property
    def matrix_dtype(self) -> str:
        """In which weights of two dimensions and more are held."""
        return self.weights or self.dtype

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one element."""
        return DTYPE_BYTES[self.dtype]
