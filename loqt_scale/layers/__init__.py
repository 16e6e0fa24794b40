"""The layer and how it gets into a model."""

from loqt_scale.layers.candidates import Candidate
from loqt_scale.layers.convert import check_kinds, convert, convert_to_loqt, loqt_layers, select_linears
from loqt_scale.layers.experts import LoQTExperts
from loqt_scale.layers.layer import GradientProbe, LoQTLayer
from loqt_scale.layers.linear import LoQTLinear
from loqt_scale.layers.report import ConversionReport, Left

__all__ = [
    "Candidate",
    "ConversionReport",
    "GradientProbe",
    "Left",
    "LoQTExperts",
    "LoQTLayer",
    "LoQTLinear",
    "check_kinds",
    "convert",
    "convert_to_loqt",
    "loqt_layers",
    "select_linears",
]
