"""A hospital's tree of DICOM files: what becomes of it, and what is told where it is wrong."""

import json
import os
import pickle
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.fileset import FileSet
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from medxray.data import ImageError, StudyImages, load_studies
from medxray.data.dicom_headers import Header, structured_report
from medxray.data.readers import READERS
from medxray.data.readers.dicom_folder import DicomFolder
from medxray.spec import DataSpec
from medxray.types import DataError, Study

DX = "1.2.840.10008.5.1.4.1.1.1.1"
BASIC_SR = "1.2.840.10008.5.1.4.1.1.88.11"
KEY = "a key for tests alone, 0123456789"


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("MEDXRAY_KEY", KEY)
    monkeypatch.setenv("MEDXRAY_CACHE", str(folder))
    return folder


def uid(*parts: object) -> str:
    return "2.25." + str(abs(hash(parts)) % 10**20)


def dicom(path: Path, *, bare: bool = False, implicit: bool = False, pixels: int = 8, **fields: Any) -> FileDataset:
    """A radiograph, or whatever `fields` make of it; None leaves a field out."""
    syntax = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
    values = {
        "SOPClassUID": DX, "SOPInstanceUID": uid(path), "StudyInstanceUID": uid("study", path), "PatientID": f"p {path.name}",
        "Modality": "DX", "BodyPartExamined": "CHEST", "ViewPosition": "PA", "SamplesPerPixel": 1, "Rows": pixels,
        "Columns": pixels, "PhotometricInterpretation": "MONOCHROME2", "BitsAllocated": 8, "BitsStored": 8, "HighBit": 7,
        "PixelRepresentation": 0, "PixelData": bytes(pixels * pixels), **fields,
    }  # fmt: skip
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = syntax
    meta.MediaStorageSOPClassUID = UID(values["SOPClassUID"] or DX)
    meta.MediaStorageSOPInstanceUID = UID(values["SOPInstanceUID"] or "1.2.3")
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    for name, value in values.items():
        if value is not None:
            setattr(data, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    if bare:
        del data.file_meta
        data.preamble = None
        data.save_as(path, implicit_vr=implicit, little_endian=True, enforce_file_format=False)
    else:
        data.save_as(path, enforce_file_format=True)
    return data


def code(value: str, meaning: str, scheme: str = "DCM") -> list[Dataset]:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return [item]


def item(kind: str, concept: list[Dataset] | None = None, relation: str = "CONTAINS", **fields: Any) -> Dataset:
    found = Dataset()
    found.RelationshipType, found.ValueType = relation, kind
    if concept is not None:
        found.ConceptNameCodeSequence = concept
    for name, value in fields.items():
        setattr(found, name, value)
    return found


def report(path: Path, content: list[Dataset], **fields: Any) -> None:
    dicom(
        path, **{
            "SOPClassUID": BASIC_SR, "Modality": "SR", "BodyPartExamined": None, "ViewPosition": None, "Rows": None,
            "Columns": None, "PixelData": None, "PhotometricInterpretation": None, "BitsAllocated": None, "BitsStored": None,
            "HighBit": None, "PixelRepresentation": None, "SamplesPerPixel": None, "ValueType": "CONTAINER",
            "CompletionFlag": "COMPLETE", "VerificationFlag": "VERIFIED", "ContentSequence": content, **fields,
        },
    )  # fmt: skip


def sections(findings: str, impression: str = "Normal.") -> list[Dataset]:
    return [
        item("CODE", code("121058", "Procedure"), "HAS CONCEPT MOD", ConceptCodeSequence=code("1", "Chest X-ray")),
        item("PNAME", code("121008", "Person Observer Name"), "HAS OBS CONTEXT", PersonName="Secret^Doctor"),
        item("CONTAINER", code("121060", "History"), ContentSequence=[
            item("TEXT", code("121060", "History"), TextValue="Cough."),
        ]),
        item("CONTAINER", code("121070", "Findings"), ContentSequence=[
            item("TEXT", code("121071", "Finding"), TextValue=findings),
        ]),
        item("CONTAINER", code("121072", "Impressions"), ContentSequence=[
            item("TEXT", code("121073", "Impression"), TextValue=impression),
        ]),
    ]  # fmt: skip


def reader(root: Path, **settings: Any) -> DicomFolder:
    built = READERS.build(READERS.settings_of("dicom-folder")(name="dicom-folder", root=str(root), **settings), root)
    assert isinstance(built, DicomFolder)
    return built


def studies(root: Path, **settings: Any) -> list[Study]:
    return list(reader(root, **settings).read())


def spec(root: Path, data: dict[str, Any] | None = None, **settings: Any) -> DataSpec:
    of = READERS.settings_of("dicom-folder")(name="dicom-folder", root=str(root), **settings)
    return DataSpec(reader=of, image_size=16, **(data or {}))


def told(built: DicomFolder) -> str:
    return "\n".join(row["reason"] for row in built.left_out)


# Which files, and how they are grouped


def test_files_of_any_name_become_studies(tmp_path: Path) -> None:
    one = {"StudyInstanceUID": "1.2.3", "PatientID": "007"}
    dicom(tmp_path / "a/IM00001", ViewPosition="LL", InstanceNumber=1, **one)
    dicom(tmp_path / "a/IM00002.dcm", ViewPosition="PA", InstanceNumber=2, **one)
    dicom(tmp_path / "b" / "c" / "x.weird.name", ViewPosition="AP", bare=True, **(one | {"StudyInstanceUID": "1.2.4"}))
    dicom(tmp_path / "d/implicit", implicit=True, bare=True, PatientID="8")
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "empty.dcm").touch()
    (tmp_path / "looks_bare").write_bytes(b"\x08\x00\x05\x00" + b"garbage" * 40)
    built = reader(tmp_path)
    found = built.read()
    assert [study["views"] for study in found] == [["PA", "LL"], ["AP"], ["PA"]]
    assert found[0]["patient_id"] == found[1]["patient_id"] != found[2]["patient_id"]
    assert len({study["study_id"] for study in found}) == 3
    assert [built.path(image).name for image in found[0]["images"]] == ["IM00002.dcm", "IM00001"]
    assert told(built) == "3 files: no DICOM file"
    for name in (found[0]["study_id"], found[0]["patient_id"], *found[0]["images"]):
        assert len(name) == 24 and set(name) <= set("0123456789abcdef")


def test_studies_without_a_uid_go_by_accession_number_then_by_folder(tmp_path: Path) -> None:
    without = {"StudyInstanceUID": None, "PatientID": "1"}
    dicom(tmp_path / "a/1", AccessionNumber="A1", **without)
    dicom(tmp_path / "b/1", AccessionNumber="A1", **without)
    dicom(tmp_path / "b/2", AccessionNumber="A2", **without)
    dicom(tmp_path / "c/1", **without)
    dicom(tmp_path / "c/2", **without)
    dicom(tmp_path / "d/1", **without)
    assert sorted(len(study["images"]) for study in studies(tmp_path)) == [1, 1, 2, 2]


def test_patients_go_by_id_and_issuer(tmp_path: Path) -> None:
    for name, fields in {
        "a": {"PatientID": "1", "IssuerOfPatientID": "north"},
        "b": {"PatientID": "1", "IssuerOfPatientID": "south"},
        "c": {"PatientID": "2", "IssuerOfPatientID": "north"},
        "d": {"PatientID": "2"},
        "e": {"PatientID": " 2 "},
        "f": {"PatientID": None},
        "g": {"PatientID": ""},
    }.items():
        dicom(tmp_path / name, **fields)
    built = reader(tmp_path)
    a, b, c, d, e, f, g = (study["patient_id"] for study in built.read())
    assert len({a, b, c}) == 3
    assert c == d == e  # a device left the issuer out
    assert f == g == ""
    assert "2 studies without a Patient ID are kept" in told(built)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"Modality": "MR"}, "modality MR"),
        ({"Modality": "SMITH"}, "a modality that DICOM does not know"),
        ({"Modality": "RF"}, "modality RF"),
        ({"BodyPartExamined": "HAND"}, "body part HAND"),
        ({"BodyPartExamined": "SMITH JOHN"}, "body part other than the chest"),
        ({"BodyPartExamined": None, "AnatomicRegionSequence": code("85562004", "Hand", "SCT")}, "the chest, by its code"),
        ({"PresentationIntentType": "FOR PROCESSING"}, "raw image for processing"),
        ({"SOPClassUID": DX + ".1"}, "raw image for processing"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.88.67", "Modality": "SR", "Rows": None, "PixelData": None}, "modality SR"),
        ({"Rows": None, "PixelData": None, "SOPClassUID": "1.2.840.10008.5.1.4.1.1.11.1"}, "modality DX, but no image"),
    ],
)  # fmt: skip
def test_what_is_no_chest_radiograph_is_passed_by_with_its_reason(
    fields: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    dicom(tmp_path / "chest")
    dicom(tmp_path / "other", **fields)
    built = reader(tmp_path)
    assert len(built.read()) == 1
    assert told(built).startswith("1 file: ") and told(built).endswith(reason)


def test_settings_widen_and_narrow_what_is_taken(tmp_path: Path) -> None:
    dicom(tmp_path / "1", BodyPartExamined="PORT CHEST")
    dicom(tmp_path / "2", BodyPartExamined="CHEST_AP")
    dicom(tmp_path / "3", BodyPartExamined=None)
    dicom(tmp_path / "4", BodyPartExamined="CHESTABDOMEN")
    dicom(tmp_path / "5", Modality="RG")
    dicom(tmp_path / "6", ImageType=["DERIVED", "PRIMARY"])
    dicom(tmp_path / "7", SOPClassUID="1.2.840.10008.5.1.4.1.1.7")
    dicom(tmp_path / "8", ImageType=["ORIGINAL", "SECONDARY"])
    dicom(tmp_path / "9", BodyPartExamined=None, AnatomicRegionSequence=code("51185008", "Chest", "SCT"))

    def taken(**settings: Any) -> str:
        built = reader(tmp_path, **settings)
        return "".join(sorted(built.path(image).name for study in built.read() for image in study["images"]))

    assert taken() == "1236789"
    assert taken(modalities=["cr", "dx", "rg"]) == "12356789"
    assert taken(body_parts=["Chest"]) == "126789"
    assert taken(body_parts=["CHEST", "CHESTABDOMEN"]) == "1246789"
    assert taken(leave_out=["derived"]) == "123789"
    assert taken(leave_out=["secondary-capture"]) == "12369"


def test_an_image_that_lies_twice_is_taken_once_and_told(tmp_path: Path) -> None:
    dicom(tmp_path / "b/original", SOPInstanceUID="1.2.3")
    (tmp_path / "a").mkdir()
    shutil.copy(tmp_path / "b/original", tmp_path / "a/copy")
    built = reader(tmp_path)
    (study,) = built.read()
    assert built.path(study["images"][0]) == tmp_path / "a/copy"
    (row,) = built.left_out
    assert row["study"] == study["study_id"] and "a second file of one SOP Instance UID" in row["reason"]
    assert built.path(row["file"]) == tmp_path / "b/original"


def test_a_dicomdir_and_deflated_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dicom(tmp_path / "plain")
    made = FileSet()
    with pydicom.config.disable_value_validation():
        fields = {"StudyID": "1", "StudyDate": "20200101", "StudyTime": "10", "PatientName": "x", "SeriesInstanceUID": "1.2"}
        made.add(dicom(tmp_path / "plain", SeriesNumber=1, InstanceNumber=1, **fields))
        made.write(tmp_path / "medium")
    assert (tmp_path / "medium/DICOMDIR").is_file()
    built = reader(tmp_path)
    assert len(built.read()) == 1
    assert "1 file: no modality (SOP class Media Storage Directory Storage)" in told(built)
    assert "a second file of one SOP Instance UID" in told(built)
    monkeypatch.setattr("medxray.data.readers.dicom_folder._LARGEST", 1000)
    # A deflated data set can be unpacked in part only; one that would fill the memory is no header.
    plain = (tmp_path / "plain").read_bytes()
    start = 144 + int.from_bytes(plain[140:144], "little")
    meta = plain[:start].replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99\0\0")
    meta = meta.replace(b"\x10\0UI\x14\0", b"\x10\0UI\x18\0")
    meta = meta[:140] + (len(meta) - 144).to_bytes(4, "little") + meta[144:]
    for name, content in {"deflated": plain[start:], "bomb": plain[start:] + bytes(2_000_000)}.items():
        packer = zlib.compressobj(wbits=-15)
        (tmp_path / name).write_bytes(meta + packer.compress(content.replace(b"20200101", b"20210101")) + packer.flush())
    shutil.rmtree(tmp_path / "medium")
    built = reader(tmp_path)
    built.read()
    assert {built.path(row["file"]).name for row in built.damaged} == {"bomb"}
    assert [built.path(row["file"]).name for row in built.left_out if row["file"]] == ["plain"]


@pytest.mark.parametrize(
    ("fields", "view"),
    [
        ({"ViewPosition": "PA"}, "PA"),
        ({"ViewPosition": "ap"}, "AP"),
        ({"ViewPosition": "LATERAL"}, "LL"),
        ({"ViewPosition": "RL"}, "LL"),
        ({"ViewCodeSequence": code("272479007", "postero-anterior", "SCT")}, "PA"),
        ({"ViewCodeSequence": code("399348003", "antero-posterior", "SCT")}, "AP"),
        ({"ViewCodeSequence": code("R-10236", "left lateral", "SRT"), "SeriesDescription": "CHEST PA"}, "LL"),
        ({"SeriesDescription": "Thorax p.a."}, "PA"),
        ({"SeriesDescription": "Chest antero-posterior"}, "AP"),
        ({"SeriesDescription": "W Chest Lat"}, "LL"),
        ({"SeriesDescription": "PA and lateral", "ProtocolName": "AP portable"}, "AP"),
        ({"SeriesDescription": "lat decubitus"}, "unknown"),
        ({"SeriesDescription": "Lateral decubitus AP"}, "AP"),
        ({"PatientOrientation": ["P", "F"]}, "LL"),
        ({"PatientOrientation": ["L", "F"]}, "unknown"),
        ({"ViewPosition": "", "SeriesDescription": "Platform"}, "unknown"),
    ],
)
def test_views(fields: dict[str, Any], view: str, tmp_path: Path) -> None:
    data = dicom(tmp_path / "x", **{"ViewPosition": None, **fields})
    assert Header(data).view() == view
    assert Header(pydicom.dcmread(tmp_path / "x")).view() == view
    (study,) = studies(tmp_path)
    assert study["views"] == [view]


def test_the_views_of_the_codes_are_those_of_pydicom() -> None:
    from pydicom.sr._cid_dict import cid_concepts
    from pydicom.sr._concepts_dict import concepts

    from medxray.data.dicom_headers import _VIEW_CODES

    known = {
        code: meaning
        for scheme, names in cid_concepts[4010].items()
        for name in names
        for code, (meaning, _) in concepts[scheme].get(name, {}).items()
    }
    words = {"PA": {"postero-anterior"}, "AP": {"antero-posterior"}, "LL": {"left lateral", "right lateral", "lateral",
             "lateral-medial", "medial-lateral"}}  # fmt: skip
    for code_, view in _VIEW_CODES.items():
        if code_ in known:
            assert known[code_] in words[view]
    assert sum(code_ in known for code_ in _VIEW_CODES) == 7


def test_real_radiographs(shared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "real"
    shutil.copytree(shared / "data/dicom_chest", folder)
    built = reader(folder)
    found = built.read()
    files = {built.path(image).name: study for study in found for image in study["images"]}
    assert not any("tibia" in name for name in files) and "1 file: body part EXTREMITY" in told(built)
    assert "labels.csv" not in files and "1 file: no DICOM file" in told(built)
    assert any(name.startswith("WG04_RG1") for name in files) and any(name.startswith("nih") for name in files)
    # The same radiograph with and without meta information has one SOP Instance UID.
    assert sum(name.startswith("CR-MONO1") for name in files) == 1
    assert files["WG04_RG1_chest_MONOCHROME1_15bit_j2k.dcm"]["views"] == ["PA"]
    assert all(study["burned_in"] is None for study in found)


# Reports, labels, splits


def visits(root: Path, days: dict[str, str], patient: str = "1", times: dict[str, str] | None = None) -> None:
    for name, day in days.items():
        dicom(
            root / name / "x", StudyInstanceUID=f"1.2.{name}", AccessionNumber=f"A{name}", PatientID=patient, StudyDate=day,
            StudyTime=(times or {}).get(name, "10"),
        )  # fmt: skip


def by_folder(root: Path, **settings: Any) -> dict[str, Study]:
    built = reader(root, **settings)
    return {built.path(study["images"][0]).parent.name: study for study in built.read()}


TEXT = "INDICATION: Cough.\n\nFINDINGS: Study {} is clear.\n\nIMPRESSION: Normal {}.\n"


@pytest.mark.parametrize(
    ("pattern", "file"),
    [
        ("reports/{accession}.txt", "reports/A{}.txt"),
        ("{study}.txt", "1.2.{}.txt"),
        ("{folder}/report*.txt", "{}/report_final.txt"),
        ("{folder}.txt", "{}.txt"),
    ],
)
def test_text_reports_and_the_report_before(pattern: str, file: str, tmp_path: Path) -> None:
    visits(tmp_path, {"30": "20200301", "10": "20190101", "20": "20190505"})
    for name in ("10", "30"):
        path = tmp_path / file.format(name)
        path.parent.mkdir(exist_ok=True)
        path.write_text(TEXT.format(name, name))
    found = by_folder(tmp_path, reports=pattern)
    first, middle, last = (found[name] for name in ("10", "20", "30"))
    assert first["report"] == first["findings"] == "Study 10 is clear."
    assert first["impression"] == "Normal 10." and first["indication"] == "Cough." and first["prior"] == ""
    # A study without a report is passed over when the one before is looked for.
    assert middle["report"] == "" and middle["prior"] == last["prior"] == "Study 10 is clear. Normal 10."
    assert by_folder(tmp_path, reports=pattern, report="impression")["30"]["report"] == "Normal 30."
    assert by_folder(tmp_path, reports=pattern, report="all")["30"]["report"] == TEXT.format(30, 30)


def test_studies_whose_order_is_not_told_are_no_priors(tmp_path: Path) -> None:
    visits(tmp_path, {"1": "20200101", "2": "20200101", "3": "20200102", "4": ""}, times={"1": "0900", "2": "", "3": "08:15"})
    visits(tmp_path, {"5": "19000101"}, patient="other")
    for name in "12345":
        (tmp_path / name / "r.txt").write_text(f"FINDINGS: {name}.")
    found = by_folder(tmp_path, reports="{folder}/r.txt")
    assert [found[name]["prior"] for name in "1245"] == ["", "", "", ""]
    assert found["3"]["prior"] in ("1.", "2.")
    visits(tmp_path, {"2": "20200101"}, times={"2": "0901"})
    found = by_folder(tmp_path, reports="{folder}/r.txt")
    assert (found["2"]["prior"], found["3"]["prior"]) == ("1.", "2.")


def test_reports_that_belong_to_nobody_are_told(tmp_path: Path) -> None:
    visits(tmp_path, {"1": "20200101", "2": "20200102"})
    (tmp_path / "A1.txt").write_text("FINDINGS: Clear.")
    (tmp_path / "A77.txt").write_text("FINDINGS: Clear.")
    built = reader(tmp_path, reports="{accession}.txt")
    built.read()
    assert told(built) == "1 file: a text report of no study that has images here, or of several"
    with pytest.raises(DataError, match=r"matches 2 files, and none is of a study here.*compared with the headers"):
        studies(tmp_path, reports="{study}.txt")
    with pytest.raises(DataError, match="matches 0 files"):
        studies(tmp_path, reports="text/{study}.txt")
    with pytest.raises(DataError, match=r"data.reader.reports: expected a path with one of .*found 'x/\{name\}.txt'"):
        studies(tmp_path, reports="x/{name}.txt")


def test_text_of_another_encoding(tmp_path: Path) -> None:
    visits(tmp_path, {"1": "20200101"})
    (tmp_path / "A1.txt").write_bytes("FINDINGS: Infiltrat möglich.".encode("cp1252"))
    with pytest.raises(DataError, match=r"expected utf-8, found byte 0xf6 at offset 21; .*data.reader.encoding.*cp1252"):
        studies(tmp_path, reports="{accession}.txt")
    with pytest.raises(DataError, match="no encoding 'cp12'"):
        studies(tmp_path, reports="{accession}.txt", encoding="cp12")
    assert studies(tmp_path, reports="{accession}.txt", encoding="cp1252")[0]["report"] == "Infiltrat möglich."
    (tmp_path / "A1.txt").write_bytes("FINDINGS: Infiltrat möglich.".encode("utf-8-sig"))
    assert studies(tmp_path, reports="{accession}.txt")[0]["report"] == "Infiltrat möglich."


def test_non_ascii_identifiers_meet_their_table(tmp_path: Path) -> None:
    dicom(tmp_path / "x", SpecificCharacterSet="ISO_IR 100", AccessionNumber="MÜ-1")
    (tmp_path / "t.csv").write_text("accession,report\nMÜ-1,FINDINGS: Clear.\n")
    assert studies(tmp_path, table="t.csv")[0]["report"] == "Clear."


@pytest.mark.parametrize(
    "columns",
    ["study_uid,,", "accession,,", "patient_id,study_date,", "patient_id,study_date,iso"],
)
def test_a_table_tells_reports_labels_and_splits(columns: str, tmp_path: Path) -> None:
    visits(tmp_path, {"1": "20200101", "2": "20210101"})
    visits(tmp_path, {"3": "20200101"}, patient="0002")
    cells = {
        "study_uid": ("1.2.1", "1.2.2", "1.2.3"), "accession": ("A1", "A2", "A3"), "patient_id": ("1", "1", "0002"),
        "study_date": ("20200101", "20210101", "20200101"),
    }  # fmt: skip
    one, two, how = columns.split(",")
    lines = [",".join(filter(None, [one, two])) + ",report,split,Edema,Mass,age"]
    rows = [("Clear.", "train", "1", "", "50"), ("Edema.", "train", "0", "-1", "51"), ("Mass.", "validation", "", "1", "7")]
    for i, row in enumerate(rows):
        keys = [cells[name][i] for name in (one, two) if name]
        if how:
            keys[1] = f"{keys[1][:4]}-{keys[1][4:6]}-{keys[1][6:]} 10:00"
        lines.append(",".join([*keys, *row]))
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    found = by_folder(tmp_path, table="t.csv")
    assert [found[name]["report"] for name in "123"] == ["Clear.", "Edema.", "Mass."]
    assert [found[name]["split"] for name in "123"] == ["train", "train", "val"]
    assert found["2"]["labels"] == {"Edema": 0, "Mass": -1} and found["3"]["labels"] == {"Edema": None, "Mass": 1}
    assert found["2"]["prior"] == "Clear."


def test_a_table_beats_text_files_and_those_structured_reports(tmp_path: Path) -> None:
    visits(tmp_path, {"1": "20200101", "2": "20200102", "3": "20200103"})
    for name in "123":
        report(tmp_path / name / "sr", sections(f"sr {name}"), StudyInstanceUID=f"1.2.{name}", PatientID="1")
    for name in "12":
        (tmp_path / f"A{name}.txt").write_text(f"FINDINGS: file {name}")
    (tmp_path / "t.csv").write_text("accession,findings,impression\nA1,table 1,Fine.\nA3,,\n")
    found = by_folder(tmp_path, reports="{accession}.txt", table="t.csv")
    assert [found[name]["report"] for name in "123"] == ["table 1", "file 2", "sr 3"]
    assert found["1"]["impression"] == "Fine."
    assert by_folder(tmp_path, sr=False, table="t.csv")["3"]["report"] == ""


def test_structured_reports(tmp_path: Path) -> None:
    dicom(tmp_path / "x", StudyInstanceUID="1.2.1", PatientID="1", AccessionNumber="A")
    content = sections("Heart normal.\r\nLungs clear.", "No change.")
    content[3].ContentSequence += [
        item("NUM", code("1", "Cardiothoracic ratio"), MeasuredValueSequence=[measured("0.45", "1")]),
        item("NUM", code("2", "Diameter"), MeasuredValueSequence=[measured("12", "mm")]),
        item("CODE", code("3", "Effusion"), ConceptCodeSequence=code("4", "Absent"), ContentSequence=[
            item("TEXT", code("5", "Comment"), "HAS PROPERTIES", TextValue="Both sides."),
        ]),
        item("DATE", code("6", "Date of comparison"), Date="19991231"),
        item("CONTAINER", code("7", "Devices"), ContentSequence=[item("TEXT", None, TextValue="Tube in place.")]),
    ]  # fmt: skip
    report(tmp_path / "sr", content, StudyInstanceUID="1.2.1")
    text = structured_report(tmp_path / "sr").text
    assert text == (
        "INDICATION:\nCough.\n\nFINDINGS:\nHeart normal.\nLungs clear.\nCardiothoracic ratio: 0.45\nDiameter: 12 mm\n"
        "Effusion: Absent\nBoth sides.\nTube in place.\n\nIMPRESSION:\nNo change."
    )
    (study,) = studies(tmp_path)
    assert study["findings"].startswith("Heart normal. Lungs clear. Cardiothoracic ratio: 0.45")
    assert study["impression"] == "No change." and study["indication"] == "Cough."
    # The last one that is complete; one with a study of its own is found by its accession number.
    report(tmp_path / "sr2", sections("Later."), StudyInstanceUID="1.2.9", AccessionNumber="A", ContentDate="20200102")
    assert studies(tmp_path)[0]["findings"] == "Later."
    report(tmp_path / "sr3", sections("Draft."), StudyInstanceUID="1.2.1", ContentDate="20210102", CompletionFlag="PARTIAL")
    assert studies(tmp_path)[0]["findings"] == "Later."
    report(tmp_path / "sr4", sections("Of others."), StudyInstanceUID="1.2.8")
    built = reader(tmp_path)
    assert built.read()[0]["findings"] == "Later."
    assert told(built) == "1 file: a structured report of no study that has images here"


def measured(value: str, unit: str) -> Dataset:
    found = Dataset()
    found.NumericValue = value
    found.MeasurementUnitsCodeSequence = code(unit, unit, "UCUM")
    return found


def test_a_basic_text_report_without_containers(tmp_path: Path) -> None:
    content = [
        item("TEXT", code("59776-5", "Findings", "LN"), TextValue="Clear."),
        item("TEXT", code("19005-8", "Impressions", "LN"), TextValue="Normal."),
    ]
    report(tmp_path / "sr", content)
    assert structured_report(tmp_path / "sr").text == "FINDINGS:\nClear.\n\nIMPRESSION:\nNormal."


def test_sex_age_band_and_manufacturer(tmp_path: Path) -> None:
    told: dict[str, list[dict[str, Any]]] = {
        "a": [{"PatientSex": "F", "PatientAge": "064Y", "Manufacturer": "SIEMENS"}, {"Manufacturer": "Siemens AG"}],
        "b": [{"PatientSex": "M", "PatientBirthDate": "19540331", "StudyDate": "20190330", "Manufacturer": "Doe, John"}],
        "c": [{"PatientSex": "X", "PatientAge": "unknown", "PatientBirthDate": "1954"}],
        "d": [{"PatientSex": "F", "Manufacturer": "Canon"}, {"PatientSex": "M", "Manufacturer": "Agfa"}],
    }
    for name, images in told.items():
        for i, fields in enumerate(images):
            dicom(tmp_path / name / str(i), StudyInstanceUID=uid(name), PatientID=name, **fields)
    expected = {"a": ("female", "40-64", "Siemens"), "b": ("male", "40-64", "other"), "c": ("",) * 3, "d": ("",) * 3}
    for _ in range(2):  # the second time out of the index
        studies = by_folder(tmp_path)
        assert {name: (s["sex"], s["age_band"], s["manufacturer"]) for name, s in studies.items()} == expected
    assert not any(word in str(studies) for word in ("064Y", "1954", "2019", "Doe"))


def test_burned_in(tmp_path: Path) -> None:
    for name, marks in {"a": ["YES", "NO"], "b": ["NO", "NO"], "c": ["NO", None], "d": [None]}.items():
        for i, mark in enumerate(marks):
            dicom(tmp_path / name / str(i), StudyInstanceUID=uid(name), PatientID="1", BurnedInAnnotation=mark)
    assert {name: study["burned_in"] for name, study in by_folder(tmp_path).items()} == {"a": 1, "b": 0, "c": None, "d": None}
    (tmp_path / "t.csv").write_text("study_uid,split\n" + "".join(f"{uid(name)},train\n" for name in "abcd"))
    kept = load_studies(spec(tmp_path, table="t.csv"))
    assert kept.splits["train"]["burned_in"][:] == [1, 0, None, None] and kept.skipped == []
    dropped = load_studies(spec(tmp_path, {"burned_in": "drop"}, table="t.csv"))
    assert dropped.splits["train"]["burned_in"][:] == [0, None, None]
    (row,) = dropped.skipped
    assert row["study"] == kept.splits["train"][0]["study_id"] and "burned into an image" in row["reason"]


# What is wrong


def test_nothing_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"no folder .*missing; expected a folder of DICOM files"):
        studies(tmp_path / "missing")
    (tmp_path / "tree/below").mkdir(parents=True)
    with pytest.raises(DataError, match="no file in this folder; expected DICOM files"):
        studies(tmp_path / "tree")
    (tmp_path / "tree/notes").write_text("x")
    monkeypatch.delenv("MEDXRAY_KEY")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    with pytest.raises(DataError, match="none of 1 files is a DICOM file"):
        studies(tmp_path / "tree")
    assert not (tmp_path / "data").exists()
    (tmp_path / "tree/notes").unlink()
    dicom(tmp_path / "tree/mr", Modality="MR")
    (tmp_path / "tree/x.txt").write_text("x")
    with pytest.raises(DataError, match=r"none of 2 files is a chest radiograph .*modality MR: 1.*widen data.reader.modalities"):
        studies(tmp_path / "tree")


def test_damaged_files_stop_or_are_listed(tmp_path: Path) -> None:
    dicom(tmp_path / "good", PatientID="1")
    dicom(tmp_path / "cut", PatientName="Secret^Name")
    whole = (tmp_path / "cut").read_bytes()
    (tmp_path / "cut").write_bytes(whole[: whole.index(b"Secret") + 3])
    (tmp_path / "head").write_bytes(bytes(128) + b"DICM" + b"\x08\x00\x05\x00CS\xff\xff")
    report(tmp_path / "sr", [], ContentSequence=None, StudyInstanceUID=uid("study", tmp_path / "good"))
    locked = dicom(tmp_path / "locked")
    del locked
    (tmp_path / "locked").chmod(0)
    built = reader(tmp_path)
    (study,) = [s for s in built.read() if built.path(s["images"][0]).name == "good"]
    damaged = {built.path(row["file"]).name: row for row in built.damaged}
    expected = {"cut", "head", "sr"} | ({"locked"} if os.getuid() else set())
    assert set(damaged) == expected
    assert damaged["sr"]["study"] == study["study_id"] and "no content" in damaged["sr"]["reason"]
    text = json.dumps(built.damaged)
    assert "Secret" not in text and not any(f"/{name}" in text for name in expected)
    with pytest.raises(DataError, match=rf"cannot be read: {len(expected)}, such as [0-9a-f]{{24}} .*data.on_error: skip"):
        load_studies(spec(tmp_path))
    found = load_studies(spec(tmp_path, {"on_error": "skip"}))
    assert len([row for row in found.skipped if row["file"] in {r["file"] for r in built.damaged}]) == len(expected)
    (tmp_path / "locked").chmod(0o600)
    built = reader(tmp_path)
    assert len(built.read()) == 2 and {built.path(row["file"]).name for row in built.damaged} == {"cut", "head", "sr"}


def test_links(tmp_path: Path) -> None:
    root = tmp_path / "root"
    dicom(root / "a/x")
    (root / "loop").symlink_to(root)
    (root / "a/up").symlink_to("..")
    (root / "twin").symlink_to(root / "a/x")
    (root / "self").symlink_to("self")
    (root / "gone").symlink_to("nowhere")
    built = reader(root)
    assert len(built.read()) == 1
    assert told(built) == "5 files: a symbolic link; what it leads to is read where it lies"
    dicom(tmp_path / "elsewhere/y")
    (root / "outside").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"lead out of data.reader.root: 1; set the root .*type l"):
        studies(root)
    # A root that is itself a link is as good as any.
    (root / "outside").unlink()
    (tmp_path / "link").symlink_to(root)
    assert len(studies(tmp_path / "link")) == 1


@pytest.mark.parametrize(("field", "what"), [("StudyInstanceUID", "Study"), ("SOPInstanceUID", "SOP")])
def test_a_uid_of_two_patients_is_refused(field: str, what: str, tmp_path: Path) -> None:
    dicom(tmp_path / "a", PatientID="1", **{field: "1.2.777"})
    dicom(tmp_path / "b", PatientID="2", **{field: "1.2.777"})
    with pytest.raises(DataError, match=f"1 {what} Instance UIDs are each of two patients.*mend the headers") as error:
        studies(tmp_path)
    assert "1.2.777" not in str(error.value)
    called = re.search(r"here called '(\w+)'", str(error.value))
    assert called and reader(tmp_path).find(called[1]) == [tmp_path / "a", tmp_path / "b"]


def test_files_are_found_by_what_they_are_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    visits(tmp_path, {"1": "20200101", "2": "20210101"})
    (tmp_path / "3").write_bytes(bytes(128) + b"DICM" + b"\x08\x00\x05\x00CS\xff\xff")
    built = reader(tmp_path)
    one, two = built.read()
    assert built.find(one["patient_id"]) == [tmp_path / "1/x", tmp_path / "2/x"]
    assert built.find(two["study_id"]) == built.find(two["images"][0]) == [tmp_path / "2/x"] == [built.path(two["images"][0])]
    assert built.find(built.damaged[0]["file"]) == [tmp_path / "3"]
    for name in ("", "another"):
        with pytest.raises(DataError, match=f"nothing is called '{name}' here"):
            built.find(name)
    monkeypatch.setenv("MEDXRAY_KEY", KEY + "!")
    with pytest.raises(DataError, match="another key"):
        built.find(one["study_id"])


def rows(root: Path, text: str, **settings: Any) -> list[Study]:
    (root / "t.csv").write_text(text)
    return studies(root, table="t.csv", **settings)


def test_a_table_that_is_wrong(tmp_path: Path) -> None:
    visits(tmp_path, {"1": "20200101", "2": "20210101"})
    visits(tmp_path, {"3": "20200101"}, patient="2")
    for text, settings, message in [
        ("accession,split\nA1,train\nA3,test\nA2,val\n", {}, "line 4: a patient in two splits, here in val and .* line 2"),
        ("accession,split\nA1,tain\n", {}, "line 2: the split is none of train, val and test"),
        ("accession,report\nA1,Clear.\nA1,Other.\n", {}, "line 3: report is not that of line 2"),
        ("accession,report\nB1,Clear.\nB2,x\n", {}, "none of 2 rows is of a study below .*leading zeros"),
        ("name,report\nA1,Clear.\n", {}, r"no column tells which study .*found: name, report.*data.reader.study"),
        ("name,report\nA1,Clear.\n", {"accession": "names"}, "no column 'names'; did you mean 'name'"),
        ("patient_id,study_date\n1,01.01.2020\n", {}, "line 2: the date is not written as YYYYMMDD"),
        ("accession,Edema\nA1,1\nA2,0\nA3,Smith\n", {"label_columns": ["Edema"]}, "line 4: label 'Edema' is none of 1, 0, -1"),
    ]:
        with pytest.raises(DataError, match=message) as error:
            rows(tmp_path, text, **settings)
        assert not any(secret in str(error.value) for secret in ("Smith", "01.01.2020", "tain;", "Other"))
    with pytest.raises(DataError, match=r"data.reader.table: no file .*gone.csv"):
        studies(tmp_path, table="gone.csv")
    with pytest.raises(DataError, match=r"outside data.reader.root"):
        studies(tmp_path, table="../x.csv")
    assert rows(tmp_path, "patient_id,study_date,report\n1,01.01.2020,Clear.\n", date_format="%d.%m.%Y")[0]["report"] == "Clear."


def test_rows_of_unknown_studies_and_studies_without_a_row_are_told(tmp_path: Path) -> None:
    visits(tmp_path, {"1": "20200101", "2": "20210101"})
    visits(tmp_path, {"3": "20200101"}, patient="2")
    (tmp_path / "t.csv").write_text("accession,report,split\nA1,Clear.,train\nB7,x,test\n,y,test\n")
    built = reader(tmp_path, table="t.csv")
    found = built.read()
    # Study 2 goes where its patient is; nobody says where the other patient belongs.
    assert [study["split"] for study in found] == ["train", "train"]
    assert told(built).splitlines() == [
        "2 rows of t.csv are of no study that has images here: line 3, line 4", "t.csv tells no split of its patient",
    ]  # fmt: skip
    dicom(tmp_path / "1b", PatientID="1", StudyDate="20200101")
    (tmp_path / "t.csv").write_text("patient_id,study_date,report\n1,20210101,Clear.\n1,20200101,x\n")
    built = reader(tmp_path, table="t.csv")
    assert [study["report"] for study in built.read() if study["report"]] == ["Clear."]
    assert "1 rows of t.csv are of several studies of one patient and day: line 3" in told(built)


def test_an_image_that_cannot_be_read_is_named_by_its_hash(tmp_path: Path) -> None:
    data = np.arange(64, dtype=np.uint8)
    dicom(tmp_path / "secret-name.dcm", PixelData=data.tobytes(), PatientID="1")
    found = load_studies(spec(tmp_path, table=_all_train(tmp_path)))
    (image,) = found.splits["train"][0]["images"]
    images = StudyImages(
        found.splits["train"], found.root, spec(tmp_path), channels=1, mean=(0.0,), std=(1.0,), labels=[], seed=0, train=False,
        max_views=1, reader=found.reader,
    )  # fmt: skip
    assert np.array_equal(images.read(image)[0], data.reshape(8, 8).astype(np.float32) / 255)
    assert found.reader.exists(image) and not found.reader.exists("another")
    assert pickle.loads(pickle.dumps(found.reader)).open(image) == found.reader.open(image)  # as it goes to a worker
    path = tmp_path / "secret-name.dcm"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ImageError, match=image) as error:
        images.read(image)
    assert "secret" not in str(error.value)
    path.unlink()
    with pytest.raises(ImageError, match=rf"{image}: cannot be read .*DicomFolder.find") as error:
        images.read(image)
    assert "secret" not in str(error.value)
    with pytest.raises(ImageError, match="no file is called 'another' here"):
        found.reader.open("another")


def _all_train(root: Path) -> str:
    (root / "t.csv").write_text("study_uid,split\n" + "".join(
        f"{pydicom.dcmread(path).StudyInstanceUID},train\n" for path in sorted(root.rglob("*.dcm"))
    ))  # fmt: skip
    return "t.csv"


# The index


def test_a_second_reading_opens_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "root"
    visits(root, {"1": "20200101", "2": "20210101", "3": "20220101"})
    visits(root, {"4": "20220101"}, patient="2")
    (root / "x.txt").write_text("x")
    before = studies(root)
    opened: list[str] = []
    real = DicomFolder._header

    def header(self: DicomFolder, path: str, *args: Any) -> Any:
        opened.append(path)
        return real(self, path, *args)

    monkeypatch.setattr(DicomFolder, "_header", header)
    assert studies(root) == before and opened == []
    # A new study between two others: all of that patient's headers are read again, nobody else's.
    visits(root, {"5": "20210601"})
    (root / "5/r.txt").write_text("FINDINGS: five.")
    found = by_folder(root, reports="{folder}/r.txt")
    assert sorted(opened) == ["1/x", "2/x", "3/x", "5/x"]
    assert [found[name]["prior"] for name in "12345"] == ["", "", "five.", "", ""]
    # One that went.
    shutil.rmtree(root / "2")
    (root / "5/r.txt").unlink()
    opened.clear()
    assert len(studies(root)) == 4 and opened == []
    # Other settings, another key: other readings.
    studies(root, modalities=["DX"])
    assert len(opened) == 5
    monkeypatch.setenv("MEDXRAY_KEY", KEY + "!")
    assert not {study["study_id"] for study in studies(root)} & {study["study_id"] for study in before}


def test_the_index_is_read_anew_where_it_is_damaged_or_cannot_be_kept(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    visits(root, {"1": "20200101"})
    before = studies(root)
    (index,) = (cache / "dicom-folder").iterdir()
    index.write_bytes(index.read_bytes()[:100])
    assert studies(root) == before
    (tmp_path / "file").touch()
    monkeypatch.setenv("MEDXRAY_CACHE", str(tmp_path / "file" / "below"))
    assert studies(root) == before


def test_a_moved_tree_has_the_same_studies(tmp_path: Path) -> None:
    visits(tmp_path / "a", {"1": "20200101", "2": "20210101"})
    before = studies(tmp_path / "a")
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert studies(tmp_path / "b") == before


@pytest.mark.parametrize("threads", [1, 8])
def test_results_are_those_of_one_thread(threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medxray.data.readers.dicom_folder._THREADS", threads)
    for patient in range(8):
        visits(tmp_path, {f"{patient}{i}": f"202{i}0101" for i in range(3)}, patient=str(patient))
    found = studies(tmp_path)
    assert [study["study_id"] for study in found] == [study["study_id"] for study in studies(tmp_path)]
    assert len(found) == 24


def test_a_folder_is_known_as_one_of_dicom_files_where_nothing_else_is(tmp_path: Path) -> None:
    from medxray.data.inspection import reader_of

    dicom(tmp_path / "x.dcm", PatientID="1")
    assert reader_of(tmp_path) == "dicom-folder"
    (tmp_path / "studies.csv").write_text("path,study_id,report\nx.dcm,s,Clear.\n")
    assert reader_of(tmp_path) == "csv"


def test_messages_of_settings() -> None:
    check: Callable[..., Any] = READERS.settings_of("dicom-folder")
    with pytest.raises(ValueError, match="leave_out"):
        check(name="dicom-folder", root=".", leave_out=["raw"])
