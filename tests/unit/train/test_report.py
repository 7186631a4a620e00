"""report.html: one page that needs nothing else, right for long, short and broken runs."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest

from craken.train.charts import Chart, Series, render, smooth, thin_out, ticks
from craken.train.huggingface import Completion
from craken.train.metrics import EvalMetrics, MetricsFile, StepMetrics
from craken.train.report import write_report

FACTS = {"model": "tiny", "ranks": "2 x CPU processes", "ZeRO stage": "2", "data": "<odd> & 'name'"}


def _page(path: Path, losses: list[float], completion: Completion | None = None) -> str:
    file = MetricsFile(path / "metrics.jsonl")
    for step, loss in enumerate(losses, start=1):
        file.add_step(
            StepMetrics(step, loss, 1e-3, None, step * 64, 900.0, 0.1, step * 0.1, 10**9, 2 * 10**9, 12345, 0)
        )
    if losses:
        file.add_eval(EvalMetrics(len(losses), 2.5, 4.75, 640, 1.0))
    write_report(path / "report.html", file, FACTS, completion)
    return (path / "report.html").read_text("utf-8")


class _Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "line", "circle", "path"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_needs_nothing_from_elsewhere(tmp_path) -> None:
    page = _page(tmp_path, [5.0, 4.0, 3.0], Completion("def f(x):\n", "    return x < 1 & y\n"))
    tags = _Tags(page)
    assert tags.open == []
    assert not any(name in ("src", "href") for _, attrs in tags.seen for name in attrs)
    assert "url(" not in page
    assert "@import" not in page
    assert "http" not in page


def test_the_page_names_loss_baseline_and_completion(tmp_path) -> None:
    page = _page(tmp_path, [5.0, 4.0, 3.0], Completion("def f(x):\n", "    return x < 1\n"))
    assert "2.500" in page
    assert "2.25" in page  # nats under the unigram entropy
    assert "unigram entropy 4.75" in page
    assert "return x &lt; 1" in page
    assert "&lt;odd&gt; &amp; &#x27;name&#x27;" in page
    assert "$" not in re.sub(r"<script>.*</script>", "", page, flags=re.DOTALL)


@pytest.mark.parametrize("losses", [[], [5.0], [math.nan] * 3, [5.0, math.inf, 4.0]])
def test_a_run_with_few_or_odd_figures_still_makes_a_page(tmp_path, losses) -> None:
    page = _page(tmp_path, losses)
    assert "nan" not in page.split("<main>")[1]
    assert page.rstrip().endswith("</html>")


def test_a_chart_is_one_svg_with_every_point_inside_it() -> None:
    points = [(float(x), math.sin(x / 9) * 40 + 7) for x in range(200)]
    svg = ElementTree.fromstring(render(Chart([Series("wave", points, "line")], levels=[("high", 60.0)])))
    (path,) = svg.iter("path")
    places = [tuple(map(float, pair.split())) for pair in path.attrib["d"][1:].split("L")]
    assert len(places) == 200
    assert all(0 <= x <= 460 and 0 <= y <= 210 for x, y in places)
    assert "high 60.00" in {text.text for text in svg.iter("text")}


def test_a_long_run_is_thinned_out_and_keeps_its_last_point() -> None:
    points = [(float(x), 1.0) for x in range(100_001)]
    thin = thin_out(points)
    assert len(thin) <= 1201
    assert thin[-1] == points[-1]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.0, 10.0, [0.0, 2.5, 5.0, 7.5, 10.0]), (0.3, 4.1, [1.0, 2.0, 3.0, 4.0]), (5.0, 5.0, [5.0])],
)
def test_ticks_are_round_numbers(low, high, expected) -> None:
    assert ticks(low, high, 4) == pytest.approx(expected)


def test_smoothing_is_the_mean_of_the_neighbours() -> None:
    assert smooth([(0, 1.0), (1, 2.0), (2, 6.0)], 3) == [(0, 1.5), (1, 3.0), (2, 4.0)]
