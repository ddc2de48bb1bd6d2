"""Prometheus' text, read by a parser made after its specification."""

from __future__ import annotations

import re

from vlm2vec.serve.counts import Counter, Counts, Gauge, Histogram


def read(page: str) -> dict[str, float]:
    assert page.endswith("\n")
    samples = {}
    for line in page.splitlines():
        if not line.startswith("#"):
            found = re.fullmatch(r'([a-z0-9_]+(?:\{[a-z_]+="[^"\\\n]*"(?:,[a-z_]+="[^"\\\n]*")*\})?) (\S+)', line)
            assert found, line
            samples[found[1]] = float(found[2])
    return samples


def test_a_histogram_counts_what_is_at_most_each_bound() -> None:
    histogram = Histogram("h", "Meaning.", (1, 2.5))
    for value in (0.5, 1, 2, 3):
        histogram.observe(value)
    expected = {'h_bucket{le="1"}': 2, 'h_bucket{le="2.5"}': 3, 'h_bucket{le="+Inf"}': 4, "h_sum": 6.5, "h_count": 4}
    assert read("\n".join(histogram.lines()) + "\n") == expected


def test_counters_and_gauges() -> None:
    counter = Counter("c_total", "Meaning.")
    assert read("\n".join(counter.lines()) + "\n") == {"c_total": 0}
    counter.add(2, status="200", route="/a")
    counter.add(status="200", route="/a")
    assert read("\n".join(counter.lines()) + "\n") == {'c_total{route="/a",status="200"}': 3}
    assert Gauge("g", "Meaning.", lambda: 7).lines() == ["# HELP g Meaning.", "# TYPE g gauge", "g 7"]


def test_every_name_is_there_once() -> None:
    counts = Counts()
    counts.watch("vlm2vec_g", "Meaning.", lambda: 1)
    names = [line.split()[2] for line in counts.page().splitlines() if line.startswith("# TYPE")]
    assert len(names) == len(set(names)) == 9 and all(name.startswith("vlm2vec_") for name in names)
    assert read(counts.page())["vlm2vec_tokens_total"] == 0
