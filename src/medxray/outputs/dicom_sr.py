"""A prediction as a DICOM structured report: Enhanced SR by template TID 2000, Basic Diagnostic Imaging Report.

A structured report belongs to a patient's study and is filed there: it copies the patient and study modules of its
source, identifiers and all. Nothing else here lets an identity through.
"""

import io
import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from medxray.outputs import quiet, study_headers, version
from medxray.types import DataError, MedxrayError, Prediction, RunError

if TYPE_CHECKING:
    from pydicom import Dataset

_NEEDED = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID")
_MAY_BE_EMPTY = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate", "StudyTime",
)  # fmt: skip
_UTF_8 = "ISO_IR 192"


def structured_report(prediction: Prediction, images: Sequence[Any], *, model: str) -> bytes:
    """A DICOM file with the report of one study, unverified and preliminary; its observer is the model.

    The text is a Finding below Findings, as are probabilities, in percent as Certainty of Finding; each is inferred from
    the study's images.

    Args:
        prediction: a text or probabilities.
        images: the DICOM files of the study.
        model: name of the run.

    Raises:
        DataError: a file is no DICOM or lacks identifiers, or they are of several studies. No message repeats one.
        RunError: highdicom is not installed.
    """
    sources = study_headers(images)
    if not images or len(sources) < len(images):
        raise DataError(
            f"a DICOM structured report needs DICOM sources, whose patient and study it belongs to; {len(images) - len(sources)} "
            f"of {len(images)} files are not; take fhir or jsonl, or the DICOM files"
        )
    for i, source in enumerate(sources):
        missing = [name for name in _NEEDED if not source.get(name)]
        if missing:
            raise DataError(f"file {i + 1}: DICOM without {', '.join(missing)}, to which a structured report would refer")
    try:
        with quiet():
            return _bytes(_report(prediction, sources, model))
    except MedxrayError:
        raise
    # Messages of the libraries below repeat values.
    except Exception as error:
        raise DataError(
            f"the patient or study attributes of the DICOM source are not valid ({type(error).__name__}); a structured report "
            "has to copy them; mend them at their source, or take fhir or jsonl"
        ) from None


def _report(prediction: Prediction, sources: Sequence["Dataset"], model: str) -> "Dataset":
    try:
        import highdicom
        from highdicom import sr
    except ImportError:
        raise RunError("dicom-sr needs highdicom; pip install 'medxray[interchange]'") from None
    from pydicom.sr.codedict import codes
    from pydicom.uid import generate_uid

    # It tells of names that look odd to it.
    logging.getLogger("highdicom").setLevel(logging.CRITICAL)
    for source in sources:
        source.decode()
        for name in _MAY_BE_EMPTY:
            if name not in source:
                setattr(source, name, "")

    def with_images(item: Any) -> Any:
        item.ContentSequence = sr.ContentSequence([
            *item.get("ContentSequence", []),
            *(
                sr.ImageContentItem(
                    codes.DCM.SourceImage, source.SOPClassUID, source.SOPInstanceUID, relationship_type="INFERRED FROM"
                )
                for source in sources
            ),
        ])
        return item

    device = sr.DeviceObserverIdentifyingAttributes(
        uid=generate_uid(entropy_srcs=[model, version()]), name=model, manufacturer_name="medxray", model_name=model
    )
    observer = sr.ObserverContext(codes.DCM.Device, device)
    findings = sr.ContainerContentItem(codes.DCM.Findings, relationship_type="CONTAINS")
    findings.ContentSequence = sr.ContentSequence()
    if prediction.text:
        findings.ContentSequence.append(
            with_images(sr.TextContentItem(codes.DCM.Finding, prediction.text, relationship_type="CONTAINS"))
        )
    for i, (label, value) in enumerate(prediction.scores.items()):
        if not math.isfinite(value):
            continue
        # Labels are a run's own words; no standard says what a data set meant by them.
        coded = sr.CodedConcept(f"LABEL-{i + 1}", "99MEDXRAY", label[:64])
        finding = sr.CodeContentItem(codes.DCM.Finding, coded, relationship_type="CONTAINS")
        certainty = sr.NumContentItem(
            codes.DCM.CertaintyOfFinding, round(100 * value, 4), codes.UCUM.Percent, relationship_type="HAS PROPERTIES"
        )
        finding.ContentSequence = sr.ContentSequence([certainty])
        findings.ContentSequence.append(with_images(finding))
    root = sr.ContainerContentItem(codes.LN.DiagnosticImagingReport, template_id="2000")
    root.ContentSequence = sr.ContentSequence([*sr.ObservationContext(observer_device_context=observer), findings])
    return sr.EnhancedSR(
        evidence=sources,
        content=root,
        series_instance_uid=highdicom.UID(),
        series_number=1,
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="medxray",
        manufacturer_model_name=model[:64],
        software_versions=version(),
        series_description="Draft report by a model",
        is_complete=True,
        is_final=False,
        is_verified=False,
        specific_character_set=_UTF_8,
    )


def _bytes(report: "Dataset") -> bytes:
    file = io.BytesIO()
    report.save_as(file, enforce_file_format=True)
    return file.getvalue()
