"""Attention inside of documents, each way that there is: the numbers and the gradients of a mask of all pairs."""

from __future__ import annotations

import warnings
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import flex_attention
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loqt_scale.config import DataConfig
from loqt_scale.model import documents
from loqt_scale.model.documents import DocumentInputs, attend
from loqt_scale.model.loss import end_in_loss
from loqt_scale.model.packed_attention import (
    GROUP,
    _by_document,
    _one_by_one,
    attend_by_blocks,
    attend_by_document,
    block_mask,
    document_lengths,
    grouped,
    why_not_by_blocks,
)
from loqt_scale.model.structure import decoder_blocks
from tests.unit.model.test_loss import model_of

LENGTHS = [
    [700],  # one document
    [1] * 100 + [600],  # ends of text one after another
    [GROUP, 1, GROUP - 1, 2, 130, 126, 384 - 2 * GROUP, 58],  # borders on and beside those of groups and blocks
]


@pytest.fixture
def starts() -> Tensor:
    """(3, 700) int64: of each token, where its document begins."""
    rows = [torch.cat([torch.full((stop - start,), start) for start, stop in spans(row)]) for row in LENGTHS]
    return torch.stack(rows)


def spans(lengths: list[int]) -> list[tuple[int, int]]:
    return list(pairwise(accumulate(lengths, initial=0)))


def heads() -> list[Tensor]:
    """Queries of four heads, keys and values of two, laid out as a model's are."""
    torch.manual_seed(0)
    return [torch.randn(3, 700, count, 8, dtype=torch.float64).transpose(1, 2).requires_grad_() for count in (4, 2, 2)]


def with_gradients(attended: Tensor, given: list[Tensor]) -> list[Tensor]:
    """The output, (3, 700, 4, 8), and the gradients of a function of it."""
    weights = torch.randn(attended.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [attended, *torch.autograd.grad((attended * weights).sum(), given)]


def by_mask(starts: Tensor) -> list[Tensor]:
    given = heads()
    query, key, value = given[0], *(tensor.repeat_interleave(2, dim=1) for tensor in given[1:])
    sees = (starts[:, :, None] == starts[:, None]).tril().unsqueeze(1)
    return with_gradients(scaled_dot_product_attention(query, key, value, sees).transpose(1, 2), given)


def places(starts: Tensor) -> Tensor:
    return torch.arange(700) - starts


def test_document_by_document_is_what_a_mask_gives(starts: Tensor) -> None:
    given = heads()
    attended, _ = attend_by_document(nn.Identity(), *given, position_ids=places(starts))
    torch.testing.assert_close(with_gradients(attended, given), by_mask(starts), rtol=1e-12, atol=1e-12)
    assert document_lengths(places(starts)) == tuple(length for row in LENGTHS for length in row)


def test_what_compiled_code_is_told_of_the_operator_is_true(starts: Tensor) -> None:
    """Shapes and layouts without values, and gradients that can be traced."""
    heads = [torch.randn(3, 700, 4, 8, requires_grad=True) for _ in range(3)]
    torch.library.opcheck(_by_document, (*heads, places(starts), 0.3))


def test_short_neighbours_go_together_and_long_ones_alone() -> None:
    groups = grouped((1, 2, GROUP - 3, 1, GROUP, 500, 3, GROUP - 2, 1), torch.float32)
    assert [tokens for tokens, _ in groups] == [GROUP, 1, GROUP, 500, 3, GROUP - 1]
    assert [mask is not None for _, mask in groups] == [True, False, False, False, False, True]
    with torch.inference_mode():
        ((_, mask),) = grouped((2, 2), torch.bfloat16)
    assert mask is not None and not mask.is_inference() and mask.dtype == torch.bfloat16
    no = -torch.inf
    assert mask[0, 0].tolist() == [[0, no, no, no], [0, 0, no, no], [no, no, 0, no], [no, no, 0, 0]]


def test_blocks_are_those_that_torch_finds_by_trying_every_pair(starts: Tensor) -> None:
    ours = block_mask(starts)
    theirs = create_block_mask(ours.mask_mod, 3, None, 700, 700, device="cpu")
    assert torch.equal(ours.to_dense(), theirs.to_dense()) and ours.shape == theirs.shape
    for kind in ("kv", "full_kv", "q", "full_q"):
        assert listed(ours, kind) == listed(theirs, kind), kind


def listed(mask: BlockMask, kind: str) -> list[list[int]]:
    """The blocks that each block sees, or is seen by."""
    counts, indices = (getattr(mask, f"{kind}_{what}") for what in ("num_blocks", "indices"))
    return [
        sorted(row[:count])
        for row, count in zip(indices.flatten(0, 2).tolist(), counts.flatten().tolist(), strict=True)
    ]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_block_by_block_is_what_a_mask_gives(starts: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch's own arithmetic for FlexAttention, whose gradients it offers on other devices only."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    given = heads()
    attended, _ = attend_by_blocks(nn.Identity(), *given, block_mask(starts))
    torch.testing.assert_close(with_gradients(attended, given), by_mask(starts), rtol=1e-12, atol=1e-12)
    assert why_not_by_blocks(4, 2, 16, 300, torch.float32, torch.device("cpu")) == ""


def test_the_trial_of_blocks_compares_with_nothing_that_is_quadratic() -> None:
    """On a device that a long sequence's mask does not fit, blocks would fail the trial, and that mask be used."""
    given = heads()
    starts = (torch.arange(700) // 234 * 234).expand(3, 700)

    class Watch(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            self.largest = max([self.largest, *(of.numel() for of in tree_leaves(made) if isinstance(of, Tensor))])
            return made

    with Watch() as watch:
        attended, _ = _one_by_one(*given, 234)
        found = with_gradients(attended, given)
    assert watch.largest == given[0].numel()
    torch.testing.assert_close(found, by_mask(starts), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_every_way_gives_a_model_the_same_loss(kind: str) -> None:
    model = model_of(kind)
    end_in_loss(model)
    model.requires_grad_(False)  # FlexAttention on a CPU
    tokens = torch.randint(0, 60, (2, 200), generator=torch.Generator().manual_seed(0))
    tokens[torch.rand(2, 200, generator=torch.Generator().manual_seed(1)) < 0.03] = 5
    losses = []
    for way in ("mask", "documents", "blocks"):
        made: Any = DocumentInputs(model, seq_len=200, separator=5, way=way)
        model.forward.made = made  # type: ignore[attr-defined]
        losses.append(model(input_ids=tokens, targets=tokens))
        with torch.autocast("cpu", dtype=torch.bfloat16):  # queries and values then have two dtypes
            assert model(input_ids=tokens, targets=tokens).item() == pytest.approx(losses[0].item(), rel=0.02)
    torch.testing.assert_close(torch.stack(losses[1:]), losses[0].expand(2), rtol=1e-5, atol=0)
    model.forward.made = None  # type: ignore[attr-defined]
    plain = model(input_ids=tokens).logits  # whoever calls the model by itself has one document a sequence
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(model(input_ids=tokens).logits, plain)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("way", ["documents", "blocks"])
def test_compiled_blocks_have_no_break_and_fit_all_documents(way: Any) -> None:
    model = model_of("llama").requires_grad_(way == "documents")
    end_in_loss(model)
    model.forward.made = DocumentInputs(model, seq_len=200, separator=5, way=way)  # type: ignore[assignment]
    tokens = torch.randint(0, 60, (2, 200), generator=torch.Generator().manual_seed(0))
    tokens[torch.rand(2, 200, generator=torch.Generator().manual_seed(1)) < 0.03] = 5
    batches = [tokens.roll(shift, dims=1) for shift in range(3)]
    expected = [model(input_ids=batch, targets=batch).item() for batch in batches]
    compiled = CompileCounter()
    for _, block in decoder_blocks(model):
        block.compile(backend=compiled, fullgraph=True)
    assert [model(input_ids=batch, targets=batch).item() for batch in batches] == pytest.approx(expected, rel=1e-6)
    assert compiled.frame_count == 1 and len(set(expected)) == len(batches)


def test_where_blocks_cannot_be_used_it_says_why_and_takes_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU, whose FlexAttention has no backward pass, stands for a device on which the trial fails."""
    cpu = torch.device("cpu")
    assert "does not support backward on CPU" in why_not_by_blocks(4, 4, 16, 64, torch.float32, cpu)
    given = DocumentInputs(model_of("llama"), seq_len=64, separator=5)
    fake = type("OnDevice", (), {"device": torch.device("cuda"), "shape": (1, 64)})()
    tried = why_not_by_blocks
    monkeypatch.setattr(documents, "why_not_by_blocks", lambda *what: tried(*what[:-1], cpu))
    with pytest.warns(UserWarning, match=r"mask of all pairs.*does not support backward on CPU"):
        assert given._cheapest(fake) == "mask"
    of_rank_1: Any = model_of("llama")
    end_in_loss(of_rank_1)
    attend(of_rank_1, DataConfig(seq_len=64, mask_documents=True), separator=5, warns=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # rank 0 has said it
        assert of_rank_1.forward.made._cheapest(fake) == "mask"


@pytest.mark.parametrize("key_heads", [4, 2])
def test_a_models_heads_are_not_copied_beyond_what_they_share(key_heads: int) -> None:
    """Queries, and keys of as many heads, reach the operator as the model has laid them out."""
    query, key = (torch.randn(2, 9, count, 8).transpose(1, 2) for count in (4, key_heads))
    places = torch.arange(9).expand(2, 9)

    class Watch(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[Tensor] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.loqt_scale.attend_by_document.default:
                self.seen = list(args[:3])
            return func(*args, **(kwargs or {}))

    with Watch() as watch:
        attend_by_document(nn.Identity(), query, key, key, position_ids=places)
    assert watch.seen[0].data_ptr() == query.data_ptr()
    assert (watch.seen[1].data_ptr() == key.data_ptr()) == (key_heads == 4)
    assert all(tensor.is_contiguous() for tensor in watch.seen), "sequences would be copied once more to be cut"
