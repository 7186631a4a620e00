"""Trains a sequence-to-sequence model with LoRA to say whether a sentence complains, by accelerate's own loop.

accelerate launch --config_file examples/seq2seq/zero3_offload.yaml examples/seq2seq/train.py --help
"""

from __future__ import annotations

import argparse
import gc
import os
import threading
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from datasets import load_dataset
from peft import LoraConfig, TaskType, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, get_linear_schedule_with_warmup, set_seed


def main() -> None:
    args = parse()
    # without GPUs accelerate counts one process unless the backend is named
    on_cpu = [] if torch.cuda.is_available() else [InitProcessGroupKwargs(backend="gloo")]
    accelerator = Accelerator(kwargs_handlers=on_cpu if "LOCAL_RANK" in os.environ else [])
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    loaders = make_loaders(args, tokenizer, accelerator)
    model = AutoModelForSeq2SeqLM.from_pretrained(args.model_name_or_path)
    model = get_peft_model(model, LoraConfig(task_type=TaskType.SEQ_2_SEQ_LM, r=8, lora_alpha=32, lora_dropout=0.1))
    model.print_trainable_parameters()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    scheduler = get_linear_schedule_with_warmup(optimizer, 0, len(loaders[0]) * args.num_epochs)
    model, *loaders, optimizer, scheduler = accelerator.prepare(model, *loaders, optimizer, scheduler)
    train_loader, eval_loader, test_loader = loaders
    plugin = accelerator.state.deepspeed_plugin
    is_zero_3 = plugin is not None and plugin.zero_stage == 3
    accelerator.print(f"ZeRO stage {plugin.zero_stage if plugin else 'none'}, {accelerator.num_processes} process(es)")

    for epoch in range(args.num_epochs):
        with MemoryReport(accelerator, "train"):
            loss = train(accelerator, model, train_loader, optimizer, scheduler)
        accelerator.print(f"epoch {epoch}: train loss {loss:.4f}")
    for name, loader in (("train", eval_loader), ("test", test_loader)):
        with MemoryReport(accelerator, f"generate ({name})"):
            said, labels = answers(accelerator, model, loader, tokenizer, synced_gpus=is_zero_3)
        right = sum(one == other for one, other in zip(said, labels, strict=True))
        accelerator.print(f"{name} accuracy: {100 * right / len(labels):.1f} % of {len(labels)}")
    accelerator.wait_for_everyone()
    weights = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(args.output_dir, state_dict=weights)
    accelerator.wait_for_everyone()
    accelerator.end_training()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_name_or_path", default="facebook/bart-large", help="a name on the hub, or a folder")
    parser.add_argument("--dataset", type=Path, default=Path("runs/assets/complaints"), help="train.jsonl, test.jsonl")
    parser.add_argument("--output_dir", default="runs/seq2seq-lora", help="where the adapter goes")
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--num_epochs", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=42)
    return parser.parse_args()


def make_loaders(args: argparse.Namespace, tokenizer: Any, accelerator: Accelerator) -> list[DataLoader]:
    """Return loaders of the training split to learn from, of the same in order, and of the test split."""
    files = {split: str(args.dataset / f"{split}.jsonl") for split in ("train", "test")}
    with accelerator.main_process_first():
        rows = load_dataset("json", data_files=files)

    def collate(batch: list[dict[str, str]]) -> dict[str, torch.Tensor]:
        texts = [f"Tweet text : {row['text']} Label :" for row in batch]
        # fixed widths: every rank's batches have one shape
        inputs = tokenizer(texts, padding="max_length", max_length=64, truncation=True, return_tensors="pt")
        wanted = [row["label"] + tokenizer.eos_token for row in batch]
        labels = tokenizer(wanted, padding="max_length", max_length=12, truncation=True, return_tensors="pt")[
            "input_ids"
        ]
        labels = labels.masked_fill(labels == tokenizer.pad_token_id, -100)
        return {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "labels": labels}

    def loader(split: str, *, shuffles: bool) -> DataLoader:
        return DataLoader(rows[split], batch_size=args.batch_size, shuffle=shuffles, collate_fn=collate)

    return [loader("train", shuffles=True), loader("train", shuffles=False), loader("test", shuffles=False)]


def train(accelerator: Accelerator, model: Any, loader: Any, optimizer: Any, scheduler: Any) -> float:
    """Go through the data once; returns the mean loss over batches and ranks."""
    model.train()
    total = torch.zeros((), device=accelerator.device)
    for batch in loader:
        loss = model(**batch).loss
        total += loss.detach().float()
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return accelerator.gather(total[None]).mean().item() / len(loader)


def answers(
    accelerator: Accelerator, model: Any, loader: Any, tokenizer: Any, *, synced_gpus: bool
) -> tuple[list[str], list[str]]:
    """Return what the model says to every row, and what it should have said. Collective."""
    model.eval()
    said: list[str] = []
    wanted: list[str] = []
    pad = tokenizer.pad_token_id
    for batch in loader:
        labels = batch.pop("labels")
        with torch.no_grad():
            tokens = accelerator.unwrap_model(model).generate(
                **batch, synced_gpus=synced_gpus, max_new_tokens=12, num_beams=1, do_sample=False
            )
        tokens = accelerator.pad_across_processes(tokens, dim=1, pad_index=pad)
        tokens, labels = accelerator.gather_for_metrics((tokens, labels))
        said += tokenizer.batch_decode(tokens, skip_special_tokens=True)
        wanted += tokenizer.batch_decode(labels.masked_fill(labels == -100, pad), skip_special_tokens=True)
    return [text.strip() for text in said], [text.strip() for text in wanted]


class MemoryReport:
    """Prints memory before, after and at the peak of a block, of the device (if it is a GPU) and of this process."""

    def __init__(self, accelerator: Accelerator, name: str) -> None:
        self.accelerator, self.name = accelerator, name
        self._process, self._done = psutil.Process(), threading.Event()

    def __enter__(self) -> None:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self._device_before = torch.cuda.memory_allocated()
        self._before = self._peak = self._process.memory_info().rss
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self._peak = max(self._peak, self._process.memory_info().rss)

    def __exit__(self, *problem: object) -> None:
        self._done.set()
        self._watcher.join()
        after = self._process.memory_info().rss
        self._print("host", self._before, after, max(self._peak, after))
        if torch.cuda.is_available():
            after, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
            self._print("device", self._device_before, after, peak)

    def _print(self, where: str, before: int, after: int, peak: int) -> None:
        before, after, peak = before >> 20, after >> 20, peak >> 20
        self.accelerator.print(f"{self.name}, {where} memory in MiB: before {before}, after {after}, peak {peak}")


if __name__ == "__main__":
    main()
