"""Checkpoints as plain Hugging Face models: `export_checkpoint` is the whole interface.

parts.py          which tensors of a checkpoint make up which parameter of the original model
formats.py        a parameter as dense, 4-bit and LoRA tensors
model_folder.py   safetensors files, a shard at a time, and the folder around them
"""

from loqt_scale.export.model_folder import export_checkpoint

__all__ = ["export_checkpoint"]
