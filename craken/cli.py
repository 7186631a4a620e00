"""The `craken` command: parses, then calls one function; each subcommand is imported when it is used."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from craken.log import logger
from craken.version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run `craken <command> ...`; return the exit code, 2 for wrong input."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = _build_parser()
    if not words:
        parser.print_help()
        return 2
    if words[0].startswith("-") or words[0] not in _COMMANDS:
        parser.parse_args(words)  # --version, --help, or an error that lists the commands
        return 2
    return _COMMANDS[words[0]][0](words[1:])


def deepspeed(argv: Sequence[str] | None = None) -> int:
    """Run the `deepspeed` script, which is `craken launch` under its old name."""
    from craken.launch import main as launch

    return launch(argv, prog="deepspeed")


def ds_report(argv: Sequence[str] | None = None) -> int:
    """Run the `ds_report` script, which is `craken doctor` under its old name."""
    return _doctor(sys.argv[1:] if argv is None else argv, prog="ds_report")


def zero_to_fp32(argv: Sequence[str] | None = None) -> int:
    """Run the `zero_to_fp32` script, which every checkpoint folder holds a copy of."""
    from craken.checkpoint.export.fp32 import main as convert

    return convert(argv)


def _launch(words: Sequence[str]) -> int:
    from craken.launch import main as launch

    return launch(words, prog="craken launch")


def _train(words: Sequence[str]) -> int:
    from craken.stop import StopRequest

    with StopRequest().listening() as request:
        from craken.train.command import main as train  # takes seconds, in which a signal may come

        return train(list(words), request=request)


def _doctor(words: Sequence[str], prog: str = "craken doctor") -> int:
    argparse.ArgumentParser(prog=prog, description="Say what works on this machine, and why not.").parse_args(words)
    from craken.doctor import show_report

    show_report()
    return 0


def _config(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="craken config", description="Check a config file, show its batch sizes.")
    parser.add_argument("file", help="a JSON file")
    parser.add_argument("--world-size", type=int, default=1, metavar="N", help="data-parallel ranks (1)")
    arguments = parser.parse_args(words)
    return _check_config(arguments.file, arguments.world_size)


def _io(words: Sequence[str]) -> int:
    from craken.disk.command import main as measure_disk

    return measure_disk(words)


def _export(words: Sequence[str]) -> int:
    from craken.checkpoint.export.command import main as export

    return export(words, _linear_layers)


def _linear_layers(folder: Path) -> tuple[list[str], list[str]]:
    from craken.train.huggingface import linear_layers

    return linear_layers(folder)


def _inspect(words: Sequence[str]) -> int:
    from craken.checkpoint.inspect_command import main as inspect

    return inspect(words)


def _import(words: Sequence[str]) -> int:
    from craken.checkpoint.original.command import main as import_checkpoint

    return import_checkpoint(words)


def _check_config(file: str, num_ranks: int) -> int:
    from rich.console import Console

    import craken

    try:
        batch = craken.check_config(file, num_ranks)
    except (ValueError, OSError, NotImplementedError) as error:
        logger.error(str(error))
        return 2
    Console(highlight=False).print(
        f"{file}: no problem found. On {num_ranks} rank{'s' if num_ranks > 1 else ''}: "
        f"train_batch_size {batch.train_batch_size} = train_micro_batch_size_per_gpu {batch.micro_batch_size} x "
        f"gradient_accumulation_steps {batch.accumulation_steps} x {num_ranks}",
        soft_wrap=True,
    )
    return 0


_COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "train": (_train, "train a model with ZeRO on all accelerators, or on CPU processes"),
    "launch": (_launch, "start a script as one rank an accelerator, on one host or many"),
    "export": (_export, "write a checkpoint as a Hugging Face model: merged, in another dtype, quantised"),
    "inspect": (_inspect, "say what a checkpoint holds, and check every block of it"),
    "config": (_config, "check a config file and show the batch sizes it means"),
    "io": (_io, "measure a disk for offload, and find the settings that suit it"),
    "import": (_import, "turn a checkpoint that DeepSpeed wrote into one of ours"),
    "doctor": (_doctor, "say what works on this machine, and why not"),
}


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="craken",
        description="Train, fine-tune and serve PyTorch models larger than one device.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"  {name:<8} {text}" for name, (_, text) in _COMMANDS.items())
        + "\n\n`craken <command> --help` says more.",
    )
    parser.add_argument("--version", action="version", version=f"craken {__version__}")
    parser.add_argument("command", choices=list(_COMMANDS), metavar="command", help="one of those below")
    return parser


if __name__ == "__main__":
    sys.exit(main())
