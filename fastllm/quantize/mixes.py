"""Which format each matrix of a model gets: llama.cpp's mixes by name, or one format for all.

A mix has a base format and raises what costs little and matters much: values and down projections
of the first and last layers and of every third one between (`q4_k_m`), the output matrix, the
attention of models with eight experts. The choices are those of llama.cpp's quantizer, so that a
file made here has the formats that a file of that name has everywhere.

A plain format outside GGUF (int4, nf4, fp8, ...) is given to every linear layer; embeddings, the LM
head and routers stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from fastllm.errors import did_you_mean
from fastllm.ops.quant_format import QUANT_FORMATS, fit, format_of

Layers = Callable[[int, int], bool]  # (layer, layers) -> whether it is one of them


def _outer_and_third(layer: int, layers: int) -> bool:
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _first_eighth(layer: int, layers: int) -> bool:
    return layer < layers // 8


def _first_four(layer: int, layers: int) -> bool:
    return layer < 4


@dataclass(frozen=True, slots=True)
class Mix:
    """Formats of one kind of GGUF file.

    file_type: llama.cpp's number of it. raised: which layers' matrices of a kind get another format
    than `base`. raised_by_importance: the same, where inputs have been measured.
    """

    file_type: int
    base: str
    raised: Mapping[str, tuple[Layers, str]] = field(default_factory=dict)
    raised_by_importance: Mapping[str, tuple[Layers, str]] = field(default_factory=dict)


MIXES: dict[str, Mix] = {
    "q4_0": Mix(2, "q4_0", raised_by_importance={"down_proj": (_first_eighth, "q4_1")}),
    "q4_1": Mix(3, "q4_1"),
    "q5_0": Mix(8, "q5_0", raised_by_importance={"down_proj": (_first_eighth, "q5_1")}),
    "q5_1": Mix(9, "q5_1"),
    "q8_0": Mix(7, "q8_0"),
    "q4_k_s": Mix(
        14, "q4_k", {"v_proj": (_first_four, "q5_k"), "down_proj": (_first_eighth, "q5_k")}
    ),
    "q4_k_m": Mix(
        15, "q4_k", {"v_proj": (_outer_and_third, "q6_k"), "down_proj": (_outer_and_third, "q6_k")}
    ),
    "q5_k_s": Mix(16, "q5_k"),
    "q5_k_m": Mix(
        17, "q5_k", {"v_proj": (_outer_and_third, "q6_k"), "down_proj": (_outer_and_third, "q6_k")}
    ),
    "q6_k": Mix(18, "q6_k"),
}
ALIASES = {"q4_k": "q4_k_m", "q5_k": "q5_k_m"}  # llama.cpp's own

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)", re.DOTALL)
# Read as numbers, not as a product's matrix: routers are tiny and decide everything, and latent
# attention reads `kv_b_proj` in parts.
_DENSE_PARTS = ("mlp.gate.weight", "self_attn.kv_b_proj.weight")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """What the rules ask of a model. many_queries: it has fewer key than query heads."""

    layers: int
    experts: int = 0
    many_queries: bool = False
    tied: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """The choice for one model.

    formats: of every matrix that is quantized, by its Hugging Face name. fallen: those whose rows
    do not fit the format that the rule gave: name -> (that format, the one it has). dense: matrices
    that stay as they are.
    """

    name: str
    formats: dict[str, str]
    fallen: dict[str, tuple[str, str]]
    dense: tuple[str, ...]

    @property
    def is_gguf(self) -> bool:
        """Whether the formats are those of a GGUF file."""
        return self.name in MIXES

    def lines(self) -> list[str]:
        """The rule as text: how many matrices of each kind have which format."""
        lines = [f"{kind}: {_counted(formats)}" for kind, formats in _by_kind(self.formats).items()]
        if self.dense:
            lines.append(f"left as they are: {', '.join(_by_kind(dict.fromkeys(self.dense, '')))}")
        return lines + self.fallen_lines()

    def fallen_lines(self) -> list[str]:
        """Which matrices have another format than the rule's, and why."""
        lines = []
        fallen: dict[tuple[str, str], list[str]] = {}
        for name, change in self.fallen.items():
            fallen.setdefault(change, []).append(name)
        for (wanted, given), names in fallen.items():
            lines.append(
                f"{wanted} does not fit the rows of {', '.join(_by_kind(dict.fromkeys(names, '')))}"
                f" ({len(names)} matrices): {given}"
            )
        return lines


def known_formats() -> list[str]:
    """Every name that `plan` takes, mixes first."""
    others = [name for name in QUANT_FORMATS if name not in MIXES and not is_k_quant(name)]
    return [*MIXES, *(name for name in others if name not in ("bf16", "f32"))]


def is_k_quant(name: str) -> bool:
    """Whether it is a single K-quant format, which files have as part of a mix."""
    return name in ("q4_k", "q5_k", "q6_k")


def resolve_format(name: str) -> str:
    """The mix or format that `name` means. Raises ValueError naming the nearest ones."""
    lower = name.lower()
    lower = ALIASES.get(lower, lower)
    if lower in MIXES:
        return lower
    known = known_formats()
    if lower in (*known, "int4", "int4_asym"):
        return format_of(lower).name
    hint = did_you_mean(lower, known, 3, 0.5) or f"known: {', '.join(known)}"
    raise ValueError(f"format {name!r:.80} is not known; {hint}")


def plan(
    name: str, shapes: Mapping[str, tuple[int, ...]], sizes: Sizes, *, importance: bool = False
) -> Plan:
    """Choose the format of every matrix.

    Args:
        name: one of `known_formats()`.
        shapes: of all weights, by Hugging Face name, experts stacked as [E, rows, columns].
        sizes: of the model.
        importance: inputs have been measured (`--method imatrix`), which changes two mixes.

    Raises:
        ValueError: for an unknown name.
    """
    name = resolve_format(name)
    rule = _mix_rule(MIXES[name], sizes, importance) if name in MIXES else _uniform_rule(name)
    formats, fallen, dense = {}, {}, []
    for weight, shape in shapes.items():
        if len(shape) < 2:
            continue
        wanted = rule(weight, shape[-1])
        given = None if wanted is None else fit(wanted, shape[-1])
        if wanted is None or given is None or given == "bf16":
            dense.append(weight)
        else:
            formats[weight] = given
        if wanted is not None and given != wanted:
            fallen[weight] = (wanted, str(given))
    return Plan(name, formats, fallen, tuple(dense))


def _uniform_rule(format: str) -> Callable[[str, int], str | None]:
    def rule(weight: str, columns: int) -> str | None:
        match = _LAYER.fullmatch(weight)
        return None if match is None or match[2] in _DENSE_PARTS else format

    return rule


def _mix_rule(mix: Mix, sizes: Sizes, importance: bool) -> Callable[[str, int], str | None]:
    block = 256 if is_k_quant(mix.base) else 32
    raised = {**mix.raised, **(mix.raised_by_importance if importance else {})}

    def rule(weight: str, columns: int) -> str | None:
        match = _LAYER.fullmatch(weight)
        if match is None:
            if weight == "lm_head.weight" or sizes.tied:
                return "q8_0" if columns % block or mix.base == "q8_0" else "q6_k"
            return mix.base
        if match[2] in _DENSE_PARTS:
            return None
        kind = match[2].removesuffix(".weight").rpartition(".")[2]
        layers, format = raised.get(kind, (None, mix.base))
        chosen = format if layers is not None and layers(int(match[1]), sizes.layers) else mix.base
        return _by_architecture(kind, chosen, mix, sizes)

    return rule


def _by_architecture(kind: str, chosen: str, mix: Mix, sizes: Sizes) -> str:
    """Two families in which the small matrices of attention are a negligible part."""
    if kind == "v_proj" and sizes.layers == 80 and sizes.many_queries and chosen == "q4_k":
        chosen = "q5_k"
    if sizes.experts == 8 and kind in ("k_proj", "v_proj"):
        return "q8_0"
    if sizes.experts == 8 and kind == "o_proj" and mix.base == "q4_k":
        return "q5_k"
    return chosen


def _by_kind(formats: Mapping[str, str]) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = {}
    for weight, format in formats.items():
        match = _LAYER.fullmatch(weight)
        kind = (match[2] if match else weight).removesuffix(".weight")
        kinds.setdefault(kind, []).append(format)
    return kinds


def _counted(formats: list[str]) -> str:
    distinct = dict.fromkeys(formats)
    if len(distinct) == 1:
        return formats[0]
    return ", ".join(f"{name} in {formats.count(name)} of {len(formats)}" for name in distinct)
