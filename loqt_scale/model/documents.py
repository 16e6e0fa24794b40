"""Documents of a packed sequence that do not see one another (`data.mask_documents`).

A packed sequence holds documents end to end, an end-of-text token E between two of them. Here E is the first token of
the document that follows:

    tokens      d0 d0 d0 | E  d1 d1 | E  d2          a sequence may begin inside of a document
    positions    0  1  2 | 0   1  2 | 0   1
    labels      d0 d0 E  | d1 d1 E  | d2  d2

So the last token of a document predicts its end, E alone predicts the first token of the next one, as `generate` has it
do, and every token is predicted as without masks: no label is left out, no count of tokens changes. A sequence gives
the loss and the gradients that its documents give one by one.

Positions start again at each E. transformers makes masks of such positions by itself, for every kind of attention; the
architectures that `attention` knows attend at the price of what they see (`packed_attention`). Whether a model keeps
documents apart is tried on a small copy: some have no positions to give, or carry a state along.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.masking_utils import and_masks, causal_mask_function, eager_mask, packed_sequence_mask_function

from loqt_scale.config import DataConfig
from loqt_scale.errors import UserError
from loqt_scale.model.attention import attend_packed, no_mask, own_document
from loqt_scale.model.causality import VOCABULARY, agree, on_small_copies
from loqt_scale.model.loss import give_with_tokens
from loqt_scale.model.packed_attention import attention_dtype, block_mask, why_not_by_blocks
from loqt_scale.process.caller import warn_caller

Way = Literal["documents", "blocks", "mask", "together", "given"]
_SEPARATOR, _EACH = VOCABULARY - 1, 5  # of the copy: end of text, tokens of a document


class DocumentInputs:
    """What a model is given beside its tokens, so that documents do not see one another.

    Args:
        model: A causal language model of transformers, in place.
        seq_len: T.
        separator: Id of the token that begins a document.
        way: How an architecture that `attention` knows attends. None: the cheapest that its device has.
        warns: Whether it says so where the cheapest cannot be used: one rank does, of them all.
    """

    def __init__(
        self, model: nn.Module, *, seq_len: int, separator: int, way: Way | None = None, warns: bool = True
    ) -> None:
        self._separator, self._way, self._warns = separator, way, warns
        self._config: Any = model.config
        self._embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
        if not attend_packed(model, seq_len):
            self._way = "given"  # the model makes its own masks of positions
        elif self._embeddings.weight.is_meta:
            self._way = "together"  # for `plan`, whose tokens have no values: no document costs more

    def __call__(self, input_ids: Tensor) -> dict[str, Any]:
        """Of tokens (B, T) int64: `position_ids`, the same shape, and `attention_mask` if the model takes it."""
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        starts = torch.where(input_ids == self._separator, places, 0).cummax(dim=1).values
        positions = {"position_ids": places - starts}
        self._way = self._way or self._cheapest(starts)
        if self._way == "given":
            return positions
        makers = {"documents": own_document, "blocks": block_mask, "mask": self._mask, "together": no_mask}
        return positions | {"attention_mask": makers[self._way](starts)}

    def _dtype(self, device: torch.device) -> torch.dtype:
        return attention_dtype(self._embeddings.weight.dtype, device)

    def _cheapest(self, starts: Tensor) -> Way:
        device, config = starts.device, self._config
        if device.type not in ("cpu", "cuda") or config.attention_dropout:
            return "mask"
        if device.type == "cpu":
            return "documents"
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        reason = why_not_by_blocks(
            heads, config.num_key_value_heads, width, starts.shape[1], self._dtype(device), device
        )
        if reason and self._warns:
            warn_caller(
                "data.mask_documents: a mask of all pairs of tokens is used, "
                f"since FlexAttention cannot be ({reason}); the result is the same, long sequences take more time",
            )
        return "mask" if reason else "blocks"

    def _mask(self, starts: Tensor) -> Tensor:
        batch, length = starts.shape
        return eager_mask(  # numbers that are added, (B, 1, T, T)
            batch,
            length,
            length,
            mask_function=and_masks(causal_mask_function, packed_sequence_mask_function(starts)),
            dtype=self._dtype(starts.device),
            device=starts.device,
        )


def attend(model: nn.Module, data: DataConfig, *, separator: int, warns: bool = True) -> None:
    """Has a model that ends in the loss attend as a run's packed sequences want it, in place. Local.

    Args:
        model: As `loss.end_in_loss` left it, sharded or not.
        data: `seq_len`, and whether documents see one another.
        separator: The tokenizer's end of text.
        warns: Whether this rank says if the cheapest way to keep documents apart cannot be used.
    """
    if data.mask_documents:
        give_with_tokens(model, DocumentInputs(model, seq_len=data.seq_len, separator=separator, warns=warns))
    else:
        packed = attend_packed(model, data.seq_len)
        give_with_tokens(model, _all_before if packed else None)


def _all_before(tokens: Tensor) -> dict[str, Any]:
    return {"attention_mask": no_mask(tokens)}


def check_documents(data: DataConfig, hf_config: PreTrainedConfig) -> None:
    """Refuses `data.mask_documents` for a model that cannot keep documents apart, or of which no copy can be tried.

    Raises:
        UserError: With what to write.
    """
    if not data.mask_documents:
        return
    apart = on_small_copies(hf_config, _keeps_apart)
    if not apart:
        found = (
            "no small copy of it computes, on which that could be tried"
            if apart is None
            else "on a small copy, a document's outputs are not those that it has alone: the model takes no "
            "position_ids, does not mask by them, or carries a state along"
        )
        raise UserError(
            f"data.mask_documents is true, but a {hf_config.model_type} model cannot keep documents apart ({found}); "
            "write data.mask_documents: false, or another model (llama, mistral, qwen, gemma, gpt_neox, gpt2 can)"
        )


def _keeps_apart(model: Any, dtype: torch.dtype) -> bool | None:
    """Whether the second of two documents has the outputs that it has alone; None if the copy does not compute."""
    first, second = torch.arange(10, 10 + _EACH), torch.arange(20, 20 + _EACH)
    second[0] = _SEPARATOR
    alone = model(input_ids=second.unsqueeze(0), use_cache=False).logits
    given = DocumentInputs(model, seq_len=2 * _EACH, separator=_SEPARATOR)
    packed = torch.cat([first, second]).unsqueeze(0)
    return agree(model(input_ids=packed, use_cache=False, **given(packed)).logits[:, _EACH:], alone, dtype)
