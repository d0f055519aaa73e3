"""No path leaves its root, whoever wrote it: tables, shards, archives, run folders, names of studies, uploads. Links, `..` and
absolute paths in tables are held against readers in tests/data/test_bad_layouts.py,"""

import contextlib
import csv
import gzip
import io
import json
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pytest
from PIL import Image
from pyarrow import parquet

import medxray
from medxray.data import load_studies, write_shards
from medxray.data.phantom import generate
from medxray.data.readers.iu_xray import _parsed
from medxray.data.readers.mimic_cxr import _from_archive, _from_folder
from medxray.metrics.radgraph import _unpacked
from medxray.outputs import Answer, as_text, write
from medxray.spec import DataSpec, Spec
from medxray.types import MedxrayError, Prediction, RunError, SpecError

HEADER = "path,study_id,patient_id,report,split,Edema\n"
OUTSIDE = r"outside data\.reader\.root"


def png(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16), dtype=np.uint8)).save(path)
    return path


def data(reader: str, root: Path, **settings: Any) -> DataSpec:
    return Spec.read("classify-phantom", {"data": {"reader": {"name": reader, "root": str(root), **settings}}}).data


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data set's folder with good.png, beside secret.png that is no part of it."""
    png(tmp_path / "data" / "good.png")
    png(tmp_path / "secret.png")
    return tmp_path / "data"


@pytest.fixture
def deep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The test's folder, with the working folder deep inside, so that what climbs out of that is seen."""
    folder = tmp_path / "a" / "b" / "c" / "d"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    return tmp_path


@contextlib.contextmanager
def writes_only_below(allowed: Path, whole: Path) -> Iterator[None]:
    """Holds what is done inside to writing, or deleting, below one folder of the whole."""

    def listed() -> set[tuple[Path, int, int]]:
        return {(p, p.lstat().st_size, p.lstat().st_mtime_ns) for p in whole.rglob("*") if p.is_symlink() or not p.is_dir()}

    before = listed()
    yield
    changed = {path for path, *_ in before ^ listed()}
    assert not [path for path in changed if not path.is_relative_to(allowed)]


# Tables


@pytest.mark.parametrize(
    "path",
    [
        "../secret.png", "x/../../secret.png", "/etc/hostname", "//etc/hostname", "file:///etc/hostname", "file://../secret.png",
        "http://127.0.0.1:9/x.png", r"\\host\share\x.png", r"..\secret.png", r"C:\x.png", "~/x.png", "$HOME/x.png",
        "%2e%2e/secret.png", "..%2fsecret.png", "..;/secret.png", "/proc/self/environ", "/dev/stdin", "good.png/../../secret.png",
        "...//secret.png", "\u2025/secret.png", "＼..＼secret.png", "good.png\r", "-", "|id", "`id`", "$(id)",
        "zip://a.zip!x.png", "data:image/png;base64,AAAA", "good.png::$DATA", "." , "",
    ],
)  # fmt: skip
def test_a_path_in_a_table_stays_inside_or_is_refused(path: str, root: Path) -> None:
    rows = "".join(f"good.png,s{i},p{i},Clear.,{'train' if i else 'val'},1\n" for i in range(3))
    (root / "studies.csv").write_text(HEADER + rows + f'"{path}",t,q,Clear.,train,0\n', newline="")
    with pytest.raises(MedxrayError, match=rf"{OUTSIDE}|missing|path|empty|no image|line 5"):
        load_studies(data("csv", root))


@pytest.mark.parametrize(
    "entry",
    ["../secret.png", "/etc/hostname", "file:///etc/hostname", r"\\host\share\x.png", "a\0.png", "link.png", "folder/secret.png"],
)
@pytest.mark.parametrize("kind", ["json", "parquet", "arrow", "iu-xray"])
def test_a_path_in_rows_of_other_kinds(entry: str, kind: str, root: Path) -> None:
    (root / "link.png").symlink_to(root.parent / "secret.png")
    (root / "folder").symlink_to(root.parent)
    rows = [
        {"image_path": "good.png" if i < 9 else entry, "study_id": f"s{i}", "patient_id": f"p{i}", "report": "Clear.",
         "split": "train" if i else "val"}
        for i in range(10)
    ]  # fmt: skip
    if kind == "iu-xray":
        (root / "images").symlink_to(".")
        told = {"id": "CXR1_IM-1", "report": "Clear.", "image_path": [entry], "split": "train"}
        (root / "annotation.json").write_text(json.dumps({"train": [told], "val": [], "test": []}))
    elif kind == "json":
        (root / "rows.json").write_text(json.dumps(rows))
    elif kind == "parquet":
        parquet.write_table(arrow.Table.from_pylist(rows), root / "rows.parquet")
    else:
        table = arrow.Table.from_pylist(rows)
        with arrow.OSFile(str(root / "rows.arrow"), "wb") as sink, arrow.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(MedxrayError, match=rf"{OUTSIDE}|zero byte|missing"):
        load_studies(data("iu-xray" if kind == "iu-xray" else "huggingface", root))


@pytest.mark.parametrize("pattern", ["../*.parquet", "/etc/*", "a/../../*.parquet", "link.parquet"])
@pytest.mark.parametrize("reader", ["parquet", "huggingface", "webdataset"])
def test_patterns_of_shards(pattern: str, reader: str, root: Path) -> None:
    parquet.write_table(arrow.table({"image": [b"x"]}), root.parent / "secret.parquet")
    (root / "a").mkdir()
    (root / "link.parquet").symlink_to(root.parent / "secret.parquet")
    with pytest.raises((MedxrayError, NotImplementedError), match=rf"{OUTSIDE}|pattern|matches|files"):
        load_studies(data(reader, root, files=pattern))


@pytest.mark.parametrize("file", ["../other/data-00000-of-00001.arrow", "ABSOLUTE", "link.arrow"])
def test_files_that_a_saved_data_set_names(file: str, root: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"image": [{"bytes": (root / "good.png").read_bytes(), "path": None}] * 6, "study_id": [f"s{i}" for i in range(6)],
            "split": ["train"] * 4 + ["val"] * 2}  # fmt: skip
    for name in ("own", "other"):
        datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).save_to_disk(tmp_path / name)
    other = tmp_path / "other" / "data-00000-of-00001.arrow"
    (tmp_path / "own" / "link.arrow").symlink_to(other)
    told = json.loads((tmp_path / "own" / "state.json").read_text())
    assert load_studies(data("huggingface", tmp_path / "own")).splits["train"]
    told["_data_files"] = [{"filename": str(other) if file == "ABSOLUTE" else file}]
    (tmp_path / "own" / "state.json").write_text(json.dumps(told))
    with pytest.raises(MedxrayError, match=OUTSIDE):
        load_studies(data("huggingface", tmp_path / "own"))


# Archives


def test_an_archives_members_are_read_where_they_lie(root: Path, deep: Path) -> None:
    with tarfile.open(root / "a.tar", "w") as tar:
        for i in range(6):
            told = {"study_id": f"s{i}", "patient_id": f"p{i}", "split": "train" if i < 4 else "val"}
            for name, content in ((f"{i}.png", (root / "good.png").read_bytes()), (f"{i}.json", json.dumps(told).encode())):
                member = tarfile.TarInfo(f"../../{name}" if i % 2 else f"/tmp/x/{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        for name, kind in (("link.png", tarfile.SYMTYPE), ("hard.png", tarfile.LNKTYPE), ("dev.png", tarfile.CHRTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "../../secret.png"
            tar.addfile(member)
    with writes_only_below(root, deep):
        found = load_studies(data("webdataset", root))
        assert sum(map(len, found.splits.values())) == 6, "links and devices are no images"
        for study in found.splits["train"]:
            assert found.reader.open(study["images"][0]) == (root / "good.png").read_bytes()
    with writes_only_below(deep / "out", deep):
        write_shards(data("webdataset", root), deep / "out", workers=1)


@pytest.mark.parametrize("bad", ["../x", "link", "device"])
def test_an_archive_that_is_unpacked(bad: str, deep: Path) -> None:
    own = deep / "radgraph"
    own.mkdir()
    with tarfile.open(own / "model.tar.gz", "w:gz") as tar:
        member = tarfile.TarInfo(bad)
        if bad == "link":
            member.type, member.linkname = tarfile.SYMTYPE, "../../../../secret"
        if bad == "device":
            member.type = tarfile.CHRTYPE
        tar.addfile(member, io.BytesIO(b""))
    with writes_only_below(deep / "none", deep), pytest.raises(MedxrayError, match="cannot be unpacked"), _unpacked(own):
        pass


def test_an_absolute_member_is_unpacked_inside(deep: Path) -> None:
    with tarfile.open(deep / "model.tar.gz", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo(str(deep / "x")), io.BytesIO(b""))
    with writes_only_below(deep / "none", deep), _unpacked(deep) as files:
        assert not files.is_relative_to(deep) and [path for path in files.rglob("x") if path.is_file()]


def test_links_in_an_archive_of_reports(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "NLMCXR_reports.tgz", "w:gz") as tar:
        member = tarfile.TarInfo("ecgen-radiology/1.xml")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(member)
    assert not list(_parsed(tmp_path / "NLMCXR_reports.tgz"))


@pytest.mark.parametrize(
    ("patient", "study"), [("../../../..", "1"), ("10", "/../../../secret"), ("10", "1\\..\\x"), ("1\0", "1")]
)
def test_names_of_patients_and_studies_are_no_paths(patient: str, study: str, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    folder = tmp_path / "files"
    for name in (f"p{patient[:2]}", "p10"):
        (folder / name.replace("\0", "") / "p../../..").mkdir(parents=True, exist_ok=True)
        (folder / name.replace("\0", "") / "p10" / "s").mkdir(parents=True, exist_ok=True)
    assert _from_folder(folder, patient, study) is None


def test_members_of_a_zip_are_found_by_name_and_never_unpacked(deep: Path) -> None:
    with zipfile.ZipFile(deep / "reports.zip", "w") as archive:
        archive.writestr("../../../s1.txt", "Clear.")
        archive.writestr("/etc/s2.txt", "Clear.")
    with writes_only_below(deep / "none", deep), zipfile.ZipFile(deep / "reports.zip") as archive:
        members = {Path(m.filename).stem: m for m in archive.infolist()}
        assert _from_archive(archive, members, "10", "1") == "Clear."


def test_a_table_that_unpacks_without_end_is_cut_off(root: Path) -> None:
    (root / "studies.csv.gz").write_bytes(gzip.compress(bytes(2**27), 9))
    with pytest.raises(MedxrayError, match="unpack to more than"):
        load_studies(data("csv", root))


# Run folders


@pytest.mark.parametrize("model", ["./../outside", "./a/../../outside", "./link"])
def test_what_a_run_folder_names_inside_lies_inside(
    model: str, small_run: Path, language_model: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(small_run, tmp_path / "run"))
    outside = shutil.copytree(language_model, tmp_path / "outside")
    (run / "link").symlink_to(outside)
    spec = Spec.read(run / "spec.yaml").to_dict()
    spec["decoder"] = {"name": "causal-lm", "model": model}
    (run / "spec.yaml").write_text(json.dumps(spec))
    with pytest.raises(RunError, match="leads out of the run folder"):
        medxray.load(run)


@pytest.mark.parametrize("name", ["..", ".", "../x", "/tmp/x", "a/b", ".hidden", "a\\b", "a\0b", "", "a\nb"])
def test_a_specs_name_is_the_name_of_a_folder(name: str, small_spec: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="name"):
        Spec.read({**small_spec, "name": name, "output": None})


def test_beginning_anew_deletes_run_folders_alone(small_spec: dict[str, Any], tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    (precious / "deep").mkdir(parents=True)
    (precious / "deep" / "file").write_text("kept")
    with pytest.raises(RunError, match="nothing in it was touched"):
        medxray.build({**small_spec, "output": str(precious)}).fit(fresh=True, progress=False)
    assert (precious / "deep" / "file").read_text() == "kept"


def test_links_in_a_run_folder_lead_no_deletion_out_of_it(small_spec: dict[str, Any], small_run: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("kept")
    run = Path(shutil.copytree(small_run, tmp_path / "run"))
    (run / "model.safetensors").unlink()
    (run / "spec.yaml").write_text(Spec.read({**small_spec, "output": str(run)}).to_yaml())
    for name in (".half", "step-00000000", ".step-00000000"):
        (run / "checkpoints" / name).symlink_to(precious)
    (run / ".small.123").symlink_to(precious)
    medxray.build({**small_spec, "output": str(run)}).fit(progress=False)
    assert (precious / "file").read_text() == "kept"


# What is written by the names of studies


NAMES = (
    "../../x", "..", ".", "", "/etc/x", "a/b/c", r"..\..\x", "a\0b", "x" * 300, "ä" * 300, "\U0001f4a9" * 100, "CON", "a:b", "~",
    "-rf", "*", ".bashrc", "a\nb", "$(id)", "%2e%2e%2fx",
)  # fmt: skip


def test_files_that_are_named_after_studies(deep: Path, radiograph: Callable[..., bytes]) -> None:
    pytest.importorskip("highdicom")
    answers = [Answer(Prediction(name, text="Clear."), [radiograph(i)]) for i, name in enumerate(NAMES)]
    with writes_only_below(deep / "out", deep):
        files = write(answers, "dicom-sr", deep / "out", model="m", data=DataSpec.model_construct(max_pixels=10**6))
    assert len(set(files)) == len(NAMES)
    assert all(file.parent == deep / "out" and file.is_file() and not file.name.startswith(".") for file in files)


def test_cells_that_a_spreadsheet_would_run_begin_with_an_apostrophe() -> None:
    said = ["=cmd|' /C calc'!A0", "+1", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "Clear.", "a=b"]
    text = as_text([Answer(Prediction(one, text=one), []) for one in said], "csv", "m")
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    for one, row in zip(said, rows, strict=True):
        for cell in (row["study_id"], row["text"]):
            assert cell == (one if one[0] in "Ca" else f"'{one}".replace("\r", "\n"))
    assert json.loads(as_text([Answer(Prediction("=1"), [])], "jsonl", "m"))["study_id"] == "=1", "others hold what was said"


def test_shards_of_studies_with_such_names(root: Path, deep: Path) -> None:
    names = [name for name in NAMES if name and not set(name) & set("\0\n") and len(name) < 200]
    rows = "".join(f'good.png,"{name}",p{i},Clear.,{"train" if i % 4 else "val"},1\n' for i, name in enumerate(names))
    (root / "studies.csv").write_text(HEADER + rows)
    with writes_only_below(deep / "out", deep):
        write_shards(data("csv", root), deep / "out", workers=1)


def test_uploads(small_run: Path, root: Path, deep: Path) -> None:
    pytest.importorskip("fastapi")
    from starlette.testclient import TestClient

    from medxray.serve import application

    content = (root / "good.png").read_bytes()
    pipeline = medxray.load(small_run)
    client = TestClient(application(pipeline), base_url="http://127.0.0.1:1")
    with writes_only_below(deep / "none", deep), client:
        for name in ("../../../x.png", "/etc/cron.d/x", r"..\..\x.png", "file:///x.png", "x" * 3000, "\u202egnp.x"):
            answer = client.post("/v1/reports", files={"files": (name, content)}, data={"study_id": "../../../../x"})
            assert answer.status_code == 200 and answer.json()["study_id"] == "../../../../x"
            answer = client.post("/v1/reports", files={"files": (name, content)})
            assert answer.status_code == 200 and len(answer.json()["study_id"]) <= 200
        for path in ("/../../../../etc/hostname", "/%2e%2e/%2e%2e/etc/hostname", "/v1/reports/../../x", "//etc/hostname"):
            assert client.get(path).status_code in (404, 405)


def test_made_up_data_goes_into_an_empty_folder_alone(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("kept")
    with pytest.raises(MedxrayError):
        generate(tmp_path, studies=4, size=32, progress=False)
    assert os.listdir(tmp_path) == ["kept"]
