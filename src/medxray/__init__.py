"""Foundation models and report generation for chest X-rays: one spec file over shared parts.

Names load their module when they are first used.
"""

import importlib
import warnings
from typing import TYPE_CHECKING, Any

from medxray import _torchvision

if TYPE_CHECKING:
    from medxray import encoders, metrics, tasks
    from medxray.classify import HEADS as heads
    from medxray.classify import Head
    from medxray.comparison import compare
    from medxray.data.images import read_image
    from medxray.data.readers import READERS as readers
    from medxray.data.readers import Reader
    from medxray.encoders import Encoder, JoinableEncoder, MaskableEncoder
    from medxray.llm import PROJECTORS as projectors
    from medxray.llm import REPORT_DECODERS as report_decoders
    from medxray.llm import Projector, ReportDecoder
    from medxray.metrics import Metric
    from medxray.pipeline import Pipeline, build, load
    from medxray.pretrain import MASKERS as maskers
    from medxray.pretrain import PIXEL_DECODERS as pixel_decoders
    from medxray.pretrain import SEGMENTERS as segmenters
    from medxray.pretrain import Masker, PixelDecoder, Segmenter
    from medxray.retrieval import RETRIEVERS as retrievers
    from medxray.retrieval import Retriever
    from medxray.scoring import score_table
    from medxray.spec import Spec
    from medxray.tasks import Task
    from medxray.types import Batch, Context, Features, MedxrayError, Prediction, Scores

_PLACES = {
    "build": "pipeline",
    "load": "pipeline",
    "Pipeline": "pipeline",
    "compare": "comparison",
    "score_table": "scoring",
    "Spec": "spec",
    "Batch": "types",
    "Context": "types",
    "Features": "types",
    "MedxrayError": "types",
    "Prediction": "types",
    "Scores": "types",
    "Encoder": "encoders",
    "JoinableEncoder": "encoders",
    "MaskableEncoder": "encoders",
    "Head": "classify",
    "heads": "classify:HEADS",
    "Masker": "pretrain",
    "PixelDecoder": "pretrain",
    "Segmenter": "pretrain",
    "maskers": "pretrain:MASKERS",
    "segmenters": "pretrain:SEGMENTERS",
    "pixel_decoders": "pretrain:PIXEL_DECODERS",
    "Projector": "llm",
    "ReportDecoder": "llm",
    "projectors": "llm:PROJECTORS",
    "report_decoders": "llm:REPORT_DECODERS",
    "Retriever": "retrieval",
    "retrievers": "retrieval:RETRIEVERS",
    "Metric": "metrics",
    "Reader": "data.readers",
    "readers": "data.readers:READERS",
    "read_image": "data.images",
    "Task": "tasks",
    # Rooms that are asked for by `medxray.encoders.register` and the like.
    "encoders": "",
    "metrics": "",
    "tasks": "",
}

__all__ = [
    "Batch",
    "Context",
    "Encoder",
    "Features",
    "Head",
    "JoinableEncoder",
    "MaskableEncoder",
    "Masker",
    "MedxrayError",
    "Metric",
    "Pipeline",
    "PixelDecoder",
    "Prediction",
    "Projector",
    "Reader",
    "ReportDecoder",
    "Retriever",
    "Scores",
    "Segmenter",
    "Spec",
    "Task",
    "build",
    "compare",
    "encoders",
    "heads",
    "load",
    "maskers",
    "metrics",
    "pixel_decoders",
    "projectors",
    "read_image",
    "readers",
    "report_decoders",
    "retrievers",
    "score_table",
    "segmenters",
    "tasks",
]

_torchvision.install()
# A notebook without widgets draws bars as text; libraries that this one imports need not say so.
warnings.filterwarnings("ignore", message="IProgress not found")


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'medxray' has no attribute {name!r}")
    place = _PLACES[name]
    if not place:
        return importlib.import_module(f"medxray.{name}")
    module, _, attribute = place.partition(":")
    value = getattr(importlib.import_module(f"medxray.{module}"), attribute or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
