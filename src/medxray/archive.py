"""What a run says of all studies of an archive, as a folder of Parquet parts; by this process or on a Ray cluster.

This process alone writes. A part tells in its own header which studies it is of and what of them could not be read, and is there
whole or not at all. So the parts that are there are all that a later run needs, whoever was killed when.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import os
import socket
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as arrow
import torch
from pyarrow import parquet

from medxray import disk
from medxray.data import Reader, Sample, load_studies
from medxray.data.inspection import reader_of
from medxray.data.prepare import cores
from medxray.data.readers.parquet import MANIFEST
from medxray.outputs import table
from medxray.pipeline import Pipeline, load
from medxray.progress import progress_bar
from medxray.spec import DataSpec, Spec
from medxray.types import DataError, ImageError, MedxrayError, Prediction, RunError

if TYPE_CHECKING:
    from ray import ObjectRef

PART = 256
"""Studies of a part."""

TRIES = 3
"""Processes that may die with a batch before the run ends."""

_KEPT = "What is written is kept: give the same command again to go on"
# What reads a folder of Parquet passes by names with an underscore.
_MARK, _SUMMARY = "_archive.json", "_summary.json"
_HEADER = b"medxray"
_COLUMNS = ["study_id", "patient_id", "images", "views", "indication", "prior"]
# Where an archive lies and how it is gone through changes nothing of what is said.
_FREE = {"on_error", "workers", "cache_images", "max_pixels"}

T = TypeVar("T")
Skipped = dict[str, str]


def archive_of(spec: Spec, folder: str | Path, settings: Sequence[str] = ()) -> DataSpec:
    """How an archive is read for a fitted run: images as the run takes them, studies by a reader of the archive's own.

    Args:
        spec: the run's.
        folder: the archive.
        settings: `key=value` of the data block, such as "reader.name=csv" or "on_error=skip". Where they name no reader it is
            the one whose layout the folder has.

    Raises:
        DataError: no reader knows the folder's layout, or several do.
        SpecError: settings that there are not.
    """
    settings = [text if text.startswith("data.") else f"data.{text}" for text in settings]
    if not any(text.startswith("data.reader.name=") for text in settings):
        if not Path(folder).is_dir():
            raise DataError(f"no folder {folder}; an archive is a folder; single files are predicted without --engine")
        try:
            # What `prepare` writes is Parquet that another reader could take too.
            name = "parquet" if (Path(folder) / MANIFEST).is_file() else reader_of(Path(folder))
            settings.insert(0, f"data.reader.name={name}")
        except DataError as error:
            raise DataError(f"{error} (here as reader.name=NAME, beside what else it needs)") from None
    # Every study is predicted, whatever it would be in a fit.
    whole: dict[str, Any] = {
        "split": "patient", "split_shares": [1.0, 0.0, 0.0], "labels": None, "max_studies": None, "fraction": 1.0,
        "cleaning": "none",
    }  # fmt: skip
    root = str(Path(folder).absolute())
    own = spec.to_dict()
    data = {**own["data"], **whole}
    return Spec.read({**own, "data": data}, [*settings, f"data.reader.root={json.dumps(root)}"]).data


def predict_archive(
    pipeline: Pipeline,
    data: DataSpec,
    output: str | Path,
    *,
    ray: str | None = None,
    workers: int | None = None,
    part: int = PART,
    progress: bool = False,
) -> dict[str, Any]:
    """Predicts every study of an archive; goes on by itself where an earlier run stopped.

    The folder gets part-00000.parquet and so on, with the columns of `medxray.outputs.table`, and `_summary.json` once all
    are there. Each study is in it once; parts are in the order of the reader, and so are their rows. Batches follow from that
    order alone, so that in float32 the bytes of a part are the same whoever made it, with one thread as a process of Ray has.

    Studies that have come into the archive since are predicted, in parts of their own. Those whose files have changed (size or
    time) are predicted again, with their part. Rows of studies that are gone stay.

    Args:
        pipeline: fitted.
        data: the archive, see `archive_of`. `on_error: skip` leaves out and lists what cannot be read.
        output: a folder that is new, empty, or of an earlier run.
        ray: address of a Ray cluster whose machines see the run, the archive and `output` under the same paths; "local" starts
            one here. Without it this process does all.
        workers: models at a time on the cluster. By default as many as it has GPUs, each with one; without GPUs half as many as
            it has processors, each with one. The other processors decode.
        part: studies of a part.
        progress: show a bar.

    Returns:
        `_summary.json`: studies, parts, skipped as {study, file, reason}, gone (studies that the archive had before); and beside
        it `predicted`, the studies that this call predicted.

    Raises:
        DataError: what `load_studies` raises; an unreadable image, unless skipped.
        RunError: not fitted; a folder that is of another run, of another archive or of something else, is in use, or cannot be
            written; Ray is missing or not where it is said to be, a process of it died again and again; memory ran out.
    """
    if part < 1 or (workers is not None and workers < 1):
        raise RunError(f"expected at least one study a part and one worker, found {part} and {workers}")
    output = Path(output).absolute()
    decode, run = pipeline.decoder(data), _run_mark(pipeline)
    if ray is not None:
        _check_ray(ray, pipeline)
    found = load_studies(data, reports=False, images=data.on_error == "raise")
    studies = found.splits["train"].with_format("arrow")[:].select(_COLUMNS)
    ids: list[str] = studies["study_id"].to_pylist()
    sources = _sources(studies, found.reader)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(output, error) from None
    with disk.held(output, "predict"):
        _check_mark(output, {"run": run, "archive": _archive_mark(data, found.reader)})
        parts = _parts(output)
        _check_same_archive(output, parts, sources)
        plan = _plan(ids, sources, parts, part, again=data.on_error == "raise")
        if plan:
            (output / _SUMMARY).unlink(missing_ok=True)
        size = pipeline.prediction_batch
        pieces = [(name, rows[i : i + size]) for name, rows in plan.items() for i in range(0, len(rows), size)]
        order = [row for _, rows in pieces for row in rows]
        done = len(ids) - len(order)
        bounds = [0, *itertools.accumulate(len(rows) for _, rows in pieces)]
        wanted = studies.take(arrow.array(order, "int64"))
        batches = _Batches(wanted, bounds, found.reader, decode, pipeline.task.views, data.on_error == "skip")
        left = {name: -(-len(rows) // size) for name, rows in plan.items()}
        said: dict[str, dict[int, _Said]] = {name: {} for name in plan}
        saying = _on_ray(ray, workers, pipeline, batches) if ray is not None and pieces else _here(pipeline, batches)
        with (
            contextlib.closing(saying),
            progress_bar(total=len(ids), initial=done, desc="predict", unit="study", disable=not progress) as bar,
        ):
            for number, one in saying:
                name, rows = pieces[number]
                said[name][number] = one
                bar.update(len(rows))
                if len(said[name]) == left[name]:
                    own = [value for _, value in sorted(said.pop(name).items())]
                    _write_part(output / name, {ids[row]: sources[ids[row]] for row in plan[name]}, own)
        summary = _summary(_parts(output), sources, found.skipped, found.root)
        with _written(output):
            disk.write(output / _SUMMARY, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    return {**summary, "predicted": len(order)}


# What is there, and what is left to do


@dataclass
class _Part:
    """What a part's header tells.

    Attributes:
        rows: of its table.
        sources: study -> what it was made from, as `_sources` has it.
        skipped: what could not be read of them.
    """

    rows: int
    sources: dict[str, str]
    skipped: list[Skipped]


def _parts(output: Path) -> dict[str, _Part]:
    found = {}
    for path in sorted(output.glob("part-*.parquet")):
        # One that is damaged is as good as missing.
        with contextlib.suppress(arrow.ArrowException, OSError, KeyError, TypeError, ValueError):
            footer = parquet.read_metadata(path)
            header = json.loads(footer.metadata[_HEADER])
            found[path.name] = _Part(footer.num_rows, header["sources"], header["skipped"])
    return found


def _sources(studies: arrow.Table, reader: Reader) -> dict[str, str]:
    """Study -> a hash that changes when its files do, or what is told of them."""

    def source(study: dict[str, Any]) -> str:
        stamps = []
        for image in study["images"]:
            with contextlib.suppress(OSError):
                stamps.append(reader.stamp(image))
        return hashlib.sha256(json.dumps([study, stamps], sort_keys=True).encode()).hexdigest()[:16]

    found: dict[str, str] = {}
    # They wait for a file server.
    with ThreadPoolExecutor() as pool:
        for batch in studies.to_batches(max_chunksize=4096):
            rows = batch.to_pylist()
            found.update(zip((row["study_id"] for row in rows), pool.map(source, rows), strict=True))
    return found


def _plan(
    ids: Sequence[str], sources: Mapping[str, str], parts: Mapping[str, _Part], size: int, *, again: bool
) -> dict[str, list[int]]:
    """Parts that are to be made, with the rows of their studies: those of which a study has changed, as they are, and new ones.

    Args:
        ids: of the archive's studies, in order.
        sources: of each.
        parts: that are there.
        size: studies of a new part.
        again: try again what could not be read.
    """
    row_of = {study: row for row, study in enumerate(ids)}
    plan = {}
    for name, part in parts.items():
        changed = any(sources.get(study, source) != source for study, source in part.sources.items())
        if changed or (again and part.skipped):
            plan[name] = [row_of[study] for study in part.sources if study in row_of]
    known = {study for part in parts.values() for study in part.sources}
    new = [row for row, study in enumerate(ids) if study not in known]
    free = (name for number in itertools.count() if (name := f"part-{number:05d}.parquet") not in parts)
    # A kill leaves whole parts out, so that what is left falls into the same parts again.
    plan |= {next(free): new[start : start + size] for start in range(0, len(new), size)}
    return dict(sorted(plan.items()))


def _run_mark(pipeline: Pipeline) -> dict[str, str]:
    """What decides what a run says: its files, or another project's checkpoint and its spec, by their hashes."""
    names = ("spec.yaml", "task.json", "references.json", "model.safetensors", "bank.arrow")
    found = {name: disk.digest(path) for name in names if (path := pipeline.folder / name).is_file()}
    if "model.safetensors" not in found:
        weights, spec = pipeline.spec.weights, pipeline.spec.to_dict()
        if weights is None or not Path(weights).is_file():
            raise RunError(f"{pipeline.folder} holds no weights; save the pipeline there, by fit or Pipeline.save")
        plain = json.dumps({key: value for key, value in spec.items() if key not in ("output", "data")}, sort_keys=True)
        found = {"weights": disk.digest(Path(weights)), "spec": hashlib.sha256(plain.encode()).hexdigest()}
    return {"name": pipeline.spec.name, "medxray": version("medxray"), **found}


def _archive_mark(data: DataSpec, reader: Reader) -> dict[str, Any]:
    values = {key: value for key, value in data.model_dump().items() if key not in _FREE}
    own = {key: value for key, value in values.pop("reader").items() if key not in ("root", "key_file")}
    flat = {**{f"reader.{key}": value for key, value in own.items()}, **values, "names": reader.mark}
    return dict(json.loads(json.dumps(flat)))


def _check_mark(output: Path, mark: dict[str, dict[str, Any]]) -> None:
    path = output / _MARK
    if not path.is_file():
        held = sorted(one.name for one in output.iterdir() if one.name != disk.LOCK)
        if held:
            raise RunError(
                f"{output}: expected a new or empty folder, or one with predictions of this run and archive; it holds "
                f"{', '.join(held[:5])}{' and more' if len(held) > 5 else ''}; name another folder by --output"
            )
        with _written(output):
            disk.write(path, json.dumps(mark, indent=1) + "\n")
        return
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        differing = {what: [key for key in {**earlier[what], **own} if earlier[what].get(key) != own.get(key)]
                     for what, own in mark.items()}  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise RunError(f"{path} is damaged, so that nobody knows whose predictions these are; name another folder") from None
    for what, keys in differing.items():
        if keys:
            old, new = earlier[what], mark[what]
            told = "; ".join(f"{key} was {_shown(old.get(key))} and is {_shown(new.get(key))}" for key in keys[:5])
            raise RunError(
                f"{output} holds predictions of another {what}: {told}. Name another folder by --output, or go on with what they "
                "were made by"
            )


def _check_same_archive(output: Path, parts: Mapping[str, _Part], sources: Mapping[str, str]) -> None:
    known = [pair for part in parts.values() for pair in part.sources.items()]
    if len({study for study, _ in known}) < len(known):
        raise RunError(f"{output}: a study is in two parts, so that somebody has copied parts into it; name another folder")
    if known and not any(sources.get(study) == source for study, source in known):
        raise RunError(
            f"{output} holds predictions of another archive: none of its {len(known):,} studies is in this one as it was; name "
            "another folder by --output"
        )


def _summary(parts: Mapping[str, _Part], sources: Mapping[str, str], left_out: Sequence[Skipped], root: Path) -> dict[str, Any]:
    skipped = [{**one, "reason": _below(one["reason"], root)} for one in left_out]
    return {
        "studies": sum(part.rows for part in parts.values()),
        "parts": len(parts),
        "gone": sum(study not in sources for part in parts.values() for study in part.sources),
        "skipped": [*skipped, *(one for part in parts.values() for one in part.skipped)],
    }


def _write_part(path: Path, sources: dict[str, str], said: Sequence["_Said"]) -> None:
    rows = table([prediction for one in said for prediction in one.predictions])
    header = {"sources": sources, "skipped": [line for one in said for line in one.skipped]}
    with _written(path.parent):
        with disk.replacing(path) as staged:
            told = {_HEADER: json.dumps(header, ensure_ascii=False).encode()}
            parquet.write_table(rows.replace_schema_metadata(told), staged, compression="zstd")
        disk.flush(path.parent)


@contextlib.contextmanager
def _written(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _unwritable(output, error) from error


def _unwritable(output: Path, error: OSError) -> RunError:
    return RunError(
        f"{output} cannot be written ({os.strerror(error.errno) if error.errno else _words(error)}); mend that, or name another "
        f"folder by --output. {_KEPT}"
    )


# A batch


@dataclass
class _Read:
    """Studies as the model takes them, and what could not be read."""

    samples: list[Sample]
    skipped: list[Skipped]


@dataclass
class _Said:
    """What the model says of them."""

    predictions: list[Prediction]
    skipped: list[Skipped]


@dataclass
class _Batches:
    """Studies that are read a batch at a time; it travels to other processes, without the model.

    Attributes:
        studies: `_COLUMNS` of all of them.
        bounds: (batches + 1,), the rows of a batch from one to the next.
        reader: opens images.
        decode: see `Pipeline.decoder`.
        views: of a study at most.
        skip: leave out what cannot be read.
    """

    studies: arrow.Table
    bounds: list[int]
    reader: Reader
    decode: Callable[[Any], Sample]
    views: int
    skip: bool

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def names(self, number: int) -> list[str]:
        """Studies of a batch."""
        start, stop = self.bounds[number : number + 2]
        return list(self.studies["study_id"].slice(start, stop - start).to_pylist())

    def read(self, number: int) -> _Read:
        """One batch.

        Raises:
            ImageError: an image cannot be read, unless that is to be skipped.
        """
        start, stop = self.bounds[number : number + 2]
        found = _Read([], [])
        for study in self.studies.slice(start, stop - start).to_pylist():
            views = list(itertools.islice(self._views(study, found.skipped), self.views))
            if not views:
                found.skipped.append({"study": study["study_id"], "file": "", "reason": "no readable image"})
                continue
            regions = [view.regions for view in views if view.regions is not None]
            pixels = torch.cat([view.pixels for view in views])
            found.samples.append(
                dataclasses.replace(views[0], pixels=pixels, regions=torch.cat(regions) if regions else None)
            )
        return found

    def _views(self, study: dict[str, Any], skipped: list[Skipped]) -> Iterator[Sample]:
        """Each image that can be read, as a study of one view."""
        for image, view in zip(study["images"], study["views"], strict=True):
            try:
                name = str(self.reader.root / image)
                yield self.decode({**study, "images": [self.reader.open(image)], "views": [view], "names": [name]})
            except ImageError as error:
                if not self.skip:
                    raise ImageError(
                        f"{error}; what is written is kept: mend the image, or set on_error=skip, and give the command again to "
                        "go on"
                    ) from error
                skipped.append({"study": study["study_id"], "file": image, "reason": _below(str(error), self.reader.root)})


def _predicted(pipeline: Pipeline, read: _Read) -> _Said:
    """Raises RunError where memory does not suffice."""
    try:
        return _Said(pipeline.predict(read.samples), read.skipped)
    except (MemoryError, RuntimeError) as error:
        # On a CPU torch has no error of its own for it.
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "memory" not in str(error):
            raise
        raise RunError(
            f"{len(read.samples)} studies at once take more memory than there is ({_words(error)}); make room, take fewer "
            f"workers, or fit with a smaller generation.batch_size. {_KEPT}"
        ) from error


def _here(pipeline: Pipeline, batches: _Batches) -> Generator[tuple[int, _Said]]:
    for number in range(len(batches)):
        yield number, _predicted(pipeline, batches.read(number))


# On Ray: tasks read, actors hold a model each, and a row of the data set is a batch


def _check_ray(address: str, pipeline: Pipeline) -> None:
    """What can be known before the archive is read.

    Raises:
        RunError: Ray is not installed, nobody answers at its address, or there is no run folder for others to load.
    """
    # Otherwise it tells its makers of every use, and the terminal of its insides; what is wrong comes as an error.
    for name, value in (("RAY_USAGE_STATS_ENABLED", "0"), ("RAY_BACKEND_LOG_LEVEL", "fatal")):
        os.environ.setdefault(name, value)
    try:
        import ray.data  # noqa: F401
    except ImportError as error:
        raise RunError(f"Ray is not installed ({error.name}); pip install 'medxray[scale]', or leave out --engine ray") from None
    if not (pipeline.folder / "model.safetensors").is_file():
        raise RunError(
            f"{pipeline.folder} holds no weights that other processes could load; save the run first: medxray export RUN FOLDER "
            "--format medxray"
        )
    if address in ("local", "auto"):
        return
    # Ray itself waits for half a minute, and then ends the process.
    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        socket.create_connection((host, int(port)), 10).close()
    except (OSError, ValueError) as error:
        raise _no_cluster(address, error) from None


def _no_cluster(address: str, error: BaseException) -> RunError:
    return RunError(f"no Ray cluster at {address!r} ({_words(error)}); expected HOST:PORT of its head, auto, or local")


def _on_ray(address: str, workers: int | None, pipeline: Pipeline, batches: _Batches) -> Generator[tuple[int, _Said]]:
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    with contextlib.ExitStack() as stack:
        stack.callback(pipeline.task.to, next(pipeline.task.parameters()).device)
        # The models of the actors need this machine's GPU.
        pipeline.task.to("cpu")
        stack.enter_context(_cluster(address, workers))
        stack.enter_context(_silent(DataContext.get_current()))
        count, each = _shares(ray.cluster_resources(), workers)
        archive = ray.put(batches)
        tries = ray.remote(_Tries).options(num_cpus=0, max_restarts=-1, max_task_retries=-1).remote()
        stack.callback(ray.kill, tries)
        opened = functools.partial(load, pipeline.folder.absolute(), encoder=pipeline.given)
        read = ray.data.range(len(batches), override_num_blocks=len(batches)).map(_reading, fn_args=(archive, tries))
        said = read.map(_Model, fn_constructor_args=(opened, tries), compute=ActorPoolStrategy(size=count), **each)
        try:
            for row in said.iter_rows():
                if isinstance(row["said"], MedxrayError):
                    raise row["said"]
                yield int(row["batch"]), row["said"]
        except ray.exceptions.RayError as error:
            raise RunError(
                f"a process of the cluster failed ({_words(error)}); each machine needs medxray, and to see "
                f"{pipeline.folder.absolute()} and {batches.reader.root}. {_KEPT}"
            ) from error


@contextlib.contextmanager
def _cluster(address: str, workers: int | None) -> Iterator[None]:
    """A cluster that is joined, or started here; one that the caller has joined already stays so."""
    import ray

    if ray.is_initialized():
        yield
        return
    more = {"num_cpus": max(cores(), (workers or 1) + 1), "include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **more)
    except (OSError, ValueError, RuntimeError, SystemExit) as error:
        raise _no_cluster(address, error) from error
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _silent(context: Any) -> Iterator[None]:
    """Without Ray Data's own bars and lines."""
    log, bars = logging.getLogger("ray.data"), context.enable_progress_bars
    level, context.enable_progress_bars = log.level, False
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)
        context.enable_progress_bars = bars


def _shares(resources: Mapping[str, float], workers: int | None) -> tuple[int, dict[str, int]]:
    """How many models, and what Ray gives to each.

    Raises:
        RunError: the cluster has less.
    """
    cpus, gpus = int(resources.get("CPU", 1)), int(resources.get("GPU", 0))
    most = gpus or cpus - 1
    count = workers or gpus or max(1, cpus // 2)
    if count > most:
        one, has = ("GPU", f"{gpus}") if gpus else ("processor", f"{cpus}, one of which reads")
        raise RunError(f"--workers {count}: each takes a {one}, of which the cluster has {has}; take fewer, or a larger one")
    # A byte of memory: of tasks and actors that ask for the same Ray Data makes one, and a model would decode for itself.
    return count, {"num_gpus": 1} if gpus else {"num_cpus": 1, "memory": 1}


@functools.lru_cache(maxsize=1)
def _batches_of(archive: "ObjectRef") -> _Batches:
    """Once a process."""
    import ray

    batches: _Batches = ray.get(archive)
    return batches


class _Tries:
    """An actor: how often each batch was begun. Ray starts processes anew without end, but a batch that kills each one that
    takes it must not go round for ever."""

    def __init__(self) -> None:
        self._begun = Counter[tuple[str, int]]()

    def begin(self, what: str, batch: int) -> int:
        self._begun[what, batch] += 1
        return self._begun[what, batch]


def _reading(row: dict[str, Any], archive: "ObjectRef", tries: Any) -> dict[str, Any]:
    """A task: one batch."""
    number, batches = int(row["id"]), _batches_of(archive)
    names = batches.names(number)
    return {"batch": number, "read": _attempt(lambda: batches.read(number), tries, "read", number, names)}


class _Model:
    """An actor: one run, loaded once."""

    def __init__(self, opened: Callable[[], Pipeline], tries: Any) -> None:
        self._pipeline, self._tries = opened(), tries

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        said = read = row["read"]
        if not isinstance(read, MedxrayError):
            names, number = [sample.study_id for sample in read.samples] or [""], int(row["batch"])
            said = _attempt(lambda: _predicted(self._pipeline, read), self._tries, "predicted", number, names)
        return {"batch": row["batch"], "said": said}


def _attempt(work: Callable[[], T], tries: Any, what: str, batch: int, names: Sequence[str]) -> T | MedxrayError:
    """An error as a value: one that is raised comes back in Ray's dress."""
    import ray

    if ray.get(tries.begin.remote(what, batch)) > TRIES:
        return RunError(
            f"{TRIES} processes died, one after the other, while they {what} studies {names[0]} to {names[-1]}, mostly for "
            f"want of memory. {_KEPT}, with more memory for each process, or without these studies"
        )
    try:
        return work()
    except MedxrayError as error:
        return error


def _below(message: str, root: Path) -> str:
    """A message with its paths relative to the archive."""
    return message.replace(f"{root}{os.sep}", "")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."


def _words(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


__all__ = ["PART", "archive_of", "predict_archive"]
