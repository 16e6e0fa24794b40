"""Every setting of a run, as frozen dataclasses.

A run is one `RunConfig`. It is read from YAML plus dotted overrides (`--loqt.rank 128`, see `cli.py`), checked here,
and saved as `config.yaml` in the run folder. Three rules keep it readable:

* a setting exists once, and its docstring line is what `--help` prints;
* an algorithm is picked by name (a `Literal`), never by a flag;
* a combination that cannot work raises `ValueError` naming the key and what to write instead, before anything is
  allocated.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Method = Literal["loqt", "full"]
Strategy = Literal["auto", "single", "ddp", "fsdp", "zero"]
Side = Literal["auto", "input", "output"]
SubspaceMethod = Literal["sketch", "randomized", "svd"]
QuantScheme = Literal["nf4", "nf4_double", "fp4", "int8", "none"]
StatePolicy = Literal["keep", "reset", "transport"]
GapSchedule = Literal["exponential", "linear", "constant"]
LowRankCompute = Literal["auto", "fold", "branch"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class SubspaceConfig:
    """How a projection P is taken from a layer's gradient at a merge.

    Args:
        method: sketch = one pass, no dense gradient ever exists (the default); randomized = randomized SVD of the dense
            gradient; svd = exact SVD of the dense gradient (the oracle).
        oversampling: Extra sketch columns as a fraction of the rank; 1.0 means l = 2 r. More keeps a little more of the
            gradient's energy; less saves time and memory on merge steps (each layer's sketch is F x l float32).
        power_iterations: Passes of the subspace iteration of `randomized`; more is closer to `svd`.
    """

    method: SubspaceMethod = "sketch"
    oversampling: float = 1.0
    power_iterations: int = 2

    def __post_init__(self) -> None:
        _require(self.oversampling >= 0.0, f"loqt.subspace.oversampling is {self.oversampling}; write 0.0 or more")
        _require(
            self.power_iterations >= 0, f"loqt.subspace.power_iterations is {self.power_iterations}; write 0 or more"
        )


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """When the factors are folded into the quantized base, and what happens to them then.

    Args:
        gap: T of the paper: the constant part of the number of steps between two merges.
        schedule: exponential = gap + floor(growth^i) (the paper); linear = gap + floor(growth · i); constant = gap.
        growth: ψ of the paper: how the gap grows with the number i of merges done.
        last_step_fraction: No merge after this fraction of the run, so that the last factors have time to settle.
        compensation_rounds: c of the paper: alternating rounds that fit B to the quantization error; 0 leaves B at
        zero. optimizer_state: What happens to B's Adam moments: transport = rotated into the new basis; reset = zeroed;
            keep = left as they are, in the old basis (what the published code does).
    """

    gap: int = 100
    schedule: GapSchedule = "exponential"
    growth: float = 1.2
    last_step_fraction: float = 1.0
    compensation_rounds: int = 5
    optimizer_state: StatePolicy = "transport"

    def __post_init__(self) -> None:
        _require(self.gap >= 1, f"loqt.merge.gap is {self.gap}; write 1 or more steps")
        _require(self.growth >= 0.0, f"loqt.merge.growth is {self.growth}; write 0 or more (the paper: 1.2)")
        _require(
            self.compensation_rounds >= 0,
            f"loqt.merge.compensation_rounds is {self.compensation_rounds}; write 0 or more (the paper: 5)",
        )
        _require(
            0.0 < self.last_step_fraction <= 1.0,
            f"loqt.merge.last_step_fraction is {self.last_step_fraction}; write a number in (0, 1]",
        )


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """How the frozen matrices are stored.

    Args:
        weight: Scheme of the base weight W: nf4; nf4_double = its scales are quantized too (0.36 bits a weight less);
            fp4; int8; none = kept in float32 (the paper's LoQT-nq).
        projection: Scheme of the projection P, one of the same.
        block_size: Values that share one scale.
    """

    weight: QuantScheme = "nf4"
    projection: QuantScheme = "nf4"
    block_size: int = 64

    def __post_init__(self) -> None:
        sizes = (32, 64, 128, 256, 512, 1024, 2048, 4096)
        _require(
            self.block_size in sizes,
            f"loqt.quantization.block_size is {self.block_size}; write one of {', '.join(map(str, sizes))}",
        )


@dataclass(frozen=True, kw_only=True)
class LoQTConfig:
    """The method (LoQT, NeurIPS 2024): which linears are low-rank, and how.

    Args:
        rank: r: columns of P and B. At most the smaller side of every converted layer.
        scale: s in W_eff = W_q + s · (low-rank product).
        side: Side of the gradient whose singular vectors form P: auto = the shorter one.
        target_modules: Name patterns (fnmatch) of the `nn.Linear` modules to convert.
        exclude_modules: Name patterns of linears left in full precision even if a target pattern matches.
        compute: How the forward pass applies the low-rank term: fold = into the dequantized weight; branch = beside
            it; auto = whichever costs fewer FLOPs.
        subspace: How P is found.
        merge: When to merge and how.
        quantization: How W and P are stored.
    """

    rank: int = 128
    scale: float = 0.5
    side: Side = "auto"
    target_modules: list[str] = field(default_factory=lambda: ["*"])
    exclude_modules: list[str] = field(default_factory=lambda: ["*lm_head*", "*embed_out*", "*score*"])
    compute: LowRankCompute = "auto"
    subspace: SubspaceConfig = field(default_factory=SubspaceConfig)
    merge: MergeConfig = field(default_factory=MergeConfig)
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)

    def __post_init__(self) -> None:
        _require(self.rank >= 1, f"loqt.rank is {self.rank}; write 1 or more")
        _require(self.scale > 0.0, f"loqt.scale is {self.scale}; write a positive number (the paper: 0.25 to 0.5)")
        _require(len(self.target_modules) > 0, "loqt.target_modules is empty; write ['*'] or use --method full")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which causal language model is trained.

    Args:
        preset: A LLaMA shape by name: llama_{nano,micro,tiny,60m,130m,350m,1b,7b,13b}. Ignored when `path` is set.
        path: Folder or Hugging Face id whose config.json (and, with `weights: pretrained`, weights) are used.
        weights: random = initialise from the seed; pretrained = load from `path`.
        overrides: Fields of the Hugging Face config to replace, e.g. {num_hidden_layers: 4}.
        dtype: Compute dtype. Parameters that train, and their optimizer states, stay in float32.
        activation_checkpointing: Recompute each transformer block in the backward pass instead of storing it.
        compile: Run each transformer block through torch.compile.
    """

    preset: str = "llama_tiny"
    path: str | None = None
    weights: Literal["random", "pretrained"] = "random"
    overrides: dict[str, Any] = field(default_factory=dict)
    dtype: Literal["float32", "bfloat16"] = "float32"
    activation_checkpointing: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        _require(
            not (self.weights == "pretrained" and self.path is None),
            "model.weights is 'pretrained' but model.path is not set; write model.path: FOLDER or a Hugging Face id",
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which text is read, and how it is cut into sequences.

    Args:
        files: Text (.txt), JSON lines (.jsonl, .json) or parquet files, globs allowed. Empty = `dataset`, or the
            embedded corpus.
        dataset: Hugging Face data set id (e.g. allenai/c4) or a folder of one; streamed.
        dataset_config: Its configuration name (e.g. en).
        split: Split of `dataset` that is trained on.
        eval_split: Split of `dataset` that is held out.
        text_field: Column of JSON, parquet or data-set rows that holds the text.
        tokenizer: bytes = one token a byte; bpe = a byte-level BPE trained on the corpus in seconds; else a folder or
            Hugging Face id for `AutoTokenizer`.
        bpe_vocab_size: Vocabulary of `tokenizer: bpe`.
        seq_len: Tokens per sequence that are predicted.
        eval_fraction: Share of the documents held out for evaluation (files and embedded corpus).
        max_eval_sequences: At most this many held-out sequences are scored.
        cache_dir: Where tokenized corpora are kept. Default: $XDG_CACHE_HOME/loqt_scale or ~/.cache/loqt_scale.
    """

    files: list[str] = field(default_factory=list)
    dataset: str | None = None
    dataset_config: str | None = None
    split: str = "train"
    eval_split: str = "validation"
    text_field: str = "text"
    tokenizer: str = "bytes"
    bpe_vocab_size: int = 4096
    seq_len: int = 256
    eval_fraction: float = 0.02
    max_eval_sequences: int = 256
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        _require(
            not (self.files and self.dataset),
            "data.files and data.dataset are both set; write one of them (the other as [] or null)",
        )
        _require(self.seq_len >= 2, f"data.seq_len is {self.seq_len}; write 2 or more tokens")
        _require(
            0.0 < self.eval_fraction < 1.0, f"data.eval_fraction is {self.eval_fraction}; write a number in (0, 1)"
        )
        _require(self.max_eval_sequences >= 1, f"data.max_eval_sequences is {self.max_eval_sequences}; write 1 or more")
        _require(
            not (self.tokenizer == "bpe" and self.dataset is not None),
            "data.tokenizer is 'bpe', which is trained on local text, but data.dataset is streamed; "
            "write data.tokenizer: FOLDER or a Hugging Face id, or 'bytes'",
        )
        _require(self.bpe_vocab_size >= 300, f"data.bpe_vocab_size is {self.bpe_vocab_size}; write 300 or more")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its learning-rate schedule.

    Args:
        lr: Peak learning rate of the factors B (of every converted linear under `--method full`).
        full_precision_lr: Peak rate of embeddings, norms, biases and head. Default: `lr`.
        betas: Adam's two decay rates.
        eps: Adam's epsilon.
        weight_decay: Decoupled weight decay.
        warmup_steps: Steps of linear warm-up.
        final_lr_fraction: The cosine ends at this fraction of the peak rate.
        clip_norm: Global gradient norm above which gradients are scaled down; 0 switches clipping off.
        max_skipped_steps: A step whose gradient is not finite is skipped; so many in a row end the run.
    """

    lr: float = 0.01
    full_precision_lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_steps: int = 0
    final_lr_fraction: float = 0.1
    clip_norm: float = 1.0
    max_skipped_steps: int = 5

    def __post_init__(self) -> None:
        _require(self.lr > 0.0, f"optim.lr is {self.lr}; write a positive number")
        _require(
            self.full_precision_lr is None or self.full_precision_lr > 0.0,
            f"optim.full_precision_lr is {self.full_precision_lr}; write a positive number, or null for optim.lr's",
        )
        _require(all(0.0 <= b < 1.0 for b in self.betas), f"optim.betas is {self.betas}; write two numbers in [0, 1)")
        _require(self.eps > 0.0, f"optim.eps is {self.eps}; write a positive number")
        _require(self.weight_decay >= 0.0, f"optim.weight_decay is {self.weight_decay}; write 0 or more")
        _require(self.warmup_steps >= 0, f"optim.warmup_steps is {self.warmup_steps}; write 0 or more")
        _require(self.max_skipped_steps >= 1, f"optim.max_skipped_steps is {self.max_skipped_steps}; write 1 or more")
        _require(self.clip_norm >= 0.0, f"optim.clip_norm is {self.clip_norm}; write 0 (off) or more")
        _require(
            0.0 <= self.final_lr_fraction <= 1.0,
            f"optim.final_lr_fraction is {self.final_lr_fraction}; write a number in [0, 1]",
        )


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the run is spread over ranks.

    Args:
        strategy: auto = fsdp under a launcher with several ranks, else single; single, ddp (everything replicated),
            fsdp (FSDP2: everything sharded), zero (DeepSpeed).
        reshard_after_forward: fsdp: free the gathered block between forward and backward (less memory, one more
            gather) or keep it.
        zero_stage: zero: 1 = optimizer states are sharded, 2 = gradients too, 3 = everything. Default: zero_config's,
            or 3.
        zero_config: zero: DeepSpeed JSON file with settings beyond ours; "auto" values are filled from ours. Default:
            none, all of them auto.
        zero_offload: zero: what is kept in host memory: none, optimizer = optimizer states, parameters = those and
            (stage 3) every parameter. Default: zero_config's, or none.
        zero_log_level: zero: least severe of DeepSpeed's own messages that reach the console.
        timeout_seconds: A collective that waits longer than this ends the run.
    """

    strategy: Strategy = "auto"
    reshard_after_forward: bool = True
    zero_stage: Literal[1, 2, 3] | None = None
    zero_config: str | None = None
    zero_offload: Literal["none", "optimizer", "parameters"] | None = None
    zero_log_level: Literal["error", "warning", "info", "debug"] = "error"
    timeout_seconds: int = 600

    def __post_init__(self) -> None:
        _require(self.timeout_seconds >= 1, f"parallel.timeout_seconds is {self.timeout_seconds}; write 1 or more")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop.

    Args:
        steps: Optimizer steps of the run.
        run_dir: Folder of this run's config, metrics and TensorBoard events.
        on_existing_run: What to do if run_dir already holds a run: refuse, or archive = move the old one aside.
        seed: Seed of initial weights, data order and sketches.
        device: auto = cuda if there is one, else cpu.
        global_batch_size: Sequences per optimizer step, over all ranks.
        micro_batch_size: Sequences per rank and forward pass; accumulation follows.
        eval_every: Evaluate on held-out text every so many steps; 0 = only before and after.
        log_every: Write metrics every so many steps.
        progress: Progress bar on rank 0: auto = only on a terminal.
        wire_counter: once = count the bytes of one normal step and one merge at the collectives; off.
    """

    steps: int = 1000
    run_dir: str = "runs/default"
    on_existing_run: Literal["refuse", "archive"] = "archive"
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    global_batch_size: int = 32
    micro_batch_size: int = 8
    eval_every: int = 0
    log_every: int = 1
    progress: Literal["auto", "on", "off"] = "auto"
    wire_counter: Literal["once", "off"] = "off"

    def __post_init__(self) -> None:
        for key in ("steps", "global_batch_size", "micro_batch_size", "log_every"):
            _require(getattr(self, key) >= 1, f"train.{key} is {getattr(self, key)}; write 1 or more")
        _require(self.eval_every >= 0, f"train.eval_every is {self.eval_every}; write 0 (only at the ends) or more")
        _require(self.seed >= 0, f"train.seed is {self.seed}; write 0 or more")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is kept of a run so that it can go on.

    Args:
        every: Save every so many steps (and at the end, and when the job is told to stop); 0 = only then.
        background: Write files while training goes on; only the copy to host memory holds it up.
        keep_last: Keep the newest so many checkpoints.
        keep_every: Keep also those whose step is a multiple of this, for good; 0 = none.
        resume: auto = go on from the newest checkpoint of an unfinished run in train.run_dir, if there is one; never =
            start anew; else a checkpoint's folder.
    """

    every: int = 1000
    background: bool = True
    keep_last: int = 2
    keep_every: int = 0
    resume: str = "auto"

    def __post_init__(self) -> None:
        for key in ("every", "keep_every"):
            value = getattr(self, key)
            _require(value >= 0, f"checkpoint.{key} is {value}; write 0 (off) or more steps")
        _require(self.keep_last >= 1, f"checkpoint.keep_last is {self.keep_last}; write 1 or more")
        _require(bool(self.resume), "checkpoint.resume is empty; write auto, never or a checkpoint's folder")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run.

    Args:
        method: loqt = low-rank factors over a quantized base; full = ordinary full-rank training of the same model.
        model: Which model.
        data: Which text.
        loqt: The method's settings (ignored under `--method full`).
        optim: Optimizer and schedule.
        parallel: How the run is spread over ranks.
        train: The loop.
        checkpoint: What is kept, and where it goes on.
    """

    method: Method = "loqt"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loqt: LoQTConfig = field(default_factory=LoQTConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        _require(
            self.optim.warmup_steps < self.train.steps,
            f"optim.warmup_steps ({self.optim.warmup_steps}) is not below train.steps ({self.train.steps}); "
            "write a shorter warm-up",
        )
