"""Trains one rank's share of a run: the loop that a user of the library would write, with a progress bar."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

import craken
from craken.checkpoint import Place, newest_whole, run_on_all
from craken.comm import MeshAxis, bytes_sent, get_accelerator, world_axis
from craken.stop import Stop, StopRequest, agree
from craken.train import huggingface
from craken.train.arguments import Resume, flags_to_keep
from craken.train.earlier import KEPT_FLAGS
from craken.train.evaluate import validate
from craken.train.metrics import EvalMetrics, MetricsFile, StepMetrics
from craken.train.prepare import Plan
from craken.train.progress import RunProgress
from craken.train.report import write_report
from craken.train.windows import Batch, Windows, predicted_tokens, unigram_entropy, validation_numbers


@dataclass(frozen=True)
class RunEnd:
    """How training ended: by its last step (`stop` None) or before; `step` is the last one done.

    num_new: steps done since the run began or was resumed.
    """

    step: int
    stop: Stop | None
    num_new: int

    @property
    def is_cut_short(self) -> bool:
        """Somebody stopped it: there is a checkpoint if there was a step, and nothing to show yet."""
        return self.stop in (Stop.INTERRUPTED, Stop.TERMINATED)


class Trainer:
    """One rank of one run: the engine, its data, and the figures so far. `run` is collective over all ranks."""

    def __init__(self, plan: Plan, console: Console) -> None:
        options = plan.options
        torch.manual_seed(options.seed)
        self.plan = plan
        self.console = console
        self.model = huggingface.build_model(
            options.model, vocab_size=plan.cache.meta.vocab_size, seq_len=options.seq_len
        )
        self.num_parameters = huggingface.num_parameters(self.model)  # before they may be shown as shards
        windows = Windows(plan.cache.train(), options.seq_len, seed=options.seed)
        self.engine, self.optimizer, self.loader, self.scheduler = craken.initialize(
            model=self.model, model_parameters=self.model.parameters(), training_data=windows, config=plan.config
        )
        self.axis: MeshAxis = world_axis()
        self.device = get_accelerator().device()
        self.elapsed_s = 0.0  # of training, over all parts of an interrupted run
        self.is_first_rank = self.axis.rank == 0
        first_step = self._load()
        if plan.remark:
            console.print(plan.remark, soft_wrap=True, markup=False)
        self.metrics = (
            MetricsFile(options.output / "metrics.jsonl", last_step=first_step) if self.is_first_rank else None
        )
        self._validation = self._plan_validation()

    def run(self, request: StopRequest) -> RunEnd:
        """Train to the last step or until the ranks agree to stop; save a checkpoint after the last step done."""
        options, first_step = self.plan.options, int(self.engine.global_steps)
        batches = self._endless_batches()
        stop = request.agreed(self.axis)
        progress = RunProgress(self.console, num_steps=options.steps, first_step=first_step, minutes=options.minutes)
        with progress:
            while self.engine.global_steps < options.steps and stop is None:
                row, stop = self._step(batches, request)
                self._note_step(row, progress)
                is_last = stop is not None or row.step == options.steps
                is_cut_short = stop in (Stop.INTERRUPTED, Stop.TERMINATED)
                if not is_cut_short and (is_last or row.step % options.eval_every == 0):
                    self._validate(progress)
                if is_last or (options.save_every and row.step % options.save_every == 0):
                    self.save()
        self.engine.wait_for_checkpoint()
        return RunEnd(self.engine.global_steps, stop, self.engine.global_steps - first_step)

    def save(self) -> None:
        """Collective: write a checkpoint; the engine drops old ones."""
        options, batch_size = self.plan.options, self.plan.batch.train_batch_size
        flags = flags_to_keep(options, num_ranks=self.axis.size, batch_size=batch_size)
        state = {"elapsed_s": self.elapsed_s, KEPT_FLAGS: flags}
        self.engine.save_checkpoint(options.checkpoints, tag=f"step{self.engine.global_steps}", client_state=state)

    def save_model(self, folder: Path) -> None:
        """Collective: write the model as `from_pretrained` reads it; its weights are whole on all ranks meanwhile."""
        options, tokenizer = self.plan.options, self.plan.cache.tokenizer_file
        with craken.GatheredParameters(self.model.parameters()):
            if self.is_first_rank:
                huggingface.save_model(self.model, options.model, tokenizer, folder, seq_len=options.seq_len)

    def write_report(self, *, completion: huggingface.Completion | None = None) -> None:
        """Write `report.html` from the metrics so far; on the first rank only."""
        if self.metrics is not None:
            facts = run_facts(self.plan, self.num_parameters, self.axis.size)
            write_report(self.plan.options.output / "report.html", self.metrics, facts, completion)

    def _step(self, batches: Iterator[Batch], request: StopRequest) -> tuple[StepMetrics, Stop | None]:
        start_s, start_bytes = time.perf_counter(), bytes_sent()
        lr = float(self.engine.get_lr()[0])  # before the step moves the schedule on
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        for _ in range(self.plan.batch.accumulation_steps):
            loss: Tensor = self.engine(**next(batches), use_cache=False).loss
            self.engine.backward(loss)
            self.engine.step()
            loss_sum += loss.detach()
        mean = float(loss_sum) / self.plan.batch.accumulation_steps
        end = agree(mean, self._reason_to_stop(request, start_s), axis=self.axis)
        step_s = time.perf_counter() - start_s
        self.elapsed_s += step_s
        return self._measure(end.loss, lr, step_s, bytes_sent() - start_bytes), end.stop

    def _reason_to_stop(self, request: StopRequest, start_s: float) -> Stop | None:
        limit = self.plan.options.minutes
        elapsed_s = self.elapsed_s + time.perf_counter() - start_s
        return Stop.OUT_OF_TIME if limit and elapsed_s > limit * 60 and not request.heard else request.heard

    def _measure(self, loss: float, lr: float, step_s: float, sent_bytes: int) -> StepMetrics:
        accelerator = get_accelerator()
        norm = self.engine.get_global_grad_norm()
        return StepMetrics(
            step=self.engine.global_steps,
            loss=loss,
            lr=lr,
            grad_norm=None if norm is None else float(norm),
            tokens=self.engine.global_steps * self.plan.tokens_per_step,
            tokens_per_s=self.plan.tokens_per_step / step_s,
            step_s=step_s,
            elapsed_s=self.elapsed_s,
            memory_bytes=accelerator.memory_allocated(),
            peak_memory_bytes=accelerator.max_memory_allocated(),
            sent_bytes=sent_bytes,
            skipped_steps=self.engine.skipped_steps,
        )

    def _note_step(self, row: StepMetrics, progress: RunProgress) -> None:
        if self.metrics is not None:
            self.metrics.add_step(row)
            progress.show_step(row)

    def _validate(self, progress: RunProgress) -> None:
        windows, numbers = self._validation
        result = validate(
            self.engine,
            windows,
            numbers,
            batch_size=self.plan.batch.micro_batch_size,
            axis=self.axis,
            device=self.device,
        )
        if self.metrics is not None:
            row = EvalMetrics(self.engine.global_steps, result.loss, self._unigram, result.num_tokens, self.elapsed_s)
            self.metrics.add_eval(row)
            progress.show_eval(row)
            self.write_report()

    def _plan_validation(self) -> tuple[Windows, NDArray[np.int64]]:
        cache, options = self.plan.cache, self.plan.options
        windows = Windows(cache.held_out(), options.seq_len)
        numbers = validation_numbers(len(windows), options.eval_windows, self.axis.size)
        self._unigram = unigram_entropy(cache.train(), predicted_tokens(windows, numbers), cache.meta.vocab_size)
        return windows, numbers

    def _endless_batches(self) -> Iterator[Batch]:
        """Yield micro-batches for ever; what is left of an epoch and makes no step is left out.

        So steps are of the same samples however ranks and micro-batches share them, in the epochs after the first too.
        """
        num_micro_batches = self.plan.batch.accumulation_steps
        while True:
            assert self.loader is not None  # `initialize` makes one, since it was given training data
            batches = iter(self.loader)
            while len(step := list(itertools.islice(batches, num_micro_batches))) == num_micro_batches:
                for batch in step:
                    yield {name: tensor.to(self.device) for name, tensor in batch.items()}

    def _load(self) -> int:
        """Collective: go on from a checkpoint if the run is to; returns the steps done."""
        options = self.plan.options
        folder, resume = options.checkpoints, options.resume
        tag = None
        if resume is Resume.NEVER:
            return 0
        if resume is Resume.IF_POSSIBLE:
            tag = self._agreed_newest(folder)
            if tag is None:
                self.console.print(f"no checkpoint in {folder}: beginning", soft_wrap=True, markup=False)
                return 0
        path, state = self.engine.load_checkpoint(folder, tag=tag)
        if path is None or state is None:
            raise ValueError(f"--resume: no checkpoint in {folder}; begin with --resume auto --output {options.output}")
        self.elapsed_s = float(state["elapsed_s"])
        return int(self.engine.global_steps)

    def _agreed_newest(self, folder: Place) -> str | None:
        """Collective: return the tag of the newest whole checkpoint that rank 0 finds."""

        def look() -> tuple[None, str | None]:
            if not self.is_first_rank:
                return None, None
            found = newest_whole(folder)
            for tag, reason in found.damaged.items():
                self.console.print(f"passing over the damaged checkpoint {tag}: {reason}", soft_wrap=True, markup=False)
            return None, found.tag

        _, tags = run_on_all(look, self.axis, doing=f"looking for a checkpoint in {folder}")
        return tags[0]


def run_facts(plan: Plan, num_parameters: int, num_ranks: int) -> dict[str, str]:
    """Return what the report's table says of a run, in words."""
    options, meta = plan.options, plan.cache.meta
    accelerator = get_accelerator()
    device = "CPU processes" if accelerator.is_cpu else torch.cuda.get_device_name()
    clipping = plan.config.get("gradient_clipping")
    return {
        "model": f"{options.model}, {num_parameters / 1e6:.2f} M parameters",
        "text": f"{options.data or 'Python standard library'}, {meta.characters / 1e6:.1f} M characters",
        "tokens": f"{meta.train_tokens:,} to train, {meta.held_out_tokens:,} held out, {meta.vocab_size:,} kinds",
        "ranks": f"{num_ranks} x {device}",
        "ZeRO stage": str(options.zero),
        "precision": options.precision,
        "batch": (
            f"{plan.batch.train_batch_size} sequences of {options.seq_len} tokens = micro-batch "
            f"{plan.batch.micro_batch_size} x accumulation {plan.batch.accumulation_steps} x {num_ranks} ranks"
        ),
        "optimizer": f"{plan.config['optimizer']['type']}, {_rates(plan.config['optimizer']['params'])}",
        "schedule": str(plan.config["scheduler"]["type"]),
        "clipping": "none" if not clipping else f"gradient norm {clipping:g}",
        "configuration": str(options.config or "from flags"),
        "seed": str(options.seed),
        "versions": f"craken {craken.__version__}, torch {torch.__version__}",
    }


def _rates(params: dict[str, Any]) -> str:
    rates = [f"{name.replace('lr', 'peak rate').replace('_', ' ')} {params[name]:g}" for name in params if "lr" in name]
    return ", ".join(rates)


def describe(plan: Plan) -> dict[str, Any]:
    """Return the whole run as plain data, for `run.json`."""
    return {"config": plan.config, "data": asdict(plan.cache.meta), "batch": plan.batch._asdict()}
