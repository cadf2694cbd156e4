"""`--opt`: a level, or a level's switches changed one by one ("O2" or "fuse_norm=0;fuse_gated=0").

O0 switches every fusing pass off: TVM's generic lowering of each operation, the slow reference
route. O1 fuses what would otherwise materialise weights (linear, embedding) or unpack them for each
use (experts); O2, the default, all that a target has kernels for. O3 also captures the launches of
decoding into CUDA graphs, on a device that has them.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlc_compile.errors import InputError

FUSIONS = (
    "fuse_linear",
    "fuse_residual",
    "fuse_linear_norm",
    "fuse_linear_gated",
    "fuse_experts",
    "fuse_embedding",
    "fuse_qk_norm",
    "fuse_norm",
    "fuse_gated",
)
CUDA_GRAPH = "cuda_graph"
SWITCHES = (*FUSIONS, CUDA_GRAPH)
LEVELS: dict[str, frozenset[str]] = {
    "O0": frozenset(),
    "O1": frozenset({"fuse_linear", "fuse_experts", "fuse_embedding"}),
    "O2": frozenset(FUSIONS),
    "O3": frozenset(SWITCHES),
}
DEFAULT_LEVEL = "O2"
_BOOLEANS = {"0": False, "1": True, "false": False, "true": True, "off": False, "on": True}


@dataclass(frozen=True)
class OptFlags:
    """The optimisations that are on."""

    on: frozenset[str]

    def enabled(self, switch: str) -> bool:
        return switch in self.on

    def __str__(self) -> str:
        """The level when the flags are one, else every switch with its value."""
        for level, switches in LEVELS.items():
            if switches == self.on:
                return level
        return ";".join(f"{s}={int(s in self.on)}" for s in SWITCHES)


def parse_opt(text: str) -> OptFlags:
    """Flags of an `--opt` value: levels and switches separated by `;`, later ones winning.

    Switches given without a level change the default level.

    Raises:
        InputError: an unknown level or switch, or a value that is neither on nor off.
    """
    on = set(LEVELS[DEFAULT_LEVEL])
    for item in filter(None, (part.strip() for part in text.split(";"))):
        name, equals, value = item.partition("=")
        if not equals and name in LEVELS:
            on = set(LEVELS[name])
        elif equals and name in SWITCHES and value.lower() in _BOOLEANS:
            (on.add if _BOOLEANS[value.lower()] else on.discard)(name)
        else:
            raise InputError(
                f"--opt: {item!r} is neither a level ({', '.join(LEVELS)}) nor SWITCH=0|1",
                hint=f"switches: {', '.join(SWITCHES)}",
            )
    return OptFlags(frozenset(on))
