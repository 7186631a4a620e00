"""Error feedback: what one message loses, later ones make up for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from craken.comm.codec import Codec
from craken.comm.feedback import ErrorFeedback

CODEC = Codec(4)


def gradient() -> Tensor:
    """One large element a block, and others below half a code of it."""
    values = torch.full((2, 600), 0.01)
    values[:, ::256] = 1.0
    return values


def sent(feedback: ErrorFeedback, values: Tensor, times: int, key: str = "layer") -> list[Tensor]:
    """Return what arrives, time after time."""
    arrived = []
    for _ in range(times):
        messages = torch.empty(values.shape[0], CODEC.num_bytes(values.shape[1]), dtype=torch.uint8)
        feedback.quantise(key, values, messages)
        arrived.append(torch.empty(values.shape))
        CODEC.dequantise(messages, arrived[-1])
    return arrived


def test_without_feedback_small_gradients_never_arrive() -> None:
    messages = torch.empty(2, CODEC.num_bytes(600), dtype=torch.uint8)
    out = torch.empty(2, 600)
    CODEC.quantise(gradient(), messages)
    CODEC.dequantise(messages, out)
    assert out[:, 1:200].abs().max() == 0


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_small_gradients_arrive_once_they_have_added_up(beta) -> None:
    arrived = torch.stack(sent(ErrorFeedback(beta=beta, reset_after=10**6), gradient(), 100))
    assert arrived[0, :, 1:200].abs().max() == 0
    # whatever beta, the error is (1 - beta) x all that was lost so far, and it is at most a code: so is what is missing
    torch.testing.assert_close(arrived.mean(0), gradient(), atol=1 / 7 / 100 / (1 - beta) + 1e-3, rtol=0)


def test_errors_are_forgotten_after_a_while() -> None:
    always = sent(ErrorFeedback(beta=0.0, reset_after=1), gradient(), 30)
    assert all(torch.equal(one, always[0]) for one in always)
    some = sent(ErrorFeedback(beta=0.0, reset_after=10), gradient(), 20)
    assert all(map(torch.equal, some[:10], some[10:]))


def test_keys_keep_their_errors_apart() -> None:
    feedback = ErrorFeedback(beta=0.0, reset_after=10**6)
    alone = sent(ErrorFeedback(beta=0.0, reset_after=10**6), gradient(), 10)
    mixed = []
    for _ in range(10):
        mixed += sent(feedback, gradient(), 1)
        sent(feedback, torch.randn(2, 600, generator=torch.Generator().manual_seed(1)), 1, key="another")
    assert all(map(torch.equal, mixed, alone))


def test_an_overflow_arrives_and_leaves_no_mark() -> None:
    feedback = ErrorFeedback(beta=0.0, reset_after=10**6)
    sent(feedback, gradient(), 3)
    bad = gradient()
    bad[0, 5] = float("inf")
    (arrived,) = sent(feedback, bad, 1)
    assert arrived[0, :256].isnan().all()
    assert all(one.isfinite().all() for one in sent(feedback, gradient(), 3))
