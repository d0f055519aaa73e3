"""Broken data sets: each is told in bounded time with the file, the field and what to do; `data.on_error: skip` leaves
out what can be left out, and stops at the rest."""

import gzip
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medxray.data import load_studies
from medxray.data.readers import READERS
from medxray.data.readers.csv import CSV, read_table
from medxray.spec import DataSpec
from medxray.types import DataError

SECONDS = 20
"""Of one broken data set, on a machine however busy."""

HEADER = "path,study_id,patient_id,report,split,Mass\n"
GOOD = "good.png,s,p,Clear.,train,1\n"

Make = Callable[[Path], Any]


@dataclass
class Layout:
    """A broken data set.

    Attributes:
        make: writes into a folder that holds good.png, images/good.png and, beside the folder, secret.png.
        message: a pattern of what is told when it stops.
        left_out: a pattern of the reason for which `skip` leaves a study out; None where it stops too.
        reader: its name.
        settings: of the reader.
        data: further settings.
    """

    make: Make
    message: str
    left_out: str | None = None
    reader: str = "csv"
    settings: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)


def rows(*lines: str, header: str = HEADER, good: bool = True) -> Make:
    return lambda root: (root / "studies.csv").write_text(header + GOOD * good + "".join(lines), newline="")


def raw(content: bytes, name: str = "studies.csv") -> Make:
    return lambda root: (root / name).write_bytes(content)


def annotation(content: Any) -> Make:
    text = content if isinstance(content, str) else json.dumps(content)
    return lambda root: (root / "annotation.json").write_text(text)


def entry(**fields: Any) -> dict[str, Any]:
    return {"id": "CXR1_IM-1", "report": "Clear.", "image_path": ["good.png"], "split": "train", **fields}


def both(*makes: Make) -> Make:
    def make(root: Path) -> None:
        for one in makes:
            one(root)

    return make


def link(name: str, target: str) -> Make:
    return lambda root: (root / name).symlink_to(target)


def image(name: str, content: bytes) -> Make:
    return lambda root: (root / name).write_bytes(content)


def unreadable(root: Path) -> None:
    """A table that is there and cannot be read; by rights, or, for root, since reading it fails."""
    if os.geteuid():
        (root / "studies.csv").write_text(HEADER + GOOD)
        (root / "studies.csv").chmod(0)
    else:
        (root / "studies.csv").symlink_to("/proc/self/mem")


TABLE = (HEADER + GOOD).encode()
PACKED = gzip.compress(HEADER.encode() + b"".join(b"good.png,s%d,p,Clear %d.,train,1\n" % (i, i) for i in range(3000)))
BOMB = gzip.compress(bytes(2**27), 9)
MISSING = "1 of 2 images are missing: '{}'; check data.reader.root, or set data.on_error: skip"
OUTSIDE = r"line 3: image '.*' leads to .*secret.png, outside data\.reader\.root .*keep all images below the root"
IU = "iu-xray"

LAYOUTS: dict[str, Layout] = {
    # Where paths lead.
    "dots out of root": Layout(rows("../secret.png,t,q,Clear.,train,0\n"), OUTSIDE),
    "dots inside a path": Layout(rows("images/../../secret.png,t,q,Clear.,train,0\n"), OUTSIDE),
    "absolute path outside": Layout(lambda root: rows(f"{root.parent}/secret.png,t,q,Clear.,train,0\n")(root), OUTSIDE),
    "link out of root": Layout(both(link("l.png", "../secret.png"), rows("l.png,t,q,Clear.,train,0\n")), OUTSIDE),
    "linked folder out of root": Layout(both(link("l", ".."), rows("l/secret.png,t,q,Clear.,train,0\n")), OUTSIDE),
    "link to a link out of root": Layout(
        both(link("a.png", "../secret.png"), link("b.png", "a.png"), rows("b.png,t,q,Clear.,train,0\n")), OUTSIDE
    ),
    "link to a device": Layout(
        both(link("zero.png", "/dev/zero"), rows("zero.png,t,q,Clear.,train,0\n")),
        "line 3: image 'zero.png' leads to /dev/zero, outside",
    ),
    "zero byte in a path": Layout(
        rows("a\0.png,t,q,Clear.,train,0\n"), "studies.csv, line 3: a zero byte; the file is damaged"
    ),
    "empty path": Layout(
        rows(",t,q,Clear.,train,0\n"), "line 3: image '' leads to nothing: column 'path' is empty; name the image"
    ),
    "blank path": Layout(rows(" ,t,q,Clear.,train,0\n"), "line 3: .*column 'path' is empty"),
    "the root itself": Layout(rows(".,t,q,Clear.,train,0\n"), r"line 3: image '\.' leads to"),
    # Images that are not there, or no images.
    "image missing": Layout(
        rows("gone.png,t,q,Clear.,train,0\n"), MISSING.format("gone.png"), "gone.png: no such file"
    ),
    "backslashes in a path": Layout(
        rows("images\\good.png,t,q,Clear.,train,0\n"),
        r"images are missing: .*folders are parted by ..?: write them with /",
        r"no such file",
    ),
    "link to itself": Layout(
        both(link("loop.png", "loop.png"), rows("loop.png,t,q,Clear.,train,0\n")),
        MISSING.format("loop.png"),
        "loop.png",
    ),
    "folder in place of an image": Layout(rows("images,t,q,Clear.,train,0\n"), MISSING.format("images"), "images: "),
    "pipe in place of an image": Layout(
        both(lambda root: os.mkfifo(root / "pipe.png"), rows("pipe.png,t,q,Clear.,train,0\n")),
        MISSING.format("pipe.png"),
        "pipe.png",
    ),
    "very long name": Layout(rows("x" * 5000 + ".png,t,q,Clear.,train,0\n"), "1 of 2 images are missing: 'xxx", "xxx"),
    # Tables that cannot be read.
    "not UTF-8": Layout(
        raw(TABLE + "good.png,t,q,Größe.,train,0\n".encode("latin-1")),
        r"expected UTF-8, found byte 0xf6 at offset \d+ \(line 3\); save the file as UTF-8 .*iconv -f WINDOWS-1252",
    ),
    "UTF-16": Layout(
        raw(TABLE.decode().encode("utf-16")), "expected text in UTF-8, found UTF-16; save the file as UTF-8"
    ),
    "UTF-16 without a mark": Layout(
        raw(TABLE.decode().encode("utf-16-le")), "line 1: a zero byte.*as in UTF-16: save the file as UTF-8"
    ),
    "unclosed quote": Layout(
        rows('good.png,t,q,"Clear.,train,0\n', GOOD), "studies.csv, line 3: .*a quote is opened and never closed.*mend"
    ),
    "quote in the middle": Layout(
        rows('good.png,t,q,"Clear" both.,train,0\n'), "line 3: not a CSV row .*mend the quotes"
    ),
    "unclosed quote before a huge rest": Layout(
        rows('good.png,t,q,"Clear.,train,0\n', "good.png,t,q,Clear and long.,train,0\n" * 60000),
        "line 3: not a CSV row .a cell of more than 1048576 characters",
    ),
    "too many cells": Layout(
        rows("good.png,t,q,Clear, all.,train,0\n"), "line 3: 7 cells; expected 6 as in the header; quote cells"
    ),
    "too few cells": Layout(rows("good.png,t,q\n"), "line 3: 3 cells; expected 6 as in the header"),
    "zero bytes": Layout(
        raw(TABLE + bytes(100)), "studies.csv, line 3: a zero byte; the file is damaged or no text; fetch it again"
    ),
    "empty file": Layout(raw(b""), "studies.csv: empty; expected a header line"),
    "blank lines only": Layout(raw(b"\n\n\n"), "studies.csv: empty; expected a header line"),
    "header only": Layout(raw(HEADER.encode()), "reader 'csv' found no study; check data.reader"),
    "folder in place of the table": Layout(
        lambda root: (root / "studies.csv").mkdir(), "studies.csv: a folder; expected a file"
    ),
    "no table": Layout(
        lambda root: None, "studies.csv: no such file; the folder holds good.png, images; check data.reader.root"
    ),
    "unreadable rights": Layout(unreadable, r"studies.csv: cannot be read \(.*\); check its kind and its rights"),
    "workbook": Layout(
        raw(b"PK\3\4" + bytes(100)), "found a zip archive or an Excel workbook; .*save its sheet as CSV"
    ),
    "Parquet in place of a table": Layout(raw(b"PAR1" + bytes(100)), "found a Parquet file; choose reader parquet"),
    "page of a login": Layout(raw(b"\n<!DOCTYPE html>\n<html>"), "found an HTML page, such as that of a login; fetch"),
    "pointer of Git LFS": Layout(
        raw(b"version https://git-lfs.github.com/spec/v1\noid"), "pointer of a file in Git LFS.*git lfs pull"
    ),
    "gzip damaged": Layout(
        raw(PACKED[:3000] + b"\0\1\2\3" + PACKED[3004:], "studies.csv.gz"),
        r"studies.csv.gz: damaged gzip file \(.*\); fetch it again",
    ),
    "gzip cut off": Layout(
        raw(PACKED[:-500], "studies.csv.gz"), "studies.csv.gz: cut off; the end of the gzip file is missing; fetch"
    ),
    "gzip followed by rubbish": Layout(raw(PACKED + b"rubbish", "studies.csv.gz"), "damaged gzip file"),
    "gzip bomb": Layout(
        raw(BOMB, "studies.csv.gz"), r"\d+ bytes unpack to more than \d+, which no table does; fetch the file again"
    ),
    # Columns.
    "missing column": Layout(
        rows(header="path,studyid,report\n", good=False), "no column 'study_id'; did you mean 'studyid'"
    ),
    "column twice": Layout(
        rows(header="path,study_id, path\n", good=False), "column 'path' stands twice in the header; rename one"
    ),
    "columns without names": Layout(
        raw(b"path,study_id,,\ngood.png,s,1,2\n"), "columns 3 and 4 have no name; name them"
    ),
    "wrong separator": Layout(
        raw(b"path;study_id\ngood.png;s\n"), "no column 'path'.*found: path;study_id", settings={"separator": "comma"}
    ),
    # Cells.
    "empty study name": Layout(
        rows("good.png, ,q,Clear.,train,0\n"), "line 3: column 'study_id' is empty; give the study a name"
    ),
    "same study, other patient": Layout(
        rows("images/good.png,s,q,Clear.,train,1\n"),
        "line 3: study 's' has patient 'q', but 'p' on line 2; rows of one study must agree",
    ),
    "same study, other split": Layout(
        rows("images/good.png,s,p,Clear.,val,1\n"), "line 3: study 's' has split 'val', but 'train'"
    ),
    "same study and image": Layout(rows(GOOD), "line 3: image 'good.png' stands twice in study 's'; remove a row"),
    "patient in two splits": Layout(
        rows("good.png,t,p,Clear.,test,0\n"), r"1 patients in two splits \(p in test and train\).*data.split: patient"
    ),
    "patient in two splits but for a space": Layout(
        rows("good.png,t,p ,Clear.,test,0\n"), r"1 patients in two splits \(p in"
    ),
    "unknown split": Layout(
        rows("good.png,t,q,Clear.,trian,0\n"), "line 3: split 'trian'; did you mean 'train'.; expected train, val or"
    ),
    "label outside": Layout(
        rows(*(f"good.png,t{i},q,Clear.,train,0\n" for i in range(20)), "good.png,u,q,Clear.,train,2\n"),
        r"line 23: label 'Mass' is '2'; expected 1, 0, -1 \(uncertain\) or nothing.*label_columns",
    ),
    "label no number": Layout(
        rows("good.png,u,q,Clear.,train,yes\n"),
        "line 3: label 'Mass' is 'yes'; expected 1, 0",
        settings={"label_columns": ["Mass"]},
    ),
    "empty report": Layout(
        rows("images/good.png,t,q,,train,0\n"),
        "study 't': report is empty after cleaning.*data.on_error: skip",
        "report is empty",
    ),
    "report of marks only": Layout(
        rows("images/good.png,t,q,XXXX ___.,train,0\n"),
        "study 't': report is empty after",
        "report is empty",
        data={"marks": "drop"},
    ),
    "no training study": Layout(
        rows("good.png,t,q,Clear.,test,0\n", good=False), "split 'train' has no study.*check the split column"
    ),
    # R2Gen's annotation.
    "annotation cut off": Layout(
        annotation('{"train": [{"id": "CXR1"'), "annotation.json, line 1: not JSON .*fetch the file again", reader=IU
    ),
    "annotation empty": Layout(annotation(""), "annotation.json, line 1: not JSON", reader=IU),
    "annotation a list": Layout(
        annotation([entry()]), "annotation.json: expected an object with lists train, val and test", reader=IU
    ),
    "annotation nested without end": Layout(
        annotation("[" * 200_000), "annotation.json: no annotation .*recursion.*fetch", reader=IU
    ),
    "annotation with an endless number": Layout(
        annotation('{"train": ' + "9" * 20_000 + "}"), "annotation.json: no annotation", reader=IU
    ),
    "annotation of a split no one knows": Layout(
        annotation({"dev": [entry()]}), "split 'dev'; expected train, val or test", reader=IU
    ),
    "annotation of no object": Layout(
        annotation({"train": [entry(), 7]}), r"annotation.json, train\[1\]: 7 is no object", reader=IU
    ),
    "annotation with numbers for ids": Layout(
        annotation({"train": [entry(id=7)]}), r"train\[0\]: 'id' is 7; expected a string", reader=IU
    ),
    "annotation without a report": Layout(
        annotation({"train": [entry(report=None)]}), r"train\[0\]: 'report' is None", reader=IU
    ),
    "annotation with one path": Layout(
        annotation({"train": [entry(image_path="good.png")]}), r"train\[0\]: 'image_path' is 'good.png'", reader=IU
    ),
    "annotation with a path out of root": Layout(
        annotation({"train": [entry(image_path=["../../secret.png"])]}),
        r"train\[0\]: image .*outside data\.reader\.root",
        reader=IU,
    ),
    "annotation with an id twice": Layout(
        annotation({"train": [entry(), entry()]}), "study_id 'CXR1_IM-1' used by more than one", reader=IU
    ),
    "annotation with half a character": Layout(
        annotation({"train": [entry(report="No \ud800 mass.")]}),
        "study 'CXR1_IM-1': findings holds half a character",
        reader=IU,
    ),
    "annotation with a zero byte in a path": Layout(
        annotation({"train": [entry(image_path=["a\0.png"])]}), r"train\[0\]: image .* holds a zero byte", reader=IU
    ),
    "annotation without images": Layout(
        annotation({"train": [entry(), entry(id="CXR2_IM-2", image_path=[])]}),
        "study 'CXR2_IM-2' without an image; remove it, or set data.on_error: skip",
        "no readable image",
        reader=IU,
    ),
    "annotation in UTF-16": Layout(
        raw(json.dumps({"train": []}).encode("utf-16"), "annotation.json"), "found UTF-16", reader=IU
    ),
    # The root.
    "no such root": Layout(
        lambda root: None, "data.reader.root: no folder .*nowhere.*check the path", settings={"root": "nowhere"}
    ),
    "file for a root": Layout(
        lambda root: None, "data.reader.root: no folder .*good.png", settings={"root": "good.png"}
    ),
}


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Stops what does not end by itself."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    old = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with two good images, and a secret one beside it."""
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    picture = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    for path in (folder / "good.png", folder / "images" / "good.png", tmp_path / "secret.png"):
        picture.save(path)
    return folder


def spec_of(layout: Layout, root: Path, on_error: str) -> DataSpec:
    settings = {
        "root": str(root / layout.settings.get("root", "")),
        **{k: v for k, v in layout.settings.items() if k != "root"},
    }
    reader = READERS.settings_of(layout.reader)(name=layout.reader, **settings)
    return DataSpec(reader=reader, on_error=on_error, **layout.data)  # type: ignore[arg-type]


@pytest.mark.parametrize("on_error", ["raise", "skip"])
@pytest.mark.parametrize("case", LAYOUTS)
def test_layouts(case: str, on_error: str, root: Path) -> None:
    layout = LAYOUTS[case]
    layout.make(root)
    with time_limit(SECONDS):
        if on_error == "skip" and layout.left_out is not None:
            studies = load_studies(spec_of(layout, root, on_error))
            assert len(studies.splits["train"]) == 1, "the good study stays"
            assert re.search(layout.left_out, "\n".join(item["reason"] for item in studies.skipped)), studies.skipped
            return
        with pytest.raises(DataError) as error:
            load_studies(spec_of(layout, root, on_error))
    told = str(error.value)
    assert str(root) in told, told
    assert re.search(layout.message, told, re.S), told
    assert len(told) < 1500 and "Traceback" not in told


def test_there_are_enough_layouts() -> None:
    assert len(LAYOUTS) >= 30


# What looks broken and is not


def load(root: Path, **settings: Any) -> list[dict[str, Any]]:
    return list(load_studies(spec_of(Layout(lambda _: None, "", settings=settings), root, "skip")).splits["train"])


TEXT = 'path,study_id,report,split\ngood.png,s,"No ""mass"", clear\nlungs.",train\nimages/good.png,t,Größe.,train\n'


@pytest.mark.parametrize(
    "content",
    {
        "plain": TEXT.encode(),
        "byte order mark": TEXT.encode("utf-8-sig"),
        "lines of Windows": TEXT.replace("\n", "\r\n").encode(),
        "blank lines": TEXT.replace("train\n", "train\n\n").encode() + b"\n  \n",
        "no last line end": TEXT.rstrip("\n").encode(),
        "empty columns at the right": TEXT.replace("split\n", "split,,\n").replace("train\n", "train,,\n").encode(),
        "numbered rows": ("," + TEXT.replace("\ngood", "\n0,good").replace("\nimages", "\n1,images")).encode(),
        "gzip under a plain name": gzip.compress(TEXT.encode()),
    }.items(),
    ids=lambda item: item[0],
)
def test_forms_of_one_table(content: tuple[str, bytes], root: Path) -> None:
    (root / "studies.csv").write_bytes(content[1])
    first, second = load(root)
    assert first["report"] == "no mass clear\nlungs .".replace("\n", "\r\n" if "Windows" in content[0] else "\n")
    assert second["report"] == "größe ."
    assert first["labels"] == {} and (first["study_id"], second["images"]) == ("s", ["images/good.png"])


@pytest.mark.parametrize("mark", [";", "\t", "|"])
def test_other_separators(mark: str, root: Path) -> None:
    name = "studies.tsv" if mark == "\t" else "studies.csv"
    (root / name).write_text(f"path{mark}study_id{mark}report\ngood.png{mark}s{mark}Clear, wide.\n")
    assert CSV(root, file=name).group(read_table(root / name))[0]["report"] == "Clear, wide."
    names = {";": "semicolon", "\t": "tab", "|": "bar"}
    (root / name).write_text(f"path{mark}study_id{mark}a,b\ngood.png{mark}s{mark}1\n")
    (study,) = CSV(root, file=name, separator=names[mark]).read()  # type: ignore[arg-type]
    assert study["study_id"] == "s"


def test_packed_tables(root: Path) -> None:
    packed = gzip.compress(TEXT[:40].encode()) + gzip.compress(TEXT[40:].encode()) + bytes(512)
    (root / "studies.csv.gz").write_bytes(packed)
    assert len(load(root)) == 2, "of two members, with padding"
    (root / "studies.csv").write_text("path,study_id,report,split\ngood.png,plain,Clear.,train\n")
    assert [row["study_id"] for row in load(root)] == ["plain"], "the plain one goes first"
    (root / "studies.csv").unlink()
    (root / "other.csv.gz").write_bytes(packed)
    assert [row["study_id"] for row in load(root, file="other.csv.gz")] == ["s", "t"]
    reader = CSV(root)
    assert reader.table("none.csv", "other.csv") == root / "other.csv.gz"
    with pytest.raises(DataError, match=r"expected one of a\.csv, b\.csv, plain or with \.gz; the folder holds"):
        reader.table("a.csv", "b.csv")
    with pytest.raises(DataError, match=r"a\.csv: no such file; the folder holds"):
        reader.table("a.csv")
    with pytest.raises(DataError, match=r"data\.reader\.root: no folder"):
        CSV(root / "nowhere").table("a.csv", "b.csv")


def test_a_report_of_half_a_million_characters(root: Path) -> None:
    (root / "studies.csv").write_text(f'path,study_id,report\ngood.png,s,"{"clear, " * 75000}"\n')
    (study,) = CSV(root).read()
    assert len(study["report"]) == 525_000


def test_many_rows_take_little_time(root: Path) -> None:
    """10,000 rows in a second or two; the figure for studies with images is in benchmarks/data.py."""
    lines = (f'images/good.png,s{i},p{i},"Clear, {i}.\n{"normal " * 80}",train,{i % 2}\n' for i in range(10_000))
    (root / "studies.csv").write_text(HEADER + "".join(lines))
    start = time.process_time()
    table = read_table(root / "studies.csv")
    assert time.process_time() - start < 3
    assert len(table) == 10_000 and table.lines[:3] == [2, 4, 6]
