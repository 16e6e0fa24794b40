"""Does LoQT learn as well as full-rank training? Held-out perplexity after the same tokens.

Both methods train the quickstart model on the quickstart data from the same seed. Each gets its best of several
learning
rates, for its linears and, separately, for embeddings, norms and head, so that methods are compared and not recipes.

    python benchmarks/quality.py                 # about 5 minutes a run on one core
    python benchmarks/quality.py --steps 60      # a quick look
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

from common import ROOT, publish, run_job, table

GRID = {
    "loqt": [(lr, 5e-3) for lr in (2.5e-3, 5e-3, 1e-2)],
    "full": [(5e-4, 5e-3), (1e-3, 5e-3), (2e-3, 5e-3), (1e-3, 2e-3)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--config", default=str(ROOT / "configs" / "quickstart.yaml"))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    rows, best = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for method, rates in GRID.items():
            for lr, rest in rates:
                words = ["--config", options.config, "--method", method, "--optim.lr", str(lr)]
                words += ["--optim.full_precision_lr", str(rest), "--train.steps", str(options.steps)]
                words += ["--optim.warmup_steps", str(options.steps // 10), "--train.eval_every", "0"]
                metrics = run_job(words, run_dir=Path(folder) / f"{method}-{lr}-{rest}", threads=options.threads)
                loss = [row["eval/loss"] for row in metrics if "eval/loss" in row][-1]
                merges = sum("merge/seconds" in row for row in metrics)
                rows.append((method, lr, rest, merges, f"{loss:.4f}", f"{math.exp(loss):.3f}"))
                best[method] = min(best.get(method, math.inf), loss)
                print(rows[-1], flush=True)
    ratio = math.exp(best["loqt"] - best["full"])
    text = table(["method", "lr of the linears", "lr of the rest", "merges", "held-out loss", "perplexity"], rows)
    text += f"\n\nBest LoQT perplexity / best full-rank perplexity: **{ratio:.3f}** (goal: at most 1.05)."
    publish(
        "Quality: LoQT against full-rank training, quickstart",
        f"python benchmarks/quality.py --steps {options.steps}",
        text,
    )


if __name__ == "__main__":
    main()
