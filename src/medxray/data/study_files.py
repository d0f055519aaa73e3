"""Studies out of files alone, without a data set around them."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from medxray.data.dicom_headers import HEADER, Header
from medxray.data.images import read_header
from medxray.types import DataError, ImageError

_FRONTAL_FIRST = {"PA": 0, "AP": 0, "unknown": 1, "LL": 2}


def studies_in(paths: Sequence[Path]) -> tuple[list[dict[str, Any]], list[str]]:
    """What `Pipeline.predict` takes: of each file a study, and of each folder all that lie below it.

    In a folder DICOM files of one Study Instance UID are one study, frontal views first; any other image is a study.

    Returns:
        Studies, each with "study_id" and "images"; a study of a folder is called by its first file's path below it. And a
        message for each file of a folder that is no image.

    Raises:
        DataError: a folder without images.
    """
    studies: list[dict[str, Any]] = []
    left_out: list[str] = []
    for path in paths:
        if not path.is_dir():
            studies.append({"study_id": path.stem, "images": [path]})
            continue
        found = list(_below(path, left_out))
        if not found:
            raise DataError(f"{path}: a folder without images; expected DICOM, PNG, JPEG or TIFF files in it")
        studies += found
    return studies, left_out


def _below(folder: Path, left_out: list[str]) -> Iterator[dict[str, Any]]:
    groups: dict[str, list[tuple[int, Path]]] = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        try:
            header = read_header(file)
        except ImageError as error:
            left_out.append(str(error))
            continue
        uid = _study(file) if header.format == "DICOM" else ""
        groups.setdefault(uid or str(file), []).append((_FRONTAL_FIRST[header.view], file))
    for views in groups.values():
        images = [file for _, file in sorted(views, key=lambda view: view[0])]
        yield {"study_id": images[0].relative_to(folder).with_suffix("").as_posix(), "images": images}


def _study(file: Path) -> str:
    import pydicom

    try:
        return Header(pydicom.dcmread(file, force=True, stop_before_pixels=True, specific_tags=list(HEADER)))["study"]
    # A header that was read before for its image; what else is wrong in it is told when it is decoded.
    except Exception:
        return ""
