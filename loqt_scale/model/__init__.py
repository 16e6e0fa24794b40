"""The Hugging Face model that is trained: which one, its structure on the meta device, its initial weights."""
