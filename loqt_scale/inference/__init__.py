"""Trained models in use: a checkpoint as a model again, generated text, held-out loss."""
