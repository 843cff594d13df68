"""Native kernels as blocks use them, against torch's; and which kernels a rank takes."""

import logging

import pytest
import torch
import torch.nn.functional as F

from moe.experts import ExpertWeights
from moe.routed_rows import NO_SLOT
from moe.slots import SlotMap
from native.build import Build
from native.library import NativeLibrary
from parallel.expert_table import expert_table
from parallel.models.gates import SWIGLU, Activation, GateSpec, Scoring
from tests.harness.routed import routed
from tests.moe.test_gate import SPECS
from worker.kernels import choose
from worker.kernels.choose import choose_library, make_kernels
from worker.kernels.interface import HeadWeights, Norm
from worker.kernels.native_kernels import NativeKernels
from worker.kernels.native_products import NativeLinear
from worker.kernels.torch_kernels import TorchKernels

CPU = torch.device("cpu")


@pytest.mark.parametrize("with_biases", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 3, 40, 67])
def test_a_linear_gives_what_torch_gives(library: NativeLibrary, with_biases: bool, rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    parts = [torch.randn(size, 12, generator=generator) for size in (6, 2, 33)]
    biases = [torch.randn(len(part), generator=generator) for part in parts] if with_biases else []
    x = torch.randn(rows, 12, generator=generator)
    found = NativeKernels(library).linear(parts, biases=biases)(x)
    assert torch.allclose(found, TorchKernels().linear(parts, biases=biases)(x), atol=1e-5)


def test_rows_of_whatever_strides_are_taken(library: NativeLibrary) -> None:
    x, weight = torch.randn(40, 30), torch.randn(9, 12)
    linear = NativeKernels(library).linear([weight])
    for rows in (x[:, 5:17], x[::3, :12], torch.randn(12, 7).t()):
        assert torch.allclose(linear(rows), F.linear(rows, weight), atol=1e-5)


@pytest.mark.parametrize("activation", [SWIGLU, Activation(alpha=1.702, up_offset=1.0, limit=0.7)])
@pytest.mark.parametrize("with_biases", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 40])
def test_gated_products_and_experts_give_what_torch_gives(
    library: NativeLibrary, rows: int, with_biases: bool, activation: Activation
) -> None:
    generator = torch.Generator().manual_seed(rows)

    def expert() -> ExpertWeights:
        gate_up = torch.randn(14, 12, generator=generator)
        biases = torch.randn(2, 7, generator=generator)
        return ExpertWeights(
            gate=gate_up[0::2],
            up=gate_up[1::2],
            down=torch.randn(12, 7, generator=generator),
            gate_up_biases=(biases[0], biases[1]) if with_biases else None,
            down_bias=torch.randn(12, generator=generator) if with_biases else None,
        )

    weights = [expert(), expert()]
    weights.append(weights[0])  # an expert with two slots
    x, shares = torch.randn(rows, 12, generator=generator), torch.rand(rows, 2, generator=generator)
    slots = torch.randint(-1, 6, (rows, 2), generator=generator)
    native, plain = NativeKernels(library), TorchKernels()
    first, biases = weights[0], weights[0].gate_up_biases
    gated: list[torch.Tensor] = []
    summed: list[torch.Tensor] = []
    for kernels in (native, plain):
        gated.append(kernels.gated(first.gate, first.up, biases=biases, activation=activation)(x))
        summed.append(kernels.experts(weights, first=1, activation=activation).run(routed(x, slots, shares)))
    assert torch.allclose(gated[0], gated[1], atol=1e-5)
    assert torch.allclose(summed[0], summed[1], atol=1e-4)


@pytest.mark.parametrize("rows", [0, 1, 5, 700])
@pytest.mark.parametrize("width", [1, 16, 20, 131])
def test_norms_and_products_behind_them_give_what_torch_gives(library: NativeLibrary, rows: int, width: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    native, plain = NativeKernels(library), TorchKernels()
    x, weight = torch.randn(rows, width, generator=generator), torch.randn(9, width, generator=generator)
    norm, plus = Norm(weight=torch.randn(width, generator=generator), eps=1e-3), torch.randn(rows, 9)
    for given in (x, x.repeat(1, 2)[:, :width]):
        assert torch.allclose(native.norm(norm)(given), plain.norm(norm)(given), atol=1e-5)
        found, wanted = (kernels.linear([weight], norm=norm)(given, plus=plus) for kernels in (native, plain))
        assert torch.allclose(found, wanted, atol=1e-4)
        found, wanted = (
            kernels.gated(weight, weight, activation=SWIGLU, norm=norm)(given) for kernels in (native, plain)
        )
        assert torch.allclose(found, wanted, atol=1e-3)


@pytest.mark.parametrize("with_norms", [False, True])
@pytest.mark.parametrize("with_biases", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 5, 700])
@pytest.mark.parametrize("head_dim", [2, 16, 20, 64])
def test_heads_give_what_torch_gives(
    library: NativeLibrary, rows: int, head_dim: int, with_biases: bool, with_norms: bool
) -> None:
    generator = torch.Generator().manual_seed(rows)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def of_heads() -> Norm:
        return Norm(weight=some(head_dim), eps=1e-3)

    weights = HeadWeights(
        qkv=[some(heads * head_dim, 12) for heads in (6, 2, 2)],
        biases=[some(heads * head_dim) for heads in (6, 2, 2)] if with_biases else [],
        head_norms=(Norm(weight=some(head_dim), eps=1e-3), Norm(weight=some(head_dim), eps=1e-3))
        if with_norms
        else None,
        num_heads=6,
        num_kv_heads=2,
        head_dim=head_dim,
    )
    x, norm = some(rows, 12), Norm(weight=some(12), eps=1e-3)
    for half in {1, head_dim // 4, head_dim // 2} - {0}:
        cos, sin = some(2, rows, 1, half)
        for before in (None, norm):
            native, plain = (
                kernels.heads(weights, norm=before)(x, cos, sin) for kernels in (NativeKernels(library), TorchKernels())
            )
            for found, wanted in zip(native, plain, strict=True):
                assert torch.allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 40])
def test_a_gate_chooses_and_weighs_as_torch_s_does(library: NativeLibrary, rows: int, spec: GateSpec) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight, x = torch.randn(spec.num_experts, 12, generator=generator), torch.randn(rows, 12, generator=generator)
    bias, correction = torch.randn(2, spec.num_experts, generator=generator)
    # Every second expert is held twice.
    placement = (*range(spec.num_experts), *range(0, spec.num_experts, 2))
    slots = SlotMap(expert_table(num_experts=spec.num_experts, ep=1, placement=placement), device=CPU)
    found, wanted = (
        kernels.gate(
            spec,
            weight=weight,
            bias=bias if spec.has_bias else None,
            correction=correction if spec.has_correction else None,
            norm=Norm(weight=torch.full((12,), 0.5), eps=1e-5),
            slots=slots,
        )(x, first_row=3, padded_rows=rows + 2)
        for kernels in (NativeKernels(library), TorchKernels())
    )
    assert torch.equal(found.slots, wanted.slots) and (found.slots[rows:] == NO_SLOT).all()
    assert torch.allclose(found.x[:rows], wanted.x[:rows], atol=1e-5)
    assert torch.allclose(found.weights[:rows], wanted.weights[:rows], atol=1e-5)


def test_a_gate_s_row_without_numbers_chooses_experts_that_there_are_and_spoils_itself_alone(
    library: NativeLibrary,
) -> None:
    spec = GateSpec(num_experts=6, top_k=3, scoring=Scoring.SOFTMAX, renormalise=True)
    slots = SlotMap(expert_table(num_experts=6, ep=1, placement=()), device=CPU)
    norm = Norm(weight=torch.ones(12), eps=1e-5)
    gate = NativeKernels(library).gate(
        spec, weight=torch.randn(6, 12), bias=None, correction=None, norm=norm, slots=slots
    )
    x = torch.randn(3, 12)
    clean = gate(x, first_row=0, padded_rows=3)
    x[1, 4] = torch.nan
    broken = gate(x, first_row=0, padded_rows=3)
    assert sorted(broken.slots[1].tolist()) == [0, 1, 2] and broken.weights[1].isnan().all()
    for part in ("x", "slots", "weights"):
        assert torch.equal(getattr(broken, part)[[0, 2]], getattr(clean, part)[[0, 2]])


def test_a_norm_of_a_row_that_holds_no_numbers_spoils_that_row_alone(library: NativeLibrary) -> None:
    x = torch.randn(3, 20)
    norm = NativeKernels(library).norm(Norm(weight=torch.ones(20), eps=1e-5))
    clean = norm(x)
    x[1, 7] = torch.nan
    broken = norm(x)
    assert broken[1].isnan().all() and torch.equal(broken[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_half_the_bits_are_held_so_and_meet_rows_in_float32(
    library: NativeLibrary, dtype: torch.dtype
) -> None:
    weight, bias, x = torch.randn(9, 12).to(dtype), torch.randn(9).to(dtype), torch.randn(3, 12)
    linear = NativeKernels(library).linear([weight], biases=[bias])
    assert isinstance(linear, NativeLinear) and linear.packed.weight.dtype == dtype
    assert torch.allclose(linear(x), F.linear(x, weight.float(), bias.float()), atol=1e-5)


def test_a_weight_of_another_dtype_is_torch_s(library: NativeLibrary) -> None:
    weight, x = torch.randn(9, 12).double(), torch.randn(3, 12).double()
    assert torch.equal(NativeKernels(library).linear([weight])(x), F.linear(x, weight))


def test_auto_is_native_on_a_cpu_in_float32_and_torch_elsewhere(library: NativeLibrary) -> None:
    for asked in ("auto", "native"):
        chosen = choose_library(asked, device=CPU, dtype="float32")
        assert chosen is not None and (chosen.path, chosen.num_threads) == (library.path, torch.get_num_threads())
        assert isinstance(make_kernels(chosen), NativeKernels)
    assert choose_library("torch", device=CPU, dtype="float32") is None
    assert choose_library("auto", device=CPU, dtype="bfloat16") is None
    assert choose_library("auto", device=torch.device("cuda", 0), dtype="float32") is None
    assert isinstance(make_kernels(None), TorchKernels)


@pytest.mark.parametrize(
    ("device", "dtype", "words"),
    [("cuda", "float32", "the device is cuda: they are for cpu"), ("cpu", "float16", "the dtype is float16")],
)
def test_native_kernels_that_cannot_be_had_are_an_error_that_says_why(device: str, dtype: str, words: str) -> None:
    with pytest.raises(ValueError, match=f"engine.kernels is native, but {words}"):
        choose_library("native", device=torch.device(device), dtype=dtype)


def test_where_nothing_is_built_auto_warns_once_and_native_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    empty = tmp_path_factory.mktemp("empty")
    monkeypatch.setattr(choose, "Build", lambda: Build(folders=(empty,)))
    with caplog.at_level(logging.WARNING):
        assert choose_library("auto", device=CPU, dtype="float32") is None
    assert [record.message for record in caplog.records] == [
        "kernels: torch's, for they are not built for this machine: `python -m native.build` says why"
    ]
    with pytest.raises(ValueError, match="they are not built for this machine"):
        choose_library("native", device=CPU, dtype="float32")


def test_a_file_that_is_no_library_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path_factory.mktemp("broken")
    build = Build(folders=(folder,))
    build.make().write_bytes(b"no library")
    monkeypatch.setattr(choose, "Build", lambda: build)
    with caplog.at_level(logging.WARNING):
        assert choose_library("auto", device=CPU, dtype="float32") is None
    assert "cannot be loaded" in caplog.text
