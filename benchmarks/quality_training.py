"""One run of benchmarks/quality.py, from its settings to a line of the results file."""

from __future__ import annotations

import gc
import hashlib
import math
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import date
from itertools import pairwise
from typing import Any

import torch
from common import hardware
from quality_baselines import use_optimizer
from quality_runs import Place, Run
from torch import Tensor

from loqt_scale.config import RunConfig
from loqt_scale.data import Corpus, build_corpus
from loqt_scale.layers import loqt_layers
from loqt_scale.metrics import MetricsWriter, Progress
from loqt_scale.model.build import design_model
from loqt_scale.strategies import create_strategy, resolve_device
from loqt_scale.training.health import NonFiniteLossError
from loqt_scale.training.trainer import Trainer

Tell = Callable[[int, float], object]  # steps done, seconds since the run began
_CORPORA: dict[str, Corpus] = {}


def open_corpus(config: RunConfig) -> Corpus:
    """The run's text; the same one is opened once a process."""
    key = repr((config.data, config.train.seed, config.train.global_batch_size))
    if key not in _CORPORA:
        _CORPORA[key] = build_corpus(
            config.data, seed=config.train.seed, global_batch_size=config.train.global_batch_size
        )
    return _CORPORA[key]


def text_key(corpus: Corpus) -> str:
    """Eight hexadecimal digits that change with the text or its tokens."""
    return hashlib.blake2b("\n".join(corpus.fingerprint).encode(), digest_size=4).hexdigest()


def text_name(config: RunConfig) -> str:
    """For people; no folders of this machine."""
    return ", ".join(os.path.basename(path) for path in config.data.files) or "embedded corpus"


def train(run: Run, place: Place, tell: Tell) -> dict[str, Any]:
    """Does a run; returns its line.

    Args:
        run: What.
        place: Where.
        tell: Hears of every quarter of the run.
    """
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        config = place.config(run, folder)
        torch.set_num_threads(place.threads)
        trainer = make_trainer(config, folder)
        use_optimizer(trainer, run.method, run.options)
        curve, seconds, diverged = follow(trainer, lambda done: tell(done, time.perf_counter() - began))
        losses = {str(step): round(loss, 5) if math.isfinite(loss) else None for step, loss in curve.items()}
        text = {"text": text_key(trainer.corpus), "text_name": text_name(config)}
        line = run.facts() | {"settings": run.settings, **text, "curve": losses, "diverged": diverged}
        line |= scores(trainer.corpus, math.nan if diverged else curve[config.train.steps])
        line |= {"skipped_steps": trainer.health.skipped, "parameters": dense_parameters(trainer), **held(trainer)}
        line |= {"tokens_per_second": round(trainer.tokens / seconds) if seconds else None}
        device = device_name(trainer.strategy.comm.device)
        trainer.strategy.close()
    line |= {"seconds": round(time.perf_counter() - began, 1), "device": device, "jobs": place.jobs}
    return line | {"commit": place.commit, "date": str(date.today())}


def make_trainer(config: RunConfig, folder: str) -> Trainer:
    """The product's trainer, which writes nothing."""
    device = resolve_device(config.train.device)
    corpus = open_corpus(config)
    design = design_model(config, vocab_size=corpus.tokenizer.vocab_size)
    progress = Progress(config.train.steps, enabled=False, mode="off")
    writer = MetricsWriter(folder, enabled=False)
    strategy = create_strategy(config, device=device)
    return Trainer(config, corpus, design, strategy=strategy, progress=progress, writer=writer)


def follow(trainer: Trainer, tell: Callable[[int], object]) -> tuple[dict[int, float], float, bool]:
    """Trains to the end: (held-out nats after each quarter, seconds of training alone, whether it diverged)."""
    steps, curve, seconds = trainer.config.train.steps, {}, 0.0
    quarters = sorted({max(1, steps * part // 4) for part in (1, 2, 3, 4)})
    trainer.begin()
    with suppress(NonFiniteLossError):
        for first, last in pairwise([0, *quarters]):
            began = time.perf_counter()
            for step in range(first, last):
                trainer.step(step)
            trainer.finish_pending()
            seconds += time.perf_counter() - began
            curve[last] = trainer.evaluate(last)
            tell(last)
            if not math.isfinite(curve[last]):
                break
    return curve, seconds, steps not in curve or not math.isfinite(curve[steps])


def scores(corpus: Corpus, nats: float) -> dict[str, float | None]:
    """Nats a token, perplexity and bits a byte of held-out text; None where the loss is no number."""
    if not math.isfinite(nats):
        return {"nats": None, "perplexity": None, "bits_per_byte": None}
    labels = corpus.eval.labels[corpus.eval.labels >= 0]
    text = labels[labels != corpus.tokenizer.eos_token_id].tolist()
    bits = nats * labels.numel() / math.log(2)
    size = len(corpus.tokenizer.decode(text).encode("utf-8", "replace")) if text else 0
    if corpus.tokenizer.name == "bytes":
        size = len(text)  # sequences cut characters, whose parts do not decode
    return {"nats": round(nats, 5), "perplexity": round(math.exp(nats), 4), "bits_per_byte": round(bits / size, 4)}


def dense_parameters(trainer: Trainer) -> int:
    """Of the model, before any linear was packed."""
    layers = [layer for _, layer in loqt_layers(trainer.built.model)]
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    outside = sum(p.numel() for p in trainer.built.model.parameters() if id(p) not in inside)
    biases = [layer.bias.numel() for layer in layers if layer.bias is not None]
    return outside + sum(layer.in_features * layer.out_features for layer in layers) + sum(biases)


def device_name(device: torch.device) -> str:
    """For people."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else hardware().partition(", torch")[0]


def free() -> None:
    """Gives back what the last run held."""
    torch.compiler.reset()  # or another model's blocks count as recompilations of this one's, of which there may be 8
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


# ---- what is held, read off the tensors that are there -----------------------------------------------------------


def held(trainer: Trainer) -> dict[str, int]:
    """Bytes of weights, of gradients at the moment there are most, and of whatever the optimizer's state holds.

    It takes another step's gradients, so it comes after everything else.
    """
    weights = storages(list(trainer.built.model.parameters()))
    states = storages([state for state in trainer.optimizer.state.values()])
    return {
        "weight_bytes": sum(weights.values()),
        "gradient_bytes": most_gradients(trainer),
        "state_bytes": sum(size for place, size in states.items() if place not in weights),
    }


def most_gradients(trainer: Trainer) -> int:
    """Bytes of all gradients when there are most of them, in a step after the last one."""
    trainer.optimizer.zero_grad(set_to_none=True)
    most = 0

    def arrives(gradient: Tensor) -> None:
        nonlocal most
        there = storages([[p.grad for p in trainer.parameters], vars(trainer.strategy.step).get("sums"), gradient])
        own = storages([p.detach() for p in trainer.parameters])
        most = max(most, sum(size for place, size in there.items() if place not in own))

    hooks = [parameter.register_hook(arrives) for parameter in trainer.parameters]
    trainer.accumulate(trainer.config.train.steps)
    for hook in hooks:
        hook.remove()
    left = storages([p.grad for p in trainer.parameters])
    trainer.optimizer.zero_grad(set_to_none=True)
    return max(most, sum(left.values()))


def storages(thing: object) -> dict[int, int]:
    """Bytes by address of what is behind the tensors in an object, in its attributes, items and theirs.

    Views of one storage count for what they show, at most for the storage: GaLore's package keeps a whole singular
    matrix alive for the rank columns that it needs, which a copy would mend.
    """
    views: dict[int, dict[tuple[object, ...], int]] = defaultdict(dict)
    whole: dict[int, int] = {}
    for tensor in tensors_in(thing):
        storage = tensor.untyped_storage()
        whole[storage.data_ptr()] = storage.nbytes()
        views[storage.data_ptr()][tensor.storage_offset(), tensor.shape] = tensor.nbytes
    return {place: min(whole[place], sum(shown.values())) for place, shown in views.items()}


def tensors_in(thing: object) -> Iterator[Tensor]:
    """Every tensor that can be reached from an object by attributes, items and values."""
    seen: set[int] = set()
    waiting = [thing]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, str | bytes | int | float | type | None):
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            yield thing
        elif isinstance(thing, dict):
            waiting += thing.values()
        elif isinstance(thing, list | tuple | set):
            waiting += thing
        else:
            waiting += getattr(thing, "__dict__", {}).values()
