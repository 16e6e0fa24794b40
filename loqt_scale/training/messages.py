"""What a run says to people: one banner, one line a merge, one summary."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import nn

from loqt_scale.config.blocks import row_block
from loqt_scale.data.logical import ranks_that_share, streams_read_twice
from loqt_scale.data.mixing import MOST_EPOCHS, repeated_often
from loqt_scale.metrics import format_count, format_perplexity, format_span, perplexity

if TYPE_CHECKING:
    from loqt_scale.checkpoint import Finished
    from loqt_scale.config import DataConfig, ModelConfig, OptimConfig, RunConfig
    from loqt_scale.data import Corpus
    from loqt_scale.merge import MergeReport, StartReport
    from loqt_scale.model.build import BuiltModel
    from loqt_scale.strategies import Strategy


def banner(
    built: BuiltModel, corpus: Corpus, config: RunConfig, strategy: Strategy, *, warmup_steps: int | None = None
) -> str:
    """What is about to be trained, on what, where; `warmup_steps`: with which a run that goes on began."""
    from loqt_scale.layers import loqt_layers
    from loqt_scale.optim import describe_rates

    rates = describe_rates(config.optim, config.train.steps, warmup_steps=warmup_steps)
    layers = [layer for _, layer in loqt_layers(built.model)]
    frozen = sum(layer.spec.base.rows * layer.spec.base.cols for layer in layers)
    train, trained = config.train, format_count(built.trained_values)
    method = "full-rank training"
    if layers:
        span = format_span(layer.rank for layer in layers)
        method = f"LoQT, rank {span}: {len(layers)} linears, {format_count(frozen)} weights"
        method += f" ({config.loqt.quantization.weight}, frozen)"
    model = config.model
    name = model.preset if model.path is None else f"{model.path} ({model.weights} weights)"
    lines = [
        f"model    {name}; {method}; {trained} parameters train",
        f"data     {corpus.description}",
        f"step     {train.global_batch_size} sequences x {config.data.seq_len} tokens, {model.dtype}; "
        f"{optimizer_words(config.optim)}",
        f"ranks    {strategy.comm.world_size} ({strategy.description}, {strategy.comm.device.type})",
        f"rates    {rates}",
    ]
    for streams in sorted(set(corpus.streams)):
        lines += sharing_note(streams, train.global_batch_size, strategy.step.data_size)
    lines += mixing_notes(corpus, config.data, steps=config.train.steps)
    widths = sorted({width for layer in layers for width in (layer.spec.each.base.rows, layer.spec.each.base.cols)})
    dense = [layer for name, layer in built.model.named_modules() if name in built.dense_layers]
    lines += states_note([layer.in_features for layer in dense if isinstance(layer, nn.Linear)], config.optim)
    lines += alignment_note(widths, model, device_type=strategy.comm.device.type)
    return "\n".join(lines)


def optimizer_words(optim: OptimConfig) -> str:
    """Which optimizer, for people: `Muon (momentum 0.9), AdamW for embeddings, norms, head; int8 states`."""
    muon = f"Muon (momentum {optim.momentum:g}), AdamW for embeddings, norms, head"
    words = [muon if optim.name == "muon" else "AdamW"]
    words += [f"{optim.states} states"] if optim.states != "float32" else []
    words += ["updates inside the backward pass"] if optim.per_layer else []
    return "; ".join(words + (["compiled updates"] if optim.compile else []))


def sharing_note(streams: int | None, global_batch_size: int, ranks: int) -> list[str]:
    """A line on ranks that read and tokenize the same text, if there are such.

    Args:
        streams: Logical streams of the run's text; None: it is not streamed.
        global_batch_size: Sequences of a step.
        ranks: Among which they are shared.
    """
    again = 0 if streams is None else streams_read_twice(streams, global_batch_size, ranks)
    if streams is None or again <= 0:
        return []
    even = ", ".join(map(str, ranks_that_share(streams)))
    return [
        f"note     {streams} logical streams on {ranks} ranks: some text is read and tokenized by several ranks "
        f"({streams + again} readings of a stream); {even} ranks share them evenly; for a new run, write a multiple of "
        f"{ranks} that divides the global batch in data.streams"
    ]


def mixing_notes(corpus: Corpus, data: DataConfig, *, steps: int) -> list[str]:
    """Lines on sources that are read often, and on weights that no step of this run has."""
    lines = []
    planned = {} if corpus.mixed is None else corpus.mixed.epochs_of_each(steps)
    for name, epochs in planned.items():
        if corpus.mixed is not None and name not in corpus.mixed.streamed and epochs > MOST_EPOCHS:
            lines.append(f"note     {repeated_often(name, f'is read {epochs:.1f} times in this run')}")
    for source in data.mixture:
        if (last := source.weight[-1][0]) >= steps:
            lines.append(
                f"note     data.sources, '{source.name}': its weight changes when {last} steps are done, and this run "
                f"has {steps}"
            )
    return lines


def alignment_note(widths: Iterable[int], model: ModelConfig, *, device_type: str) -> list[str]:
    """A line on linears whose products a GPU computes slowly, if there are such; measured in docs/performance.md.

    Args:
        widths: Features of the linears, in and out.
        model: Its settings.
        device_type: Where it is.
    """
    odd = [width for width in widths if width % 8]
    if device_type != "cuda" or model.dtype != "bfloat16" or model.compile or not odd:
        return []
    return [
        f"note     linears of {odd[0]} features: bfloat16 rows that are not aligned to 16 bytes are several times "
        f"slower to multiply; write model.compile: true, or, in a model of your own, {odd[0] + -odd[0] % 8} features"
    ]


def states_note(rows: Sequence[int], optim: OptimConfig) -> list[str]:
    """A line on moments that 8 bits were asked for and that are float32, if there are such.

    Args:
        rows: Values of a row of each weight that trains like a factor.
        optim: The optimizer's settings.
    """
    odd = [values for values in rows if not row_block(values)]
    if optim.states != "int8" or not odd:
        return []
    return [
        f"note     optim.states is int8, but {len(odd)} of {len(rows)} linears have rows of {odd[0]} values, which "
        "make no blocks of 32 to 256: their moments are float32"
    ]


def merge_line(report: MergeReport) -> str:
    """One line of a merge's diagnostics, means over the layers."""
    means = report.means()
    parts = [f"merge {report.index + 1} after step {report.step + 1}: {report.seconds:.2f}s"]
    if "error_before" in means:
        parts.append(f"error {means['error_before']:.4f} -> {means['error_after']:.4f}")
    if "gradient_energy" in means:  # else no layer had a gradient
        parts.append(f"gradient energy kept {means['gradient_energy']:.3f}")
    if "subspace_overlap" in means:
        by_energy = f" ({means['energy_overlap']:.3f} by energy)" if "energy_overlap" in means else ""
        parts.append(f"overlap with the old subspace {means['subspace_overlap']:.3f}{by_energy}")
    if "update_survival" in means:
        parts.append(f"update that survived {means['update_survival']:.3f}")
    if report.kept:
        parts.append(f"{len(report.kept)} layers that no token reached stay as they are")
    return ", ".join(parts)


def start_line(report: StartReport) -> str:
    """One line on a start that makes up for quantization."""
    means = report.means()
    if not means:
        return "start: loqt.init asks for nothing here, since the base is stored exactly"
    return f"start: {report.seconds:.2f}s, error {means['error_before']:.4f} -> {means['error_after']:.4f}"


def eval_line(step: int, loss: float, losses: Mapping[str, float], tokens: int, bits: float) -> str:
    """One line of an evaluation: of all held-out tokens, and of each source's."""
    each = "".join(f"; {name} {value:.4f}" for name, value in losses.items())
    said = f"loss {loss:.4f}, perplexity {perplexity(loss):.3f}, {bits:.4f} bits a byte"
    return f"eval at step {step}: {said} ({tokens} tokens){each}"


def summary(run_dir: str, before: float, after: float) -> str:
    """How it ended, where the numbers are, how to look at them."""
    return "\n".join(
        [
            "",
            f"held-out perplexity  {format_perplexity(before)} before, {format_perplexity(after)} after training",
            f"metrics              {run_dir}/metrics.jsonl (settings: {run_dir}/config.yaml)",
            f"TensorBoard          tensorboard --logdir {run_dir}",
        ]
    )


def already_finished(run_dir: str, finished: Finished) -> str:
    """That there is nothing to do, how it had ended, and what else can be done."""
    before, after = finished.loss_before, finished.loss_after
    return "\n".join(
        [
            f"{run_dir} holds this run, finished after {finished.step} steps: held-out perplexity "
            f"{format_perplexity(before)} before, {format_perplexity(after)} after training; nothing is changed",
            "A larger train.steps trains it on, checkpoint.resume: never starts it anew, another train.run_dir "
            "leaves it as it is",
        ]
    )
