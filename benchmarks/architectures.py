"""Small models of many architectures of transformers: converted, trained for three steps with merges, made dense again.

    python benchmarks/architectures.py [NAME ...] [--table docs/architectures.md]

Each model has random weights and small widths. A row says how much of it became low-rank (embeddings weigh more here
than in a model of full size), what was left, and whether the dense copy computes what the trained model does.
"""

from __future__ import annotations

import argparse
import datetime
import subprocess
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING

from loqt_scale import LoQTConfig, MergeConfig, MergeCoordinator, convert_to_loqt, to_dense

STEPS, RANK, TOLERANCE = 3, 4, 1e-4
_SIZES = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 2),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "emb_dim", "embedding_size", "dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "decoder_ffn_dim", "encoder_ffn_dim", "hidden_dim"), 96),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 96),
    **{"head_dim": 32, "d_kv": 32, "vocab_size": 320, "image_size": 32, "patch_size": 8},
}


@dataclass(frozen=True)
class Architecture:
    """One model of the sweep.

    Args:
        name: transformers' `model_type`.
        family: For the table.
        auto: Its Auto class.
        settings: Fields of its config beside the small sizes.
    """

    name: str
    family: str
    auto: str
    settings: dict[str, Any]

    def build(self) -> Any:
        """The model, with random weights, in evaluation mode (no dropout)."""
        torch.manual_seed(0)
        kind = CONFIG_MAPPING[self.name]
        known = kind().to_dict()
        ends = {key: None for key in known if key.endswith("_token_id")} | {"pad_token_id": 0}
        if "decoder_start_token_id" in known or self.family == "encoder-decoder":
            ends |= {"decoder_start_token_id": 1, "eos_token_id": 2}
        sizes = {key: value for key, value in _SIZES.items() if known.get(key) is not None}
        config = kind(**{**ends, **sizes, **self.settings})
        return getattr(transformers, self.auto).from_config(config).eval()

    def inputs(self, step: int) -> dict[str, Tensor]:
        """A batch."""
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(3, 200, (2, 12), generator=generator)
        if self.family == "vision":
            return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
        if self.name == "whisper":
            features = torch.randn(2, 80, 3000, generator=generator)
            return {"input_features": features, "decoder_input_ids": tokens}
        if self.family == "audio":
            return {"input_values": torch.randn(2, 1600, generator=generator)}
        if self.family == "encoder-decoder":
            return {"input_ids": tokens, "decoder_input_ids": tokens.flip(1)}
        if self.name == "clip":
            return {"input_ids": tokens, "pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
        return {"input_ids": tokens}


def _all(family: str, auto: str, names: str, **settings: dict[str, Any]) -> list[Architecture]:
    return [Architecture(name, family, auto, settings.get(name.replace("-", "_"), {})) for name in names.split()]


ARCHITECTURES: list[Architecture] = [
    *_all(
        "causal",
        "AutoModelForCausalLM",
        "llama mistral qwen2 qwen3 gemma gemma2 phi phi3 granite cohere olmo2 starcoder2 stablelm gpt2 gpt_neo "
        "gpt_neox gptj codegen opt bloom falcon mpt mamba mamba2 rwkv jamba",
        gpt_neo={"attention_types": [[["global", "local"], 1]]},
        gptj={"rotary_dim": 8},
        codegen={"rotary_dim": 8},
        opt={"word_embed_proj_dim": 64},
        mamba2={"num_heads": 8, "head_dim": 16, "n_groups": 1, "state_size": 16},
        mamba={"state_size": 8},
        jamba={"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
        rwkv={"attention_hidden_size": 64, "intermediate_size": 96, "rescale_every": 0, "use_cache": False},
    ),
    *_all(
        "mixture of experts",
        "AutoModelForCausalLM",
        "mixtral qwen2_moe qwen3_moe olmoe gpt_oss deepseek_v3",
        **{name: {"num_experts_per_tok": 2} for name in ("qwen3_moe", "olmoe")},
        deepseek_v3={
            "head_dim": 16,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 16,
            "v_head_dim": 32,
        },
    ),
    *_all(
        "encoder",
        "AutoModelForMaskedLM",
        "bert roberta electra distilbert deberta-v2 albert modernbert xlm",
        roberta={"pad_token_id": 1},
        modernbert={"global_attn_every_n_layers": 2},
    ),
    *_all("encoder-decoder", "AutoModelForSeq2SeqLM", "t5 bart pegasus marian"),
    *_all(
        "vision",
        "AutoModelForImageClassification",
        "vit deit dinov2 swin convnext",
        deit={"architectures": ["DeiTForImageClassification"]},  # the Auto class has two
        swin={"embed_dim": 32, "depths": [1, 1], "num_heads": [2, 2], "patch_size": 4, "window_size": 4},
        convnext={"hidden_sizes": [32, 64], "depths": [1, 1], "num_stages": 2},
    ),
    *_all(
        "audio",
        "AutoModel",
        "wav2vec2 hubert whisper",
        **{key: {"num_conv_pos_embedding_groups": 4, "conv_dim": [32] * 7} for key in ("wav2vec2", "hubert")},
    ),
    *_all(
        "text and image",
        "AutoModel",
        "clip",
        clip={
            "text_config": {key: value for key, value in _SIZES.items() if key in ("hidden_size", "vocab_size")}
            | {"intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2, "eos_token_id": 2},
            "vision_config": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
            | {"num_attention_heads": 2, "image_size": 32, "patch_size": 8},
        },
    ),
]


@dataclass(frozen=True)
class Result:
    """What became of one architecture.

    Args:
        architecture: Which.
        share: Of the parameters that became low-rank.
        layers: How many layers.
        left: The two largest reasons for which the rest was left, with their shares.
        difference: Largest of the dense copy's output, relative to the output's largest.
        kept: Layers that no token reached in the last merge.
    """

    architecture: Architecture
    share: float
    layers: int
    left: str
    difference: float
    kept: int


def try_one(architecture: Architecture) -> Result:
    """Converts, takes three steps with a merge after each, goes back dense; whatever fails raises."""
    model = architecture.build()
    config = LoQTConfig(rank=RANK, merge=MergeConfig(gap=1, schedule="constant"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = convert_to_loqt(model, config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    merges = MergeCoordinator(model, optimizer, config, total_steps=STEPS)
    merged = None
    for step in range(STEPS):
        merges.prepare(step)
        _output(model, architecture.inputs(step)).square().mean().backward()
        optimizer.step()
        merged = merges.finish(step)
        optimizer.zero_grad()
    _refuse_idle(model, merged)
    with torch.no_grad():
        inputs = architecture.inputs(STEPS)
        ours, dense = _output(model, inputs), _output(to_dense(model), inputs)
    difference = float((ours - dense).abs().max() / ours.abs().max())
    if not difference < TOLERANCE:
        raise AssertionError(f"the dense copy's output differs by {difference:.1e}")
    reasons = [
        f"{why} {sum(item.values for item in left) / report.values:.0%}"
        for why, left in list(report.reasons().items())[:2]
    ]
    kept = len(merged.kept) if merged else 0
    return Result(architecture, report.share, len(report), "; ".join(reasons), difference, kept)


def _refuse_idle(model: nn.Module, merged: Any) -> None:
    """A layer that a merge has reached has moved, or something reads past it."""
    kept = set() if merged is None else set(merged.kept)
    idle = [
        name
        for name, layer in model.named_modules()
        if hasattr(layer, "factor") and hasattr(layer, "merged_parameters") and name not in kept
        if not bool(layer.factor.any())
    ]
    if idle:
        raise AssertionError(f"{len(idle)} layers have not trained, e.g. {idle[0]}")


def _output(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The first floating-point tensor of what a model returns."""
    values = model(**inputs)
    for name in ("logits", "last_hidden_state", "logits_per_image"):
        if getattr(values, name, None) is not None:
            found: Tensor = getattr(values, name)
            return found.float()
    raise AssertionError(f"{type(model).__name__} returns none of the outputs that are looked for")


def rows(architectures: Iterable[Architecture], tell: Callable[[str], None] = print) -> list[str]:
    """The table's lines; each is told as soon as it is there."""
    lines = ["| model | family | low-rank | layers | left, largest first | dense copy |", "|---|---|---|---|---|---|"]
    for architecture in architectures:
        start = f"| {architecture.name} | {architecture.family} |"
        try:
            result = try_one(architecture)
            line = f"{start} {result.share:.0%} | {result.layers} | {result.left} | {result.difference:.0e} |"
        except Exception as error:  # a row of its own
            line = f"{start} | | {type(error).__name__}: {' '.join(str(error).split())[:150]} | fails |"
        lines.append(line)
        tell(line)
    return lines


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*")
    parser.add_argument("--table", type=Path)
    chosen = parser.parse_args()
    transformers.logging.set_verbosity_error()
    table = rows([one for one in ARCHITECTURES if not chosen.names or one.name in chosen.names])
    if chosen.table is not None:
        chosen.table.write_text("\n".join([*_heading(), *table, ""]), encoding="utf-8")


def _heading() -> list[str]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    today = datetime.date.today().isoformat()
    return [
        "# Architectures",
        "",
        f"`python benchmarks/architectures.py --table docs/architectures.md`, {today}, commit {commit}, transformers "
        f"{transformers.__version__}, torch {torch.__version__}. Small random models (width 64, two layers, vocabulary "
        f"320, rank {RANK}): converted, {STEPS} steps of AdamW with a merge after each, made dense again. *Low-rank*: "
        "share of the parameters; embeddings weigh more here than in a model of full size. *Dense copy*: largest "
        "difference of its output, relative to the output's largest.",
        "",
    ]


if __name__ == "__main__":
    main()
