"""Builds, saves, loads back and asks Hugging Face models: the only file that imports `transformers`."""

from __future__ import annotations

import functools
import json
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from craken.train.presets import PRESETS
from craken.train.tokenizer import END_OF_TEXT, TokenizerSource

COMPLETION_TOKENS = 64


class Completion(NamedTuple):
    prompt: str
    text: str


@functools.cache
def library() -> Any:
    """Return the `transformers` package; ValueError naming the extra to install where it is missing."""
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            "this needs the transformers package, which is not installed: pip install 'craken[hf]'"
        ) from error
    package: Any = transformers
    package.logging.set_verbosity_error()
    package.logging.disable_progress_bar()
    return package


def model_source(model: str) -> str | Path:
    """Return a preset's name, or the path of a configuration or of a folder that holds one; ValueError otherwise."""
    if model in PRESETS:
        return model
    path = Path(model).expanduser()
    if path.is_dir() and (path / "config.json").is_file():
        return path
    if path.is_file() and path.suffix == ".json":
        return path
    wanted = f"a preset ({', '.join(PRESETS)}), a config.json, or a folder with one"
    raise ValueError(
        f"--model {model}: expected {wanted}; there is no such {'configuration in it' if path.exists() else 'path'}"
    )


def tokenizer_source(model: str, vocab_size: int) -> TokenizerSource:
    """Return the tokenizer that belongs to a model given as a folder where it has one, else one to be trained."""
    folder = _tokenizer_folder(model)
    if folder is None:
        return TokenizerSource(vocab_size)
    end = library().AutoTokenizer.from_pretrained(folder).eos_token
    return TokenizerSource(vocab_size, folder / "tokenizer.json", end)


def build_model(model: str, *, vocab_size: int, seq_len: int, device: str = "cpu") -> nn.Module:
    """Return the causal language model to train, in fp32: with its weights if `model` is a folder that has them.

    A model that is built here takes the vocabulary and length of the data; one with weights must have room for both.
    `device="meta"` builds it without memory. ValueError when it has no parameters or is no causal language model.
    """
    source = model_source(model)
    has_weights = isinstance(source, Path) and source.is_dir() and any(source.glob("*.safetensors"))
    if has_weights and device != "meta":
        built = library().AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    else:
        built = _from_config(_configuration(source, vocab_size, seq_len, is_fixed=has_weights), device, model)
    if not any(parameter.numel() for parameter in built.parameters()):
        raise ValueError(
            f"--model {model}: this configuration gives a model with no parameters; "
            "raise hidden_size or num_hidden_layers"
        )
    if built.config.vocab_size < vocab_size:
        raise ValueError(
            f"--model {model} has room for {built.config.vocab_size} tokens, the tokenizer makes {vocab_size}; "
            f"give --vocab-size {built.config.vocab_size} or put the model's tokenizer.json into its folder"
        )
    return built  # type: ignore[no-any-return]


def num_parameters(model: nn.Module) -> int:
    """Return the elements of all parameters, tied ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def save_model(trained: nn.Module, model: str, tokenizer_json: Path, folder: Path, *, seq_len: int) -> None:
    """Write weights (safetensors), configuration and tokenizer, as `from_pretrained` reads them.

    `model` is the flag that the training started from: a tokenizer that came with it is passed on with its settings.
    """
    trained.save_pretrained(folder)  # type: ignore[operator]
    given = _tokenizer_folder(model)
    if given is not None:
        tokenizer = library().AutoTokenizer.from_pretrained(given)
    else:
        tokenizer = library().PreTrainedTokenizerFast(
            tokenizer_file=str(tokenizer_json), eos_token=END_OF_TEXT, bos_token=END_OF_TEXT, model_max_length=seq_len
        )
    tokenizer.save_pretrained(folder)


def complete(folder: Path, prompt: str) -> Completion:
    """Load the saved model back and let it continue `prompt`, with likely tokens: the same ones every time."""
    model = library().AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = library().AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    num_prompt, limit = inputs["input_ids"].shape[1], model.config.max_position_embeddings
    room = limit - num_prompt
    if room < 1:
        raise ValueError(f"--prompt has {num_prompt} tokens, the model takes {limit}; shorten it")
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        output = model.generate(
            **inputs,
            max_new_tokens=min(COMPLETION_TOKENS, room),
            do_sample=True,
            temperature=0.5,
            top_p=0.9,
            repetition_penalty=1.05,  # a model this small repeats itself
            pad_token_id=tokenizer.eos_token_id,
        )
    new = output[0, num_prompt:]
    return Completion(prompt, tokenizer.decode(new, skip_special_tokens=True))


def linear_layers(folder: Path) -> tuple[list[str], list[str]]:
    """Return the linear layers of the model that config.json in `folder` describes: those to quantise, and others.

    Nothing is allocated. The others are the output layer, tied ones, and GPT-2's Conv1D, whose weights lie the other
    way round. ValueError when transformers cannot build the model.
    """
    transformers = library()
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        named = (config.architectures or [""])[0]
        kind = getattr(transformers, named, None)
        with torch.device("meta"):
            model = kind(config) if kind else transformers.AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, TypeError, OSError, RuntimeError) as error:
        raise ValueError(f"{folder}: transformers cannot build this model: {error}") from error
    kept = {id(model.get_output_embeddings())}
    tied = getattr(model, "all_tied_weights_keys", {})
    tied_names = {name.removesuffix(".weight") for pair in tied.items() for name in pair}
    layers, skipped = [], []
    for name, module in model.named_modules():
        if type(module) is nn.Linear and id(module) not in kept and name not in tied_names:
            layers.append(name)
        elif isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            skipped.append(name)
    return layers, skipped


def _tokenizer_folder(model: str) -> Path | None:
    source = model_source(model)
    has_tokenizer = isinstance(source, Path) and source.is_dir() and (source / "tokenizer.json").is_file()
    return Path(source) if has_tokenizer else None


def _configuration(source: str | Path, vocab_size: int, seq_len: int, *, is_fixed: bool) -> dict[str, Any]:
    if isinstance(source, str):
        return dict(PRESETS[source].architecture(vocab_size, seq_len))
    file = source / "config.json" if source.is_dir() else source
    try:
        raw = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"--model {file} is not JSON: {error}") from error
    if not isinstance(raw, dict) or "model_type" not in raw:
        raise ValueError(
            f'--model {file} is no model configuration: expected an object with "model_type", such as "llama"'
        )
    if not is_fixed:
        raw |= {
            "vocab_size": vocab_size,
            "max_position_embeddings": max(seq_len, raw.get("max_position_embeddings", 0)),
        }
    return raw


def _from_config(raw: dict[str, Any], device: str, model: str) -> Any:
    transformers = library()
    raw = dict(raw)
    try:
        config = transformers.AutoConfig.for_model(raw.pop("model_type"), **raw)
        with torch.device(device), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a size of 0 is told below, in our words
            return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (ValueError, KeyError, TypeError, ZeroDivisionError, RuntimeError) as error:
        raise ValueError(f"--model {model}: transformers cannot build this model: {error}") from error
