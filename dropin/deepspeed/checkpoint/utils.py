"""deepspeed.checkpoint.utils."""

from craken.checkpoint import clone_tensors_for_torch_save as clone_tensors_for_torch_save
