"""What is installed: Python, torch, optional libraries, and whose `deepspeed` is imported."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import sys

import torch

from craken.doctor.finding import Finding
from craken.version import __version__

_LIBRARIES = {  # distribution -> what it is for
    "transformers": "Hugging Face models; pip install 'craken[hf]'",
    "accelerate": "accelerate launch; pip install 'craken[hf]'",
    "tokenizers": "tokenizers for `craken train`; pip install 'craken[hf]'",
    "peft": "adapters such as LoRA; pip install peft",
    "trl": "SFTTrainer and its kin; pip install trl",
    "bitsandbytes": "4-bit and 8-bit weights; pip install bitsandbytes",
    "tensorboard": "the tensorboard monitor; pip install 'craken[monitor]'",
    "wandb": "the wandb monitor; pip install 'craken[monitor]'",
}
_PROGRAMS = {
    "ssh": "reaches other hosts; install openssh-client",
    "pdsh": "--launcher pdsh; install pdsh, or use ssh",
    "mpirun": "--launcher openmpi; install Open MPI, or use ssh",
    "srun": "--launcher slurm; there on Slurm clusters",
}


def check_python() -> list[Finding]:
    """Find the versions of what everything stands on."""
    return [
        Finding("craken", True, __version__),
        Finding("python", sys.version_info >= (3, 10), f"{platform.python_version()} at {sys.executable}"),
        Finding("torch", True, torch.__version__),
    ]


def check_drop_in() -> Finding:
    """Find whose package `import deepspeed` gives."""
    version = _version("deepspeed")
    if version is None:
        return Finding("deepspeed drop-in", False, "not installed; scripts that import deepspeed need it: dropin/")
    if "craken" not in version:
        remedy = "`pip uninstall deepspeed`, then install the drop-in again"
        return Finding("deepspeed drop-in", False, f"the original {version} is installed in its place; {remedy}")
    return Finding("deepspeed drop-in", True, version)


def check_libraries() -> list[Finding]:
    """Find which optional libraries are installed."""
    versions = {name: _version(name) for name in _LIBRARIES}
    return [Finding(name, found is not None, found or f"for {_LIBRARIES[name]}") for name, found in versions.items()]


def check_programs() -> list[Finding]:
    """Find which programs that reach other hosts are on PATH."""
    paths = {name: shutil.which(name) for name in _PROGRAMS}
    return [Finding(name, path is not None, path or f"for {_PROGRAMS[name]}") for name, path in paths.items()]


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
