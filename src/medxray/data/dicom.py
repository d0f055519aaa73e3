"""Radiographs out of DICOM files: stored values, and from them what a viewer shows (PS3.3 C.7.6.3, C.11).

Only the few attributes below are ever looked at, so that no name, date or identifier can reach a message.
"""

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any, BinaryIO, Literal, TypeVar

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.pixels import pixel_array
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGLSTransferSyntaxes,
    RLELossless,
)

from medxray.data.attributes import sex_of
from medxray.data.dicom_headers import Header
from medxray.data.images import EXPECTED, ImageHeader, check_size, codestream, gray, in_words, no_memory_for, white_of
from medxray.types import ImageError

_IMAGE = (
    "SOPClassUID", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames", "Rows",
    "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue",
    "PixelPaddingRangeLimit", "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence", "VOILUTSequence",
    "WindowCenter", "WindowWidth", "VOILUTFunction", "PresentationLUTShape", "PresentationLUTSequence",
    "RedPaletteColorLookupTableDescriptor", "GreenPaletteColorLookupTableDescriptor",
    "BluePaletteColorLookupTableDescriptor", "RedPaletteColorLookupTableData", "GreenPaletteColorLookupTableData",
    "BluePaletteColorLookupTableData",
)  # fmt: skip
_PIXELS = ("PixelData", "ExtendedOffsetTable", "ExtendedOffsetTableLengths")
_ABOUT = (
    "Manufacturer", "ViewPosition", "ViewCodeSequence", "SeriesDescription", "ProtocolName", "PatientOrientation",
    "SpecificCharacterSet", "BurnedInAnnotation", "PatientSex", "PatientAge",
)  # fmt: skip
_GRAY = ("MONOCHROME1", "MONOCHROME2")
_OTHERS = ("HSV", "ARGB", "CMYK", "YBR_PARTIAL_420", "YBR_PARTIAL_422")
_COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")

Curve = Callable[[NDArray[Any]], NDArray[np.float64]]
"""Values before a stage of display -> values after it."""

_Result = TypeVar("_Result")


def read(
    file: BinaryIO, name: str, *, max_pixels: int, frame: Literal["refuse", "first"], window: int
) -> NDArray[np.float32]:
    """The radiograph in a file, as `medxray.data.read_image` returns it.

    Raises:
        ImageError: as there.
    """

    def shown() -> NDArray[np.float32]:
        data = _open(file, name, (*_IMAGE, *_PIXELS), max_pixels)
        if "PixelData" not in data:
            file.seek(0)
            raise _without_pixels(data, name, file.read())
        frames = _check_pixels(data, name, max_pixels)
        if frames > 1 and frame == "refuse":
            raise ImageError(
                f"{name}: DICOM with {frames} frames; expected one radiograph; export one frame, or set data.frames: first"
            )
        return _display(_stored(data, name), data, name, window)

    return _guarded(shown, name)


def read_header(file: BinaryIO, name: str, max_pixels: int) -> ImageHeader:
    """What a file says of its radiograph, without a look at the pixels.

    Raises:
        ImageError: as `medxray.data.read_header`.
    """

    def said() -> ImageHeader:
        data = _open(file, name, (*_IMAGE, *_ABOUT), max_pixels, pixels=False)
        if "Rows" not in data or "Columns" not in data:
            raise _without_pixels(data, name)
        header = Header(data)
        burned = str(data.get("BurnedInAnnotation") or "").strip().upper()
        return ImageHeader(
            width=_integer(data, "Columns", name, 1, 65535),
            height=_integer(data, "Rows", name, 1, 65535),
            bits=_integer(data, "BitsStored", name, 1, 64),
            format="DICOM",
            photometric=_photometric(data, name),
            manufacturer=str(data.get("Manufacturer") or "").strip(),
            view=header.view(),
            sex=sex_of(header["sex"]),
            age_band=header.age_band(),
            burned_in={"YES": True, "NO": False}.get(burned),
            frames=_integer(data, "NumberOfFrames", name, 1, 2**31, missing=1),
        )

    return _guarded(said, name)


def _guarded(work: Callable[[], _Result], name: str) -> _Result:
    try:
        return work()
    except ImageError:
        raise
    except MemoryError as error:
        raise no_memory_for(name) from error
    # pydicom and its decoders raise anything from struct.error to NotImplementedError; to a user it is all the same.
    except Exception as error:
        raise ImageError(
            f"{name}: a DICOM file that cannot be decoded ({in_words(error)}); expected {EXPECTED}; "
            "fetch the file again, or convert it to PNG"
        ) from error


# Files


def _open(
    file: BinaryIO, name: str, fields: tuple[str, ...], max_pixels: int, pixels: bool = True
) -> pydicom.FileDataset:
    """Some attributes of a file, whose transfer syntax is known then."""
    data = pydicom.dcmread(
        inflated(file, name, max_pixels), force=True, stop_before_pixels=not pixels, specific_tags=list(fields)
    )
    if not data.file_meta.get("TransferSyntaxUID"):
        # A file without meta information is in one of the native syntaxes; pydicom saw which.
        implicit, little = data.original_encoding
        native = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
        data.file_meta.TransferSyntaxUID = ExplicitVRBigEndian if little is False else native
    return data


def inflated(file: BinaryIO, name: str, max_pixels: int) -> BinaryIO:
    """The same file; a deflated data set unpacked, unless it is larger than the largest allowed image.

    pydicom unpacks without a limit.
    """
    head = file.read(2**16)
    file.seek(0)
    start, syntax = _meta_information(head)
    if DeflatedExplicitVRLittleEndian.encode() not in head[:start]:
        return file
    if syntax != DeflatedExplicitVRLittleEndian:
        raise ImageError(f"{name}: DICOM with damaged meta information; expected {EXPECTED}; fetch the file again")
    most = 4 * max_pixels + 2**20
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    file.seek(start)
    try:
        content = unpacker.decompress(file.read(), most)
    except zlib.error as error:
        raise ImageError(
            f"{name}: deflated DICOM that cannot be unpacked ({in_words(error)}); fetch the file again"
        ) from None
    if unpacker.unconsumed_tail:
        raise ImageError(
            f"{name}: deflated DICOM that unpacks to more than {most} bytes; "
            "raise data.max_pixels if the file is trusted"
        )
    if not unpacker.eof:
        raise ImageError(f"{name}: deflated DICOM that ends too early; fetch the file again")
    plain = ExplicitVRLittleEndian.encode() + b"\0"
    element = struct.pack("<HH2sH", 2, 0x10, b"UI", len(plain)) + plain
    length = struct.pack("<HH2sHI", 2, 0, b"UL", 4, len(element))
    return io.BytesIO(bytes(128) + b"DICM" + length + element + content)


def _meta_information(head: bytes) -> tuple[int, str]:
    """Where the meta information of a file ends, and the transfer syntax that it states ("" for none).

    What is too damaged to be walked through ends at the end of `head`.
    """
    place = 132 if head[128:132] == b"DICM" else 0
    syntax = ""
    while place + 8 <= len(head):
        group, element, kind, length = struct.unpack_from("<HH2sH", head, place)
        if group != 2:
            return place, syntax
        place += 8
        if kind in (b"OB", b"OW", b"UN", b"SQ", b"UT"):
            if place + 4 > len(head):
                break
            length = struct.unpack_from("<I", head, place)[0]
            place += 4
        if element == 0x10:
            syntax = head[place : place + length].decode("latin-1").rstrip("\0 ")
        place += length
    return len(head), syntax


def _without_pixels(data: pydicom.FileDataset, name: str, content: bytes = b"") -> ImageError:
    if b"\xe0\x7f\x10\x00O" in content:
        # pydicom gives up on all when it meets the end within a code stream.
        return ImageError(f"{name}: DICOM whose PixelData ends too early; fetch the file again")
    kind = data.get("SOPClassUID")
    if kind is None and "Rows" not in data and "TransferSyntaxUID" not in data.file_meta:
        return ImageError(f"{name}: not an image; expected {EXPECTED}; remove or replace the file")
    # A UID that is in no dictionary might name a patient's study.
    known = kind.name if isinstance(kind, UID) and kind.name != str(kind) else "not stated" if not kind else "unknown"
    return ImageError(
        f"{name}: DICOM without pixel data (SOP class {known}); expected {EXPECTED}; leave it out or fetch the file again"
    )


# Attributes


def _integer(
    data: pydicom.Dataset, field: str, name: str, least: int, most: int, missing: int | None = None
) -> int:
    try:
        value = data.get(field)
        if value is None or value == "":
            if missing is not None:
                return missing
            found = "no value"
        else:
            found = str(value)
            if least <= (number := int(value)) <= most:
                return number
    except (TypeError, ValueError, OverflowError):
        found = "no number"
    raise ImageError(
        f"{name}: DICOM with {field}: {found}; expected a number from {least} to {most}; mend the field or fetch the "
        "file again"
    )


def _numbers(data: pydicom.Dataset, field: str, name: str) -> list[float]:
    """The values of a decimal string; none where it is missing or empty."""
    try:
        value = data.get(field)
        if value is None or value == "":
            return []
        return [float(v) for v in (value if hasattr(value, "append") else [value])]
    except (TypeError, ValueError, OverflowError):
        raise ImageError(f"{name}: DICOM with {field} that is no number; mend or remove the field") from None


def _photometric(data: pydicom.Dataset, name: str) -> str:
    """Upper case. Where it is missing, the shape of the presentation LUT tells as much of gray pixels."""
    photometric = str(data.get("PhotometricInterpretation") or "").strip().upper()
    if photometric:
        return photometric
    shape = str(data.get("PresentationLUTShape") or "").strip().upper()
    if shape in ("IDENTITY", "INVERSE") and data.get("SamplesPerPixel", 1) == 1:
        return "MONOCHROME2" if shape == "IDENTITY" else "MONOCHROME1"
    raise ImageError(
        f"{name}: DICOM without PhotometricInterpretation: whether bone is white or black is not known; add the field "
        "(MONOCHROME1 or MONOCHROME2)"
    )


def _check_pixels(data: pydicom.FileDataset, name: str, max_pixels: int) -> int:
    """Looks at all that decoding relies on before anything is decoded; the number of frames."""
    rows, columns = (_integer(data, field, name, 1, 65535) for field in ("Rows", "Columns"))
    check_size(name, columns, rows, max_pixels)
    frames = _integer(data, "NumberOfFrames", name, 1, 2**31, missing=1)
    samples = _integer(data, "SamplesPerPixel", name, 1, 4)
    allocated = _integer(data, "BitsAllocated", name, 1, 32)
    stored = _integer(data, "BitsStored", name, 1, allocated)
    _integer(data, "PixelRepresentation", name, 0, 1)
    if allocated not in (1, 8, 16, 32):
        raise ImageError(f"{name}: DICOM with BitsAllocated: {allocated}; expected 1, 8, 16 or 32; convert it to PNG")
    photometric = data.PhotometricInterpretation = _photometric(data, name)
    expected = 1 if photometric in (*_GRAY, "PALETTE COLOR") else 3
    if expected == 3 and photometric not in _COLOURS:
        raise ImageError(
            f"{name}: PhotometricInterpretation {photometric if photometric in _OTHERS else 'unknown'}; expected "
            "MONOCHROME1 or 2, RGB, YBR or PALETTE COLOR; convert it to PNG"
        )
    if samples != expected:
        raise ImageError(
            f"{name}: DICOM with SamplesPerPixel {samples} and PhotometricInterpretation {photometric}; "
            f"expected {expected} samples; mend the fields"
        )
    if samples > 1:
        _integer(data, "PlanarConfiguration", name, 0, 1)
    _check_length(data, name, rows, columns, samples, allocated, stored, frames)
    return frames


def _check_length(
    data: pydicom.FileDataset, name: str, rows: int, columns: int, samples: int, allocated: int, stored: int, frames: int
) -> None:
    """Compares the pixel data with the header: too few bytes, or a code stream that unpacks to another image."""
    syntax = data.file_meta.TransferSyntaxUID
    pixels = data.PixelData
    found = len(pixels) if isinstance(pixels, bytes) else 0
    share = 2 / 3 if data.PhotometricInterpretation == "YBR_FULL_422" else 1
    whole = int((rows * columns * samples * frames * allocated * share + 7) // 8)
    if not syntax.is_encapsulated:
        if found < whole:
            raise ImageError(
                f"{name}: PixelData holds {found} bytes; Rows {rows} and Columns {columns} need {whole}; "
                "fetch the file again"
            )
        return
    if syntax == RLELossless:
        # A run of two bytes becomes 128: no true image grows by coding as much as this.
        if found > 2 * whole + 128 * frames + 2**16:
            raise ImageError(
                f"{name}: PixelData holds {found} bytes of RLE for an image of {whole}; fetch the file again"
            )
        return
    frame = pydicom.encaps.get_frame(pixels, 0, number_of_frames=frames)
    found_size = codestream(frame, name)
    if found_size is None:
        raise ImageError(f"{name}: PixelData holds no {syntax.name}; mend TransferSyntaxUID or fetch the file again")
    # Padded to an even length with one or the other.
    if not frame[-16:].rstrip(b"\0\xff").endswith(b"\xff\xd9"):
        raise ImageError(f"{name}: PixelData ends before its code stream does; fetch the file again")
    if (found_size.width, found_size.height, found_size.components) != (columns, rows, samples):
        raise ImageError(
            f"{name}: PixelData holds {found_size.width} x {found_size.height} pixels of {found_size.components} samples; "
            f"Columns {columns}, Rows {rows} and SamplesPerPixel {samples} were expected; fetch the file again"
        )


def _stored(data: pydicom.FileDataset, name: str) -> NDArray[Any]:
    """The first frame, (H, W) or (H, W, 3), without bits that are not of the image."""
    syntax = data.file_meta.TransferSyntaxUID
    if syntax.is_encapsulated:
        try:
            pydicom.pixels.get_decoder(syntax)
        except NotImplementedError:
            raise ImageError(
                f"{name}: TransferSyntaxUID {syntax.name}: no decoder; convert it to another syntax or to PNG"
            ) from None
        # Of the two decoders of JPEG-LS, CharLS takes a fifth of the time.
        plugin = "pyjpegls" if syntax in JPEGLSTransferSyntaxes else ""
        return np.asarray(pixel_array(data, index=0, decoding_plugin=plugin))
    stored, allocated = int(data.BitsStored), int(data.BitsAllocated)
    top = _integer(data, "HighBit", name, 0, allocated - 1, missing=stored - 1)
    if top < stored - 1:
        raise ImageError(
            f"{name}: DICOM with HighBit {top} and BitsStored {stored}; expected HighBit {stored - 1}; mend the fields"
        )
    array = np.asarray(pixel_array(data, index=0, bits_stored=top + 1))
    return array >> (top + 1 - stored) if top >= stored else array


# From stored values to the shown ones


@dataclass(frozen=True)
class _Line:
    """values x slope + intercept: a rescale, or a window before what lies outside it is cut off."""

    slope: float
    intercept: float

    @classmethod
    def through(cls, zero: float, one: float) -> "_Line":
        """The line that is 0 and 1 at two values; where they are one, it begins there."""
        width = (one - zero) or 1.0
        return cls(1 / width, -zero / width)

    def __call__(self, values: NDArray[Any]) -> NDArray[np.float64]:
        return values * self.slope + self.intercept

    def after(self, first: "_Line") -> "_Line":
        return _Line(self.slope * first.slope, self.slope * first.intercept + self.intercept)


@dataclass(frozen=True)
class _Table:
    """A lookup table: what lies below `first` has its first entry, what lies above its end the last."""

    first: int
    entries: NDArray[np.float64]

    def __call__(self, values: NDArray[Any]) -> NDArray[np.float64]:
        places = np.rint(np.clip(values, self.first, self.first + len(self.entries) - 1)).astype(np.int64)
        return self.entries[places - self.first]


def _display(array: NDArray[Any], data: pydicom.FileDataset, name: str, window: int) -> NDArray[np.float32]:
    """Stored values (H, W) or (H, W, 3) -> (1, H, W) as a viewer shows them."""
    photometric = data.PhotometricInterpretation
    if photometric == "PALETTE COLOR":
        return gray(_coloured(array, data, name), name)
    if photometric not in _GRAY:
        return gray(array, name, None if _is_full(data) else 2**data.BitsStored - 1)
    padding = _padding(array, data, name)
    known = array if padding is None else array[~padding]
    if known.size == 0:
        return np.zeros((1, *array.shape), np.float32)
    low, high = int(known.min()), int(known.max())
    modality = _modality(data, name)
    stages = [modality, _voi(data, name, window) or _whole_range(data, modality, low, high)]
    if presentation := _presentation(data, name):
        stages.append(presentation)
    elif photometric == "MONOCHROME1" or _shape(data) == "INVERSE":
        stages.append(_Line(-1, 1))
    lines = [stage for stage in stages if isinstance(stage, _Line)]
    if len(lines) == len(stages):
        shown = _ramp(array, reduce(lambda first, then: then.after(first), lines), low, high)
    else:

        def curve(values: NDArray[Any]) -> NDArray[np.float32]:
            for stage in stages:
                values = stage(values)
            return np.clip(values, 0, 1).astype(np.float32)

        # What is shown depends on the stored value alone, so it is computed once for each of those.
        few = high - low < 2**16
        shown = curve(np.arange(low, high + 1)).take(array - np.int64(low), mode="clip") if few else curve(array)
    if padding is not None:
        shown[padding] = 0
    return shown[None]


def _ramp(array: NDArray[Any], line: _Line, low: int, high: int) -> NDArray[np.float32]:
    """The line's value of each pixel from low to high, cut to [0, 1]; a narrow window far from 0 loses nothing."""
    # Plain numbers: one of numpy's would make all of it float64.
    zero, width = float(-line.intercept / line.slope), float(1 / line.slope)
    base = round(zero)
    # What lies on a whole number lies there but for a rounding.
    offset = zero - base if abs(zero - base) > 1e-9 * max(1, abs(zero)) else 0.0
    exact = max(abs(low), abs(high), abs(base)) < 2**24 and abs(width) > 1e-3
    ends = (base, array) if width < 0 else (array, base)
    shown = np.subtract(*ends, dtype=np.float32 if exact else np.float64)
    if offset:
        shown -= -offset if width < 0 else offset
    shown /= abs(width)
    reached = line(np.array([low, high]))
    if offset or reached.min() < 0 or reached.max() > 1 + 1e-9:
        np.clip(shown, 0, 1, out=shown)
    return shown.astype(np.float32, copy=False)


def _padding(array: NDArray[Any], data: pydicom.FileDataset, name: str) -> NDArray[np.bool_] | None:
    """Where nothing was measured: it is black whatever the window says (PS3.3 C.7.5.1.1.2)."""
    if data.get("PixelPaddingValue") is None:
        return None
    value = _integer(data, "PixelPaddingValue", name, -(2**31), 2**32)
    limit = _integer(data, "PixelPaddingRangeLimit", name, -(2**31), 2**32, missing=value)
    if value == limit:
        return array == value
    return (array >= min(value, limit)) & (array <= max(value, limit))


def _modality(data: pydicom.FileDataset, name: str) -> _Line | _Table:
    if data.get("ModalityLUTSequence"):
        return _table(data.ModalityLUTSequence[0], "ModalityLUTSequence", data, name)[0]
    slope, intercept = (_numbers(data, field, name)[:1] for field in ("RescaleSlope", "RescaleIntercept"))
    line = _Line(*(slope or [1.0]), *(intercept or [0.0]))
    if not (np.isfinite(line.slope) and np.isfinite(line.intercept) and line.slope):
        raise ImageError(
            f"{name}: RescaleSlope {line.slope:g} and RescaleIntercept {line.intercept:g}; expected finite numbers and a "
            "slope other than 0; mend or remove the two fields"
        )
    return line


def _voi(data: pydicom.FileDataset, name: str, window: int) -> Curve | None:
    """The chosen VOI LUT or, where the file has none of those, window; None where it has neither."""
    if luts := data.get("VOILUTSequence"):
        _check_choice(name, "VOILUTSequence", len(luts), window)
        table, bits = _table(luts[window], "VOILUTSequence", data, name)
        return _Table(table.first, table.entries / (2**bits - 1))
    centers, widths = (_numbers(data, field, name) for field in ("WindowCenter", "WindowWidth"))
    if not centers or not widths:
        return None
    _check_choice(name, "WindowCenter and WindowWidth", min(len(centers), len(widths)), window)
    center, width = centers[window], widths[window]
    function = str(data.get("VOILUTFunction") or "LINEAR").strip().upper()
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        raise ImageError(
            f"{name}: VOILUTFunction is none of LINEAR, LINEAR_EXACT and SIGMOID; mend or remove the field"
        )
    if not (np.isfinite(center) and np.isfinite(width) and width > 0 and (width >= 1 or function != "LINEAR")):
        raise ImageError(
            f"{name}: WindowCenter {center:g} and WindowWidth {width:g}; "
            f"expected a finite center and a positive width; mend or remove the two fields"
        )
    if function == "SIGMOID":
        # Beyond +-60 the result is 0 or 1 in float32.
        return lambda values: 1 / (1 + np.exp(np.clip(-4 * (values - center) / width, -60, 60)))
    if function == "LINEAR":
        center, width = center - 0.5, width - 1
    if width == 0:
        return lambda values: (values > center).astype(np.float64)
    return _Line.through(center - width / 2, center + width / 2)


def _check_choice(name: str, field: str, found: int, window: int) -> None:
    if window >= found:
        raise ImageError(f"{name}: data.window is {window}, but {field} hold {found} (0 is the first); choose one of those")


def _whole_range(data: pydicom.FileDataset, modality: _Line | _Table, low: int, high: int) -> _Line:
    """In place of a window: from 0 to white where both are known, else from the darkest to the brightest pixel."""
    if isinstance(modality, _Table):
        reached = modality.entries[slice(*np.clip([low - modality.first, high + 1 - modality.first],
                                                  [0, 1], [len(modality.entries) - 1, len(modality.entries)]))]  # fmt: skip
        return _Line.through(reached.min(), reached.max())
    if data.PixelRepresentation == 0:
        low, high = 0, white_of(high) if _is_full(data) else 2**data.BitsStored - 1
    return _Line.through(*sorted(modality(np.array([low, high]))))


def _is_full(data: pydicom.FileDataset) -> bool:
    """Whether a word is said to be all pixel, as is said of words that hold a detector's 10, 12 or 14 bits too."""
    return bool(data.BitsStored == data.BitsAllocated and data.BitsStored > 8)


def _shape(data: pydicom.FileDataset) -> str:
    return str(data.get("PresentationLUTShape") or "").strip().upper()


def _presentation(data: pydicom.FileDataset, name: str) -> Curve | None:
    """The table from shown values to P-values, which have the right polarity already."""
    if not data.get("PresentationLUTSequence"):
        return None
    table, bits = _table(data.PresentationLUTSequence[0], "PresentationLUTSequence", data, name)
    last = len(table.entries) - 1
    return lambda values: table.entries[(np.clip(values, 0, 1) * last).astype(np.int64)] / (2**bits - 1)


def _coloured(array: NDArray[Any], data: pydicom.FileDataset, name: str) -> NDArray[np.float64]:
    """Indices (H, W) -> (H, W, 3) in [0, 1]."""
    colours = []
    for colour in ("Red", "Green", "Blue"):
        field = f"{colour}PaletteColorLookupTable"
        table, bits = _entries(data, f"{field}Descriptor", f"{field}Data", field, data, name)
        colours.append(table(array) / (2**bits - 1))
    return np.stack(colours, -1)


def _table(item: pydicom.Dataset, field: str, data: pydicom.FileDataset, name: str) -> tuple[_Table, int]:
    return _entries(item, "LUTDescriptor", "LUTData", field, data, name)


def _entries(
    item: pydicom.Dataset, descriptor: str, values: str, field: str, data: pydicom.FileDataset, name: str
) -> tuple[_Table, int]:
    """A lookup table and the bits of its entries."""
    try:
        length, first, bits = (int(number) for number in item[descriptor].value)
        found = item[values].value
    except (KeyError, TypeError, ValueError):
        raise ImageError(
            f"{name}: {field} without a whole {descriptor} and {values}; mend or remove the field"
        ) from None
    # 0 stands for 2**16; a length or a first value is negative where a signed word was taken for an unsigned one.
    length = length % 2**16 or 2**16
    if data.PixelRepresentation == 1 and first >= 2**15:
        first -= 2**16
    if isinstance(found, bytes):
        order = ">" if data.original_encoding[1] is False else "<"
        entries = np.frombuffer(found, np.uint8) if len(found) < 2 * length else np.frombuffer(found[: 2 * length], f"{order}u2")
    else:
        entries = np.atleast_1d(np.asarray(found, np.int64)) & 0xFFFF
        if len(entries) < length <= 2 * len(entries) and bits == 8:
            # Bytes that were stored as words.
            entries = entries.astype("<u2").view(np.uint8)
    if not 1 <= bits <= 16 or len(entries) < length:
        raise ImageError(
            f"{name}: {descriptor} of {field} states {length} entries of {bits} bits, {values} holds {len(entries)}; "
            "mend or remove the field"
        )
    return _Table(first, (entries[:length] & (2**bits - 1)).astype(np.float64)), bits
