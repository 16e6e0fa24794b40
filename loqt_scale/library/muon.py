"""The optimizer that trains LoQT best, for a loop of one's own: Muon for the factors, AdamW for the rest."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from loqt_scale.config import OptimConfig, OptimizerStates
from loqt_scale.config.blocks import row_block
from loqt_scale.errors import UserError
from loqt_scale.layers import loqt_layers
from loqt_scale.optim import StreamedMuon, create_optimizer
from loqt_scale.strategies import unwrapped
from loqt_scale.strategies.whole import is_sharded


def muon(
    model: nn.Module,
    *,
    lr: float,
    full_precision_lr: float | None = None,
    momentum: float = 0.9,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    states: OptimizerStates = "float32",
    dense_layers: Iterable[str] = (),
    seed: int = 0,
    compile: bool = False,
) -> StreamedMuon:
    """One optimizer with two groups: Muon's step for the factors B, AdamW's for embeddings, norms, biases and head.

        optimizer = muon(model, lr=1e-2)
        merges = attach(model, optimizer, config)  # tells it how the model is spread over ranks

    Of a full-rank model (no LoQT layer, `dense_layers` names all) `loqt_scale.strategies.place(model, optimizer)` does.

    Args:
        model: A converted model; on several ranks as `fully_shard` made it, before DDP or DeepSpeed wrap it, or after
            DDP has.
        lr: Peak learning rate of the factors.
        full_precision_lr: That of the rest; default: `lr`.
        momentum: Muon's.
        betas: Adam's.
        eps: Adam's.
        weight_decay: Decoupled, of all.
        states: float32, or int8 = moments in 8-bit codes.
        dense_layers: Names of layers whose dense weights take Muon's step too: all, for a full-rank run beside it.
        seed: Of what is rounded at random (parameters in bfloat16).
        compile: Have torch.compile make one kernel of the update of a part of a parameter: faster, if there is a
            compiler, after seconds of compiling.

    Raises:
        UserError: There are neither LoQT layers nor dense ones named; a layer of fused experts; or 8-bit states of a
            factor whose rows they cannot cut into blocks.
    """
    model = unwrapped(model)  # by whose names layers are called
    if not dense_layers and not any(True for _ in loqt_layers(model)):
        raise UserError("muon(): the model has no LoQT layer; convert_to_loqt(model, config) comes first")
    uneven = [(name, layer.rank) for name, layer in loqt_layers(model) if not row_block(layer.rank)]
    if states == "int8" and uneven:
        raise UserError(
            f"muon(): states is 'int8', whose blocks are parts of a row, but {uneven[0][0]} has rank {uneven[0][1]}; "
            "write ranks from 32 to 256 or multiples of 32 in LoQTConfig (rank, rank_pattern), or states='float32'"
        )
    config = OptimConfig(
        name="muon", lr=lr, full_precision_lr=full_precision_lr, momentum=momentum, betas=betas, eps=eps,
        weight_decay=weight_decay, states=states, compile=compile,
    )  # fmt: skip
    optimizer = create_optimizer(model, config, dense_layers, local=_whole, seed=seed)
    assert isinstance(optimizer, StreamedMuon)
    return optimizer


def _whole(tensor: Tensor) -> Tensor:
    """The tensor, before `attach` has told the optimizer more."""
    if is_sharded(tensor):
        raise UserError(
            "muon(): the model is sharded; attach(model, optimizer, config) comes before the first step (full rank: "
            "loqt_scale.strategies.place(model, optimizer))"
        )
    return tensor
