"""Manifests: pairs in order, files that are missing in all three ways, and one line for what does not fit."""

import logging
from pathlib import Path

import pytest
from data._refused import refused

from onepeace_fast.data.manifest import Entry, read_manifest


@pytest.fixture
def folder(tmp_path):
    """A folder with three files that stand for images."""
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b c.png", "ü.png"):
        (tmp_path / "images" / name).touch()
    return tmp_path


def tsv(folder, *lines, ending="\n"):
    path = folder / "manifest.tsv"
    path.write_bytes("".join(line + ending for line in lines).encode())
    return path


def parquet(folder, columns, **options):
    arrow, module = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = folder / "manifest.parquet"
    module.write_table(arrow.table(columns), path, **options)
    return path


def test_pairs_come_in_order_with_paths_from_the_manifests_folder(folder, monkeypatch):
    absolute = folder / "images" / "ü.png"
    path = tsv(
        folder, "id\tcaption\timage", "1\ta cat\timages/a.png", "2\tein Bär\timages/b c.png", f"3\tx\t{absolute}"
    )
    expected = [
        Entry(folder / "images" / "a.png", "a cat", 2),
        Entry(folder / "images" / "b c.png", "ein Bär", 3),
        Entry(absolute, "x", 4),
    ]
    assert read_manifest(path, "image") == expected
    monkeypatch.chdir(folder)
    assert read_manifest("manifest.tsv", "image")[0].path == Path("images/a.png")


def test_the_column_follows_the_modality(folder):
    path = tsv(folder, "audio\timage\tcaption", "images/a.png\timages/b c.png\ta")
    assert read_manifest(path, "audio")[0].path.name == "a.png"
    assert read_manifest(path, "image")[0].path.name == "b c.png"


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_both_ends_of_lines_a_byte_order_mark_and_empty_lines_are_read(folder, ending):
    path = tsv(folder, "\ufeffimage\tcaption", "images/a.png\ta cat", "", "images/a.png\tand more", "", ending=ending)
    assert [(entry.caption, entry.line) for entry in read_manifest(path, "image")] == [("a cat", 2), ("and more", 4)]


def test_a_file_without_a_last_line_end_is_read_whole(folder):
    path = folder / "manifest.tsv"
    path.write_bytes(b"image\tcaption\nimages/a.png\ta cat")
    assert [entry.caption for entry in read_manifest(path, "image")] == ["a cat"]


def test_captions_may_hold_quotes_and_unusual_separators(folder):
    captions = ['"a cat', "it's, 'so'", "a\u2028b", "a\x0bb\x85c\rd", "#", "\\t"]
    path = tsv(folder, "image\tcaption", *(f"images/a.png\t{caption}" for caption in captions))
    assert [entry.caption for entry in read_manifest(path, "image")] == captions


def test_a_cell_in_quotes_as_spreadsheets_write_it_loses_them(folder):
    written = {
        '"a ""big"" cat"': 'a "big" cat',
        '"a cat"': "a cat",
        '"""a"" cat"': '"a" cat',
        'a "big" cat': 'a "big" cat',
    }
    written |= {'"a" cat': '"a" cat', '"a" and "b"': '"a" and "b"', '"': '"', '"a"b"': '"a"b"'}
    plain = read_manifest(tsv(folder, "image\tcaption", *(f"images/a.png\t{cell}" for cell in written)), "image")
    assert [entry.caption for entry in plain] == list(written.values())
    path = tsv(folder, '"image"\t"caption"', *(f'"images/b c.png"\t{cell}' for cell in written))
    entries = read_manifest(path, "image")
    assert [entry.caption for entry in entries] == list(written.values())
    assert {entry.path.name for entry in entries} == {"b c.png"}


def test_a_tilde_is_the_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder / "images"))
    tsv(folder, "image\tcaption", "~/a.png\ta cat").rename(folder / "images" / "m.tsv")
    assert read_manifest("~/m.tsv", "image") == [Entry(folder / "images" / "a.png", "a cat", 2)]


def test_a_name_that_no_file_can_have_is_refused(folder):
    refused(lambda: read_manifest("a\ud800.tsv", "image"), "a\ud800.tsv", "got no file there")
    refused(lambda: read_manifest("a\0.tsv", "image"), "a\0.tsv", "got no file there")


@pytest.mark.parametrize("large", [False, True])
def test_parquet_gives_the_same_pairs(folder, large):
    arrow = pytest.importorskip("pyarrow")
    kind = arrow.large_string() if large else arrow.string()
    columns = {"size": [1, 2], "caption": arrow.array(["a\tcat", "b\nc"], kind)}
    path = parquet(folder, columns | {"image": arrow.array(["images/a.png", "images/ü.png"], kind)})
    assert read_manifest(path, "image") == [
        Entry(folder / "images" / "a.png", "a\tcat", 1),
        Entry(folder / "images" / "ü.png", "b\nc", 2),
    ]


def test_rows_of_parquet_are_counted_over_all_its_groups(folder):
    columns = {"image": ["images/a.png"] * 7, "caption": [f"caption {row}" for row in range(1, 8)]}
    entries = read_manifest(parquet(folder, columns, row_group_size=3), "image")
    assert [(entry.line, entry.caption) for entry in entries] == [(row, f"caption {row}") for row in range(1, 8)]


DAMAGED = (
    "image\tcaption",
    "images/a.png\ta cat",
    "images/no.png\ta dog",
    "images/a.png\t ",
    "\ta bird",
    "images\ta folder",
    "images/b c.png\ta fish",
)


def test_missing_files_and_captions_stop_at_once_with_the_first_few_and_their_number(folder, caplog):
    path = tsv(folder, *DAMAGED)
    refused(
        lambda: read_manifest(path, "image"),
        path,
        "4 of 6 pairs",
        f"line 3: no file {folder}/images/no.png; line 4: empty caption of 'images/a.png'; line 5: no path; ...)",
        "'skip' leaves them out",
    )
    assert not caplog.messages


def test_missing_files_and_captions_are_all_listed_and_then_it_stops(folder, caplog):
    path = tsv(folder, *DAMAGED)
    refused(lambda: read_manifest(path, "image", missing="list"), path, "4 of 6 pairs", "listed above")
    assert caplog.messages == [
        f"{path}, line 3: no file {folder}/images/no.png",
        f"{path}, line 4: empty caption of 'images/a.png'",
        f"{path}, line 5: no path",
        f"{path}, line 6: no file {folder}/images",
    ]
    assert {record.levelno for record in caplog.records} == {logging.ERROR}


def test_missing_files_and_captions_are_left_out_and_counted_in_one_line(folder, caplog):
    path = tsv(folder, *DAMAGED)
    assert [entry.line for entry in read_manifest(path, "image", missing="skip")] == [2, 7]
    assert caplog.messages == [f"{path}: 4 of 6 pairs without a file or a caption; they are left out"]


@pytest.mark.parametrize("missing", ["fatal", "list", "skip"])
def test_a_whole_manifest_reports_nothing(folder, caplog, missing):
    assert len(read_manifest(tsv(folder, DAMAGED[0], DAMAGED[1]), "image", missing=missing)) == 1
    assert not caplog.messages


def test_nulls_of_parquet_are_missing_too(folder):
    columns = {"image": ["images/a.png", None, "images/a.png"], "caption": ["a", "b", None]}
    path = parquet(folder, columns)
    refused(lambda: read_manifest(path, "image"), path, "(row 2: no path; row 3: empty caption of 'images/a.png')")


def test_nothing_left_is_refused(folder):
    path = tsv(folder, "image\tcaption", "images/no.png\ta")
    refused(lambda: read_manifest(path, "image", missing="skip"), path, "expected a usable pair, got none among 1")


HEADERS = {
    "an empty file": (b"", "expected a header with 'image' and 'caption', got an empty file"),
    "empty lines": (b"\n\r\n\n", "got an empty file"),
    "a header alone": (b"image\tcaption\n", "pairs below the header, got none"),
    "no header": (b"images/a.png\ta cat\n", "one column 'image' in line 1, got 0 among"),
    "no caption": (b"image\ttext\nimages/a.png\ta\n", "one column 'caption' in line 1, got 0 among 'image', 'text'"),
    "another modality": (b"audio\tcaption\nimages/a.png\ta\n", "one column 'image' in line 1, got 0 among"),
    "commas": (b"image,caption\nimages/a.png,a\n", "got 0 among 'image,caption'"),
    "a column twice": (b"image\tcaption\timage\nx\ty\tz\n", "one column 'image' in line 1, got 2 among"),
    "broken header": (b"image\tcapt\xffion\n", "expected UTF-8, got other bytes in line 1"),
    "UTF-16": ("image\tcaption\nimages/a.png\ta\n".encode("utf-16"), "expected UTF-8, got other bytes in line 1"),
    "Latin-1": (b"image\tcaption\nimages/a.png\ta\nimages/a.png\tB\xe4r\n", "UTF-8, got other bytes in line 3"),
    "a column too few": (
        b"image\tcaption\nimages/a.png\ta\nimages/a.png\n",
        "2 columns as in the header, got 1 in line 3",
    ),
    "a column too many": (b"image\tcaption\n\nimages/a.png\ta\tb\n", "2 columns as in the header, got 3 in line 3"),
}


@pytest.mark.parametrize("case", HEADERS)
@pytest.mark.parametrize("missing", ["fatal", "skip"])
def test_a_manifest_that_does_not_fit_is_refused_with_its_line(folder, case, missing):
    content, part = HEADERS[case]
    path = folder / "manifest.tsv"
    path.write_bytes(content)
    refused(lambda: read_manifest(path, "image", missing=missing), path, part)


@pytest.mark.parametrize("name", ["absent.tsv", "absent.parquet", "images"])
def test_an_absent_manifest_is_refused(folder, name):
    refused(lambda: read_manifest(folder / name, "image"), folder / name, "got no file there")


def test_a_broken_parquet_file_is_refused(folder):
    whole = parquet(folder, {"image": ["images/a.png"] * 9, "caption": ["a"] * 9}).read_bytes()
    path = folder / "manifest.parquet"
    for content in (b"", b"image\tcaption\n", whole[: len(whole) // 2], whole[: len(whole) // 2] + whole[-8:]):
        path.write_bytes(content)
        refused(lambda: read_manifest(path, "image"), path, "expected a Parquet file, got another (")


def test_parquet_columns_that_are_no_strings_are_refused(folder):
    path = parquet(folder, {"image": [b"PNG"], "caption": ["a"]})
    refused(lambda: read_manifest(path, "image"), path, "expected a column 'image' of strings, got binary")
    path = parquet(folder, {"image": ["images/a.png"], "caption": [["a", "b"]]})
    refused(lambda: read_manifest(path, "image"), path, "expected a column 'caption' of strings, got list")


def test_parquet_without_a_column_or_rows_is_refused(folder):
    arrow = pytest.importorskip("pyarrow")
    path = parquet(folder, {"image": ["images/a.png"]})
    refused(lambda: read_manifest(path, "image"), path, "one column 'caption', got 0 among")
    path = parquet(folder, {name: arrow.array([], arrow.string()) for name in ("image", "caption")})
    refused(lambda: read_manifest(path, "image"), path, "got none")


def test_parquet_text_that_is_not_utf_8_is_refused(folder):
    arrow = pytest.importorskip("pyarrow")
    broken = arrow.array([b"a", b"B\xe4r"]).view(arrow.string())
    path = parquet(folder, {"image": ["images/a.png"] * 2, "caption": broken})
    refused(lambda: read_manifest(path, "image"), path, "expected UTF-8, got other bytes after row")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("m.tsv", "text"), "modality: expected one of image, audio, got 'text'"),
        (("m.tsv", "image", "ignore"), "missing: expected one of fatal, list, skip, got 'ignore'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, part):
    path, modality, *missing = arguments
    with pytest.raises(ValueError, match=part):
        read_manifest(path, modality, **({"missing": missing[0]} if missing else {}))
