"""Dynamic loss scale: the sequence of scales is the one DeepSpeed 0.19.6 gives (log2, recorded from it)."""

import pytest

from craken.precision import DynamicLossScale, StaticLossScale

OVERFLOWS = {0, 8, 9, 13, 19, 20, 26, 35, 42, 56}
# (hysteresis, consecutive_hysteresis, window) -> log2 of the scale after each of 60 steps
# fmt: off
RECORDED = {
    (1, False, 4): [15, 15, 15, 15, 15, 16, 16, 16, 15, 14, 14, 14, 14, 13, 13, 13, 13, 13, 14, 13, 12, 12, 12, 12, 12, 13, 12, 12, 12, 12, 12, 13, 13, 13, 13, 12, 12, 12, 12, 12, 13, 13, 12, 12, 12, 12, 12, 13, 13, 13, 13, 14, 14, 14, 14, 15, 14, 14, 14, 14],  # noqa: E501
    (2, False, 5): [16, 16, 16, 16, 16, 16, 17, 17, 17, 16, 16, 16, 16, 15, 15, 15, 15, 15, 15, 14, 13, 13, 13, 13, 13, 13, 12, 12, 12, 12, 12, 12, 13, 13, 13, 13, 13, 13, 13, 13, 13, 14, 14, 14, 14, 14, 14, 14, 15, 15, 15, 15, 15, 16, 16, 16, 16, 16, 16, 16],  # noqa: E501
    (2, True, 5): [16, 16, 16, 16, 16, 16, 17, 17, 17, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 15, 15, 15, 15, 15, 15, 15, 15, 15, 15, 15, 15, 16, 16, 16, 16, 16, 16, 16, 16, 16, 17, 17, 17, 17, 17, 17, 17, 18, 18, 18, 18, 18, 19, 19, 19, 19, 19, 19, 19],  # noqa: E501
    (3, False, 3): [16, 16, 16, 16, 17, 17, 17, 18, 18, 18, 18, 18, 18, 17, 17, 17, 17, 18, 18, 18, 18, 18, 18, 18, 19, 19, 19, 19, 19, 19, 20, 20, 20, 21, 21, 21, 21, 21, 21, 22, 22, 22, 22, 22, 22, 22, 23, 23, 23, 24, 24, 24, 25, 25, 25, 26, 26, 26, 26, 26],  # noqa: E501
}
# fmt: on


@pytest.mark.parametrize(("hysteresis", "consecutive", "window"), RECORDED)
def test_scales_follow_the_recorded_sequence(hysteresis, consecutive, window):
    scale = DynamicLossScale(window=window, hysteresis=hysteresis, consecutive_hysteresis=consecutive)
    seen = []
    for step in range(60):
        scale.update(has_overflow=step in OVERFLOWS)
        seen.append(scale.value)
    assert seen == [2.0**power for power in RECORDED[hysteresis, consecutive, window]]


def test_state_round_trip_continues_the_sequence():
    scale = DynamicLossScale(window=3, hysteresis=2)
    for step in range(7):
        scale.update(has_overflow=step == 2)
    restored = DynamicLossScale(window=3, hysteresis=2)
    restored.load_state_dict(scale.state_dict())
    for step in range(20):
        scale.update(has_overflow=step in (4, 5))
        restored.update(has_overflow=step in (4, 5))
        assert restored.value == scale.value


def test_overflow_at_the_minimum_says_what_to_do():
    scale = DynamicLossScale(value=1.0, hysteresis=1)
    with pytest.raises(RuntimeError, match="at its minimum 1: .*Lower the learning rate"):
        scale.update(has_overflow=True)


def test_static_scale_does_not_move():
    scale = StaticLossScale(128.0)
    scale.update(has_overflow=True)
    assert scale.value == 128.0
