"""The stage table."""

import pytest

from craken.zero.plans.policy import Keep, policy_for_stage


@pytest.mark.parametrize(
    ("stage", "each_backward", "gathers_grads", "gathers_params"),
    [(0, False, True, False), (1, False, False, True), (2, True, False, True), (3, True, False, False)],
)
def test_verbs_follow_from_the_row(stage, each_backward, gathers_grads, gathers_params):
    policy = policy_for_stage(stage)
    assert policy.reduces_every_backward is each_backward
    assert policy.gathers_grads is gathers_grads
    assert policy.gathers_params_after_step is gathers_params


def test_sharding_nests():
    for stage in (0, 1, 2, 3):
        policy = policy_for_stage(stage)
        if policy.params is Keep.SHARD:
            assert policy.grads is Keep.SHARD
        if policy.grads is Keep.SHARD:
            assert policy.optimizer is Keep.SHARD


def test_a_stage_that_is_not_built_says_which_are():
    with pytest.raises(NotImplementedError, match=r"stages \[0, 1, 2, 3\] work so far"):
        policy_for_stage(4)
