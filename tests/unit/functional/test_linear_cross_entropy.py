"""The loss by chunks of tokens: values and gradients of the logits made whole, and never that many of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loqt_scale.data.packing import IGNORED_LABEL
from loqt_scale.functional.linear_cross_entropy import LogitTransform, chunk_tokens, linear_cross_entropy

TRANSFORMS = [LogitTransform(), LogitTransform(scale=0.25), LogitTransform(scale=2.0, cap=3.0), LogitTransform(cap=1.5)]


def inputs(tokens: int, vocab: int, *, bias: bool, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(tokens * vocab)
    shapes = [(tokens, 6), (vocab, 6), *([(vocab,)] if bias else [])]
    labels = torch.randint(0, vocab, (tokens,))
    labels[torch.rand(tokens) < 0.3] = IGNORED_LABEL
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes], labels


def naive(leaves: list[Tensor], labels: Tensor, transform: LogitTransform) -> Tensor:
    logits = F.linear(*leaves) * transform.scale
    if transform.cap is not None:
        logits = transform.cap * torch.tanh(logits / transform.cap)
    exact = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(exact, labels, ignore_index=IGNORED_LABEL, reduction="sum")


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 9),
    vocab=st.integers(2, 11),
    chunk=st.integers(1, 10),
    bias=st.booleans(),
    transform=st.sampled_from(TRANSFORMS),
)
def test_values_and_gradients_are_the_naive_ones(
    tokens: int, vocab: int, chunk: int, bias: bool, transform: LogitTransform
) -> None:
    leaves, labels = inputs(tokens, vocab, bias=bias)
    hidden, weight, *rest = leaves
    how = {"chunk": chunk, "ignored": IGNORED_LABEL, "transform": transform}
    loss = linear_cross_entropy(hidden, weight, rest[0] if rest else None, labels, **how)  # type: ignore[arg-type]
    expected = naive(leaves, labels, transform)
    torch.testing.assert_close(loss, expected)
    factor = torch.tensor(0.7, dtype=torch.float64)
    found, wanted = (torch.autograd.grad(value * factor, leaves) for value in (loss, expected))
    torch.testing.assert_close(found, wanted)


def test_under_autocast_it_is_as_exact_as_the_whole() -> None:
    leaves, labels = inputs(64, 50, bias=False, dtype=torch.float32)
    exact = naive([leaf.double() for leaf in leaves], labels, LogitTransform())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole = naive(leaves, labels, LogitTransform())
        loss = linear_cross_entropy(*leaves, None, labels, chunk=7, ignored=IGNORED_LABEL)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(whole.item(), rel=1e-6)
    expected = torch.autograd.grad(exact, leaves)
    for found, whole_one, wanted in zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(whole, leaves), expected, strict=True
    ):
        assert found.dtype == torch.float32
        assert (found - wanted).norm() <= 1.2 * (whole_one - wanted).norm()


def test_a_loss_that_is_no_number_gives_gradients_that_are_none() -> None:
    """So that a step whose loss is not finite is skipped as ever."""
    leaves, labels = inputs(8, 5, bias=False)
    loss = linear_cross_entropy(*leaves, None, labels, chunk=3, ignored=IGNORED_LABEL) * float("nan")
    assert all(gradient.isnan().all() for gradient in torch.autograd.grad(loss, leaves))


def test_without_gradients_none_are_made() -> None:
    leaves, labels = inputs(8, 5, bias=True)
    with torch.no_grad():
        loss = linear_cross_entropy(*leaves, labels, chunk=3, ignored=IGNORED_LABEL)
    assert not loss.requires_grad
    frozen = linear_cross_entropy(leaves[0], leaves[1].detach(), None, labels, chunk=3, ignored=IGNORED_LABEL)
    (found,) = torch.autograd.grad(frozen, leaves[:1])
    (wanted,) = torch.autograd.grad(naive(leaves[:2], labels, LogitTransform()), leaves[:1])
    torch.testing.assert_close(found, wanted)


def test_a_chunk_holds_256_mebibytes() -> None:
    assert chunk_tokens(32_000) * 32_000 * 4 <= 2**28 < (chunk_tokens(32_000) + 1) * 32_000 * 4
    assert chunk_tokens(2**24) == 16
