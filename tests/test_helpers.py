"""What other tests rest on."""

import itertools
import math

import pytest
from helpers import pairs


@pytest.mark.parametrize(
    "sizes", [(3,), (2, 5), (5, 2), (2, 2, 2), (24, 2, 3), (24, 3, 2, 2), (3, 3, 2, 2), (4, 4, 4), (1, 6, 1, 3)]
)
def test_in_pairs_any_two_values_meet(sizes):
    factors = [[f"{factor}{value}" for value in range(size)] for factor, size in enumerate(sizes)]
    found = pairs(*factors)
    for a, b in itertools.combinations(range(len(sizes)), 2):
        assert {(row[a], row[b]) for row in found} == set(itertools.product(factors[a], factors[b]))
    assert all(value in factor for row in found for value, factor in zip(row, factors, strict=True))
    assert len(set(found)) == len(found) < 1.5 * math.prod(sorted(sizes)[-2:])


def test_of_three_factors_few_combinations_are_left():
    assert len(pairs(range(24), range(3), range(2), range(2))) < 0.3 * 288
    assert pairs("ab", "xy", "01") == [("a", "x", "0"), ("a", "y", "1"), ("b", "x", "1"), ("b", "y", "0")]
