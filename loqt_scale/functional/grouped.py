"""Products of many small matrices with the rows of one tall one, which are sorted by group: what experts compute.

Group e has the rows [ends[e - 1], ends[e]) of a tall matrix; it may have none. torch's grouped products do all groups
in one kernel, and the host need not know where groups end. They want floats of at most 32 bits and rows that begin at
multiples of 16 bytes; for others a loop over the groups does the same, as one operator that fake tensors and
torch.compile see through.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

NATIVE = (torch.bfloat16, torch.float16, torch.float32)
ALIGNMENT = 16  # bytes


def group_ends(sorted_ids_S: Tensor, groups: int) -> Tensor:
    """Where each group ends among rows whose ids ascend: int32 (groups,). On the device, without a host sync."""
    ids = torch.arange(groups, device=sorted_ids_S.device)
    return torch.searchsorted(sorted_ids_S, ids, right=True).to(torch.int32)


def grouped_rows(x_SK: Tensor, weight_EKN: Tensor, ends_E: Tensor) -> Tensor:
    """Each row times the matrix of its group, (S, N)."""
    x_SK = x_SK.contiguous()
    if _is_native(x_SK, weight_EKN):
        return F.grouped_mm(x_SK, weight_EKN, offs=ends_E)
    product: Tensor = torch.ops.loqt_scale.grouped_rows(x_SK, weight_EKN, ends_E)
    return product


def grouped_sums(a_SM: Tensor, b_SN: Tensor, ends_E: Tensor) -> Tensor:
    """a^T b of each group's rows, (E, M, N); exactly zero where a group has none."""
    a_SM, b_SN = a_SM.contiguous(), b_SN.contiguous()
    if not _is_native(a_SM, b_SN):
        product: Tensor = torch.ops.loqt_scale.grouped_sums(a_SM, b_SN, ends_E)
        return product
    sums = F.grouped_mm(a_SM.T, b_SN, offs=ends_E)
    empty = torch.diff(ends_E, prepend=ends_E.new_zeros(1)) == 0
    return sums.masked_fill_(empty[:, None, None], 0.0)


class GroupedProduct(torch.autograd.Function):
    """`grouped_rows` with gradients, for experts whose weights stay dense: inputs x (S, K), weight (E, K, N), ends."""

    @staticmethod
    def forward(ctx: Any, x_SK: Tensor, weight_EKN: Tensor, ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(x_SK, weight_EKN, ends_E)
        return grouped_rows(x_SK, weight_EKN.to(x_SK.dtype), ends_E)

    @staticmethod
    def backward(ctx: Any, dy_SN: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_SK, weight_EKN, ends_E = ctx.saved_tensors
        d_x = d_weight = None
        if ctx.needs_input_grad[0]:
            d_x = grouped_rows(dy_SN, weight_EKN.to(dy_SN.dtype).mT, ends_E)
        if ctx.needs_input_grad[1]:
            d_weight = grouped_sums(x_SK, dy_SN, ends_E).to(weight_EKN.dtype)
        return d_x, d_weight, None


def _is_native(*tensors: Tensor) -> bool:
    return all(tensor.dtype in NATIVE and _is_aligned(tensor) for tensor in tensors)


def _is_aligned(tensor: Tensor) -> bool:
    """Whether rows, or columns, lie side by side and begin at multiples of 16 bytes."""
    *_, rows, columns = tensor.stride()
    step = rows if columns == 1 else columns
    return 1 in (rows, columns) and step * tensor.itemsize % ALIGNMENT == 0 and tensor.numel() > 0


@torch.library.custom_op("loqt_scale::grouped_rows", mutates_args=())
def _rows_in_a_loop(x_SK: Tensor, weight_EKN: Tensor, ends_E: Tensor) -> Tensor:
    product = x_SK.new_zeros(x_SK.shape[0], weight_EKN.shape[2])
    start = 0
    for group, stop in enumerate(ends_E.tolist()):
        if stop > start:
            torch.mm(x_SK[start:stop], weight_EKN[group], out=product[start:stop])
        start = stop
    return product


@torch.library.custom_op("loqt_scale::grouped_sums", mutates_args=())
def _sums_in_a_loop(a_SM: Tensor, b_SN: Tensor, ends_E: Tensor) -> Tensor:
    sums = a_SM.new_zeros(ends_E.shape[0], a_SM.shape[1], b_SN.shape[1])
    start = 0
    for group, stop in enumerate(ends_E.tolist()):
        if stop > start:
            torch.mm(a_SM[start:stop].T, b_SN[start:stop], out=sums[group])
        start = stop
    return sums


@_rows_in_a_loop.register_fake
def _(x_SK: Tensor, weight_EKN: Tensor, ends_E: Tensor) -> Tensor:
    return x_SK.new_empty(x_SK.shape[0], weight_EKN.shape[2])


@_sums_in_a_loop.register_fake
def _(a_SM: Tensor, b_SN: Tensor, ends_E: Tensor) -> Tensor:
    return a_SM.new_empty(ends_E.shape[0], a_SM.shape[1], b_SN.shape[1])
