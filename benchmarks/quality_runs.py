"""What a run of benchmarks/quality.py is: a method, its rates and settings, a seed, and the scale that all share.

A variant of a method is a list of the product's own dotted settings, so whatever the product can do can be compared.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from importlib.util import find_spec
from typing import Any

from common import ROOT  # noqa: F401  (a checkout that is not installed works, too)

from loqt_scale.config import RunConfig
from loqt_scale.config.yaml import parse_run_config
from loqt_scale.errors import ConfigError

METHODS = {
    "adamw": "full-rank AdamW",
    "muon": "full-rank Muon (torch.optim.Muon; AdamW for embeddings, norms and head)",
    "galore": "GaLore (galore-torch)",
    "apollo": "APOLLO (apollo-torch)",
    "full": "the product's --method full, in whatever variant",
    "loqt": "the product's --method loqt",
}
PACKAGES = {"galore": "galore_torch", "apollo": "apollo_torch"}
FREE = {"loqt.rank", "model.dtype"}  # of a run's own settings, a variant may say otherwise
PLACED = {"data.files", "data.cache_dir", "model.compile", "train.run_dir", "train.device", "train.progress"}
RANKED = ("galore", "apollo", "loqt")  # methods that have a rank
# options of optimizers of other hands, as their authors recommend
OPTIONS: dict[str, dict[str, Any]] = {
    "muon": {"momentum": 0.95, "weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw", "nesterov": True, "ns_steps": 5},
    "galore": {"update_proj_gap": 200, "scale": 0.25, "proj_type": "std"},
    "apollo": {"update_proj_gap": 200, "scale": 1, "proj_type": "std", "proj": "random", "scale_type": "channel"},
}
OURS = {"optim.name", "optim.momentum", "optim.states", "optim.per_layer"}  # what the optimizers above do not read


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What runs that are compared have in common.

    Args:
        preset: Shape of the model.
        steps: Optimizer steps.
        batch: Sequences a step.
        rank: Of the methods that have one, unless a variant says otherwise.
        seq_len: Tokens of a sequence.
        dtype: Compute dtype.
    """

    preset: str
    steps: int
    batch: int
    rank: int
    seq_len: int = 256
    dtype: str = "float32"

    @property
    def title(self) -> str:
        """For people."""
        tokens = self.steps * self.batch * self.seq_len
        return f"{self.preset}, {tokens / 1e6:.3g} M tokens in {self.steps} steps of {self.batch} × {self.seq_len}"


SCALES = {
    "nano": Scale(preset="llama_nano", steps=1100, batch=8, rank=16),
    "micro": Scale(preset="llama_micro", steps=1100, batch=32, rank=32),  # rank: a quarter of the hidden size
    "tiny": Scale(preset="llama_tiny", steps=1500, batch=128, rank=64),
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run.

    Args:
        method: One of `METHODS`.
        scale: Shape, tokens, dtype.
        lr: Peak rate of the linears (of their factors).
        rest: Peak rate of embeddings, norms and head.
        seed: Of weights, data order and sketches.
        variant: (dotted setting, value) pairs, sorted; `METHOD.option` of a method that is not ours goes to its
            optimizer.
    """

    method: str
    scale: Scale
    lr: float
    rest: float
    seed: int = 0
    variant: tuple[tuple[str, str], ...] = ()

    @property
    def family(self) -> tuple[str, tuple[tuple[str, str], ...]]:
        """What is compared: the method in its variant, whatever its rates and seed."""
        return self.method, self.variant

    @property
    def label(self) -> str:
        """For people: method and variant."""
        return label_of(self.family)

    @property
    def words(self) -> str:
        """As `--run` takes it."""
        return f"{self.label} lr={self.lr:g} rest={self.rest:g} seed={self.seed}"

    @property
    def settings(self) -> dict[str, str]:
        """Dotted settings of the product that decide the result, but for the text."""
        scale = self.scale
        settings = {
            "method": "loqt" if self.method == "loqt" else "full",
            "model.preset": scale.preset,
            "model.dtype": scale.dtype,
            "data.tokenizer": "bytes",
            "data.seq_len": scale.seq_len,
            "data.max_eval_sequences": 256,
            "optim.lr": self.lr,
            "optim.full_precision_lr": self.rest,
            "optim.warmup_steps": scale.steps // 10,
            "train.steps": scale.steps,
            "train.global_batch_size": scale.batch,
            "train.micro_batch_size": scale.batch,
            "train.seed": self.seed,
            "parallel.strategy": "single",
        }
        if self.method in RANKED:
            settings["loqt.rank"] = scale.rank
        own = {key: value for key, value in self.variant if not self._is_option(key)}
        return {key: str(value) for key, value in (settings | own).items()}

    @property
    def options(self) -> dict[str, Any]:
        """What the variant asks of an optimizer that is not ours."""
        return {key.partition(".")[2]: _value(value) for key, value in self.variant if self._is_option(key)}

    def _is_option(self, key: str) -> bool:
        return self.method in OPTIONS and key.startswith(f"{self.method}.")

    def reads(self, key: str) -> bool:
        """Whether a setting of its variant changes anything; if not, its result would have another one's name."""
        if self._is_option(key):
            return key.partition(".")[2] in OPTIONS[self.method]
        if key.startswith("loqt."):
            return self.method == "loqt" or (key == "loqt.rank" and self.method in RANKED)
        if key == "optim.momentum" and dict(self.variant).get("optim.name") != "muon":
            return False
        return key not in (OURS if self.method in OPTIONS else {"optim.name"} if self.method == "adamw" else ())

    def config(self, *more: str) -> RunConfig:
        """The product's settings.

        Args:
            more: Words that do not decide the result: paths, device.

        Raises:
            ConfigError: The product does not know them, or they do not go together.
        """
        return parse_run_config([f"--{key}={value}" for key, value in self.settings.items()] + list(more))

    def key(self, text: str) -> str:
        """The same for the same run on the same text, and for no other."""
        return json.dumps([self.facts(), text], sort_keys=True)

    def facts(self) -> dict[str, Any]:
        """As a results file has it; `run_of` reads it."""
        own = {"method": self.method, "variant": dict(self.variant), "lr": self.lr, "full_precision_lr": self.rest}
        return own | {"seed": self.seed, **asdict(self.scale)}


@dataclass(frozen=True)
class Place:
    """Where runs are done; none of it decides a result (the text does, and is known by its content).

    Args:
        files: Text files; none: the embedded corpus.
        device: auto, cpu or cuda.
        threads: Of a process.
        jobs: Processes beside one another.
        compile: Whether blocks are compiled: faster, and other last bits.
        cache_dir: Of tokenized text; None: the product's own.
        commit: Of the code.
    """

    files: tuple[str, ...] = ()
    device: str = "auto"
    threads: int = 1
    jobs: int = 1
    compile: bool = False
    cache_dir: str | None = None
    commit: str = "unknown"

    def config(self, run: Run, folder: str = "unused") -> RunConfig:
        """A run's settings here."""
        words = [f"--train.device={self.device}", f"--train.run_dir={folder}", "--train.progress=off"]
        words += ["--data.files", *self.files] if self.files else []
        words += [f"--data.cache_dir={self.cache_dir}"] if self.cache_dir else []
        words += ["--model.compile=true"] if self.compile else []
        return run.config(*words)


def run_of(facts: dict[str, Any]) -> Run:
    """The run that a line of a results file is of."""
    scale = Scale(**{item.name: facts[item.name] for item in fields(Scale)})
    return Run(
        method=facts["method"],
        scale=scale,
        lr=facts["lr"],
        rest=facts["full_precision_lr"],
        seed=facts["seed"],
        variant=variant_of(facts["variant"], scale),
    )


def variant_of(settings: dict[str, Any], scale: Scale) -> tuple[tuple[str, str], ...]:
    """A variant in its one form: sorted, without what is the scale's anyway."""
    own = {key: str(value) for key, value in settings.items()}
    if own.get("loqt.rank") == str(scale.rank):
        del own["loqt.rank"]
    return tuple(sorted(own.items()))


def label_of(family: tuple[str, tuple[tuple[str, str], ...]]) -> str:
    """Method and variant, as `--run` takes them."""
    method, variant = family
    return " ".join([method, *(f"{key}={value}" for key, value in variant)])


def parse_run(text: str, scale: Scale) -> Run:
    """Reads "loqt lr=5e-3 rest=5e-3 seed=1 loqt.rank=64 optim.name=muon".

    Raises:
        ConfigError: It is not of that form.
    """
    method, *words = text.split() or [""]
    if method not in METHODS:
        raise ConfigError(f"--run '{text}' begins with no method; write one of {', '.join(METHODS)}")
    pairs = dict(word.split("=", 1) for word in words if "=" in word)
    if len(pairs) != len(words) or "lr" not in pairs:
        raise ConfigError(
            f"--run '{text}' is not understood; write METHOD lr=RATE [rest=RATE] [seed=N] [KEY=VALUE ...]"
        )
    try:
        lr, rest, seed = float(pairs.pop("lr")), float(pairs.pop("rest", "5e-3")), int(pairs.pop("seed", "0"))
    except ValueError as error:
        raise ConfigError(f"--run '{text}': {error}; write numbers for lr, rest and seed") from None
    run = Run(method=method, scale=scale, lr=lr, rest=rest, seed=seed)
    decided = set(run.settings) - FREE | PLACED | {key for key in pairs if key.startswith("data.")}
    if fixed := sorted(set(pairs) & decided):
        raise ConfigError(f"--run '{text}' sets {fixed[0]}, which lr, rest, seed and the scale's options decide")
    return checked(replace(run, variant=variant_of(pairs, scale)))


def checked(run: Run) -> Run:
    """The run, if it can be done here.

    Raises:
        ConfigError: A setting is unknown or does not fit, or a package is missing.
    """
    package = PACKAGES.get(run.method)
    if package is not None and find_spec(package) is None:
        name = package.replace("_", "-")
        raise ConfigError(f"{name} is not installed, so there is no {run.method}; write pip install {name}")
    run.config()
    if unread := [key for key, _ in run.variant if not run.reads(key)]:
        own = f"{', '.join(f'{run.method}.{name}' for name in OPTIONS[run.method])}, " if run.method in OPTIONS else ""
        raise ConfigError(
            f"{run.label}: {run.method} does not read {unread[0]}, so it would be measured under a wrong name; write "
            f"{own}full or loqt with optim.name=muon, or leave it out"
        )
    return run


def with_seed(run: Run, seed: int) -> Run:
    """The same run from another seed."""
    return replace(run, seed=seed)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
