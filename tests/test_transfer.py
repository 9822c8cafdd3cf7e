"""Transfer, spread and worst format, from tables whose answers are known; and the bounds they lean on."""

from __future__ import annotations

import random

import pytest

from finetune import chance

# --- bounds


def test_p_above_is_the_level_whose_lower_bound_touches_nothing() -> None:
    lot = random.Random(1)
    for _ in range(200):
        values = [lot.expovariate(1) * lot.choice((1, -1, 1)) + lot.gauss(0.2, 1) for _ in range(lot.randint(3, 20))]
        p = chance.p_above(values)
        assert p is not None
        if 1e-4 < p < 0.5:
            found = chance.mean(values, 1 - p)
            assert found is not None
            assert found.low == pytest.approx(0, abs=1e-6)


def test_p_above_of_values_that_do_not_vary() -> None:
    assert [chance.p_above([value] * 5) for value in (1.0, 0.0, -1.0)] == [0.0, 1.0, 1.0]
    assert chance.p_above([1.0]) is None
    assert chance.p_above([0.1, 0.3, 0.2]) == pytest.approx(1 - (chance.p_above([-0.1, -0.3, -0.2]) or 0))


def test_holm_multiplies_the_smallest_by_all_and_never_falls() -> None:
    assert chance.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert chance.holm([0.9, 0.8]) == [1.0, 1.0]
    assert chance.holm([]) == []
