"""A sharded model made dense, beside what the sharded model itself computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from loqt_scale import save_merged, to_dense
from loqt_scale.errors import UserError
from loqt_scale.layers import loqt_layers
from tests.distributed.footprint_tasks import make_trainer
from tests.distributed.tasks import small_config


def made_dense(*, folder: str, **settings: Any) -> dict[str, Any]:
    """After three steps with a merge: largest logit, and how far the dense copy, the folder and a next step are off."""
    trainer = make_trainer(small_config(settings))
    try:
        for step in range(3):
            trainer.step(step)
        tokens = torch.arange(32).view(2, 16)
        with torch.no_grad():
            want = trainer.model(input_ids=tokens).logits.clone()
            dense = to_dense(trainer.model)
            got = dense(input_ids=tokens).logits
        refused = ""
        try:
            trainer.built.model.save_pretrained(folder + "-refused")
        except UserError as error:
            refused = str(error)
        save_merged(trainer.model, folder)
        again = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            read = again(input_ids=tokens).logits
        trainer.step(3)  # the converted model goes on
        return {
            "largest": float(want.abs().max()),
            "dense": float((got - want).abs().max()),
            "read": float((read - want).abs().max()),
            "kind": type(dense).__name__,
            "layers": len(list(loqt_layers(dense))),
            "refused": refused,
            "files": sorted(path.name for path in Path(folder).iterdir()),
        }
    finally:
        trainer.strategy.close()
