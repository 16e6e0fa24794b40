"""The layer and how it gets into a model.

a layer         layer (what all have in common), linear, experts; frozen (packed W_q and P), weight (what `.weight`
                is), copies (averages of layers), saving (state dicts)
a conversion    candidates (what could be one) -> select (which become one) -> convert -> conversion_report;
                names (no wrappers')
"""

from loqt_scale.layers.candidates import Candidate
from loqt_scale.layers.conversion_report import ConversionReport, Left
from loqt_scale.layers.convert import check_kinds, convert, convert_to_loqt, loqt_layers, select_linears
from loqt_scale.layers.experts import LoQTExperts
from loqt_scale.layers.layer import GradientProbe, LoQTLayer
from loqt_scale.layers.linear import LoQTLinear

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
