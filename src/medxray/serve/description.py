"""What the service takes and answers, described for machines and for readers."""

import tempfile
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from medxray.serve.gate import Limits
from medxray.serve.requests import DICOM_JSON, JSON
from medxray.visual.page import write_page


def answers(content: dict[str, Any]) -> dict[int | str, dict[str, Any]]:
    """What a POST answers, for the OpenAPI page."""
    reasons: dict[int | str, str] = {
        401: "no token, or a wrong one", 406: "none of these forms is accepted", 408: "the request came too slowly",
        413: "too many bytes or files", 415: "another content type", 422: "a file or study that cannot be used, and why",
        503: "busy or stopping; see Retry-After", 504: "no answer in time",
    }  # fmt: skip
    schema = {"type": "object", "properties": {"error": {"type": "object", "properties": {
        "code": {"type": "string"}, "message": {"type": "string"}}}}}  # fmt: skip
    errors = {status: {"description": reason, "content": {JSON: {"schema": schema}}} for status, reason in reasons.items()}
    return {200: {"description": "the answer", "content": content}} | errors


def body_of(limits: Limits) -> dict[str, Any]:
    form = {
        "type": "object", "required": ["files"],
        "properties": {
            "files": {"type": "array", "maxItems": limits.max_files, "items": {"type": "string", "format": "binary"},
                      "description": "views of one study, frontal first: DICOM, PNG, JPEG or TIFF"},
            "study_id": {"type": "string", "description": "name of the study; the first file's if left out"},
        },
    }  # fmt: skip
    dicom = {"type": "array", "items": {"type": "object"}, "description": "DICOM JSON with pixels as InlineBinary"}
    content = {"multipart/form-data": {"schema": form}, DICOM_JSON: {"schema": dicom}}
    return {"requestBody": {"required": True, "content": content}}


def page_of(app: FastAPI, limits: Limits) -> str:
    """The OpenAPI description for a reader, which needs nothing from elsewhere."""
    sections = {}
    for path, operations in app.openapi()["paths"].items():
        for method, operation in operations.items():
            answers = "".join(
                f"<tr><td>{status}</td><td>{escape(answer['description'])}</td>"
                f"<td>{escape(', '.join(answer.get('content', {})))}</td></tr>"
                for status, answer in operation["responses"].items()
            )
            text = escape(operation.get("description", ""))
            takes = ", ".join(operation.get("requestBody", {}).get("content", {}))
            sections[f"{method.upper()} {path}"] = (
                f"<p>{escape(operation['summary'])}. {text}</p>" + (f"<p>Takes {escape(takes)}.</p>" if takes else "")
                + f'<div class="scroll"><table><tbody>{answers}</tbody></table></div>'
            )  # fmt: skip
    example = "curl -H 'Authorization: Bearer TOKEN' -F files=@frontal.dcm -F files=@lateral.dcm ADDRESS/v1/reports"
    sections["Example"] = f"<pre>{escape(example)}</pre>"
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{value:,}</td></tr>" for name, value in asdict(limits).items())
    sections["Limits"] = f"<table><tbody>{rows}</tbody></table>"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "page.html"
        write_page(file, app.title, '<p>Described for machines in <a href="/openapi.json">openapi.json</a>.</p>', sections)
        return file.read_text(encoding="utf-8")
