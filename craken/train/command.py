"""`craken train`: prepares the run in one process, starts the ranks, and in each of them trains, saves and reports."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from craken.comm import broadcast_object, init_distributed, shutdown, world_axis
from craken.launch import launch_local
from craken.stop import Stop, Stopped, StopRequest
from craken.train import huggingface
from craken.train.arguments import Options, parse, resolve, save_given
from craken.train.loop import RunEnd, Trainer, describe, run_facts
from craken.train.prepare import Plan, prepare
from craken.train.progress import PrepareProgress, show_completion, show_facts

WRONG_INPUT = 2  # exit code, as argparse's
CPU_RANKS = 2
MODEL = "model"  # the folder in the output
SAVING_GRACE_S = 120.0  # from Ctrl-C to the end of the step and its checkpoint


def main(argv: list[str] | None = None, *, request: StopRequest | None = None) -> int:
    """Run `craken train` with these flags (default: the command line's) and return the exit code.

    Started without RANK in the environment it prepares the data, then starts the ranks itself; with RANK it is one of
    them. `request` listens for signals already. 0: done, or stopped by SIGTERM, with a checkpoint if a step was done;
    1: a checkpoint could not be saved; 2: wrong input, told in one line; 130: stopped by Ctrl-C, likewise.
    """
    argv = sys.argv[1:] if argv is None else argv
    if request is None:
        with StopRequest().listening() as request:
            return main(argv, request=request)
    try:
        given = parse(argv)
        return _run_rank(given, request) if "RANK" in os.environ else _start(given, argv, request)
    except ValueError as error:
        sys.stderr.write(f"craken train: {error}\n")
        return WRONG_INPUT
    except Stopped as stopped:
        sys.stdout.write(f"stopped by {stopped.stop.value} before the first step: nothing was done yet\n")
        return stopped.stop.exit_code


def _start(given: Mapping[str, Any], argv: list[str], request: StopRequest) -> int:
    """Do here what needs one process, then run the ranks on this host to their end."""
    with request.raising():
        num_devices = torch.cuda.device_count()
        options = resolve(given, has_accelerator=num_devices > 0)
        num_ranks = options.ranks or num_devices or CPU_RANKS
        if 0 < num_devices < num_ranks:
            raise ValueError(f"--ranks {num_ranks}: this machine has {num_devices} accelerators; give at most as many")
        with PrepareProgress(Console(highlight=False)) as report:
            prepare(options, num_ranks=num_ranks, report=report)
        options.output.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "craken.train", *argv, "--output", str(options.output)]
        return launch_local(command, num_ranks, grace_s=SAVING_GRACE_S)  # takes signals itself


def _run_rank(given: Mapping[str, Any], request: StopRequest) -> int:
    """Be one rank: the first prepares (from the cache, where a parent has filled it) and tells the others."""
    init_distributed()
    axis = world_axis()
    console = Console(highlight=False, quiet=axis.rank != 0)
    plan = broadcast_object(_plan_or_problem(given, axis.size, console) if axis.rank == 0 else None, axis)
    if isinstance(plan, str):
        if axis.rank == 0:
            raise ValueError(plan)
        return WRONG_INPUT
    trainer = Trainer(plan, console)
    if axis.rank == 0:
        _note_start(trainer, console)
    end = trainer.run(request)
    if not end.is_cut_short:
        trainer.save_model(trainer.plan.options.output / MODEL)
    if axis.rank == 0:
        _finish(trainer, end, console)
    shutdown()
    return 0 if end.stop is None else end.stop.exit_code


def _plan_or_problem(given: Mapping[str, Any], num_ranks: int, console: Console) -> Plan | str:
    """Return the plan, or what is wrong, so that every rank learns of it and none waits for another."""
    try:
        options = resolve(given, has_accelerator=torch.cuda.is_available())
        with PrepareProgress(console) as report:
            plan = prepare(options, num_ranks=num_ranks, report=report)
        options.output.mkdir(parents=True, exist_ok=True)
    except ValueError as error:
        return str(error)
    return plan


def _note_start(trainer: Trainer, console: Console) -> None:
    options = trainer.plan.options
    save_given(options, num_ranks=trainer.axis.size, batch_size=trainer.plan.batch.train_batch_size)
    (options.output / "run.json").write_text(json.dumps(describe(trainer.plan), indent=2) + "\n", "utf-8")
    show_facts(console, run_facts(trainer.plan, trainer.num_parameters, trainer.axis.size))
    if trainer.engine.global_steps:
        console.print(f"going on after step {trainer.engine.global_steps}")


def _finish(trainer: Trainer, end: RunEnd, console: Console) -> None:
    """Write the report and complete the prompt, or say how to go on with an interrupted run; on the first rank only."""
    options = trainer.plan.options
    if end.is_cut_short:
        by = " by SIGTERM" if end.stop is Stop.TERMINATED else ""
        if end.step:
            trainer.write_report()
        if end.num_new:
            console.print(f"\nstopped{by} after step {end.step} of {options.steps}; checkpoint saved. Go on with:")
        else:
            console.print(f"\nstopped{by} before step {end.step + 1}: nothing was done yet. Go on with:")
        console.print(f"  {resume_command(options, is_begun=end.step > 0)}", soft_wrap=True)
        return
    completion = huggingface.complete(options.output / MODEL, options.prompt)
    trainer.write_report(completion=completion)
    show_completion(console, completion)
    _show_result(trainer, end, console)


def _show_result(trainer: Trainer, end: RunEnd, console: Console) -> None:
    output = trainer.plan.options.output
    assert trainer.metrics is not None
    reason = ", out of time" if end.stop is Stop.OUT_OF_TIME else ""
    console.print(f"\n[bold]done[/bold]: {end.step} steps in {trainer.elapsed_s / 60:.1f} minutes{reason}")
    if trainer.metrics.evals:
        last = trainer.metrics.evals[-1]
        gap = last.unigram_entropy - last.val_loss
        console.print(
            f"validation loss {last.val_loss:.3f} nats/token, {abs(gap):.2f} {'over' if gap < 0 else 'under'} the "
            f"unigram entropy of the same text, {last.unigram_entropy:.3f}",
            soft_wrap=True,
        )
    for name, what in (("report.html", "curves"), (MODEL, "for from_pretrained"), ("metrics.jsonl", "every step")):
        console.print(f"  {output / name}  [dim]{what}[/dim]", soft_wrap=True)


def resume_command(options: Options, *, is_begun: bool = True) -> str:
    """Return the command line that goes on with this run, or begins it where no step was done."""
    script = Path(sys.executable).with_name("craken")
    if not script.exists():
        command = [sys.executable, "-m", "craken.train"]
    elif shutil.which("craken") == str(script):
        command = ["craken", "train"]
    else:
        command = [os.path.relpath(script), "train"]
    resume = ["--resume", str(options.output)] if is_begun else ["--resume", "auto", "--output", str(options.output)]
    return shlex.join([*command, *resume])
