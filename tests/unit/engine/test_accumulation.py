"""Micro-batch counting."""

from craken.engine.accumulation import Accumulation


def test_every_nth_micro_batch_is_the_boundary():
    counter, seen = Accumulation(3), []
    for _ in range(6):
        seen.append(counter.is_boundary)
        counter.advance()
    assert seen == [False, False, True, False, False, True]


def test_once_set_only_the_flag_counts():
    counter = Accumulation(1, flag=False)
    assert not counter.is_boundary
    counter.flag = True
    assert counter.is_boundary
