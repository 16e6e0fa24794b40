"""Weight sources: the same numbers however they are cut, true to the model's initialiser and to the stored files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from loqt_scale.model import weights
from loqt_scale.model.structure import build_meta_model
from loqt_scale.model.weights import DenseWeights, RandomWeights, SafetensorsWeights, WeightSource, pretrained_weights
from tests.unit.model.test_models import FAMILIES, family_config

pytestmark = pytest.mark.filterwarnings("ignore:eager attention is used")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks even in the smallest matrices."""
    monkeypatch.setattr(weights, "CHUNK_ELEMENTS", 320)


def whole(source: WeightSource, name: str, parameter: torch.Tensor) -> torch.Tensor:
    return source.rows(name, 0, parameter.shape[0])


def assert_holds(source: WeightSource, model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        rows, cut = parameter.shape[0], parameter.shape[0] // 3
        got = torch.cat([source.rows(name, a, b) for a, b in ((0, cut), (cut, cut), (cut, rows))])
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, parameter.detach().float(), rtol=0, atol=0)


# ---- random --------------------------------------------------------------------------------------------------------

LLAMA = build_meta_model(family_config("llama"))
SHAPES = {name: parameter.shape for name, parameter in LLAMA.named_parameters()}


@settings(max_examples=60)
@given(data=st.data())
def test_rows_do_not_depend_on_the_cut(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(SHAPES)))
    rows = SHAPES[name][0]
    cuts = sorted(data.draw(st.lists(st.integers(0, rows), max_size=6)))
    spans = list(zip([0, *cuts], [*cuts, rows], strict=True))
    source, other = RandomWeights(LLAMA, 5), RandomWeights(LLAMA, 5)
    expected = other.rows(name, 0, rows)
    slices = {span: source.rows(name, *span) for span in data.draw(st.permutations(spans))}
    assert all(slices[start, stop].shape == (stop - start, *SHAPES[name][1:]) for start, stop in spans)
    assert torch.equal(torch.cat([slices[span] for span in spans]), expected)


def test_the_caller_owns_its_rows_and_can_ask_again() -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    full = torch.randn(48, 32)
    for source in (RandomWeights(LLAMA, 1), DenseWeights({name: full})):
        first = source.rows(name, 3, 9)
        kept = first.clone()
        first.zero_()
        assert torch.equal(source.rows(name, 3, 9), kept)


def test_seeds_names_and_chunks_have_streams_of_their_own() -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    source = RandomWeights(LLAMA, 1)
    q = source.rows(name, 0, 32)
    assert not torch.equal(q, RandomWeights(LLAMA, 2).rows(name, 0, 32))
    assert not torch.equal(q, source.rows("model.layers.1.self_attn.q_proj.weight", 0, 32))
    assert len(q.unique()) == q.numel()


def test_the_global_random_state_is_neither_read_nor_changed() -> None:
    drawn = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        drawn.append(RandomWeights(LLAMA, 1).rows("lm_head.weight", 0, 67))
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(*drawn)


@pytest.mark.parametrize("family", FAMILIES)
def test_distribution_is_the_real_initialisers(family: str) -> None:
    config = family_config(family)
    source = RandomWeights(build_meta_model(config), 0)
    for name, parameter in AutoModelForCausalLM.from_config(config).named_parameters():
        drawn = whole(source, name, parameter)
        assert drawn.shape == parameter.shape
        if parameter.std() == 0:  # norms and biases
            assert torch.equal(drawn, parameter)
        else:
            # 4 standard errors of a difference of two sampled standard deviations and means.
            std, tolerance = parameter.std().item(), 4 / parameter.numel() ** 0.5
            assert drawn.std().item() == pytest.approx(std, rel=tolerance), name
            assert drawn.mean().item() == pytest.approx(parameter.mean().item(), abs=1.5 * tolerance * std), name


def test_gpt2_residual_projections_are_scaled_by_their_parents() -> None:
    source = RandomWeights(build_meta_model(family_config("gpt2")), 0)
    scaled = source.rows("transformer.h.0.mlp.c_proj.weight", 0, 128).std().item()
    plain = source.rows("transformer.h.0.mlp.c_fc.weight", 0, 32).std().item()
    assert scaled / plain == pytest.approx(0.5, rel=0.1)  # 1/sqrt(2 · 2 layers)


def test_it_outlives_the_models_layers() -> None:
    model = build_meta_model(family_config("llama"))
    name = "model.layers.1.mlp.down_proj.weight"
    expected = RandomWeights(model, 3).rows(name, 0, 32)
    source = RandomWeights(model, 3)
    model.get_submodule("model.layers.1.mlp").down_proj = nn.Identity()
    assert torch.equal(source.rows(name, 0, 32), expected)


def test_both_names_of_a_tied_parameter() -> None:
    model = build_meta_model(family_config("qwen2"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    source = RandomWeights(model, 0)
    assert torch.equal(source.rows("lm_head.weight", 9, 20), source.rows("model.embed_tokens.weight", 9, 20))


def test_padding_row_is_zero_and_no_other() -> None:
    model = build_meta_model(family_config("opt"))
    drawn = RandomWeights(model, 0).rows("model.decoder.embed_tokens.weight", 0, 67)
    assert (drawn == 0).all(dim=1).nonzero().flatten().tolist() == [1]
    plain = nn.Embedding(40, 16, padding_idx=30, device="meta")  # in the second chunk
    assert (RandomWeights(plain, 0).rows("weight", 0, 40) == 0).all(dim=1).nonzero().flatten().tolist() == [30]


class Xavier(nn.Module):
    """Initialised by something that looks at the number of rows, and by something that looks at all rows at once."""

    def __init__(self) -> None:
        super().__init__()
        self.xavier = nn.Parameter(torch.empty(256, 16, device="meta"))
        self.orthogonal = nn.Parameter(torch.empty(64, 16, device="meta"))
        self.scalar = nn.Parameter(torch.empty((), device="meta"))
        self.linear = nn.Linear(16, 64, device="meta")

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.xavier)
        nn.init.orthogonal_(self.orthogonal)
        nn.init.constant_(self.scalar, 2.5)


def test_initialisers_that_look_at_the_whole_parameter() -> None:
    source = RandomWeights(Xavier(), 0)
    xavier = source.rows("xavier", 0, 256)
    assert xavier.abs().max().item() == pytest.approx((6 / 272) ** 0.5, rel=0.01)  # not (6 / (chunk + 16)) ** 0.5
    assert torch.equal(source.rows("xavier", 100, 130), xavier[100:130])
    orthogonal = source.rows("orthogonal", 0, 64)
    torch.testing.assert_close(orthogonal.T @ orthogonal, torch.eye(16))
    assert source.rows("scalar", 0, 1).tolist() == [2.5]
    for name, shape in (("linear.weight", (64, 16)), ("linear.bias", (64,))):
        drawn = source.rows(name, 0, 64)
        assert drawn.shape == shape
        assert drawn.abs().max().item() == pytest.approx(0.25, rel=0.1)  # 1/sqrt(fan in)


def test_no_more_than_a_chunk_is_materialised(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    full = torch.full

    def counting(size: torch.Size, *args: object, device: str) -> torch.Tensor:
        sizes.append(torch.Size(size).numel() if device == "cpu" else 0)
        return full(size, *args, device=device)

    monkeypatch.setattr(torch, "full", counting)
    source = RandomWeights(LLAMA, 0)
    for name, shape in SHAPES.items():
        source.rows(name, 0, shape[0])
    assert 0 < max(sizes) <= weights.CHUNK_ELEMENTS


class Uncovered(PreTrainedModel):
    config_class = PreTrainedConfig

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.gate = nn.Parameter(torch.zeros(4))
        self.bilinear = nn.Bilinear(2, 3, 4)
        self.post_init()


def test_uncovered_parameters() -> None:
    with torch.device("meta"):
        source = RandomWeights(Uncovered(PreTrainedConfig()), 0)
    with pytest.raises(ValueError, match=r"nothing initialises the parameter gate \(of a Uncovered\)"):
        source.rows("gate", 0, 4)
    # Not covered by _init_weights either, but by its own constructor's reset_parameters.
    assert 0 < source.rows("bilinear.weight", 0, 4).abs().max().item() <= 2**-0.5


def test_wrong_requests_are_refused(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(family_config("llama")).save_pretrained(tmp_path)
    stored = SafetensorsWeights(tmp_path)
    for source in (RandomWeights(LLAMA, 0), stored, DenseWeights({"model.norm.weight": torch.ones(32)})):
        with pytest.raises(ValueError, match=r"model\.norm\.wieght.*nearest name is 'model\.norm\.weight'"):
            source.rows("model.norm.wieght", 0, 1)
        for start, stop in ((-1, 2), (3, 2), (0, 33)):
            with pytest.raises(ValueError, match=r"model\.norm\.weight were asked for; write rows within \[0, 32\)"):
                source.rows("model.norm.weight", start, stop)


# ---- pretrained ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "phi", "opt"])
@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_models_are_streamed(tmp_path: Path, family: str, shard_size: str, dtype: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_config(family_config(family)).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "20KB")
    source = pretrained_weights(tmp_path, build_meta_model(model.config))
    assert isinstance(source, SafetensorsWeights)
    assert_holds(source, model)
    name, parameter = next(iter(model.named_parameters()))
    source.rows(name, 0, 5).zero_()
    assert torch.equal(source.rows(name, 0, 5), parameter[:5].float())


def test_files_without_the_base_prefix_are_streamed(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(family_config("gpt2"))
    model.transformer.save_pretrained(tmp_path)
    source = pretrained_weights(tmp_path, build_meta_model(model.config))
    assert isinstance(source, SafetensorsWeights)
    assert_holds(source, model)


@pytest.mark.parametrize("family", ["mixtral", "gpt_neox"])
def test_other_names_need_the_whole_model(tmp_path: Path, family: str) -> None:
    model = AutoModelForCausalLM.from_config(family_config(family))
    # Mixtral's files have a matrix per expert where the model has one tensor; GPT-NeoX's call the head embed_out.
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"model\.path: its files do not hold .* whole model into host memory"):
        source = pretrained_weights(tmp_path, build_meta_model(model.config))
    assert isinstance(source, DenseWeights)
    assert_holds(source, model)


def test_an_untied_model_from_tied_files(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(family_config("qwen2"))
    model.save_pretrained(tmp_path)
    untied = family_config("qwen2")
    untied.tie_word_embeddings = False
    with pytest.warns(UserWarning, match=r"lm_head\.weight.*host memory"):
        source = pretrained_weights(tmp_path, build_meta_model(untied))
    assert torch.equal(source.rows("lm_head.weight", 0, 67), model.lm_head.weight)


def test_fewer_layers_stream_and_other_shapes_are_refused(tmp_path: Path) -> None:
    config = family_config("llama")
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    config.num_hidden_layers = 1
    assert isinstance(pretrained_weights(tmp_path, build_meta_model(config)), SafetensorsWeights)
    config.vocab_size = 99
    message = r"embed_tokens\.weight as \(67, 32\), but the model needs \(99, 32\); .*model\.overrides"
    with pytest.raises(ValueError, match=message):
        pretrained_weights(tmp_path, build_meta_model(config))
    config.vocab_size, config.num_hidden_layers = 67, 3
    with (
        pytest.warns(UserWarning, match="host memory"),
        pytest.raises(ValueError, match=r"model\.layers\.2\..* as nothing, but the model needs"),
    ):
        pretrained_weights(tmp_path, build_meta_model(config))


def test_missing_files_and_weights(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has neither model\.safetensors nor"):
        pretrained_weights(tmp_path, LLAMA)
    model = AutoModelForCausalLM.from_config(family_config("llama"))
    model.model.save_pretrained(tmp_path)  # no head
    with pytest.warns(UserWarning, match="host memory"), pytest.raises(ValueError, match=r"lack \['lm_head\.weight'\]"):
        pretrained_weights(tmp_path, LLAMA)
    (tmp_path / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=r"its index names model-00001-of-00002"):
        pretrained_weights(tmp_path, LLAMA)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "model.bin", 3])
def test_an_index_names_files_beside_it_only(tmp_path: Path, name: object) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(ValueError, match="is no index of safetensors files beside it"):
        pretrained_weights(tmp_path, LLAMA)


def test_weights_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(family_config("llama"))
    model.model.norm.weight.data[1] = torch.inf
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model\.norm\.weight holds NaN or infinity"):
        pretrained_weights(tmp_path, LLAMA).rows("model.norm.weight", 0, 2)
    with pytest.raises(ValueError, match=r"model\.norm\.weight holds NaN or infinity"):
        DenseWeights(dict(model.named_parameters())).rows("model.norm.weight", 0, 2)
