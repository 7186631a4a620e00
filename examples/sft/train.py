"""Fine-tunes a causal language model on conversations, whole or with LoRA, on quantised weights if asked.

accelerate launch --config_file examples/sft/zero3.yaml examples/sft/train.py --help
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from datasets import DatasetDict, load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, HfArgumentParser
from transformers.utils import is_flash_attn_2_available
from trl import SFTConfig, SFTTrainer

OLD_NAMES = {
    "--evaluation_strategy": "--eval_strategy",
    "--max_seq_len": "--max_length",
    "--warmup_ratio": "--warmup_steps",  # which takes a share too
}
CHAT_TEMPLATES = {
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "zephyr": (
        "{% for message in messages %}"
        "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
}
DTYPES = ["float16", "bfloat16", "float32"]
CHAT_TOKENS = {
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "zephyr": ["<|user|>", "<|assistant|>", "<|system|>"],
}


@dataclass
class ModelArguments:
    """What is trained."""

    model_name_or_path: str = field(metadata={"help": "a model's name on the hub, or a folder"})
    chat_template_format: str = field(
        default="none", metadata={"help": "how a conversation becomes a text", "choices": [*CHAT_TEMPLATES, "none"]}
    )
    use_flash_attn: bool = field(default=False, metadata={"help": "flash attention, where it can run"})
    use_peft_lora: bool = field(default=False, metadata={"help": "train LoRA matrices, not the weights"})
    lora_r: int = field(default=8, metadata={"help": "rank of the matrices"})
    lora_alpha: int = field(default=16, metadata={"help": "scale of the matrices, times their rank"})
    lora_dropout: float = field(default=0.1, metadata={"help": "dropout before the matrices"})
    lora_target_modules: str = field(
        default="all-linear", metadata={"help": "all-linear, or names separated by commas"}
    )
    use_8bit_quantization: bool = field(default=False, metadata={"help": "keep frozen weights in 8 bits"})
    use_4bit_quantization: bool = field(default=False, metadata={"help": "keep frozen weights in 4 bits"})
    use_nested_quant: bool = field(default=False, metadata={"help": "quantise the scales of 4-bit weights too"})
    bnb_4bit_quant_type: str = field(
        default="nf4", metadata={"help": "kind of 4-bit numbers", "choices": ["nf4", "fp4"]}
    )
    bnb_4bit_compute_dtype: str = field(
        default="float16", metadata={"help": "what 4-bit weights compute in", "choices": DTYPES}
    )
    bnb_4bit_quant_storage_dtype: str = field(
        default="uint8",
        metadata={
            "help": "dtype that packed weights wear: the model's, for all to be sharded alike",
            "choices": ["uint8", *DTYPES],
        },
    )
    use_reentrant: bool = field(default=False, metadata={"help": "kind of gradient checkpointing"})


@dataclass
class DataArguments:
    """What it is trained on."""

    dataset_name: str = field(metadata={"help": "a dataset's name on the hub, or a folder with a .jsonl a split"})
    splits: str = field(default="train,test", metadata={"help": "the split to train on, and the one to evaluate on"})
    add_special_tokens: bool = field(default=False, metadata={"help": "have the tokenizer add its marks to each text"})
    append_concat_token: bool = field(default=False, metadata={"help": "end each text with the end-of-text token"})


def main() -> None:
    model_args, data_args, args = parse(sys.argv[1:])
    tokenizer = load_tokenizer(model_args)
    model = load_model(model_args, args)
    grown = grow_vocabulary(model, tokenizer)
    data = load_texts(data_args, args, tokenizer, has_template=model_args.chat_template_format != "none")
    train_split, test_split = splits_of(data_args)
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=data[train_split],
        eval_dataset=data[test_split] if args.eval_strategy != "no" else None,
        processing_class=tokenizer,
        peft_config=lora_of(model_args, grown) if model_args.use_peft_lora else None,
    )
    if model_args.use_peft_lora:
        trainer.model.print_trainable_parameters()
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    note(f"weights that rank 0 keeps between steps, in KiB: {kept_weights(trainer.model)}")
    trainer.save_model()


# --- arguments --------------------------------------------------------------------------------------------------------


def parse(argv: list[str]) -> tuple[ModelArguments, DataArguments, SFTConfig]:
    on_cpu = [] if torch.cuda.is_available() else arguments_for_cpu()
    parser = HfArgumentParser((ModelArguments, DataArguments, SFTConfig))
    model_args, data_args, args = parser.parse_args_into_dataclasses([*on_cpu, *in_todays_words(argv)])
    splits_of(data_args)  # ends here if they are wrong, before a model is loaded
    args.gradient_checkpointing_kwargs = {"use_reentrant": model_args.use_reentrant}
    if args.push_to_hub and os.environ.get("HF_HUB_OFFLINE") == "1":
        note("HF_HUB_OFFLINE is set: nothing is pushed to the hub")
        args.push_to_hub = False
    if model_args.use_flash_attn and not is_flash_attn_2_available():
        note("flash attention cannot run here: PyTorch's own attention is used, across packed texts")
        model_args.use_flash_attn = False
    if args.packing and not model_args.use_flash_attn:
        args.packing_strategy = "wrapped"  # the other strategies need attention that stays within a text
    return model_args, data_args, args


def in_todays_words(argv: list[str]) -> list[str]:
    """Return arguments under the names they have in today's libraries; `--hub_private_repo` alone means True."""
    parts = [word.partition("=") for word in argv]
    words = [OLD_NAMES.get(name, name) + equals + value for name, equals, value in parts]
    for here in [place for place, word in enumerate(words) if word == "--hub_private_repo"]:
        if here + 1 == len(words) or words[here + 1].startswith("--"):
            words[here] = "--hub_private_repo=True"
    return words


def arguments_for_cpu() -> list[str]:
    """Name gloo where several are launched: without GPUs accelerate counts one process unless the backend is named."""
    if "LOCAL_RANK" not in os.environ:
        return ["--use_cpu", "True"]
    PartialState(backend="gloo")
    return ["--use_cpu", "True", "--accelerator_config", '{"use_configured_state": true}']


def splits_of(data_args: DataArguments) -> list[str]:
    splits = data_args.splits.split(",")
    if len(splits) != 2 or not all(splits):
        raise SystemExit(
            f"--splits {data_args.splits}: expected two names, as in train,test: to train on, to evaluate on"
        )
    return splits


def kept_weights(model: Any) -> str:
    """Return how much of its weights a rank keeps, by kind and dtype; under ZeRO-3 the large ones are shares."""
    kept, whole = Counter(), Counter()
    for param in model.parameters():
        kind = f"{type(param).__name__} {str(param.dtype).removeprefix('torch.')}"
        is_sharded = hasattr(param, "ds_tensor") and param.numel() == 0
        kept[kind] += param.ds_tensor.nbytes if is_sharded else param.nbytes
        whole[kind] += getattr(param, "ds_numel", param.numel()) * param.element_size()
    return ", ".join(f"{kind} {kept[kind] / 1024:.1f} of {whole[kind] / 1024:.1f}" for kind in sorted(whole))


def note(text: str) -> None:
    get_logger(__name__).warning(text, main_process_only=True)


# --- model and data ---------------------------------------------------------------------------------------------------


def load_tokenizer(model_args: ModelArguments) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    kind = model_args.chat_template_format
    if kind != "none":
        tokenizer.add_special_tokens({"additional_special_tokens": CHAT_TOKENS[kind]})
        tokenizer.chat_template = CHAT_TEMPLATES[kind]
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(model_args: ModelArguments, args: SFTConfig) -> Any:
    quantisation = quantisation_of(model_args)
    computes_in = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    stored_in = getattr(torch, model_args.bnb_4bit_quant_storage_dtype)
    is_packed_alike = model_args.use_4bit_quantization and stored_in.is_floating_point
    model = AutoModelForCausalLM.from_pretrained(
        model_args.model_name_or_path,
        quantization_config=quantisation,
        dtype=stored_in if is_packed_alike else computes_in,
        attn_implementation="flash_attention_2" if model_args.use_flash_attn else "sdpa",
    )
    model.config.use_cache = not args.gradient_checkpointing
    return model


def grow_vocabulary(model: Any, tokenizer: Any) -> list[str]:
    """Give tokens that the model does not know rows of their own; returns the names of the layers that have changed."""
    if len(tokenizer) <= model.get_input_embeddings().num_embeddings:
        return []
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=8)
    changed = (model.get_input_embeddings(), model.get_output_embeddings())
    return [name.rsplit(".")[-1] for name, module in model.named_modules() if any(module is one for one in changed)]


def quantisation_of(model_args: ModelArguments) -> BitsAndBytesConfig | None:
    if model_args.use_4bit_quantization:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=model_args.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=model_args.use_nested_quant,
            bnb_4bit_compute_dtype=getattr(torch, model_args.bnb_4bit_compute_dtype),
            bnb_4bit_quant_storage=getattr(torch, model_args.bnb_4bit_quant_storage_dtype),
        )
    return BitsAndBytesConfig(load_in_8bit=True) if model_args.use_8bit_quantization else None


def lora_of(model_args: ModelArguments, grown: list[str]) -> LoraConfig:
    """Return what LoRA is put on; layers that have `grown` are trained and saved whole: their new rows are random."""
    targets = model_args.lora_target_modules
    return LoraConfig(
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        bias="none",
        task_type="CAUSAL_LM",
        target_modules=targets if targets == "all-linear" else targets.split(","),
        modules_to_save=grown or None,
    )


def load_texts(data_args: DataArguments, args: SFTConfig, tokenizer: Any, *, has_template: bool) -> DatasetDict:
    """Return the splits as token ids; conversations (column `messages`) become texts by the chat template."""

    def tokenise(row: dict[str, Any]) -> dict[str, Any]:
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False) if has_template else None
        text = row[args.dataset_text_field] if text is None else text
        tokens = tokenizer(text, add_special_tokens=data_args.add_special_tokens)["input_ids"]
        return {"input_ids": [*tokens, tokenizer.eos_token_id] if data_args.append_concat_token else tokens}

    source = data_args.dataset_name
    with PartialState().main_process_first():  # the others find it in the cache
        if Path(source).is_dir():
            files = {split: str(Path(source) / f"{split}.jsonl") for split in splits_of(data_args)}
            data = load_dataset("json", data_files=files)
        else:
            data = DatasetDict({split: load_dataset(source, split=split) for split in splits_of(data_args)})
        columns = next(iter(data.values())).column_names
        return data.map(tokenise, remove_columns=columns, desc="tokenising")


if __name__ == "__main__":
    main()
