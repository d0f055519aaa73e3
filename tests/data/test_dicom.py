"""DICOM files: every transfer syntax, and all that lies between a stored value and a shown one."""

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.data.data_manager import DATA_ROOT
from pydicom.encaps import encapsulate
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_presentation_lut, apply_voi_lut
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from medxray.data import ImageError, read_header, read_image
from medxray.data.phantom import generate

Write = Callable[..., Path]

# JPEG baseline and extended lose some of what is written; high-throughput JPEG 2000 cannot be written here.
SYNTAXES = {
    "explicit little endian": ExplicitVRLittleEndian,
    "implicit little endian": ImplicitVRLittleEndian,
    "explicit big endian": ExplicitVRBigEndian,
    "deflated": DeflatedExplicitVRLittleEndian,
    "rle": RLELossless,
    "jpeg lossless": JPEGLossless,
    "jpeg lossless first order": JPEGLosslessSV1,
    "jpeg-ls": JPEGLSLossless,
    "jpeg 2000 lossless": JPEG2000Lossless,
}


def ramp(height: int, width: int, peak: int, dtype: type = np.uint16) -> np.ndarray:
    return np.linspace(0, peak, height * width).round().reshape(height, width).astype(dtype)


def lut(length: int, first: int, bits: int, entries: Any, vr: str = "US") -> pydicom.Dataset:
    item = pydicom.Dataset()
    item.LUTDescriptor = [length, first, bits]
    item["LUTDescriptor"].VR = vr
    item.LUTData = np.asarray(entries).astype(np.uint16).tolist()
    item["LUTData"].VR = "US"
    return item


# Transfer syntaxes


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """A phantom's 12 bits."""
    root = generate(tmp_path_factory.mktemp("drawn") / "data", studies=1, size=96, seed=1, format="dicom", progress=False)
    array = pydicom.dcmread(next((root / "images").rglob("*.dcm"))).pixel_array
    assert array.dtype == np.uint16 and array.max() > 2**11 and array.max() < 2**12
    return array[:90]


@pytest.mark.parametrize("name", SYNTAXES)
def test_twelve_bits_through_every_transfer_syntax(
    tmp_path: Path, write_dicom: Write, drawn: np.ndarray, name: str
) -> None:
    path = write_dicom(tmp_path / "x.dcm", drawn, 12, SYNTAXES[name])
    assert pydicom.dcmread(path).file_meta.TransferSyntaxUID == SYNTAXES[name]
    image = read_image(path)
    assert image.dtype == np.float32 and image.shape == (1, 90, 96)
    np.testing.assert_array_equal(np.round(image[0] * 4095).astype(np.uint16), drawn)
    np.testing.assert_array_equal(read_image(path.read_bytes()), image)
    header = read_header(path)
    assert (header.width, header.height, header.bits, header.format) == (96, 90, 12, "DICOM")


@pytest.mark.parametrize("name", [name for name in SYNTAXES if not name.startswith("jpeg lossless")])
def test_signed_pixels_through_every_transfer_syntax(
    tmp_path: Path, write_dicom: Write, drawn: np.ndarray, name: str
) -> None:
    signed = drawn.astype(np.int16) - np.int16(2048)
    path = write_dicom(tmp_path / "x.dcm", signed, 12, SYNTAXES[name], WindowCenter=0, WindowWidth=4097)
    np.testing.assert_array_equal(np.round(read_image(path)[0] * 4096 - 2048.5 + 1e-3).astype(np.int16), signed)


@pytest.mark.parametrize("name", ["explicit little endian", "rle", "jpeg 2000 lossless"])
@pytest.mark.parametrize("planar", [0, 1])
def test_planar_colour_becomes_luma(tmp_path: Path, write_dicom: Write, name: str, planar: int) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (64, 70, 3), np.uint8)
    if name != "explicit little endian":
        path = write_dicom(tmp_path / "x.dcm", rgb, 8, SYNTAXES[name])
    else:
        planes = np.moveaxis(rgb, -1, 0) if planar else rgb
        path = write_dicom(tmp_path / "x.dcm", rgb, 8, PlanarConfiguration=planar, PixelData=planes.tobytes())
    np.testing.assert_allclose(read_image(path)[0], rgb @ np.array([0.299, 0.587, 0.114]) / 255, atol=1e-6)


def test_palette_colour(tmp_path: Path, write_dicom: Write) -> None:
    array = ramp(16, 16, 255, np.uint8)
    palette: dict[str, Any] = {}
    for i, colour in enumerate(("Red", "Green", "Blue")):
        palette[f"{colour}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        palette[f"{colour}PaletteColorLookupTableData"] = (np.arange(256, dtype="<u2") * (50 * i + 60)).tobytes()
    path = write_dicom(tmp_path / "x.dcm", array, 8, PhotometricInterpretation="PALETTE COLOR", **palette)
    expected = apply_color_lut(array, pydicom.dcmread(path)) @ np.array([0.299, 0.587, 0.114]) / 65535
    # The brightest entry is far from white, and stays so.
    assert expected.max() < 0.5
    np.testing.assert_allclose(read_image(path)[0], expected, atol=1e-6)


# From stored to shown values


def test_without_a_window_white_is_that_of_the_bits(tmp_path: Path, write_dicom: Write) -> None:
    array = ramp(32, 32, 3000)
    np.testing.assert_array_equal(
        read_image(write_dicom(tmp_path / "x.dcm", array, 12))[0], array.astype(np.float32) / np.float32(4095)
    )
    # A word that says it is full holds what its brightest pixel needs.
    np.testing.assert_allclose(read_image(write_dicom(tmp_path / "y.dcm", array, 16))[0], array / 4095, atol=1e-7)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("function", [None, "LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("rescale", [(None, None), (2.0, -100.0), (-1.5, 6000.0)])
@pytest.mark.parametrize("window", [0, 1])
def test_windows_equal_pydicom(
    tmp_path: Path, write_dicom: Write, photometric: str, function: str | None, rescale: tuple[Any, Any], window: int
) -> None:
    array = ramp(64, 64, 4095)
    path = write_dicom(
        tmp_path / "x.dcm", array, 12, WindowCenter=[1800, 4000], WindowWidth=[2500, 700], VOILUTFunction=function,
        RescaleSlope=rescale[0], RescaleIntercept=rescale[1], PhotometricInterpretation=photometric,
    )  # fmt: skip
    data = pydicom.dcmread(path)
    shown = apply_voi_lut(apply_modality_lut(data.pixel_array, data), data, index=window)
    # pydicom spreads a window over what 12 bits rescale to.
    ends = np.array([0, 4095]) * (rescale[0] or 1) + (rescale[1] or 0)
    expected = (shown - ends[0]) / (ends[1] - ends[0])
    if photometric == "MONOCHROME1":
        expected = 1 - expected
    np.testing.assert_allclose(read_image(path, window=window)[0], expected, atol=1e-6)


def test_a_window_that_is_not_there(tmp_path: Path, write_dicom: Write) -> None:
    path = write_dicom(tmp_path / "x.dcm", ramp(8, 8, 4095), 12, WindowCenter=[1, 2], WindowWidth=[3, 4])
    with pytest.raises(ImageError, match=r"x.dcm: data.window is 2, but WindowCenter and WindowWidth hold 2 .0 is"):
        read_image(path, window=2)
    # A file without a window has nothing to choose from.
    plain = write_dicom(tmp_path / "y.dcm", ramp(8, 8, 4095), 12)
    np.testing.assert_array_equal(read_image(plain, window=2), read_image(plain))


def test_a_narrow_window_far_from_zero_loses_nothing(tmp_path: Path, write_dicom: Write) -> None:
    array = ramp(64, 64, 65535)
    path = write_dicom(tmp_path / "x.dcm", array, 16, WindowCenter=60000.25, WindowWidth=11)
    np.testing.assert_allclose(read_image(path)[0], np.clip((array - 59999.75) / 10 + 0.5, 0, 1), atol=1e-6)


def test_a_window_of_width_one_is_a_step(tmp_path: Path, write_dicom: Write) -> None:
    array = ramp(16, 16, 255)
    path = write_dicom(tmp_path / "x.dcm", array, 12, WindowCenter=100, WindowWidth=1)
    np.testing.assert_array_equal(read_image(path)[0], (array > 99.5).astype(np.float32))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("order", ["modality", "voi", "both"])
def test_tables_equal_pydicom(tmp_path: Path, write_dicom: Write, signed: bool, order: str) -> None:
    array = ramp(64, 64, 4000) if not signed else ramp(64, 64, 4000, np.int16) - np.int16(2000)
    first = -1500 if signed else 500
    curve = 4095 * (1 - np.linspace(0, 1, 3000) ** 2)
    fields = {}
    if order != "voi":
        fields["ModalityLUTSequence"] = [lut(3000, first, 16, curve, "SS" if signed else "US")]
        fields["ModalityLUTSequence"][0].ModalityLUTType = "US"
    if order != "modality":
        start = 0 if order == "both" else first
        fields["VOILUTSequence"] = [
            lut(3000, start, 10, np.arange(3000) // 3, "SS" if start < 0 else "US"),
            lut(3000, start, 12, curve, "SS" if start < 0 else "US"),
        ]
    path = write_dicom(tmp_path / "x.dcm", array, 13 if signed else 12, **fields)
    data = pydicom.dcmread(path)
    values = apply_modality_lut(data.pixel_array, data)
    for window, white in ((0, 1023), (1, 4095)):
        if order == "modality":
            expected = (values - values.min()) / float(values.max() - values.min())
        else:
            expected = apply_voi_lut(values, data, index=window) / white
        assert np.unique(expected).size > 500
        np.testing.assert_allclose(read_image(path, window=window)[0], expected, atol=1e-6)


def test_a_table_of_words_for_bytes_and_of_64k(tmp_path: Path, write_dicom: Write) -> None:
    array = ramp(32, 32, 255, np.uint8)
    item = pydicom.Dataset()
    item.LUTDescriptor, item.LUTData = [256, 0, 8], bytes(range(255, -1, -1))
    item["LUTDescriptor"].VR, item["LUTData"].VR = "US", "OW"
    path = write_dicom(tmp_path / "x.dcm", array, 8, VOILUTSequence=[item])
    np.testing.assert_allclose(read_image(path)[0], 1 - array / 255, atol=1e-6)
    deep = ramp(64, 64, 65535)
    item.LUTDescriptor, item.LUTData = [0, 0, 16], np.arange(65535, -1, -1).astype("<u2").tobytes()
    path = write_dicom(tmp_path / "y.dcm", deep, 16, VOILUTSequence=[item])
    np.testing.assert_allclose(read_image(path)[0], 1 - deep / 65535, atol=1e-6)


def test_presentation_lut(tmp_path: Path, write_dicom: Write) -> None:
    array = ramp(64, 64, 4095)
    plain = read_image(write_dicom(tmp_path / "x.dcm", array, 12))
    for photometric, shape, inverse in (
        ("MONOCHROME2", "IDENTITY", False),
        ("MONOCHROME2", "INVERSE", True),
        ("MONOCHROME1", "INVERSE", True),
        ("MONOCHROME1", "IDENTITY", True),
        (None, "IDENTITY", False),
        (None, "INVERSE", True),
    ):
        fields = {"PhotometricInterpretation": photometric, "PresentationLUTShape": shape}
        image = read_image(write_dicom(tmp_path / "y.dcm", array, 12, **fields))
        np.testing.assert_allclose(image, 1 - plain if inverse else plain, atol=1e-6)
    table = lut(4096, 0, 12, 4095 * np.linspace(0, 1, 4096) ** 2)
    path = write_dicom(tmp_path / "z.dcm", array, 12, PresentationLUTSequence=[table])
    expected = apply_presentation_lut(array, pydicom.dcmread(path)) / 4095
    np.testing.assert_allclose(read_image(path)[0], expected, atol=3e-4)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_and_does_not_count(tmp_path: Path, write_dicom: Write, photometric: str) -> None:
    array = ramp(40, 40, 1000)
    padded = array.copy()
    padded[:5] = 60000
    padded[5:10] = 60005
    fields = {"PhotometricInterpretation": photometric, "PixelPaddingValue": 60000, "PixelPaddingRangeLimit": 60009}
    image = read_image(write_dicom(tmp_path / "x.dcm", padded, 16, **fields))
    assert image[0, :10].max() == 0
    without = read_image(write_dicom(tmp_path / "y.dcm", array, 16, PhotometricInterpretation=photometric))
    np.testing.assert_allclose(image[0, 10:], without[0, 10:], atol=1e-6)
    signed = array.astype(np.int16)
    signed[:5] = -2000
    fields = {"PhotometricInterpretation": photometric, "PixelPaddingValue": -2000}
    image = read_image(write_dicom(tmp_path / "z.dcm", signed, 16, **fields))
    assert image[0, :5].max() == 0 and image[0, 5:].min() == 0 and image.max() == 1
    everywhere = write_dicom(tmp_path / "w.dcm", np.full((4, 4), -2000, np.int16), 16, **fields)
    assert read_image(everywhere).max() == 0


def test_bits_beside_the_stored_ones_are_left_out(tmp_path: Path, write_dicom: Write) -> None:
    array = ramp(40, 40, 4095)
    overlay = array | (np.arange(1600, dtype=np.uint16).reshape(40, 40) % 2 << 15)
    plain = read_image(write_dicom(tmp_path / "x.dcm", array, 12))
    np.testing.assert_array_equal(read_image(write_dicom(tmp_path / "y.dcm", overlay, 12)), plain)
    np.testing.assert_array_equal(read_image(write_dicom(tmp_path / "r.dcm", overlay, 12, RLELossless)), plain)
    left = write_dicom(tmp_path / "z.dcm", (array << 4) | 5, 12, HighBit=15)
    np.testing.assert_array_equal(read_image(left), plain)
    signed = array.astype(np.int16) - np.int16(2048)
    cut = (signed.view(np.uint16) & 0x0FFF).view(np.int16)
    one, two = (write_dicom(tmp_path / f"{i}.dcm", pixels, 12) for i, pixels in enumerate((signed, cut)))
    np.testing.assert_array_equal(read_image(one), read_image(two))


def test_frames_are_refused_or_the_first_is_read(tmp_path: Path, write_dicom: Write) -> None:
    frames = np.stack([ramp(64, 70, 4000), ramp(64, 70, 4000)[::-1]])
    one = read_image(write_dicom(tmp_path / "one.dcm", frames[0], 12))
    for name in ("explicit little endian", "rle", "jpeg 2000 lossless"):
        fields = {"NumberOfFrames": 2, "PixelData": frames.tobytes()}
        path = write_dicom(tmp_path / "x.dcm", frames[0], 12, SYNTAXES[name], **fields)
        assert read_header(path).frames == 2
        with pytest.raises(ImageError, match=r"2 frames; expected one radiograph; export one frame, or set data\.frames"):
            read_image(path)
        np.testing.assert_array_equal(read_image(path, frame="first"), one)


# Files


@pytest.mark.parametrize(
    ("name", "preamble"),
    [
        # A preamble promises what follows in little endian.
        ("explicit little endian", True), ("implicit little endian", True), ("explicit little endian", False),
        ("implicit little endian", False), ("explicit big endian", False),
    ],
)  # fmt: skip
def test_files_without_meta_information(tmp_path: Path, write_dicom: Write, name: str, preamble: bool) -> None:
    whole = write_dicom(tmp_path / "x.dcm", ramp(20, 30, 4000), 12, SYNTAXES[name])
    data = whole.read_bytes()
    length = 144 + int.from_bytes(data[140:144], "little")
    bare = (bytes(128) + b"DICM" if preamble else b"") + data[length:]
    np.testing.assert_array_equal(read_image(bare), read_image(whole))


def test_fragments_and_padding_of_a_code_stream(tmp_path: Path, write_dicom: Write) -> None:
    array = ramp(64, 64, 4000)
    path = write_dicom(tmp_path / "x.dcm", array, 12, JPEG2000Lossless)
    data = pydicom.dcmread(path)
    stream = pydicom.encaps.get_frame(data.PixelData, 0, number_of_frames=1)
    image = read_image(path)
    for padding in (b"", b"\0", b"\xff", b"\0" * 10):
        data.PixelData = encapsulate([stream + padding], fragments_per_frame=3)
        data["PixelData"].VR = "OB"
        buffer = io.BytesIO()
        data.save_as(buffer)
        np.testing.assert_array_equal(read_image(buffer.getvalue()), image)


def test_lossy_jpeg_equals_pydicom(tmp_path: Path, write_dicom: Write) -> None:
    from PIL import Image

    array = ramp(64, 64, 255, np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "JPEG", quality=90)
    path = write_dicom(tmp_path / "x.dcm", array, 8)
    data = pydicom.dcmread(path)
    data.file_meta.TransferSyntaxUID = pydicom.uid.JPEGBaseline8Bit
    data.PixelData = encapsulate([buffer.getvalue()])
    data["PixelData"].VR = "OB"
    data.save_as(path)
    np.testing.assert_allclose(read_image(path)[0], pydicom.dcmread(path).pixel_array / 255, atol=1e-7)
    assert abs(read_image(path)[0] * 255 - array).max() < 8


def composed(data: pydicom.FileDataset) -> np.ndarray:
    """Pixels as pydicom's own functions show them, in [0, 1]."""
    array, bits = data.pixel_array, int(data.BitsStored)
    if data.PhotometricInterpretation == "PALETTE COLOR":
        array, bits = apply_color_lut(array, data), data.RedPaletteColorLookupTableDescriptor[2]
    if array.ndim == 3:
        luma = array @ np.array([0.299, 0.587, 0.114])
        return luma / (2.0**bits - 1)
    values = apply_modality_lut(array, data).astype(np.float64)
    if data.get("VOILUTSequence"):
        shown = apply_voi_lut(values.astype(np.int64), data) / (2.0 ** data.VOILUTSequence[0].LUTDescriptor[2] - 1)
    elif data.get("WindowCenter") not in (None, ""):
        shown = apply_voi_lut(values, data)
        ends = np.array([-(2 ** (bits - 1)), 2 ** (bits - 1) - 1] if data.PixelRepresentation else [0, 2**bits - 1])
        ends = ends * float(data.get("RescaleSlope", 1)) + float(data.get("RescaleIntercept", 0))
        shown = (shown - ends[0]) / (ends[1] - ends[0])
    elif data.PixelRepresentation or "ModalityLUTSequence" in data:
        shown = (values - values.min()) / (values.max() - values.min())
    else:
        peak = 2.0**bits - 1
        if bits == data.BitsAllocated and bits > 8:
            peak = 2.0 ** max(8, int(array.max()).bit_length()) - 1
        shown = array / peak
    if data.PhotometricInterpretation == "MONOCHROME1":
        shown = 1 - shown
    if data.get("PixelPaddingValue") is not None:
        shown[array == data.PixelPaddingValue] = 0
    return shown


# Not readable by us though pydicom reads them, each for its reason.
REFUSED = {
    "JPEG2000-embedded-sequence-delimiter.dcm": "tiles",  # damaged on purpose: its code stream states another size
    "badVR.dcm": "NumberOfFrames: no number",
}


def public_files(folder: Path) -> list[Path]:
    """Files that pydicom's functions read."""
    readable = []
    for path in sorted(folder.glob("*.dcm")):
        try:
            data = pydicom.dcmread(path, force=True)
            if "TransferSyntaxUID" not in data.file_meta:
                data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
            if int(data.get("NumberOfFrames") or 1) == 1 and data.pixel_array.size:
                readable.append(path)
        except Exception:
            continue
    return readable


@pytest.mark.filterwarnings("ignore")
def test_pydicoms_own_files_equal_its_functions() -> None:
    files = public_files(Path(DATA_ROOT) / "test_files")
    assert len(files) >= 45
    for path in files:
        if path.name in REFUSED:
            with pytest.raises(ImageError, match=REFUSED[path.name]):
                read_image(path)
            continue
        expected = composed(pydicom.dcmread(path))
        np.testing.assert_allclose(read_image(path)[0], expected, atol=2e-6, err_msg=path.name)


@pytest.mark.filterwarnings("ignore")
def test_real_radiographs_equal_pydicoms_functions(shared: Path) -> None:
    files = public_files(shared / "data" / "dicom_chest")
    assert len(files) == 7
    for path in files:
        data = pydicom.dcmread(path, force=True)
        if "TransferSyntaxUID" not in data.file_meta:
            data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        np.testing.assert_allclose(read_image(path)[0], composed(data), atol=2e-6, err_msg=path.name)


# Headers


def test_header_of_dicom(tmp_path: Path, write_dicom: Write) -> None:
    array = ramp(20, 30, 4000)
    code = pydicom.Dataset()
    code.CodeMeaning = "postero-anterior"
    path = write_dicom(
        tmp_path / "x.dcm", array, 12, Manufacturer="Drawn", BurnedInAnnotation="NO", ViewPosition="AP",
        PhotometricInterpretation="MONOCHROME1", PatientName="Doe^Jane", PatientSex="F", PatientAge="093Y",
    )  # fmt: skip
    header = read_header(path)
    assert (header.width, header.height, header.bits, header.format, header.frames) == (30, 20, 12, "DICOM", 1)
    assert (header.photometric, header.manufacturer, header.view) == ("MONOCHROME1", "Drawn", "AP")
    assert header.burned_in is False and "Doe" not in repr(header)
    assert (header.sex, header.age_band) == ("female", "80+") and "93" not in repr(header)
    other = read_header(write_dicom(tmp_path / "y.dcm", array, 12, ViewCodeSequence=[code], BurnedInAnnotation="YES"))
    assert other.view == "PA" and other.burned_in is True
    bare = read_header(write_dicom(tmp_path / "z.dcm", array, 12, ViewPosition="LLD"))
    assert bare.view == "unknown" and bare.burned_in is None and bare.manufacturer == ""
    # Pixels are not looked at.
    short = path.read_bytes()[:-1000]
    assert read_header(short) == header
    with pytest.raises(ImageError, match="PixelData holds"):
        read_image(short)


@pytest.mark.filterwarnings("ignore")
def test_no_message_names_a_patient(tmp_path: Path, write_dicom: Write) -> None:
    """Identifiers stand beside broken fields, and in their place."""
    who = {"PatientName": "Doe^Jane", "PatientID": "SECRET7", "StudyDate": "19991231", "AccessionNumber": "SECRET7"}
    broken: list[dict[str, Any]] = [
        {"Rows": None}, {"PixelData": None}, {"NumberOfFrames": b"SECRET7 "}, {"WindowCenter": b"SECRET7 ", "WindowWidth": 1},
        {"PhotometricInterpretation": b"SECRET7 "}, {"PixelData": b"1"}, {"RescaleSlope": b"SECRET7 "},
        {"VOILUTFunction": b"SECRET7 ", "WindowCenter": 5, "WindowWidth": 7}, {"StudyDate": b"SECRET7 "},
        {"SOPClassUID": b"SECRET7 ", "PixelData": None}, {"PixelPaddingValue": b"SECRET7 "}, {"PatientName": b"\xffDoe"},
    ]  # fmt: skip
    array = ramp(8, 8, 4000)
    for i, fields in enumerate(broken):
        path = write_dicom(tmp_path / f"{i}.dcm", array, 12, **(who | fields))
        for read in (read_image, read_header):
            try:
                read(path)
            except ImageError as error:
                assert not re.search("Doe|SECRET7|1999", str(error)), str(error)
            else:
                assert read is read_header or set(fields) & {"StudyDate", "PatientName", "PixelPaddingValue"}
