"""A request's study, and what is answered of it."""

import asyncio
import functools
import io
import json
from collections.abc import Callable
from contextlib import asynccontextmanager
from pathlib import PurePath
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.datastructures import UploadFile

from medxray.outputs import row
from medxray.outputs.dicom_sr import structured_report
from medxray.outputs.fhir import diagnostic_report
from medxray.serve.gate import Refusal, SentStudy, Service
from medxray.types import Prediction

JSON, FHIR, DICOM, NPY = "application/json", "application/fhir+json", "application/dicom", "application/x-npy"
DICOM_JSON = "application/dicom+json"


def accepts(*kinds: str) -> Callable[[Request], str]:
    """The first of `kinds` that the header Accept likes best (RFC 9110, 12.5.1)."""

    def choose(request: Request) -> str:
        liked: dict[str, float] = {}
        for part in request.headers.get("accept", "*/*").lower().split(","):
            name, *parameters = (piece.strip() for piece in part.split(";"))
            weights = [piece[2:] for piece in parameters if piece.startswith("q=")]
            try:
                liked[name] = float(weights[0]) if weights else 1.0
            except ValueError:
                liked[name] = 0.0

        def weight(kind: str) -> float:
            return next((liked[name] for name in (kind, f"{kind.split('/')[0]}/*", "*/*") if name in liked), 0.0)

        best = max(kinds, key=weight)
        if weight(best) <= 0:
            raise Refusal(406, "accept", f"expected Accept to have one of {', '.join(kinds)}")
        return best

    return choose


@asynccontextmanager
async def study_of(request: Request, service: Service) -> Any:
    """The study of a request, whose files are open as long as it lasts."""
    limits, kind = service.limits, request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == DICOM_JSON:
        content = await request.body()
        files = await service.work(_from_dicom_json, content, limits.max_files)
        yield SentStudy("study", [functools.partial(bytes, file) for file in files])
        return
    if kind != "multipart/form-data":
        raise Refusal(415, "content", f"expected multipart/form-data with files of one study, or {DICOM_JSON}")
    async with request.form(max_files=limits.max_files, max_fields=8) as form:
        files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
        if not files:
            raise Refusal(422, "study", "no file; expected the views of one study as files of the form, frontal first")
        name = form.get("study_id")
        name = name if isinstance(name, str) and name else PurePath(files[0].filename or "").stem or "study"

        yield SentStudy(name[:200], [functools.partial(_content, file) for file in files])


def _content(file: UploadFile) -> bytes:
    file.file.seek(0)
    return file.file.read()


async def answered(service: Service, kind: str, study: SentStudy) -> Any:
    seconds = service.limits.timeout
    try:
        async with asyncio.timeout(seconds):
            return await service.batcher(kind, await service.work(service.read, study))
    except TimeoutError:
        raise Refusal(504, "time", f"no answer within {seconds:g} seconds; ask again later") from None


def said(kind: str, prediction: Prediction, study: SentStudy, model: str) -> Response:
    if kind == JSON:
        return JSONResponse(row(prediction))
    images = [part() for part in study.parts]
    if kind == FHIR:
        return JSONResponse(diagnostic_report(prediction, images, model=model), media_type=FHIR)
    return Response(structured_report(prediction, images, model=model), media_type=DICOM)


def _from_dicom_json(content: bytes, most: int) -> list[bytes]:
    """DICOM files out of the DICOM JSON model (PS3.18 F), whose pixels stand in it, in native little endian."""
    import pydicom
    from pydicom.uid import ExplicitVRLittleEndian

    try:
        items = json.loads(content)
        items = items if isinstance(items, list) else [items]
        if len(items) > most:
            raise Refusal(413, "request", f"more than {most} files")
        files = []
        for i, item in enumerate(items):
            if "InlineBinary" not in item.get("7FE00010", {}):
                raise Refusal(
                    422, "study", f"file {i + 1}: DICOM JSON without pixels; put them into 7FE00010 as InlineBinary, since a "
                    "BulkDataURI is not fetched, or send the file",
                )  # fmt: skip
            data = pydicom.Dataset.from_json({tag: value for tag, value in item.items() if not tag.startswith("0002")})
            data.file_meta = pydicom.dataset.FileMetaDataset()
            data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
            file = io.BytesIO()
            data.save_as(file, enforce_file_format=True)
            files.append(file.getvalue())
    except Refusal:
        raise
    # Whatever a damaged document makes the libraries stumble over; their messages repeat it.
    except Exception as error:
        raise Refusal(422, "study", f"not the DICOM JSON model ({type(error).__name__})") from None
    return files
