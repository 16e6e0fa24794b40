"""`own_loop.py`, in one process, beside the same loop on several ranks: `own_fsdp2.py`, `own_deepspeed.py`."""

from functools import partial

import own_loop
import torch
from compare import Result, arguments, folder_of, kept_or_run

from loqt_scale.strategies import alone

RATES = {"loqt, Muon": [4e-2], "full, Muon": [1e-2]}  # the best of `own_loop.py --sweep`


def beside_one_process(found: dict[str, list[Result]]) -> None:
    """Prints a row for each run: how far its losses are from those of one process, and both scores. One rank.

    The runs of one process are own_loop's: kept where it keeps them, and made if they are not there.
    """
    args, _ = arguments()
    train = partial(own_loop.train, editing=alone(torch.device("cpu")))  # this model is no other rank's
    rows = ["| | largest difference in a mean of 10 losses, first 40 steps | all | held-out loss | one process |"]
    rows += ["| --- | --- | --- | --- | --- |"]
    for (method, rates), results in zip(RATES.items(), found.values(), strict=True):
        for seed, ours in enumerate(results):
            single = kept_or_run(folder_of("own_loop"), train, [method, seed, rates[0]], args.short)
            apart = [abs(a - b) for (_, a), (_, b) in zip(ours.curve, single.curve, strict=True)]
            scores = f"{ours.score:.4f} | {single.score:.4f}"
            rows.append(f"| {method}, seed {seed} | {max(apart[:4]):.1e} | {max(apart):.1e} | {scores} |")
    print("", *rows, sep="\n")
