"""A data set, decoded and resized once, in Parquet shards that reader `parquet` reads.

Which study goes into which shard is planned beforehand, from the settings and the studies alone. A shard is written
beside its place, flushed and renamed, so that it is there whole or not at all; which of them are there is all that a run
needs to go on. So a run's bytes are the same however many processes or machines made it, and however often it was killed.
"""

import _thread
import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import signal
import struct
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, Protocol, get_args

import numpy as np
import pyarrow as arrow
import torch
from numpy.typing import NDArray
from pyarrow import parquet

from medxray.data.images import read_header, read_image
from medxray.data.loading import is_out_of_memory, needed_size
from medxray.data.readers import Reader
from medxray.data.readers.parquet import MANIFEST, MASK_SIDE, WORK
from medxray.data.transforms import cover, resize
from medxray.disk import flush as _flush
from medxray.disk import lock
from medxray.progress import progress_bar
from medxray.registry import Settings, nearest
from medxray.spec import DataSpec, Spec, packaged
from medxray.types import DataError, ImageError, SpecError, Study

if TYPE_CHECKING:
    from medxray.data.study import Studies

GROUP_BYTES = 2**25
"""Images that a row group holds: a reader reads one whole, and keeps some sixteen."""

Bits = Literal["auto", "8", "16"]
Record = dict[str, Any]

_PLAN, _LOCK = "plan.json", "lock"
_SUMS = ("studies", "images", "masks", "bytes")
# How a model reads, and what is an error, changes nothing of what is written.
_FREE = {
    "views", "max_views", "cleaning", "crop", "crop_from", "cache_images", "workers", "on_error", "max_pixels",
}  # fmt: skip


class Masks(Protocol):
    """Finds the chest in an image."""

    @property
    def method(self) -> dict[str, Any]:
        """What decides its masks, as plain values."""

    def mask(
        self, pixels: NDArray[np.float32], view: str, root: Path, image: str
    ) -> NDArray[np.float32] | NDArray[np.bool_] | None:
        """Coverage (h, w) of the whole image by the chest, in [0, 1]; None where there is only a stand-in.

        Args:
            pixels: (1, H, W) in [0, 1].
            view: "PA", "AP", "LL" or "unknown".
            root, image: of the data set, and the image's name in it.
        """


def data_of(source: str, settings: Sequence[str] = ()) -> tuple[Spec, bool]:
    """A spec whose data block says what is to be prepared, and whether a reader alone was named.

    Args:
        source: a packaged spec's name, a YAML file, or a reader's name.
        settings: `key=value`, as in a fit; "data." may be left out, as in "reader.root=FOLDER".

    Raises:
        SpecError: no such spec or reader, or settings that it does not have.
    """
    from medxray.data.readers import READERS

    specs, readers = packaged(), READERS.names()
    settings = [f"data.{text}" if _first_name(text) in DataSpec.model_fields else text for text in settings]
    if source in specs or Path(source).suffix in (".yaml", ".yml") or Path(source).is_file():
        return Spec.read(source, settings), False
    if source not in readers:
        raise SpecError(
            f"no spec or reader {source!r}{nearest(source, [*specs, *readers])} "
            f"(readers: {', '.join(readers)}; specs: {', '.join(specs)}, or a YAML file)"
        )
    # A data block is checked as part of a spec; this one is the smallest.
    around = {
        "task": "pretrain",
        "data": {"reader": {"name": source}},
        "encoder": {"name": "vit"},
        "masker": {"name": "random"},
        "pixel_decoder": {"name": "self-attention"},
        "training": {"steps": 1},
    }
    return Spec.read(around, settings), True


def write_shards(
    data: DataSpec,
    out: str | Path,
    *,
    full: bool = False,
    bits: Bits = "auto",
    studies: int = 256,
    masks: Masks | None = None,
    workers: int | None = None,
    ray: str | None = None,
    progress: bool = False,
) -> Record:
    """Prepares a data set; goes on by itself where an interrupted run stopped.

    The folder gets SPLIT-00000-of-00012.parquet, a row a study, and `manifest.json`: settings, counts, SHA-256 sums, and
    what was skipped. Images are gray PNG, at the data's image_size; read back, each pixel is that of the source, resized,
    to within half a level of the depth. Texts are raw, not cleaned.

    A shard is remade if one of its source files has changed (size or time) since it was made.

    Args:
        data: the data block of a spec. Its `image_size` and `fit` say how images are resized, `decode`, and what else
            there is, how they are read; `on_error: skip` leaves out and lists what cannot be read.
        out: a folder that is new, empty, or an earlier run's.
        full: keep each image at its own size.
        bits: of a pixel; "auto" takes 16 where the source has more than 8.
        studies: of a shard.
        masks: finds the chest, to be kept beside each image as 64 x 64 shares of coverage.
        workers: processes; by default one a processor. None of it changes a byte.
        ray: address of a Ray cluster whose machines see both folders under the same paths, in place of `workers`; "local"
            starts one here.
        progress: show a bar.

    Returns:
        The manifest.

    Raises:
        DataError: what `load_studies` raises; an unreadable image, unless skipped; a folder that cannot be written, is full,
            is in use, holds something else, or the shards of another data set or other settings.
    """
    from medxray.data.study import load_studies

    if studies < 1 or (workers is not None and workers < 1):
        raise DataError(f"expected at least one study a shard and one worker, found {studies} and {workers}")
    if bits not in get_args(Bits):
        raise DataError(f"bits: expected {', '.join(map(repr, get_args(Bits)))}, found {bits!r}")
    if ray is not None:
        # Another machine has another working folder.
        root = str(Path(getattr(data.reader, "root")).absolute())  # noqa: B009
        data = data.model_copy(update={"reader": data.reader.model_copy(update={"root": root})})
    # Texts stay raw: cleaning is for whoever reads the shards.
    found = load_studies(data.model_copy(update={"cleaning": "none"}), reports=False, images=data.on_error == "raise")
    out = Path(out)
    _check_place(out, found.root)
    plan = _plan(found, studies, _settings(data, full, bits, masks))
    job = _Job(out.absolute(), found.reader, _portable(data), full, bits, masks, _schema(found.labels, masks is not None))
    with _held(out):
        records = _begin(out, plan)
        todo = [name for name in plan["shards"] if not _is_whole(job, name, records.get(name), found, studies)]
        if todo or not (out / MANIFEST).is_file():
            _reopen(out, plan, records, todo)
            planned = {name: shard["studies"] for name, shard in plan["shards"].items()}
            done = sum(planned.values()) - sum(planned[name] for name in todo)
            tasks = ((name, *_part(found, name, studies)) for name in todo)
            run = _on_ray(ray, workers) if ray is not None else _processes(min(workers or cores(), len(todo)))
            with progress_bar(
                total=sum(planned.values()), initial=done, desc="preparing", unit="study", disable=not progress
            ) as bar:
                for record in run(job, tasks, bar):
                    records[record["file"]] = record
            _write_json(out / MANIFEST, _manifest(plan, found, records))
        shutil.rmtree(out / WORK, ignore_errors=True)
    return read_manifest(out)


def verify_shards(out: str | Path, *, progress: bool = False) -> Record:
    """Checks every shard against the manifest: SHA-256 sum, size, and number of studies and images.

    Returns:
        The manifest.

    Raises:
        DataError: no manifest, a run that is not finished, or shards that are missing, damaged or not listed; with their
            names.
    """
    out = Path(out)
    manifest = read_manifest(out)
    wrong = []
    with progress_bar(total=manifest["bytes"], desc="verifying", unit="B", unit_scale=True, disable=not progress) as bar:
        for record in manifest["files"]:
            problem = _problem(out / record["file"], record, bar)
            if problem:
                wrong.append(f"{record['file']} {problem}")
    listed = {record["file"] for record in manifest["files"]}
    wrong += [f"{path.name} is not listed" for path in sorted(out.glob("*.parquet")) if path.name not in listed]
    if wrong:
        raise DataError(
            f"{out}: {len(wrong)} shards are not as {MANIFEST} says: {'; '.join(wrong[:5])}"
            f"{f'; and {len(wrong) - 5} more' if len(wrong) > 5 else ''}. Fetch them again, or delete them and prepare the "
            "data set again with the same settings: only what is missing is made"
        )
    return manifest


def read_manifest(out: str | Path) -> Record:
    """The manifest of a folder of shards.

    Raises:
        DataError: there is none, or it is damaged.
    """
    path = Path(out) / MANIFEST
    if not path.is_file():
        unfinished = (path.parent / WORK).is_dir()
        raise DataError(
            f"{path}: no such file; "
            + ("the run is not finished: give the same command again to go on" if unfinished else "name a folder of shards")
        )
    return _read_json(path, ("made_by", "settings", "labels", *_SUMS, "splits", "skipped", "files"))


# The plan


@dataclass
class _Job:
    """What all shards of a run have in common; it travels to other processes."""

    out: Path
    reader: Reader
    data: DataSpec
    full: bool
    bits: Bits
    masks: Masks | None
    schema: arrow.Schema


def _portable(data: DataSpec) -> DataSpec:
    """The same without classes of settings that were made at run time, which do not travel."""
    values = {name: getattr(data, name) for name in DataSpec.model_fields if name != "reader"}
    return DataSpec.model_construct(**values, reader=Settings(name=data.reader.name))


def _settings(data: DataSpec, full: bool, bits: Bits, masks: Masks | None) -> dict[str, Any]:
    """What decides a pixel or a row: plain values, without a path outside of the data set."""
    reader = {key: value for key, value in data.reader.model_dump().items() if key != "root"}
    own = {key: value for key, value in data.model_dump().items() if key not in {*_FREE, "reader", "image_size"}}
    if full:
        own = {key: value for key, value in own.items() if key not in ("fit", "decode")}
    size = "full" if full else data.image_size
    found = {"reader": reader, "size": size, "bits": bits, "masks": masks and masks.method, **own}
    return _without_paths(json.loads(json.dumps(found)))


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_paths(inner) for inner in value]
    return os.path.basename(value) if isinstance(value, str) and os.path.isabs(value) else value


def _schema(labels: Sequence[str], masks: bool) -> arrow.Schema:
    """Columns of a shard, with what the datasets library wants to know of them."""
    from datasets import Features, Image, List, Value

    from medxray.data.study import features_of

    columns: dict[str, Any] = {}
    for name, feature in features_of(labels).items():
        if name == "labels" and not labels:
            continue  # Parquet has no empty group
        columns[name] = List(Image()) if name == "images" else feature
        if name == "images" and masks:
            columns["masks"] = List(Value("binary"))
    return Features(columns).arrow_schema


def _plan(found: "Studies", size: int, settings: Record) -> Record:
    """The shards, each with the number of its studies and the hash of all that is known of them but pixels."""
    shards = {}
    for split, rows in found.splits.items():
        n = math.ceil(len(rows) / size)
        for i in range(n):
            name = f"{split}-{i:05d}-of-{n:05d}.parquet"
            studies, _ = _part(found, name, size)
            text = json.dumps(studies, sort_keys=True)
            shards[name] = {"studies": len(studies), "sources": hashlib.sha256(text.encode()).hexdigest()}
    made_by = {"medxray": version("medxray"), "pyarrow": arrow.__version__, "zlib": zlib.ZLIB_RUNTIME_VERSION}
    return {"made_by": made_by, "settings": {**settings, "shard": size}, "labels": found.labels, "shards": shards}


def _part(found: "Studies", name: str, size: int) -> tuple[list[Study], str]:
    """The studies of a shard, and the hash of the state of their files."""
    split, number, *_ = name.split("-")
    rows = found.splits[split].with_format(None)[int(number) * size : (int(number) + 1) * size]
    studies: list[Any] = [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)]
    stamps = hashlib.sha256()
    for study in studies:
        for image in study["images"]:
            try:
                stamp = found.reader.stamp(image)
            except OSError:
                stamp = f"{image} missing"
            stamps.update(f"{stamp}\n".encode())
    return studies, stamps.hexdigest()


def _check_place(out: Path, root: Path) -> None:
    inner, outer = out.resolve(), root.resolve()
    if inner == outer or outer in inner.parents:
        raise DataError(
            f"{out} lies in the data set's folder {root}, where a reader may take shards for its own; name a folder outside"
        )


def _begin(out: Path, plan: Record) -> dict[str, Record]:
    """Records of the shards that an earlier run has made.

    Raises:
        DataError: it had other settings or studies.
    """
    earlier: Record | None = None
    records: list[Record] = []
    if (out / MANIFEST).is_file():
        earlier = read_manifest(out)
        records = _records(earlier)
    elif (out / WORK / _PLAN).is_file():
        earlier = _read_json(out / WORK / _PLAN, ("shards",))
        paths = sorted((out / WORK).glob("*.parquet.json"))
        records = [_read_json(path, ("file", "bytes", "stamps")) for path in paths]
    else:
        held = sorted(path.name for path in out.iterdir() if path.name != WORK)
        if held:
            raise DataError(
                f"{out}: expected a new or empty folder, or an earlier run's; it holds {', '.join(held[:5])}"
                f"{' and more' if len(held) > 5 else ''}; name another folder"
            )
    if earlier is not None:
        _compare(out, earlier, plan)
    return {record["file"]: record for record in records}


def _compare(out: Path, earlier: Record, plan: Record) -> None:
    differing = []
    for key in ("made_by", "settings"):
        old, new = _flat(earlier.get(key)), _flat(plan[key])
        # Another reader has other settings; that they differ tells nothing more.
        other = old.get("reader.name") != new.get("reader.name")
        for name in dict.fromkeys([*old, *new]):
            if old.get(name) != new.get(name) and not (other and name.startswith("reader.") and name != "reader.name"):
                differing.append(f"{name} was {_shown(old.get(name))} and is {_shown(new.get(name))}")
    if earlier.get("labels") != plan["labels"]:
        differing.append(f"labels were {_shown(earlier.get('labels'))} and are {_shown(plan['labels'])}")
    old_shards, new_shards = earlier["shards"], plan["shards"]
    if not differing and old_shards != new_shards:
        counts = [sum(shard["studies"] for shard in shards.values()) for shards in (old_shards, new_shards)]
        if counts[0] != counts[1]:
            differing.append(f"the data set had {counts[0]} studies and has {counts[1]}")
        else:
            changed = [name for name in new_shards if old_shards.get(name) != new_shards[name]]
            differing.append(
                f"studies, names of images, texts or labels are others in {len(changed)} of {len(new_shards)} shards "
                f"(first in {changed[0] if changed else 'one that is gone'})"
            )
    if differing:
        raise DataError(
            f"{out} holds shards of another run: {'; '.join(differing)}. Give the same settings and data set to go on, name "
            "another folder, or delete this one to begin anew"
        )


def _flat(values: Any, before: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {before: values}
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{before}.{key}" if before else key)
    return found


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _is_whole(job: _Job, name: str, record: Record | None, found: "Studies", size: int) -> bool:
    """Whether a shard is there, made from the files as they are, and what it left out would be left out again."""
    try:
        return (
            record is not None
            and os.path.getsize(job.out / name) == record["bytes"]
            and (not record["skipped"] or record["tolerated"] == _tolerated(job.data))
            and record["stamps"] == _part(found, name, size)[1]
        )
    except OSError:
        return False


def _tolerated(data: DataSpec) -> Record:
    """What may change between a kill and the run that goes on, as it changes nothing but which images are an error."""
    return {"on_error": data.on_error, "max_pixels": data.max_pixels}


def _reopen(out: Path, plan: Record, records: Mapping[str, Record], todo: Sequence[str]) -> None:
    """The state of a run that is not finished: its plan, and a record of each shard that is there."""
    work = out / WORK
    for path in work.glob("*.partial"):
        path.unlink(missing_ok=True)
    if (out / MANIFEST).is_file():
        for name, record in records.items():
            _write_json(work / f"{name}.json", record)
    if not (work / _PLAN).is_file():
        _write_json(work / _PLAN, plan)
    (out / MANIFEST).unlink(missing_ok=True)
    for name in todo:
        # The shard first: one beside the record of another would pass for whole.
        (out / name).unlink(missing_ok=True)
        _flush(out)
        (work / f"{name}.json").unlink(missing_ok=True)


def _manifest(plan: Record, found: "Studies", records: Mapping[str, Record]) -> Record:
    own = [records[name] for name in plan["shards"]]
    before = [{**one, "reason": _within(one["reason"], found.root)} for one in found.skipped]
    skipped = [*before, *(one for record in own for one in record["skipped"])]
    files, splits = [], dict[str, dict[str, int]]()
    for (name, shard), record in zip(plan["shards"].items(), own, strict=True):
        lost = sum(not one["file"] for one in record["skipped"])
        if record["studies"] + lost != shard["studies"]:
            raise DataError(f"{name}: {shard['studies']} studies were planned, {record['studies']} written and {lost} skipped")
        files.append({**record, "skipped": len(record["skipped"]), "planned": shard["studies"], "sources": shard["sources"]})
        counts = splits.setdefault(name.split("-")[0], {"shards": 0, "studies": 0, "images": 0})
        for key in counts:
            counts[key] += record.get(key, 1)
    return {
        **{key: plan[key] for key in ("made_by", "settings", "labels")},
        **{key: sum(record[key] for record in own) for key in _SUMS},
        "splits": splits,
        "skipped": skipped,
        "files": files,
    }


def _records(manifest: Record) -> list[Record]:
    """What `_manifest` was made of; the plan is filled in again too."""
    files = manifest["files"]
    manifest["shards"] = {file["file"]: {"studies": file["planned"], "sources": file["sources"]} for file in files}
    end = len(manifest["skipped"]) - sum(file["skipped"] for file in files)
    records = []
    for file in files:
        own = {key: value for key, value in file.items() if key not in ("planned", "sources")}
        start, end = end, end + file["skipped"]
        records.append({**own, "skipped": manifest["skipped"][start:end]})
    return records


# One shard


def _make(job: _Job, name: str, studies: Sequence[Study], stamps: str, tick: Callable[[], None]) -> Record:
    """Writes a shard and its record, and returns that.

    Args:
        job: the run.
        name: of the shard.
        studies: its rows.
        stamps: the state of their files.
        tick: called after each study.

    Raises:
        DataError: an image cannot be read, with "raise"; or the shard cannot be written.
    """
    partial = job.out / WORK / f"{name}.{uuid.uuid4().hex}.partial"
    skipped: list[dict[str, str]] = []
    counts = {"studies": 0, "images": 0, "masks": 0}
    leaves = _leaves(job.schema)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        writer = parquet.ParquetWriter(
            partial,
            job.schema,
            compression={leaf: "NONE" if leaf.endswith(".bytes") else "ZSTD" for leaf in leaves},
            use_dictionary=False,
            write_statistics=False,
        )
        with writer:
            rows: list[dict[str, Any]] = []
            size = 0
            for study in studies:
                row = _row(job, study, skipped)
                if row is not None:
                    rows.append(row)
                    counts["studies"] += 1
                    counts["images"] += len(row["images"])
                    counts["masks"] += sum(mask is not None for mask in row.get("masks", ()))
                    size += sum(len(image["bytes"]) for image in row["images"])
                if size >= GROUP_BYTES:
                    writer.write_table(_table(rows, job.schema))
                    rows, size = [], 0
                tick()
            if rows:
                writer.write_table(_table(rows, job.schema))
        _flush(partial)
        with partial.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        record = {
            "file": name, "sha256": digest, "bytes": partial.stat().st_size, **counts, "skipped": skipped,
            "tolerated": _tolerated(job.data), "stamps": stamps,
        }  # fmt: skip
        # The shard itself is the sign that both are there.
        _write_json(job.out / WORK / f"{name}.json", record)
        os.replace(partial, job.out / name)
        _flush(job.out)
        return record
    except OSError as error:
        raise _unwritable(job.out, error) from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise DataError(
            f"{job.out}: out of memory while {name} was made; give the same command again to go on, with fewer workers"
        ) from error
    finally:
        torch.set_num_threads(threads)
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _row(job: _Job, study: Study, skipped: list[dict[str, str]]) -> dict[str, Any] | None:
    """A study as a shard has it; None, and a line in `skipped`, where no image of it can be read."""
    images, views, masks = [], [], []
    for image, view in zip(study["images"], study["views"], strict=True):
        try:
            png, mask = _image(job, image, view)
        except ImageError as error:
            if job.data.on_error == "raise":
                raise ImageError(
                    f"{error}; what was prepared is kept: mend the image, or set data.on_error=skip, and give the command "
                    "again to go on"
                ) from error
            skipped.append({"study": study["study_id"], "file": image, "reason": _within(str(error), job.reader.root)})
            continue
        images.append({"bytes": png, "path": None})
        views.append(view)
        masks.append(mask)
    if not images:
        skipped.append({"study": study["study_id"], "file": "", "reason": "no readable image"})
        return None
    own = {"images": images, "views": views, "masks": masks}
    return {name: own.get(name, study.get(name)) for name in job.schema.names}


def _image(job: _Job, image: str, view: str) -> tuple[bytes, bytes | None]:
    """An image as PNG, and the chest's coverage of it where that is asked for and known.

    Raises:
        ImageError: it cannot be read.
    """
    source = job.reader.open(image)
    name = str(job.reader.root / image)
    at_least = None if job.full else needed_size(job.data)
    pixels = read_image(source, max_pixels=job.data.max_pixels, at_least=at_least, name=name, **job.data.shown)
    deep = job.bits == "16" or (job.bits == "auto" and read_header(source, name=name).bits > 8)
    small = pixels if job.full else resize(pixels, job.data.image_size, job.data.fit).numpy()
    mask = None
    region = None if job.masks is None else job.masks.mask(pixels, view, job.reader.root, image)
    if region is not None:
        grid, shape = (MASK_SIDE, MASK_SIDE), (pixels.shape[1], pixels.shape[2])
        size = shape if job.full else job.data.image_size
        shares = cover(torch.from_numpy(region.astype(np.float32)), grid, shape, size, job.data.fit)
        mask = (shares * 255).round().byte().numpy().tobytes()
    white = 65535 if deep else 255
    levels = np.rint(small[0].astype(np.float64) * white)
    return encode_png(levels.astype(np.uint16 if deep else np.uint8)), mask


def encode_png(levels: NDArray[np.uint8] | NDArray[np.uint16]) -> bytes:
    """Gray levels (H, W) as PNG; white is 255 or 65535.

    Radiographs are noise on slow changes: runs of equal residuals are all that is worth a search, so that deflate looks for
    nothing else. That is several times as fast as a general encoder, and mostly smaller. The filter, what is above or the mean
    of that and what is to the left, is the one that packs every eighth row better.
    """
    h, w = levels.shape
    n = levels.dtype.itemsize
    rows = np.ascontiguousarray(levels, levels.dtype.newbyteorder(">")).view(np.uint8).reshape(h, w * n)
    above = np.zeros_like(rows)
    above[1:] = rows[:-1]

    def filtered(kind: int, step: int) -> NDArray[np.uint8]:
        own, up = rows[::step], above[::step]
        found = np.empty((len(own), w * n + 1), np.uint8)
        found[:, 0] = kind
        if kind == _UP:
            np.subtract(own, up, out=found[:, 1:])
        else:
            left = np.zeros_like(own)
            left[:, n:] = own[:, :-n]
            # The mean of two bytes, rounded down, in a byte.
            np.subtract(own, (up & left) + ((up ^ left) >> 1), out=found[:, 1:])
        return found

    kind = min((_UP, _AVERAGE), key=lambda kind: len(_deflated(filtered(kind, 8))))
    header = struct.pack(">IIBBBBB", w, h, 8 * n, 0, 0, 0, 0)
    # A 16-bit file does not say how many of its bits are used: without this the brightest pixel would tell.
    white = [(b"tEXt", b"White\0" + b"65535")] if n == 2 else []
    chunks = [(b"IHDR", header), *white, (b"IDAT", _deflated(filtered(kind, 1))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


_UP, _AVERAGE = 2, 3


def _deflated(rows: NDArray[np.uint8]) -> bytes:
    packer = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_RLE)
    return packer.compress(rows.data) + packer.flush()


def _within(message: str, root: Path) -> str:
    """A message with its paths relative to the data set."""
    return message.replace(f"{root}{os.sep}", "")


def _table(rows: Sequence[dict[str, Any]], schema: arrow.Schema) -> arrow.Table:
    return arrow.Table.from_pydict({name: [row[name] for row in rows] for name in schema.names}, schema)


def _leaves(schema: arrow.Schema) -> list[str]:
    """The columns of Parquet that columns of Arrow become."""

    def below(field: arrow.Field, path: str) -> Iterator[str]:
        if arrow.types.is_struct(field.type):
            for child in field.type:
                yield from below(child, f"{path}.{child.name}")
        elif arrow.types.is_list(field.type):
            yield from below(field.type.value_field, f"{path}.list.element")
        else:
            yield path

    return [leaf for field in schema for leaf in below(field, field.name)]


# Many shards

_Tasks = Iterator[tuple[str, list[Study], str]]
_Run = Callable[[_Job, _Tasks, Any], Iterator[Record]]


class _Stopped(Exception):
    """The run ends before the shard does."""


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _here(job: _Job, tasks: _Tasks, bar: Any) -> Iterator[Record]:
    for name, studies, stamps in tasks:
        yield _make(job, name, studies, stamps, bar.update)


def _processes(workers: int) -> _Run:
    """Shards made by several processes, two of each at most under way."""
    if workers < 2:
        return _here

    def run(job: _Job, tasks: _Tasks, bar: Any) -> Iterator[Record]:
        from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
        from concurrent.futures.process import BrokenProcessPool

        # New interpreters: locks and threads of libraries do not survive a fork.
        context = get_context("spawn")
        counted, stop = context.Value("q", 0), context.Event()
        pool = ProcessPoolExecutor(workers, context, _enlist, (job, counted, stop))
        waiting: set[Future[Record | DataError]] = set()
        shown, more = 0, True
        try:
            while more or waiting:
                while more and len(waiting) < 2 * workers:
                    task = next(tasks, None)
                    more = task is not None
                    if task is not None:
                        waiting.add(pool.submit(_serve, *task))
                finished, waiting = wait(waiting, 0.2, FIRST_COMPLETED)
                if counted.value > shown:
                    bar.update(counted.value - shown)
                    shown = counted.value
                for future in finished:
                    yield _given(future.result())
        except BrokenProcessPool:
            raise DataError(
                f"{job.out}: a worker process died, perhaps for want of memory; give the same command again to go on, with "
                "fewer workers if it happens again (a script must call this below if __name__ == '__main__')"
            ) from None
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)

    return run


_worker: tuple[_Job, Any, Any]


def _enlist(job: _Job, counted: Any, stop: Any) -> None:
    """Makes a process a worker, which ends with the one that started it."""
    global _worker
    _worker = job, counted, stop
    # The first process is told of Ctrl-C too, and says when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    # A `threading.Thread` would wait for its beginning, which never comes where there is no memory.
    _thread.start_new_thread(follow, ())


def _serve(name: str, studies: list[Study], stamps: str) -> "Record | DataError":
    job, counted, stop = _worker

    def tick() -> None:
        with counted.get_lock():
            counted.value += 1
        if stop.is_set():
            raise _Stopped

    return _attempt(job, name, studies, stamps, tick)


def _attempt(
    job: _Job, name: str, studies: list[Study], stamps: str, tick: Callable[[], None] = lambda: None
) -> "Record | DataError":
    """An error as a value: one that is raised in another process or machine comes back in that library's dress."""
    try:
        return _make(job, name, studies, stamps, tick)
    except DataError as error:
        return error


def _given(result: "Record | DataError") -> Record:
    if isinstance(result, DataError):
        raise result
    return result


def _on_ray(address: str, workers: int | None) -> _Run:
    """Shards made by the tasks of a Ray cluster, one a core."""

    def run(job: _Job, tasks: _Tasks, bar: Any) -> Iterator[Record]:
        # Ray tells its makers of every use otherwise.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError:
            raise DataError("Ray is not installed; pip install 'medxray[scale]', or leave out --ray") from None
        own = not ray.is_initialized()
        if own:
            more = {"num_cpus": workers or cores(), "include_dashboard": False} if address == "local" else {}
            try:
                ray.init(address=address, log_to_driver=False, logging_level="ERROR", **more)
            except (OSError, ValueError, RuntimeError) as error:
                raise DataError(f"no Ray cluster at {address!r} ({_words(error)}); expected its address, or local") from error
        try:
            make, shared = ray.remote(_attempt), ray.put(job)
            waiting: dict[Any, int] = {}
            more_tasks = True
            while more_tasks or waiting:
                room = 2 * int(ray.cluster_resources().get("CPU", 1))
                while more_tasks and len(waiting) < room:
                    task = next(tasks, None)
                    more_tasks = task is not None
                    if task is not None:
                        waiting[make.remote(shared, *task)] = len(task[1])
                finished, _ = ray.wait(list(waiting), num_returns=1, timeout=0.5) if waiting else ([], [])
                for reference in finished:
                    record = _given(ray.get(reference))
                    bar.update(waiting.pop(reference))
                    yield record
        except ray.exceptions.RayError as error:
            raise DataError(
                f"a Ray task failed ({_words(error)}); its machine must have medxray and see {job.reader.root} and {job.out}; "
                "give the same command again to go on"
            ) from error
        finally:
            if own:
                ray.shutdown()

    return run


# Files


@contextlib.contextmanager
def _held(out: Path) -> Iterator[None]:
    """The folder, made if need be, held against a second run.

    Raises:
        DataError: it cannot be made or written, or another run holds it.
    """
    work, new = out / WORK, not out.exists()
    try:
        work.mkdir(parents=True, exist_ok=True)
        with (work / _LOCK).open("w") as file:
            _lock(file, out)
            try:
                yield
            finally:
                if not (work / _PLAN).is_file():
                    # Nothing was begun, or all is done: what was there before stays as it was.
                    shutil.rmtree(work, ignore_errors=True)
                    if new:
                        with contextlib.suppress(OSError):
                            out.rmdir()
    except OSError as error:
        raise _unwritable(out, error) from error


def _lock(file: IO[str], out: Path) -> None:
    if not lock(file):
        raise DataError(f"{out}: another run writes to this folder; wait for it or stop it")


def _unwritable(out: Path, error: OSError) -> DataError:
    cure = {
        errno.ENOSPC: "make room",
        errno.EDQUOT: "make room",
        errno.EFBIG: "make room",
        errno.EACCES: "mend its rights",
        errno.EROFS: "name another folder",
    }.get(error.errno or 0, "mend that")
    words = os.strerror(error.errno) if error.errno else _words(error)
    return DataError(
        f"{out}: cannot be written ({words}); {cure} and give the same command again to go on: whole shards are kept"
    )


def _words(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


def _write_json(path: Path, value: Any) -> None:
    # Beside its place; in the folder of work, where a later run clears what a killed one has left.
    folder = path.parent if path.parent.name == WORK else path.parent / WORK
    partial = folder / f"{path.name}.{uuid.uuid4().hex}.partial"
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    _flush(path.parent)


def _read_json(path: Path, keys: Sequence[str]) -> Record:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: damaged ({_words(error)}); delete the folder and prepare it anew") from None
    if not isinstance(value, dict) or not all(key in value for key in keys):
        raise DataError(f"{path}: expected {', '.join(keys)} in it; delete the folder and prepare it anew")
    return value


def _problem(path: Path, record: Record, bar: Any) -> str:
    """What a shard lacks of its record; empty for nothing."""
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if size != record["bytes"]:
        return f"has {size} bytes, expected {record['bytes']}"
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(2**22):
                digest.update(block)
                bar.update(len(block))
        if digest.hexdigest() != record["sha256"]:
            return "has another SHA-256 sum"
        rows = parquet.ParquetFile(path)
        paths = rows.read(columns=["views"]).column(0)
    except (OSError, arrow.ArrowException) as error:
        return f"cannot be read ({_words(error)})"
    found = {"studies": rows.metadata.num_rows, "images": sum(map(len, paths.to_pylist()))}
    return "; ".join(f"has {n} {key}, expected {record[key]}" for key, n in found.items() if n != record[key])


def _first_name(text: str) -> str:
    return text.partition("=")[0].partition(".")[0]


__all__ = ["GROUP_BYTES", "Masks", "data_of", "encode_png", "read_manifest", "verify_shards", "write_shards"]
