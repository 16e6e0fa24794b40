"""Which parameters an export has, and the folder that is there as a whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from loqt_scale import LoQTConfig
from loqt_scale.config import DataConfig, ModelConfig, RunConfig
from loqt_scale.export import export_checkpoint
from loqt_scale.export.model_folder import published
from loqt_scale.export.parts import Parts
from loqt_scale.inference.saved_model import SavedModel
from loqt_scale.model.build import design_model

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
WHOLE = {"base.codes", "base.scales", "projection.codes", "projection.scales", "factor"}


@pytest.mark.parametrize("tied", [False, True])
def test_parts_are_the_parameters_of_the_model_before_it_was_converted(tied: bool) -> None:
    overrides = {**SMALL, "num_key_value_heads": 2, "tie_word_embeddings": tied}
    config = RunConfig(model=ModelConfig(overrides=overrides), data=DataConfig(seq_len=16), loqt=LoQTConfig(rank=4))
    design = design_model(config, vocab_size=60)
    parts = Parts(SavedModel(cast(Any, None), config, design)).all  # no file is read before `read`
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**design.hf_config.to_dict()))
    assert {name: part.shape for name, part in parts.items()} == {
        name: parameter.shape for name, parameter in model.named_parameters()
    }
    assert ("lm_head.weight" in parts) != tied
    layers = [part for part in parts.values() if part.spec is not None]
    assert len(layers) == 14 and all(part.stored.keys() == WHOLE for part in layers)
    stored = [name for part in parts.values() for name in part.stored.values()]
    assert sorted(stored) == sorted(f"model.{name}" for name, _ in design.model.named_parameters())


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with pytest.raises(KeyboardInterrupt), published(out) as folder:
        (folder / "half").write_text("1")
        raise KeyboardInterrupt
    assert list(out.parent.iterdir()) == []
    killed = out.with_name(".out.partial")
    killed.mkdir()
    (killed / "of an export that was killed").write_text("2")
    with published(out) as folder:
        (folder / "file").write_text("3")
        assert not out.exists()
    assert [path.name for path in out.parent.iterdir()] == ["out"] and [p.name for p in out.iterdir()] == ["file"]


def test_where_something_lies_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exists; write a folder that does not"):
        export_checkpoint(tmp_path / "run", tmp_path)
    with pytest.raises(ValueError, match="max_shard_size is '5'; write a size such as 500MB"):
        export_checkpoint(tmp_path / "run", tmp_path / "out", max_shard_size="5")
    assert list(tmp_path.iterdir()) == []
