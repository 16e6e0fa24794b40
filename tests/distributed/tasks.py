"""What the rank processes run: whole training jobs through the product's own entry, and looks at their live tensors."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

STEPS = 28  # two merges in, and a third near the end
SMALL_RUN: dict[str, Any] = {
    # hidden 96 and intermediate 86: neither fills NF4 blocks of 64 by single rows, nor divides by 2 and 3 groups
    "model.preset": "llama_nano",
    "model.overrides": {"hidden_size": 96, "intermediate_size": 86, "num_attention_heads": 4, "num_key_value_heads": 4},
    "data.seq_len": 32,
    "data.max_eval_sequences": 7,
    "loqt.rank": 8,
    "loqt.merge.gap": 12,
    "optim.lr": 5e-3,
    "optim.warmup_steps": 4,
    "train.steps": STEPS,
    "train.global_batch_size": 8,
    "train.micro_batch_size": 8,
    "train.progress": "off",
}


def small_config(settings: dict[str, Any]) -> Any:
    """The equivalence tests' RunConfig with settings replaced, through the product's own parser."""
    from loqt_scale.config.yaml import parse_run_config

    merged = {**SMALL_RUN, **settings}
    return parse_run_config([f"--{key}={_word(value)}" for key, value in merged.items()])


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def train_run(**settings: Any) -> list[dict[str, float]]:
    """Runs one job on this rank and returns its metrics, a dict a logged step."""
    from loqt_scale.training.job import train

    config = small_config(settings)
    train(config)
    lines = (Path(config.train.run_dir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def run_refused(**settings: Any) -> str:
    """What this rank is told at the end of a run that cannot be marked as finished; nothing if it was."""
    from loqt_scale.errors import UserError

    try:
        train_run(**settings)
    except UserError as error:
        return str(error)
    return ""


def warnings_of_run(**settings: Any) -> list[str]:
    """What a run on this rank has warned of."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        train_run(**settings)
    return [str(warning.message) for warning in told]


def evaluate_checkpoint(path: str) -> float:
    """Held-out loss of a checkpoint, its model spread over the ranks."""
    from loqt_scale.inference import evaluate_saved

    return evaluate_saved(path)


def refused_checkpoint(path: str) -> str:
    """What this rank is told of a checkpoint that is not to be loaded; nothing if it was."""
    from loqt_scale.checkpoint import CheckpointError

    try:
        evaluate_checkpoint(path)
    except CheckpointError as error:
        return str(error)
    return ""


def disagreeing_run(about: str, **settings: Any) -> str:
    """A run on whose step 6 rank 1 is a step ahead, or skips the merge that rank 0 is about to begin; what ended it."""
    try:
        run_into_disagreement(about, **settings)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def run_into_disagreement(about: str, **settings: Any) -> None:
    """The run itself."""
    import os

    from loqt_scale.merge import MergeCoordinator
    from loqt_scale.training.trainer import Trainer

    if os.environ["RANK"] != "1":
        train_run(**settings)
    elif about == "step":
        accumulate = Trainer.accumulate
        Trainer.accumulate = lambda self, step: accumulate(self, step + (step == 6))
        try:
            train_run(**settings)
        finally:
            Trainer.accumulate = accumulate
    else:
        known = MergeCoordinator.is_merge_step
        MergeCoordinator.is_merge_step = lambda self, step: known(self, step) and step != 6
        try:
            train_run(**settings)
        finally:
            MergeCoordinator.is_merge_step = known


def run_with_a_bad_disk(**settings: Any) -> list[str]:
    """A run in which rank 1 cannot write its part of the checkpoint of step 6; returns this rank's warnings."""
    import os

    from loqt_scale.checkpoint import write
    from loqt_scale.metrics import Progress

    digest, line, told = write.file_digest, Progress.line, []

    def bad_disk(path: Path) -> str:
        if os.environ["RANK"] == "1" and "step-00000006" in str(path):
            raise OSError(28, "No space left on device")
        return digest(path)

    def listen(self: Progress, text: str) -> None:
        told.extend([text] if text.startswith("WARNING") else [])
        line(self, text)

    write.file_digest, Progress.line = bad_disk, listen
    try:
        train_run(**settings)
    finally:
        write.file_digest, Progress.line = digest, line
    return told


def run_with_unreadable_data(rank: int, step: int, **settings: Any) -> tuple[str, str]:
    """A run in which one rank cannot read its share of a step (from 0); its error, and what that came from."""
    import os

    from loqt_scale.data.batches import StoredSequences

    whole = StoredSequences.sequences

    def sequences(self: StoredSequences, asked: int, start: int, stop: int) -> Any:
        if os.environ["RANK"] == str(rank) and asked == step:
            raise ConnectionError("the hub is away")
        return whole(self, asked, start, stop)

    StoredSequences.sequences = sequences  # type: ignore[method-assign]
    try:
        train_run(**settings)
    except ValueError as error:
        return str(error), repr(error.__cause__)
    finally:
        StoredSequences.sequences = whole  # type: ignore[method-assign]
    return "nothing", ""


def run_told_to_stop(rank: int, number: int, **settings: Any) -> int:
    """A run on whose third step one rank alone gets a signal; the number with which this rank ends."""
    import os

    from loqt_scale.training.stopping import Stopped
    from loqt_scale.training.trainer import Trainer

    whole = Trainer.step

    def step(self: Trainer, position: int) -> None:
        if os.environ["RANK"] == str(rank) and position == 2:
            os.kill(os.getpid(), number)
        whole(self, position)

    Trainer.step = step  # type: ignore[method-assign]
    try:
        train_run(**settings)
    except Stopped as stopped:
        return stopped.number
    finally:
        Trainer.step = whole  # type: ignore[method-assign]
    return 0


def run_with_failing_evaluation(rank: int, **settings: Any) -> tuple[str, str, str]:
    """A run in whose second evaluation one rank finds no memory; its error, what it came from, and the way on."""
    import os

    from loqt_scale.training import evaluation

    whole, calls = evaluation._own_sum, iter(range(10**9))

    def own_sum(*given: Any) -> Any:
        total = whole(*given)
        if os.environ["RANK"] == str(rank) and next(calls) == 1:
            raise MemoryError("no memory left")
        return total

    evaluation._own_sum = own_sum
    try:
        train_run(**settings)
    except Exception as error:
        return f"{type(error).__name__}: {error}", repr(error.__cause__), error.__notes__[0]
    finally:
        evaluation._own_sum = whole
    return "nothing", "", ""


def flipped_bits(flipped: list[int], **settings: Any) -> dict[str, Any]:
    """Six steps, in some of which a value of rank 1's gradients turns NaN after they were summed. Every rank.

    Args:
        flipped: Those steps.
        settings: Of the run.

    Returns:
        updates: Steps applied.
        merges: Merge steps, as they are at the end.
        state: Parameters that train, packed bytes and moments, as this rank holds them.
    """
    import torch

    from tests.distributed.footprint_tasks import make_trainer

    trainer = make_trainer(small_config(settings))
    strategy = trainer.strategy
    sum_step = strategy.step.sum_step

    def flip(numbers: Any, parameters: Any) -> Any:
        if strategy.comm.rank == 1 and trainer.done in flipped:
            strategy.placement.local(parameters[3].grad).view(-1)[5] = float("nan")
        return sum_step(numbers, parameters)

    strategy.step.sum_step = flip  # type: ignore[method-assign]
    try:
        for step in range(6):
            trainer.step(step)
        trainer.finish_pending()
        assert trainer.merges is not None
        moments = [m for state in trainer.optimizer.state.values() for m in state.values() if torch.is_tensor(m)]
        tensors = [strategy.placement.local(t.detach()).clone() for t in (*trainer.built.model.parameters(), *moments)]
        return {"updates": trainer.updates, "merges": trainer.merges.steps, "state": tensors}
    finally:
        strategy.close()


def run_on_own_copy(folder: str, **settings: Any) -> str:
    """A run that each rank starts in a working directory of its own, `folder`/RANK; what ended it."""
    import os

    before = Path.cwd()
    os.chdir(Path(folder) / os.environ["RANK"])
    try:
        train_run(**settings)
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        os.chdir(before)
    return "nothing"
