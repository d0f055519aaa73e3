"""The command line: parses, calls the library, prints. A mistake in what was given exits with 2 and one message."""

import contextlib
import os
import sys
from collections.abc import Iterator
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


def _spec_names(incomplete: str) -> list[str]:
    """What a shell may complete SPEC to, beside files."""
    from medxray.spec import packaged

    return [name for name in packaged() if name.startswith(incomplete)]


SpecArgument = Annotated[
    str, typer.Argument(help="a packaged spec's name or a YAML file", metavar="SPEC", autocompletion=_spec_names)
]
Settings = Annotated[
    Optional[list[str]], typer.Argument(help="settings in place of the spec's, as key=value", metavar="[KEY=VALUE]...")
]


def _silence(quiet: bool) -> bool:
    """Bars of transformers go by this, which it reads when it is imported."""
    if quiet:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    return quiet


OfFile = Annotated[
    Optional[str],
    typer.Option("--spec", help="RUN is a checkpoint file of R2GenCSR, R2GenGPT or R2Gen, of this spec", metavar="SPEC"),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress bars", callback=_silence)]


@app.command()
def fit(
    spec: SpecArgument,
    settings: Settings = None,
    fresh: Annotated[bool, typer.Option(help="delete the run folder and begin anew")] = False,
    quiet: Quiet = False,
) -> None:
    """Fit a spec; goes on by itself where an interrupted fit stopped.

    Example: medxray fit r2gencsr-phantom encoder.name=vmamba training.epochs=3
    """
    with _mistakes():
        import medxray

        pipeline = medxray.build(spec, settings).fit(fresh=fresh, progress=not quiet)
        if _is_main():
            _print(f"fitted: {pipeline.folder}")


@app.command()
def evaluate(
    run: Annotated[str, typer.Argument(help="a run folder, or the spec that was fitted", metavar="RUN")],
    settings: Settings = None,
    split: Annotated[Optional[str], typer.Option(help="train, val or test")] = None,
    protocol: Annotated[
        Optional[str],
        typer.Option(help="full: references whole; r2gen: cut at the decoder's token limit; the spec's by default"),
    ] = None,
    ablations: Annotated[bool, typer.Option(help="judge the model with a part switched off too")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="print scores.json in place of the table")] = False,
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
    with _mistakes():
        pipeline = _open(run, settings, spec)
        scores = pipeline.evaluate(split, ablations=ablations, protocol=protocol, progress=not (quiet or as_json))
        if as_json:
            _print((pipeline.folder / "scores.json").read_text(encoding="utf-8").strip())
            return
        _print(str(scores))
        _print(f"report: {pipeline.folder / 'report.html'}")


@app.command()
def score(
    file: Annotated[Path, typer.Argument(help="a table with a row a study: CSV, JSON Lines or Parquet", metavar="TABLE")],
    prediction: Annotated[str, typer.Option(help="column of generated reports", metavar="COLUMN")],
    reference: Annotated[str, typer.Option(help="column of the reports that people wrote", metavar="COLUMN")],
    metrics: Annotated[str, typer.Option(help="names, parted by commas")] = "bleu,rouge-l,cider",
    patient: Annotated[
        Optional[str], typer.Option(help="column of patients, by whom intervals draw; patient_id if there", metavar="COLUMN")
    ] = None,
    study: Annotated[
        Optional[str], typer.Option(help="column of studies, each of which comes once; study_id if there", metavar="COLUMN")
    ] = None,
    protocol: Annotated[
        Optional[str],
        typer.Option(help="r2gen-iu or r2gen-mimic: cleaned and cut as R2Gen does; full-iu or full-mimic: cleaned only"),
    ] = None,
    max_words: Annotated[
        Optional[int], typer.Option(help="of a reference that count, in place of the protocol's", metavar="NUMBER")
    ] = None,
    intervals: Annotated[bool, typer.Option(help="95 % ones, by a bootstrap over patients")] = True,
    out: Annotated[Optional[Path], typer.Option(help="write scores.json there", metavar="FILE")] = None,
) -> None:
    """Score reports of any model, as they stand in a table or by a protocol.

    \b
    Examples:
      medxray score predictions.csv --prediction model --reference report --metrics bleu,cider,clinical
      medxray score raw.csv --prediction model --reference report --protocol r2gen-mimic
      medxray score runs/r2gencsr-phantom/predictions.parquet --prediction text --reference reference
    """
    with _mistakes(), _replacing(out) as file_out:
        import json

        from medxray.scoring import score_table

        names = [name.strip() for name in metrics.split(",") if name.strip()]
        scores = score_table(
            file, prediction, reference, metrics=names, patient=patient, study=study, protocol=protocol, words=max_words,
            intervals=intervals,
        )  # fmt: skip
        if file_out is not None:
            file_out.write(json.dumps(scores.to_dict(), indent=2) + "\n")
        _print(str(scores))


@app.command()
def compare(
    runs: Annotated[
        list[str],
        typer.Argument(help="run folders or tables; NAME=PATH names one, NAME=PATH,PATH is seeds of one", metavar="RUN"),
    ],
    metrics: Annotated[Optional[str], typer.Option(help="names, parted by commas; those of the task by default")] = None,
    baseline: Annotated[Optional[str], typer.Option(help="what others are compared with; the first", metavar="NAME")] = None,
    split: Annotated[Optional[str], typer.Option(help="the one that all must have been evaluated on")] = None,
    protocol: Annotated[Optional[str], typer.Option(help="by which all reports are read, as in score")] = None,
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
) -> None:
    """Compare evaluated runs, or tables of reports, on the studies that all have.

    \b
    Examples:
      medxray compare runs/r2gen runs/r2gencsr --out compared
      medxray compare base=runs/a0,runs/a1,runs/a2 ours=runs/b0,runs/b1,runs/b2
      medxray compare runs/r2gencsr theirs=theirs.csv --reference-of r2gencsr
    """
    with _mistakes():
        from medxray.comparison import compare as compared

        names = None if metrics is None else [name.strip() for name in metrics.split(",") if name.strip()]
        found = compared(
            runs, metrics=names, baseline=baseline, split=split, protocol=protocol, reference_of=reference_of,
            group_seeds=seeds, intervals=intervals, prediction=prediction, reference=reference, patient=patient, study=study,
        )  # fmt: skip
        _print(str(found))
        if out is not None:
            _print(f"page: {found.write(out) / 'comparison.html'}")


@app.command()
def card(
    run: Annotated[str, typer.Argument(help="a run folder, or the spec that was fitted", metavar="RUN")],
    out: Annotated[
        Optional[Path], typer.Option(help="gets the card; README.md of the run folder by default; a page if it ends in .html")
    ] = None,
    license: Annotated[str, typer.Option(help="of the weights, as the Hugging Face hub calls it")] = "unknown",
) -> None:
    """Write a model card of a run: its parts, data, recipe, scores, floors, subgroups, use and limits.

    Everything comes from the run folder; no data set is needed.

    \b
    Examples:
      medxray card runs/r2gencsr-phantom
      medxray card runs/r2gencsr-phantom --out card.html
    """
    with _mistakes():
        from medxray.model_card import write_card
        from medxray.spec import Spec, packaged

        named = run in packaged() or (Path(run).suffix in (".yaml", ".yml") and Path(run).is_file())
        _print(f"card: {write_card(Spec.read(run).run_folder if named else run, out, license=license)}")


@app.command()
def predict(
    run: Annotated[str, typer.Argument(help="a run folder, or the spec that was fitted", metavar="RUN")],
    files: Annotated[list[Path], typer.Argument(help="DICOM, PNG, JPEG or TIFF files, or folders of them")],
    study: Annotated[bool, typer.Option("--study", help="the files are views of one study, frontal first")] = False,
    json_lines: Annotated[bool, typer.Option("--json", help="one JSON object a study; as --format jsonl")] = False,
    format: Annotated[
        Optional[str],
        typer.Option(help="csv, jsonl, parquet, fhir, dicom-sr or html; by the ending of --output if left out"),
    ] = None,
    output: Annotated[
        Optional[Path], typer.Option(help="a file; of dicom-sr a folder, with a file for each study", metavar="PATH")
    ] = None,
    spec: OfFile = None,
    quiet: Quiet = False,
) -> None:
    """Write the report, probabilities or error of each study: of each file, and below a folder of each DICOM study.

    \b
    Examples:
      medxray predict runs/r2gencsr-phantom --study frontal.dcm lateral.dcm
      medxray predict runs/r2gencsr-phantom FOLDER --output reports.csv
      medxray predict runs/r2gencsr-phantom chest.dcm --format fhir
      medxray predict runs/r2gencsr-phantom FOLDER --format dicom-sr --output FOLDER-OF-REPORTS
    """
    with _mistakes():
        from tqdm.auto import tqdm

        from medxray.data.study_files import studies_in
        from medxray.outputs import Answer, as_text, check_format, format_of, write

        format = format_of(format or ("jsonl" if json_lines else None), output)
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
        for start in tqdm(range(0, len(studies), 32), desc="predict", disable=quiet or len(studies) <= 32):
            found += pipeline.predict(studies[start : start + 32])
        answers = [Answer(prediction, one["images"]) for prediction, one in zip(found, studies, strict=True)]
        name = pipeline.spec.name
        if format is None:
            for prediction in found:
                _print(f"{prediction.study_id}: {prediction}")
        elif output is None:
            typer.echo(as_text(answers, format, name), nl=False)
        else:
            for file in write(answers, format, output, model=name, data=pipeline.spec.data):
                _print(f"written: {file}")


@app.command()
def serve(
    run: Annotated[str, typer.Argument(help="a run folder, or the spec that was fitted", metavar="RUN")],
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


@app.command()
def pictures(
    run: Annotated[str, typer.Argument(help="a run folder, or the spec that was fitted", metavar="RUN")],
    files: Annotated[Optional[list[Path]], typer.Argument(help="DICOM, PNG, JPEG or TIFF files")] = None,
    output: Annotated[Optional[Path], typer.Option(help="where they go; pictures/ of the run folder")] = None,
    quiet: Quiet = False,
) -> None:
    """Draw what a pre-trained model makes of images: masked, reconstructed, errors, attention, components.

    Without files it draws the validation studies that the fit drew after each epoch.

    Example: medxray pictures runs/hd-mae-phantom chest.dcm --output drawn
    """
    with _mistakes():
        for file in _open(run, None).pictures(list(files) if files else None, output, progress=not quiet):
            _print(str(file))


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="a run folder, or the spec that was fitted", metavar="RUN")],
    folder: Annotated[Path, typer.Argument(help="gets what is written", metavar="FOLDER")],
    format: Annotated[
        Optional[str], typer.Option(help="timm, transformers or medxray; what suits the task by default")
    ] = None,
    spec: OfFile = None,
) -> None:
    """Write what a run has learned as timm or transformers read it, or as a medxray folder that needs nothing else.

    \b
    Examples:
      medxray export runs/mae-224 vit-cxr --format transformers
      medxray export runs/r2gencsr-iu-xray r2gencsr
    """
    with _mistakes():
        written = _open(run, None, spec).export(folder, format)
        _print(f"written: {written}")
        for part in sorted(path for path in written.iterdir() if path.is_dir()):
            _print(f"  {part.name}")


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="a spec, as in fit, or a registered encoder", metavar="NAME")],
    settings: Settings = None,
    image_size: Annotated[
        Optional[str], typer.Option(help="pixels a side, or HEIGHTxWIDTH", metavar="PIXELS")
    ] = None,
) -> None:
    """Print a resolved spec, or an encoder alone, with its parameters, tokens, FLOP and memory; no data are needed.

    \b
    Examples:
      medxray show r2gencsr-phantom encoder.name=vmamba
      medxray show vmamba size=base
      medxray show vit size=large --image-size 1280
    """
    with _mistakes():
        import yaml

        import medxray
        from medxray.registry import nearest, registry_of
        from medxray.spec import Spec, packaged
        from medxray.summary import spec_of_encoder, summarise, summarise_encoder
        from medxray.types import SpecError

        size, settings = _sides(image_size), list(settings or [])
        encoders, specs = registry_of("encoder").names(), packaged()
        if name == "encoder" and settings:
            name, *settings = settings
        if name in specs or Path(name).suffix in (".yaml", ".yml") or (name not in encoders and Path(name).exists()):
            settings += [f"data.image_size={size}"] if size else []
            _print(Spec.read(name, settings).to_yaml())
            found = summarise(medxray.build(name, settings))
        elif name in encoders:
            spec = spec_of_encoder(name, settings, size)
            found = summarise_encoder(spec)
            _print(yaml.safe_dump({"encoder": spec.to_dict()["encoder"]}, sort_keys=False))
        else:
            raise SpecError(
                f"no spec or encoder {name!r}{nearest(name, [*specs, *encoders])} "
                f"(specs: {', '.join(specs)}, or a YAML file; encoders: {', '.join(encoders)})"
            )
        for line, value in found.items():
            _print(f"{line + ':':<34} {value}")


@app.command("list")
def list_parts(
    kind: Annotated[Optional[str], typer.Argument(help="a section of a spec, such as encoder, or specs")] = None,
    name: Annotated[Optional[str], typer.Argument(help="one part")] = None,
) -> None:
    """List registered parts with their settings, public weights that encoders read, and the packaged specs.

    Example: medxray list encoder vit
    """
    with _mistakes():
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
        if kind in (None, "specs", "spec"):
            _print("specs")
            for spec in packaged():
                _print(f"  {spec}")
        for section in SECTIONS if kind is None else [kind] if kind in SECTIONS else []:
            registry = registry_of(section)
            _print(section)
            for part in [name] if name else registry.names():
                model = registry.settings_of(part)
                _print(f"  {part}: {model.__doc__}")
                if kind is not None and section != "task":
                    for key, kind_of, default, text in describe_settings(model):
                        _print(f"    {key} ({kind_of}, {default}){': ' + text if text else ''}")
                if section == "encoder" and kind is not None:
                    for family in [f for f in FAMILIES if f.encoder == part]:
                        _print(f"    reads {family.name} ({family.files}): {family.example}")


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
    source: Annotated[Optional[str], typer.Argument(help="a reader, or a spec, as in fit", metavar="READER")] = None,
    out: Annotated[Optional[Path], typer.Argument(help="gets the shards", metavar="FOLDER")] = None,
    settings: Annotated[
        Optional[list[str]], typer.Argument(help="settings of the data, as key=value", metavar="[KEY=VALUE]...")
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
    with _mistakes():
        from medxray.data import data_of, verify_shards, write_shards
        from medxray.types import SpecError

        if verify is not None:
            if source is not None:
                raise SpecError(f"--verify makes no shards; leave out {source!r}")
            _print(f"verified: {verify}: {_amounts(verify_shards(verify, progress=not quiet))}")
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
        _print(f"written: {out}: {_amounts(found)}")
        for one in found["skipped"][:5]:
            _print(f"  skipped {' '.join(filter(None, (one['study'], one['file'])))}: {one['reason']}".replace(" : ", ": "))
        if len(found["skipped"]) > 5:
            _print(f"  and {len(found['skipped']) - 5} more, in {out / 'manifest.json'}")


def _amounts(manifest: dict[str, Any]) -> str:
    return (
        f"{len(manifest['files']):,} shards, {manifest['studies']:,} studies, {manifest['images']:,} images, "
        f"{manifest['bytes'] / 2**20:,.1f} MiB"
    )


@app.command()
def inspect(
    source: Annotated[str, typer.Argument(help="a reader, a spec, as in fit, or a data set's folder", metavar="DATA")],
    settings: Annotated[
        Optional[list[str]], typer.Argument(help="settings of the data, as key=value", metavar="[KEY=VALUE]...")
    ] = None,
    out: Annotated[Path, typer.Option(help="gets the card")] = Path("card.html"),
    images: Annotated[Optional[int], typer.Option(min=1, help="look at so many images only, chosen by the seed")] = None,
    seed: Annotated[int, typer.Option(min=0, help="chooses the images that are looked at and shown")] = 0,
    workers: Annotated[Optional[int], typer.Option(min=1, help="processes; one a core by default")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="exit with 3 where something leaks")] = False,
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
    with _mistakes():
        import json

        from rich.console import Console
        from rich.table import Table

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
        table = Table("", "studies", "patients", "images", "reports", box=None, pad_edge=False)
        for split, counts in found.splits.items():
            numbers = (counts.studies, counts.patients, counts.images, counts.reports)
            table.add_row(split or "all", *(f"{number:,}" for number in numbers))
        Console().print(table)
        for line in verdict(found):
            _print(line)
        _print(f"card: {out}")
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
    with _mistakes():
        from medxray.demo import run

        run(folder, progress=not quiet, say=_print)


@app.command()
def doctor() -> None:
    """Print what is installed, what is missing, and which scan and attention back-ends run here.

    Example: medxray doctor
    """
    with _mistakes():
        from medxray.summary import diagnose

        for line in diagnose():
            _print(line)


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
    import re

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


def _is_main() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _print(text: str) -> None:
    typer.echo(text)


@contextlib.contextmanager
def _mistakes() -> Iterator[None]:
    """One clear message and exit code 2 for a user's mistake."""
    from medxray.types import MedxrayError

    try:
        yield
    except MedxrayError as error:
        typer.echo(f"medxray: {error}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("medxray: interrupted; run the same command again to go on", err=True)
        sys.exit(130)


def main() -> None:
    """Entry point of the `medxray` command."""
    app()


if __name__ == "__main__":
    main()
