"""Which kernels can compute what, known before anything is loaded: `router check` and the ranks ask the same."""

from parallel.settings import EngineSettings


def why_not_native(*, device: str, dtype: str) -> str | None:
    """What stands against native kernels on a kind of device, for numbers of `dtype`, as the end of a sentence."""
    if device != "cpu":
        return f"the device is {device}: they are for cpu"
    if dtype != "float32":
        return f"the dtype is {dtype}: they compute in float32"
    return None


def check_kernels(settings: EngineSettings, *, device: str) -> None:
    """ValueError where `settings` ask for kernels that ranks on that kind of device cannot take."""
    reason = why_not_native(device=device, dtype=settings.dtype)
    if settings.kernels == "native" and reason:
        raise ValueError(f"kernels is native, but {reason}; write auto")
    if settings.attention_kernel == "native" and reason:
        raise ValueError(f"attention_kernel is native, but {reason}; write auto")
    if settings.attention_kernel == "native" and settings.kernels == "torch":
        raise ValueError("attention_kernel is native, but kernels is torch, which loads none of them; write auto")
    if settings.attention_kernel == "flashinfer" and device == "cpu":
        raise ValueError("attention_kernel is flashinfer, but the device is cpu; write auto, torch or native")
