"""Finding each layer's new P: probes collect its gradient in the backward passes, its owner factorises what they hold.

If the number of backward passes is known, gradients leave for their owners inside the passes, and are factorised inside
the last one, wave by wave (`collection`): sketches never pile up. If not, everything happens in `finish`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from loqt_scale.config import SubspaceConfig
from loqt_scale.functional.defaults import plain_defaults
from loqt_scale.functional.low_rank_linear import LowRankSpec
from loqt_scale.functional.seeding import stable_seed
from loqt_scale.layers import LoQTLayer
from loqt_scale.merge.basis import BLANK, FoundBasis, find_bases
from loqt_scale.merge.collection import GradientCollection
from loqt_scale.merge.order import CALL_PREPARE
from loqt_scale.merge.probes import attach_probes, probe_shape
from loqt_scale.strategies import Comm

# Values of sketches that are factorised in one batch. On the CPU batches pay for small matrices only (a half of the
# time at 48 x 16, nine tenths at 256 x 64, nothing at 512 x 256); a GPU is left idle by matrices of any usual size.
BATCH_VALUES = 2**16
DEVICE_BATCH_VALUES = 2**22
Name = TypeVar("Name")
AIR_BYTES = 2**24  # of sketches on their way: enough to hide the way of the small ones


def wave_size(specs: Iterable[LowRankSpec], config: SubspaceConfig, *, world_size: int, device_type: str) -> int:
    """Layers of a wave: one a rank, or as many a rank as it factorises in one batch."""
    largest = max((math.prod(probe_shape(spec, config)) for spec in specs), default=1)
    batch = BATCH_VALUES if device_type == "cpu" else DEVICE_BATCH_VALUES
    return world_size * (max(1, batch // largest) if config.method == "sketch" else 1)


class SubspaceSearch:
    """See the module's docstring.

    Args:
        layers: All LoQT layers by name.
        config: How P is found.
        comm: The ranks. Every rank: a group of them may be made.
        seed: Of the sketches.
    """

    def __init__(self, layers: Mapping[str, LoQTLayer], config: SubspaceConfig, comm: Comm, seed: int) -> None:
        self._layers, self._config, self._seed = layers, config, seed
        self._device, self._reducer = comm.device, comm.open_reducer()
        specs = [layer.spec for layer in layers.values()]
        world_size = comm.world_size
        device_type = comm.device.type
        largest = max(4 * math.prod(probe_shape(spec, config)) for spec in specs)
        self._budget = max(AIR_BYTES, largest) if world_size > 1 else 0
        self._wave = wave_size(specs, config, world_size=world_size, device_type=device_type)
        self._owners = deal(layers, world_size)
        self._step = 0
        self._live: dict[str, LoQTLayer] = {}
        self._collection: GradientCollection | None = None
        self._found: dict[str, FoundBasis] = {}

    @property
    def owners(self) -> Mapping[str, int]:
        """Rank that finds each layer's P, in the order in which layers should be merged."""
        return self._owners

    @property
    def live(self) -> Mapping[str, LoQTLayer]:
        """The layers that take part in this step's merge: those whose B trained when probes were attached."""
        return self._live

    @property
    def sent_bytes(self) -> int:
        """Payload of all that has been reduced to owners, since the beginning."""
        return self._reducer.payload_bytes

    def attach(self, step: int, backward_passes: int | None) -> None:
        """Gives every layer whose B trains a probe. Local, but with `backward_passes` these will talk: every rank.

        Args:
            step: The step.
            backward_passes: How many will follow. If given, layers are factorised in the last.
        """
        seed = stable_seed("sketch", self._seed, step)
        self._live = {name: layer for name, layer in self._layers.items() if layer.factor.requires_grad}
        attach_probes(self._live, self._config, seed=seed, device=self._device)
        self._step = step
        self._found.clear()
        self._collection = GradientCollection(
            self._live,
            {name: owner for name, owner in self._owners.items() if name in self._live},
            wave=self._wave,
            reducer=self._reducer,
            passes=backward_passes,
            budget=self._budget,
            factorise=self._factorise,
        )

    def finish(self) -> bool:
        """Afterwards every owner has found its layers' P. Every rank.

        Returns:
            Whether any layer has seen a backward pass on this rank.

        Raises:
            RuntimeError: `attach` was not called, or there were more passes than it was told.
        """
        collection, self._collection = self._collection, None
        if collection is None:
            raise RuntimeError(f"no gradients were collected for this merge; {CALL_PREPARE}")
        return collection.finish()

    @property
    def quality(self) -> Tensor:
        """Of the layers that this rank has found P of: how many gradients were not finite, how many not zero. (2,)."""
        energies = [found.energy.flatten() for found in self._found.values()]
        stacked = torch.cat([torch.zeros(0, dtype=torch.float32, device=self._device), *energies])
        finite = stacked.isfinite()
        return torch.stack([(~finite).sum(), (finite & (stacked != BLANK)).sum()]).float()

    @property
    def outlives(self) -> bool:
        """Whether gradients of passes were collected whose others have been thrown away, on this rank. Local."""
        return any(layer.probe is not None and layer.probe.outlives for layer in self._live.values())

    def drop(self) -> None:
        """Forgets what this step has collected. Every rank."""
        if self._collection is not None:
            self._collection.drop()
        self._collection = None
        self._found.clear()

    def found(self, name: str) -> FoundBasis | None:
        """A layer's new P on its owner, None elsewhere. Local."""
        return self._found.get(name)

    def forget(self, name: str) -> None:
        """Lets go of a layer's new P. Local."""
        self._found.pop(name, None)

    @torch.no_grad()
    @plain_defaults()
    def _factorise(self, collected: dict[str, Tensor]) -> None:
        seed = stable_seed(self._seed, self._step)
        self._found |= find_bases(self._layers, collected, self._config, seed=seed)


def deal(names: Iterable[Name], world_size: int) -> dict[Name, int]:
    """Owner of each layer, last layer first, as backward passes complete them.

    Every `world_size` layers each rank gets one, and each time another one: layers repeat from block to block, and
    whoever got the small ones once should not get them always.
    """
    return {name: (index + index // world_size) % world_size for index, name in enumerate(reversed(list(names)))}
