"""The choice of combinations that `make test` runs."""

import itertools

import pytest
from covering import covering


def kept(cases):
    return [case.values for case in cases if not case.marks]


@pytest.mark.parametrize("sizes", [(8, 5, 3), (2, 2, 2, 2), (4, 2, 2), (3, 1, 2)])
def test_every_two_values_meet_in_few_combinations(sizes):
    options = [[f"{name}{i}" for i in range(size)] for name, size in zip("abcd", sizes, strict=False)]
    cases = covering(*options)
    assert [case.values for case in cases] == list(itertools.product(*options))
    for one, other in itertools.combinations(range(len(sizes)), 2):
        met = {(values[one], values[other]) for values in kept(cases)}
        assert met == set(itertools.product(options[one], options[other]))
    least = max(a * b for a, b in itertools.combinations(sizes, 2))
    assert len(kept(cases)) <= 1.5 * least


def test_one_or_two_options_are_kept_whole():
    assert kept(covering("abc")) == [("a",), ("b",), ("c",)]
    assert len(kept(covering("abc", range(4)))) == 12
