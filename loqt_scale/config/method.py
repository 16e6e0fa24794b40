"""The settings of the method itself (`loqt.*`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from loqt_scale.config.check import check_values, require
from loqt_scale.config.choices import (
    GapSchedule,
    InitialFactors,
    LowRankCompute,
    QuantScheme,
    SideChoice,
    StatePolicy,
    SubspaceMethod,
)


@dataclass(frozen=True, kw_only=True)
class SubspaceConfig:
    """How a projection P is taken from a layer's gradient at a merge.

    Args:
        method: sketch = one pass, no dense gradient ever exists (the default); randomized = randomized SVD of the dense
            gradient; svd = exact SVD of the dense gradient (the oracle).
        oversampling: Columns of a sketch beyond r, as a fraction of r. With 0 its range is P. With 1.0 (l = 2 r) P is
            the leading half of it and keeps up to three points more of a gradient's energy, for twice the work, memory
            and bytes of sketches, and eigenvectors; rounding, so the number of ranks too, has more of a say in P then;
            `randomized` takes 16 columns more than r in any case.
        power_iterations: Passes of the subspace iteration of `randomized`; more is closer to `svd`.
    """

    method: SubspaceMethod = "sketch"
    oversampling: float = 0.0
    power_iterations: int = 2

    def __post_init__(self) -> None:
        check_values(self, "loqt.subspace")
        require(self.oversampling >= 0.0, f"loqt.subspace.oversampling is {self.oversampling}; write 0.0 or more")
        require(
            self.power_iterations >= 0, f"loqt.subspace.power_iterations is {self.power_iterations}; write 0 or more"
        )


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """When the factors are folded into the quantized base, and what happens to them then.

    Args:
        gap: T of the paper: the constant part of the number of steps between two merges.
        schedule: exponential = gap + floor(growth^i) (the paper); linear = gap + floor(growth · i); constant = gap.
        growth: ψ of the paper: how the gap grows with the number i of merges done.
        last_step_fraction: No merge after this fraction of the run, so that the last factors have time to settle.
        compensation_rounds: c of the paper: the most alternating rounds that fit B to the quantization error, which end
            earlier once they gain little; with 0, B stays at zero.
        optimizer_state: What happens to the optimizer's moments of B: transport = rotated into the new basis; reset =
            zeroed; keep = left as they are, in the old basis (what the published code does).
    """

    gap: int = 100
    schedule: GapSchedule = "exponential"
    growth: float = 1.2
    last_step_fraction: float = 1.0
    compensation_rounds: int = 5
    optimizer_state: StatePolicy = "transport"

    def __post_init__(self) -> None:
        check_values(self, "loqt.merge")
        require(self.gap >= 1, f"loqt.merge.gap is {self.gap}; write 1 or more steps")
        require(self.growth >= 0.0, f"loqt.merge.growth is {self.growth}; write 0 or more (the paper: 1.2)")
        require(
            self.compensation_rounds >= 0,
            f"loqt.merge.compensation_rounds is {self.compensation_rounds}; write 0 or more (the paper: 5)",
        )
        require(
            0.0 < self.last_step_fraction <= 1.0,
            f"loqt.merge.last_step_fraction is {self.last_step_fraction}; write a number in (0, 1]",
        )

    def last_step(self, total_steps: int) -> int:
        """The last step of a run of so many on which a merge may fall."""
        return int(self.last_step_fraction * (total_steps - 1))


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """How the frozen matrices are stored.

    Args:
        weight: Scheme of the base weight W: nf4; nf4_double = its scales are quantized too (0.36 bits a weight less);
            fp4; int8; none = kept in float32 (the paper's LoQT-nq).
        projection: Scheme of the projection P, one of the same.
        block_size: Values that share one scale.
    """

    weight: QuantScheme = "nf4"
    projection: QuantScheme = "nf4"
    block_size: int = 64

    def __post_init__(self) -> None:
        check_values(self, "loqt.quantization")
        sizes = (32, 64, 128, 256, 512, 1024, 2048, 4096)
        require(
            self.block_size in sizes,
            f"loqt.quantization.block_size is {self.block_size}; write one of {', '.join(map(str, sizes))}",
        )


@dataclass(frozen=True, kw_only=True)
class LoQTConfig:
    """The method (LoQT, NeurIPS 2024): which linears are low-rank, and how.

    Args:
        rank: r: columns of P and B. At most the smaller side of every converted layer.
        rank_pattern: Other ranks by name pattern (fnmatch), e.g. {"*.q_proj": 64}; the first that matches counts.
        scale: s in W_eff = W_q + s · (low-rank product).
        init: P and B before the first step, for going on from pretrained weights: zero = none, the run begins with the
            bare quantized weights; loftq = they make up for what quantization rounds away (LoftQ, with
            merge.compensation_rounds).
        side: Side of the gradient whose singular vectors form P: auto = the shorter one.
        target_modules: Name patterns (fnmatch) of the `nn.Linear` modules to convert.
        exclude_modules: Name patterns of linears left in full precision even if a target pattern matches.
        compute: How the forward pass applies the low-rank term: fold = into the dequantized weight; branch = beside
            it; auto = whichever costs fewer FLOPs.
        subspace: How P is found.
        merge: When to merge and how.
        quantization: How W and P are stored.
    """

    rank: int = 128
    rank_pattern: dict[str, int] = field(default_factory=dict)
    scale: float = 0.5
    init: InitialFactors = "zero"
    side: SideChoice = "auto"
    target_modules: list[str] = field(default_factory=lambda: ["*"])
    exclude_modules: list[str] = field(default_factory=lambda: ["*lm_head*", "*embed_out*", "*score*"])
    compute: LowRankCompute = "auto"
    subspace: SubspaceConfig = field(default_factory=SubspaceConfig)
    merge: MergeConfig = field(default_factory=MergeConfig)
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)

    def __post_init__(self) -> None:
        check_values(self, "loqt")
        require(self.rank >= 1, f"loqt.rank is {self.rank}; write 1 or more")
        for pattern, rank in self.rank_pattern.items():
            require(rank >= 1, f"loqt.rank_pattern has {pattern}: {rank}; write 1 or more")
        require(self.scale > 0.0, f"loqt.scale is {self.scale}; write a positive number (the paper: 0.25 to 0.5)")
        require(
            self.init == "zero" or self.merge.compensation_rounds >= 1,
            "loqt.init is 'loftq', but loqt.merge.compensation_rounds is 0; write 1 or more (the paper: 5), or "
            "loqt.init: zero",
        )
        require(len(self.target_modules) > 0, "loqt.target_modules is empty; write ['*'] or use method: full")

    def rank_of(self, name: str) -> int:
        """Rank of the layer of this dotted name."""
        return next((rank for pattern, rank in self.rank_pattern.items() if fnmatchcase(name, pattern)), self.rank)

    @property
    def ranks(self) -> list[int]:
        """All ranks that a layer may have."""
        return [self.rank, *self.rank_pattern.values()]
