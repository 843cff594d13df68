"""How weight files hold a tensor: by itself, or with those of all experts in one, plain or as MXFP4.

```
a tensor of one expert      [out, in]
AS_IS                       [E, out, in]                      its bias [E, out]
TRANSPOSED                  [E, in, out]
MXFP4    NAME_blocks        [E, out, in / 32, 16] bytes       two values each, the low half first
         NAME_scales        [E, out, in / 32] bytes           a power of two for 32 values along the input
```
"""

from dataclasses import dataclass
from enum import Enum

#: Values that share a scale, and the bytes that they take.
MXFP4_BLOCK, MXFP4_BLOCK_BYTES = 32, 16
#: What the loader casts from.
PLAIN_FLOATS = ("F32", "F16", "BF16", "F64")
_BYTES = ("U8",)


class StackForm(Enum):
    """How the tensors of all experts lie in one."""

    AS_IS = "one after the other"
    TRANSPOSED = "one after the other, each transposed"
    MXFP4 = "four bits a value, with scales (OCP Microscaling Formats 1.0)"


@dataclass(frozen=True, kw_only=True)
class ExpertStack:
    """The tensor `name` of the weight files, of `num_experts` experts; in the form MXFP4 two tensors of that name."""

    name: str
    num_experts: int
    form: StackForm


@dataclass(frozen=True, kw_only=True)
class FileTensor:
    """A tensor that the weight files must hold, in one of `dtypes` as safetensors names them."""

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...] = PLAIN_FLOATS


def stacked_in(stack: ExpertStack, shape: tuple[int, ...]) -> tuple[FileTensor, ...]:
    """What the files must hold for experts whose tensors have `shape`; for MXFP4 [out, in], blocks and then scales."""
    if stack.form is StackForm.AS_IS:
        return (FileTensor(name=stack.name, shape=(stack.num_experts, *shape)),)
    rows, columns = shape
    if stack.form is StackForm.TRANSPOSED:
        return (FileTensor(name=stack.name, shape=(stack.num_experts, columns, rows)),)
    assert columns % MXFP4_BLOCK == 0, f"{stack.name} has {columns} inputs, no blocks of {MXFP4_BLOCK}"
    scales = (stack.num_experts, rows, columns // MXFP4_BLOCK)
    return (
        FileTensor(name=f"{stack.name}_blocks", shape=(*scales, MXFP4_BLOCK_BYTES), dtypes=_BYTES),
        FileTensor(name=f"{stack.name}_scales", shape=scales, dtypes=_BYTES),
    )
