"""A small Mixtral through the product's own runs: every strategy against one process, and back to transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig

from loqt_scale import LoQTConfig, convert_to_loqt
from loqt_scale.config import OptimConfig
from loqt_scale.errors import UserError
from loqt_scale.export import export_checkpoint
from loqt_scale.optim import create_optimizer
from loqt_scale.plan import plan_run
from tests.distributed.pool import RankPool
from tests.distributed.runs import TRAIN, Runs
from tests.distributed.tasks import small_config
from tests.integration.test_export import IDS, logits_of

SHORT: dict[str, Any] = {"train.steps": 8, "loqt.merge.gap": 3, "data.max_eval_sequences": 2, "model.overrides": {}}
UNQUANTIZED = {"loqt.quantization.weight": "none", "loqt.quantization.projection": "none"}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Three experts, which two ranks cut in the middle; four rows of 48 columns are three NF4 blocks."""
    folder = tmp_path_factory.mktemp("mixtral")
    sizes = {"hidden_size": 48, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 12}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    MixtralConfig(vocab_size=384, num_local_experts=3, num_experts_per_tok=2, **sizes, **heads).save_pretrained(folder)
    return {**SHORT, "model.path": str(folder), "model.weights": "random"}


@pytest.mark.parametrize(
    "strategy", ["fsdp", "zero-3", *(pytest.param(s, marks=pytest.mark.long) for s in ("ddp", "zero-2"))]
)
def test_strategies_equal_the_single_process(runs: Runs, settings: dict[str, Any], strategy: str) -> None:
    exact = {**settings, **UNQUANTIZED}
    losses, expected = runs.losses(2, strategy, **exact), runs.losses(1, "single", **exact)
    assert len(losses) == 8 and expected[-1] < expected[0] - 0.1
    assert losses == pytest.approx(expected, rel=1e-4)


BALANCED: dict[str, Any] = {"train.steps": 5, "train.micro_batch_size": 4, "optim.clip_norm": 0, **UNQUANTIZED}


@pytest.mark.parametrize(
    ("strategy", "more"),
    [
        ("fsdp", {"optim.per_layer": True}),
        *(pytest.param(name, {}, marks=pytest.mark.long) for name in ("ddp", "zero-2", "zero-3")),
        pytest.param("zero-3", {"model.activation_checkpointing": True}, marks=pytest.mark.long),
    ],
)
def test_strategies_balance_experts_and_mask_documents_as_the_single_process(
    runs: Runs, settings: dict[str, Any], strategy: str, more: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The balance is that of each micro-batch: as many sequences for each rank as in a pass of one process."""
    text = tmp_path_factory.getbasetemp() / "short-documents.jsonl"
    topics = Path(runs.common["data.files"][0]).read_text().split()
    text.write_text("".join(json.dumps({"text": " ".join(topics[at : at + 3])}) + "\n" for at in range(0, 9000, 3)))
    balance = {"model.overrides": {"output_router_logits": True, "router_aux_loss_coef": 1.0}}
    masked = {**settings, **BALANCED, "data.files": [str(text)], "data.mask_documents": True}
    expected = runs.losses(1, "single", **{**masked, **balance})
    assert runs.losses(2, strategy, **{**masked, **balance, **more}) == pytest.approx(expected, rel=1e-5)
    for plain in ({**masked, "model.overrides": {}}, {**masked, **balance, "data.mask_documents": False}):
        assert runs.losses(1, "single", **plain)[-1] != pytest.approx(expected[-1], rel=1e-4)


@pytest.fixture(scope="module")
def run_dir(ranks: RankPool, runs: Runs, settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks under fsdp, with a checkpoint in the middle."""
    folder = tmp_path_factory.mktemp("experts") / "run"
    saving = {"checkpoint.every": 4, "parallel.strategy": "fsdp", "train.run_dir": str(folder)}
    ranks.run(2, TRAIN, **{**runs.common, **settings, **UNQUANTIZED, **saving})
    return folder


def test_a_checkpoint_goes_on_with_another_number_of_ranks(
    ranks: RankPool, runs: Runs, settings: dict[str, Any], run_dir: Path, tmp_path: Path
) -> None:
    middle = {"checkpoint.resume": str(run_dir / "checkpoints" / "step-00000004"), "train.run_dir": str(tmp_path)}
    rows = ranks.run(1, TRAIN, **{**runs.common, **settings, **UNQUANTIZED, **middle})[0]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert losses == pytest.approx(runs.losses(1, "single", **settings, **UNQUANTIZED)[4:], rel=1e-4)


def test_an_export_is_the_model_that_was_trained(run_dir: Path, tmp_path: Path) -> None:
    export_checkpoint(run_dir, tmp_path / "dense", dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(input_ids=IDS).logits, logits_of(run_dir), atol=1e-4, rtol=1e-4)
    assert model.model.layers[0].mlp.experts.gate_up_proj.shape == (3, 64, 48)


@pytest.mark.long
def test_the_plan_counts_what_experts_send(
    ranks: RankPool, runs: Runs, settings: dict[str, Any], tmp_path: Path
) -> None:
    spread = {**runs.common, **settings, "parallel.strategy": "fsdp", "train.run_dir": str(tmp_path)}
    plan = plan_run(small_config(spread), ranks=2, vocab_size=384)
    seen = ranks.run(2, "tests.distributed.footprint_tasks:traffic", **spread)[0]
    assert plan.step.payload == sum(size for _, size, _ in seen["step"])
    assert 0.5 * plan.merge.payload < sum(size for _, size, _ in seen["merge"]) <= plan.merge.payload
    assert plan.memory.state["codes of W"] > 0.8 * 3 * 3 * 48 * 32 * 2 / 2 / 2  # two blocks, half a byte, two ranks


def test_muon_is_refused(settings: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(settings["model.path"]))
    convert_to_loqt(model, LoQTConfig(rank=8))
    with pytest.raises(UserError, match="which Muon would take for one"):
        create_optimizer(model, OptimConfig(name="muon"))
