"""Slow, obvious versions of what the project computes fast. They share no code with what they check."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import combinations, permutations

Point = tuple[float, float]


def nearest_distances(points: Sequence[Point]) -> list[float]:
    """Distance of every point to its nearest other point, by looking at all of them; NaN for a lone point."""
    return [
        min((math.dist(p, q) for j, q in enumerate(points) if j != i), default=math.nan) for i, p in enumerate(points)
    ]


def edge_distance(point: Point, size: Point) -> float:
    """Distance of a point in the rectangle ``[0, width] x [0, height]`` to its outline."""
    x, y = point
    return min(x, y, size[0] - x, size[1] - y)


def hanisch(points: Sequence[Point], size: Point) -> tuple[float, float]:
    """Edge-corrected mean and variance of the nearest-neighbour distance, term by term."""
    terms = []
    for point, s in zip(points, nearest_distances(points), strict=True):
        if s < edge_distance(point, size):
            terms.append((s, 1.0 / ((size[0] - 2.0 * s) * (size[1] - 2.0 * s))))
    if not terms:
        return math.nan, math.nan
    total = math.fsum(w for _, w in terms)
    mean = math.fsum(w * s for s, w in terms) / total
    if len(terms) == 1:
        return mean, math.nan
    spread = math.fsum(w * (s - mean) ** 2 for s, w in terms)
    return mean, spread / (total - math.fsum(w * w for _, w in terms) / total)


def pair_count(points: Sequence[Point], labels: Sequence[str], a: str, b: str, radius: float) -> int:
    """Unordered pairs of one ``a`` and one ``b`` at most ``radius`` apart."""
    return sum(
        math.dist(points[i], points[j]) <= radius and sorted((labels[i], labels[j])) == sorted((a, b))
        for i, j in combinations(range(len(points)), 2)
    )


def pair_count_moments(
    points: Sequence[Point], labels: Sequence[str], a: str, b: str, radius: float
) -> tuple[float, float]:
    """Exact mean and standard deviation of :func:`pair_count` over all orders of the labels (at most 8 points)."""
    counts = [pair_count(points, order, a, b, radius) for order in permutations(labels)]
    mean = sum(counts) / len(counts)
    return mean, math.sqrt(sum((c - mean) ** 2 for c in counts) / len(counts))


def best_matching(found: Sequence[Point], true: Sequence[Point], max_distance: float) -> tuple[int, float]:
    """Largest number of one-to-one pairs within ``max_distance`` and their least total distance, by trying all."""

    def search(i: int, free: frozenset[int]) -> tuple[int, float]:
        if i == len(found):
            return 0, 0.0
        best = search(i + 1, free)
        for j in free:
            distance = math.dist(found[i], true[j])
            if distance <= max_distance:
                n, total = search(i + 1, free - {j})
                if (n + 1, -(total + distance)) > (best[0], -best[1]):
                    best = n + 1, total + distance
        return best

    return search(0, frozenset(range(len(true))))


def overlapping_instances(found: Sequence[int], true: Sequence[int], least: float = 0.5) -> int:
    """Pairs of instances whose intersection over union exceeds ``least``, from two equally long rows of pixel labels.

    0 is background. Above a half every instance has at most one such partner.
    """
    size_found, size_true, shared = Counter(found), Counter(true), Counter(zip(found, true, strict=True))
    return sum(n / (size_found[a] + size_true[b] - n) > least for (a, b), n in shared.items() if a != 0 and b != 0)
