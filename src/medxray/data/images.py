"""Radiographs from files, arrays and PIL images, at full depth: (1, H, W) float32, 0 black to 1 white.

What is white:
* 8-bit files and arrays: 255.
* Deeper PNG, TIFF and integer arrays: the smallest 2**k - 1, k >= 8, not below the brightest pixel. Detectors
  write 10, 12 and 14 bits into 16-bit files that do not say so; a full 16-bit file has its white at 65535, and so
  has a PNG whose text `White` says 65535, as `medxray prepare` writes them.
* DICOM with a VOI LUT or window: its upper end. Without one, 2**BitsStored - 1; where that is the whole
  16-bit word, as above; for signed pixels, the brightest one.
* Floats must lie in [0, 1] already.
"""

import io
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TiffImageFile

from medxray.disk import watched
from medxray.types import ImageError, RunError

MAX_PIXELS = 100_000_000
FORMATS = ("PNG", "JPEG", "TIFF", "JPEG2000", "BMP")
EXPECTED = "a DICOM, PNG, JPEG or TIFF radiograph"

_ORIENTATION = 0x0112
_BITS_PER_SAMPLE = 0x0102
_MOST_TILES = 2**14
_Result = TypeVar("_Result")

# Of a collimator's border: levels, their noise, the shares of a line that a marker may and an edge must reach, and
# the least share of a side that the field has.
_BLACK = 0.1
_NOISE = 0.06
_MARKER = 0.05
_STRAIGHT = 0.5
_LEAST_FIELD = 0.3


@dataclass(frozen=True)
class ImageHeader:
    """What a file says of its radiograph.

    Attributes:
        width, height: pixels, as shown.
        bits: stored for each sample.
        format: "DICOM", "PNG", "JPEG", "TIFF", "JPEG2000" or "BMP".
        photometric: in DICOM's terms, such as "MONOCHROME1"; of other formats "MONOCHROME2", "RGB",
            "PALETTE COLOR" or "CMYK".
        manufacturer: of the device; "" where it is not told.
        view: "PA", "AP", "LL" or "unknown".
        sex, age_band: words of `medxray.data.attributes`; "" where they are not told.
        burned_in: whether text was burned into the pixels; None where it is not told.
        frames: how many images the file holds.
    """

    width: int
    height: int
    bits: int
    format: str
    photometric: str
    manufacturer: str = ""
    view: str = "unknown"
    sex: str = ""
    age_band: str = ""
    burned_in: bool | None = None
    frames: int = 1


def read_image(
    source: str | Path | bytes,
    *,
    max_pixels: int = MAX_PIXELS,
    at_least: tuple[int, int] | None = None,
    name: str = "image in memory",
    frame: Literal["refuse", "first"] = "refuse",
    border: Literal["keep", "crop"] = "keep",
    clahe: float | None = None,
    window: int = 0,
) -> NDArray[np.float32]:
    """A radiograph as (1, H, W) float32 in [0, 1]; colour becomes luma, alpha is ignored.

    DICOM is known by its content, not its name: modality LUT or rescale, then VOI LUT or window, then the
    presentation LUT or the inversion of MONOCHROME1 (PS3.3 C.11); padding is black.

    Args:
        source: a file, or what it holds.
        max_pixels: an image with more is refused before it is decoded.
        at_least: (h, w) that are needed. JPEG is then decoded at 1/2, 1/4 or 1/8 of its sides, and JPEG 2000 at
            1/2**k, where that is not smaller; other formats whole. What is left out differs little from an
            antialiased resize; that of JPEG 2000 lies up to half a pixel to the upper left. Of no effect where the
            border is cropped.
        name: of an image given as bytes, for messages.
        frame: what a file with several frames or pages does: it is refused, or its first one is read.
        border: "crop" cuts off what `exposed_field` finds to be the collimator's.
        clahe: limit of a contrast-limited adaptive histogram equalisation, see `equalise`; none if None.
        window: which of a DICOM file's VOI LUTs, or windows where it has no LUT.

    Raises:
        ImageError: the file is missing, empty, damaged, not an image, too large, has several frames, has no such
            window, or is a DICOM file without pixels.
    """

    def read(file: BinaryIO, where: str) -> NDArray[np.float32]:
        if _is_dicom(file, where):
            from medxray.data import dicom

            return dicom.read(file, where, max_pixels=max_pixels, frame=frame, window=window)
        return _read_raster(file, where, max_pixels, None if border == "crop" else at_least, frame)

    return _finished(_opened(source, name, read), border, clahe)


def read_header(source: str | Path | bytes, *, name: str = "image in memory") -> ImageHeader:
    """What a file says of its radiograph, without a look at the pixels.

    Args:
        source: a file, or what it holds.
        name: of an image given as bytes, for messages.

    Raises:
        ImageError: the file is missing, empty or not an image, or its header is damaged.
    """

    def read(file: BinaryIO, where: str) -> ImageHeader:
        if _is_dicom(file, where):
            from medxray.data import dicom

            return dicom.read_header(file, where, MAX_PIXELS)
        return _read_raster_header(file, where)

    return _opened(source, name, read)


def _opened(source: str | Path | bytes, name: str, read: Callable[[BinaryIO, str], _Result]) -> _Result:
    if isinstance(source, bytes):
        return read(io.BytesIO(source), name)
    path = Path(source)
    try:
        with watched(str(path)):
            # A pipe would be waited for without end.
            if stat.S_IFMT(path.stat().st_mode) not in (stat.S_IFREG, stat.S_IFDIR):
                raise ImageError(f"{path}: cannot be opened (no regular file); expected {EXPECTED}; check its kind and rights")
            with path.open("rb") as file:
                return read(file, str(path))
    except FileNotFoundError:
        raise ImageError(f"{path}: no such file; expected {EXPECTED}; check the path and data.reader.root") from None
    except OSError as error:
        raise ImageError(
            f"{path}: cannot be opened ({error.strerror}); expected {EXPECTED}; check its kind and rights"
        ) from None


def _is_dicom(file: BinaryIO, name: str) -> bool:
    head = file.read(132)
    file.seek(0)
    if not head:
        raise ImageError(f"{name}: empty (0 bytes); expected {EXPECTED}; fetch the file again")
    # With or without preamble and meta information.
    return head[128:132] == b"DICM" or head[:2] in (b"\x02\x00", b"\x08\x00", b"\x00\x08")


def _finished(
    image: NDArray[np.float32], border: Literal["keep", "crop"], clahe: float | None
) -> NDArray[np.float32]:
    if border == "crop":
        top, left, height, width = exposed_field(image)
        image = image[:, top : top + height, left : left + width]
    return image if clahe is None else equalise(image, clahe)


def to_image(
    value: object,
    *,
    max_pixels: int = MAX_PIXELS,
    border: Literal["keep", "crop"] = "keep",
    clahe: float | None = None,
) -> NDArray[np.float32]:
    """An image already in memory as (1, H, W) float32 in [0, 1].

    Args:
        value: a PIL image, the bytes of a file, or an array or tensor (H, W), (1, H, W), (H, W, 1),
            (H, W, 3 or 4) or (3, H, W); integers as in files, floats in [0, 1].
        max_pixels: an image with more is refused.
        border, clahe: as `read_image` takes them.

    Raises:
        ImageError: another type, shape or range, or bytes of no image.
    """
    if isinstance(value, bytes):
        return read_image(value, max_pixels=max_pixels, border=border, clahe=clahe)
    if isinstance(value, Image.Image):
        check_size("PIL image", value.width, value.height, max_pixels)
        return _finished(_from_pil(value, "PIL image"), border, clahe)
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
    check_size(where, array.shape[1], array.shape[0], max_pixels)
    return _finished(gray(array, where), border, clahe)


def _read_raster(
    file: BinaryIO, name: str, max_pixels: int, at_least: tuple[int, int] | None, frame: str
) -> NDArray[np.float32]:
    def read() -> NDArray[np.float32]:
        with Image.open(file, formats=FORMATS) as image:
            check_size(name, image.width, image.height, max_pixels)
            frames = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1
            if frames > 1 and frame == "refuse":
                raise ImageError(
                    f"{name}: {frames} pages; expected one radiograph; store each as a file, or set data.frames: first"
                )
            coded = _check_codestream(file, name, image) if isinstance(image, Jpeg2KImageFile) else None
            if _deep_colour(image, coded):
                return _read_deep_colour(file, name)
            bits = coded.bits if coded and image.mode == "I;16" else 16
            if _draft(image, at_least):
                try:
                    return _from_pil(image, name, bits)
                except OSError:
                    # JPEG 2000 may hold fewer resolutions than are asked for; damage shows itself again.
                    file.seek(0)
                    return _read_raster(file, name, max_pixels, None, frame)
            return _from_pil(image, name, bits)

    return _guarded(read, name)


def _read_raster_header(file: BinaryIO, name: str) -> ImageHeader:
    def read() -> ImageHeader:
        with Image.open(file, formats=FORMATS) as image:
            # A TIFF's size is that of the upright image; a PNG's own getexif reads the pixels.
            turned = not isinstance(image, TiffImageFile) and Image.Image.getexif(image).get(_ORIENTATION, 1) > 4
            coded = _check_codestream(file, name, image) if isinstance(image, Jpeg2KImageFile) else None
            deep = image.mode.startswith("I;16") or _deep_colour(image, coded)
            colours = {"P": "PALETTE COLOR", "PA": "PALETTE COLOR", "CMYK": "CMYK"}
            gray = image.mode in ("1", "L", "LA", "La", "F", "I") or image.mode.startswith("I;16")
            return ImageHeader(
                width=image.height if turned else image.width,
                height=image.width if turned else image.height,
                bits=coded.bits if coded else 16 if deep else {"1": 1, "F": 32, "I": 32}.get(image.mode, 8),
                format=str(image.format).replace("MPO", "JPEG"),
                photometric="MONOCHROME2" if gray else colours.get(image.mode, "RGB"),
                frames=getattr(image, "n_frames", 1) if image.format == "TIFF" else 1,
            )

    return _guarded(read, name)


def _guarded(read: Callable[[], _Result], name: str) -> _Result:
    try:
        return read()
    except ImageError:
        raise
    except MemoryError as error:
        raise no_memory_for(name) from error
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
            f"{name}: damaged or truncated ({in_words(error)}); expected {EXPECTED}; fetch the file again"
        ) from error


def _draft(image: Image.Image, at_least: tuple[int, int] | None) -> bool:
    """Has Pillow decode no more than is needed: of colour JPEG the luma only, and JPEG and JPEG 2000 to a size
    that is not below (h, w) as shown. Whether there is a way back from it to the whole."""
    if isinstance(image, JpegImageFile):
        size = None
        if at_least is not None:
            turned = image.getexif().get(_ORIENTATION, 1) > 4
            size = at_least if turned else at_least[::-1]
        image.draft("L", size)
        return False
    if at_least is None or not isinstance(image, Jpeg2KImageFile):
        return False
    power = 0
    while image.width >> (power + 1) >= at_least[1] and image.height >> (power + 1) >= at_least[0]:
        power += 1
    image.reduce = power  # type: ignore[method-assign, assignment]
    return power > 0


def _deep_colour(image: Image.Image, coded: "Codestream | None") -> bool:
    """Whether a colour image has more than the 8 bits a channel that Pillow reads of it."""
    if image.mode not in ("RGB", "RGBA", "RGBX", "LA"):
        return False
    if coded is not None:
        return coded.bits > 8
    if isinstance(image, TiffImageFile):
        return max(image.tag_v2.get(_BITS_PER_SAMPLE, (8,))) > 8
    return any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))


def _read_deep_colour(file: BinaryIO, name: str) -> NDArray[np.float32]:
    try:
        import cv2
    except ImportError:
        raise ImageError(
            f"{name}: colour or alpha of 16 bits a channel needs OpenCV; install medxray[opencv], or store it as "
            "16-bit gray"
        ) from None
    file.seek(0)
    # A colour image, upright, without alpha.
    array = cv2.imdecode(np.frombuffer(file.read(), np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    if array is None:
        raise ImageError(f"{name}: damaged or truncated; expected {EXPECTED}; fetch the file again")
    return gray(array[..., ::-1], name)


class Codestream(NamedTuple):
    """What a JPEG, JPEG-LS or JPEG 2000 code stream says of itself."""

    width: int
    height: int
    components: int
    bits: int


def codestream(data: bytes, where: str) -> Codestream | None:
    """The header of the code stream in `data`, JPEG 2000 with or without JP2's boxes; None where there is none.

    Raises:
        ImageError: it asks for more tiles or components than any radiograph has.
    """
    start = data.find(b"\xff\x4f\xff\x51") if data[:2] != b"\xff\xd8" else -1
    if start >= 0:
        if len(data) < start + 43:
            return None
        right, bottom, left, top, *tile = struct.unpack_from(">8I", data, start + 8)
        components, depth = struct.unpack_from(">HB", data, start + 40)
        tiles = -(-right // max(tile[0], 1)) * -(-bottom // max(tile[1], 1))
        if tiles > _MOST_TILES or components > 4:
            raise ImageError(
                f"{where}: JPEG 2000 of {tiles} tiles and {components} components; expected at most {_MOST_TILES} and 4; "
                "fetch the file again"
            )
        return Codestream(right - left, bottom - top, components, (depth & 0x7F) + 1)
    place = 2
    while data[:2] == b"\xff\xd8" and place + 10 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)) or marker == 0xF7:
            bits, height, width, components = struct.unpack_from(">BHHB", data, place + 4)
            return Codestream(width, height, components, bits)
        # Fill bytes may stand before a marker.
        place += 1 if marker == 0xFF else 2 + max(2, struct.unpack_from(">H", data, place + 2)[0])
    return None


def _check_codestream(file: BinaryIO, name: str, image: Image.Image) -> Codestream:
    place = file.tell()
    file.seek(0)
    found = codestream(file.read(), name)
    file.seek(place)
    if found is None or found[:2] != image.size:
        raise ImageError(
            f"{name}: JPEG 2000 whose header and code stream differ ({image.width} x {image.height} pixels and "
            f"{' x '.join(map(str, found[:2])) if found else 'none'}); fetch the file again"
        )
    return found


def _from_pil(image: Image.Image, where: str, bits: int = 16) -> NDArray[np.float32]:
    """bits: of the 16 of such an image, where the decoder has shifted them to the top."""
    if image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    mode = image.mode
    if mode in ("LA", "La"):
        image = image.getchannel("L")
    elif mode == "1":
        image = image.convert("L")
    elif mode not in ("L", "F", "I", "RGB", "RGBA") and not mode.startswith("I;16"):
        image = image.convert("RGB")
    array = np.asarray(image)
    if 8 < bits < 16:
        return gray(array >> (16 - bits), where, 2**bits - 1)
    return gray(array, where, 65535 if image.info.get("White") == "65535" else None)


def gray(array: NDArray[Any], where: str, white: int | None = None) -> NDArray[np.float32]:
    """(H, W) or (H, W, 3 or 4) of any number type -> (1, H, W) float32 in [0, 1].

    Args:
        array: integers, floats in [0, 1] or truth values.
        where: it came from, for messages.
        white: of integers of more than 8 bits, where it is known.

    Raises:
        ImageError: negative integers, or floats outside [0, 1].
    """
    if array.dtype.kind == "b":
        array = array.astype(np.uint8) * 255
    if array.dtype.kind in "iu":
        if array.dtype == np.uint8:
            white = 255
        elif (low := int(array.min())) < 0:
            raise ImageError(f"{where}: holds {low}; expected no negative integers; scale it to [0, 1] as float32")
        elif white is None:
            white = white_of(int(array.max()))
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


def white_of(brightest: int) -> int:
    """The smallest 2**k - 1, k >= 8, not below the brightest pixel."""
    return int(2 ** max(8, brightest.bit_length()) - 1)


def check_size(where: str, width: int, height: int, max_pixels: int) -> None:
    """
    Raises:
        ImageError: more pixels than allowed.
    """
    if width * height > max_pixels:
        raise ImageError(
            f"{where}: {width} x {height} pixels; expected at most {max_pixels}; "
            "reduce it, or raise data.max_pixels if the file is trusted"
        )


def no_memory_for(name: str) -> RunError:
    """No ImageError, which may be passed over: most such images are sound, and would be lost in silence."""
    return RunError(
        f"{name}: out of memory while it was read; take fewer processes and go on. If it is so every time the file is damaged: "
        "leave it out"
    )


def in_words(error: BaseException) -> str:
    """What a library below says, on one line, not too long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


# Enhancement


class Field(NamedTuple):
    """A part of an image in pixels."""

    top: int
    left: int
    height: int
    width: int


def exposed_field(image: NDArray[np.float32]) -> Field:
    """The part of a radiograph that the collimator left open.

    At each edge a border is found where all lines are black, or all white, but for a marker's few pixels, and
    where it ends at once along most of its length, as the straight edge of a collimator does and an outline of a
    patient in front of air does not. Tilted borders are kept.

    Args:
        image: (1, H, W) in [0, 1].

    Returns:
        the whole image where no border is found.
    """
    pixels = image[0]
    ends = {side: _strip(lines) for side, lines in _sides(pixels)}
    H, W = pixels.shape
    outer = Field(ends["top"], ends["left"], H - ends["bottom"] - ends["top"], W - ends["right"] - ends["left"])
    if outer.height < _LEAST_FIELD * H or outer.width < _LEAST_FIELD * W:
        return Field(0, 0, H, W)
    # Seen between the other borders, if they are such.
    rows, columns = slice(outer.top, outer.top + outer.height), slice(outer.left, outer.left + outer.width)
    between = dict(_sides(pixels[:, columns])) | {
        side: lines for side, lines in _sides(pixels[rows]) if side in ("left", "right")
    }
    for side, lines in between.items():
        if ends[side] and not _ends_straight(lines, ends[side]):
            ends[side] = 0
    return Field(ends["top"], ends["left"], H - ends["bottom"] - ends["top"], W - ends["right"] - ends["left"])


def _sides(pixels: NDArray[np.float32]) -> list[tuple[str, NDArray[np.float32]]]:
    """The image four times, each time with lines along one edge, from that edge inwards."""
    return [("top", pixels), ("bottom", pixels[::-1]), ("left", pixels.T), ("right", pixels[:, ::-1].T)]


def _strip(lines: NDArray[np.float32]) -> int:
    """How many lines, from the first, are of its one level."""
    level = float(np.median(lines[0]))
    if _BLACK < level < 1 - _BLACK:
        return 0
    for k in range(len(lines)):
        if _departed(lines[k], level) > _MARKER:
            return k
    return len(lines)


def _ends_straight(lines: NDArray[np.float32], end: int) -> bool:
    within = lines[end : end + max(3, len(lines) // 200)]
    return bool(within.size) and _departed(np.abs(within - lines[end - 1]).max(0), 0) >= _STRAIGHT


def _departed(line: NDArray[np.float32], level: float) -> float:
    return float((np.abs(line - level) > _NOISE).mean())


def equalise(image: NDArray[np.float32], limit: float) -> NDArray[np.float32]:
    """Contrast-limited adaptive histogram equalisation (Zuiderveld, Graphics Gems IV) at full depth.

    Args:
        image: (1, H, W) in [0, 1].
        limit: most pixels of a level, in multiples of the mean over levels; 2 is mild, 4 strong.

    Returns:
        (1, H, W) in [0, 1]: each pixel as the histograms of the four nearest of 8 x 8 tiles map it, blended.
    """
    pixels = np.rint(image[0] * 65535).astype(np.int32)
    edges = [np.linspace(0, side, min(8, side) + 1).astype(int) for side in pixels.shape]
    tiles = [
        [_equalising(pixels[top:bottom, left:right], limit) for left, right in pairwise(edges[1])]
        for top, bottom in pairwise(edges[0])
    ]
    (upper, lower, down), (near, far, right_) = (_neighbours(e) for e in edges)
    result = np.empty(pixels.shape, np.float32)
    for rows in _runs(upper, lower):
        for columns in _runs(near, far):
            part, y, x = pixels[rows, columns], down[rows, None], right_[columns]
            a, b = (tiles[upper[rows.start]][k[columns.start]][part] for k in (near, far))
            c, d = (tiles[lower[rows.start]][k[columns.start]][part] for k in (near, far))
            result[rows, columns] = (1 - y) * ((1 - x) * a + x * b) + y * ((1 - x) * c + x * d)
    return np.clip(result, 0, 1)[None]


def _equalising(tile: NDArray[np.int32], limit: float) -> NDArray[np.float32]:
    """(65536,): where each level goes, from a histogram of 256."""
    counts = np.bincount((tile.ravel() + 128) // 257, minlength=256).astype(np.float64)
    most = max(1.0, limit * tile.size / 256)
    cut = np.minimum(counts, most)
    reached = np.cumsum(cut + (tile.size - cut.sum()) / 256) / tile.size
    return np.interp(np.arange(65536) / 257, np.arange(256), reached).astype(np.float32)


def _neighbours(edges: NDArray[np.int_]) -> tuple[NDArray[np.int_], NDArray[np.int_], NDArray[np.float32]]:
    """For each pixel along a side: the tiles whose middles lie before and behind it, and its way between the two."""
    middles = (edges[:-1] + edges[1:] - 1) / 2
    place = np.interp(np.arange(edges[-1]), middles, np.arange(len(middles)))
    before = np.floor(place).astype(int)
    return before, np.minimum(before + 1, len(middles) - 1), (place - before).astype(np.float32)


def _runs(before: NDArray[np.int_], behind: NDArray[np.int_]) -> list[slice]:
    """Stretches of pixels between the same two tiles."""
    starts = [0, *(np.flatnonzero(np.diff(before) | np.diff(behind)) + 1).tolist(), len(before)]
    return [slice(*ends) for ends in pairwise(starts)]
