"""What is wrong with a data set is told with the file, the field and the cure, in one of the library's errors."""

import json
import os
import re
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import (
    UID,
    BasicTextSRStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from medxray.data import ImageError, StudyImages, load_studies, read_image
from medxray.data.readers import READERS
from medxray.spec import DataSpec
from medxray.types import DataError

RNG = np.random.default_rng(0)


# Images

Write = Callable[..., Path]


def png(path: Path, side: int = 64) -> bytes:
    Image.fromarray(RNG.integers(0, 256, (side, side), np.uint8)).save(path)
    return path.read_bytes()


def saved(format: str, share: float = 1.0, **settings: Any) -> Callable[[Path, Write], Any]:
    """A radiograph in a format, of which only a share of the bytes came."""

    def make(path: Path, write: Write) -> None:
        Image.fromarray(RNG.integers(0, 256, (64, 64), np.uint8)).save(path, format=format, **settings)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    return make


def dicom(
    syntax: UID = ExplicitVRLittleEndian, share: float = 1.0, cut: int = 0, array: Any = None, **changed: Any
) -> Callable[[Path, Write], Any]:
    """A radiograph in DICOM, some of its fields changed, of which only a share of the bytes came."""

    def make(path: Path, write: Write) -> None:
        pixels = (np.arange(4096).reshape(64, 64)).astype(np.uint16) if array is None else array
        write(path, pixels, 12 if pixels.itemsize == 2 else 8, syntax, **changed)
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share) - cut])

    return make


def replaced(make: Callable[[Path, Write], Any], old: bytes, new: bytes) -> Callable[[Path, Write], Any]:
    """The last place of some bytes in a file, written over."""

    def remade(path: Path, write: Write) -> None:
        make(path, write)
        head, found, tail = path.read_bytes().rpartition(old)
        assert found
        path.write_bytes(head + new + tail[max(0, len(new) - len(old)) :])

    return remade


def code_stream(stream: bytes, syntax: UID, **changed: Any) -> Callable[[Path, Write], Any]:
    """A radiograph in DICOM whose pixel data is these bytes."""

    def make(path: Path, write: Write) -> None:
        data = pydicom.dcmread(write(path, np.zeros((64, 64), np.uint16), 12, **changed))
        data.file_meta.TransferSyntaxUID = syntax
        data.PixelData = encapsulate([stream])
        data["PixelData"].VR = "OB"
        data.save_as(path)

    return make


def deflated(plain: bytes, packed: bytes = b"") -> bytes:
    """A file in explicit little endian -> the same, its data set deflated, or these bytes in its place."""
    start = 144 + int.from_bytes(plain[140:144], "little")
    meta = plain[:start].replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99\0\0")
    meta = meta.replace(b"\x10\0UI\x14\0", b"\x10\0UI\x18\0")
    meta = meta[:140] + (len(meta) - 144).to_bytes(4, "little") + meta[144:]
    packer = zlib.compressobj(wbits=-15)
    return meta + (packed or packer.compress(plain[start:] + bytes(20_000_000)) + packer.flush())


def deflated_bomb(path: Path, write: Write, length: bool = True) -> None:
    dicom()(path, write)
    bomb = deflated(path.read_bytes())
    # Without the length of the meta information, whoever looks for its end must walk through it.
    path.write_bytes(bomb if length else bomb[:132] + bomb[144:])


def damaged_png(path: Path, write: Write) -> None:
    data = bytearray(png(path))
    data[60:200] = bytes(140)
    path.write_bytes(data)


def pages(path: Path, write: Write) -> None:
    page = Image.new("L", (8, 8))
    page.save(path, format="TIFF", save_all=True, append_images=[page])


def bomb(format: str, side: tuple[int, int] = (3000, 2000), **settings: Any) -> Callable[[Path, Write], Any]:
    return lambda path, write: Image.new("L", side).save(path, format=format, **settings)


def png_of(path: Path, width: int, height: int, content: bytes) -> None:
    """A PNG whose header says what it likes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(content)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def j2k_header(width: int, height: int, tile: tuple[int, int] = (64, 64), components: int = 1) -> bytes:
    """What stands before the first tile of a JPEG 2000 code stream."""
    body = struct.pack(">H8IH", 0, width, height, 0, 0, *tile, 0, 0, components) + bytes([11, 1, 1]) * components
    return b"\xff\x4f\xff\x51" + struct.pack(">H", len(body) + 2) + body + b"\xff\xd9"


def lut(length: int, entries: int, bits: int = 12, first: int = 0) -> pydicom.Sequence:
    item = pydicom.Dataset()
    item.LUTDescriptor, item.LUTData = [length, first, bits], list(range(entries))
    item["LUTDescriptor"].VR = item["LUTData"].VR = "US"
    return pydicom.Sequence([item])


def without(field: str) -> pydicom.Sequence:
    sequence = lut(16, 16)
    delattr(sequence[0], field)
    return sequence


PALETTE = {
    f"{colour}PaletteColorLookupTable{kind}": value
    for colour in ("Red", "Green", "Blue")
    for kind, value in (("Descriptor", [256, 0, 16]), ("Data", bytes(512)))
}
SIZE, OTHER_SIZE = struct.pack(">HII", 0, 64, 64), struct.pack(">HII", 0, 500, 500)
RLE_BOMB = struct.pack("<16I", 2, 64, 64 + 400_000, *[0] * 13) + bytes([129, 7]) * 400_000
J2K, RLE = JPEG2000Lossless, RLELossless
TOO_SHORT, EARLY = "PixelData holds .* bytes; Rows 64 and Columns 64 need 8192", "PixelData|cannot be decoded"
CUT = "PixelData ends too early; fetch the file again"

IMAGES: dict[str, tuple[Callable[[Path, Write], Any], str]] = {
    # Files
    "missing": (lambda path, write: None, "no such file; expected a DICOM, PNG, JPEG or TIFF.*check the path"),
    "folder": (lambda path, write: path.mkdir(), "cannot be opened.*check its kind"),
    "pipe": (lambda path, write: os.mkfifo(path), "cannot be opened .no regular file.*check its kind"),
    "empty": (lambda path, write: path.touch(), r"empty \(0 bytes\).*fetch the file again"),
    "one byte": (lambda path, write: path.write_bytes(b"\x89"), "not an image.*replace"),
    "text": (lambda path, write: path.write_text("not pixels"), "not an image.*expected a DICOM.*replace"),
    "page of an error": (lambda path, write: path.write_text("<html>404</html>"), "not an image.*replace"),
    "random": (lambda path, write: path.write_bytes(RNG.bytes(5000)), "not an image.*remove or replace"),
    "zeros": (lambda path, write: path.write_bytes(bytes(5000)), "not an image.*remove or replace"),
    # PNG, JPEG, TIFF, JPEG 2000
    "png header only": (saved("PNG", 0.005), "(not an image|damaged).*(replace|fetch)"),
    "png without its end": (saved("PNG", 0.9), "damaged or truncated.*fetch the file again"),
    "half a png": (saved("PNG", 0.5), "damaged or truncated.*fetch the file again"),
    "png damaged inside": (damaged_png, "damaged or truncated.*fetch the file again"),
    "png of no size": (lambda path, write: png_of(path, 0, 64, b""), "not an image|damaged"),
    "png bomb": (bomb("PNG"), "3000 x 2000 pixels; expected at most 1000000; .*data.max_pixels"),
    "png of absurd size": (
        lambda path, write: png_of(path, 2**31 - 1, 2**31 - 1, b"0"), "pixels.*data.max_pixels|limit of Pillow"
    ),
    "png that unpacks without end": (
        lambda path, write: png_of(path, 64, 64, bytes(100_000_000)), "^$"
    ),
    "half a jpeg": (saved("JPEG", 0.5), "damaged or truncated.*fetch the file again"),
    "jpeg header only": (saved("JPEG", 0.05), "not an image|damaged"),
    "jpeg bomb": (bomb("JPEG"), "3000 x 2000 pixels; expected at most 1000000"),
    "half a tiff": (saved("TIFF", 0.5), "damaged or truncated|not an image"),
    "half a packed tiff": (saved("TIFF", 0.5, compression="tiff_lzw"), "damaged or truncated|not an image"),
    "tiff bomb": (bomb("TIFF", compression="tiff_lzw"), "3000 x 2000 pixels; expected at most 1000000"),
    "pages": (pages, "2 pages; expected one radiograph; store each as a file, or set data.frames: first"),
    "half a jpeg 2000": (saved("JPEG2000", 0.5), "damaged or truncated|JPEG 2000"),
    "jpeg 2000 without its end": (saved("JPEG2000", 0.95), "damaged or truncated|JPEG 2000"),
    "jpeg 2000 header only": (saved("JPEG2000", 0.03), "not an image|damaged|JPEG 2000"),
    "jpeg 2000 bomb": (
        lambda path, write: path.write_bytes(j2k_header(9_000, 9_000)), "9000 x 9000 pixels; expected at most"
    ),
    "jpeg 2000 of many tiles": (
        lambda path, write: path.write_bytes(j2k_header(900, 900, (1, 1))), "JPEG 2000 of 810000 tiles"
    ),
    "jpeg 2000 of two sizes": (
        replaced(saved("JPEG2000"), b"\xff\x51\x00\x29" + SIZE, b"\xff\x51\x00\x29" + OTHER_SIZE),
        "header and code stream differ .64 x 64 pixels and 500 x 500",
    ),
    # DICOM: pieces that are not there
    "dicom meta only": (dicom(share=0.04), "DICOM|not an image"),
    "dicom preamble only": (lambda path, write: path.write_bytes(bytes(128) + b"DICM"), "DICOM without pixel data"),
    "dicom header cut": (dicom(cut=8300), "DICOM without pixel data|DICOM with"),
    "dicom pixels cut": (dicom(cut=300), TOO_SHORT),
    "dicom without pixels": (
        dicom(SOPClassUID=BasicTextSRStorage, PixelData=None),
        "DICOM without pixel data .SOP class Basic Text SR Storage.; expected a DICOM.*leave it out",
    ),
    "pixels of no bytes": (dicom(PixelData=b""), TOO_SHORT.replace(".*", "0")),
    "without rows": (dicom(Rows=None), "Rows: no value; expected a number from 1 to 65535"),
    "without columns": (dicom(Columns=None), "Columns: no value; expected a number from 1"),
    "without bits stored": (dicom(BitsStored=None), "BitsStored: no value; expected a number from 1 to 16; mend"),
    "without bits allocated": (dicom(BitsAllocated=None), "BitsAllocated: no value; expected a number"),
    "without samples": (dicom(SamplesPerPixel=None), "SamplesPerPixel: no value"),
    "without sign": (dicom(PixelRepresentation=None), "PixelRepresentation: no value; expected a number from 0 to 1"),
    "without photometric": (
        dicom(PhotometricInterpretation=None), "without PhotometricInterpretation: .*add the field .MONOCHROME1 or"
    ),
    # DICOM: fields that lie
    "absurd rows": (dicom(Rows=65535, Columns=65535), "65535 x 65535 pixels; expected at most .*data.max_pixels"),
    "more rows than pixels": (dicom(Rows=640), "PixelData holds 8192 bytes; Rows 640 and Columns 64 need 81920"),
    "zero rows": (dicom(Rows=0), "Rows: 0; expected a number from 1"),
    "rows of text": (dicom(Rows=b"many"), "Rows: no number; expected a number from 1"),
    "more bits than allocated": (dicom(BitsStored=17), "BitsStored: 17; expected a number from 1 to 16"),
    "no bits": (dicom(BitsStored=0), "BitsStored: 0; expected a number from 1 to 16"),
    "odd bits": (dicom(BitsAllocated=12), "BitsAllocated: 12; expected 1, 8, 16 or 32"),
    "low high bit": (dicom(HighBit=3), "HighBit 3 and BitsStored 12; expected HighBit 11"),
    "sign of 7": (dicom(PixelRepresentation=7), "PixelRepresentation: 7; expected a number from 0 to 1"),
    "no frames": (dicom(NumberOfFrames=0), "NumberOfFrames: 0; expected a number from 1"),
    "negative frames": (dicom(NumberOfFrames=-1), "NumberOfFrames: -1; expected a number from 1"),
    "frames of text": (dicom(NumberOfFrames=b"two "), "NumberOfFrames: no number; expected"),
    "two frames": (
        dicom(NumberOfFrames=2, PixelData=bytes(16384)), "2 frames; expected one radiograph; export one.*data.frames"
    ),
    "frames that are not there": (dicom(NumberOfFrames=9999), "PixelData holds 8192 bytes"),
    "three samples of gray": (dicom(SamplesPerPixel=3), "SamplesPerPixel 3 and PhotometricInterpretation MONOCHROME2"),
    "colour without an order": (
        dicom(array=np.zeros((8, 8, 3), np.uint8), PlanarConfiguration=None), "PlanarConfiguration: no value"
    ),
    "photometric of old": (dicom(PhotometricInterpretation="HSV"), "PhotometricInterpretation HSV; expected MONO"),
    "palette without table": (
        dicom(PhotometricInterpretation="PALETTE COLOR"),
        "RedPaletteColorLookupTable without a whole RedPaletteColorLookupTableDescriptor and .*Data; mend",
    ),
    "short palette": (
        dicom(PhotometricInterpretation="PALETTE COLOR", **PALETTE | {"BluePaletteColorLookupTableData": bytes(20)}),
        "BluePaletteColorLookupTableDescriptor of .* states 256 entries of 16 bits, .* holds 20",
    ),
    "window of width 0": (
        dicom(WindowCenter=5, WindowWidth=0), "WindowCenter 5 and WindowWidth 0; expected .*mend or remove"
    ),
    "negative window": (dicom(WindowCenter=5, WindowWidth=-40), "WindowCenter 5 and WindowWidth -40; expected"),
    "window of nan": (dicom(WindowCenter=5, WindowWidth=b"nan "), "WindowCenter 5 and WindowWidth nan; expected"),
    "window at infinity": (dicom(WindowCenter=b"inf ", WindowWidth=7), "WindowCenter inf and WindowWidth 7"),
    "window of words": (dicom(WindowCenter=b"wide", WindowWidth=7), "WindowCenter that is no number; mend or remove"),
    "function of its own": (
        dicom(WindowCenter=5, WindowWidth=7, VOILUTFunction="CUBIC"), "VOILUTFunction is none of LINEAR"
    ),
    "slope of 0": (dicom(RescaleSlope=0, RescaleIntercept=1), "RescaleSlope 0 and RescaleIntercept 1; expected finite"),
    "slope of nan": (dicom(RescaleSlope=b"nan ", RescaleIntercept=1), "RescaleSlope nan and RescaleIntercept 1"),
    "table that is too short": (
        dicom(VOILUTSequence=lut(4096, 100)), "LUTDescriptor of VOILUTSequence states 4096 entries of 12 bits, .* 100"
    ),
    "table of 64k that is short": (dicom(ModalityLUTSequence=lut(0, 100)), "ModalityLUTSequence states 65536 entries"),
    "table of no bits": (dicom(VOILUTSequence=lut(16, 16, 0)), "states 16 entries of 0 bits"),
    "table of 99 bits": (dicom(VOILUTSequence=lut(16, 16, 99)), "states 16 entries of 99 bits"),
    "table without entries": (dicom(VOILUTSequence=without("LUTData")), "without a whole LUTDescriptor and LUTData"),
    "table without descriptor": (dicom(VOILUTSequence=without("LUTDescriptor")), "without a whole LUTDescriptor"),
    "presentation table": (dicom(PresentationLUTSequence=lut(300, 2)), "PresentationLUTSequence states 300 entries"),
    # DICOM: pixel data that lies
    "deflated, cut": (dicom(DeflatedExplicitVRLittleEndian, 0.7), "deflated DICOM that ends too early; fetch"),
    "deflated, damaged": (
        lambda path, write: (dicom()(path, write), path.write_bytes(deflated(path.read_bytes(), RNG.bytes(4000)))),
        "deflated DICOM that cannot be unpacked",
    ),
    "deflated bomb": (deflated_bomb, "unpacks to more than .* bytes; raise data.max_pixels"),
    "deflated bomb of unknown length": (
        lambda path, write: deflated_bomb(path, write, False), "unpacks to more than .* bytes; raise data.max_pixels"
    ),
    "rle, cut": (dicom(RLE, 0.6), CUT),
    "rle that ends before its segments": (code_stream(bytes(64), RLE), EARLY),
    "rle of wrong segments": (code_stream(struct.pack("<16I", 15, *[64] * 15) + b"0" * 90, RLE), EARLY),
    "rle of places far away": (code_stream(struct.pack("<16I", 2, 64, 2**31, *[0] * 13) + b"0" * 90, RLE), EARLY),
    "rle bomb": (code_stream(RLE_BOMB, RLE), "PixelData holds .* bytes of RLE for an image of 8192"),
    "jpeg 2000, cut": (dicom(J2K, cut=60), CUT),
    "jpeg 2000, its last byte cut": (dicom(J2K, cut=20), CUT),
    "jpeg 2000, of another size": (
        code_stream(j2k_header(50_000, 50_000, (9_000, 9_000)), J2K), "50000 x 50000 pixels of 1 samples; Columns 64"
    ),
    "jpeg 2000, of many tiles": (code_stream(j2k_header(64_000, 64_000, (1, 1)), J2K), "JPEG 2000 of 4096000000 tiles"),
    "jpeg 2000, of many components": (code_stream(j2k_header(64, 64, (64, 64), 9_999), J2K), "and 9999 components"),
    "jpeg 2000, a header alone": (code_stream(j2k_header(64, 64), J2K), EARLY),
    "jpeg lossless, cut": (dicom(JPEGLosslessSV1, 0.6), CUT),
    "jpeg-ls, cut": (dicom(JPEGLSLossless, 0.6), CUT),
    "jpeg-ls, of another size": (
        code_stream(b"\xff\xd8\xff\xf7\x00\x0b\x0c\xff\xff\xff\xff\x01\x01\x11\x00\xff\xd9", JPEGLSLossless),
        "65535 x 65535 pixels of 1 samples",
    ),
    "no code stream": (code_stream(b"12345678", JPEGLosslessSV1), "PixelData holds no JPEG Lossless.*TransferSyntaxUID"),
    "no frame": (code_stream(bytes(2), J2K), EARLY),
    "a film": (code_stream(b"1234", UID("1.2.840.10008.1.2.4.102")), "MPEG|no decoder|PixelData"),
    "a syntax of nobody": (
        replaced(dicom(), b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.9.9.9\0"), "TransferSyntaxUID|cannot be decoded"
    ),
    # Not broken at all
    "one pixel": (dicom(array=np.full((1, 1), 7, np.uint16)), "^$"),
    "one level": (dicom(array=np.full((64, 64), 7, np.uint16)), "^$"),
    "one signed level": (dicom(array=np.full((64, 64), -7, np.int16)), "^$"),
    "one pixel of png": (lambda path, write: Image.new("L", (1, 1), 7).save(path), "^$"),
    "wrong extension": (lambda path, write: Image.new("L", (9, 9), 7).save(path, format="TIFF"), "^$"),
}


@pytest.fixture(scope="module")
def read_once(
    tmp_path_factory: pytest.TempPathFactory, write_dicom: Write, read_in_child: Callable[..., Any]
) -> dict[str, tuple[Path, Any]]:
    """Each case's file, and what came of reading it in a process of its own with bounded memory and time."""
    folder = tmp_path_factory.mktemp("images")
    paths = {}
    for i, (case, (make, _)) in enumerate(IMAGES.items()):
        # The suffix says nothing of the content.
        paths[case] = folder / f"{i}.png"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            make(paths[case], write_dicom)
    found = read_in_child([(path, None) for path in paths.values()], folder)
    return {case: (path, outcome) for (case, path), outcome in zip(paths.items(), found, strict=True)}


@pytest.mark.parametrize("case", IMAGES)
def test_images(read_once: dict[str, tuple[Path, Any]], case: str) -> None:
    path, outcome = read_once[case]
    assert outcome.error == ("" if IMAGES[case][1] == "^$" else "ImageError"), outcome
    assert outcome.seconds < 10 and outcome.grown < 100, outcome
    assert not outcome.error or outcome.message.startswith(f"{path}: "), outcome
    assert re.search(IMAGES[case][1], outcome.message.removeprefix(f"{path}: ")), outcome.message


TRUNCATED = {
    "explicit": ExplicitVRLittleEndian,
    "deflated": DeflatedExplicitVRLittleEndian,
    "rle": RLELossless,
    "jpeg lossless": JPEGLosslessSV1,
    "jpeg-ls": JPEGLSLossless,
    "jpeg 2000": JPEG2000Lossless,
}


def test_truncated_anywhere(tmp_path: Path, write_dicom: Write, read_in_child: Callable[..., Any]) -> None:
    cut: dict[Path, Path] = {}
    for kind in (*TRUNCATED, "PNG", "JPEG", "TIFF", "JPEG2000"):
        whole = tmp_path / kind
        (dicom(TRUNCATED[kind]) if kind in TRUNCATED else saved(kind))(whole, write_dicom)
        data = whole.read_bytes()
        for length in np.linspace(0, len(data) - 1, 50).astype(int):
            path = tmp_path / f"{kind} {length}"
            path.write_bytes(data[:length])
            cut[path] = whole
    for path, outcome in zip(cut, read_in_child([(path, None) for path in cut], tmp_path), strict=True):
        assert outcome.error in ("", "ImageError") and outcome.grown < 100, (path.name, outcome)
        if not outcome.error:
            # Only what comes after the last pixel may be missing.
            np.testing.assert_array_equal(read_image(path), read_image(cut[path]), path.name)
            assert path.stat().st_size > 0.9 * cut[path].stat().st_size, path.name


def test_a_damaged_image_stops_or_is_skipped_as_set(tmp_path: Path, write_dicom: Write) -> None:
    png(tmp_path / "a.png")
    dicom(cut=300)(tmp_path / "b.dcm", write_dicom)
    (tmp_path / "studies.csv").write_text(HEADER + GOOD + "b.dcm,t,q,Clear.,train,1\n")
    reader = READERS.settings_of("csv")(name="csv", root=str(tmp_path))
    studies = load_studies(DataSpec(reader=reader, on_error="skip"))
    assert list(studies.splits["train"]["study_id"]) == ["s"]
    reasons = [skipped["reason"] for skipped in studies.skipped if skipped["file"]]
    assert len(reasons) == 1 and re.search(r"b\.dcm: PixelData holds", reasons[0])
    spec = DataSpec(reader=reader, on_error="raise")
    images = StudyImages(
        load_studies(spec).splits["train"], tmp_path, spec, channels=1, mean=(0.0,), std=(1.0,), labels=[], seed=0,
        train=False, max_views=1,
    )  # fmt: skip
    with pytest.raises(ImageError, match=r"b\.dcm: PixelData holds"):
        images[1]


def test_pillows_own_limit_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (3000, 2000)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match=r"x.png: more than 2000 pixels, the limit of Pillow.*MAX_IMAGE_PIXELS"):
        read_image(tmp_path / "x.png")


@pytest.mark.parametrize("value", [0, 7, 255])
def test_constant_and_tiny_images_are_fine(tmp_path: Path, write_dicom: Write, value: int) -> None:
    Image.new("L", (1, 1), value).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png").tolist() == [[[np.float32(value / 255)]]]
    write_dicom(tmp_path / "x.dcm", np.full((16, 16), value, np.uint16), 12)
    assert np.unique(read_image(tmp_path / "x.dcm")).tolist() == [np.float32(value / 4095)]


# Tables


def load(root: Path, name: str = "csv", settings: dict[str, Any] | None = None, **data: Any) -> None:
    reader = READERS.settings_of(name)(name=name, root=str(root), **(settings or {}))
    load_studies(DataSpec(reader=reader, **data))


HEADER = "path,study_id,patient_id,report,split,Mass\n"
GOOD = "a.png,s,p,Clear.,train,1\n"

TABLES: dict[str, tuple[str | bytes, str]] = {
    "missing column": (
        "path,studyid,report\na.png,s,Clear.\n",
        r"studies.csv: no column 'study_id'; did you mean 'studyid'\? \(found: path, studyid, report\).*data.reader",
    ),
    "no path": ("study_id\ns\n", r"no column 'path'.*found: study_id"),
    "empty file": ("", "studies.csv: empty; expected a header line"),
    "header only": (HEADER, "reader 'csv' found no study; check data.reader"),
    "not utf-8": (
        HEADER.encode() + GOOD.encode() + "b.png,t,q,Größe.,train,1\n".encode("latin-1"),
        r"expected UTF-8, found byte 0xf6 at offset \d+ \(line 3\); save the file as UTF-8",
    ),
    "too many cells": (HEADER + "a.png,s,p,Clear, both sides.,train,1\n", "line 2: 7 cells; expected 6.*quote"),
    "open quote": (HEADER + 'a.png,s,p,"Clear.,train,1\n', "not a CSV row.*mend the quotes"),
    "column twice": ("path,study_id,path\na,s,b\n", "column 'path' stands twice in the header; rename"),
    "no study name": (HEADER + "a.png,,p,Clear.,train,1\n", "line 2: column 'study_id' is empty; give"),
    "image twice": (HEADER + GOOD + GOOD, r"line 3: image 'a.png' stands twice in study 's'; remove a row"),
    "two reports": (
        HEADER + GOOD + "b.png,s,p,Effusion.,train,1\n",
        "line 3: study 's' has report 'Effusion.', but 'Clear.' on line 2; rows of one study must agree",
    ),
    "two patients": (HEADER + GOOD + "b.png,s,q,Clear.,train,1\n", "line 3: study 's' has patient 'q', but 'p'"),
    "two splits of a study": (HEADER + GOOD + "b.png,s,p,Clear.,val,1\n", "study 's' has split 'val', but 'train'"),
    "two labels": (HEADER + GOOD + "b.png,s,p,Clear.,train,0\n", "study 's' has Mass 0, but 1"),
    "unknown split": (HEADER + "a.png,s,p,Clear.,trian,1\n", "line 2: split 'trian'; did you mean 'train'.*val or"),
    "label": (
        HEADER + "".join(f"{i}.png,s{i},p,Clear.,train,1\n" for i in range(20)) + "b.png,t,p,Clear.,train,2\n",
        r"line 22: label 'Mass' is '2'; expected 1, 0, -1 \(uncertain\) or nothing; mend.*label_columns",
    ),
    "patient in two splits": (
        HEADER + GOOD + "b.png,t,p,Clear.,test,1\n",
        r"1 patients in two splits \(p in test and train\); all studies.*mend the split column",
    ),
    "no training study": (HEADER + "a.png,s,p,Clear.,test,1\n", r"split 'train' has no study.*test 1.*split column"),
    "empty report": (
        HEADER + "a.png,s,p, 1. .,train,1\n",
        "study 's': report is empty after cleaning by 'r2gen-iu'.*data.on_error: skip",
    ),
    "missing image": (
        HEADER + GOOD + "gone.png,t,q,Clear.,train,1\n",
        "1 of 2 images are missing: 'gone.png'; check data.reader.root, or set data.on_error: skip",
    ),
    "dots": (HEADER + "../a.png,s,p,Clear.,train,1\n", r"line 2: image '../a.png' leads to .*outside data.reader.root"),
    "absolute": (HEADER + "/etc/hostname,s,p,Clear.,train,1\n", "image '/etc/hostname' leads to .*outside"),
    "link": (HEADER + "link.png,s,p,Clear.,train,1\n", "line 2: image 'link.png' leads to .*outside"),
    "linked folder": (HEADER + "out/a.png,s,p,Clear.,train,1\n", "line 2: image 'out/a.png' leads to .*outside"),
    "no image name": (HEADER + ",s,p,Clear.,train,1\n", "line 2: image '' leads to"),
    "zero byte": (HEADER + "a\0.png,s,p,Clear.,train,1\n", "line 2"),
}


@pytest.mark.parametrize("case", TABLES)
def test_tables(tmp_path: Path, case: str) -> None:
    text, message = TABLES[case]
    root = tmp_path / "data"
    root.mkdir()
    png(tmp_path / "a.png", 8)
    png(root / "a.png", 8)
    (root / "link.png").symlink_to(tmp_path / "a.png")
    (root / "out").symlink_to(tmp_path)
    (root / "studies.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError) as error:
        load(root)
    assert str(root) in str(error.value)
    assert re.search(message, str(error.value), re.S), str(error.value)


@pytest.mark.parametrize("case", ["dots", "absolute", "link", "linked folder"])
def test_skip_never_forgives_a_path_out_of_root(tmp_path: Path, case: str) -> None:
    root = tmp_path / "data"
    root.mkdir()
    png(tmp_path / "a.png", 8)
    (root / "link.png").symlink_to(tmp_path / "a.png")
    (root / "out").symlink_to(tmp_path)
    (root / "studies.csv").write_text(str(TABLES[case][0]))
    with pytest.raises(DataError, match=r"outside data\.reader\.root"):
        load(root, on_error="skip")


def test_settings_that_the_data_set_cannot_meet(tmp_path: Path) -> None:
    png(tmp_path / "a.png", 8)
    (tmp_path / "studies.csv").write_text(HEADER + GOOD)
    with pytest.raises(DataError, match=r"data.labels: .* no label 'Mas'; did you mean 'Mass'\? \(found: Mass\)"):
        load(tmp_path, labels=["Mas"])
    with pytest.raises(DataError, match=r"no column 'text'.*found: path, study_id"):
        load(tmp_path, settings={"report": "text"})
    with pytest.raises(DataError, match="no column 'Edema'"):
        load(tmp_path, settings={"label_columns": ["Edema"]})
    with pytest.raises(DataError, match=r"other.csv: no such file; the folder holds a.png, studies.csv"):
        load(tmp_path, settings={"file": "other.csv"})
    with pytest.raises(DataError, match=r"data.reader.root: no folder .*nowhere.*check the path"):
        load(tmp_path / "nowhere")


# Indiana University


def entry(**fields: Any) -> dict[str, Any]:
    return {"id": "CXR1_IM-1", "report": "Clear.", "image_path": ["a.png"], "split": "train", **fields}


ANNOTATIONS: dict[str, tuple[Any, str]] = {
    "no json": ("{", "annotation.json, line 1: not JSON"),
    "list": ([entry()], "expected an object with lists train, val and test"),
    "unknown split": ({"training": [entry()]}, "split 'training'; expected train, val or test"),
    "no report": ({"train": [entry(report=None)]}, r"train\[0\]: 'report' is None; expected a string"),
    "no list": ({"train": [entry(image_path="a.png")]}, r"train\[0\]: 'image_path' is 'a.png'; expected a list"),
    "numbers": ({"train": [entry(image_path=[1])]}, r"'image_path' is \[1\]; expected a list of strings"),
    "no object": ({"train": ["CXR1"]}, r"train\[0\]: 'CXR1' is no object; expected id"),
    "twice": ({"train": [entry(), entry()]}, "study_id 'CXR1_IM-1' used by more than one study; give each"),
    "leak": ({"train": [entry()], "val": [entry(id="CXR1_IM-2")]}, "CXR1 in train and val"),
    "dots": ({"train": [entry(image_path=["../../a.png"])]}, r"train\[0\]: image .*outside data.reader.root"),
    "no image": ({"train": [entry(image_path=[])]}, "study 'CXR1_IM-1' without an image"),
}


@pytest.mark.parametrize("case", ANNOTATIONS)
def test_annotations(tmp_path: Path, case: str) -> None:
    content, message = ANNOTATIONS[case]
    (tmp_path / "images").mkdir()
    png(tmp_path / "images" / "a.png", 8)
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "annotation.json").write_text(text)
    with pytest.raises(DataError) as error:
        load(tmp_path, "iu-xray")
    assert str(tmp_path) in str(error.value)
    assert re.search(message, str(error.value)), str(error.value)


def test_neither_layout(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    message = (
        "expected R2Gen's 'annotation.json', or 'indiana_reports.csv' and 'indiana_projections.csv', or Open-i's "
        "'ecgen-radiology' or 'NLMCXR_reports.tgz'; found notes.txt"
    )
    with pytest.raises(DataError, match=message):
        load(tmp_path, "iu-xray")
    with pytest.raises(DataError, match="found no such folder; check the path"):
        load(tmp_path / "nowhere", "iu-xray")


def test_public_tables_that_disagree(tmp_path: Path) -> None:
    reports = "uid,MeSH,Problems,findings,impression\n1,m,normal,Clear.,\n"
    (tmp_path / "indiana_reports.csv").write_text(reports)
    (tmp_path / "indiana_projections.csv").write_text("uid,filename,projection\n2,a.png,Frontal\n")
    with pytest.raises(DataError, match=r"projections.csv, line 2: uid '2' has no row in indiana_reports.csv; remove"):
        load(tmp_path, "iu-xray")
    (tmp_path / "indiana_reports.csv").write_text(reports + "1,m,normal,Again.,\n")
    with pytest.raises(DataError, match=r"reports.csv: uid '1' stands more than once; remove"):
        load(tmp_path, "iu-xray")
    (tmp_path / "indiana_projections.csv").write_text("uid,filename,view\n1,a.png,Frontal\n")
    (tmp_path / "indiana_reports.csv").write_text(reports)
    with pytest.raises(DataError, match=r"no column 'projection' \(found: uid, filename, view\)"):
        load(tmp_path, "iu-xray")


# Phantoms


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(DataError, match=re.escape(str(tmp_path))):
        load(tmp_path, "phantom", {"studies": 2, "size": 32})
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_phantoms_of_other_settings_are_not_taken(tmp_path: Path) -> None:
    root = tmp_path / "phantom"
    load(root, "phantom", {"studies": 20, "size": 32})
    with pytest.raises(DataError, match="seed"):
        load(root, "phantom", {"studies": 20, "size": 32, "seed": 1})
