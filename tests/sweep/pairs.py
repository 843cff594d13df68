"""Which layouts the sweep runs: every exact factorisation there is, and a spread of pairs of them.

A pair is written as one line, by which a failure is run again:

    mixtral prefill=pp2.cp2.moe_dp2 decode=dp2.cp2.ep4 exchange=ring dispatch=gather pages=8.16
    llama unified=cp2.tp2 exchange=auto pages=8.8

Sizes that are 1 are left out.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from parallel.mesh import divisors
from parallel.shape import AttentionSizes, ExpertSizes, ReplicaShape

MAX_WORLD = 8
EXCHANGES = ("auto", "gather", "ring", "pass_q")
DISPATCHES = ("gather", "all_to_all")
PAGE_SIZES = (8, 4, 16)
#: Tokens of KV on a rank: for all prompts at once, or for hardly more than one, so that they wait and the cache evicts.
ROOMY, NARROW = 2048, 128


@dataclass(frozen=True, kw_only=True)
class Pair:
    """What runs: one shape where it is unified, two where KV is handed off. `pages` are both sides' page sizes,
    `kv` the tokens that a rank has room for, `kernels` who computes, `pipeline` how decode goes through stages.
    """

    family: str
    prefill: ReplicaShape
    decode: ReplicaShape | None
    exchange: str = "auto"
    dispatch: str = "auto"
    pages: tuple[int, int] = (8, 8)
    kv: int = ROOMY
    kernels: str = "auto"
    pipeline: str = "auto"

    def __str__(self) -> str:
        prefill = shape_text(self.prefill)
        pools = f"unified={prefill}" if self.decode is None else f"prefill={prefill} decode={shape_text(self.decode)}"
        chosen = f"exchange={self.exchange} dispatch={self.dispatch}"
        room = f" kv={self.kv}" if self.kv != ROOMY else ""
        kernels = f" kernels={self.kernels}" if self.kernels != "auto" else ""
        pipeline = f" pipeline={self.pipeline}" if self.pipeline != "auto" else ""
        return f"{self.family} {pools} {chosen} pages={self.pages[0]}.{self.pages[1]}{room}{kernels}{pipeline}"

    @property
    def shapes(self) -> tuple[ReplicaShape, ...]:
        """The shapes of its pools."""
        return (self.prefill,) if self.decode is None else (self.prefill, self.decode)


def parse_pair(text: str) -> Pair:
    """The inverse of `str`; ValueError that names what is wrong where the line is none."""
    family, *rest = text.split()
    if family not in FAMILIES:
        raise ValueError(f"{text!r}: {family!r} is no family; write one of {', '.join(FAMILIES)}")
    values = {key: value for key, _, value in (item.partition("=") for item in rest)}
    if not values.keys() <= _KEYS or ("unified" in values) == ("prefill" in values and "decode" in values):
        raise ValueError(f"{text!r}: write unified=..., or prefill=... decode=..., and of {_LEGAL} what is not auto")
    dense = family in DENSE
    first, second = (int(size) for size in values.get("pages", "8.8").split("."))
    decode = parse_shape(values["decode"], dense=dense) if "decode" in values else None
    return Pair(
        family=family,
        prefill=parse_shape(values.get("unified") or values["prefill"], dense=dense),
        decode=decode,
        exchange=values.get("exchange", "auto"),
        dispatch=values.get("dispatch", "auto"),
        pages=(first, second),
        kv=int(values.get("kv", ROOMY)),
        kernels=values.get("kernels", "auto"),
        pipeline=values.get("pipeline", "auto"),
    )


FAMILIES = ("llama", "mixtral", "qwen2", "qwen3", "qwen3_moe", "glm4_moe", "gpt_oss", "gpt_oss_wide")
#: In which order they are drawn; those that hold more that may go wrong come up more often.
_TURNS = (
    "gpt_oss",
    "glm4_moe",
    "llama",
    "gpt_oss_wide",
    "qwen2",
    "mixtral",
    "glm4_moe",
    "gpt_oss",
    "qwen3",
    "glm4_moe",
    "gpt_oss_wide",
    "qwen3_moe",
)
#: Families without experts, and the axes that they have.
DENSE = frozenset({"llama", "qwen2", "qwen3"})
DENSE_AXES = ("pp", "dp", "cp", "tp")
AXES = (*DENSE_AXES, "moe_dp", "ep", "moe_tp")
_LEGAL = "exchange, dispatch, pages, kv, kernels, pipeline"
_KEYS = frozenset({"unified", "prefill", "decode", *_LEGAL.split(", ")})


def shape_text(shape: ReplicaShape) -> str:
    """`pp2.cp2.moe_dp2`: the sizes above 1, `1` where there is none."""
    attention, experts = shape.attention, shape.experts
    sizes = {"pp": shape.pp, "dp": attention.dp, "cp": attention.cp, "tp": attention.tp}
    if experts is not None:
        sizes |= {"moe_dp": experts.moe_dp, "ep": experts.ep, "moe_tp": experts.moe_tp}
    return ".".join(f"{name}{size}" for name, size in sizes.items() if size > 1) or "1"


def parse_shape(text: str, *, dense: bool) -> ReplicaShape:
    """The inverse of `shape_text`; where no size of the expert mesh is named, ep is the stage."""
    sizes: dict[str, int] = {}
    for part in text.split("."):
        name = part.rstrip("0123456789")
        if part != "1" and (name not in (DENSE_AXES if dense else AXES) or name == part):
            raise ValueError(f"{text!r}: {part!r} is no size of an axis; write pp2.cp2.tp2 or 1")
        if name:
            sizes[name] = int(part[len(name) :])
    attention = AttentionSizes(**{name: sizes.pop(name) for name in ("dp", "cp", "tp") if name in sizes})
    pp = sizes.pop("pp", 1)
    if not sizes and not dense:
        sizes = {"ep": attention.dp * attention.cp * attention.tp}
    return ReplicaShape(pp=pp, attention=attention, experts=None if dense else _experts(**sizes))


def _experts(*, moe_dp: int = 1, ep: int = 1, moe_tp: int = 1) -> ExpertSizes:
    return ExpertSizes(moe_dp=moe_dp, ep=ep, moe_tp=moe_tp)


def shapes(*, world: int, dense: bool) -> Iterator[ReplicaShape]:
    """Every exact factorisation of `world` ranks that the tiny models take."""
    for pp in divisors(world):
        width = world // pp
        for dp in divisors(width):
            for cp in divisors(width // dp):
                attention = AttentionSizes(dp=dp, cp=cp, tp=width // dp // cp)
                if attention.tp not in LEGAL_TP:
                    continue
                if dense:
                    yield ReplicaShape(pp=pp, attention=attention, experts=None)
                    continue
                for moe_dp in divisors(width):
                    for ep in divisors(width // moe_dp):
                        if NUM_EXPERTS % ep == 0:
                            experts = ExpertSizes(moe_dp=moe_dp, ep=ep, moe_tp=width // moe_dp // ep)
                            yield ReplicaShape(pp=pp, attention=attention, experts=experts)


#: Of the tiny models: 8 query and 2 KV heads; 24 experts, so that every ep up to 8 but 5 and 7 divides them.
LEGAL_TP = frozenset({1, 2, 4, 8})
NUM_EXPERTS = 24

#: Layouts that went wrong somewhere once, or that other engines refuse: they run first.
CORNERS = (
    "mixtral prefill=pp2.cp2.moe_dp2 decode=dp2.cp2.ep4",
    "llama unified=1",
    "mixtral unified=1",
    "gpt_oss prefill=cp2 decode=dp2 pages=16.16",
    "gpt_oss_wide prefill=pp2.cp2.moe_dp2 decode=dp2.cp2.ep4 exchange=ring",
    "llama prefill=cp8 decode=tp8 exchange=ring pages=8.4",
    "llama prefill=tp8 decode=cp8 exchange=gather pages=4.16",
    "mixtral prefill=pp8 decode=pp8",
    "llama prefill=pp8 decode=1 pages=16.4",
    "qwen2 prefill=tp4 decode=cp2.tp2 pages=8.4",
    "qwen3 prefill=cp2.tp4 decode=pp2.tp4",
    "qwen3_moe prefill=cp4.moe_dp2.ep2 decode=tp2.dp2.moe_dp2.moe_tp2 dispatch=all_to_all",
    "glm4_moe prefill=tp8.moe_dp8 decode=dp2.tp4.ep2.moe_tp4 pages=8.4",
    "glm4_moe prefill=cp2.tp2.ep4 decode=pp2.cp2.moe_dp2 pages=4.16 dispatch=all_to_all",
    "glm4_moe unified=pp2.dp2.tp2.moe_dp2.ep2",
    "glm4_moe prefill=cp4.moe_dp2.ep2 decode=cp4.ep4 exchange=ring pages=8.16",
    "gpt_oss prefill=cp4.tp2 decode=dp2.tp4.moe_dp2.ep4 pages=16.8",
    "gpt_oss prefill=pp8 decode=cp3.moe_tp3 pages=8.4",
    "gpt_oss unified=pp2.cp2.tp2.moe_dp2.ep2 exchange=pass_q pages=4.4 dispatch=all_to_all",
    "gpt_oss_wide prefill=cp8.moe_dp2.ep4 decode=tp8.moe_tp8 pages=4.16",
    "gpt_oss_wide unified=dp2.cp4.ep4.moe_tp2",
    "gpt_oss unified=cp2.moe_dp2 kv=128",
    "gpt_oss_wide prefill=dp2.cp2.ep4 decode=cp2.ep2 exchange=ring pages=4.16 kv=128",
    "glm4_moe prefill=cp2.tp2.ep4 decode=dp2.ep2 pages=16.4 kv=128",
    "mixtral prefill=dp8.ep8 decode=dp8.moe_tp8",
    "mixtral prefill=cp8.moe_dp8 decode=cp8.ep8 exchange=pass_q",
    "mixtral prefill=cp3 decode=dp3.moe_tp3",
    "llama prefill=cp5 decode=cp7 exchange=ring",
    "mixtral prefill=dp2.cp2.tp2.moe_dp2.ep2.moe_tp2 decode=pp2.dp2.tp2.moe_dp2.moe_tp2",
    "mixtral unified=pp2.cp2.tp2.moe_tp4",
    "llama unified=pp2.dp2.cp2 exchange=ring",
    "mixtral unified=cp4.moe_dp2.ep2 exchange=pass_q dispatch=all_to_all",
    "mixtral prefill=dp4.cp2.ep4.moe_tp2 decode=dp8.ep8 dispatch=all_to_all",
    "llama unified=tp8",
    "mixtral prefill=cp4.tp2.ep8 decode=tp4.dp2.moe_dp2.ep4 pages=8.16",
)


def spread(*, count: int, seed: int = 1) -> list[Pair]:
    """`count` pairs: the corners first, then a draw that gives every set of split axes the same chance.

    Two pairs of five run with torch's kernels, the oracle of the native ones; where decode has stages, two of three
    with its batch in parts, and the third whole.
    """
    pairs = [_by_turns(parse_pair(line), place) for place, line in enumerate(CORNERS)][:count]
    source = random.Random(seed)
    by_axes = {dense: _by_axes(dense=dense) for dense in (True, False)}
    while len(pairs) < count:
        family = _TURNS[len(pairs) % len(_TURNS)]
        choices = by_axes[family in DENSE]
        prefill, decode = (source.choice(choices[source.choice(list(choices))]) for _ in range(2))
        pair = Pair(
            family=family,
            prefill=prefill,
            decode=decode if source.random() < 0.75 else None,
            exchange=source.choice(EXCHANGES),
            dispatch="auto" if family in DENSE else source.choice(DISPATCHES),
            pages=(source.choice(PAGE_SIZES), source.choice(PAGE_SIZES)),
            kv=NARROW if source.random() < 0.1 else ROOMY,
        )
        pair = _by_turns(pair, len(pairs))
        if pair not in pairs:
            pairs.append(pair)
    return pairs


def _by_turns(pair: Pair, place: int) -> Pair:
    pair = replace(pair, kernels="torch") if place % 5 > 2 else pair
    if (pair.decode or pair.prefill).pp == 1:
        return pair
    return replace(pair, pipeline="parts" if place % 3 else "whole")


def _by_axes(*, dense: bool) -> dict[str, list[ReplicaShape]]:
    """All shapes by the set of axes that they split."""
    found: dict[str, list[ReplicaShape]] = {}
    for world in range(1, MAX_WORLD + 1):
        for shape in shapes(world=world, dense=dense):
            axes = "".join(letter for letter in shape_text(shape) if not letter.isdigit())
            found.setdefault(axes, []).append(shape)
    return found
