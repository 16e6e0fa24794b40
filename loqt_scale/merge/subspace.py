"""Finding each layer's new P: probes collect its gradient in the backward passes, its owner factorises what they hold.

With several ranks a layer's sketch is summed into its owner's copy after the step. With one there is nothing to sum:
each layer is factorised inside the last backward pass, as soon as its sketch is complete, so sketches never pile up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from loqt_scale.config import SubspaceConfig
from loqt_scale.functional.projection import (
    captured_energy,
    randomized_basis,
    sketch_basis,
    sketch_width,
    sketched_energy,
    svd_basis,
    test_matrix,
)
from loqt_scale.functional.quantization import MatrixLayout, pack
from loqt_scale.functional.seeding import stable_seed
from loqt_scale.layers import GradientProbe, LoQTLinear
from loqt_scale.strategies import Strategy


@dataclass(frozen=True)
class FoundBasis:
    """A new P, packed as its layer will hold it, and the share of the gradient's energy that it keeps."""

    codes: Tensor
    scales: Tensor | None
    energy: Tensor

    def to_bytes(self) -> Tensor:
        """All of it as one row of bytes, to be sent."""
        tensors = (self.energy.float().reshape(1), self.codes, self.scales)
        return torch.cat([tensor.flatten().view(torch.uint8) for tensor in tensors if tensor is not None])

    @staticmethod
    def count_bytes(layout: MatrixLayout) -> int:
        """Length of that row."""
        return 4 + layout.groups * (layout.codes_shape[1] + (layout.scales_shape or (0, 0))[1])

    @classmethod
    def from_bytes(cls, row: Tensor, layout: MatrixLayout) -> FoundBasis:
        """What was sent. Copies: inside the row, scales need not lie where float32 may."""
        end = 4 + layout.codes_shape[0] * layout.codes_shape[1]
        scales = None if layout.scales_shape is None else row[end:].view(layout.scales_shape).clone()
        return cls(row[4:end].view(layout.codes_shape).clone(), scales, row[:4].view(torch.float32).squeeze(0))


def attach_probes(layers: Mapping[str, LoQTLinear], config: SubspaceConfig, *, seed: int, device: torch.device) -> None:
    """Gives every layer a probe for its gradient: a sketch of it, or under the exact methods the dense one. Local.

    Layers of one width share a test matrix: a sketch needs its Omega to be independent of its own gradient only.

    Args:
        layers: By name.
        config: How P is found.
        seed: Of the test matrices.
        device: Where the model computes.
    """
    omegas: dict[tuple[int, int], Tensor] = {}
    for layer in layers.values():
        spec, omega = layer.spec, None
        shape = (spec.base.rows, spec.base.cols)
        if config.method == "sketch":
            width = sketch_width(layer.rank, *shape, config.oversampling)
            features = spec.base.rows + spec.base.cols - spec.projection.rows
            if (features, width) not in omegas:
                own = stable_seed(seed, features, width)
                omegas[features, width] = test_matrix(features, width, seed=own, device=device)
            omega = omegas[features, width]
            shape = (spec.projection.rows, width)
        layer.probe = GradientProbe.collecting(shape, omega, device)


class SubspaceSearch:
    """See the module's docstring.

    Args:
        layers: All LoQT layers by name.
        config: How P is found.
        strategy: How the model is spread.
        seed: Of the sketches.
    """

    def __init__(self, layers: Mapping[str, LoQTLinear], config: SubspaceConfig, strategy: Strategy, seed: int) -> None:
        self._layers, self._config, self._strategy, self._seed = layers, config, strategy, seed
        self._found: dict[str, FoundBasis] = {}  # in the backward pass of this step
        self._on_the_way: dict[str, tuple[Tensor, Callable[[], object]]] = {}

    def attach(self, step: int, backward_passes: int | None) -> None:
        """Gives every layer a probe. Local.

        Args:
            step: The step.
            backward_passes: How many will follow. If given, and with one rank, a layer is factorised in the last.
        """
        seed = stable_seed("sketch", self._seed, step)
        attach_probes(self._layers, self._config, seed=seed, device=self._strategy.device)
        if backward_passes is not None and self._strategy.world_size == 1:
            for name, layer in self._layers.items():
                assert layer.probe is not None
                self._when_collected(name, layer.probe.leaf, backward_passes, step)

    def drop(self) -> None:
        """Forgets what this step has collected. Local."""
        self._found.clear()
        for layer in self._layers.values():
            layer.probe = None

    def _when_collected(self, name: str, leaf: Tensor, passes: int, step: int) -> None:
        """Has the last of so many backward passes turn what the leaf has collected into P, and free it. Local."""
        left = passes

        @torch.no_grad()
        def collected(leaf: Tensor) -> None:
            nonlocal left
            left -= 1
            assert leaf.grad is not None
            # what is not finite stays where it is: the step will be skipped, and this dropped
            if left == 0 and bool(leaf.grad.isfinite().all()):
                self._found[name] = self._factorise(name, leaf.grad, step)
                leaf.grad = None

        leaf.register_post_accumulate_grad_hook(collected)

    def find(self, wave: list[str], step: int, following: list[str]) -> FoundBasis | None:
        """The new P of the layer of this wave that this rank owns, if there is one. Every rank.

        Args:
            wave: Layers, each at the index of its owner.
            step: The step.
            following: The wave after it: what its layers have collected travels while this one is factorised.
        """
        if wave[0] in self._found:  # one rank, and the backward pass has found it
            self._layers[wave[0]].probe = None
            return self._found.pop(wave[0])
        collected = []
        for owner, name in enumerate(wave):
            begun = self._on_the_way.pop(name) if name in self._on_the_way else self._collect(name, owner)
            gradient, wait = begun
            wait()
            collected.append(gradient)
        if following and following[0] not in self._found:
            self._on_the_way = {name: self._collect(name, owner) for owner, name in enumerate(following)}
        rank = self._strategy.rank
        return self._factorise(wave[rank], collected[rank], step) if rank < len(wave) else None

    def _collect(self, name: str, owner: int) -> tuple[Tensor, Callable[[], object]]:
        """Detaches a layer's probe and begins to sum what it collected into its owner's copy. Every rank."""
        layer = self._layers[name]
        probe, layer.probe = layer.probe, None
        if probe is None or probe.leaf.grad is None:
            raise RuntimeError(
                f"{name} saw no backward pass since MergeCoordinator.prepare; call prepare(step) before the forward "
                "passes of every step, and finish(step) after its optimizer step"
            )
        gradient = probe.leaf.grad
        return gradient, self._strategy.reduce_to(gradient, owner)

    def _factorise(self, name: str, collected: Tensor, step: int) -> FoundBasis:
        """P of a layer this rank owns. Local."""
        layer = self._layers[name]
        basis, energy = self._basis(name, collected, step)
        codes, scales = pack(basis, layer.spec.projection)
        return FoundBasis(codes, scales, energy)

    def _basis(self, name: str, collected: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """(P (F, r) float32, share of gradient energy it keeps). Local."""
        layer, subspace = self._layers[name], self._config
        if subspace.method == "sketch":
            basis = sketch_basis(collected, layer.rank)
            return basis, sketched_energy(collected, basis)
        if subspace.method == "svd":
            basis = svd_basis(collected, layer.rank, layer.side)
        else:
            basis = randomized_basis(
                collected,
                layer.rank,
                layer.side,
                oversampling=subspace.oversampling,
                power_iterations=subspace.power_iterations,
                seed=stable_seed("randomized", self._seed, step, name),
            )
        return basis, captured_energy(collected, basis, layer.side)
