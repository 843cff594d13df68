"""The memory of one layer as tensors: its pages as bytes, and views of its planes, by what `storage` says alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from attention.dtypes import TORCH_DTYPES
from attention.plane_rows import PlaneRows
from parallel.storage import PageLayout, PlaneLayout, PlaneView


@dataclass(frozen=True, kw_only=True)
class LayerFormat:
    """How a layer's pages are read: where its key and its value lie, and what scores are multiplied by."""

    page: PageLayout
    key: PlaneView
    value: PlaneView
    scale: float


class Place(NamedTuple):
    """Where a view [N, heads, P, elements] lies, for kernels that take pointers: the address of its first element, and
    strides in elements. Those of one position lie side by side.
    """

    address: int
    page_stride: int
    head_stride: int
    position_stride: int


@dataclass(frozen=True, kw_only=True)
class LayerMemory:
    """`pages` uint8 [N, page_bytes], contiguous, whatever is in them; `planes` are views [N, heads, P, elements] of
    each plane in order, `key` and `value` views [N, Hkv, P, Dk] and [N, Hkv, P, Dv] of two of them.
    """

    form: LayerFormat
    pages: torch.Tensor
    planes: tuple[torch.Tensor, ...]
    key: torch.Tensor
    value: torch.Tensor

    @cached_property
    def runs(self) -> Mapping[str, torch.Tensor]:
        """Of each plane, by name, its memory as the rows that `PlaneRows` counts."""
        page = self.form.page
        return {plane.name: PlaneRows(plane, page).source(self.pages) for plane in page.planes}

    @cached_property
    def plane_places(self) -> tuple[Place, ...]:
        """Of `planes`."""
        return tuple(map(_place, self.planes))

    @cached_property
    def key_value_places(self) -> tuple[Place, Place]:
        """Of `key` and of `value`."""
        return _place(self.key), _place(self.value)

    @property
    def scale(self) -> float:
        """Of the scores."""
        return self.form.scale

    def over(self, pages: torch.Tensor) -> "LayerMemory":
        """The same layer over other pages uint8 [M, page_bytes]: copies of its own, or those of another rank."""
        return bind_layer(pages, self.form)


def bind_layer(pages: torch.Tensor, form: LayerFormat) -> LayerMemory:
    """A layer of `form` over the memory `pages` uint8 [N, page_bytes], contiguous."""
    views = {plane.name: plane_view(pages, plane, page=form.page) for plane in form.page.planes}
    return LayerMemory(
        form=form,
        pages=pages,
        planes=tuple(views.values()),
        key=views[form.key.plane].narrow(3, form.key.offset, form.key.width),
        value=views[form.value.plane].narrow(3, form.value.offset, form.value.width),
    )


def plane_view(pages: torch.Tensor, plane: PlaneLayout, *, page: PageLayout) -> torch.Tensor:
    """A plane of `pages` uint8 [N, page_bytes] as [N, heads, P, elements] in its own dtype."""
    typed, size = pages.view(TORCH_DTYPES[plane.dtype]), plane.itemsize
    return typed.as_strided(
        (pages.shape[0], plane.num_heads, page.page_size, plane.elements),
        (page.page_bytes // size, plane.head_stride // size, plane.position_stride // size, 1),
        typed.storage_offset() + plane.offset // size,
    )


def _place(view: torch.Tensor) -> Place:
    page, head, position, element = view.stride()
    assert element == 1, view.stride()
    return Place(view.data_ptr(), page, head, position)
