"""Names of the headers' patients, studies and files lead back to nobody, and nothing that a header tells gets out."""

import csv
import io
import json
import logging
import os
import re
import shutil
import stat
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pydicom
import pytest
from pyarrow import parquet
from pydicom.datadict import DicomDictionary
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset

import medxray
from medxray.cli import main
from medxray.data.phantom import FINDINGS, generate
from medxray.data.privacy import Names, find_key
from medxray.types import DataError, RunError

# Names and the key


def test_names_follow_from_the_key_alone() -> None:
    names = Names(b"k" * 32)
    assert names("patient", "1") == Names(b"k" * 32)("patient", "1")
    given = [
        names("patient", "1"), names("study", "1"), names("patient", "1", ""), names("patient", "", "1"), names("patient"),
        names("patient", "a", "bc"), names("patient", "ab", "c"), Names(b"l" * 32)("patient", "1"), names.mark,
    ]  # fmt: skip
    assert len(set(given)) == len(given)
    assert all(re.fullmatch("[0-9a-f]{24}", name) for name in given)
    assert names("patient", "Müller\udcff") != names("patient", "Müller")
    # printf 7:patient3:0078:hospital | openssl dgst -sha256 -hmac 00000000000000000000000000000000
    assert Names(b"0" * 32)("patient", "007", "hospital") == "ed5af27c7ee37905b0f8da0e"


def test_the_users_own_key_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEDXRAY_KEY", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home/data"))
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(find_key())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1 and len(found) == 8 and len(found[0]) == 64
    key = tmp_path / "home/data/medxray/key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600 and stat.S_IMODE(key.parent.stat().st_mode) == 0o700
    assert [path.name for path in key.parent.iterdir()] == ["key"]
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "other"))
    assert find_key() != found[0]


def test_where_the_key_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("MEDXRAY_KEY", " of the environment ")
    assert find_key() == b"of the environment"
    file = tmp_path / "key"
    file.write_bytes(b"of a file, long enough\n")
    file.chmod(0o600)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find_key(file) == b"of a file, long enough"
    file.chmod(0o644)
    with pytest.warns(UserWarning, match="can be read by others.*chmod 600"):
        find_key(file)
    assert not (tmp_path / "data").exists()
    file.write_text("short")
    with pytest.warns(UserWarning), pytest.raises(DataError, match="a key of 5 bytes, which can be guessed"):
        find_key(file)
    with pytest.raises(DataError, match=r"data.reader.key_file: .*gone cannot be read .*openssl rand"):
        find_key(tmp_path / "gone")
    monkeypatch.setenv("MEDXRAY_KEY", "short")
    with pytest.raises(DataError, match="MEDXRAY_KEY: a key of 5 bytes") as error:
        find_key()
    assert "short" not in str(error.value)
    monkeypatch.setenv("MEDXRAY_KEY", str(file))
    with pytest.raises(DataError, match="MEDXRAY_KEY holds the path of a file"):
        find_key()
    monkeypatch.delenv("MEDXRAY_KEY")
    (tmp_path / "data").write_text("no folder")
    with pytest.raises(DataError, match=r"no key can be kept there .*data.reader.key_file"):
        find_key()


# Sentinels in every header, and where they are looked for

LEAKS = re.compile(
    # Texts, UIDs, dates in any form, moments, times.
    rb"ZQXSENT|9876543|(?<![0-9a-f.])17\d\d[-/.]?11[-/.]?07(?![0-9a-f])|(?<![0-9a-f.])17\d\d1107071107|"
    rb"(?<![0-9a-f])07:?11:?07[.,]110711",
    re.IGNORECASE,
)
KEPT = {"SpecificCharacterSet", "SOPClassUID"}


def sentinel(kind: str, n: int, visit: int = 0) -> Any:
    """A value of a VR that gives itself away."""
    day = f"17{visit:02d}1107"
    return {
        "UI": f"1.2.826.0.9876543.{n}", "DA": day, "TM": "071107.110711", "DT": f"{day}071107.110711",
        "UN": f"ZQXSENT{n}".encode(), "PN": f"ZQXSENT{n}^Person", "UR": f"http://ZQXSENT{n}",
    }.get(kind, f"ZQXSENT{n:07d}")  # fmt: skip


def plant(data: Dataset, patient: int, study: int, image: int) -> None:
    """Fills every element of a header that may identify someone, the standard's and private ones."""
    for number, (tag, (kind, *_, keyword)) in enumerate(DicomDictionary.items()):
        group = tag >> 16
        planted = kind in ("PN", "LO", "SH", "DA", "TM", "DT", "UI", "UN", "ST", "LT", "UT", "UC", "AE", "UR")
        if planted and keyword not in KEPT and (group in range(8, 0x28) or group in (0x32, 0x38, 0x40, 0x88, 0x4008)):
            data.add(DataElement(tag, kind, sentinel(kind, 1000 + number, visit=study)))
    data.PatientID, data.IssuerOfPatientID = f"ZQXSENT{patient}", "ZQXSENT issuer"
    data.StudyInstanceUID, data.AccessionNumber = f"1.2.826.0.9876543.1.{study}", f"ZQXSENT A{study}"
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = f"1.2.826.0.9876543.2.{image}"
    below = Dataset()
    below.RequestedProcedureID, below.PatientName, below.PatientBirthDate = "ZQXSENT req", "ZQXSENT^Below", "17991107"
    data.RequestAttributesSequence = data.OtherPatientIDsSequence = [below]
    block = data.private_block(0x0011, "ZQXSENT CREATOR", create=True)
    block.add_new(1, "LO", "ZQXSENT private")
    block.add_new(2, "UN", b"ZQXSENT unknown")
    block.add_new(3, "SQ", [below])
    data.file_meta.SourceApplicationEntityTitle = "ZQXSENT SOURCE"
    data.file_meta.ImplementationVersionName = "ZQXSENT VERSION"
    data.preamble = b"ZQXSENT preamble".ljust(128, b"\0")


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phantoms as a hospital's archive: identifiers everywhere, in paths too; reports and splits in a table, one of them
    in a structured report."""
    drawn = generate(tmp_path_factory.mktemp("drawn") / "data", 24, 64, 5, "dicom", progress=False)
    root = tmp_path_factory.mktemp("hospital") / "root"
    with (drawn / "studies.csv").open(newline="") as file:
        images = list(csv.DictReader(file))
    lines: dict[str, dict[str, str]] = {}
    with pydicom.config.disable_value_validation():
        for i, row in enumerate(images):
            study, patient = int(row["study_id"][1:]), int(row["patient_id"][1:])
            data = pydicom.dcmread(drawn / row["path"])
            plant(data, patient, study, i)
            path = root / f"ZQXSENT Doe John {patient}" / f"1.2.826.0.9876543.1.{study}" / f"ZQXSENT{i:03d}"
            path.parent.mkdir(parents=True, exist_ok=True)
            data.save_as(path)
            lines[data.AccessionNumber] = {
                "accession": data.AccessionNumber, "report": f"FINDINGS: {row['findings']}\nIMPRESSION: {row['impression']}",
                "split": row["split"], **{name: row[name] for name in FINDINGS}, "ward": "ZQXSENT ward",
            }  # fmt: skip
    with (root / "reports.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(next(iter(lines.values()))))
        table.writeheader()
        table.writerows(lines.values())
    return root


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where everything that is written goes: the cache and the user's data too."""
    for variable, name in {"MEDXRAY_CACHE": "cache", "XDG_DATA_HOME": "data", "HOME": "home", "TMPDIR": "tmp"}.items():
        (tmp_path / name).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / name))
    monkeypatch.delenv("MEDXRAY_KEY", raising=False)
    return tmp_path


def texts_of(path: Path) -> Iterator[bytes]:
    """The bytes of a file, and those of a table once it is unpacked."""
    data = path.read_bytes()
    yield data
    table: arrow.Table | None = None
    if data[:4] == b"PAR1":
        table = parquet.read_table(io.BytesIO(data))
    elif data[:6] == b"ARROW1":
        table = arrow.ipc.open_file(io.BytesIO(data)).read_all()
    if table is not None:
        yield repr(table.schema).encode() + repr(table.schema.metadata).encode()
        for column in table.columns:
            yield repr(column.to_pylist()).encode()


def leaks(*folders: Path) -> list[str]:
    """Files below folders that hold a sentinel, or are named by one."""
    found = []
    for path in (path for folder in folders for path in sorted(folder.rglob("*"))):
        if LEAKS.search(path.name.encode()):
            found.append(f"{path}: its name")
        if path.is_file():
            hit = next((hit for text in texts_of(path) if (hit := LEAKS.search(text))), None)
            found += [f"{path}: {hit[0]!r}"] if hit else []
    return found


def spec(root: Path, output: Path, **changes: Any) -> dict[str, Any]:
    base = {
        "task": "report", "output": str(output),
        "data": {
            "image_size": 32, "cleaning": "r2gen-mimic",
            "reader": {"name": "dicom-folder", "root": str(root), "table": "reports.csv"},
        },
        "encoder": {"name": "vit", "width": 16, "depth": 1, "heads": 2, "patch": 16},
        "retriever": {"name": "nearest", "positives": 1, "negatives": 1},
        "decoder": {
            "name": "causal-lm", "trainable": True, "vocabulary": 200, "words": True, "prompt": "r2gengpt",
            "config": {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                       "num_attention_heads": 2},
        },
        "training": {"steps": 2, "batch_size": 4},
        "generation": {"max_new_tokens": 4},
        "metrics": ["bleu"],
    }  # fmt: skip
    data = {**base["data"], **changes.pop("data", {})}
    return {**base, **changes, "data": data}


def run(arguments: list[str]) -> int:
    """The command line in this process; its exit code."""
    before = sys.argv
    sys.argv = ["medxray", *arguments]
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = before
    return 0


class Heard:
    """All that is said: standard output and error, warnings, and the log down to its least."""

    def __init__(self, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
        self.capfd, self.caplog, self.text = capfd, caplog, ""
        caplog.set_level(logging.DEBUG)

    def __enter__(self) -> "Heard":
        self._recorder = warnings.catch_warnings(record=True)
        self._warnings = self._recorder.__enter__()
        warnings.simplefilter("always")
        return self

    def __exit__(self, *error: Any) -> None:
        self._recorder.__exit__(*error)
        out, err = self.capfd.readouterr()
        said = [str(warning.message) for warning in self._warnings or ()]
        self.text += "\n".join([out, err, *said, self.caplog.text])
        self.caplog.clear()
        assert not (found := LEAKS.search(self.text.encode())), self.text[max(0, found.start() - 300) : found.end() + 100]


@pytest.fixture
def heard(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Heard:
    return Heard(capfd, caplog)


def test_the_search_finds_what_is_there(hospital: Path, tmp_path: Path) -> None:
    images = [path for path in hospital.rglob("*") if path.is_file() and path.suffix == ""]
    assert len(images) > 30 and all(LEAKS.search(path.read_bytes()) for path in images)
    header = pydicom.dcmread(images[0], stop_before_pixels=True)
    assert sum(LEAKS.search(str(element.value).encode()) is not None for element in header) > 500
    for value in ("17031107", "1703-11-07", "071107.110711", "17031107071107.110711", "1.2.826.0.9876543.5"):
        assert LEAKS.search(f"at {value},".encode())
    assert not LEAKS.search(b"0.17031107 a17031107 17031107f")
    rows = arrow.table({"a": ["x" * 1000 + "ZQXSENT1" + "x" * 1000]})
    parquet.write_table(rows, tmp_path / "a.parquet", compression="zstd")
    with arrow.OSFile(str(tmp_path / "b.arrow"), "wb") as file, arrow.ipc.new_file(
        file, rows.schema, options=arrow.ipc.IpcWriteOptions(compression="zstd")
    ) as writer:
        writer.write_table(rows)
    (tmp_path / "ZQXSENT").mkdir()
    assert len(leaks(tmp_path)) == 3


def test_nothing_of_a_header_gets_out(hospital: Path, places: Path, heard: Heard) -> None:
    where = places / "run"
    with heard:
        pipeline = medxray.build(spec(hospital, where))
        pipeline.fit(progress=True)
        scores = pipeline.evaluate("val", ablations=False, progress=True)
        print(scores, scores.notes)
        print([row for split in pipeline.studies.splits.values() for row in split])
        image = next(path for path in hospital.rglob("ZQXSENT000"))
        shutil.copy(image, places / "tmp" / "chest.dcm")
        found = pipeline.predict([places / "tmp" / "chest.dcm", str(places / "tmp" / "chest.dcm")])
        print(found, found[0].study_id)
        assert found[0].study_id == "chest"
        pipeline.save(places / "saved", complete=True)
        pipeline.export(places / "exported")
        print(medxray.load(where).predict(str(places / "tmp" / "chest.dcm")))
        (places / "tmp" / "chest.dcm").unlink()
        for split in pipeline.studies.splits.values():
            split.to_parquet(places / f"{split.num_rows}.parquet")
    files = {path.name for path in where.rglob("*")}
    assert {"spec.yaml", "log.jsonl", "predictions.parquet", "report.html", "environment.json"} <= files
    assert "bank.arrow" in files
    assert leaks(places) == []
    # And it was no empty exercise: context, reports and patients are there.
    rows = parquet.read_table(where / "predictions.parquet").to_pylist()
    assert all(len(row["study_id"]) == 24 and len(row["context_positive"][0]) == 24 for row in rows)
    assert len({row for split in pipeline.studies.splits.values() for row in split["patient_id"]}) == 12


def test_nothing_gets_out_of_masked_images_and_their_contours(hospital: Path, places: Path, heard: Heard) -> None:
    root = places / "hospital"
    shutil.copytree(hospital, root)
    settings = spec(root, places / "run", task="pretrain", masker={"name": "contour"}, metrics=["reconstruction"])
    for section in ("retriever", "decoder", "generation"):
        del settings[section]
    with heard:
        pipeline = medxray.build(settings).fit(progress=True)
        pipeline.evaluate("val", progress=True)
        pipeline.pictures(folder=places / "pictures")
    assert (places / "run" / "regions.txt").is_file() and list((root / ".medxray").rglob("*.jsonl"))
    assert leaks(places / "run", places / "pictures", places / "cache", places / "data", root / ".medxray") == []


def test_nothing_gets_out_where_files_and_tables_are_wrong(hospital: Path, places: Path, heard: Heard) -> None:
    root = places / "hospital"
    shutil.copytree(hospital, root)
    images = sorted(path for path in root.rglob("ZQXSENT*") if path.is_file())
    by_study = {path.parent: path for path in images}
    cut, head, bits, odd = list(by_study.values())[:4]
    cut.write_bytes(cut.read_bytes()[:-2000])
    head.write_bytes(head.read_bytes()[:3000])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = pydicom.dcmread(bits)
        data.BitsAllocated = 13
        data.save_as(bits)
        data = pydicom.dcmread(odd)
        data.Modality, data.BodyPartExamined = "ZQXSENTMOD", "ZQXSENTPART"
        data.save_as(odd)
        data.SOPClassUID, data.Modality, data.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.88.11", "SR", "1.2.826.0.9876543.77"
        del data.PixelData
        data.save_as(odd.with_name("ZQXSENT SR"))
    shutil.copy(images[-1], root / "ZQXSENT twice")
    (root / "ZQXSENT notes.txt").write_text("ZQXSENT")
    # The command line, stopped by the first thing and told to pass over it.
    settings = spec(root, places / "run")
    text = json.dumps(settings)
    (places / "spec.yaml").write_text(text)
    with heard:
        assert run(["fit", str(places / "spec.yaml")]) == 2
    assert "files that cannot be read: 2" in heard.text and not (places / "run").exists()
    with heard:
        assert run(["fit", str(places / "spec.yaml"), "data.on_error=skip"]) == 0
        assert run(["evaluate", str(places / "run"), "--split", "val"]) == 0
    told = (places / "run" / "skipped.jsonl").read_text()
    for words in ("no DICOM file", "a modality that DICOM does not know", "damaged DICOM header", "damaged structured report",
                  "second file of one SOP Instance UID", "BitsAllocated"):  # fmt: skip
        assert words in told, words
    # Images that fail in the middle of a fit, and tables that are wrong.
    for path in (head, odd.with_name("ZQXSENT SR")):
        path.unlink()
    rows = (root / "reports.csv").read_text().splitlines(keepends=True)
    broken = {
        "BitsAllocated: 13": lambda: None,
        "in two splits": lambda: (root / "reports.csv").write_text(
            "accession,split\n" + "".join(f"ZQXSENT A{i},{('train', 'val', 'test')[i % 3]}\n" for i in range(24))
        ),
        "is none of 1, 0, -1": lambda: (root / "reports.csv").write_text(
            f"accession,{FINDINGS[0]}\n" + "".join(f"ZQXSENT A{i},{'ZQXSENT' if i == 9 else 1}\n" for i in range(24))
        ),
        "the split is none of": lambda: (root / "reports.csv").write_text("accession,split\nZQXSENT A9,ZQXSENT\n"),
        "of two patients": lambda: again(images[-1], PatientID="ZQXSENT other"),
        "none of 24 rows": lambda: (root / "reports.csv").write_text(
            rows[0] + "".join(row.replace("ZQXSENT A", "ZQXSENT B") for row in rows[1:])
        ) and again(images[-1], PatientID=pydicom.dcmread(images[-2]).PatientID),
    }  # fmt: skip

    def again(path: Path, **fields: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = pydicom.dcmread(path)
            for name, value in fields.items():
                setattr(data, name, value)
            data.save_as(path)

    for words, breaks in broken.items():
        breaks()
        heard.text = ""
        with heard:
            assert run(["fit", str(places / "spec.yaml"), f"output={places / 'other'}"]) == 2
        assert words in heard.text, (words, heard.text)
    assert leaks(*(places / name for name in ("run", "other", "cache", "data", "home"))) == []


def test_nothing_gets_into_shards_and_cards(hospital: Path, places: Path, heard: Heard) -> None:
    reader = [f"reader.root={hospital}", "reader.table=reports.csv"]
    with heard:
        assert run(["prepare", "dicom-folder", str(places / "shards"), *reader, "--size", "32", "--workers", "1"]) == 0
        card = ["--out", str(places / "card.html"), "--workers", "1"]
        # A maker's name is no identifier of a patient, and the card counts it; here it is a sentinel as all texts are.
        assert run(["inspect", "dicom-folder", *reader, *card]) == 0
    page = (places / "card.html").read_text()
    maker = sentinel("LO", 1000 + list(DicomDictionary).index(0x00080070))
    (places / "card.html").write_text(page.replace(maker, "maker"))
    assert leaks(places) == []


def test_a_run_is_of_one_key(hospital: Path, places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDXRAY_KEY", "the key of the fit, not of another")
    where = places / "run"
    medxray.build(spec(hospital, where)).fit(progress=False)
    assert len(medxray.load(where).studies.splits["val"])
    monkeypatch.setenv("MEDXRAY_KEY", "another key, that of a colleague")
    with pytest.raises(RunError, match=r"names of patients .* another key.*MEDXRAY_KEY"):
        medxray.load(where).evaluate("val")
    assert not any(b"key of the fit" in path.read_bytes() for path in where.rglob("*") if path.is_file())
    # Without a data set there is nothing to mix up.
    image = next(path for path in hospital.rglob("ZQXSENT000"))
    assert medxray.load(where).predict(image)
    monkeypatch.setenv("MEDXRAY_KEY", "the key of the fit, not of another")
    saved = medxray.load(where).save(places / "saved")
    monkeypatch.setenv("MEDXRAY_KEY", "another key, that of a colleague")
    with pytest.raises(RunError, match="another key"):
        medxray.load(saved).evaluate("val")
    assert os.path.isfile(saved / "environment.json")
