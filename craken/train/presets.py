"""The models that `craken train` knows by name, with the batch and length that suit each: plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """A Llama-style causal language model with tied embeddings, and how to train it by default.

    `seq_len` is in tokens, `micro_batch_size` in sequences a rank; accelerators take `accelerator_factor` times that.
    """

    summary: str
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    vocab_size: int
    seq_len: int
    micro_batch_size: int
    steps: int
    lr: float = 0.02  # of the matrices, which Muon updates; the rest takes ADAM_SHARE of it
    accelerator_factor: int = 8

    def architecture(self, vocab_size: int, seq_len: int) -> dict[str, int | bool | str]:
        """Return the model as a `transformers` configuration."""
        return {
            "model_type": "llama",
            "vocab_size": vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_heads,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": max(seq_len, 512),
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": 0,
        }


ADAM_SHARE = 0.15

PRESETS = {
    "tiny": Preset("0.1 M parameters, for a look and for tests", 64, 2, 2, 160, 512, 32, 2, 20),
    "small": Preset("10 M parameters, five minutes on two cores", 384, 5, 6, 1024, 4096, 128, 1, 160),
    "medium": Preset("50 M parameters, for a good accelerator", 640, 8, 10, 1728, 16384, 512, 2, 1000),
    "large": Preset("160 M parameters, for several", 1024, 10, 16, 2816, 32768, 1024, 1, 4000, lr=0.01),
}
