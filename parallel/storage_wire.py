"""A rank's storage as messages, and back: what a writer has to know of the memory that it writes into."""

from collections.abc import Iterable
from dataclasses import asdict, fields

from parallel.storage import GroupRegion, PageLayout, PlaneLayout, RankStorage
from proto import control_pb2


def storage_to_wire(storage: RankStorage) -> tuple[control_pb2.GroupMemory, ...]:
    """A message for each cache group."""
    return tuple(
        control_pb2.GroupMemory(
            name=group.name,
            layers=group.layers,
            num_pages=group.num_pages,
            first_head=group.first_head,
            first_byte=group.first_byte,
            page_size=group.page.page_size,
            page_bytes=group.page.page_bytes,
            planes=[control_pb2.PlaneMemory(**asdict(plane)) for plane in group.page.planes],
        )
        for group in storage.groups
    )


def storage_from_wire(groups: Iterable[control_pb2.GroupMemory]) -> RankStorage:
    """The inverse of `storage_to_wire`."""
    return RankStorage(
        groups=tuple(
            GroupRegion(
                name=group.name,
                page=PageLayout(
                    page_size=group.page_size,
                    page_bytes=group.page_bytes,
                    planes=tuple(_plane_from_wire(plane) for plane in group.planes),
                ),
                layers=tuple(group.layers),
                num_pages=group.num_pages,
                first_head=group.first_head,
                first_byte=group.first_byte,
            )
            for group in groups
        )
    )


def _plane_from_wire(plane: control_pb2.PlaneMemory) -> PlaneLayout:
    """A plane has the same fields in both."""
    return PlaneLayout(**{field.name: getattr(plane, field.name) for field in fields(PlaneLayout)})
