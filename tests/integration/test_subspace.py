"""Subspaces on real gradients: a small LLaMA on real text, the paper's rank of a quarter of the hidden size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from loqt_scale.data import build_corpus
from loqt_scale.data.batching import summed_loss
from loqt_scale.functional import projection as P
from loqt_scale.layers import GradientProbe, loqt_layers
from loqt_scale.merge import MergeCoordinator
from loqt_scale.model.build import build_model, design_model
from loqt_scale.optim import create_optimizer
from loqt_scale.strategies import single_process
from tests.distributed.tasks import small_config

CPU = torch.device("cpu")
RANK = 32


@pytest.fixture(scope="module")
def gradients(text_file: Path, cache_dir: Path) -> list[dict[str, tuple[Tensor, str]]]:
    """Dense weight gradients (and sides) of all layers at steps 0, 15 and 40 of a LoQT run."""
    config = small_config(
        {
            "model.preset": "llama_micro",
            "model.overrides": {"num_hidden_layers": 2},
            "data.files": [str(text_file)],
            "data.cache_dir": str(cache_dir),
            "data.seq_len": 128,
            "loqt.rank": RANK,
        }
    )
    corpus = build_corpus(config.data, seed=0, global_batch_size=8)
    strategy = single_process(CPU)
    built = build_model(design_model(config, vocab_size=corpus.tokenizer.vocab_size), config.model, strategy)
    optimizer = create_optimizer(built.model, config.optim)
    merges = MergeCoordinator(
        built.model, optimizer, config.loqt, total_steps=41, initial_weights=built.initial_weights
    )
    found = []
    for step in range(41):
        merges.prepare(step)
        batch = corpus.train.sequences(step, 0, 8)
        dense = step in (0, 15, 40)
        if dense:  # swap in probes of the whole gradient for a pass of their own
            kept = {name: layer.probe for name, layer in loqt_layers(built.model)}
            for _, layer in loqt_layers(built.model):
                layer.probe = GradientProbe.collecting((layer.out_features, layer.in_features), None, CPU)
            summed_loss(built.model(input_ids=batch.input_ids).logits, batch.labels).backward()
            found.append(
                {n: (layer.probe.leaf.grad, layer.side) for n, layer in loqt_layers(built.model) if layer.probe}
            )
            optimizer.zero_grad()
            for name, layer in loqt_layers(built.model):
                layer.probe = kept[name]
        (summed_loss(built.model(input_ids=batch.input_ids).logits, batch.labels) / batch.labels.numel()).backward()
        optimizer.step()
        merges.finish(step)
        optimizer.zero_grad()
    return found  # type: ignore[return-value]


def test_sketch_and_randomized_keep_99_percent_of_the_exact_energy(
    gradients: list[dict[str, tuple[Tensor, str]]],
) -> None:
    for moment in gradients:
        assert len(moment) == 14
        for name, (gradient, side) in moment.items():
            best = float(P.captured_energy(gradient, P.svd_basis(gradient, RANK, side), side))
            other = gradient.shape[0] if side == "input" else gradient.shape[1]
            omega = P.test_matrix(other, seed=1, device=CPU)
            randomized = P.randomized_basis(gradient, RANK, side, oversampling=1.0, power_iterations=2, seed=1)
            assert float(P.captured_energy(gradient, randomized, side)) >= 0.99 * best, name
            for oversampling, least in ((0.0, 0.98), (1.0, 0.99)):
                width = P.sketch_width(RANK, *gradient.shape, oversampling)
                sketch = P.times_test_matrix(gradient.T if side == "input" else gradient, omega, width)
                sketched = P.sketch_basis(sketch, RANK)
                assert float(P.captured_energy(gradient, sketched, side)) >= least * best, name
                estimate = float(P.kept_of_sketch(sketch, sketched).square().sum())
                assert estimate == pytest.approx(float(P.captured_energy(gradient, sketched, side)), abs=0.02), name
