"""The merge of a whole model: what a step's passes collect is judged, then its layers are merged one by one.

`MergeCoordinator` says when. A merge that an error has ended (`begun`) goes on with the layers that are not merged yet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.optim import Optimizer

from loqt_scale.config import LoQTConfig
from loqt_scale.layers import LoQTLayer, copies
from loqt_scale.merge.begun import BegunMerge
from loqt_scale.merge.factor_updates import optimizer_of
from loqt_scale.merge.initial_checks import still_due
from loqt_scale.merge.one_layer import LayerMerge, own_names
from loqt_scale.merge.order import NOTHING_SEEN, OUTLIVED, reason_to_wait
from loqt_scale.merge.placed import InitialWeights
from loqt_scale.merge.report import StartReport, warn
from loqt_scale.merge.start import start_compensated
from loqt_scale.merge.subspace import SubspaceSearch
from loqt_scale.strategies import Editing


class ModelMerge:
    """See the module's docstring.

    Args:
        layers: All LoQT layers by name.
        optimizers: What updates their factors.
        config: The method's settings.
        editing: How the layers are spread over ranks.
        seed: Of the sketches.
        initial_weights: The weights before quantization, if they are known.

    Attributes:
        search: What finds each layer's new P.
        first_due: Layers, and single experts, whose first merge is to come though their P has values.
        initial_weights: Those that are still needed.
    """

    def __init__(
        self,
        layers: Mapping[str, LoQTLayer],
        optimizers: Sequence[Optimizer],
        config: LoQTConfig,
        editing: Editing,
        *,
        seed: int,
        initial_weights: InitialWeights | None,
    ) -> None:
        self._layers, self._optimizers, self._config, self._editing = layers, optimizers, config, editing
        self._seed = seed
        self.search = SubspaceSearch(layers, config.subspace, editing.comm, seed)
        self.initial_weights, self.first_due = initial_weights, set[str]()
        self._sent_before = 0  # bytes, by the search, before this merge step
        self._begun: BegunMerge | None = None  # some layers are not merged yet

    def start(self) -> StartReport:
        """Makes up for the first quantization, before the first step (`loqt.init`). Every rank.

        Raises:
            ValueError: The weights before quantization are needed and were not given.
        """
        if self.initial_weights is None:
            raise ValueError("loqt.init is 'loftq', which needs the weights before quantization; give initial_weights")
        self.expect_first()
        owners, source = self.search.owners, self.initial_weights
        return start_compensated(self._layers, owners, source, self._config, self._editing, seed=self._seed)

    def expect_first(self) -> None:
        """Says that no merge has been made yet. Local."""
        self.first_due = {own for name, layer in self._layers.items() for own in own_names(name, layer)}

    # ---- a merge step ------------------------------------------------------------------------------------------------

    def collect(self, step: int, backward_passes: int | None) -> None:
        """Before the forward passes: attaches probes (see `MergeCoordinator.prepare`). Every rank."""
        self._editing.settle()
        self._sent_before = self.search.sent_bytes
        self.search.attach(step, backward_passes)

    def drop(self) -> None:
        """Forgets what was collected, and what is not merged yet. Every rank."""
        self.search.drop()
        self._begun = None

    @property
    def is_under_way(self) -> bool:
        """Whether an error has ended a merge some of whose layers are not merged yet."""
        return self._begun is not None

    def check_states(self) -> None:
        """Refuses an optimizer that lacks factors, or whose states cannot be carried over, before anything changes.

        Raises:
            UserError: What it keeps of which factor.
        """
        live = self.search.live
        self._editing.check_held(self._optimizers, {name: layer.factor for name, layer in live.items()})
        if self._config.merge.optimizer_state == "transport":
            for layer in live.values():
                optimizer, is_matrix = optimizer_of(layer, self._optimizers), layer.spec.experts is None
                self._editing.check_states(optimizer, layer.factor, shaped=is_matrix)

    def find(self, *, was_skipped: bool) -> str:
        """Afterwards every owner has found its P, and `run` may follow; or why it must not. Every rank.

        Args:
            was_skipped: Whether this rank's optimizer has made no update.

        Returns:
            A reason, the same on all ranks; "" if there is none.

        Raises:
            RuntimeError: What was collected is of no use: no rank has seen a layer in a backward pass, or there were
                more passes than was said.
        """
        if self._editing.keeps_gradients and self.search.outlives:
            warn(self._editing.comm, OUTLIVED)
        sketch_bytes = self.search.sent_bytes - self._sent_before
        reason = self._reason_to_wait(was_skipped, self.search.finish())
        if not reason:
            self._begun = BegunMerge(sketch_bytes)
            if any([copies.have_changed(layer) for layer in self._layers.values()]):
                warn(self._editing.comm, copies.AVERAGED)
        return reason

    def run(self) -> BegunMerge:
        """Merges all layers that are not merged yet; returns what there is to tell. Every rank."""
        assert self._begun is not None, "find comes first"
        begun = self._begun
        begun.merge_rest(self._layers, self.search, self._of_one_layer(), self._editing)
        self._begun = None
        self.first_due &= set(begun.kept)
        self.initial_weights = still_due(self.initial_weights, self._layers, set(begun.kept))
        return begun

    def _reason_to_wait(self, was_skipped: bool, seen: bool) -> str:
        """See `find`; `seen`: whether this rank has seen a layer in a backward pass. Every rank. One all-reduce."""
        own = self.search.quality
        told = torch.cat([own, own.new_tensor([float(was_skipped), float(seen)])])
        broken, alive, without, seeing = self._editing.comm.sum(told).tolist()
        if not seeing:
            raise RuntimeError(NOTHING_SEEN)
        return reason_to_wait(broken, alive, without)

    def _of_one_layer(self) -> LayerMerge:
        return LayerMerge(
            self._layers,
            self._editing,
            self._config.merge,
            self.initial_weights,
            self.first_due,
            optimizer_of=lambda layer: optimizer_of(layer, self._optimizers),
        )
