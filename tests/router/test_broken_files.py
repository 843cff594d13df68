"""What an operator gets wrong in topo.yaml is answered with file, line, value and remedy, all of it at once."""

from pathlib import Path

import pytest

from parallel.shape import ExpertSizes
from router.check import check_file
from router.problem import ConfigError
from tests import tiny_models

GOOD = """model: {model}
listen: 127.0.0.1:30000
hosts:
  - name: here
    address: local
    devices: 4
pools:
  prefill: {{attention: {{cp: 2}}}}
  decode: {{attention: {{dp: 2}}}}
"""

#: What is replaced in the good file by what, the line that is told, and words of the sentence.
BROKEN: dict[str, tuple[str, str, int, list[str]]] = {
    "unknown key": ("dp: 2", "dpp: 2", 9, ["pools.decode.attention.dpp = 2", "unknown key", "did you mean dp?"]),
    "remainder": (
        "{cp: 2}}",
        "{cp: 2}, experts: {ep: 4}}",
        8,
        ["ep 4", "moe_dp 1 x ep 4 x moe_tp 1 = 4", "dp 1 x cp 2 x tp 1 = 2", "ep must be 2"],
    ),
    "too few devices": ("devices: 4", "devices: 3", 9, ["needs 2 devices", "have 1 left", "add devices"]),
    "missing model": ("{model}", "./nowhere", 1, ["model = ./nowhere", "name a model that is there"]),
    "experts do not divide": ("{dp: 2}", "{dp: 3}", 9, ["ep 3 does not divide 8 experts", "1, 2, 4, 8"]),
    "unknown host": ("dp: 2}}", "dp: 2}, hosts: [hera]}", 9, ["= hera", "no such host", "did you mean here?"]),
    "kv_tokens no multiple": (
        "pools:",
        "engine: {kv_tokens: 1000}\npools:",
        7,
        ["kv_tokens = 1000", "no multiple of page_size 16", "992"],
    ),
    "no decode": ("  decode: {attention: {dp: 2}}\n", "", 8, ["there is no decode pool", "name the one pool unified"]),
    "port out of range": ("30000", "99999", 2, ["127.0.0.1:99999", "out of range", "1 to 65535"]),
    "no number": ("dp: 2", "dp: two", 9, ["= two", "no whole number", "1 to 4096"]),
    "no such value": ("devices: 4", "devices: 4\n    device: gpu", 7, ["device = gpu", "cpu, cuda"]),
    "size below one": ("cp: 2", "cp: 0", 8, ["cp = 0", "too small"]),
    "duplicate key": ("    devices: 4\n", "    devices: 4\n    devices: 5\n", 7, ["devices"]),
    "address without a port": ("address: local", "address: far.example", 5, ["far.example", "no port"]),
    "too little for a warm-up": (
        "pools:",
        "engine: {kv_tokens: 2, page_size: 1}\npools:",
        7,
        ["kv_tokens = 2", "does not hold the 5 tokens", "write kv_tokens: 5 or more"],
    ),
    "an exchange of less than three pages": (
        "pools:",
        "engine: {exchange_tokens: 40}\npools:",
        7,
        ["exchange_tokens = 40", "less than three pages of 16", "write exchange_tokens: 48 or more"],
    ),
    "native kernels for another dtype": (
        "pools:",
        "engine: {kernels: native, dtype: bfloat16}\npools:",
        7,
        ["kernels = native", "kernels is native, but the dtype is bfloat16: they compute in float32", "write auto"],
    ),
    "native attention among torch's kernels": (
        "pools:",
        "engine: {kernels: torch, attention_kernel: native}\npools:",
        7,
        ["attention_kernel = native", "kernels is torch, which loads none of them", "write auto"],
    ),
    "no ep fits": (
        "{cp: 2}}",
        "{cp: 2}, experts: {moe_dp: 3}}",
        8,
        ["no ep fits moe_dp 3", "does not divide 2", "one of 1, 2 (nearest: 2)"],
    ),
    "unified beside others": (
        "  decode",
        "  unified: {attention: {dp: 1}}\n  decode",
        9,
        ["stands beside prefill and decode", "remove"],
    ),
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model with 8 experts; of its weights a check reads the header alone."""
    return tiny_models.write_checkpoint(tmp_path / "mixtral", tiny_models.mixtral())


def problems(text: str, folder: Path) -> list[str]:
    path = folder / "topo.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        check_file(path)
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_told_with_file_line_value_and_remedy(name: str, model: Path, tmp_path: Path) -> None:
    old, new, line, words = BROKEN[name]
    text = GOOD.replace("{{", "{").replace("}}", "}")
    assert old in text
    found = problems(text.replace(old, new, 1).replace("{model}", str(model)), tmp_path)
    here = [problem for problem in found if f"topo.yaml:{line}:" in problem]
    assert any(all(word in problem for word in words) for problem in here), found


def test_two_hosts_on_one_port_are_told_with_both_lines(model: Path, tmp_path: Path) -> None:
    twins = [f'  - {{name: {name}, address: "10.0.0.2:50000", devices: 1}}\n' for name in "bc"]
    text = GOOD.format(model=model).replace("pools:", "".join(twins) + "pools:")
    (found,) = problems(text, tmp_path)
    assert "topo.yaml:8: hosts[2].address = 10.0.0.2:50000" in found
    assert "host b on line 7" in found


def test_experts_for_a_dense_model_are_an_error_that_says_so(tmp_path: Path) -> None:
    dense = tiny_models.write_checkpoint(tmp_path / "llama", tiny_models.llama())
    text = GOOD.format(model=dense).replace("{dp: 2}}", "{dp: 2}, experts: {ep: 2}}")
    (found,) = problems(text, tmp_path)
    assert "topo.yaml:9: pools.decode.experts = {ep: 2}" in found
    assert "the model is dense (llama)" in found
    assert "remove pools.decode.experts" in found


def test_all_problems_are_told_at_once(model: Path, tmp_path: Path) -> None:
    text = GOOD.format(model=model).replace("cp: 2", "cp: two").replace("devices: 4", "devices: none")
    assert len(problems(text, tmp_path)) == 2


def test_what_is_left_out_has_its_default(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "topo.yaml"
    path.write_text(GOOD.format(model=model) + "engine: {page_size: 8}\n")
    topology = check_file(path).topology
    (prefill,), (decode,) = topology.pool("prefill"), topology.pool("decode")
    assert prefill.shape.experts == decode.shape.experts == ExpertSizes(ep=2)
    assert (prefill.engine.page_size, prefill.engine.dtype, prefill.engine.max_batch_tokens) == (8, "float32", 2048)
    assert [place.device for place in (*prefill.placements, *decode.placements)] == [0, 1, 2, 3]


def test_a_pool_overrides_single_keys_of_the_engine(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "topo.yaml"
    text = GOOD.format(model=model).replace("{dp: 2}}", "{dp: 2}, engine: {kv_tokens: 320}}")
    path.write_text(text + "engine: {kv_tokens: 640, max_sequences: 3}\n")
    topology = check_file(path).topology
    engines = [replica.engine for replica in topology.replicas]
    assert [(engine.kv_tokens, engine.max_sequences) for engine in engines] == [(640, 3), (320, 3)]


def test_the_plan_is_the_same_whatever_the_order_of_keys(model: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text(GOOD.format(model=model))
    head, tail = GOOD.format(model=model).split("pools:\n")
    one, two = tail.splitlines()
    second.write_text(f"pools:\n{two}\n{one}\n{head}")
    assert check_file(first).topology.digest == check_file(second).topology.digest
