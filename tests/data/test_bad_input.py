"""What is wrong with a data set is told with the file, the field and the cure, in one of the library's errors."""

import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import BasicTextSRStorage, ExplicitVRLittleEndian

from medxray.data import ImageError, load_studies, read_image
from medxray.data.readers import READERS
from medxray.spec import DataSpec
from medxray.types import DataError

RNG = np.random.default_rng(0)


# Images


def png(path: Path, side: int = 64) -> bytes:
    Image.fromarray(RNG.integers(0, 256, (side, side), np.uint8)).save(path)
    return path.read_bytes()


def dicom(path: Path, **fields: Any) -> FileDataset:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = pydicom.uid.UID("1.2.3.4")
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    values = {
        "SOPClassUID": meta.MediaStorageSOPClassUID,
        "SOPInstanceUID": meta.MediaStorageSOPInstanceUID,
        "Rows": 16,
        "Columns": 16,
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 16,
        "BitsStored": 12,
        "HighBit": 11,
        "PixelRepresentation": 0,
        "PixelData": bytes(512),
        **fields,
    }
    for name, value in values.items():
        if value is not None:
            setattr(data, name, value)
    data.save_as(path, enforce_file_format=True)
    return data


def deflated_bomb(path: Path) -> None:
    dicom(path)
    plain = path.read_bytes()
    start = 144 + int.from_bytes(plain[140:144], "little")
    meta = plain[:start].replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99\0\0")
    meta = meta.replace(b"\x10\0UI\x14\0", b"\x10\0UI\x18\0")
    meta = meta[:140] + (len(meta) - 144).to_bytes(4, "little") + meta[144:]
    packer = zlib.compressobj(wbits=-15)
    path.write_bytes(meta + packer.compress(plain[start:] + bytes(50_000_000)) + packer.flush())


def truncated(path: Path, format: str) -> None:
    Image.fromarray(RNG.integers(0, 256, (64, 64), np.uint8)).save(path, format=format)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damaged_png(path: Path) -> None:
    data = bytearray(png(path))
    data[60:200] = bytes(140)
    path.write_bytes(data)


def header_only(path: Path) -> None:
    path.write_bytes(png(path)[:20])


def truncated_dicom(path: Path) -> None:
    dicom(path)
    path.write_bytes(path.read_bytes()[:-300])


def pages(path: Path) -> None:
    page = Image.new("L", (8, 8))
    page.save(path, format="TIFF", save_all=True, append_images=[page])


def bomb_png(path: Path) -> None:
    Image.new("L", (3000, 2000)).save(path, format="PNG")


IMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: None, "no such file; expected a DICOM, PNG, JPEG or TIFF.*check the path"),
    "folder": (lambda path: path.mkdir(), "cannot be opened.*check its kind"),
    "empty": (lambda path: path.touch(), r"empty \(0 bytes\).*fetch the file again"),
    "text": (lambda path: path.write_text("not pixels"), "not an image.*expected a DICOM.*replace"),
    "random": (lambda path: path.write_bytes(RNG.bytes(5000)), "not an image.*remove or replace"),
    "header only": (header_only, "(not an image|damaged).*(replace|fetch)"),
    "truncated png": (lambda path: truncated(path, "PNG"), "damaged or truncated.*fetch the file again"),
    "truncated jpeg": (lambda path: truncated(path, "JPEG"), "damaged or truncated.*fetch the file again"),
    "truncated tiff": (lambda path: truncated(path, "TIFF"), "damaged or truncated|not an image"),
    "damaged png": (damaged_png, "damaged or truncated.*fetch the file again"),
    "pages": (pages, "2 pages; expected one radiograph; store each"),
    "bomb": (bomb_png, "3000 x 2000 pixels; expected at most 1000000; .*data.max_pixels"),
    "dicom bomb": (
        lambda path: dicom(path, Rows=65535, Columns=65535),
        "65535 x 65535 pixels; expected at most 1000000; .*data.max_pixels",
    ),
    "deflated bomb": (deflated_bomb, "unpacks to more than .* bytes; raise data.max_pixels"),
    "dicom without pixels": (
        lambda path: dicom(path, SOPClassUID=BasicTextSRStorage, PixelData=None),
        "DICOM without pixel data .SOP class Basic Text SR Storage.; expected a DICOM.*leave it out",
    ),
    "dicom without rows": (lambda path: dicom(path, Rows=None), "Rows None and Columns 16; expected two positive"),
    "dicom of zero rows": (lambda path: dicom(path, Rows=0), "Rows 0 and Columns 16; expected two positive"),
    "dicom frames": (
        lambda path: dicom(path, NumberOfFrames=2, PixelData=bytes(1024)),
        "2 frames; expected one radiograph; export one",
    ),
    "truncated dicom": (truncated_dicom, "DICOM file that cannot be decoded.*fetch the file again"),
    "dicom without photometric": (
        lambda path: dicom(path, PhotometricInterpretation=None),
        "DICOM file that cannot be decoded.*Photometric",
    ),
    "dicom palette": (
        lambda path: dicom(path, PhotometricInterpretation="PALETTE COLOR"),
        "PhotometricInterpretation PALETTE COLOR; expected MONOCHROME1 or 2",
    ),
    "window of width 0": (
        lambda path: dicom(path, WindowCenter=5, WindowWidth=0),
        "WindowCenter 5 and WindowWidth 0; expected .*mend or remove",
    ),
    "dicom meta only": (
        lambda path: (dicom(path), path.write_bytes(path.read_bytes()[:200])),
        "DICOM",
    ),
}


@pytest.mark.parametrize("case", IMAGES)
def test_images(tmp_path: Path, case: str) -> None:
    path = tmp_path / "chest.png"
    make, message = IMAGES[case]
    make(path)
    with pytest.raises(ImageError) as error:
        read_image(path, max_pixels=1_000_000)
    assert str(error.value).startswith(f"{path}: ")
    assert re.search(message, str(error.value)), str(error.value)


def test_pillows_own_limit_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb_png(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match=r"x.png: more than 2000 pixels, the limit of Pillow.*MAX_IMAGE_PIXELS"):
        read_image(tmp_path / "x.png")


@pytest.mark.parametrize("value", [0, 7, 255])
def test_constant_and_tiny_images_are_fine(tmp_path: Path, value: int) -> None:
    Image.new("L", (1, 1), value).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png").tolist() == [[[np.float32(value / 255)]]]
    dicom(tmp_path / "x.dcm", PixelData=np.full(256, value, np.uint16).tobytes())
    assert np.unique(read_image(tmp_path / "x.dcm")).tolist() == [np.float32(value / 4095)]


def test_a_window_that_is_not_a_number(tmp_path: Path) -> None:
    dicom(tmp_path / "x.dcm", WindowCenter="5", WindowWidth="7")
    data = (tmp_path / "x.dcm").read_bytes()
    (tmp_path / "x.dcm").write_bytes(data.replace(b"DS\x02\x007 ", b"DS\x04\x00nan ", 1))
    with pytest.raises(ImageError, match=r"x.dcm: .*(nan|Window)"):
        read_image(tmp_path / "x.dcm")


# Tables


def load(root: Path, name: str = "csv", settings: dict[str, Any] | None = None, **data: Any) -> None:
    reader = READERS.settings_of(name)(name=name, root=str(root), **(settings or {}))
    load_studies(DataSpec(reader=reader, **data))


HEADER = "path,study_id,patient_id,report,split,Mass\n"
GOOD = "a.png,s,p,Clear.,train,1\n"

TABLES: dict[str, tuple[str | bytes, str]] = {
    "missing column": (
        "path,studyid,report\na.png,s,Clear.\n",
        r"studies.csv: no column 'study_id'; did you mean 'studyid'\? \(found: path, studyid, report\).*data.reader",
    ),
    "no path": ("study_id\ns\n", r"no column 'path'.*found: study_id"),
    "empty file": ("", "studies.csv: empty; expected a header line"),
    "header only": (HEADER, "reader 'csv' found no study; check data.reader"),
    "not utf-8": (
        HEADER.encode() + GOOD.encode() + "b.png,t,q,Größe.,train,1\n".encode("latin-1"),
        r"expected UTF-8, found byte 0xf6 at offset \d+ \(line 3\); save the file as UTF-8",
    ),
    "too many cells": (HEADER + "a.png,s,p,Clear, both sides.,train,1\n", "line 2: 7 cells; expected 6.*quote"),
    "open quote": (HEADER + 'a.png,s,p,"Clear.,train,1\n', "not a CSV row.*mend the quotes"),
    "column twice": ("path,study_id,path\na,s,b\n", "column 'path' stands twice in the header; rename"),
    "no study name": (HEADER + "a.png,,p,Clear.,train,1\n", "line 2: column 'study_id' is empty; give"),
    "image twice": (HEADER + GOOD + GOOD, r"line 3: image 'a.png' stands twice in study 's'; remove a row"),
    "two reports": (
        HEADER + GOOD + "b.png,s,p,Effusion.,train,1\n",
        "line 3: study 's' has report 'Effusion.', but 'Clear.' on line 2; rows of one study must agree",
    ),
    "two patients": (HEADER + GOOD + "b.png,s,q,Clear.,train,1\n", "line 3: study 's' has patient 'q', but 'p'"),
    "two splits of a study": (HEADER + GOOD + "b.png,s,p,Clear.,val,1\n", "study 's' has split 'val', but 'train'"),
    "two labels": (HEADER + GOOD + "b.png,s,p,Clear.,train,0\n", "study 's' has Mass 0, but 1"),
    "unknown split": (HEADER + "a.png,s,p,Clear.,trian,1\n", "line 2: split 'trian'; did you mean 'train'.*val or"),
    "label": (
        HEADER + "".join(f"{i}.png,s{i},p,Clear.,train,1\n" for i in range(20)) + "b.png,t,p,Clear.,train,2\n",
        r"line 22: label 'Mass' is '2'; expected 1, 0, -1 \(uncertain\) or nothing; mend.*label_columns",
    ),
    "patient in two splits": (
        HEADER + GOOD + "b.png,t,p,Clear.,test,1\n",
        r"1 patients in two splits \(p in test and train\); all studies.*mend the split column",
    ),
    "no training study": (HEADER + "a.png,s,p,Clear.,test,1\n", r"split 'train' has no study.*test 1.*split column"),
    "empty report": (
        HEADER + "a.png,s,p, 1. .,train,1\n",
        "study 's': report is empty after cleaning by 'r2gen-iu'.*data.on_error: skip",
    ),
    "missing image": (
        HEADER + GOOD + "gone.png,t,q,Clear.,train,1\n",
        "1 of 2 images are missing: 'gone.png'; check data.reader.root, or set data.on_error: skip",
    ),
    "dots": (HEADER + "../a.png,s,p,Clear.,train,1\n", r"line 2: image '../a.png' leads to .*outside data.reader.root"),
    "absolute": (HEADER + "/etc/hostname,s,p,Clear.,train,1\n", "image '/etc/hostname' leads to .*outside"),
    "link": (HEADER + "link.png,s,p,Clear.,train,1\n", "line 2: image 'link.png' leads to .*outside"),
    "linked folder": (HEADER + "out/a.png,s,p,Clear.,train,1\n", "line 2: image 'out/a.png' leads to .*outside"),
    "no image name": (HEADER + ",s,p,Clear.,train,1\n", "line 2: image '' leads to"),
    "zero byte": (HEADER + "a\0.png,s,p,Clear.,train,1\n", "line 2"),
}


@pytest.mark.parametrize("case", TABLES)
def test_tables(tmp_path: Path, case: str) -> None:
    text, message = TABLES[case]
    root = tmp_path / "data"
    root.mkdir()
    png(tmp_path / "a.png", 8)
    png(root / "a.png", 8)
    (root / "link.png").symlink_to(tmp_path / "a.png")
    (root / "out").symlink_to(tmp_path)
    (root / "studies.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError) as error:
        load(root)
    assert str(root) in str(error.value)
    assert re.search(message, str(error.value), re.S), str(error.value)


@pytest.mark.parametrize("case", ["dots", "absolute", "link", "linked folder"])
def test_skip_never_forgives_a_path_out_of_root(tmp_path: Path, case: str) -> None:
    root = tmp_path / "data"
    root.mkdir()
    png(tmp_path / "a.png", 8)
    (root / "link.png").symlink_to(tmp_path / "a.png")
    (root / "out").symlink_to(tmp_path)
    (root / "studies.csv").write_text(str(TABLES[case][0]))
    with pytest.raises(DataError, match=r"outside data\.reader\.root"):
        load(root, on_error="skip")


def test_settings_that_the_data_set_cannot_meet(tmp_path: Path) -> None:
    png(tmp_path / "a.png", 8)
    (tmp_path / "studies.csv").write_text(HEADER + GOOD)
    with pytest.raises(DataError, match=r"data.labels: .* no label 'Mas'; did you mean 'Mass'\? \(found: Mass\)"):
        load(tmp_path, labels=["Mas"])
    with pytest.raises(DataError, match=r"no column 'text'.*found: path, study_id"):
        load(tmp_path, settings={"report": "text"})
    with pytest.raises(DataError, match="no column 'Edema'"):
        load(tmp_path, settings={"label_columns": ["Edema"]})
    with pytest.raises(DataError, match=r"other.csv: no such file; the folder holds a.png, studies.csv"):
        load(tmp_path, settings={"file": "other.csv"})
    with pytest.raises(DataError, match=r"data.reader.root: no folder .*nowhere.*check the path"):
        load(tmp_path / "nowhere")


# Indiana University


def entry(**fields: Any) -> dict[str, Any]:
    return {"id": "CXR1_IM-1", "report": "Clear.", "image_path": ["a.png"], "split": "train", **fields}


ANNOTATIONS: dict[str, tuple[Any, str]] = {
    "no json": ("{", "annotation.json, line 1: not JSON"),
    "list": ([entry()], "expected an object with lists train, val and test"),
    "unknown split": ({"training": [entry()]}, "split 'training'; expected train, val or test"),
    "no report": ({"train": [entry(report=None)]}, r"train\[0\]: 'report' is None; expected a string"),
    "no list": ({"train": [entry(image_path="a.png")]}, r"train\[0\]: 'image_path' is 'a.png'; expected a list"),
    "numbers": ({"train": [entry(image_path=[1])]}, r"'image_path' is \[1\]; expected a list of strings"),
    "no object": ({"train": ["CXR1"]}, r"train\[0\]: 'CXR1' is no object; expected id"),
    "twice": ({"train": [entry(), entry()]}, "study_id 'CXR1_IM-1' used by more than one study; give each"),
    "leak": ({"train": [entry()], "val": [entry(id="CXR1_IM-2")]}, "CXR1 in train and val"),
    "dots": ({"train": [entry(image_path=["../../a.png"])]}, r"train\[0\]: image .*outside data.reader.root"),
    "no image": ({"train": [entry(image_path=[])]}, "study 'CXR1_IM-1' without an image"),
}


@pytest.mark.parametrize("case", ANNOTATIONS)
def test_annotations(tmp_path: Path, case: str) -> None:
    content, message = ANNOTATIONS[case]
    (tmp_path / "images").mkdir()
    png(tmp_path / "images" / "a.png", 8)
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "annotation.json").write_text(text)
    with pytest.raises(DataError) as error:
        load(tmp_path, "iu-xray")
    assert str(tmp_path) in str(error.value)
    assert re.search(message, str(error.value)), str(error.value)


def test_neither_layout(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    message = (
        "expected R2Gen's 'annotation.json', or 'indiana_reports.csv' and 'indiana_projections.csv'; found notes.txt"
    )
    with pytest.raises(DataError, match=message):
        load(tmp_path, "iu-xray")
    with pytest.raises(DataError, match="found no such folder; check the path"):
        load(tmp_path / "nowhere", "iu-xray")


def test_public_tables_that_disagree(tmp_path: Path) -> None:
    reports = "uid,MeSH,Problems,findings,impression\n1,m,normal,Clear.,\n"
    (tmp_path / "indiana_reports.csv").write_text(reports)
    (tmp_path / "indiana_projections.csv").write_text("uid,filename,projection\n2,a.png,Frontal\n")
    with pytest.raises(DataError, match=r"projections.csv, line 2: uid '2' has no row in indiana_reports.csv; remove"):
        load(tmp_path, "iu-xray")
    (tmp_path / "indiana_reports.csv").write_text(reports + "1,m,normal,Again.,\n")
    with pytest.raises(DataError, match=r"reports.csv: uid '1' stands more than once; remove"):
        load(tmp_path, "iu-xray")
    (tmp_path / "indiana_projections.csv").write_text("uid,filename,view\n1,a.png,Frontal\n")
    (tmp_path / "indiana_reports.csv").write_text(reports)
    with pytest.raises(DataError, match=r"no column 'projection' \(found: uid, filename, view\)"):
        load(tmp_path, "iu-xray")


# Phantoms


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(DataError, match=re.escape(str(tmp_path))):
        load(tmp_path, "phantom", {"studies": 2, "size": 32})
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_phantoms_of_other_settings_are_not_taken(tmp_path: Path) -> None:
    root = tmp_path / "phantom"
    load(root, "phantom", {"studies": 20, "size": 32})
    with pytest.raises(DataError, match="seed"):
        load(root, "phantom", {"studies": 20, "size": 32, "seed": 1})
