"""Warnings of groups across hosts, and the plan of a hundred thousand ranks."""

import io
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from parallel.models.registry import describe_checkpoint
from parallel.settings import EngineSettings
from parallel.shape import AttentionSizes, ExpertSizes, ReplicaShape
from parallel.topology import HostSpec, PoolSpec, plan_topology
from router.check import check
from router.cli import app
from router.config_loading import parse_config
from router.config_source import read_source
from router.plan_report import plan_report
from router.plan_table import render
from router.plan_warnings import crossing_warnings
from tests.tiny_models import describe, mixtral, write_checkpoint


def write(folder: Path, *, hosts: list[int], **pools: object) -> Path:
    listed = [{"name": f"h{i}", "address": f"10.0.{i // 250}.{i % 250}:5", "devices": n} for i, n in enumerate(hosts)]
    model = write_checkpoint(folder / "model", mixtral(num_local_experts=16))
    path = folder / "topo.yaml"
    path.write_text(yaml.safe_dump({"model": str(model), "hosts": listed, "pools": pools}))
    return path


def warnings(path: Path) -> list[str]:
    source = read_source(path)
    config = parse_config(source)
    description = describe_checkpoint(path.parent / "model")
    topology = check(config, source=source, description=description)
    return list(crossing_warnings(plan_report(topology, description=description), config=config))


def test_a_plan_inside_a_host_warns_of_nothing(tmp_path: Path) -> None:
    assert warnings(write(tmp_path, hosts=[8], unified={"attention": {"dp": 8}})) == []


def test_a_warning_counts_groups_and_names_the_first_its_hosts_its_bytes_and_the_remedy(tmp_path: Path) -> None:
    (warning,) = warnings(write(tmp_path, hosts=[2, 3, 3], unified={"replicas": 2, "attention": {"dp": 4}}))
    assert "pools.unified: 2 of 2 block groups cross hosts (first: ranks 0 1 2 3 of unified/0 on h0 h1)" in warning
    # 4 layers, 3 other ranks, 2048 rows of 2 x 32 float32 and 2 choices of 8 bytes.
    assert "each rank sends 6.7 MB along it, a group 26.7 MB" in warning
    assert "a host with 4 free devices would hold a group: write a smaller experts.ep" in warning


def test_where_a_pool_names_its_hosts_the_warning_says_that_they_decide(tmp_path: Path) -> None:
    (warning,) = warnings(write(tmp_path, hosts=[1, 2], unified={"attention": {"dp": 2}, "hosts": ["h0", "h1"]}))
    assert "pools.unified.hosts fills its hosts in order" in warning
    assert warnings(write(tmp_path, hosts=[1, 2], unified={"attention": {"dp": 2}})) == []


def test_a_warning_goes_to_standard_error_and_does_not_fail_the_check(tmp_path: Path) -> None:
    path = write(tmp_path, hosts=[1, 1], unified={"attention": {"dp": 2}})
    result = CliRunner().invoke(app, ["check", "--config", str(path)])
    assert result.exit_code == 0
    assert result.stderr.startswith("warning: pools.unified: 1 of 1 block groups cross hosts")
    assert "moved in a full step" in result.stdout


@pytest.mark.timeout(120)
def test_a_hundred_thousand_ranks_are_planned_checked_and_summed_up(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        hosts=[8] * 12_500,
        prefill={"replicas": 4096, "attention": {"cp": 8}},
        decode={"replicas": 4096, "attention": {"dp": 16}, "experts": {"ep": 16}},
    )
    result = CliRunner().invoke(app, ["check", "--config", str(path)])
    assert result.exit_code == 0, result.stderr
    assert len(result.stdout.splitlines()) < 60
    assert "4096 of 4096 block groups cross hosts" in result.stderr
    assert str(4096 * 8) in result.stdout


@pytest.mark.timeout(120)
def test_one_replica_of_a_hundred_thousand_ranks_is_planned_and_summed_up() -> None:
    shape = ReplicaShape(
        pp=4, attention=AttentionSizes(dp=3125, cp=4, tp=2), experts=ExpertSizes(moe_dp=3125, ep=4, moe_tp=2)
    )
    hosts = [HostSpec(name=f"h{i}", address=f"h{i}:1", device="cpu", devices=tuple(range(8))) for i in range(12_500)]
    pool = PoolSpec(name="unified", replicas=1, shape=shape, engine=EngineSettings())
    report = plan_report(plan_topology(model="m", hosts=hosts, pools=[pool]), description=describe(mixtral()))
    assert len(report.ranks) == 100_000
    assert {(found.axis, found.num_crossing) for found in report.crossings} == {("pp", 25_000)}
    console = Console(file=io.StringIO())
    render(report, console)
    assert isinstance(console.file, io.StringIO)
    printed = console.file.getvalue()
    assert len(printed.splitlines()) < 60
    assert any(line.split()[:4] == ["unified", "pp", "3", "25000"] for line in printed.splitlines())
