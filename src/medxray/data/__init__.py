"""From files to studies, and from studies to batches. Names load their module when they are first used, so
that checking a spec needs neither torch nor datasets."""

import importlib
from typing import TYPE_CHECKING, Any

from medxray.types import DataError, ImageError

if TYPE_CHECKING:
    from medxray.data.images import ImageHeader, equalise, exposed_field, read_header, read_image, to_image
    from medxray.data.loading import Sample, StudyImages, collate, study_from
    from medxray.data.prepare import data_of, verify_shards, write_shards
    from medxray.data.readers import READERS, Reader
    from medxray.data.seeds import seed_of
    from medxray.data.study import FEATURES, Studies, features_of, load_studies
    from medxray.data.text import clean
    from medxray.data.transforms import random_crop_box, resize

_MODULES = {
    "images": ("ImageHeader", "equalise", "exposed_field", "read_header", "read_image", "to_image"),
    "loading": ("Sample", "StudyImages", "collate", "study_from"),
    "prepare": ("data_of", "verify_shards", "write_shards"),
    "readers": ("READERS", "Reader"),
    "seeds": ("seed_of",),
    "study": ("FEATURES", "Studies", "features_of", "load_studies"),
    "text": ("clean",),
    "transforms": ("random_crop_box", "resize"),
}

__all__ = [
    "FEATURES",
    "READERS",
    "DataError",
    "ImageError",
    "ImageHeader",
    "Reader",
    "Sample",
    "Studies",
    "StudyImages",
    "clean",
    "collate",
    "data_of",
    "equalise",
    "exposed_field",
    "features_of",
    "load_studies",
    "random_crop_box",
    "read_header",
    "read_image",
    "resize",
    "seed_of",
    "study_from",
    "to_image",
    "verify_shards",
    "write_shards",
]


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"medxray.data.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
