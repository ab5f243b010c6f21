"""The picture of a line between two models shows each value at its point."""

import pytest

pytest.importorskip("matplotlib")

from models._unival import refusal

from onepeace_fast.merging.curve import draw


def test_curves_are_drawn_by_points_in_order_and_ends_are_named():
    (axes,) = draw([1, 0, 0.5], {"images": [9, 7, 8], "sounds": [1, 2, 3]}, ("of images", "of sounds")).axes
    assert [line.get_xydata().tolist() for line in axes.lines] == [
        [[0, 7], [0.5, 8], [1, 9]], [[0, 2], [0.5, 3], [1, 1]],
    ]  # fmt: skip
    assert axes.get_xlabel() == "weight of of sounds (0: of images alone, 1: of sounds alone)"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["images", "sounds"]
    assert len({line.get_linestyle() for line in axes.lines}) == 2
    assert draw([0], {"a": [1]}, ("x", "y"), axes) is axes.figure


def test_what_cannot_be_drawn_is_refused():
    assert refusal(lambda: draw([0, 1], {"a": [1]}, ("x", "y"))) == "a: expected 2 values, got 1"
    many = {str(i): [1] for i in range(5)}
    assert refusal(lambda: draw([0], many, ("x", "y"))) == "curves: expected at most 4, got 5"
