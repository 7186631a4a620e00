"""Checkpoints as what others read: Hugging Face models, fp32 state dicts."""
