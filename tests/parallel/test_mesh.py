"""The algebra of one mesh, over every factorisation of up to 16 ranks in three axes."""

from collections.abc import Iterator
from itertools import combinations

import pytest

from parallel.mesh import Mesh, divisors

AXES = ("a", "b", "c")


def factorisations(size: int) -> Iterator[tuple[int, int, int]]:
    for first in divisors(size):
        for second in divisors(size // first):
            yield first, second, size // first // second


MESHES = [Mesh(axes=tuple(zip(AXES, sizes, strict=True))) for size in range(1, 17) for sizes in factorisations(size)]


@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: "x".join(str(size) for _, size in mesh.axes))
class TestEveryFactorisation:
    def test_coordinates_and_ranks_are_a_bijection(self, mesh: Mesh) -> None:
        seen = {tuple(mesh.coordinates(rank).values()) for rank in range(mesh.size)}
        assert len(seen) == mesh.size
        assert all(mesh.rank(mesh.coordinates(rank)) == rank for rank in range(mesh.size))

    def test_the_last_axis_is_contiguous(self, mesh: Mesh) -> None:
        _, b, c = (size for _, size in mesh.axes)
        for rank in range(mesh.size):
            expected = {"a": rank // (b * c), "b": rank // c % b, "c": rank % c}
            assert dict(mesh.coordinates(rank)) == expected

    def test_the_groups_of_any_axes_tile_the_mesh(self, mesh: Mesh) -> None:
        for count in range(len(AXES) + 1):
            for names in combinations(AXES, count):
                members = [rank for group in mesh.groups(*names) for rank in group]
                assert sorted(members) == list(range(mesh.size))

    def test_a_group_varies_its_own_axes_only(self, mesh: Mesh) -> None:
        for name in AXES:
            for group in mesh.groups(name):
                others = {tuple(mesh.coordinates(rank)[other] for other in AXES if other != name) for rank in group}
                assert len(others) == 1
                assert [mesh.coordinates(rank)[name] for rank in group] == list(range(mesh.sizes[name]))

    def test_the_group_of_a_rank_is_the_group_that_holds_it(self, mesh: Mesh) -> None:
        for name in AXES:
            groups = list(mesh.groups(name))
            for rank in range(mesh.size):
                assert [mesh.group_of(rank, name)] == [group for group in groups if rank in group]


def test_divisors_are_all_numbers_that_divide() -> None:
    for number in range(1, 200):
        assert divisors(number) == tuple(value for value in range(1, number + 1) if number % value == 0)


def test_divisors_of_a_large_number_come_at_once() -> None:
    assert divisors(4096**3)[-1] == 4096**3


def test_a_size_below_one_is_an_error() -> None:
    with pytest.raises(ValueError, match="axis b has size 0"):
        Mesh(axes=(("a", 2), ("b", 0)))


def test_an_axis_named_twice_is_an_error() -> None:
    with pytest.raises(ValueError, match="names each axis once"):
        Mesh(axes=(("a", 2), ("a", 2)))


def test_what_lies_outside_a_mesh_is_an_error() -> None:
    mesh = Mesh(axes=(("a", 2), ("b", 3)))
    with pytest.raises(ValueError, match="rank 6 is outside a mesh of 6 ranks"):
        mesh.coordinates(6)
    with pytest.raises(ValueError, match=r"b coordinate 3 is outside 0\.\.2"):
        mesh.rank({"a": 0, "b": 3})
    with pytest.raises(ValueError, match="no axis c"):
        list(mesh.groups("c"))
