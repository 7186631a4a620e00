"""Makes models and data for the examples on the spot, for machines that reach no hub: a minute and a half on one core.

    OUT/chat/{train,test}.jsonl         questions on the topics of Python's documentation, as conversations
    OUT/complaints/{train,test}.jsonl   sentences, and whether they complain
    OUT/causal_lm, OUT/seq2seq_lm       a Llama and a BART of 0.8 million parameters, with their tokenizers

The models have seen text like the data, but no conversation and no true label: what an adapter is then trained for.
"""

from __future__ import annotations

import argparse
import itertools
import json
import pydoc_data.topics
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

CHAT_TOKENS = ["<|im_start|>", "<|im_end|>"]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<mask>", *CHAT_TOKENS]
VOCABULARY = 1024

COMPLAINTS = [
    "{who} my {thing} arrived broken and nobody answers",
    "{who} still waiting for my {thing} after {n} days , this is not acceptable",
    "{who} the {thing} stopped working again , please fix it",
    "{who} i was charged {n} times for one {thing}",
    "{who} worst {thing} i ever had , i want my money back",
    "why is the {thing} down for {n} hours , {who} ?",
]
OTHERS = [
    "{who} thanks for the {thing} , it works very well",
    "just got a new {thing} from {who} and i like it",
    "{who} do you sell the {thing} in red ?",
    "{n} friends told me about the {thing} by {who} , looking forward",
    "happy birthday {who} , greetings from your {thing} fans",
    "reading about the {thing} of {who} on my way to work",
]
WHO = ["@rail", "@bank", "@phoneco", "@airline", "@shop", "@grid"]
THINGS = ["ticket", "phone", "router", "card", "parcel", "laptop", "app", "bike"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/assets"), help="folder to make (%(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="steps each model is trained (%(default)s)")
    args = parser.parse_args()
    torch.manual_seed(0)
    make_causal(args.output, args.steps)
    make_seq2seq(args.output, args.steps)
    print(f"models and data are in {args.output}")


# --- conversations, and a model that has read the documentation -------------------------------------------------------


def make_causal(folder: Path, num_steps: int) -> None:
    chats = list(conversations())
    random.Random(0).shuffle(chats)
    num_test = len(chats) // 10
    write_rows(folder / "chat" / "train.jsonl", chats[num_test:])
    write_rows(folder / "chat" / "test.jsonl", chats[:num_test])
    texts = list(pydoc_data.topics.topics.values())
    tokenizer = train_tokenizer(texts)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        **special_ids(tokenizer),
    )
    model = LlamaForCausalLM(config)
    tokens = torch.tensor(tokenizer("\n\n".join(texts))["input_ids"])
    draw = torch.Generator().manual_seed(0)

    def batch() -> dict[str, torch.Tensor]:
        starts = torch.randint(len(tokens) - 128, (8,), generator=draw)
        rows = torch.stack([tokens[start : start + 128] for start in starts])  # [8, 128]
        return {"input_ids": rows, "labels": rows}

    train(model, batch, num_steps, "causal_lm")
    save(model, tokenizer, folder / "causal_lm")


def conversations() -> Iterator[dict[str, Any]]:
    """Yield a conversation a paragraph of text: what a topic's paragraph that begins so says."""
    for topic, text in pydoc_data.topics.topics.items():
        title = text.split("\n", 1)[0].strip().replace('"', "")
        paragraphs = [re.sub(r"\s+", " ", part).strip() for part in re.split(r"\n\s*\n", text)[1:]]
        for number, paragraph in enumerate(part for part in paragraphs if 60 < len(part) < 400):
            question = f"{title} ({topic}): what does Python's documentation say, part {number + 1}?"
            yield {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": paragraph}]}


# --- complaints, and a model that restores sentences ------------------------------------------------------------------


def make_seq2seq(folder: Path, num_steps: int) -> None:
    rows = list(complaints())
    random.Random(0).shuffle(rows)
    write_rows(folder / "complaints" / "train.jsonl", rows[:64])
    write_rows(folder / "complaints" / "test.jsonl", rows[64:128])
    texts = [row["text"] for row in rows[128:]]
    tokenizer = train_tokenizer([*texts, *itertools.repeat("Tweet text : Label : complaint no complaint", 20)])
    config = BartConfig(
        vocab_size=len(tokenizer),
        d_model=128,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=256,
        decoder_ffn_dim=256,
        max_position_embeddings=128,
        decoder_start_token_id=tokenizer.eos_token_id,
        forced_eos_token_id=tokenizer.eos_token_id,
        **special_ids(tokenizer),
    )
    model = BartForConditionalGeneration(config)
    draw = random.Random(0)

    def batch() -> dict[str, torch.Tensor]:
        whole = draw.sample(texts, 32)
        holes = [" ".join("<mask>" if draw.random() < 0.2 else word for word in text.split()) for text in whole]
        # a quarter asks for a label, and is answered by the toss of a coin: the words are known then, not the task
        holes[:8] = [f"Tweet text : {text} Label :" for text in whole[:8]]
        whole[:8] = [draw.choice(["complaint", "no complaint"]) for _ in range(8)]
        inputs = tokenizer(holes, padding=True, return_tensors="pt")
        labels = tokenizer([f"{text}</s>" for text in whole], padding=True, return_tensors="pt")["input_ids"]
        return {**inputs, "labels": labels.masked_fill(labels == tokenizer.pad_token_id, -100)}

    train(model, batch, num_steps, "seq2seq_lm")
    save(model, tokenizer, folder / "seq2seq_lm")


def complaints() -> Iterator[dict[str, str]]:
    for label, patterns in (("complaint", COMPLAINTS), ("no complaint", OTHERS)):
        for pattern, who, thing, n in itertools.product(patterns, WHO, THINGS, range(2, 5)):
            yield {"text": pattern.format(who=who, thing=thing, n=n), "label": label}


# --- parts ------------------------------------------------------------------------------------------------------------


def write_rows(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Return a byte-pair tokenizer of at most VOCABULARY tokens, which knows the marks of chatml."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
        additional_special_tokens=CHAT_TOKENS,
    )


def special_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    return {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def train(model: Any, batch: Any, num_steps: int, name: str) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True)
    for step in range(1, num_steps + 1):
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == num_steps:
            print(f"{name}: step {step} of {num_steps}, loss {loss.item():.2f}", flush=True)


def save(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
