"""The layer and how it gets into a model."""

from loqt_scale.layers.convert import convert_to_loqt, loqt_layers, select_linears
from loqt_scale.layers.linear import GradientProbe, LoQTLinear

__all__ = ["GradientProbe", "LoQTLinear", "convert_to_loqt", "loqt_layers", "select_linears"]
