"""Trained models in use: a checkpoint as a model again, generated text, held-out loss."""

from loqt_scale.inference.generation import generate
from loqt_scale.inference.scoring import evaluate_saved

__all__ = ["evaluate_saved", "generate"]
