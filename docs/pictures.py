"""Pictures of the site that the library itself draws when it is built. A hook of MkDocs (`mkdocs.yml`)."""

import io
from typing import Any

import numpy as np
import torch
from PIL import Image

from medxray.data.phantom import draw_study
from medxray.pretrain import MASKERS, SEGMENTERS
from medxray.visual.mosaic import Row, hidden, mosaic, outlined

SIDE, TOKENS = 192, 16
MASKED = {
    "random": {"ratio": 0.85},
    "block": {"ratio": 0.85},
    "filtered-noise": {"ratio": 0.85},
    "rectangle": {},
    "contour": {"ratio": 0.85},
}


def on_files(files: Any, config: Any) -> Any:
    """Adds the pictures to the site."""
    from mkdocs.structure.files import File

    made = io.BytesIO()
    masks().save(made, "PNG", optimize=True)
    files.append(File.generated(config, "pictures/masks.png", content=made.getvalue()))
    return files


def masks() -> Image.Image:
    """Two made-up radiographs, the contour that is found in each, and what maskers leave visible of them."""
    segment = SEGMENTERS.build(SEGMENTERS.settings_of("classical")(name="classical"))
    rows = []
    for index in (0, 9):
        study = draw_study(7, index, SIDE, views=("PA",))
        picture = (study.images[0] / np.float32(study.images[0].max())).astype(np.float32)
        region = torch.from_numpy(segment(picture, "PA").mask.astype(np.float32))[None, None]
        coverage = torch.nn.functional.interpolate(region, (TOKENS, TOKENS), mode="area")[0]
        cells = [outlined(picture, region[0, 0].numpy())]
        for name, settings in MASKED.items():
            masker = MASKERS.build(MASKERS.settings_of(name)(name=name, **settings))
            masking = masker(coverage, 1, (TOKENS, TOKENS), torch.tensor([index]))
            cells.append(hidden(picture, masking.mask.reshape(TOKENS, TOKENS).numpy()))
        rows.append(Row(f"study {index + 1}", cells))
    return mosaic(rows, ["the chest, found", *MASKED])
