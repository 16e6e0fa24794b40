"""What a conversion takes, what it leaves and why, and how it says so."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from loqt_scale import LoQTConfig, convert_to_loqt
from loqt_scale.errors import UserError
from loqt_scale.layers import LoQTLinear, convert, loqt_layers
from tests.unit.layers.expert_models import fused

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}


class ByHand(nn.Linear):
    """Falcon's: the same product, written out."""

    def forward(self, input: Tensor) -> Tensor:
        product = input @ self.weight.T
        return product if self.bias is None else product + self.bias


class Scaled(nn.Linear):
    """Another function."""

    def forward(self, input: Tensor) -> Tensor:
        return 2.0 * F.linear(input, self.weight, self.bias)


class Noisy(nn.Linear):
    """Another function in training only."""

    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        return F.dropout(y, 0.5, training=self.training)


class Gained(ByHand):
    """The same function until somebody sets its gain."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.gain = 1.0

    def forward(self, input: Tensor) -> Tensor:
        return self.gain * super().forward(input)


class Called(nn.Linear):
    """Another function, beside its forward."""

    def __call__(self, *args: Tensor) -> Tensor:
        product: Tensor = super().__call__(*args)
        return 2.0 * product


class Everything(nn.Module):
    """A layer of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(32, 32)
        self.by_hand, self.scaled, self.noisy = ByHand(32, 32), Scaled(32, 32), Noisy(32, 32)
        self.gained, self.called = Gained(32, 32), Called(32, 32)
        self.frozen, self.hooked, self.small = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 3)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(32, 32))
        self.tied, self.lm_head = nn.Linear(32, 50, bias=False), nn.Linear(32, 50, bias=False)
        self.embed = nn.Embedding(50, 32)
        self.tied.weight = self.embed.weight
        self.frozen.weight.requires_grad_(False)
        self.hooked.register_forward_hook(lambda module, args, output: output + 1)
        self.experts, self.conv = nn.Parameter(torch.zeros(2, 32, 32)), nn.Conv1d(32, 32, 3)
        self.attention = nn.MultiheadAttention(32, 2)


def test_a_report_names_what_was_left_and_why_and_is_the_list_of_what_was_not() -> None:
    model = Everything()
    values = sum(parameter.numel() for parameter in model.parameters())
    with pytest.warns(UserWarning, match="less than one half of the model became low-rank"):
        report = convert_to_loqt(model, LoQTConfig(rank=8))
    assert report == ["plain", "by_hand"] and len(report) == 2 and "plain" in report and list(report) == report[:]
    assert [name for name, _ in loqt_layers(model)] == report
    assert report.values == values and report.share == 2 * 32 * 32 / values
    left = {item.name: item.why for item in report.left}
    assert all("computes something else" in left[name] for name in ("scaled", "noisy", "gained", "called"))
    assert left["frozen"].startswith("frozen") and left["hooked"].startswith("hooks") and "rank 8" in left["small"]
    assert "weight norm" in left["normed.parametrizations.weight.original1"]
    assert "tied" in left["tied"] and "embed" not in left  # one parameter, its first name
    assert left["lm_head"] == "in loqt.exclude_modules" and left["experts"] == "a 3-dimensional parameter of Everything"
    assert "convolution" in left["conv"] and "MultiheadAttention holds itself" in left["attention.in_proj_weight"]
    assert "never calls it" in left["attention.out_proj"]
    for name in ("scaled", "frozen", "tied", "conv", "experts"):
        assert name in str(report)
    assert str(report).startswith("LoQT: 2 layers hold 2,048 of the")


def test_a_subclass_that_computes_the_same_keeps_its_values() -> None:
    model = nn.Sequential(ByHand(32, 32), ByHand(32, 32, bias=False))
    x = torch.randn(4, 32)
    want = model(x)
    report = convert(model, LoQTConfig(rank=8))
    assert len(report) == 2 and (model(x) - want).abs().max() < 0.2 * want.abs().max()  # in 4 bits


@pytest.mark.parametrize("kind", [BertForSequenceClassification, LlamaForSequenceClassification])
def test_heads_of_classification_models_are_left_alone_unless_they_are_named(kind: type) -> None:
    def model() -> nn.Module:
        made: nn.Module = kind((BertConfig if "Bert" in kind.__name__ else LlamaConfig)(**SIZES, num_labels=16))
        return made

    head = "classifier" if "Bert" in kind.__name__ else "score"
    report = convert(model(), LoQTConfig(rank=8, exclude_modules=["nothing"]))
    left = {item.name: item.why for item in report.left}
    assert left[head] == "the model's head" and not [name for name in report if name == head] and len(report) >= 7
    assert head in convert(model(), LoQTConfig(rank=8, exclude_modules=[]))
    named = LoQTConfig(rank=8, exclude_modules=["nothing"], target_modules=["*", f"*{head}"])
    assert head in convert(model(), named)


def test_a_second_conversion_says_so_and_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 4))
    config = LoQTConfig(rank=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # more than one half
        assert convert_to_loqt(model, config) == ["0"]
    with pytest.raises(UserError, match=r"second conversion: the model holds 1 LoQT layers already, e\.g\. 0"):
        convert_to_loqt(model, LoQTConfig(rank=4))
    assert type(model[1]) is nn.Linear


def test_a_rank_that_somebody_asked_for_is_not_left_aside_in_silence() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 4))
    with pytest.raises(UserError, match=r"a rank of loqt.rank_pattern is 8, but 1 is 4 x 32"):
        convert_to_loqt(model, LoQTConfig(rank=4, rank_pattern={"1": 8}))
    with pytest.raises(UserError, match=r"loqt.rank is 64, but 0 is 32 x 32"):
        convert_to_loqt(model, LoQTConfig(rank=64))


def test_why_nothing_can_be_converted_is_said() -> None:
    with pytest.raises(UserError, match=r"matches no linear layer that can be converted.*0 \(a subclass of nn.Linear"):
        convert_to_loqt(nn.Sequential(Scaled(32, 32)), LoQTConfig(rank=4))
    with pytest.raises(UserError, match=r"weight is a convolution|0 is a convolution"):
        convert_to_loqt(nn.Sequential(nn.Conv2d(8, 8, 3)), LoQTConfig(rank=4))


def test_an_adapter_of_peft_is_left_and_its_merged_model_is_converted() -> None:
    """Its matrices are layers of their own, of which some are larger than the rank."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(LlamaForCausalLM(LlamaConfig(**SIZES)), peft.LoraConfig(r=16))
    with pytest.raises(UserError, match=r"lora_A.default, \.\.\. \(in an adapter of peft; merge it first"):
        convert_to_loqt(model, LoQTConfig(rank=8))
    merged = model.merge_and_unload()
    inside = LlamaForCausalLM(LlamaConfig(**SIZES))
    peft.inject_adapter_in_model(peft.LoraConfig(r=16, target_modules=["q_proj", "v_proj"]), inside)
    report = convert(inside.requires_grad_(True), LoQTConfig(rank=8))
    assert len(report) == 5 and len([item for item in report.left if "adapter" in item.why]) == 6
    assert len(convert(merged.requires_grad_(True), LoQTConfig(rank=8))) == 7


class Coded(torch.Tensor):
    """A matrix that is held as whole numbers, as torchao's are."""

    @staticmethod
    def __new__(cls, codes: torch.Tensor) -> Coded:
        made: Coded = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32, requires_grad=True)
        made.codes = codes
        return made

    codes: torch.Tensor

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes"], None

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return cls(args[0].codes)
        raise NotImplementedError(f"{function} of codes")


def test_weights_that_are_made_of_other_tensors_are_left_and_named() -> None:
    model = nn.ModuleDict({"coded": nn.Linear(32, 32), "plain": nn.Linear(32, 64)})
    model["coded"].weight = nn.Parameter(Coded(torch.ones(32, 32, dtype=torch.int8)))
    report = convert_to_loqt(model, LoQTConfig(rank=4))
    assert report == ["plain"]
    assert {item.name: item.why for item in report.left}["coded"].startswith("a Linear whose weight is a Coded")
    mixture = fused("mixtral")
    mixture.down_proj = nn.Parameter(Coded(torch.ones(mixture.down_proj.shape, dtype=torch.int8)))
    report = convert_to_loqt(mixture, LoQTConfig(rank=4))
    assert report == ["gate_up_proj"] and "experts whose weight is a Coded" in report.left[0].why


def test_a_layer_without_a_shape_yet_is_refused() -> None:
    with pytest.raises(UserError, match=r"1 has no shape yet \(LazyLinear\); call the model once"):
        convert_to_loqt(nn.Sequential(nn.Linear(32, 32), nn.LazyLinear(32)), LoQTConfig(rank=4))


def test_a_linear_layer_that_something_has_kept_does_not_go_on_in_silence() -> None:
    model = nn.ModuleDict({"a": nn.Linear(32, 32), "b": nn.Linear(32, 32)})
    kept, x = list(zip(model.values(), (1, 2), strict=True)), torch.randn(2, 32)
    convert(model, LoQTConfig(rank=4))
    with pytest.raises(UserError, match=r"was b before convert_to_loqt is called: something has kept it"):
        kept[1][0](x)
    with torch.no_grad():
        assert kept[0][0](x).shape == (2, 32)  # to compare with


def test_a_pattern_that_nothing_is_called_is_told() -> None:
    model = nn.ModuleDict({"body": nn.Linear(32, 32), "my_head": nn.Linear(32, 32)})
    with pytest.warns(UserWarning, match=r"loqt.exclude_modules has 'head', which nothing .* write '\*head\*'"):
        assert convert(model, LoQTConfig(rank=4, exclude_modules=["head"])) == ["body", "my_head"]


def test_a_layer_under_two_names_is_one_layer_still() -> None:
    model = nn.ModuleDict({"a": nn.Linear(32, 32)})
    model["b"] = model["a"]
    assert convert(model, LoQTConfig(rank=4)) == ["a"]
    assert model["a"] is model["b"] and isinstance(model["b"], LoQTLinear)
