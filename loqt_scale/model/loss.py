"""A causal language model whose forward pass ends in the loss: `model(input_ids=..., targets=...)`.

Inside the forward pass the head's weight is at hand under every strategy, so the loss can be taken chunk by chunk
(`functional.linear_cross_entropy`), and the logits of all tokens, V numbers a token, are never held. Where one chunk
holds all of them nothing is gained, and the loss is taken from the model's own logits.

Chunks need to know what a model does between its last hidden state and its logits. That is written down for the
architectures below; all others have their logits made whole, as before.

A model of experts whose config says `output_router_logits` also learns to spread its tokens: gradients have
transformers' own auxiliary loss of each micro-batch in them, the loss that is returned has not.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from loqt_scale.data.batching import summed_loss
from loqt_scale.data.packing import IGNORED_LABEL
from loqt_scale.errors import UserError
from loqt_scale.functional.linear_cross_entropy import LogitTransform, chunk_tokens, linear_cross_entropy

# checked one by one (tests/unit/model/test_loss.py): what each does to its logits, by its config's name for it
_PLAIN = (
    *("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "phi", "phi3", "olmo"),
    *("olmo2", "smollm3", "gpt_neox", "gpt2", "stablelm", "starcoder2", "glm4", "ernie4_5", "deepseek_v3"),
)
_CAPPED = {"gemma2": "final_logit_softcapping", "gemma3_text": "final_logit_softcapping"}
_SCALED: dict[str, Callable[[Any], float]] = {
    "cohere": lambda config: float(config.logit_scale),
    "cohere2": lambda config: float(config.logit_scale),
    "granite": lambda config: 1.0 / float(config.logits_scaling),
}


NO_BALANCE = (
    "the config of this {kind} model has output_router_logits, but transformers computes no auxiliary loss of its "
    "experts, so nothing would balance them; write model.overrides.output_router_logits: false"
)


class LossHead(nn.Linear):
    """A model's head, which also knows how to take the loss of hidden states by chunks of tokens.

    It holds the given head's own parameters, under the same names; a call without `targets` is the head's.
    """

    def __init__(self, head: nn.Linear, transform: LogitTransform) -> None:
        super().__init__(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
        self.weight, self.bias = head.weight, head.bias
        self.transform = transform

    def forward(self, input: Tensor, targets: Tensor | None = None, chunk: int = 1) -> Tensor:
        if targets is None:
            return super().forward(input)
        hidden, labels = input.flatten(0, -2), targets.flatten()
        return linear_cross_entropy(
            hidden, self.weight, self.bias, labels, chunk=chunk, ignored=IGNORED_LABEL, transform=self.transform
        )


def end_in_loss(model: nn.Module, *, chunk: int | None = None) -> bool:
    """Has a model's forward pass take `targets` and return the sum of their cross-entropies, in place. Local.

    Args:
        model: A causal language model of transformers, on the meta device or not; before it is sharded.
        chunk: Tokens whose logits are held at a time. None: as many as fill 256 MiB; 0: all of them.

    Returns:
        Whether the loss can be taken by chunks.
    """
    transform = None if _balance_weight(model.config) else logit_transform(model)
    if transform is not None and chunk != 0:
        model.set_output_embeddings(LossHead(model.get_output_embeddings(), transform))  # type: ignore[operator]
    model.forward = _EndingInLoss(model, chunk)
    return transform is not None


def give_with_tokens(model: nn.Module, made: Callable[[Tensor], dict[str, Any]] | None) -> None:
    """Has a model that ends in the loss take more arguments beside `targets`, in place. Local.

    Args:
        model: As `end_in_loss` left it.
        made: Makes them of its tokens, (B, T) int64; None: no more.
    """
    assert isinstance(model.forward, _EndingInLoss)
    model.forward.made = made


def logit_transform(model: nn.Module) -> LogitTransform | None:
    """What a model does to its head's logits; None: not known, or its head is no plain linear."""
    config: Any = model.config
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if type(head) is not nn.Linear:
        return None
    kind = config.model_type
    if kind in _PLAIN:
        return LogitTransform()
    if kind in _CAPPED:
        return LogitTransform(cap=getattr(config, _CAPPED[kind], None))
    return LogitTransform(scale=_SCALED[kind](config)) if kind in _SCALED else None


class _EndingInLoss:
    """A model's `forward`: its own without `targets`, else the loss."""

    def __init__(self, model: nn.Module, chunk: int | None) -> None:
        self._model, self._whole, self._chunk = model, model.forward, chunk
        self.made: Callable[[Tensor], dict[str, Any]] | None = None
        self.__signature__ = inspect.signature(model.forward)  # `generate` reads from it what a model takes

    def __call__(self, *args: Any, targets: Tensor | None = None, **given: Any) -> Any:
        if targets is None:
            return self._whole(*args, **given)
        if self.made is not None:
            given |= self._beside(args[0] if args else given["input_ids"], given)
        head: Any = None if self._chunk == 0 else self._model.get_output_embeddings()  # type: ignore[operator]
        chunk = (self._chunk or chunk_tokens(head.out_features)) if isinstance(head, LossHead) else targets.numel()
        if targets.numel() <= chunk:
            found = self._whole(*args, use_cache=False, **given)
            return self._balanced(summed_loss(found.logits, targets), found, targets)
        hidden = self._model.base_model(*args, use_cache=False, **given)[0]  # type: ignore[operator]
        return head(hidden, targets=targets, chunk=chunk)

    def _beside(self, tokens: Tensor, given: dict[str, Any]) -> dict[str, Any]:
        """What `made` gives, none of which may be given already."""
        assert self.made is not None
        made = self.made(tokens)
        twice = next((key for key in ("attention_mask", "position_ids") if given.get(key) is not None), None)
        if twice is not None:
            raise UserError(
                f"{twice} is given beside targets, whose sequences are packed without padding; leave it out (of tokens "
                f"that do not count the targets are {IGNORED_LABEL}), or call the model without targets, which takes it"
            )
        return made

    def _balanced(self, loss: Tensor, found: Any, targets: Tensor) -> Tensor:
        """The loss, to whose gradients the auxiliary loss adds as much for each counted token."""
        config: Any = self._model.config
        auxiliary, weight = getattr(found, "aux_loss", None), _balance_weight(config)
        if not weight:
            return loss
        if auxiliary is None:
            raise UserError(NO_BALANCE.format(kind=config.model_type))
        added = weight * (targets != IGNORED_LABEL).sum() * auxiliary.float()
        return loss + (added - added.detach())


def _balance_weight(config: Any) -> float:
    """Of the auxiliary loss of experts; 0 if the config does not ask for it."""
    if not getattr(config, "output_router_logits", False):
        return 0.0
    return float(getattr(config, "router_aux_loss_coef", None) or getattr(config, "aux_loss_coef", None) or 0.0)
