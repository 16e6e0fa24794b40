"""What the logits of a large vocabulary cost: a pass's peak of memory and time, with the loss by chunks and without.

Each case is a process of its own, whose highest resident size is read after a pass of 512 tokens and after a longer
one. The gradients of both ways are compared.

    python benchmarks/loss.py                         # llama_nano and llama_60m, 131,072 tokens of vocabulary
    python benchmarks/loss.py --presets llama_nano --tokens 1024
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import torch
from common import ROOT, publish, table

sys.path.insert(0, str(ROOT))

from loqt_scale.config import ModelConfig
from loqt_scale.config.yaml import parse_run_config
from loqt_scale.model.architectures import load_model_config
from loqt_scale.model.buffers import init_buffers
from loqt_scale.model.loss import end_in_loss
from loqt_scale.model.structure import build_meta_model
from loqt_scale.plan import plan_run

WAYS = {"all logits at once": 0, "by chunks": None}
FEW = 512
HEADER = ["shape", "loss", "tokens a pass", "peak above the weights, MiB", f"growth from {FEW} tokens, MiB", "seconds"]
MIB = 2**20


def model_of(preset: str, vocab: int, chunk: int | None) -> torch.nn.Module:
    """The model in float32, random weights, whose forward pass ends in the loss."""
    config = load_model_config(ModelConfig(preset=preset), vocab_size=vocab, seq_len=512)
    model = build_meta_model(config)
    end_in_loss(model, chunk=chunk)
    model.to_empty(device="cpu")
    init_buffers(model, torch.device("cpu"))
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model


def take_pass(model: torch.nn.Module, tokens: int, vocab: int) -> float:
    """Forward and backward over sequences of 512 tokens; returns the seconds."""
    torch.manual_seed(1)
    ids = torch.randint(0, vocab, (tokens // FEW, FEW))
    model.zero_grad()
    began = time.perf_counter()
    (model(input_ids=ids, targets=ids.roll(-1, 1)) / tokens).backward()
    return time.perf_counter() - began


def measure(preset: str, vocab: int, tokens: int, chunk: int | None) -> dict[str, float]:
    """Peaks of this process above what it held with the weights, in bytes."""
    model = model_of(preset, vocab, chunk)
    held = peak()
    take_pass(model, FEW, vocab)
    few = peak() - held
    seconds = take_pass(model, tokens, vocab)
    return {"few": few, "many": peak() - held, "seconds": seconds}


def peak() -> int:
    """Highest resident size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def largest_difference(vocab: int) -> float:
    """Of gradients, both ways, relative to each parameter's largest."""
    gradients = []
    for chunk in (0, 100):
        model = model_of("llama_nano", vocab, chunk)
        take_pass(model, FEW, vocab)
        gradients.append([parameter.grad for parameter in model.parameters()])
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*gradients, strict=True))


def planned_rows() -> list[list[str]]:
    """What `loqt-scale plan` says of 8 x 2048 tokens a pass at 7b on 8 ranks."""
    rows = []
    for way, chunk in WAYS.items():
        words = [f"--config={ROOT / 'configs' / 'llama_7b.yaml'}", "--data.seq_len=2048", "--train.micro_batch_size=8"]
        config = parse_run_config([*words, *([] if chunk is None else [f"--model.loss_chunk_tokens={chunk}"])])
        memory = plan_run(config, ranks=8, vocab_size=128_256).memory
        rows.append([way, f"{memory.passing / 2**30:.2f}", f"{memory.step_peak / 2**30:.2f}"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["llama_nano", "llama_60m"])
    parser.add_argument("--vocab", type=int, default=131_072)
    parser.add_argument("--tokens", type=int, default=4096, help="of the large pass, a multiple of 512")
    parser.add_argument("--no_publish", action="store_true", help="does not touch RESULTS.md")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case is not None:
        print(json.dumps(measure(**json.loads(options.case))))
        return
    rows = []
    for preset in options.presets:
        for way, chunk in WAYS.items():
            case = {"preset": preset, "vocab": options.vocab, "tokens": options.tokens, "chunk": chunk}
            command = [sys.executable, __file__, "--case", json.dumps(case)]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            grown = found["many"] - found["few"]
            cells = [f"{found['many'] / MIB:,.0f}", f"**{grown / MIB:,.0f}**", f"{found['seconds']:.1f}"]
            rows.append([preset, way, f"{options.tokens:,}", *cells])
            print(rows[-1], flush=True)
    text = (
        f"{table(HEADER, rows)}\n\nOne pass forward and backward, float32, one process a case, weights of "
        f"{options.vocab:,} tokens of vocabulary; a chunk's logits are 256 MiB. Gradients of both ways differ by "
        f"{largest_difference(8192):.1e} of a parameter's largest at most (llama_nano, 8,192 tokens of vocabulary)."
        "\n\nPlanned, not measured: llama_7b on 8 ranks, 8 x 2,048 tokens a pass, 128,256 tokens of vocabulary.\n\n"
        f"{table(['loss', 'a pass, GiB', 'peak of a step, GiB'], planned_rows())}"
    )
    publish("The loss: logits of a large vocabulary", "python benchmarks/loss.py", text, keep=not options.no_publish)


if __name__ == "__main__":
    main()
