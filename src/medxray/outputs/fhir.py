"""A prediction as a FHIR R4 DiagnosticReport (http://hl7.org/fhir/R4/diagnosticreport.html), as plain values for JSON.

It is preliminary, labelled as asserted by a machine, and names nobody: patient and study are keyed hashes.
"""

import base64
import math
import re
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any

from medxray.data.dicom_headers import Header
from medxray.data.privacy import Names, find_key
from medxray.outputs import study_headers, version
from medxray.types import Prediction

_TERMINOLOGY = "http://terminology.hl7.org/CodeSystem"
_CHEST_VIEWS = {"coding": [{"system": "http://loinc.org", "code": "30745-4", "display": "XR Chest Views"}]}
"""LOINC's term for chest radiographs of any number of views."""

_MACHINE = {
    "system": f"{_TERMINOLOGY}/v3-ObservationValue", "code": "AIAST", "display": "Artificial Intelligence asserted",
}  # fmt: skip
_UNKNOWN = {"coding": [{"system": f"{_TERMINOLOGY}/data-absent-reason", "code": "unknown"}]}
_NOTICE = "Draft by a model for research; not reviewed by a person."
# What neither XHTML nor a FHIR string may hold.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


def diagnostic_report(
    prediction: Prediction, images: Sequence[Any], *, model: str, issued: datetime | None = None
) -> dict[str, Any]:
    """A DiagnosticReport of one study.

    Args:
        prediction: its text is the conclusion and the attached form; each probability is a contained Observation.
        images: the files of the study. DICOM tells the day (`effectiveDateTime`, without the time, since FHIR wants a time
            zone beside it) and the patient and study, hashed by the user's key (`medxray.data.privacy`), as `dicom-folder`
            names them.
        model: name of the run.
        issued: now if None.

    Raises:
        DataError: DICOM files of several patients or studies.
    """
    text = _CONTROL.sub("", prediction.text).strip()
    about, day = _about(images)
    coding = {"system": f"{_TERMINOLOGY}/v2-0074", "code": "RAD", "display": "Radiology"}
    observations = [
        _observation(f"score-{i + 1}", name, value, about, day) for i, (name, value) in enumerate(prediction.scores.items())
    ]
    report = {
        "resourceType": "DiagnosticReport",
        "meta": {"security": [_MACHINE]},
        "text": {"status": "generated", "div": _narrative(text, prediction.scores, model)},
        "contained": [*observations, _device(model)] if observations else [],
        "identifier": [{"system": "urn:medxray:study", "value": prediction.study_id}],
        "status": "preliminary",
        "category": [{"coding": [coding]}],
        "code": _CHEST_VIEWS,
        **about,
        "effectiveDateTime": day,
        "issued": (issued or datetime.now(UTC)).isoformat(timespec="seconds"),
        "result": [{"reference": f"#{observation['id']}"} for observation in observations],
        "conclusion": text,
        "presentedForm": [_form(text, model)] if text else [],
    }
    # FHIR has no empty values.
    return {key: value for key, value in report.items() if value}


def bundle(resources: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Resources as a Bundle of type collection."""
    entries = [{"fullUrl": f"urn:uuid:{uuid.uuid4()}", "resource": resource} for resource in resources]
    return {"resourceType": "Bundle", "type": "collection", "entry": entries}


def _about(images: Sequence[Any]) -> tuple[dict[str, Any], str]:
    """Whom and what a report is about, as hashed references, and the day; what DICOM does not tell is left out."""
    headers = [Header(data) for data in study_headers(images)]
    if not headers:
        return {}, ""
    header, names = headers[0], Names(find_key())
    about: dict[str, Any] = {}
    if header["patient"]:
        # As readers name a patient without and with an issuer.
        issuer = header["issuer"]
        name = names("patient", header["patient"], issuer) if issuer else names("number", header["patient"])
        about["subject"] = {"type": "Patient", "identifier": {"system": "urn:medxray:patient", "value": name}}
    if header["study"]:
        name = names("study", header["study"])
        about["imagingStudy"] = [{"type": "ImagingStudy", "identifier": {"system": "urn:medxray:imaging-study", "value": name}}]
    day = header.moment()[1]
    try:
        return about, datetime.strptime(day, "%Y%m%d").date().isoformat() if day else ""
    except ValueError:
        return about, ""


def _observation(name: str, label: str, value: float, about: dict[str, Any], day: str) -> dict[str, Any]:
    known = math.isfinite(value)
    observation = {
        "resourceType": "Observation",
        "id": name,
        "meta": {"security": [_MACHINE]},
        "status": "preliminary",
        "category": [{"coding": [{"system": f"{_TERMINOLOGY}/observation-category", "code": "imaging"}]}],
        "code": {"text": f"Probability of {_CONTROL.sub('', label)}"},
        "subject": about.get("subject"),
        "effectiveDateTime": day,
        "valueQuantity": {"value": value, "system": "http://unitsofmeasure.org", "code": "1"} if known else None,
        "dataAbsentReason": None if known else _UNKNOWN,
        "device": {"reference": "#model"},
    }
    return {key: value for key, value in observation.items() if value}


def _device(model: str) -> dict[str, Any]:
    return {
        "resourceType": "Device",
        "id": "model",
        "deviceName": [{"name": model, "type": "model-name"}],
        "version": [{"value": f"medxray {version()}"}],
        "note": [{"text": _NOTICE}],
    }


def _form(text: str, model: str) -> dict[str, Any]:
    data = base64.b64encode(text.encode()).decode("ascii")
    return {"contentType": "text/plain; charset=utf-8", "data": data, "title": f"Draft by {model}, medxray {version()}"}


def _narrative(text: str, scores: dict[str, float], model: str) -> str:
    said = "".join(f"<p>{escape(line)}</p>" for line in text.splitlines() if line.strip())
    values = {_CONTROL.sub("", name): f"{value:.3f}" if math.isfinite(value) else "unknown" for name, value in scores.items()}
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{value}</td></tr>" for name, value in values.items())
    said += f"<table><tbody>{rows}</tbody></table>" if rows else ""
    notice = f"<p>{_NOTICE} Model {escape(model)}, medxray {escape(version())}.</p>"
    return f'<div xmlns="http://www.w3.org/1999/xhtml">{said}{notice}</div>'
