"""Percentages: all and none are said only where it is all or none."""

import pytest

from onepeace_fast.demo.percent import percent


@pytest.mark.parametrize(
    ("share", "decimals", "said"),
    [
        (1.0, 1, "100.0%"),
        (1.0, 0, "100%"),
        (0.9996, 1, "99.96%"),
        (381 / 382, 0, "99.7%"),
        (0.99999, 1, "99.999%"),
        (0.994, 0, "99%"),
        (0.0, 1, "0.0%"),
        (0.0004, 1, "0.04%"),
        (0.004, 0, "0.4%"),
        (0.005, 0, "0.5%"),
        (0.876, 1, "87.6%"),
        (0.876, 0, "88%"),
    ],
)
def test_a_share_is_rounded_to_all_or_none_only_where_it_is(share, decimals, said):
    assert percent(share, decimals) == said
