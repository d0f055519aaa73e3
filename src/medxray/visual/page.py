"""A page: one HTML file that needs nothing beside it and no network, in light and dark."""

import base64
import hashlib
import io
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from html import escape
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image

from medxray import disk
from medxray.types import MedxrayError, RunError

TABLE = '<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
_CONTENT_POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; style-src 'unsafe-inline'"


def write_page(
    path: str | os.PathLike[str],
    title: str,
    intro: str,
    sections: Mapping[str, str],
    styles: str = "",
    script: str = "",
    data: Iterable[str] = (),
) -> None:
    """Write a page; a file that is there is replaced only once the new one is complete.

    Args:
        path: the file to write; its folder is made when missing.
        title: plain text.
        intro: HTML below the title.
        sections: heading -> HTML; empty ones are left out.
        styles: rules beside those of all pages.
        script: the only one that the page runs; its policy names it by its hash. Without one it runs none.
        data: HTML that the script reads, written piece by piece behind all that is seen.

    Raises:
        RunError: the file cannot be written.
    """
    kept = {name: body for name, body in sections.items() if body}
    links = "".join(f'<a href="#{_anchor(name)}">{escape(name)}</a>' for name in kept)
    body = "".join(
        f'<section id="{_anchor(name)}"><h2>{escape(name)}</h2>{content}</section>' for name, content in kept.items()
    )
    runs = f"; script-src '{_hash(script)}'" if script else ""
    start = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark">'
        f'<meta http-equiv="Content-Security-Policy" content="{_CONTENT_POLICY}{runs}">'
        f"<style>{style('report_page.css')}{styles}</style></head><body>"
        f"<header><h1>{escape(title)}</h1>{intro}<nav>{links}</nav></header>"
        f"<main>{body}</main><footer>Research use only. Not a medical device.</footer>\n"
    )
    end = (f"<script>{script}</script>" if script else "") + "</body></html>\n"
    with writing(path):
        _write(Path(path), start, data, end)


def style(name: str) -> str:
    """A style sheet of this room."""
    return resources.files("medxray.visual").joinpath(name).read_text(encoding="utf-8")


def fragment(html: str, styles: str = "") -> str:
    """A part of a page with the style of all pages, which reaches nothing outside of it: for a notebook.

    Args:
        html: the part.
        styles: rules beside those of all pages.
    """
    # Rules inside of a rule are of its element alone (CSS nesting).
    rules = style("report_page.css").replace(":root", "&").replace("16px/1.5", "14px/1.5")
    own = ".open{display:none} &{padding:12px 16px;border-radius:6px} .picture{cursor:auto} .picture>img{min-width:200px}"
    return f'<div class="medxray"><style>.medxray{{{rules}{own}{styles}}}</style>{html}</div>'


def image_tag(image: np.ndarray, largest: int, description: str, quality: int | None = None) -> str:
    """An image (H, W) in [0, 1] as an element, its longer side at most `largest` pixels.

    Args:
        image: gray values.
        largest: pixels.
        description: what is told of it where it is not seen.
        quality: of 100, for WebP; PNG, which loses nothing, if None.

    Raises:
        MedxrayError: another shape.
    """
    if image.ndim != 2 or not image.size:
        raise MedxrayError(f"{description}: expected an image of shape (H, W), found {image.shape}; pass one channel")
    levels = np.nan_to_num(np.asarray(image, dtype=np.float32), nan=0.0, posinf=1.0, neginf=0.0).clip(0, 1)
    picture = Image.fromarray((levels * 255).round().astype(np.uint8))
    scale = largest / max(picture.size)
    if scale < 1:
        width, height = (max(1, round(side * scale)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    width, height = picture.size
    return f'<img src="{encoded(picture, quality)}" alt="{escape(description)}" width="{width}" height="{height}">'


def encoded(picture: Image.Image, quality: int | None = None) -> str:
    """A picture as an address that holds it, WebP of some quality or PNG."""
    buffer = io.BytesIO()
    if quality is None:
        picture.save(buffer, "PNG", optimize=picture.mode == "L")
    else:
        # Slower methods save a tenth of the size at twice the time.
        picture.save(buffer, "WEBP", quality=quality, method=2)
    kind = "png" if quality is None else "webp"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Makes the folder of a page that is written inside; what the system refuses becomes a RunError."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        reason = error.strerror or error
        raise RunError(
            f"{path}: expected to write the report page, found: {reason}; free space or choose another folder"
        ) from error


def _anchor(name: str) -> str:
    return escape(name.lower().replace(" ", "-"))


def _hash(script: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode('ascii')}"


def _write(path: Path, start: str, data: Iterable[str], end: str) -> None:
    with disk.replacing(path) as staged, staged.open("w", encoding="utf-8", errors="replace") as file:
        file.write(start)
        file.writelines(data)
        file.write(end)
