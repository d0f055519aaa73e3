"""The command line: parses, calls the library, prints. A mistake in what was given exits with 2 and one message."""

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Annotated, Any, Optional

import typer

app = typer.Typer(
    help="Foundation models and report generation for chest X-rays.",
    epilog="Research use only; not a medical device.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _specs() -> Iterable[str]:
    from medxray.spec import packaged

    return packaged()


def _runs() -> Iterable[str]:
    return (str(spec.parent) for depth in ("*", "*/*", "*/*/*") for spec in sorted(Path().glob(f"{depth}/spec.yaml")))


def _parts(section: str) -> Iterable[str]:
    from medxray.registry import registry_of

    return registry_of(section).names()


def _protocol_names() -> Iterable[str]:
    from medxray.metrics.protocols import PROTOCOLS

    return PROTOCOLS


def _sections() -> Iterable[str]:
    from medxray.registry import SECTIONS

    return [*SECTIONS, "specs"]


def _completing(*sources: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """What a shell may complete a word to, beside files; of a list with commas its last name."""

    def complete(incomplete: str) -> list[str]:
        before, comma, begun = incomplete.rpartition(",")
        return [before + comma + name for source in sources for name in source() if name.startswith(begun)]

    return complete


def _part_names(context: typer.Context, incomplete: str) -> list[str]:
    from medxray.registry import SECTIONS

    kind = context.params.get("kind")
    return _completing(lambda: _parts(kind))(incomplete) if kind in SECTIONS else []


def _of(*names: str) -> Callable[[str], list[str]]:
    return _completing(lambda: names)


_metrics = _completing(lambda: _parts("metrics"))
_data = _completing(lambda: _parts("reader"), _specs)
_protocols = _completing(_protocol_names)
_splits = _of("train", "val", "test")

SpecArgument = Annotated[
    str,
    typer.Argument(help="a packaged spec's name or a YAML file", metavar="SPEC", autocompletion=_completing(_specs)),
]
RunArgument = Annotated[
    str,
    typer.Argument(
        help="a run folder, or the spec that was fitted", metavar="RUN", autocompletion=_completing(_runs, _specs)
    ),
]
Settings = Annotated[
    Optional[list[str]], typer.Argument(help="settings in place of the spec's, as key=value", metavar="KEY=VALUE")
]


def _silence(quiet: bool) -> bool:
    """Bars of transformers go by this, which it reads when it is imported."""
    if quiet:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    return quiet


OfFile = Annotated[
    Optional[str],
    typer.Option(
        "--spec", help="RUN is a checkpoint file of R2GenCSR, R2GenGPT or R2Gen, of this spec", metavar="SPEC",
        autocompletion=_completing(_specs),
    ),
]  # fmt: skip
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress bars", callback=_silence)]
Json = Annotated[bool, typer.Option("--json", help="print one JSON document in place of text")]


@app.command()
def fit(
    spec: SpecArgument,
    settings: Settings = None,
    fresh: Annotated[bool, typer.Option(help="delete the run folder and begin anew")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fit a spec; goes on by itself where an interrupted fit stopped.

    Example: medxray fit r2gencsr-phantom encoder.name=vmamba training.epochs=3
    """
    with _mistakes(quiet, as_json) as answer:
        import medxray
        from medxray.pipeline import read_log

        pipeline = medxray.build(spec, settings).fit(fresh=fresh, progress=not quiet)
        if _is_main():
            log = read_log(pipeline.folder)
            answer(
                {**_named(pipeline), "log": log, "files": [pipeline.folder / "model.safetensors"]},
                *_course(log), f"fitted: {pipeline.folder}",
            )  # fmt: skip


@app.command()
def evaluate(
    run: RunArgument,
    settings: Settings = None,
    split: Annotated[Optional[str], typer.Option(help="train, val or test", autocompletion=_splits)] = None,
    protocol: Annotated[
        Optional[str],
        typer.Option(
            help="full: references whole; r2gen: cut at the decoder's token limit; the spec's by default",
            autocompletion=_of("full", "r2gen"),
        ),
    ] = None,
    ablations: Annotated[bool, typer.Option(help="judge the model with a part switched off too")] = True,
    as_json: Json = False,
    spec: OfFile = None,
    quiet: Quiet = False,
) -> None:
    """Score a fitted run beside its floors; writes scores.json, predictions.parquet and report.html.

    \b
    Examples:
      medxray evaluate runs/r2gencsr-phantom --split val
      medxray evaluate runs/r2gen-iu-xray --protocol r2gen
      medxray evaluate checkpoint.pth --spec r2gencsr-mimic-cxr data.reader.root=FOLDER
    """
    with _mistakes(quiet, as_json) as answer:
        pipeline = _open(run, settings, spec)
        scores = pipeline.evaluate(split, ablations=ablations, protocol=protocol, progress=not quiet)
        files = [pipeline.folder / name for name in ("scores.json", "predictions.parquet", "report.html")]
        answer({**_named(pipeline), **scores.to_dict(), "files": files}, str(scores), f"report: {files[-1]}")


@app.command()
def score(
    file: Annotated[Path, typer.Argument(help="a table with a row a study: CSV, JSON Lines or Parquet", metavar="TABLE")],
    prediction: Annotated[str, typer.Option(help="column of generated reports", metavar="COLUMN")],
    reference: Annotated[str, typer.Option(help="column of the reports that people wrote", metavar="COLUMN")],
    metrics: Annotated[str, typer.Option(help="names, parted by commas", autocompletion=_metrics)] = "bleu,rouge-l,cider",
    patient: Annotated[
        Optional[str], typer.Option(help="column of patients, by whom intervals draw; patient_id if there", metavar="COLUMN")
    ] = None,
    study: Annotated[
        Optional[str], typer.Option(help="column of studies, each of which comes once; study_id if there", metavar="COLUMN")
    ] = None,
    protocol: Annotated[
        Optional[str],
        typer.Option(
            help="r2gen-iu or r2gen-mimic: cleaned and cut as R2Gen does; full-iu or full-mimic: cleaned only",
            autocompletion=_protocols,
        ),
    ] = None,
    max_words: Annotated[
        Optional[int], typer.Option(help="of a reference that count, in place of the protocol's", metavar="NUMBER")
    ] = None,
    intervals: Annotated[bool, typer.Option(help="95 % ones, by a bootstrap over patients")] = True,
    out: Annotated[Optional[Path], typer.Option(help="write scores.json there", metavar="FILE")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score reports of any model, as they stand in a table or by a protocol.

    \b
    Examples:
      medxray score predictions.csv --prediction model --reference report --metrics bleu,cider,clinical
      medxray score raw.csv --prediction model --reference report --protocol r2gen-mimic
      medxray score runs/r2gencsr-phantom/predictions.parquet --prediction text --reference reference
    """
    with _mistakes(quiet, as_json) as answer, _replacing(out) as file_out:
        import json

        from medxray.scoring import score_table

        names = [name.strip() for name in metrics.split(",") if name.strip()]
        scores = score_table(
            file, prediction, reference, metrics=names, patient=patient, study=study, protocol=protocol, words=max_words,
            intervals=intervals,
        )  # fmt: skip
        if file_out is not None:
            file_out.write(json.dumps(scores.to_dict(), indent=2) + "\n")
        answer({**scores.to_dict(), "files": [] if out is None else [out]}, str(scores))


@app.command()
def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            help="run folders or tables; NAME=PATH names one, NAME=PATH,PATH is seeds of one",
            metavar="RUN",
            autocompletion=_completing(_runs),
        ),
    ],
    metrics: Annotated[
        Optional[str], typer.Option(help="names, parted by commas; those of the task by default", autocompletion=_metrics)
    ] = None,
    baseline: Annotated[Optional[str], typer.Option(help="what others are compared with; the first", metavar="NAME")] = None,
    split: Annotated[
        Optional[str], typer.Option(help="the one that all must have been evaluated on", autocompletion=_splits)
    ] = None,
    protocol: Annotated[
        Optional[str], typer.Option(help="by which all reports are read, as in score", autocompletion=_protocols)
    ] = None,
    reference_of: Annotated[
        Optional[str], typer.Option(help="whose references judge all, where they differ", metavar="NAME")
    ] = None,
    seeds: Annotated[bool, typer.Option("--seeds", help="runs of one spec but for the seed are one system")] = False,
    intervals: Annotated[bool, typer.Option(help="95 % ones with p-values, by a paired bootstrap over patients")] = True,
    prediction: Annotated[str, typer.Option(help="of tables: column of generated reports", metavar="COLUMN")] = "prediction",
    reference: Annotated[str, typer.Option(help="of tables: the reports that people wrote", metavar="COLUMN")] = "reference",
    patient: Annotated[
        Optional[str], typer.Option(help="of tables: patients; patient_id if there", metavar="COLUMN")
    ] = None,
    study: Annotated[Optional[str], typer.Option(help="of tables: studies; study_id by default", metavar="COLUMN")] = None,
    out: Annotated[
        Optional[Path], typer.Option(help="gets scores.json, table.md, table.tex and comparison.html", metavar="FOLDER")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare evaluated runs, or tables of reports, on the studies that all have.

    \b
    Examples:
      medxray compare runs/r2gen runs/r2gencsr --out compared
      medxray compare base=runs/a0,runs/a1,runs/a2 ours=runs/b0,runs/b1,runs/b2
      medxray compare runs/r2gencsr theirs=theirs.csv --reference-of r2gencsr
    """
    with _mistakes(quiet, as_json) as answer:
        from medxray.comparison import FILES
        from medxray.comparison import compare as compared

        names = None if metrics is None else [name.strip() for name in metrics.split(",") if name.strip()]
        found = compared(
            runs, metrics=names, baseline=baseline, split=split, protocol=protocol, reference_of=reference_of,
            group_seeds=seeds, intervals=intervals, prediction=prediction, reference=reference, patient=patient, study=study,
        )  # fmt: skip
        files = [] if out is None else [found.write(out) / name for name in FILES]
        answer({**found.to_dict(), "files": files}, str(found), *(f"page: {file}" for file in files[-1:]))


@app.command()
def card(
    run: RunArgument,
    out: Annotated[
        Optional[Path], typer.Option(help="gets the card; README.md of the run folder by default; a page if it ends in .html")
    ] = None,
    license: Annotated[str, typer.Option(help="of the weights, as the Hugging Face hub calls it")] = "unknown",
    as_json: Json = False,
) -> None:
    """Write a model card of a run: its parts, data, recipe, scores, floors, subgroups, use and limits.

    Everything comes from the run folder; no data set is needed.

    \b
    Examples:
      medxray card runs/r2gencsr-phantom
      medxray card runs/r2gencsr-phantom --out card.html
    """
    with _mistakes(as_json=as_json) as answer:
        from medxray.model_card import write_card
        from medxray.spec import Spec, packaged

        named = run in packaged() or (Path(run).suffix in (".yaml", ".yml") and Path(run).is_file())
        folder = Spec.read(run).run_folder if named else Path(run)
        written = write_card(folder, out, license=license)
        answer({"run": folder, "files": [written]}, f"card: {written}")


@app.command()
def predict(
    run: RunArgument,
    files: Annotated[
        list[Path],
        typer.Argument(help="DICOM, PNG, JPEG or TIFF files, or folders; with --engine an archive, then its settings, key=value"),
    ],
    study: Annotated[bool, typer.Option("--study", help="the files are views of one study, frontal first")] = False,
    format: Annotated[
        Optional[str],
        typer.Option(
            help="csv, jsonl, parquet, fhir, dicom-sr or html; by the ending of --output if left out",
            autocompletion=_of("csv", "jsonl", "parquet", "fhir", "dicom-sr", "html"),
        ),
    ] = None,
    output: Annotated[
        Optional[Path],
        typer.Option(help="a file; of dicom-sr and of an archive a folder, with a file a study or a part", metavar="PATH"),
    ] = None,
    engine: Annotated[
        Optional[str],
        typer.Option(
            help="predict a whole archive, going on where it stopped: process, this one alone; or ray, for a Ray cluster",
            metavar="process|ray", autocompletion=_of("process", "ray"),
        ),
    ] = None,
    ray: Annotated[
        Optional[str], typer.Option(help="of the cluster, or local; RAY_ADDRESS or local by default", metavar="ADDRESS")
    ] = None,
    workers: Annotated[Optional[int], typer.Option(min=1, help="models on the cluster; one a GPU by default")] = None,
    part: Annotated[int, typer.Option(min=1, help="studies of a Parquet part")] = 256,
    spec: OfFile = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the report, probabilities or error of each study: of each file, and below a folder of each DICOM study.

    \b
    Examples:
      medxray predict runs/r2gencsr-phantom --study frontal.dcm lateral.dcm
      medxray predict runs/r2gencsr-phantom FOLDER --output reports.csv
      medxray predict runs/r2gencsr-phantom chest.dcm --format fhir
      medxray predict runs/r2gencsr-phantom FOLDER --format dicom-sr --output FOLDER-OF-REPORTS
      medxray predict runs/r2gencsr-phantom ARCHIVE --engine ray --output reports
    """
    with _mistakes(quiet, as_json) as answer:
        if engine is not None or ray is not None or workers is not None:
            _predict_archive(answer, run, files, study, format, output, engine, ray, workers, part, spec)
            return
        from medxray.data.study_files import studies_in
        from medxray.outputs import Answer, as_text, check_format, format_of, row, write
        from medxray.processes import world
        from medxray.progress import progress_bar
        from medxray.types import RunError

        if as_json and format is not None and output is None:
            raise RunError(f"--json prints one document and --format {format} another; leave one out, or name an --output")
        format = format_of(format, output)
        studies, left_out = studies_in(files)
        if study:
            studies = [{"study_id": files[0].stem, "images": [image for one in studies for image in one["images"]]}]
        pipeline = _open(run, None, spec)
        if format is not None:
            check_format(format, pipeline.spec.task)
        for line in left_out:
            typer.echo(f"left out: {line}", err=True)
        found: list[Any] = []
        # Decoded studies are held for one stretch at a time.
        with progress_bar(total=len(studies), desc="predict", unit="study", delay=1) as bar:
            stretch = 32 * world()
            for start in range(0, len(studies), stretch):
                found += pipeline.predict(studies[start : start + stretch])
                bar.update(len(found) - bar.n)
        if not _is_main():
            return
        answers = [Answer(prediction, one["images"]) for prediction, one in zip(found, studies, strict=True)]
        name, files = pipeline.spec.name, []
        if format is None:
            lines = [f"{prediction.study_id}: {prediction}" for prediction in found]
        elif output is None:
            lines = [as_text(answers, format, name).removesuffix("\n")]
        else:
            files = write(answers, format, output, model=name, data=pipeline.spec.data)
            lines = [f"written: {file}" for file in files]
        said = {"predictions": [row(prediction) for prediction in found], "left_out": left_out, "files": files}
        answer({**_named(pipeline), **said}, *lines)


def _predict_archive(
    answer: Callable[..., None],
    run: str,
    files: list[Path],
    study: bool,
    format: str | None,
    output: Path | None,
    engine: str | None,
    ray: str | None,
    workers: int | None,
    part: int,
    spec: str | None,
) -> None:
    import time

    from medxray.types import RunError

    if engine not in ("process", "ray"):
        raise RunError(f"--engine: expected process or ray, found {engine or 'none, beside --ray or --workers'}")
    if engine == "process" and (ray is not None or workers is not None):
        raise RunError("--engine process is one process; --ray and --workers go with --engine ray")
    if study or format not in (None, "parquet"):
        raise RunError(f"--engine writes Parquet, a row a study; leave out {'--study' if study else f'--format {format}'}")
    folder, *settings = files
    if wrong := [text for text in settings if "=" not in str(text)]:
        raise RunError(f"--engine takes one archive at a time, and settings as key=value; found {wrong[0]} beside {folder}")
    from medxray.archive import archive_of, predict_archive

    pipeline = _open(run, None, spec)
    data = archive_of(pipeline.spec, folder, [str(text) for text in settings])
    output = output or pipeline.folder / "predictions" / folder.resolve().name
    address = (ray or os.environ.get("RAY_ADDRESS") or "local") if engine == "ray" else None
    started = time.monotonic()
    found = predict_archive(pipeline, data, output, ray=address, workers=workers, part=part, progress=True)
    seconds = time.monotonic() - started
    made, gone = found["predicted"], found["gone"]
    rate = f"{made:,} of them now, {made / seconds:,.1f} studies/s" if made else "all were there"
    lines = [f"written: {output}: {found['parts']:,} parts, {found['studies']:,} studies, {rate}"]
    lines += [f"  {gone:,} of them are no longer in the archive"] if gone else []
    answer({**_named(pipeline), **found, "output": output}, *lines, *_skipped(found["skipped"], output / "_summary.json"))


def _skipped(skipped: Sequence[Mapping[str, str]], listed: Path) -> list[str]:
    """The first few things that were left out, as lines."""
    lines = [f"  skipped {' '.join(filter(None, (one['study'], one['file'])))}: {one['reason']}" for one in skipped[:5]]
    more = [f"  and {len(skipped) - 5} more, in {listed}"] if len(skipped) > 5 else []
    return [line.replace(" : ", ": ") for line in lines] + more


@app.command()
def serve(
    run: RunArgument,
    host: Annotated[str, typer.Option(help="where to listen; beyond this machine only with a token")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one")] = 8000,
    token: Annotated[
        Optional[str], typer.Option(help="that requests must bear; others on this machine see it, unlike MEDXRAY_TOKEN")
    ] = None,
    token_file: Annotated[Optional[Path], typer.Option(help="holds the token", metavar="FILE")] = None,
    max_body: Annotated[int, typer.Option(min=1, help="MiB of a request")] = 64,
    max_files: Annotated[int, typer.Option(min=1, help="files of a study")] = 8,
    max_pixels: Annotated[
        Optional[int], typer.Option(min=1, help="of an image; data.max_pixels of the run by default")
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="studies that the model runs at once")] = 16,
    max_wait_ms: Annotated[float, typer.Option(min=0, help="that a study waits for others")] = 20,
    queue: Annotated[int, typer.Option(min=1, help="requests that are accepted at once; more get 503")] = 64,
    timeout: Annotated[float, typer.Option(min=0.1, help="seconds to send a request, and again for its answer")] = 60,
    spec: OfFile = None,
    quiet: Quiet = False,
) -> None:
    """Answer over HTTP with reports and features, as JSON, FHIR or DICOM SR; GET / describes it.

    \b
    Examples:
      medxray serve runs/r2gencsr-phantom
      curl -F files=@chest.dcm http://127.0.0.1:8000/v1/reports
      curl -F files=@chest.dcm -H "Accept: application/fhir+json" http://127.0.0.1:8000/v1/reports
      medxray serve runs/r2gencsr-phantom --host 0.0.0.0 --token-file token
    """
    with _mistakes():
        import logging

        from medxray.types import RunError

        try:
            from medxray import serve as service
        except ImportError as error:
            raise RunError(f"{error.name} is missing; install what a service needs: pip install 'medxray[serve]'") from None
        logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
        service.LOG.setLevel(logging.WARNING if quiet else logging.INFO)
        limits = service.Limits(
            max_body=max_body * 2**20, max_files=max_files, max_batch=max_batch, max_wait_ms=max_wait_ms, queue=queue,
            timeout=timeout, header_timeout=min(10, timeout),
        )  # fmt: skip
        secret = service.find_token(token, token_file)
        pipeline = _open(run, None, spec)
        service.serve(pipeline, host=host, port=port, token=secret, limits=limits, max_pixels=max_pixels, say=_print)


@app.command("app")
def reading_room(
    runs: Annotated[
        list[str],
        typer.Argument(
            help="a run folder, or the spec that was fitted; two are read side by side", metavar="RUN [RUN]",
            autocompletion=_completing(_runs, _specs),
        ),
    ],
    host: Annotated[str, typer.Option(help="where to listen; beyond this machine only with MEDXRAY_TOKEN")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one")] = 7860,
) -> None:
    """Open a reading room in the browser: drop files, see reports, where the model looked, and its context.

    \b
    Examples:
      medxray app runs/r2gencsr-phantom
      medxray app runs/r2gencsr-phantom runs/r2gengpt-phantom
    """
    with _mistakes():
        from medxray.types import RunError

        try:
            from medxray import app as room
        except ImportError as error:
            raise RunError(f"{error.name} is missing; install what the app needs: pip install 'medxray[app]'") from None
        pipelines = [_open(run, None) for run in runs]
        room.launch(pipelines, host=host, port=port, token=os.environ.get(room.TOKEN, "").strip() or None, say=_print)


@app.command()
def pictures(
    run: RunArgument,
    files: Annotated[Optional[list[Path]], typer.Argument(help="DICOM, PNG, JPEG or TIFF files")] = None,
    output: Annotated[Optional[Path], typer.Option(help="where they go; pictures/ of the run folder")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Draw what a pre-trained model makes of images: masked, reconstructed, errors, attention, components.

    Without files it draws the validation studies that the fit drew after each epoch.

    Example: medxray pictures runs/hd-mae-phantom chest.dcm --output drawn
    """
    with _mistakes(quiet, as_json) as answer:
        pipeline = _open(run, None)
        written = pipeline.pictures(list(files) if files else None, output, progress=not quiet)
        answer({**_named(pipeline), "files": written}, *map(str, written))


@app.command()
def export(
    run: RunArgument,
    folder: Annotated[Path, typer.Argument(help="gets what is written", metavar="FOLDER")],
    format: Annotated[
        Optional[str],
        typer.Option(
            help="timm, transformers or medxray; what suits the task by default",
            autocompletion=_of("timm", "transformers", "medxray"),
        ),
    ] = None,
    spec: OfFile = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write what a run has learned as timm or transformers read it, or as a medxray folder that needs nothing else.

    \b
    Examples:
      medxray export runs/mae-224 vit-cxr --format transformers
      medxray export runs/r2gencsr-iu-xray r2gencsr
    """
    with _mistakes(quiet, as_json) as answer:
        pipeline = _open(run, None, spec)
        written = pipeline.export(folder, format)
        parts = sorted(path for path in written.iterdir() if path.is_dir())
        answer({**_named(pipeline), "files": parts or [written]}, f"written: {written}", *(f"  {part.name}" for part in parts))


@app.command()
def show(
    name: Annotated[
        str,
        typer.Argument(
            help="a spec, as in fit, or a registered encoder",
            metavar="NAME",
            autocompletion=_completing(_specs, lambda: _parts("encoder")),
        ),
    ],
    settings: Settings = None,
    image_size: Annotated[
        Optional[str], typer.Option(help="pixels a side, or HEIGHTxWIDTH", metavar="PIXELS")
    ] = None,
    as_json: Json = False,
) -> None:
    """Print a resolved spec, or an encoder alone, with its parameters, tokens, FLOP and memory; no data are needed.

    \b
    Examples:
      medxray show r2gencsr-phantom encoder.name=vmamba
      medxray show vmamba size=base
      medxray show vit size=large --image-size 1280
    """
    with _mistakes(as_json=as_json) as answer:
        import yaml

        import medxray
        from medxray.registry import nearest, registry_of
        from medxray.spec import packaged
        from medxray.summary import spec_of_encoder, summarise, summarise_encoder
        from medxray.types import SpecError

        size, settings = _sides(image_size), list(settings or [])
        encoders, specs = registry_of("encoder").names(), packaged()
        if name == "encoder" and settings:
            name, *settings = settings
        if name in specs or Path(name).suffix in (".yaml", ".yml") or (name not in encoders and Path(name).exists()):
            settings += [f"data.image_size={size}"] if size else []
            pipeline = medxray.build(name, settings)
            shown, text, found = pipeline.spec.to_dict(), pipeline.spec.to_yaml(), summarise(pipeline)
        elif name in encoders:
            spec = spec_of_encoder(name, settings, size)
            found, shown = summarise_encoder(spec), {"encoder": spec.to_dict()["encoder"]}
            text = yaml.safe_dump(shown, sort_keys=False)
        else:
            raise SpecError(
                f"no spec or encoder {name!r}{nearest(name, [*specs, *encoders])} "
                f"(specs: {', '.join(specs)}, or a YAML file; encoders: {', '.join(encoders)})"
            )
        figures = {line: {"text": value, "value": value.number} for line, value in found.items()}
        answer({"spec": shown, "figures": figures}, text, *(f"{line + ':':<34} {value}" for line, value in found.items()))


@app.command("list")
def list_parts(
    kind: Annotated[
        Optional[str],
        typer.Argument(help="a section of a spec, such as encoder, or specs", autocompletion=_completing(_sections)),
    ] = None,
    name: Annotated[Optional[str], typer.Argument(help="one part", autocompletion=_part_names)] = None,
    as_json: Json = False,
) -> None:
    """List registered parts with their settings, public weights that encoders read, and the packaged specs.

    Example: medxray list encoder vit
    """
    with _mistakes(as_json=as_json) as answer:
        from medxray.registry import SECTIONS, nearest, registry_of
        from medxray.spec import describe_settings, packaged
        from medxray.types import SpecError
        from medxray.weights.families import FAMILIES

        if kind is not None:
            kind = {"encoders": "encoder", "readers": "reader", "maskers": "masker", "metric": "metrics"}.get(
                kind, kind.removesuffix("s") if kind.removesuffix("s") in SECTIONS else kind
            )
        if kind is not None and kind not in (*SECTIONS, "specs", "spec"):
            raise SpecError(f"no registry {kind!r}{nearest(kind, SECTIONS)} (found: {', '.join(SECTIONS)}, specs)")
        lines: list[str] = []
        found: dict[str, list[Any]] = {}
        if kind in (None, "specs", "spec"):
            found["specs"] = list(packaged())
            lines += ["specs", *(f"  {spec}" for spec in packaged())]
        for section in SECTIONS if kind is None else [kind] if kind in SECTIONS else []:
            registry, found[section] = registry_of(section), []
            lines.append(section)
            for part in [name] if name else registry.names():
                model = registry.settings_of(part)
                settings = describe_settings(model) if section != "task" else []
                reads = [family for family in FAMILIES if section == "encoder" and family.encoder == part]
                lines.append(f"  {part}: {model.__doc__}")
                if kind is not None:
                    lines += [f"    {key} ({of}, {default}){': ' + text if text else ''}" for key, of, default, text in settings]
                    lines += [f"    reads {family.name} ({family.files}): {family.example}" for family in reads]
                found[section].append({
                    "name": part, "text": model.__doc__,
                    "settings": [dict(zip(("name", "type", "default", "text"), one, strict=True)) for one in settings],
                    "reads": [{"name": family.name, "files": family.files, "example": family.example} for family in reads],
                })  # fmt: skip
        answer(found, *lines)


@app.command()
def schema(out: Annotated[Optional[Path], typer.Option(help="write to a file")] = None) -> None:
    """Print the JSON Schema of a spec, for editors.

    A YAML file that begins with `# yaml-language-server: $schema=medxray.schema.json` is then completed and checked.

    Example: medxray schema --out medxray.schema.json
    """
    with _mistakes():
        import json

        from medxray.spec import Spec

        text = json.dumps(Spec.schema_for_editors(), indent=1)
        if out is None:
            _print(text)
        else:
            out.write_text(text + "\n", encoding="utf-8")


@app.command()
def prepare(
    source: Annotated[
        Optional[str], typer.Argument(help="a reader, or a spec, as in fit", metavar="READER", autocompletion=_data)
    ] = None,
    out: Annotated[Optional[Path], typer.Argument(help="gets the shards", metavar="FOLDER")] = None,
    settings: Annotated[
        Optional[list[str]], typer.Argument(help="settings of the data, as key=value", metavar="KEY=VALUE")
    ] = None,
    size: Annotated[
        Optional[str], typer.Option(help="pixels a side, HEIGHTxWIDTH, or full; a spec's image_size", metavar="PIXELS")
    ] = None,
    fit: Annotated[Optional[str], typer.Option(help="stretch or pad")] = None,
    bits: Annotated[str, typer.Option(help="auto, 8 or 16 of a pixel; auto takes 16 where the source is deeper")] = "auto",
    shard: Annotated[int, typer.Option(help="studies of a shard")] = 256,
    masks: Annotated[bool, typer.Option("--masks", help="keep where the chest is beside each image")] = False,
    workers: Annotated[
        Optional[str],
        typer.Option(help="processes, one a core by default; or ray, for a Ray cluster", metavar="NUMBER|ray"),
    ] = None,
    ray: Annotated[
        Optional[str],
        typer.Option(help="of the cluster, or local; with --workers ray, RAY_ADDRESS or local by default", metavar="ADDRESS"),
    ] = None,
    verify: Annotated[
        Optional[Path], typer.Option(help="check shards against their manifest; makes none", metavar="FOLDER")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a data set as Parquet shards with its images decoded and resized; goes on where an interrupted run stopped.

    \b
    Examples:
      medxray prepare dicom-folder shards reader.root=FOLDER --size 1280
      medxray prepare r2gen-mimic-cxr shards data.reader.root=FOLDER --workers 8
      medxray prepare r2gen-mimic-cxr shards data.reader.root=FOLDER --workers ray
      medxray prepare --verify shards
    """
    with _mistakes(quiet, as_json) as answer:
        from medxray.data import data_of, verify_shards, write_shards
        from medxray.types import SpecError

        if verify is not None:
            if source is not None:
                raise SpecError(f"--verify makes no shards; leave out {source!r}")
            found = verify_shards(verify, progress=not quiet)
            answer(_shards(verify, found), f"verified: {verify}: {_amounts(found)}")
            return
        if source is None or out is None or "=" in str(out):
            raise SpecError("expected a reader or spec, then the folder that gets the shards: medxray prepare READER FOLDER")
        if bits not in ("auto", "8", "16"):
            raise SpecError(f"--bits: expected auto, 8 or 16, found {bits!r}")
        if workers == "ray":
            ray, workers = ray or os.environ.get("RAY_ADDRESS") or "local", None
        if workers is not None and not (workers.isdecimal() and int(workers)):
            raise SpecError(f"--workers: expected a number of processes, or ray, found {workers!r}")
        settings, whole = list(settings or []), size == "full"
        named = _sides(None if whole else size, "--size")
        settings += [f"image_size={named}"] if named else []
        settings += [f"fit={fit}"] if fit else []
        spec, of_reader = data_of(source, settings)
        if of_reader and size is None and not any(text.removeprefix("data.").startswith("image_size=") for text in settings):
            raise SpecError("--size: expected pixels a side, such as 1280, or full; a reader alone does not say it")
        finder = None
        if masks:
            from medxray.pretrain import SEGMENTERS, SegmenterSettings
            from medxray.pretrain.regions import Contours

            usual = SEGMENTERS.settings_of("classical")(name="classical")
            finder = Contours(spec.segmenter if isinstance(spec.segmenter, SegmenterSettings) else usual)  # type: ignore[arg-type]
        found = write_shards(
            spec.data, out, full=whole, bits=bits, studies=shard, masks=finder,  # type: ignore[arg-type]
            workers=int(workers) if workers else None, ray=ray, progress=not quiet,
        )  # fmt: skip
        lines = [f"written: {out}: {_amounts(found)}", *_skipped(found["skipped"], out / "manifest.json")]
        answer(_shards(out, found), *lines)


def _shards(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    counts = {name: manifest[name] for name in ("studies", "images", "bytes", "skipped")}
    return counts | {"files": [folder / "manifest.json", *(folder / shard["file"] for shard in manifest["files"])]}


def _amounts(manifest: dict[str, Any]) -> str:
    return (
        f"{len(manifest['files']):,} shards, {manifest['studies']:,} studies, {manifest['images']:,} images, "
        f"{manifest['bytes'] / 2**20:,.1f} MiB"
    )


@app.command()
def inspect(
    source: Annotated[
        str,
        typer.Argument(help="a reader, a spec, as in fit, or a data set's folder", metavar="DATA", autocompletion=_data),
    ],
    settings: Annotated[
        Optional[list[str]], typer.Argument(help="settings of the data, as key=value", metavar="KEY=VALUE")
    ] = None,
    out: Annotated[Path, typer.Option(help="gets the card")] = Path("card.html"),
    images: Annotated[Optional[int], typer.Option(min=1, help="look at so many images only, chosen by the seed")] = None,
    seed: Annotated[int, typer.Option(min=0, help="chooses the images that are looked at and shown")] = 0,
    workers: Annotated[Optional[int], typer.Option(min=1, help="processes; one a core by default")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="exit with 3 where something leaks")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a card of a data set: counts, images that stand out, copies, reports, and what leaks between splits.

    Exit code 0, or 3 with --strict where patients, images or reports are in two splits, or an input holds the report.

    \b
    Examples:
      medxray inspect iu-xray reader.root=FOLDER
      medxray inspect r2gen-mimic-cxr data.reader.root=FOLDER --images 5000 --strict
      medxray inspect FOLDER --out card.html
    """
    with _mistakes(quiet, as_json) as answer:
        import json

        from medxray.data import data_of
        from medxray.data.inspection import inspect, reader_of
        from medxray.spec import Spec
        from medxray.visual.data_card import data_card, verdict

        settings, folder = list(settings or []), Path(source)
        if (folder / "spec.yaml").is_file():
            spec = Spec.read(folder, settings)
        elif folder.is_dir():
            spec, _ = data_of(reader_of(folder), [f"reader.root={json.dumps(source)}", *settings])
        else:
            spec, _ = data_of(source, settings)
        found = inspect(spec.data, images=images, seed=seed, workers=workers, progress=not quiet)
        data_card(out, found)
        what = ("studies", "patients", "images", "reports")
        splits = {name or "all": {one: getattr(counts, one) for one in what} for name, counts in found.splits.items()}
        table = _table(["", *what], [[name, *(f"{n:,}" for n in counts.values())] for name, counts in splits.items()])
        said = {"splits": splits, "notes": verdict(found), "leaking": found.leaking, "files": [out]}
        answer(said, table, *verdict(found), f"card: {out}")
        if strict and found.leaking:
            sys.exit(3)


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="where data and runs go")] = Path("runs/demo"),
    quiet: Quiet = False,
) -> None:
    """Everything in small: make phantom X-rays, pre-train, fit R2GenCSR, evaluate, predict.

    Example: medxray demo --folder runs/demo
    """
    with _mistakes(quiet):
        from medxray.demo import run

        run(folder, progress=not quiet, say=_print)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Print what is installed here, what is slow or missing, and the line that mends it.

    \b
    Examples:
      medxray doctor
      medxray doctor --json
    """
    with _mistakes(as_json=as_json) as answer:
        from medxray.summary import diagnose

        checks = diagnose()
        answer({"checks": [check._asdict() for check in checks]}, *map(str, checks))


def _open(run: str, settings: list[str] | None, spec: str | None = None) -> Any:
    """A run folder's pipeline; that of a spec whose run folder holds a finished fit; or that of another project's file."""
    import medxray
    from medxray.types import RunError

    if spec is not None:
        return medxray.load(run, spec=spec, overrides=settings)
    if Path(run).is_file() and Path(run).suffix not in (".yaml", ".yml"):
        raise RunError(f"{run} is a file; for another project's checkpoint name its spec too: --spec r2gencsr-mimic-cxr")
    if (Path(run) / "spec.yaml").is_file() or Path(run).is_dir():
        if settings:
            raise RunError(f"{run} is a run folder, which has its settings; leave out {settings[0]!r}, or name the spec")
        return medxray.load(run)
    if len(Path(run).parts) > 1 and not Path(run).exists():
        raise RunError(f"no run folder {run}; fit first, or name one (it is taken from {Path.cwd()})")
    return medxray.build(run, settings)


def _sides(text: str | None, option: str = "--image-size") -> int | list[int] | None:
    """"224" and "224x320" as data.image_size has them."""
    from medxray.types import SpecError

    found = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text or "")
    if text is not None and found is None:
        raise SpecError(f"{option}: expected pixels such as 224, or 224x320 (height x width), found {text!r}")
    if found is None:
        return None
    return [int(found[1]), int(found[2])] if found[2] else int(found[1])


@contextlib.contextmanager
def _replacing(path: Path | None) -> Iterator[IO[str] | None]:
    """A file that takes the path's place once it is whole; that it can be written is known before the work is done."""
    if path is None:
        yield None
        return
    from medxray.types import RunError

    staged = path.with_name(f".{path.name}.{os.getpid()}") if path.name else path
    try:
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        file = staged.open("w", encoding="utf-8")
    except OSError as error:
        raise RunError(f"--out {path} cannot be written: {error.strerror}; name another file") from None
    try:
        with file:
            yield file
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def _named(pipeline: Any) -> dict[str, Any]:
    """What every JSON document about a run begins with."""
    return {"run": pipeline.folder, "name": pipeline.spec.name, "task": pipeline.spec.task}


def _course(log: Sequence[Mapping[str, float]], most: int = 10) -> list[str]:
    """A table of the last validations of a fit, each with the training loss before it."""
    loss, rows = "", []
    for line in log:
        loss = f"{line['loss']:.4g}" if "loss" in line else loss
        judged = {key.removeprefix("eval_"): f"{value:.4g}" for key, value in line.items() if key.startswith("eval_")}
        if judged:
            rows.append({"step": f"{line['step']:,}", "training loss": loss} | judged)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    names = [{"loss": "validation loss"}.get(name, name) for name in columns]
    return [_table(names, [[row.get(name, "") for name in columns] for row in rows[-most:]])] if rows else []


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    from rich.console import Console
    from rich.table import Table

    table, console = Table(*columns, box=None, pad_edge=False), Console()
    for row in rows:
        table.add_row(*row)
    with console.capture() as captured:
        console.print(table)
    return captured.get().rstrip("\n")


def _is_main() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _print(text: str) -> None:
    typer.echo(text)


@contextlib.contextmanager
def _mistakes(quiet: bool = False, as_json: bool = False) -> Iterator[Callable[..., None]]:
    """One clear message and exit code 2 for a user's mistake.

    Gives what prints an answer: a document, or in its place lines of text. Of whatever else is printed meanwhile nothing
    comes between a JSON document and its reader.
    """
    from medxray.progress import quiet as quietly
    from medxray.types import MedxrayError, for_json

    stdout = sys.stdout

    def answer(document: Mapping[str, Any], *lines: str) -> None:
        import json

        texts = [json.dumps(for_json(document), indent=1, allow_nan=False)] if as_json else lines
        # Of several processes each has the whole answer.
        for text in texts if _is_main() else ():
            typer.echo(text, file=stdout)

    try:
        with quietly(quiet), contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            yield answer
    except MedxrayError as error:
        typer.echo(f"medxray: {error}", err=True)
        if "TORCHELASTIC_ERROR_FILE" in os.environ:
            # From there torchrun tells it as the reason of the whole job.
            from torch.distributed.elastic.multiprocessing.errors import get_error_handler

            get_error_handler().record_exception(error)
        sys.exit(2)
    except BrokenPipeError:
        raise
    except OSError as error:
        what = f"{error.filename} cannot be read or written" if error.filename else "the machine refuses"
        typer.echo(f"medxray: {what}: {error.strerror or error}; check the path and its rights, or name another", err=True)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        from medxray.data.images import in_words
        from medxray.data.loading import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        typer.echo(f"medxray: out of memory ({in_words(error)}); lower the size of batches or the number of workers", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("medxray: interrupted; run the same command again to go on", err=True)
        sys.exit(130)


def main() -> None:
    """Entry point of the `medxray` command."""
    # A terminal that lacks a sign shows another.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    if "" in sys.argv:
        # As a path it would stand for the folder that one is in.
        typer.echo("medxray: an argument is empty; is a variable of the shell not set?", err=True)
        sys.exit(2)
    app()


if __name__ == "__main__":
    main()
