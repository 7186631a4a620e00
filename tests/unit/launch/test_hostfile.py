"""Hostfiles and the choice among hosts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from craken.launch.hostfile import apply_filters, limit, parse_filter, parse_hostfile

HOSTS = {"worker-0": [0, 1, 2, 3], "worker-1": [0, 1]}


def test_a_hostfile_gives_slots_in_order_of_its_lines() -> None:
    text = "# the cluster\n\nworker-1 slots=2\nworker-0   slots = 1  # small\n10.0.0.7 slots=1\n"
    assert list(parse_hostfile(text).items()) == [("worker-1", [0, 1]), ("worker-0", [0]), ("10.0.0.7", [0])]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a slots=1\nb 2\n", r"hosts, line 2: expected `host slots=N`, got 'b 2'"),
        ("a slots=x\n", r"hosts, line 1"),
        ("a slots=-1\n", r"hosts, line 1"),
        ("a slots=1 b slots=2\n", r"hosts, line 1"),
        ("a slots=0\n", r"hosts, line 1: a has no slots"),
        ("a slots=1\n\na slots=2\n", r"hosts, line 3: a stands here twice"),
        ("# nobody\n", r"hosts: no hosts in it"),
    ],
)
def test_a_bad_line_is_named_with_its_number(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_hostfile(text, "hosts")


def test_a_filter_names_hosts_and_slots() -> None:
    assert parse_filter("worker-0@worker-1:2,0", "--include") == {"worker-0": [], "worker-1": [0, 2]}


@pytest.mark.parametrize("text", ["worker-0:", "worker-0:a", "@worker-0", ":1", "worker-0:1,,2", "worker-0:-1"])
def test_a_bad_filter_is_shown(text: str) -> None:
    with pytest.raises(ValueError, match="--include: expected HOST"):
        parse_filter(text, "--include")


def test_include_keeps_what_it_names_in_the_hostfiles_order() -> None:
    assert apply_filters(HOSTS, include="worker-1:1@worker-0") == {"worker-0": [0, 1, 2, 3], "worker-1": [1]}


def test_exclude_drops_what_it_names() -> None:
    assert apply_filters(HOSTS, exclude="worker-1@worker-0:0,3") == {"worker-0": [1, 2]}
    assert apply_filters(HOSTS, exclude="worker-1:0,1") == {"worker-0": [0, 1, 2, 3]}


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"include": "worker-0", "exclude": "worker-1"}, "exclude each other"),
        ({"include": "worker-7"}, "no host 'worker-7'; there are worker-0 .4 slots., worker-1"),
        ({"exclude": "worker-1:2"}, r"worker-1 has no slot 2; it has \[0, 1\]"),
        ({"exclude": "worker-0@worker-1"}, "leaves no slot"),
    ],
)
def test_a_filter_that_cannot_hold_is_refused(filters: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apply_filters(HOSTS, **filters)


@given(st.dictionaries(st.sampled_from("abcd"), st.integers(1, 6), min_size=2), st.data())
def test_include_and_exclude_of_the_same_slots_make_the_whole(sizes: dict[str, int], data: st.DataObject) -> None:
    hosts = {host: list(range(size)) for host, size in sizes.items()}
    host = data.draw(st.sampled_from(sorted(hosts)))
    slots = data.draw(st.sets(st.sampled_from(hosts[host]), min_size=1))
    text = f"{host}:{','.join(map(str, slots))}"
    kept, left = apply_filters(hosts, include=text), apply_filters(hosts, exclude=text)
    assert {h: sorted(kept.get(h, []) + left.get(h, [])) for h in hosts} == hosts


def test_limits_keep_the_first_hosts_and_slots() -> None:
    assert limit(HOSTS, 1, 2) == {"worker-0": [0, 1]}
    assert limit(HOSTS, -1, -1) == HOSTS
    with pytest.raises(ValueError, match="--num_nodes: 3 asked for, the hostfile has 2"):
        limit(HOSTS, 3, -1)
    with pytest.raises(ValueError, match="--num_gpus: 3 asked for, worker-1 has 2 slots"):
        limit(HOSTS, -1, 3)
