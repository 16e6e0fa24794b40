"""How the sketches of one merge get from the backward passes to the ranks that factorise them.

Each layer has an *owner*, the rank that factorises its sketch. (Under the exact methods read "dense gradient".) With
one rank, sketches are complete after the last backward pass. With several, every rank has a part of every layer's
sketch, and the owner needs the sum. So, while a backward pass still runs, each rank begins to reduce a layer's part to
the owner as soon as it is there, and frees it when the reduction is over. No rank holds all sketches: only the sums of
the layers that it owns, 1/N of them, and the parts on their way, at most `budget` bytes.

*Order.* Reductions are collectives: all ranks must begin them in one order, though backward passes may finish layers in
another. The order is fixed, last layer first, once per pass. A part that comes before its turn waits (`_early`). If a
pass has left a layer out, or all of them have, zeros are sent in its place at the end of the step.

*Waves.* The order is cut into waves, with equally many layers of each owner. When the last layer of a wave is sent, the
reductions of the wave before it are awaited; in the last pass its owners then factorise their layers, all at the
same time, while the newer wave is still on its way:

    backward pass    layers of wave 1 | layers of wave 2      | layers of wave 3      | ...
    on the wire      reduce wave 1    | reduce wave 2         | reduce wave 3         |
    owners                            | await 1, factorise 1  | await 2, factorise 2  |
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from loqt_scale.layers import LoQTLayer
from loqt_scale.strategies import Reducer

Collected = dict[str, Tensor]


class GradientCollection:
    """See the module's docstring.

    Args:
        layers: All LoQT layers by name, each with a probe.
        owners: Rank that factorises each layer, in the order in which layers are sent.
        wave: Layers of a wave.
        reducer: Sums tensors into their owners' copies.
        passes: Backward passes of the step; None: unknown, everything is sent by `finish`.
        budget: Most bytes in the air before the next is sent.
        factorise: Called with the complete sums of this rank's layers of a wave, by name.
    """

    def __init__(
        self,
        layers: Mapping[str, LoQTLayer],
        owners: Mapping[str, int],
        *,
        wave: int,
        reducer: Reducer,
        passes: int | None,
        budget: int,
        factorise: Callable[[Collected], None],
    ) -> None:
        self._layers, self._owners, self._order = layers, owners, list(owners)
        self._wave, self._reducer, self._budget, self._factorise = wave, reducer, budget, factorise
        self._hooked = passes is not None
        self._total = (passes or 1) * len(self._order)
        self._sent, self._in_the_air = 0, 0
        self._seen: set[str] = set()
        self._early: Collected = {}
        self._flights: deque[tuple[int, Tensor, Callable[[], object]]] = deque()
        self._sums: Collected = {}
        self._handed_over = 0  # layers of the order
        self._leaves: Collected = {}
        self._hooks: list[RemovableHandle] = []
        for name, layer in layers.items():
            assert layer.probe is not None
            self._leaves[name] = layer.probe.leaf
            if self._hooked:
                hook = layer.probe.leaf.register_post_accumulate_grad_hook(partial(self._arrive, name))
                self._hooks.append(hook)

    @torch.no_grad()
    def _arrive(self, name: str, leaf: Tensor) -> None:
        """A backward pass has completed a layer's gradient. Every rank, in whatever order."""
        self._take(name)
        while self._sent < self._total and self._next in self._early:
            self._send(self._early.pop(self._next))

    def finish(self) -> bool:
        """Sends what has not been sent, lands everything, has it factorised, and takes the probes off. Every rank.

        Returns:
            Whether this rank has seen a backward pass of any layer.

        Raises:
            RuntimeError: There were more passes than was said, whose gradients are not in what was sent.
        """
        for name in self._order:
            self._take(name)
        self._send_rest()
        self._land(self._total)
        self._hand_over(len(self._order))
        self._detach()
        if self._early:
            said = self._total // len(self._order)
            raise RuntimeError(
                f"there were more backward passes than prepare(backward_passes={said}) said; "
                "give their number, or leave it out"
            )
        return bool(self._seen)

    def drop(self) -> None:
        """Forgets everything, but leaves no other rank waiting. Every rank, if the number of passes is known."""
        if self._hooked:
            self._factorise = lambda complete: None
            self._send_rest()
            self._land(self._total)
        self._detach()

    @property
    def _next(self) -> str:
        return self._order[self._sent % len(self._order)]

    def _take(self, name: str) -> None:
        """Moves what a layer's probe holds into the queue. Local."""
        leaf = self._leaves[name]
        if leaf.grad is not None:
            self._seen.add(name)
            self._early[name] = self._early[name].add_(leaf.grad) if name in self._early else leaf.grad
            leaf.grad = None

    def _send_rest(self) -> None:
        while self._sent < self._total:
            leaf = self._leaves[self._next]
            gradient = self._early.pop(self._next, None)
            self._send(leaf.new_zeros(leaf.shape) if gradient is None else gradient)

    def _send(self, gradient: Tensor) -> None:
        """The next turn: begins to sum a layer's part into its owner's copy. Every rank."""
        index = self._sent
        wait = self._reducer.begin(gradient, self._owners[self._next])
        self._flights.append((index, gradient, wait))
        self._sent, self._in_the_air = index + 1, self._in_the_air + gradient.nbytes
        while self._in_the_air > self._budget:
            self._land_one()
        sent_in_pass = index % len(self._order) + 1
        if sent_in_pass % self._wave == 0:
            # the wave that has just been sent may stay in the air; without air (one rank) it has landed
            self._land(index + 1 - self._wave)
            if index >= self._total - len(self._order):  # the last pass
                self._hand_over(sent_in_pass - self._wave if self._flights else sent_in_pass)

    def _land(self, stop: int) -> None:
        """Waits for everything that was sent before turn `stop`. Local."""
        while self._flights and self._flights[0][0] < stop:
            self._land_one()

    def _land_one(self) -> None:
        index, gradient, wait = self._flights.popleft()
        wait()
        self._in_the_air -= gradient.nbytes
        name = self._order[index % len(self._order)]
        if self._owners[name] != self._reducer.rank:
            return
        total = self._sums.pop(name).add_(gradient) if name in self._sums else gradient
        self._sums[name] = total

    def _hand_over(self, stop: int) -> None:
        """Has this rank's layers of the waves up to place `stop` of the order factorised, wave by wave. Local."""
        for start in range(self._handed_over, stop, self._wave):
            wave = self._order[start : min(start + self._wave, stop)]
            complete = {name: self._sums.pop(name) for name in wave if name in self._sums}
            if complete:
                self._factorise(complete)
        self._handed_over = max(self._handed_over, stop)

    def _detach(self) -> None:
        for layer in self._layers.values():
            layer.probe = None
        for hook in self._hooks:  # Python's garbage collector does not see through a tensor's hooks
            hook.remove()
        self._hooks.clear()
        self._leaves.clear()
