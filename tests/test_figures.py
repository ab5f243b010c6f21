"""Every figure that README and docs quote is in a committed result file; and the check finds those that are not."""

import json

import pytest

from tools import figures

CONTENT = {
    "measured": {
        "Stack, both": [
            {"input": "a", "mode": "forward", "ours": {"ms": 4.0}, "ratio": [0.4, 0.4, 0.4], "share": 0.6},
            {"input": "a", "mode": "both", "ours": {"ms": 12.34}, "ratio": [0.5, 0.51, 0.55], "share": 0.4},
            {"input": "b", "mode": "both", "ours": {"ms": 1234.5}, "ratio": [0.7, 0.7, 0.7], "share": 0.8},
        ]
    }
}
FILES = "<!-- files A=one.json B=two.json -->\n"
TABLE = (
    "<!-- table A B [mode=both]: {input} | {ours[ms]:.0f} ms | {ratio:.1f} | {ratio[1]!i:.2f} | {B[share]:.1f} -->\n"
)
HEAD = "| batch | time | range | speed-up | other |\n|---|---|---|---|---|\n"


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    figures._load.cache_clear()
    other = {"rows": [{"input": "a", "mode": "both", "share": 0.9}, {"input": "b", "mode": "both", "share": 0.1}]}
    for name, content in (("one.json", CONTENT), ("two.json", other)):
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    yield
    figures._load.cache_clear()


@pytest.mark.parametrize("path", figures.documents(), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_figure_of_the_documents_is_in_a_result_file(path, monkeypatch):
    monkeypatch.undo()
    wrong, _ = figures.check(path.read_text(encoding="utf-8"))
    assert wrong == [], "python -m tools.figures --write"


def test_the_most_important_documents_have_figures_that_are_checked():
    for name, least in (("README.md", 14), ("docs/measured.md", 30)):
        assert len(figures.MARKED.findall((figures.ROOT / name).read_text(encoding="utf-8"))) >= least
        assert figures.TABLE.search((figures.ROOT / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It took 12.3<!--A Stack/a/both/ours/ms--> ms.", []),
        ("It took 1,234<!--A Stack/b/ours/ms--> ms.", []),  # a half is rounded to the even number
        ("It took 40%<!--A Stack/1/share--> of it.", []),
        ("It is 1.96<!--A 1/Stack/a/both/ratio/1--> times as fast.", []),
        ("At most 0.80<!--A max Stack/*/share-->, in the middle 0.60<!--A median Stack/*/share-->.", []),
        ("It has 0.01<!--A Stack/a/both/ours/ms*1e-3--> s.", []),
        ("It took 12.4<!--A Stack/a/both/ours/ms--> ms.", ["expected 12.3, got 12.4: Stack/a/both/ours/ms"]),
        ("It took 9<!--A Stack/c/ours/ms-->.", ["9: Stack/c/ours/ms: c: expected a row with this value, got none"]),
        ("It took 9<!--A Stack/b/ours-->.", ["9: Stack/b/ours: Stack/b/ours: expected a number, got {'ms': 1234.5}"]),
        ("It took 9<!--C Stack-->.", ["9: Stack: C: expected one of the document's files, got another name"]),
        ("It took 12 ms.", ["in no result file: '12 ms' in 'It took 12 ms.'"]),
        ("It is 0.51 of it.", ["in no result file: '0.51' in 'It is 0.51 of it.'"]),
        ("It is 3% slower.", ["in no result file: '3%' in 'It is 3% slower.'"]),
        ("It is 3% slower. <!-- given: a goal -->", []),
        ("With torch 2.13 and Python 3.10 or 3.12, `0.51`:\n\n    sleep(1.25)  # 3 s", []),
    ],
)
def test_a_figure_is_held_against_its_file(text, expected):
    assert figures.check(FILES + text)[0] == expected


def test_a_file_that_is_not_there_is_named():
    assert figures.check("<!-- files A=none.json -->")[0] == [
        "none.json: expected a file of benchmarks/results, got none"
    ]


def test_a_table_is_held_against_its_rows_and_written_anew():
    right = "| a | 12 ms | 0.5-0.6 | 1.96 | 0.9 |\n"
    # A pair is a range; three figures are their ends and middle.
    text = FILES + TABLE.replace("{ratio:.1f}", "{ratio[0]:.1f}") + HEAD + right.replace("0.5-0.6", "0.5")
    assert figures.check(text) == ([], text)
    planted = text.replace("12 ms", "11 ms")
    wrong, mended = figures.check(planted)
    assert wrong == ["expected | a | 12 ms | 0.5 | 1.96 | 0.9 |, got | a | 11 ms | 0.5 | 1.96 | 0.9 |"]
    assert mended == text
    gone = text.replace("| a | 12", "| c | 12")
    assert figures.check(gone)[0] == ["in no result file: | c | 12 ms | 0.5 | 1.96 | 0.9 |"]


def test_a_pair_is_a_range_and_equal_ends_are_one_figure():
    shown = [figures.RowFormatter().vformat("{x:.1f}", (), {"x": pair}) for pair in ([0.51, 0.62], [0.7, 0.7])]
    assert shown == ["0.5-0.6", "0.7"]


def test_the_command_writes_what_the_files_know_and_fails_for_the_rest(tmp_path, capsys):
    document = tmp_path / "x.md"
    document.write_text(FILES + "It took 12.4<!--A Stack/a/both/ours/ms--> ms, and 7 ms.", encoding="utf-8")
    assert figures.main([str(document)]) == 1 and "2 figures are wrong" in capsys.readouterr().out
    assert figures.main(["--write", str(document)]) == 1 and "1 figures are wrong" in capsys.readouterr().out
    assert "took 12.3<!--" in document.read_text(encoding="utf-8")
