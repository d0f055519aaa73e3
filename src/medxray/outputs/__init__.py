"""What is said of studies, in forms that others read: tables, one page, FHIR R4, DICOM structured reports."""

import csv
import dataclasses
import io
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from medxray import disk
from medxray.data import read_header, read_image
from medxray.data.dicom_headers import Header
from medxray.data.images import MAX_PIXELS
from medxray.registry import nearest
from medxray.types import DataError, Prediction, RunError

if TYPE_CHECKING:
    import pyarrow as arrow
    from pydicom import Dataset

    from medxray.spec import DataSpec

FORMATS = {"csv": ".csv", "jsonl": ".jsonl", "parquet": ".parquet", "fhir": ".json", "dicom-sr": ".dcm", "html": ".html"}
"""Names of the forms, each with the ending of its files."""

CLINICAL = ("fhir", "dicom-sr")
"""Forms that have place for a report or probabilities alone."""

_THUMBNAIL = 320
_LONGEST = 56
_STYLES = (
    "article{display:flex;flex-wrap:wrap;gap:12px 24px;padding:16px 20px;margin:0 0 16px}"
    "article h3{flex-basis:100%;margin:0}article div{flex:1 1 280px}article p{max-width:72ch;margin:0;white-space:pre-wrap}"
    "article img{max-width:100%;height:auto}article td{padding-right:16px}"
)


class Answer(NamedTuple):
    """What is said of a study, and the files or their bytes that it was said of."""

    prediction: Prediction
    images: Sequence[str | Path | bytes]


def row(prediction: Prediction) -> dict[str, Any]:
    """The columns of every table, the same for all tasks: the fields of a `Prediction`, nested ones as they are."""
    return dataclasses.asdict(prediction)


def as_text(answers: Sequence[Answer], format: str, model: str) -> str:
    """Answers as csv, jsonl or fhir.

    Args:
        answers: one a study.
        format: in CSV what is nested is JSON, and a text that a spreadsheet would take for a formula begins with an
            apostrophe; FHIR is one DiagnosticReport, or a Bundle of several.
        model: name of the run, which FHIR tells.

    Raises:
        RunError: the form is no text.
        DataError: see `medxray.outputs.fhir.diagnostic_report`.
    """
    rows = [row(answer.prediction) for answer in answers]
    if format == "jsonl":
        return "".join(json.dumps(one) + "\n" for one in rows)
    if format == "csv":
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(field.name for field in dataclasses.fields(Prediction))
        writer.writerows([_cell(v) if isinstance(v, str) else json.dumps(v) for v in one.values()] for one in rows)
        return text.getvalue()
    if format == "fhir":
        from medxray.outputs.fhir import bundle, diagnostic_report

        reports = [diagnostic_report(*answer, model=model) for answer in answers]
        return json.dumps(reports[0] if len(reports) == 1 else bundle(reports), indent=1) + "\n"
    raise RunError(f"{format} is no text; name a file for it with --output")


def write(answers: Sequence[Answer], format: str, output: Path, *, model: str, data: "DataSpec") -> list[Path]:
    """Writes answers in one of `FORMATS`; a file that is there is replaced only once the new one is complete.

    Args:
        answers: one a study.
        format: how.
        output: a file. Of dicom-sr one file a study: a folder, or a file ending in .dcm where there is one study.
        model: name of the run.
        data: how images are read that the page shows.

    Returns:
        The files.

    Raises:
        RunError: a file cannot be written.
        DataError: the form needs something that the study's files lack, such as DICOM's identifiers.
    """
    if format == "html":
        _page(answers, output, model, data)
        return [output]
    if format == "dicom-sr":
        from medxray.outputs.dicom_sr import structured_report

        files = [output] if output.suffix == ".dcm" and len(answers) == 1 else _names(answers, output)
        # All are made before one is written, so that a study that fails leaves nothing.
        contents = [structured_report(*answer, model=model) for answer in answers]
    elif format == "parquet":
        files, contents = [output], [_parquet(answers)]
    else:
        files, contents = [output], [as_text(answers, format, model).encode()]
    for file, content in zip(files, contents, strict=True):
        _put(file, content)
    return files


def study_headers(images: Sequence[Any]) -> list["Dataset"]:
    """The headers, without pixels, of those images of one study that are DICOM files, in order.

    Raises:
        ImageError: a file that cannot be read.
        DataError: they are of several patients or studies; the message repeats no identifier.
    """
    import pydicom

    from medxray.data.dicom import inflated

    found = []
    for i, image in enumerate(images):
        if not isinstance(image, (str, Path, bytes)) or read_header(image, name=f"file {i + 1}").format != "DICOM":
            continue
        with io.BytesIO(image) if isinstance(image, bytes) else open(image, "rb") as file, quiet():
            found.append(pydicom.dcmread(inflated(file, f"file {i + 1}", MAX_PIXELS), force=True, stop_before_pixels=True))
    for what, names in (("patients", ("patient", "issuer")), ("studies", ("study",))):
        told = {tuple(header[name] for name in names) for header in map(Header, found)}
        if len(told) > 1:
            raise DataError(f"files of {len(told)} {what}; expected the views of one study; give each study by itself")
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """Without pydicom's warnings, which repeat what they are about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def version() -> str:
    """Of this library, as outputs tell it."""
    return metadata.version("medxray")


def _cell(text: str) -> str:
    """A text that ends no row, and that no spreadsheet runs."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\n")) else text


def _names(answers: Sequence[Answer], folder: Path) -> list[Path]:
    """A file for each study in a folder, by its name; those of the same name are numbered."""
    files: list[Path] = []
    for answer in answers:
        stem = "".join(c if c.isalnum() or c in "-_." else "_" for c in answer.prediction.study_id).lstrip(".")
        # A name may have 255 bytes, a letter up to four.
        stem = stem[:_LONGEST] or "study"
        file, number = folder / f"{stem}.dcm", 2
        while file in files:
            file, number = folder / f"{stem}-{number}.dcm", number + 1
        files.append(file)
    return files


def table(predictions: Sequence[Prediction]) -> "arrow.Table":
    """The columns of `row` as a table, of the same types for all tasks and any number of studies."""
    import pyarrow as arrow

    def named(value: arrow.DataType) -> arrow.DataType:
        return arrow.map_(arrow.string(), value)

    text, numbers = arrow.string(), arrow.list_(arrow.float64())
    types = {
        "study_id": text, "text": text, "scores": named(arrow.float64()), "context": named(arrow.list_(text)),
        "similarity": named(numbers), "log_probabilities": numbers, "tokens": arrow.list_(text),
    }  # fmt: skip
    rows = [
        {key: list(value.items()) if isinstance(value, dict) else value for key, value in row(prediction).items()}
        for prediction in predictions
    ]
    return arrow.Table.from_pylist(rows, schema=arrow.schema(types))


def _parquet(answers: Sequence[Answer]) -> bytes:
    from pyarrow import parquet

    buffer = io.BytesIO()
    parquet.write_table(table([answer.prediction for answer in answers]), buffer)
    return buffer.getvalue()


def _page(answers: Sequence[Answer], output: Path, model: str, data: "DataSpec") -> None:
    from medxray.visual.page import image_tag, write_page

    def thumbnail(image: Any, description: str) -> str:
        size = (_THUMBNAIL, _THUMBNAIL)
        pixels = read_image(image, max_pixels=data.max_pixels, at_least=size, name=description, **data.shown)
        return image_tag(pixels[0], _THUMBNAIL, description, quality=80)

    articles = ""
    for prediction, images in answers:
        name = prediction.study_id
        pictures = "".join(thumbnail(image, f"{name}, view {i + 1}") for i, image in enumerate(images))
        said = f"<p>{escape(prediction.text)}</p>" if prediction.text else ""
        if prediction.scores:
            lines = "".join(f"<tr><td>{escape(k)}</td><td>{v:.3f}</td></tr>" for k, v in prediction.scores.items())
            said += f"<table><tbody>{lines}</tbody></table>"
        articles += f"<article><h3>{escape(name)}</h3>{pictures}<div>{said or '<p>Nothing was said.</p>'}</div></article>"
    intro = f"<p>{len(answers):,} {'study' if len(answers) == 1 else 'studies'}, by medxray {escape(version())}. Drafts.</p>"
    write_page(output, model, intro, {"Studies": articles}, _STYLES)


def _put(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with disk.replacing(path) as staged:
            staged.write_bytes(content)
    except OSError as error:
        raise RunError(f"{path} cannot be written ({error.strerror}); name another place with --output") from None


def format_of(format: str | None, output: Path | None) -> str | None:
    """The form that is asked for by name, or else by the ending of a file; None where nothing is asked for.

    Raises:
        RunError: there is no such form, or it takes a file and none is named.
    """
    if format is None and output is not None:
        format = next((name for name, ending in FORMATS.items() if ending == output.suffix.lower()), None)
        if format is None:
            raise RunError(f"--output {output}: its ending is none of {', '.join(FORMATS.values())}; name a --format too")
    if format is not None and format not in FORMATS:
        raise RunError(f"--format: no form {format!r}{nearest(format, FORMATS)} (found: {', '.join(FORMATS)})")
    if format in ("parquet", "dicom-sr", "html") and output is None:
        raise RunError(f"--format {format} is no text for a terminal; name a file by --output")
    return format


def check_format(format: str, task: str) -> None:
    """Raises RunError where a task says nothing that a form has place for."""
    if format in CLINICAL and task == "pretrain":
        raise RunError(f"{format} takes a report or probabilities; task {task} has neither; take csv, jsonl, parquet or html")
