"""The groups of settings around the method: model, optimizer, ranks, loop, checkpoints. The text: `data`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from loqt_scale.config.check import MANY, PATH, check_values, require
from loqt_scale.config.choices import (
    Device,
    Dtype,
    Kept,
    Offload,
    OnExisting,
    OptimizerName,
    OptimizerStates,
    ProgressMode,
    RateSchedule,
    ZeroOffload,
    ZeroStage,
)
from loqt_scale.config.metrics import ProfileConfig

_STEPS = 99_999_999  # a checkpoint's name holds eight digits
_YEAR = 365 * 24 * 3600


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which causal language model is trained.

    Args:
        preset: A LLaMA shape by name: llama_{nano,micro,tiny,60m,130m,350m,1b,7b,13b}. Ignored when `path` is set.
        path: Folder or Hugging Face id whose config.json (and, with `weights: pretrained`, weights) are used.
        weights: random = initialise from the seed; pretrained = load from `path`.
        overrides: Fields of the Hugging Face config to replace, e.g. {num_hidden_layers: 4}.
        dtype: Compute dtype.
        trained_dtype: Dtype in which what trains is kept. bfloat16 halves it and its gradients (but the sums of
            several micro-batches, which stay float32); updates are then rounded at random, so that small ones are not
            lost (it needs dtype: bfloat16; not under zero).
        activation_checkpointing: Recompute each transformer block in the backward pass instead of storing it.
        compile: Run each transformer block through torch.compile.
        loss_chunk_tokens: Tokens whose logits are held at a time, while the loss is taken by chunks (of architectures
            whose head is known). 0: all of a pass. Default: as many as fill 256 MiB.
    """

    preset: str = "llama_tiny"
    path: str | None = field(default=None, metadata=PATH)
    weights: Literal["random", "pretrained"] = "random"
    overrides: dict[str, Any] = field(default_factory=dict)
    dtype: Dtype = "float32"
    trained_dtype: Dtype = "float32"
    activation_checkpointing: bool = False
    compile: bool = False
    loss_chunk_tokens: int | None = None

    def __post_init__(self) -> None:
        check_values(self, "model")
        require(
            self.loss_chunk_tokens is None or 0 <= self.loss_chunk_tokens <= MANY,
            f"model.loss_chunk_tokens is {self.loss_chunk_tokens}; write 0 to {MANY} tokens, or null",
        )
        require(
            not (self.weights == "pretrained" and self.path is None),
            "model.weights is 'pretrained' but model.path is not set; write model.path: FOLDER or a Hugging Face id",
        )
        require(
            self.dtype == "bfloat16" or self.trained_dtype == "float32",
            f"model.trained_dtype is {self.trained_dtype}, but model.dtype is not; write model.dtype: bfloat16",
        )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer and its learning-rate schedule.

    Args:
        name: adamw, or muon = Muon's spectral step for the factors B (of every converted linear under `method: full`),
            which keeps one moment instead of two, and AdamW for the rest.
        momentum: Muon's momentum.
        lr: Peak learning rate of the factors B (of every converted linear under `method: full`).
        full_precision_lr: Peak rate of embeddings, norms, biases and head. Default: `lr`.
        betas: Adam's two decay rates.
        eps: Adam's epsilon.
        weight_decay: Decoupled weight decay.
        states: How the moments are kept: float32, or int8 = 8-bit codes (a quarter of the memory), under every
            strategy.
        per_layer: Each parameter is updated inside the backward pass and its gradient freed at once: gradients never
            pile up. One micro-batch a step, without clipping to a global norm; not under ddp or zero.
        compile: One kernel, made by torch.compile, for the update of a part of a parameter, where updates are streamed
            (`states: int8`, `per_layer`, `model.trained_dtype: bfloat16`, `name: muon`).
        schedule: What the rates do after the warm-up: cosine or linear = down to the end; wsd = stay at the peak, and
            come down in the last part of the run (a run can be made longer from before that); constant = stay.
        decay_fraction: wsd: share of the run's steps in which the rates come down.
        warmup_steps: Steps of linear warm-up. A run that is no longer than this warms up for a tenth of its steps.
        warmup_fraction: The same as a share of the run's steps; either this or `warmup_steps`. Default of both: none.
        final_lr_fraction: The schedule ends at this fraction of the peak rate.
        clip_norm: Global gradient norm above which gradients are scaled down; 0 switches clipping off.
        max_skipped_steps: A step whose gradient is not finite is skipped; so many in a row end the run.
    """

    name: OptimizerName = "adamw"
    momentum: float = 0.95
    lr: float = 0.01
    full_precision_lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    states: OptimizerStates = "float32"
    per_layer: bool = False
    compile: bool = False
    schedule: RateSchedule = "cosine"
    decay_fraction: float = 0.2
    warmup_steps: int | None = None
    warmup_fraction: float | None = None
    final_lr_fraction: float = 0.1
    clip_norm: float = 1.0
    max_skipped_steps: int = 5

    def __post_init__(self) -> None:
        check_values(self, "optim")
        require(self.lr > 0.0, f"optim.lr is {self.lr}; write a positive number")
        require(
            self.full_precision_lr is None or self.full_precision_lr > 0.0,
            f"optim.full_precision_lr is {self.full_precision_lr}; write a positive number, or null for optim.lr's",
        )
        require(all(0.0 <= b < 1.0 for b in self.betas), f"optim.betas is {self.betas}; write two numbers in [0, 1)")
        require(0.0 <= self.momentum < 1.0, f"optim.momentum is {self.momentum}; write a number in [0, 1)")
        require(self.eps > 0.0, f"optim.eps is {self.eps}; write a positive number")
        require(self.weight_decay >= 0.0, f"optim.weight_decay is {self.weight_decay}; write 0 or more")
        self._check_schedule()
        require(self.max_skipped_steps >= 1, f"optim.max_skipped_steps is {self.max_skipped_steps}; write 1 or more")
        require(self.clip_norm >= 0.0, f"optim.clip_norm is {self.clip_norm}; write 0 (off) or more")
        require(
            not self.per_layer or self.clip_norm == 0.0,
            f"optim.per_layer is true, but optim.clip_norm is {self.clip_norm}: the global norm is known only when all "
            "gradients are; write optim.clip_norm: 0, or optim.per_layer: false",
        )

    def _check_schedule(self) -> None:
        steps, fraction, decay, final = (
            self.warmup_steps,
            self.warmup_fraction,
            self.decay_fraction,
            self.final_lr_fraction,
        )
        require(steps is None or steps >= 0, f"optim.warmup_steps is {steps}; write 0 or more")
        require(
            fraction is None or 0.0 <= fraction < 1.0, f"optim.warmup_fraction is {fraction}; write a number in [0, 1)"
        )
        require(
            steps is None or fraction is None,
            f"optim.warmup_steps is {steps} and optim.warmup_fraction is {fraction}; write one of them, and the other "
            "as null",
        )
        require(0.0 < decay <= 1.0, f"optim.decay_fraction is {decay}; write a number in (0, 1]")
        require(0.0 <= final <= 1.0, f"optim.final_lr_fraction is {final}; write a number in [0, 1]")
        require(
            self.schedule != "wsd" or (fraction or 0.0) + decay <= 1.0,
            f"optim.warmup_fraction {fraction} and optim.decay_fraction {decay} are more than the whole run; write two "
            "numbers that add up to 1 or less",
        )

    def warmup_of(self, total_steps: int) -> int:
        """Steps of warm-up of a run of so many steps: a tenth of them if `warmup_steps` is as many or more."""
        if self.warmup_fraction is not None:
            return round(self.warmup_fraction * total_steps)
        steps = self.warmup_steps or 0
        return steps if steps < total_steps else total_steps // 10


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the run is spread over ranks.

    Args:
        strategy: auto = fsdp under a launcher with several ranks, else single; single, ddp (everything replicated),
            fsdp (FSDP2: everything sharded), zero (DeepSpeed); or another package's (docs/strategies.md).
        options: Settings of another package's strategy, by their names.
        reshard_after_forward: fsdp: free the gathered block between forward and backward (less memory, one more
            gather) or keep it.
        shard_size: fsdp: ranks that together store the model once; the others hold copies of it (HSDP). Write the GPUs
            of a node: then weights are gathered inside of nodes, and only summed gradients travel between them.
            Default: all ranks.
        kept_between_passes: fsdp: what each rank keeps unsharded between the micro-batches of one step. nothing =
            gradients are reduced after every micro-batch (least memory); gradients = they are kept and reduced after
            the last one; trained = B, embeddings and head, too, are gathered once a step and kept (fewest bytes sent).
        offload: single: what waits in host memory while it is not used: none, base = packed W and P, optimizer = what
            trains with its states (the host then updates it), all.
        zero_stage: zero: 1 = optimizer states are sharded, 2 = gradients too, 3 = everything. Default: zero_config's,
            or 3.
        zero_config: zero: DeepSpeed JSON file with settings beyond ours; "auto" values are filled from ours. Default:
            none, all of them auto.
        zero_offload: zero: what is kept in host memory: none, optimizer = optimizer states, parameters = those and
            (stage 3) every parameter. Default: zero_config's, or none.
        zero_log_level: zero: least severe of DeepSpeed's own messages that reach the console.
        timeout_seconds: A collective that waits longer than this ends the run.
    """

    strategy: str = "auto"
    options: dict[str, Any] = field(default_factory=dict)
    reshard_after_forward: bool = True
    shard_size: int | None = None
    kept_between_passes: Kept = "gradients"
    offload: Offload = "none"
    zero_stage: ZeroStage | None = None
    zero_config: str | None = field(default=None, metadata=PATH)
    zero_offload: ZeroOffload | None = None
    zero_log_level: Literal["error", "warning", "info", "debug"] = "error"
    timeout_seconds: int = 600

    def __post_init__(self) -> None:
        check_values(self, "parallel")
        seconds = self.timeout_seconds
        require(1 <= seconds <= _YEAR, f"parallel.timeout_seconds is {seconds}; write 1 to {_YEAR} (a year)")
        if self.strategy != "auto":
            self.check_offload(self.strategy)
        self._check_shard_size()

    def _check_shard_size(self) -> None:
        if self.shard_size is None:
            return
        require(
            self.strategy in ("auto", "fsdp"),
            f"parallel.shard_size is {self.shard_size}, but parallel.strategy is '{self.strategy}'; write "
            "parallel.strategy: fsdp, or leave parallel.shard_size out",
        )
        require(
            self.shard_size >= 2,
            f"parallel.shard_size is {self.shard_size}; write 2 or more, or parallel.strategy: ddp to shard nothing",
        )

    def check_offload(self, strategy: str) -> None:
        """Raises ConfigError unless the strategy, which `auto` has been settled to, can offload as asked."""
        instead = "parallel.zero_offload" if strategy == "zero" else "parallel.strategy: zero and its zero_offload"
        require(
            self.offload == "none" or strategy == "single",
            f"parallel.offload is '{self.offload}', which is for one device, but the strategy is '{strategy}'; "
            f"write {instead}, or parallel.offload: none",
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop.

    Args:
        steps: Optimizer steps of the run. More than before: it is trained on, finished or not.
        run_dir: Folder of this run's config, metrics and TensorBoard events.
        on_existing_run: What to do if run_dir holds a run that is not gone on with: refuse, or archive = move it aside.
        seed: Seed of initial weights, data order and sketches.
        device: auto = cuda if there is one, else cpu.
        global_batch_size: Sequences per optimizer step, over all ranks.
        micro_batch_size: Sequences per rank and forward pass; accumulation follows.
        eval_every: Evaluate on held-out text every so many steps; 0 = only before and after.
        log_every: Write metrics every so many steps.
        progress: Progress bar on rank 0: auto = only on a terminal.
        wire_counter: once = count the bytes of one normal step and one merge at the collectives; off.
        peak_tflops: TFLOP/s of one device in the compute dtype, of which perf/mfu is a share. Default: by its name, if
            known.
        profile: Steps that torch.profiler records.
    """

    steps: int = 1000
    run_dir: str = field(default="runs/default", metadata=PATH)
    on_existing_run: OnExisting = "archive"
    seed: int = 0
    device: Device = "auto"
    global_batch_size: int = 32
    micro_batch_size: int = 8
    eval_every: int = 0
    log_every: int = 1
    progress: ProgressMode = "auto"
    wire_counter: Literal["once", "off"] = "off"
    peak_tflops: float | None = None
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    def __post_init__(self) -> None:
        check_values(self, "train")
        most = {"steps": _STEPS, "global_batch_size": MANY, "micro_batch_size": MANY, "log_every": _STEPS}
        for key, limit in most.items():
            value = getattr(self, key)
            require(value >= 1, f"train.{key} is {value}; write 1 or more")
            require(value <= limit, f"train.{key} is {value}; write {limit} or less")
        require(self.eval_every >= 0, f"train.eval_every is {self.eval_every}; write 0 (only at the ends) or more")
        peak = self.peak_tflops
        require(peak is None or peak > 0.0, f"train.peak_tflops is {peak}; write a positive number, or null")
        self.profile.check_within(self.steps)
        require(self.seed >= 0, f"train.seed is {self.seed}; write 0 or more")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is kept of a run so that it can go on.

    Args:
        every: Save every so many steps (and at the end, and when the job is told to stop); 0 = only then.
        background: Write files while training goes on; only the copy to host memory holds it up.
        keep_last: Keep the newest so many checkpoints (and that of the step at which optim.schedule: wsd begins to
            decay, from which the run can be made longer).
        keep_every: Keep also those whose step is a multiple of this, for good; 0 = none.
        resume: auto = go on with the run in train.run_dir, if there is one; never = start anew; else a checkpoint's
            folder, from which the run begins (what train.run_dir holds that came of it goes first).
    """

    every: int = 1000
    background: bool = True
    keep_last: int = 2
    keep_every: int = 0
    resume: str = field(default="auto", metadata=PATH)

    def __post_init__(self) -> None:
        check_values(self, "checkpoint")
        for key in ("every", "keep_every"):
            value = getattr(self, key)
            require(value >= 0, f"checkpoint.{key} is {value}; write 0 (off) or more steps")
        require(self.keep_last >= 1, f"checkpoint.keep_last is {self.keep_last}; write 1 or more")
