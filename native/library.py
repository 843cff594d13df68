"""The library's functions by their C signatures. Pointers are integers, sizes and strides count elements."""

import ctypes
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np

_POINTER, _SIZE, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_DOUBLE = ctypes.c_double


class Stored(IntEnum):
    """How a weight is stored: floats, or halves that are widened as they are read."""

    FLOAT32 = 0
    BFLOAT16 = 1
    FLOAT16 = 2


class Product(ctypes.Structure):
    """A product with a packed weight; of pairs `out` counts units. `bias`, and `norm` of its rows, may be null."""

    _fields_ = (
        ("packed", _POINTER),
        ("bias", _POINTER),
        ("norm", _POINTER),
        ("out", _SIZE),
        ("size", _SIZE),
        ("eps", _FLOAT),
        ("stored", ctypes.c_int32),
    )


class Heads(ctypes.Structure):
    """The product that gives `heads` of `width`, of which the first `rotated` are q's and k's; `norms` may be null."""

    _fields_ = (
        ("product", Product),
        ("norms", _POINTER),
        ("heads", _SIZE),
        ("rotated", _SIZE),
        ("width", _SIZE),
        ("eps", _FLOAT),
    )


class Gate(ctypes.Structure):
    """A gate, and the slots [experts, most_copies] and copies [experts] of its experts; `correction` may be null."""

    _fields_ = (
        ("logits", Product),
        ("correction", _POINTER),
        ("slots", _POINTER),
        ("copies", _POINTER),
        ("most_copies", _SIZE),
        ("top_k", _SIZE),
        ("num_groups", _SIZE),
        ("kept_groups", _SIZE),
        ("group_best", _SIZE),
        ("is_sigmoid", ctypes.c_int32),
        ("renormalises", ctypes.c_int32),
        ("scale", _FLOAT),
    )


class Activation(ctypes.Structure):
    """(up + up_offset) * gate * sigmoid(alpha * gate), both cut to `limit` before, which is infinite for none."""

    _fields_ = (("alpha", _FLOAT), ("up_offset", _FLOAT), ("limit", _FLOAT))


class Expert(ctypes.Structure):
    """The packed weights of one expert; a bias may be null."""

    _fields_ = (
        ("gated", _POINTER),
        ("gated_bias", _POINTER),
        ("down", _POINTER),
        ("down_bias", _POINTER),
    )


class Experts(ctypes.Structure):
    """The experts of a rank in one layer: `each` is the address of the `count` ones from slot `first` on."""

    _fields_ = (
        ("each", _POINTER),
        ("first", _SIZE),
        ("count", _SIZE),
        ("width", _SIZE),
        ("units", _SIZE),
        ("choices", _SIZE),
        ("by", Activation),
        ("stored", ctypes.c_int32),
    )


#: One entry of attention: `pages` is the address of its page numbers, int32.
ENTRY = np.dtype(
    [("first_row", "i8"), ("num_rows", "i8"), ("kv_len", "i8"), ("is_causal", "i8"), ("pages", "u8")], align=True
)

#: How one row is drawn: temperature 0 is greedy, top_k 0, top_p 1 and min_p 0 are off.
DRAW = np.dtype(
    [("temperature", "f4"), ("top_p", "f4"), ("min_p", "f4"), ("top_k", "i4"), ("seed", "u8"), ("position", "i8")],
    align=True,
)


class Plane(ctypes.Structure):
    """Where keys or values lie."""

    _fields_ = (("first", _POINTER), ("page_stride", _SIZE), ("head_stride", _SIZE), ("position_stride", _SIZE))


class AttentionShape(ctypes.Structure):
    """What the entries of one call share; `window` is 0 for none."""

    _fields_ = (
        ("num_heads", _SIZE),
        ("num_kv_heads", _SIZE),
        ("key_width", _SIZE),
        ("value_width", _SIZE),
        ("page_size", _SIZE),
        ("window", _SIZE),
        ("scale", _FLOAT),
    )


class GroupShape(ctypes.Structure):
    """The memory of a group; see parallel/group_memory.py."""

    _fields_ = (("size", _SIZE), ("num_slots", _SIZE), ("outbox_bytes", _SIZE), ("slot_bytes", _SIZE))


class NativeLibrary:
    """A loaded library. Its calls let other Python threads run, check nothing, and keep no pointer but a group's."""

    def __init__(self, path: Path, *, num_threads: int = 1) -> None:
        """OSError where the file cannot be loaded. `num_threads` is what its user gives each call."""
        library = ctypes.CDLL(str(path))
        self.path = path
        self.num_threads = num_threads
        self.lanes = _bind(library, "muster_lanes", _INT)
        self.packed_size = _bind(library, "muster_packed_size", _SIZE, _SIZE, _SIZE)
        self.pack = _bind(library, "muster_pack", None, _INT, _POINTER, _SIZE, _SIZE, _SIZE, _POINTER, _INT)
        self.packed_pair_size = _bind(library, "muster_packed_pair_size", _SIZE, _SIZE, _SIZE)
        self.pack_pairs = _bind(
            library, "muster_pack_pairs", None, _INT, _POINTER, _POINTER, _SIZE, _SIZE, _SIZE, _POINTER, _INT
        )
        rows, out = (_POINTER, _SIZE, _SIZE), (_POINTER, _POINTER, _INT)
        self.product = _bind(library, "muster_product", None, _POINTER, *rows, _POINTER, *out)
        self.gated_product = _bind(library, "muster_gated_product", None, _POINTER, _POINTER, *rows, *out)
        self.heads = _bind(library, "muster_heads", None, _POINTER, *rows, _POINTER, _POINTER, _SIZE, *out)
        self.gate = _bind(library, "muster_gate", None, _POINTER, *rows, _SIZE, _SIZE, _POINTER, _INT)
        self.experts = _bind(library, "muster_experts", None, _POINTER, *rows, _POINTER, *out)
        self.norm = _bind(library, "muster_norm", None, *rows, _SIZE, _POINTER, _FLOAT, _POINTER, _INT)
        plane = (_POINTER, _SIZE, _SIZE, _SIZE)
        self.write_rows = _bind(library, "muster_write_rows", _INT, *rows, _SIZE, _SIZE, *plane, _POINTER, _POINTER)
        self.attend = _bind(
            library,
            "muster_attend",
            None,
            *(_POINTER, _SIZE),
            *(ctypes.POINTER(AttentionShape), ctypes.POINTER(Plane), ctypes.POINTER(Plane)),
            *(_POINTER, _SIZE, _SIZE),
            *(_POINTER, _POINTER, _INT),
        )
        self.draw = _bind(
            library, "muster_draw", None, *(_POINTER, _SIZE, _SIZE, _SIZE), *(_POINTER, _POINTER, _POINTER, _INT)
        )
        self.group = GroupCalls(library)


class GroupCalls:
    """The calls on a group of ranks that share memory. Where they give a number it is 0, or what `wait_end` reads."""

    def __init__(self, library: ctypes.CDLL) -> None:
        shape, flag = ctypes.POINTER(GroupShape), ctypes.POINTER(ctypes.c_int32)
        self.num_bytes = _bind(library, "muster_group_bytes", _SIZE, shape)
        self.join = _bind(library, "muster_group_join", _POINTER, _POINTER, shape, _SIZE, _SIZE, _DOUBLE)
        self.meet = _bind(library, "muster_group_meet", _SIZE, _POINTER, _DOUBLE)
        self.leave = _bind(library, "muster_group_leave", None, _POINTER)
        self.free = _bind(library, "muster_group_free", None, _POINTER)
        even = (_POINTER, _POINTER, _POINTER, _SIZE)
        self.all_gather = _bind(library, "muster_all_gather", _SIZE, *even)
        self.reduce_scatter = _bind(library, "muster_reduce_scatter", _SIZE, *even)
        self.all_to_all = _bind(library, "muster_all_to_all", _SIZE, *even)
        uneven = (_POINTER, _POINTER, _POINTER, ctypes.POINTER(_SIZE), ctypes.POINTER(_SIZE))
        self.all_to_all_uneven = _bind(library, "muster_all_to_all_uneven", _SIZE, *uneven)
        self.send = _bind(library, "muster_send", _SIZE, _POINTER, _POINTER, _SIZE, _SIZE, _SIZE, flag)
        self.await_moved = _bind(library, "muster_await_moved", _SIZE, _POINTER, flag, _SIZE)
        self.receive = _bind(library, "muster_receive", _SIZE, _POINTER, _POINTER, _SIZE, _SIZE, _SIZE)


class WaitEnd(IntEnum):
    """How a call that waits has ended."""

    DONE = 0
    LOST = 1  # a rank that it waited for has left the group, or its process has ended
    SILENT = 2
    CLOSED = 3  # by this rank
    UNEQUAL = 4  # a rank's sizes are not this one's


def wait_end(result: int) -> tuple[WaitEnd, int]:
    """What a call that waits returned, and the rank that it is about."""
    return WaitEnd(result & 0xFF), result >> 8


def _bind(library: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(library, name)
    function.restype, function.argtypes = result, arguments  # type: ignore[attr-defined]
    return function
