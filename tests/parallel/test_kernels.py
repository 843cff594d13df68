"""What kernels are refused before anything starts, and why."""

import pytest

from parallel.kernels import check_kernels
from parallel.settings import EngineSettings


@pytest.mark.parametrize(
    ("settings", "device", "said"),
    [
        (EngineSettings(kernels="native", dtype="bfloat16"), "cpu", "kernels is native, but the dtype is bfloat16"),
        (EngineSettings(kernels="native"), "cuda", "kernels is native, but the device is cuda"),
        (EngineSettings(attention_kernel="native"), "cuda", "attention_kernel is native, but the device is cuda"),
        (
            EngineSettings(attention_kernel="native", kernels="torch"),
            "cpu",
            "attention_kernel is native, but kernels is",
        ),
        (EngineSettings(attention_kernel="flashinfer"), "cpu", "attention_kernel is flashinfer, but the device is cpu"),
    ],
)
def test_kernels_that_a_rank_cannot_take_are_refused_with_the_reason(
    settings: EngineSettings, device: str, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        check_kernels(settings, device=device)


@pytest.mark.parametrize("kernels", ["auto", "torch", "native"])
@pytest.mark.parametrize("attention_kernel", ["auto", "torch"])
def test_what_a_rank_can_take_is_not(kernels: str, attention_kernel: str) -> None:
    check_kernels(EngineSettings(kernels=kernels, attention_kernel=attention_kernel), device="cpu")
    check_kernels(EngineSettings(attention_kernel="flashinfer", dtype="bfloat16"), device="cuda")
