"""What the machine can do: accelerators, memory, precision, direct I/O, and ranks that really meet."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch

from craken.comm import Accelerator, get_accelerator
from craken.disk import takes_direct_io
from craken.doctor.finding import Finding
from craken.launch import launch_local

_GIB = 1 << 30
_PROBE = "craken.doctor.probe"
_BF16_FLAGS = ("amx_bf16", "avx512_bf16", "bf16")  # the last is ARM's
_FP16_FLAGS = ("amx_fp16", "avx512_fp16", "asimdhp")


def check_devices() -> list[Finding]:
    """Find the accelerators and the memory that ranks would use."""
    accelerator = get_accelerator()
    if accelerator.is_cpu:
        reason = "torch is built without CUDA" if torch.version.cuda is None else "no device or no driver"
        found = Finding("accelerator", False, f"none ({reason}); ranks run on the CPU with gloo")
    else:
        found = Finding("accelerator", True, f"{accelerator.device_count()} x {accelerator.device_name()}")
    memory = f"{accelerator.available_memory() / _GIB:.1f} of {accelerator.total_memory() / _GIB:.1f} GiB free"
    cores = f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores"
    return [found, Finding("memory", True, memory), Finding("cpu", True, f"{cores}, {_cpu_capability()}")]


def check_precision() -> list[Finding]:
    """Find whether 16-bit arithmetic is native or emulated."""
    accelerator = get_accelerator()
    if accelerator.is_cpu:
        flags = cpu_flags(Path("/proc/cpuinfo"))
        return [_cpu_precision("bf16", _BF16_FLAGS, flags), _cpu_precision("fp16", _FP16_FLAGS, flags)]
    return [_device_precision("bf16", accelerator.is_bf16_supported(), accelerator), Finding("fp16", True, "native")]


def check_nccl() -> Finding:
    """Find whether ranks on GPUs can talk through NCCL; that gloo works is seen by `check_rendezvous`."""
    if not torch.cuda.is_available():
        return Finding("nccl", False, "no CUDA device here; ranks talk through gloo")
    if not hasattr(torch._C, "_nccl_version"):
        return Finding("nccl", False, "this torch is built without it; install torch's CUDA wheel for Linux")
    version = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    return Finding("nccl", True, ".".join(str(part) for part in version))


def check_rendezvous() -> Finding:
    """Start two ranks over loopback and let them exchange a word; takes seconds."""
    begin_s = time.monotonic()
    code = launch_local([sys.executable, "-m", _PROBE], 2, grace_s=1)
    seconds = time.monotonic() - begin_s
    if code == 0:
        return Finding("gloo", True, f"two ranks started, met over loopback and exchanged words in {seconds:.1f} s")
    return Finding("gloo", False, f"two ranks did not meet over loopback (exit code {code}, reason above)")


def check_direct_io(folder: Path) -> Finding:
    """Write and read one block past the page cache in `folder`, as NVMe offload does."""
    name = "direct I/O"
    try:
        if takes_direct_io(folder):
            return Finding(name, True, f"works in {folder}")
        reason = "refused, offload to files goes through the page cache"
    except OSError as error:
        reason = str(error.strerror)
    return Finding(name, False, f"{folder}: {reason}; put nvme_path on a local file system such as ext4")


def cpu_flags(path: Path) -> set[str]:
    """Return the first processor's feature flags from a file like /proc/cpuinfo; empty when there is none."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return set()
    features = [line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))]
    return set(features[0]) if features else set()


def _cpu_precision(name: str, wanted: tuple[str, ...], flags: set[str]) -> Finding:
    native = [flag for flag in wanted if flag in flags]
    if native:
        return Finding(name, True, f"native ({', '.join(native)})")
    return Finding(name, False, "works, emulated by this CPU: right results, at fp32's speed or less")


def _device_precision(name: str, is_native: bool, accelerator: Accelerator) -> Finding:
    if is_native:
        return Finding(name, True, "native")
    return Finding(name, False, f"{accelerator.device_name()} has none in hardware; use fp16 with a dynamic loss scale")


def _cpu_capability() -> str:
    return f"torch uses {torch.backends.cpu.get_cpu_capability()}"
