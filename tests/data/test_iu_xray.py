"""The Open-i collection as it is published: a folder of XML reports beside a folder of images."""

import shutil
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from medxray.data import load_studies
from medxray.data.readers import READERS, split_of
from medxray.data.readers.csv import read_table
from medxray.data.readers.iu_xray import IUXRay
from medxray.spec import DataSpec
from medxray.types import DataError, Study

XML = """<?xml version="1.0" encoding="utf-8"?>
<eCitation>
   <meta type="rr"/>
   <uId id="CXR{n}"/>
   <IUXRId id="{n}"/>
   <MedlineCitation Owner="Indiana University" Status="supplied by publisher">
      <Article PubModel="Electronic">
         <Abstract>
            <AbstractText Label="COMPARISON">None.</AbstractText>
            <AbstractText Label="INDICATION">Why {n} &amp; more</AbstractText>
            <AbstractText Label="FINDINGS">{findings}</AbstractText>
            <AbstractText Label="IMPRESSION">Impression {n}.</AbstractText>
         </Abstract>
      </Article>
   </MedlineCitation>
   <MeSH>
{tags}
   </MeSH>
{images}
</eCitation>
"""


def xml(n: int, findings: str, tags: list[tuple[str, str]], images: list[str]) -> str:
    return XML.format(
        n=n,
        findings=findings,
        tags="\n".join(f"      <{kind}>{tag}</{kind}>" for kind, tag in tags),
        images="\n".join(
            f'   <parentImage id="{image}">\n      <figureId>F1</figureId>\n      <caption>PA and lateral</caption>\n'
            f'      <panel type="single"><url>/hadoop/storage/radiology/extract/{image}.jpg</url></panel>\n   </parentImage>'
            for image in images
        ),
    )


def write(root: Path, phantom: Path, reports: str = "ecgen-radiology", images: str = "NLMCXR_png") -> Path:
    """44 reports: 21 normal, 20 with a large heart, one unread, one without findings, one without an image."""
    (root / reports).mkdir(parents=True, exist_ok=True)
    (root / images).mkdir(parents=True, exist_ok=True)
    drawn = sorted((phantom / "images").iterdir())
    for n in range(1, 45):
        tags = [("major", "normal")]
        if n > 21:
            tags = [("major", "Cardiomegaly/borderline"), ("major", "Cardiomegaly/mild"), ("automatic", "cardiomegaly")]
        if n == 42:
            tags = [("major", "No Indexing")]
        names = [f"CXR{n}_1_IM-{n:04}-3001", f"CXR{n}_1_IM-{n:04}-4001"] if n < 44 else []
        (root / reports / f"{n}.xml").write_text(xml(n, "" if n == 43 else f"Findings {n}.", tags, names))
        for k, name in enumerate(names):
            shutil.copy(drawn[(2 * n + k) % len(drawn)], root / images / f"{name}.png")
    return root


def by_id(studies: Iterable[Study]) -> dict[str, Study]:
    return {study["study_id"]: study for study in studies}


def settings(root: Path, **more: Any) -> Any:
    return READERS.settings_of("iu-xray")(name="iu-xray", root=str(root), **more)


def test_open_i(tmp_path: Path, phantom: Path) -> None:
    root = write(tmp_path, phantom)
    studies = by_id(IUXRay(root).read())
    assert list(studies) == [f"CXR{n}" for n in range(1, 44)], "in the order of numbers; one has no image"
    one = studies["CXR1"]
    assert one["images"] == ["NLMCXR_png/CXR1_1_IM-0001-3001.png", "NLMCXR_png/CXR1_1_IM-0001-4001.png"]
    assert one["views"] == ["unknown", "unknown"], "the reports do not tell which is which"
    assert one["patient_id"] == "CXR1" and one["split"] == split_of("CXR1")
    assert one["findings"] == one["report"] == "Findings 1." and one["impression"] == "Impression 1."
    assert one["indication"] == "Why 1 & more"
    few = by_id(IUXRay(root, least_studies=5).read())
    assert few["CXR1"]["labels"] == {"Cardiomegaly": 0, "No Finding": 1}
    assert few["CXR30"]["labels"] == {"Cardiomegaly": 1, "No Finding": 0}
    assert set(few["CXR42"]["labels"].values()) == {None}, "nobody entered tags"
    automatic = by_id(IUXRay(root, least_studies=5, tags="automatic").read())
    assert automatic["CXR30"]["labels"] == {"No Finding": 0, "cardiomegaly": 1}
    assert automatic["CXR1"]["labels"] == {"No Finding": 1, "cardiomegaly": 0}


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ("findings", "Findings 7."),
        ("impression", "Impression 7."),
        ("findings+impression", "Findings 7. Impression 7."),
    ],
)
def test_what_is_learned_of_a_report(tmp_path: Path, phantom: Path, part: Any, text: str) -> None:
    root = write(tmp_path, phantom)
    studies = by_id(IUXRay(root, report=part).read())
    assert studies["CXR7"]["report"] == text
    dropped = by_id(IUXRay(root, report=part, without_report="drop").read())
    assert ("CXR43" in dropped) == (part != "findings") and "CXR43" in studies


def test_views_from_the_public_table_beside_it(tmp_path: Path, phantom: Path) -> None:
    root = write(tmp_path, phantom)
    (root / "indiana_projections.csv").write_text(
        "uid,filename,projection\n1,1_IM-0001-4001.dcm.png,Frontal\n1,1_IM-0001-3001.dcm.png,Lateral\n"
    )
    studies = by_id(IUXRay(root).read())
    assert studies["CXR1"]["views"] == ["PA", "LL"]
    assert studies["CXR1"]["images"][0] == "NLMCXR_png/CXR1_1_IM-0001-4001.png", "frontal first"
    assert studies["CXR2"]["views"] == ["unknown", "unknown"]


@pytest.mark.parametrize(
    ("reports", "images"),
    [
        ("NLMCXR_reports/ecgen-radiology", "NLMCXR_png"),
        (".", "."),
        ("ecgen-radiology", "images"),
        ("ecgen-radiology", "."),
    ],
)
def test_folders_as_they_were_unpacked(tmp_path: Path, phantom: Path, reports: str, images: str) -> None:
    root = write(tmp_path, phantom, reports, images)
    studies = list(IUXRay(root).read())
    assert len(studies) == 43 and all((root / image).is_file() for study in studies for image in study["images"])


def test_reports_still_packed(tmp_path: Path, phantom: Path) -> None:
    root = write(tmp_path, phantom)
    before = list(IUXRay(root).read())
    with tarfile.open(root / "NLMCXR_reports.tgz", "w:gz") as tar:
        tar.add(root / "ecgen-radiology", "ecgen-radiology")
    shutil.rmtree(root / "ecgen-radiology")
    assert list(IUXRay(root).read()) == before
    (root / "NLMCXR_reports.tgz").write_bytes((root / "NLMCXR_reports.tgz").read_bytes()[:200])
    with pytest.raises(DataError, match=r"NLMCXR_reports.tgz: .*fetch it again"):
        list(IUXRay(root).read())


def test_from_a_spec_to_decoded_studies(tmp_path: Path, phantom: Path) -> None:
    reader = settings(write(tmp_path, phantom), without_report="drop")
    found = load_studies(DataSpec(reader=reader, on_error="skip"), reports=True)
    assert found.skipped == [] and sum(map(len, found.splits.values())) == 42


def test_mistakes_are_named(tmp_path: Path, phantom: Path) -> None:
    root = write(tmp_path, phantom)
    path = root / "ecgen-radiology" / "7.xml"
    text = path.read_text()
    path.write_text(text[:300])
    with pytest.raises(DataError, match=r"7.xml, line \d+: not XML .*fetch"):
        list(IUXRay(root).read())
    path.write_text(text.replace('<uId id="CXR7"/>', ""))
    with pytest.raises(DataError, match=r"7.xml: no uId"):
        list(IUXRay(root).read())
    path.write_text(text.replace("CXR7_1_IM-0007-3001", "../../x"))
    with pytest.raises(DataError, match=r"7.xml: image .*outside data.reader.root"):
        list(IUXRay(root).read())
    path.write_text(text)
    shutil.copy(path, root / "ecgen-radiology" / "107.xml")
    with pytest.raises(DataError, match=r"107.xml: report 'CXR7' stands in .*/7.xml as well"):
        list(IUXRay(root).read())
    with pytest.raises(DataError, match=r"annotation.json.*indiana_reports.csv.*ecgen-radiology"):
        list(IUXRay(tmp_path / "none").read())


def test_entities_do_not_explode(tmp_path: Path, phantom: Path) -> None:
    root = write(tmp_path, phantom)
    bomb = '<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "aaaaaaaaaa">' + "".join(
        f'<!ENTITY {chr(98 + i)} "{(f"&{chr(97 + i)};") * 10}">' for i in range(9)
    )
    (root / "ecgen-radiology" / "7.xml").write_text(bomb + "]><eCitation><uId id='CXR7'/>&j;</eCitation>")
    with pytest.raises(DataError, match=r"7.xml"):
        list(IUXRay(root).read())


def test_real_reports(shared: Path, tmp_path: Path, phantom: Path) -> None:
    """The collection's own XML says what its public tables say."""
    source = shared / "data" / "openi_xml"
    drawn = next((phantom / "images").iterdir())
    shutil.copytree(source, tmp_path / "ecgen-radiology")
    (tmp_path / "images").mkdir()
    names = {
        "CXR1": ["CXR1_1_IM-0001-3001", "CXR1_1_IM-0001-4001"],
        "CXR2084": [f"CXR2084_IM-0715-{series}-{number}" for series in (1001, 2001) for number in ("0001", "0002")],
    }
    for name in (name for own in names.values() for name in own):
        shutil.copy(drawn, tmp_path / "images" / f"{name}.png")
    studies = by_id(IUXRay(tmp_path, least_studies=1).read())
    assert len(studies) == 12
    for study, own in names.items():
        assert studies[study]["images"] == [f"images/{name}.png" for name in own]
    table = read_table(shared / "data" / "iu_xray" / "reports.csv")
    rows = {name: row for row, name in enumerate(table["study_id"])}
    compared = 0
    for name, study in studies.items():
        if name in rows:
            row = rows[name]
            for section in ("findings", "impression", "indication"):
                assert study[section].split() == table[section][row].split(), (name, section)  # type: ignore[literal-required]
            own = {"No Finding" if tag == "normal" else tag for tag in table["problems"][row].split(";")}
            assert {label for label, value in study["labels"].items() if value} <= own
            compared += 1
    assert compared >= 8


def test_a_report_that_is_missing_tells_how_to_do_without(shared: Path) -> None:
    root = shared / "data" / "iu_xray_public_layout"
    with pytest.raises(DataError, match=r"report is empty .* set data\.reader\.without_report: drop, or set data\.on_error"):
        load_studies(DataSpec(reader=settings(root)), reports=True)
