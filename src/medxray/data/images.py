"""Radiographs from files, arrays and PIL images, at full depth: (1, H, W) float32, 0 black to 1 white.

What is white:
* 8-bit files and arrays: 255.
* Deeper PNG, TIFF and integer arrays: the smallest 2**k - 1, k >= 8, not below the brightest pixel. Detectors
  write 10, 12 and 14 bits into 16-bit files that do not say so; a full 16-bit file has its white at 65535.
* DICOM with a VOI LUT or window: its upper end. Without one, 2**BitsStored - 1; where that is the whole
  16-bit word, as above; for signed pixels, the brightest one.
* Floats must lie in [0, 1] already.
"""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile
from PIL.JpegImagePlugin import JpegImageFile

from medxray.types import ImageError

if TYPE_CHECKING:
    import pydicom

MAX_PIXELS = 100_000_000
FORMATS = ("PNG", "JPEG", "TIFF", "JPEG2000", "BMP")
EXPECTED = "a DICOM, PNG, JPEG or TIFF radiograph"

_ORIENTATION = 0x0112
_DEFLATED = "1.2.840.10008.1.2.1.99"


def read_image(
    source: str | Path | bytes,
    *,
    max_pixels: int = MAX_PIXELS,
    at_least: tuple[int, int] | None = None,
    name: str = "image in memory",
) -> NDArray[np.float32]:
    """A radiograph as (1, H, W) float32 in [0, 1]; colour becomes luma, alpha is ignored.

    DICOM is known by its content, not its name: modality LUT or rescale, then VOI LUT or window (the first),
    then inversion of MONOCHROME1 (PS3.3 C.11).

    Args:
        source: a file, or what it holds.
        max_pixels: an image with more is refused before it is decoded.
        at_least: (h, w) that are needed. JPEG is then decoded at 1/2, 1/4 or 1/8 of its sides, and JPEG 2000 at
            1/2**k, where that is not smaller; other formats whole. What is left out differs little from an
            antialiased resize; that of JPEG 2000 lies up to half a pixel to the upper left.
        name: of an image given as bytes, for messages.

    Raises:
        ImageError: the file is missing, empty, damaged, not an image, too large, has several frames, or is a
            DICOM file without pixels.
    """
    if isinstance(source, bytes):
        return _read(io.BytesIO(source), name, max_pixels, at_least)
    path = Path(source)
    try:
        with path.open("rb") as file:
            return _read(file, str(path), max_pixels, at_least)
    except FileNotFoundError:
        raise ImageError(f"{path}: no such file; expected {EXPECTED}; check the path and data.reader.root") from None
    except OSError as error:
        raise ImageError(
            f"{path}: cannot be opened ({error.strerror}); expected {EXPECTED}; check its kind and rights"
        ) from None


def _read(file: BinaryIO, name: str, max_pixels: int, at_least: tuple[int, int] | None) -> NDArray[np.float32]:
    head = file.read(144)
    file.seek(0)
    if not head:
        raise ImageError(f"{name}: empty (0 bytes); expected {EXPECTED}; fetch the file again")
    if head[128:132] == b"DICM" or head[:2] in (b"\x02\x00", b"\x08\x00"):
        return _read_dicom(file, name, head, max_pixels)
    return _read_raster(file, name, max_pixels, at_least)


def to_image(value: object, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.float32]:
    """An image already in memory as (1, H, W) float32 in [0, 1].

    Args:
        value: a PIL image, the bytes of a file, or an array or tensor (H, W), (1, H, W), (H, W, 1),
            (H, W, 3 or 4) or (3, H, W); integers as in files, floats in [0, 1].
        max_pixels: an image with more is refused.

    Raises:
        ImageError: another type, shape or range, or bytes of no image.
    """
    if isinstance(value, bytes):
        return read_image(value, max_pixels=max_pixels)
    if isinstance(value, Image.Image):
        _check_size("PIL image", value.width, value.height, max_pixels)
        return _from_pil(value, "PIL image")
    if not hasattr(value, "__array__"):
        raise ImageError(
            f"expected a path, array, tensor or PIL image, found {type(value).__name__}; "
            "pass one image, or a list of one study's views"
        )
    array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
    where = f"array of shape {array.shape} and type {array.dtype}"
    if array.ndim == 3 and array.shape[0] == 1:
        array = array[0]
    elif array.ndim == 3 and array.shape[0] == 3 and array.shape[2] not in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))) or array.size == 0:
        raise ImageError(f"{where}: expected (H, W), (1, H, W), (H, W, 3) or (3, H, W), at least one pixel")
    _check_size(where, array.shape[1], array.shape[0], max_pixels)
    return _scale(array, where)


def _read_raster(
    file: BinaryIO, name: str, max_pixels: int, at_least: tuple[int, int] | None
) -> NDArray[np.float32]:
    try:
        with Image.open(file, formats=FORMATS) as image:
            _check_size(name, image.width, image.height, max_pixels)
            frames = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1
            if frames > 1:
                raise ImageError(f"{name}: {frames} pages; expected one radiograph; store each as a file")
            if at_least is not None and _reduce(image, at_least):
                try:
                    return _from_pil(image, name)
                except OSError:
                    # JPEG 2000 may hold fewer resolutions than are asked for; damage shows itself again.
                    file.seek(0)
                    return _read_raster(file, name, max_pixels, None)
            return _from_pil(image, name)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(
            f"{name}: not an image or its header is damaged; expected {EXPECTED}; remove or replace the file"
        ) from None
    except Image.DecompressionBombError:
        raise ImageError(
            f"{name}: more than {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels, the limit of Pillow; "
            "reduce it, or raise PIL.Image.MAX_IMAGE_PIXELS and data.max_pixels if the file is trusted"
        ) from None
    # Decoders raise whatever a damaged file makes them stumble over; all of it means the same to a user.
    except Exception as error:
        raise ImageError(
            f"{name}: damaged or truncated ({_words(error)}); expected {EXPECTED}; fetch the file again"
        ) from error


def _reduce(image: Image.Image, at_least: tuple[int, int]) -> bool:
    """Has Pillow decode to a smaller size that is not below (h, w) as shown; False where it cannot."""
    h, w = at_least
    if isinstance(image, JpegImageFile):
        turned = image.getexif().get(_ORIENTATION, 1) > 4
        image.draft(None, (h, w) if turned else (w, h))
        return True
    if not isinstance(image, Jpeg2KImageFile):
        return False
    power = 0
    while image.width >> (power + 1) >= w and image.height >> (power + 1) >= h:
        power += 1
    image.reduce = power  # type: ignore[method-assign, assignment]
    return power > 0


def _from_pil(image: Image.Image, where: str) -> NDArray[np.float32]:
    if image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    mode = image.mode
    if mode in ("LA", "La"):
        image = image.getchannel("L")
    elif mode == "1":
        image = image.convert("L")
    elif mode not in ("L", "F", "I", "RGB", "RGBA") and not mode.startswith("I;16"):
        image = image.convert("RGB")
    return _scale(np.asarray(image), where)


def _scale(array: NDArray[Any], where: str) -> NDArray[np.float32]:
    """(H, W) or (H, W, 3 or 4) of any number type -> (1, H, W) float32 in [0, 1]."""
    if array.dtype.kind == "b":
        array = array.astype(np.uint8) * 255
    if array.dtype.kind in "iu":
        white = 255
        if array.dtype != np.uint8:
            low, high = int(array.min()), int(array.max())
            if low < 0:
                raise ImageError(f"{where}: holds {low}; expected no negative integers; scale it to [0, 1] as float32")
            white = _white(high)
        # Weights of ITU-R 601 as integers over 1000, so that equal channels give exactly the gray value.
        if array.ndim == 3:
            kind = np.uint32 if white < 2**22 else np.uint64
            array = array[..., :3].astype(kind) @ np.array([299, 587, 114], kind)
            white *= 1000
        return np.asarray(np.divide(array, white, dtype=np.float32))[None]
    if array.dtype.kind != "f":
        raise ImageError(f"{where}: expected integers or floats, found {array.dtype}")
    if array.ndim == 3:
        array = array[..., :3] @ np.array([0.299, 0.587, 0.114], array.dtype)
    low_, high_ = float(array.min()), float(array.max())
    # Resampling in float32 may overshoot by an ulp or two.
    if not (low_ >= -1e-5 and high_ <= 1 + 1e-5):
        raise ImageError(
            f"{where}: floats from {low_:g} to {high_:g}; expected [0, 1]; "
            "divide by the value of white, or pass integers"
        )
    return np.asarray(np.clip(array, 0, 1, dtype=np.float32))[None]


def _white(brightest: int) -> int:
    return int(2 ** max(8, brightest.bit_length()) - 1)


def _check_size(where: str, width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ImageError(
            f"{where}: {width} x {height} pixels; expected at most {max_pixels}; "
            "reduce it, or raise data.max_pixels if the file is trusted"
        )


def _words(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


# DICOM


def _read_dicom(file: BinaryIO, name: str, head: bytes, max_pixels: int) -> NDArray[np.float32]:
    try:
        data = _open_dicom(file, name, head, max_pixels)
        return _display(data.pixel_array, data, name)
    except ImageError:
        raise
    # As above: pydicom and its decoders raise anything from struct.error to NotImplementedError.
    except Exception as error:
        raise ImageError(
            f"{name}: a DICOM file that cannot be decoded ({_words(error)}); expected {EXPECTED}; "
            "fetch the file again, or convert it to PNG"
        ) from error


def _open_dicom(file: BinaryIO, name: str, head: bytes, max_pixels: int) -> "pydicom.FileDataset":
    """The whole data set; its header has shown that pixels are there, of one frame, and not too many."""
    import pydicom

    _check_deflated(file, name, head, max_pixels)
    data = pydicom.dcmread(file, force=True)
    rows, columns = data.get("Rows"), data.get("Columns")
    if "PixelData" not in data:
        if head[128:132] != b"DICM" and rows is None:
            raise ImageError(f"{name}: not an image; expected {EXPECTED}; remove or replace the file")
        kind = data.get("SOPClassUID")
        raise ImageError(
            f"{name}: DICOM without pixel data (SOP class {getattr(kind, 'name', kind) or 'not stated'}); "
            f"expected {EXPECTED}; leave it out or fetch the file again"
        )
    if not (isinstance(rows, int) and isinstance(columns, int) and rows > 0 and columns > 0):
        raise ImageError(
            f"{name}: DICOM with Rows {rows} and Columns {columns}; expected two positive numbers; fetch the file again"
        )
    _check_size(name, columns, rows, max_pixels)
    frames = int(data.get("NumberOfFrames") or 1)
    if frames > 1:
        raise ImageError(f"{name}: DICOM with {frames} frames; expected one radiograph; export one frame")
    if "TransferSyntaxUID" not in data.file_meta:
        # A file without meta information is in one of the two native syntaxes; pydicom saw which.
        implicit, little = data.original_encoding
        if little is False:
            syntax = pydicom.uid.ExplicitVRBigEndian
        else:
            syntax = pydicom.uid.ImplicitVRLittleEndian if implicit else pydicom.uid.ExplicitVRLittleEndian
        data.file_meta.TransferSyntaxUID = syntax
    return data


def _check_deflated(file: BinaryIO, name: str, head: bytes, max_pixels: int) -> None:
    """Refuses a deflated data set that unpacks to more than the largest allowed image, before it does."""
    if head[128:140] != b"DICM\x02\x00\x00\x00UL\x04\x00":
        return
    start = 144 + struct.unpack("<I", head[140:144])[0]
    meta = file.read(min(start, 2**16))
    file.seek(start)
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    if _DEFLATED.encode() in meta:
        unpacker.decompress(file.read(), 4 * max_pixels + 2**20)
    file.seek(0)
    if unpacker.unconsumed_tail:
        raise ImageError(
            f"{name}: deflated DICOM that unpacks to more than {4 * max_pixels + 2**20} bytes; "
            "raise data.max_pixels if the file is trusted"
        )


def _display(array: NDArray[Any], data: "pydicom.FileDataset", name: str) -> NDArray[np.float32]:
    """Stored values (H, W) or (H, W, 3) -> (1, H, W) as a viewer shows them."""
    photometric = str(data.PhotometricInterpretation)
    if photometric not in ("MONOCHROME1", "MONOCHROME2"):
        if array.ndim != 3 or array.shape[2] != 3:
            raise ImageError(
                f"{name}: PhotometricInterpretation {photometric}; expected MONOCHROME1 or 2, RGB or YBR; "
                "convert it to PNG"
            )
        return _scale(array, name)
    if array.ndim != 2:
        raise ImageError(f"{name}: {photometric} pixels of shape {array.shape}; expected (rows, columns)")
    curve = _curve(data, name)
    low, high = int(array.min()), int(array.max())
    if high - low < 2**16:
        # Display values depend on the stored value alone, so they are computed once for each of those.
        table = curve(np.arange(low, high + 1))
        shown = table[array if low == 0 else array.astype(np.int64) - low]
    else:
        shown = curve(array)
    if photometric == "MONOCHROME1":
        shown = 1 - shown
    return np.asarray(shown)[None]


def _curve(data: "pydicom.FileDataset", name: str) -> Callable[[NDArray[Any]], NDArray[np.float32]]:
    """Stored values -> display values in [0, 1], before inversion."""
    from pydicom.pixels.processing import apply_modality_lut, apply_voi

    def number(field: str) -> float | None:
        value = data.get(field)
        if value is None or value == "":
            return None
        return float(value[0] if hasattr(value, "append") else value)

    slope, intercept = number("RescaleSlope"), number("RescaleIntercept")
    center, width = number("WindowCenter"), number("WindowWidth")
    function = str(data.get("VOILUTFunction") or "LINEAR").upper()
    luts = data.get("VOILUTSequence")
    if not luts and center is not None and width is not None:
        least = 1 if function == "LINEAR" else 0
        if not (np.isfinite(center) and np.isfinite(width) and width >= least and width > 0):
            raise ImageError(
                f"{name}: WindowCenter {center:g} and WindowWidth {width:g}; "
                f"expected a finite center and a positive width; mend or remove the two fields"
            )

    def modality(stored: NDArray[Any]) -> NDArray[Any]:
        if data.get("ModalityLUTSequence"):
            return np.asarray(apply_modality_lut(stored, data))
        return stored * (1.0 if slope is None else slope) + (intercept or 0.0)

    def curve(stored: NDArray[Any]) -> NDArray[np.float32]:
        values = modality(stored)
        if luts:
            entries = luts[0].LUTDescriptor
            shown = apply_voi(values.astype(np.int64), data) / (2.0 ** entries[2] - 1)
        elif center is not None and width is not None:
            shown = _window(values, center, width, function)
        else:
            bits = int(data.BitsStored)
            stated = data.PixelRepresentation == 0 and not data.get("ModalityLUTSequence")
            if stated:
                white = 2**bits - 1 if bits != 16 else _white(int(stored.max()))
                ends = modality(np.array([0, white]))
            else:
                ends = values
            low, high = float(ends.min()), float(ends.max())
            shown = (values - low) / ((high - low) or 1.0)
        return np.asarray(np.clip(shown, 0, 1), np.float32)

    return curve


def _window(values: NDArray[Any], center: float, width: float, function: str) -> NDArray[Any]:
    """DICOM PS3.3 C.11.2.1.2 and C.11.2.1.3, scaled to [0, 1]."""
    if function == "SIGMOID":
        # Beyond +-60 the result is 0 or 1 in float32.
        return np.asarray(1 / (1 + np.exp(np.clip(-4 * (values - center) / width, -60, 60))))
    if function == "LINEAR":
        center, width = center - 0.5, width - 1
    if width == 0:
        return np.asarray((values > center).astype(np.float64))
    return np.asarray((values - center) / width + 0.5)
