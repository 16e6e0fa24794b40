"""Lightning's Trainer around a module with merges: against a loop by hand, resumed to the bit, on two ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loqt_scale import attach, convert_to_loqt, to_dense
from tests.distributed.pool import RankPool
from tests.integration.trainer_cases import CONFIG, Progressions, has_trained, state_of, tiny_llama

pytest.importorskip("lightning")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*num_workers.*", "ignore:.*litlogger.*")
from tests.integration.lightning_cases import PASSES, ROWS, SAVED, STEPS, Module, fabric_losses, fit  # noqa: E402


def own_loop(clip_at: float = 1.0) -> tuple[torch.nn.Module, list[float]]:
    """The same steps by hand."""
    model, rows, found = tiny_llama(), Progressions(SAVED * PASSES * ROWS), []
    before = model.state_dict()
    convert_to_loqt(model, CONFIG)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    merges = attach(model, optimizer, CONFIG, initial_weights=before)
    batches = iter(3 * list(torch.utils.data.DataLoader(rows, batch_size=ROWS)))
    for _ in range(STEPS):
        merges.prepare()
        for _ in range(PASSES):
            loss = model(**next(batches)).loss
            (loss / PASSES).backward()
            found.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip_at)
        optimizer.step()
        merges.finish()
        optimizer.zero_grad()
    return model, found


def test_lightning_takes_the_steps_of_a_loop_by_hand_and_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    whole, (model, found) = fit(str(tmp_path)), own_loop()
    losses = torch.stack(whole.losses).tolist()
    assert losses == pytest.approx(found, abs=1e-6) and has_trained(model)
    again = fit(str(tmp_path / "again"), seed=7, ckpt=str(tmp_path / f"step={SAVED}.ckpt"))
    assert torch.stack(again.losses).tolist() == losses[PASSES * SAVED :]
    ours = state_of(whole)
    assert all(torch.equal(tensor, ours[name]) for name, tensor in state_of(again).items())
    file = tmp_path / f"step={SAVED * 2}.ckpt"
    loaded, dense = Module.load_from_checkpoint(file, weights_only=True), Progressions(4, seed=5).rows
    with torch.no_grad():
        want = loaded.model(input_ids=dense).logits
        torch.testing.assert_close(to_dense(loaded.model)(input_ids=dense).logits, want)


def test_fabric_takes_the_steps_of_a_loop_by_hand_and_goes_on_from_what_it_saved(tmp_path: Path) -> None:
    file = str(tmp_path / "saved.ckpt")
    losses = fabric_losses(file)
    assert losses == pytest.approx(own_loop()[1], abs=1e-6)
    assert fabric_losses(file, first=SAVED) == losses[PASSES * SAVED :]


FOUND = {
    "ddp": "DistributedDataParallel, 2 rank(s)",
    "fsdp2": "fully_shard over 2 rank(s)",
    "zero1": "DeepSpeed engine, ZeRO stage 1, 2 rank(s)",
    "zero2": "DeepSpeed engine, ZeRO stage 2, 2 rank(s)",
    "zero3": "DeepSpeed engine, ZeRO stage 3, 2 rank(s)",
}


@pytest.mark.parametrize(
    "how", ["fsdp2", *(pytest.param(how, marks=pytest.mark.long) for how in ("ddp", "zero1", "zero2", "zero3"))]
)
def test_fabric_on_two_ranks(ranks: RankPool, how: str, tmp_path: Path) -> None:
    """Sums of gradients in another order aside, the steps of one process; an engine's have one pass and no clipping."""
    task, given = "tests.integration.lightning_cases:fabric_losses", {"file": str(tmp_path / "saved.ckpt"), "how": how}
    whole = ranks.run(2, task, ranks=2, **given)
    again = ranks.run(2, task, ranks=2, first=SAVED, **given)
    passes = 1 if how.startswith("zero") else PASSES
    assert whole[0] == whole[1] and again[0] == again[1] == whole[0][passes * SAVED :]
    if passes == PASSES:
        assert whole[0] == pytest.approx(own_loop()[1], abs=1e-3)
    assert whole[0][-1] < whole[0][0] - 1.0


@pytest.mark.parametrize(
    "how", ["fsdp2", *(pytest.param(how, marks=pytest.mark.long) for how in FOUND if how != "fsdp2")]
)
def test_two_ranks_of_lightnings_strategies(ranks: RankPool, how: str, tmp_path: Path) -> None:
    task = "tests.integration.lightning_cases:rank_of_two"
    whole = ranks.run(2, task, folder=str(tmp_path), how=how)
    saved = str(tmp_path / f"step={SAVED}.ckpt")
    again = ranks.run(2, task, folder=str(tmp_path / "again"), how=how, seed=7, ckpt=saved)
    for result, later in zip(whole, again, strict=True):
        assert result["found"] == FOUND[how]
        assert later["losses"] == result["losses"][PASSES * SAVED :] and later["end"] == result["end"]
    means = [(a + b) / 2 for a, b in zip(*(result["losses"] for result in whole), strict=True)]
    halved = how.startswith("zero")  # both Lightning and DeepSpeed divide an accumulated loss by its passes
    expected = own_loop(clip_at=float(PASSES) if halved else 1.0)[1]
    assert means == pytest.approx(expected, abs=2e-3)  # a code of nf4 may fall to the other side
