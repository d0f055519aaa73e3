import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import medxray.data.phantom as phantom
from medxray.data.phantom import FINDINGS, Finding, draw_study, generate, split_of
from medxray.data.phantom_drawing import Anatomy, draw_view
from medxray.data.text import clean
from medxray.metrics.clinical import label_report
from medxray.types import MedxrayError

SIZE = 128


def _contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate(tmp_path_factory.mktemp("phantom") / "set", 36, SIZE, seed=2, workers=2, progress=False)


@pytest.fixture(scope="module")
def texts() -> list[phantom.PhantomStudy]:
    """2,000 studies without their images."""
    with pytest.MonkeyPatch.context() as patch:
        blank = np.zeros((1, 1), np.uint16)
        patch.setattr(phantom, "draw_view", lambda *_: (blank, blank > 0, blank > 0))
        return [draw_study(7, index, SIZE) for index in range(2000)]


def test_same_seed_gives_the_same_bytes_whatever_the_workers(folder: Path, tmp_path: Path) -> None:
    again = generate(tmp_path / "again", 36, SIZE, seed=2, workers=1, progress=False)
    assert _contents(again) == _contents(folder)
    other = generate(tmp_path / "other", 2, SIZE, seed=3, workers=1, progress=False)
    assert _contents(other)["images/S000000_PA.png"] != _contents(folder)["images/S000000_PA.png"]


def test_study_does_not_depend_on_the_others() -> None:
    late, early = draw_study(2, 20, 64), draw_study(2, 3, 64)
    assert np.array_equal(draw_study(2, 20, 64).images[0], late.images[0])
    assert late.patient_id != early.patient_id
    assert late.images[0].dtype == np.uint16 and late.images[0].max() <= 4095


def test_table_and_files(folder: Path) -> None:
    rows = list(csv.DictReader((folder / "studies.csv").open(encoding="utf-8")))
    assert {f"{folder / row[key]}" for row in rows for key in ("path", "thorax_mask", "lung_mask")} == {
        str(path) for kind in ("images", "masks") for path in (folder / kind).iterdir()
    }
    for row in rows[:12]:
        index = int(row["study_id"][1:])
        study = draw_study(2, index, SIZE)
        k = study.views.index(row["view"])
        with Image.open(folder / row["path"]) as image:
            assert np.array_equal(np.asarray(image), study.images[k] >> 4)
        with Image.open(folder / row["lung_mask"]) as mask:
            assert np.array_equal(np.asarray(mask) > 0, study.lung_masks[k])
        assert {name: int(row[name]) for name in FINDINGS} == study.labels
        assert (row["findings"], row["sex"], int(row["age"])) == (study.findings, study.sex, study.age)
    record = json.loads((folder / "phantom.json").read_text())
    assert record["counts"]["images"] == len(rows)
    assert sum(record["counts"]["splits"].values()) == 36


def test_patients_stay_in_one_split(texts: list[phantom.PhantomStudy]) -> None:
    visits: dict[str, list[int]] = {}
    for study in texts:
        visits.setdefault(study.patient_id, []).append(int(study.study_id[1:]))
    # all but the cut last block have their one to three visits, side by side
    assert {len(numbers) for numbers in visits.values()} == {1, 2, 3}
    assert all(numbers == list(range(numbers[0], numbers[0] + len(numbers))) for numbers in visits.values())
    shares = Counter(split_of(7, patient) for patient in range(1000))
    assert shares == {"train": 700, "val": 100, "test": 200}


def test_split_is_the_patients(folder: Path) -> None:
    splits: dict[str, set[str]] = {}
    for row in csv.DictReader((folder / "studies.csv").open(encoding="utf-8")):
        splits.setdefault(row["patient_id"], set()).add(row["split"])
    assert all(len(found) == 1 for found in splits.values())
    assert set.union(*splits.values()) == {"train", "val", "test"}


def test_prevalences(texts: list[phantom.PhantomStudy]) -> None:
    for name in FINDINGS:
        assert 0.10 <= np.mean([study.labels[name] != 0 for study in texts]) <= 0.20, name
    assert 0.31 <= np.mean([not study.details for study in texts]) <= 0.40
    assert max(len(study.details) for study in texts) == 3
    doubtful = Counter(name for study in texts for name, value in study.labels.items() if value == -1)
    assert set(FINDINGS) - set(doubtful) == {"Pacemaker", "Central Line", "Tube"}


def test_reports_are_short_and_varied(texts: list[phantom.PhantomStudy]) -> None:
    words = [len(study.findings.split()) for study in texts]
    assert np.percentile(words, 5) >= 20 and np.percentile(words, 95) <= 62
    vocabulary = {word for study in texts for word in clean(f"{study.findings} {study.impression}", "r2gen-iu").split()}
    assert len(vocabulary) <= 250 and "xxxx" in vocabulary
    assert len({study.findings for study in texts}) > 0.9 * len(texts)


@pytest.mark.parametrize("rule", ["none", "r2gen-iu"])
def test_report_says_what_the_labels_say(texts: list[phantom.PhantomStudy], rule: str) -> None:
    for study in texts:
        text = clean(study.findings, rule)
        assert dict.fromkeys(FINDINGS, 0) | label_report(text) == study.labels, text


def test_report_gives_side_and_degree(texts: list[phantom.PhantomStudy]) -> None:
    words = {"small": "small|mild", "moderate": "moderate", "large": "large|severe|marked"}
    for study in texts:
        for finding in study.details:
            text = study.findings.lower()
            assert finding.side == "none" or finding.side in text or "bibasilar" in text
            if finding.degree != "none":
                assert any(word in text for word in words[finding.degree].split("|")), (finding, text)


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        (
            "No pleural effusion, pneumothorax, or focal consolidation.",
            {"Effusion": 0, "Pneumothorax": 0, "Consolidation": 0},
        ),
        ("no pneumothorax but there is a small left effusion .", {"Pneumothorax": 0, "Effusion": 1}),
        ("Heart size is normal. Lungs are clear.", {"Cardiomegaly": 0}),
        ("The heart is not enlarged.", {"Cardiomegaly": 0}),
        ("Stable mild cardiomegaly with bibasilar atelectasis.", {"Cardiomegaly": 1, "Atelectasis": 1}),
        ("A nodule cannot be excluded. Possible edema.", {"Nodule": -1, "Edema": -1}),
        ("There is no opacity to suggest pneumonia.", {"Consolidation": 0}),
        ("The endotracheal tube has been removed.", {"Tube": 0}),
        ("The XXXX are intact.", {}),
    ],
)
def test_label_report(text: str, labels: dict[str, int]) -> None:
    assert label_report(text) == labels


def test_label_report_agrees_with_people(shared_reports: list[dict[str, str]]) -> None:
    """Findings that readers tagged in real reports are found by the rules."""
    tags = {"Cardiomegaly": "cardiomegaly", "Effusion": "pleural effusion", "Atelectasis": "atelectasis"}
    for name, tag in tags.items():
        tagged = np.array([tag in row["problems"].lower() or tag in row["mesh"].lower() for row in shared_reports])
        read = [label_report(f"{row['findings']} {row['impression']}").get(name, 0) != 0 for row in shared_reports]
        assert np.mean(np.array(read)[tagged]) > 0.9, name


@pytest.fixture
def shared_reports() -> list[dict[str, str]]:
    import os

    shared = Path(os.environ.get("MEDXRAY_SHARED", Path(__file__).parents[3] / "shared"))
    table = shared / "data" / "iu_xray" / "reports.csv"
    if not table.is_file():
        pytest.skip(f"needs the real reports in {table}")
    with table.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("index", range(8))
def test_masks_are_plausible(index: int) -> None:
    study = draw_study(4, index, SIZE, views=("PA", "AP", "LL"))
    for view, thorax, lung in zip(study.views, study.thorax_masks, study.lung_masks, strict=True):
        assert not (lung & ~thorax).any()
        assert 0.2 < thorax.mean() < 0.8 and 0.1 < lung.mean() < 0.6, view
    # air is dark, bone and belly bright
    image, lung = study.images[0], study.lung_masks[0]
    ring = slice(SIZE // 4, -SIZE // 4)
    assert np.median(image[lung]) < np.median(image[ring, ring][~lung[ring, ring]])
    assert image[lung].std() > 200 and image[lung].mean() < 2600


# where a finding must show in a PA view: a box (rows, columns) as shares of the image, and whether it brightens
_SHOWN = {
    "Cardiomegaly": (Finding("Cardiomegaly", "none", "none", "moderate", False), (0.45, 0.8, 0.6, 0.85), 1),
    "Effusion": (Finding("Effusion", "left", "base", "moderate", False), (0.55, 0.9, 0.6, 0.95), 1),
    "Pneumothorax": (Finding("Pneumothorax", "right", "apex", "large", False), (0.08, 0.8, 0.05, 0.48), -1),
    "Consolidation": (
        Finding("Consolidation", "right", "upper", "moderate", False),
        (0.15, 0.55, 0.1, 0.5),
        1,
    ),
    "Atelectasis": (Finding("Atelectasis", "left", "base", "moderate", False), (0.4, 0.85, 0.5, 0.95), 1),
    "Edema": (Finding("Edema", "bilateral", "none", "moderate", False), (0.3, 0.75, 0.1, 0.9), 1),
    "Nodule": (Finding("Nodule", "left", "mid", "moderate", False), (0.3, 0.65, 0.55, 0.95), 1),
    "Fracture": (Finding("Fracture", "left", "mid", "moderate", False), (0.2, 0.8, 0.5, 1.0), 1),
    "Pacemaker": (Finding("Pacemaker", "left", "none", "none", False), (0.1, 0.5, 0.6, 1.0), 1),
    "Central Line": (Finding("Central Line", "right", "jugular", "none", False), (0.0, 0.5, 0.3, 0.55), 1),
    "Tube": (Finding("Tube", "none", "good", "none", False), (0.0, 0.4, 0.4, 0.6), 1),
}


@pytest.mark.parametrize("name", FINDINGS)
def test_finding_shows_where_it_should(name: str) -> None:
    finding, (top, bottom, left, right), sign = _SHOWN[name]
    for patient in range(3):
        anatomy = Anatomy.sample(patient, 50, patient == 1)
        image, _, lung = draw_view(anatomy, "PA", (finding,), (9, patient), SIZE)
        bare, _, _ = draw_view(anatomy, "PA", (finding,), (9, patient), SIZE, without=(name,))
        plain, _, _ = draw_view(anatomy, "PA", (), (9, patient), SIZE)
        assert np.array_equal(bare, plain)
        box = np.zeros_like(lung)
        box[int(top * SIZE) : int(bottom * SIZE), int(left * SIZE) : int(right * SIZE)] = True
        change = sign * (image.astype(int) - bare.astype(int))
        strong = change > 350
        assert strong[box].sum() >= 12, "too faint to be learned"
        assert strong[box].sum() > 1.5 * strong[~box].sum(), "elsewhere than where it was put"
        lateral, _, _ = draw_view(anatomy, "LL", (finding,), (9, patient), SIZE)
        without, _, _ = draw_view(anatomy, "LL", (finding,), (9, patient), SIZE, without=(name,))
        assert (abs(lateral.astype(int) - without.astype(int)) > 100).sum() > 8


def test_without_leaves_report_and_labels() -> None:
    index = next(i for i in range(50) if draw_study(0, i, 32).details)
    whole = draw_study(0, index, 64)
    bare = draw_study(0, index, 64, without=[finding.name for finding in whole.details])
    assert (bare.labels, bare.findings) == (whole.labels, whole.findings)
    assert not np.array_equal(bare.images[0], whole.images[0])


def test_dicom_reads_back(tmp_path: Path) -> None:
    from pydicom import dcmread

    root = generate(tmp_path / "set", 9, 64, seed=5, format="dicom", workers=1, progress=False)
    kinds, studies = set(), {}
    for row in csv.DictReader((root / "studies.csv").open(encoding="utf-8")):
        data = dcmread(root / row["path"])
        study = draw_study(5, int(row["study_id"][1:]), 64)
        source = study.images[study.views.index(row["view"])]
        inverse = data.PhotometricInterpretation == "MONOCHROME1"
        assert np.array_equal(4095 - data.pixel_array if inverse else data.pixel_array, source)
        assert (data.BitsAllocated, data.BitsStored, data.HighBit) == (16, 12, 11)
        assert (data.ViewPosition, data.PatientID) == (row["view"], row["patient_id"])
        assert not data.StudyDate
        kinds.add(data.PhotometricInterpretation)
        studies.setdefault(row["study_id"], set()).add(data.StudyInstanceUID)
    assert kinds == {"MONOCHROME1", "MONOCHROME2"}
    assert all(len(uids) == 1 for uids in studies.values())
    assert len(set.union(*studies.values())) == len(studies)


def test_png16_keeps_all_bits(tmp_path: Path) -> None:
    root = generate(tmp_path / "set", 1, 64, format="png16", workers=1, progress=False)
    with Image.open(root / "images" / "S000000_PA.png") as image:
        assert np.array_equal(np.asarray(image) // 16, draw_study(0, 0, 64).images[0])


def test_set_that_is_there_is_kept_and_another_is_refused(folder: Path, tmp_path: Path) -> None:
    table = folder / "studies.csv"
    before = table.stat().st_mtime_ns
    assert generate(folder, 36, SIZE, seed=2, progress=False) == folder
    assert table.stat().st_mtime_ns == before
    with pytest.raises(MedxrayError, match=r"studies is 36, asked for 40.*delete this one"):
        generate(folder, 40, SIZE, seed=2, progress=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("keep")
    with pytest.raises(MedxrayError, match="name another folder"):
        generate(tmp_path / "mine", 2, SIZE, progress=False)
    assert (tmp_path / "mine" / "thesis.txt").exists()
    with pytest.raises(MedxrayError, match="format"):
        generate(tmp_path / "new", 2, SIZE, format="jpeg", progress=False)  # type: ignore[arg-type]


def test_nothing_is_left_of_a_set_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(phantom, "_counts", fail)
    with pytest.raises(OSError, match="disk full"):
        generate(tmp_path / "set", 2, 64, workers=1, progress=False)
    assert list(tmp_path.iterdir()) == []
