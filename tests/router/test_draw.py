"""The picture of a topology, looked at as XML: every device, rank and group is there, and the scale fits the size."""

from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from typer.testing import CliRunner

from parallel.settings import EngineSettings
from parallel.shape import AttentionSizes, ExpertSizes, ReplicaShape
from parallel.topology import HostSpec, PoolSpec, Topology, plan_topology
from router.cli import app
from router.draw import draw
from tests.tiny_models import describe, mixtral, write_checkpoint

SVG = "{http://www.w3.org/2000/svg}"
PREFILL = ReplicaShape(pp=2, attention=AttentionSizes(cp=4, tp=2), experts=ExpertSizes(moe_dp=2, ep=4))
DECODE = ReplicaShape(attention=AttentionSizes(dp=8, tp=4), experts=ExpertSizes(moe_dp=4, ep=8))
ONE = ReplicaShape(attention=AttentionSizes(), experts=ExpertSizes())
TWO = ReplicaShape(attention=AttentionSizes(tp=2), experts=ExpertSizes(ep=2))


def plan(num_hosts: int, devices: int, **pools: tuple[int, ReplicaShape]) -> Topology:
    hosts = [
        HostSpec(name=f"host{index}", address=f"h{index}:1", device="cuda", devices=tuple(range(devices)))
        for index in range(num_hosts)
    ]
    specs = [
        PoolSpec(name=name, replicas=replicas, shape=shape, engine=EngineSettings())
        for name, (replicas, shape) in pools.items()
    ]
    return plan_topology(model="m", hosts=hosts, pools=specs)


def picture(topology: Topology) -> ElementTree.Element:
    return ElementTree.fromstring(draw(topology, description=describe(mixtral())))


def titles(root: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in root.iter(f"{SVG}title")]


def texts(root: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in root.iter(f"{SVG}text")]


def test_two_ranks_are_drawn_with_their_names_and_one_arrow() -> None:
    root = picture(plan(1, 3, prefill=(1, ONE), decode=(1, ONE)))
    assert texts(root).count("rank 0") == 2
    assert {"host0", "prefill/0", "decode/0", "free", "hand-off"} <= set(texts(root))
    assert len(list(root.iter(f"{SVG}path"))) == 2  # the arrow and the shape of its head


def test_five_hundred_ranks_are_each_drawn_once_and_one_arrow_stands_for_all() -> None:
    topology = plan(64, 8, prefill=(16, PREFILL), decode=(8, DECODE))
    found = [title for title in titles(picture(topology)) if ": rank " in title]
    assert sorted(found) == sorted(
        f"{place.host} cuda:{place.device}: rank {rank} of {replica.name}"
        for replica in topology.replicas
        for rank, place in enumerate(replica.placements)
    )
    assert len(found) == 512
    assert len(list(picture(topology).iter(f"{SVG}path"))) == 2


def test_ranks_of_a_group_have_one_colour_and_those_of_its_neighbour_another() -> None:
    topology = plan(4, 8, unified=(1, DECODE))
    colors: dict[str, set[str]] = {}
    for element in picture(topology).iter(f"{SVG}rect"):
        title = element.find(f"{SVG}title")
        if title is not None and title.text and title.text.startswith("attn_tp: "):
            colors.setdefault(title.text, set()).add(element.get("fill", ""))
    assert len(colors) == 8
    assert all(len(found) == 1 for found in colors.values())
    assert len(set.union(*colors.values())) == 8


def test_a_group_across_hosts_is_marked() -> None:
    apart = titles(picture(plan(2, 1, unified=(1, TWO))))
    together = titles(picture(plan(1, 2, unified=(1, TWO))))
    assert "attn_tp: ranks 0 1 of unified/0, across hosts" in apart
    assert "attn_tp: ranks 0 1 of unified/0" in together


def test_nothing_is_drawn_outside_the_picture() -> None:
    for topology in (plan(1, 2, unified=(1, TWO)), plan(64, 8, prefill=(16, PREFILL), decode=(8, DECODE))):
        root = picture(topology)
        width, height = (float(root.get(name, "")) for name in ("width", "height"))
        for element in list(root.iter(f"{SVG}rect"))[1:]:
            x, y, across, down = (float(element.get(name, "")) for name in ("x", "y", "width", "height"))
            assert 0 <= x <= x + across <= width
            assert 0 <= y <= y + down <= height


@pytest.mark.timeout(60)
def test_of_very_many_hosts_some_of_each_pool_are_drawn_and_the_others_counted() -> None:
    root = picture(plan(2000, 8, prefill=(500, PREFILL), decode=(200, DECODE)))
    assert "and 1872 more hosts" in texts(root)
    assert any("of prefill/0" in title for title in titles(root))
    assert any("of decode/0" in title for title in titles(root))


def test_the_command_writes_the_file_and_says_where(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", mixtral())
    config = tmp_path / "topo.yaml"
    content = {"model": str(model), "hosts": [{"address": "local", "devices": 1}], "pools": {"unified": {}}}
    config.write_text(yaml.safe_dump(content))
    result = CliRunner().invoke(app, ["draw", "--config", str(config)])
    assert (result.exit_code, result.stdout.strip()) == (0, str(tmp_path / "topo.svg"))
    ElementTree.parse(tmp_path / "topo.svg")
    refused = CliRunner().invoke(app, ["draw", "--config", str(config), "--output", str(tmp_path / "no" / "x.svg")])
    assert refused.exit_code == 1
    assert "cannot be written: No such file or directory; name another file with --output" in refused.stderr
