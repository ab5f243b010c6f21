"""What is said of gains: faster, alike or slower, as measured."""

from onepeace_fast.demo import gains
from onepeace_fast.demo.result import Cost, TokenCount


def costs(reference, fused, automatic, peaks=(100, 100, 100)):
    names = ("reference", "fused", "automatic")
    return [Cost("image-text", *one) for one in zip(names, (reference, fused, automatic), peaks, strict=True)]


def test_a_slower_backend_is_called_slower():
    slower = "image-text: fused is slower, 0.80 times as fast; automatic is"
    assert gains.speed(costs(8.0, 10.0, 8.1)) == [f"{slower} about as fast, 0.99 times."]
    assert gains.speed(costs(8.0, 10.0, 4.0)) == [f"{slower} 2.00 times as fast."]


def test_why_packing_is_slower_is_said_where_it_is_and_in_two_lines_at_most():
    why, where = gains.why_slower([*costs(8.0, 10.0, 8.1), Cost("b", "reference", 9, 1), Cost("b", "fused", 9, 1)], 128)
    assert why == "image-text: fused packs the tokens, which costs more time than it saves at this width, 128."
    assert where.endswith("docs/measured.md.") and gains.why_slower(costs(8.0, 8.1, 8.0), 128) == []


def test_memory_is_a_multiple_of_the_references():
    assert gains.memory(costs(1, 1, 1, (200, 120, 300))) == [
        "image-text: fused 0.60 and automatic 1.50 times the reference's peak memory."
    ]


def test_padding_is_a_share_of_each_stage():
    counts = [TokenCount("a", "text", 60, 100), TokenCount("a", "image", 100, 100), TokenCount("b", "audio", 9, 9)]
    assert gains.padding(counts) == "Padding is 20% of a padded a batch and none of a padded b batch."
