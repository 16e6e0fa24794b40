"""In which order a training loop calls `prepare`, the optimizer and `finish`; what it forgets is said."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

from torch.optim import Optimizer

CALL_PREPARE = "call prepare(step) before the forward passes of every step, and finish(step) after its optimizer step"
IDLE = (
    "finish() counts a step each time, but the optimizer has made no step in {idle} of {finished}: is it called after "
    "each pass of an accumulated step? Call it once, after optimizer.step(), or merges come too often. (If attach is "
    "given what accelerator.prepare returned, it sees Accelerate's accumulation by itself)"
)
MANY_IDLE = 4  # steps, and at least a third of all: a gradient scaler skips fewer
NOTHING_SEEN = (
    f"no LoQT layer was in a backward pass of the merge step; {CALL_PREPARE}. Gradients must come from "
    "loss.backward(): torch.autograd.grad and backward(inputs=...) leave out what merges collect"
)
OUTLIVED = (
    "P is found from all passes since prepare(), also from those before a zero_grad(). That is right for SAM, and for "
    "gradients that you sum yourself; if they were those of another model (a GAN's generator, through its "
    "discriminator), call the discriminator's prepare() after them"
)


class StepWatch:
    """Counts the updates of optimizers, by hooks that torch calls after each.

    Args:
        optimizers: Any.
    """

    def __init__(self, optimizers: Iterable[Optimizer]) -> None:
        self.updates = 0
        self.works = False  # whether there has ever been an update: not every optimizer calls hooks
        for optimizer in optimizers:
            optimizer.register_step_post_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.updates, self.works = self.updates + 1, True


class Passes:
    """Whether the passes of a step are not over yet, where Accelerate or a DeepSpeed engine accumulates gradients.

    Args:
        given: An optimizer, or several; Accelerate's know of it, others do not.
        engine: DeepSpeed's, whose `step` is called after each pass; None: there is none.
    """

    def __init__(self, given: Any, engine: Any = None) -> None:
        each = given if isinstance(given, Sequence) else (given,)
        self._states = [optimizer.gradient_state for optimizer in each if hasattr(optimizer, "gradient_state")]
        self._engine, self._passes = engine, 0
        self._steps: int | None = None  # of the engine, when the step that is going on began

    def begin(self) -> None:
        """Before the passes of a step, or before more of them."""
        if self._engine is not None:
            self._passes = self._engine.micro_steps
            self._steps = self._engine.global_steps if self._steps is None else self._steps

    def go_on(self) -> bool:
        """Whether a step that was to end goes on with more passes: optimizer.step() has done nothing."""
        if any(not state.sync_gradients for state in self._states):
            return True
        if self._steps is not None:
            calls, self._passes = self._engine.micro_steps - self._passes, self._engine.micro_steps
            if calls and self._engine.global_steps == self._steps:  # without calls, finish came before engine.step()
                return True
        self.abandon()
        return False

    def abandon(self) -> None:
        """No step has begun."""
        self._steps = None


class StepOrder:
    """Where the loop is, and whether it called what it should have.

    Args:
        watch: Of the optimizers.
        passes: Of a step.

    Attributes:
        watch: That one.
        position: The next step.
        open: The merge step that has been prepared and not finished; None: there is none.
        known: Whether it is known what was before `position`; not before the first call.
    """

    def __init__(self, watch: StepWatch, passes: Passes) -> None:
        self.watch, self.position, self.known = watch, 0, False
        self.open: int | None = None
        self._passes, self._finished, self._idle = passes, 0, 0
        self._prepared: int | None = None
        self._updates_before = 0

    def prepare(self, step: int | None) -> int:
        """The step that begins.

        Raises:
            RuntimeError: An earlier merge step was not finished, or steps go back.
        """
        self._refuse_unfinished(step)
        step = self.position if step is None else operator.index(step)
        if step < (self.position if self._prepared is None else self._prepared):
            raise RuntimeError(
                f"step {step} comes after step {self.position - 1}; steps count optimizer steps over the whole run, "
                "not over an epoch: leave them out, prepare() and finish() count by themselves"
            )
        if step != self.open:
            self._updates_before = self.watch.updates
        self._prepared = step
        self._passes.begin()
        return step

    def finish(self, step: int | None) -> int | None:
        """The step that ends; None: it goes on, with more passes.

        Raises:
            RuntimeError: It was not prepared.
        """
        if self._passes.go_on():
            return None
        if step is None and self._prepared is None:
            raise RuntimeError(f"finish() came without prepare(); {CALL_PREPARE}")
        if step is None:
            assert self._prepared is not None
            step = self._prepared
        return operator.index(step)

    def words_when_idle(self) -> str:
        """What to say of a loop that ends steps in which its optimizer does nothing, once; as a rule nothing."""
        self._finished, self._idle = self._finished + self.watch.works, self._idle + self.was_skipped
        said = self._idle == MANY_IDLE and 3 * self._idle >= self._finished
        return IDLE.format(idle=self._idle, finished=self._finished) if said else ""

    def leave(self, step: int) -> None:
        """A step is over."""
        self.position, self.known, self.open, self._prepared = max(self.position, step + 1), True, None, None
        self._passes.abandon()

    def abandon(self) -> None:
        """No step has begun: one that had is not finished any more."""
        self.open, self._prepared = None, None
        self._passes.abandon()

    @property
    def is_half_done(self) -> bool:
        """Whether a merge step's update has been made, and its merge not; or, without hooks, may have been."""
        return self.open is not None and not self.was_skipped

    @property
    def was_skipped(self) -> bool:
        """Whether the optimizer, which has been seen to update, has not done so since `prepare`."""
        return self.watch.works and self.watch.updates == self._updates_before

    def _refuse_unfinished(self, step: int | None) -> None:
        updated = self.watch.updates > self._updates_before
        if self.open is not None and (updated if step is None else step != self.open):
            raise RuntimeError(
                f"step {self.open} ends in a merge, but finish({self.open}) was never called, or raised, and B stays "
                f"as it is; {CALL_PREPARE}; or have the next step merge: merges.postpone({self.open})"
            )


def reason_to_wait(broken: float, alive: float, without: float) -> str:
    """Why a step must not be merged; nothing if it may.

    Args:
        broken: Layers whose gradients are not finite.
        alive: Layers whose gradients are not zero.
        without: Ranks whose optimizer has made no step.
    """
    if broken:
        return f"the gradients of {broken:.0f} layer(s) were not finite"
    if not alive:
        return "the gradients of all layers were zero"
    if without:
        return (
            "the optimizer made no step between prepare and finish (call finish after optimizer.step(); if another "
            "optimizer has taken its place, attach merges to that one and load this one's merges.state_dict())"
        )
    return ""
