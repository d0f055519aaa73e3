"""A small run with all of its files, models and data sets of a few studies, and payloads to plant in them."""

import importlib.util
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import medxray

_VISUAL = importlib.util.spec_from_file_location("chromium", Path(__file__).parents[1] / "visual" / "conftest.py")
assert _VISUAL is not None and _VISUAL.loader is not None
_chromium = importlib.util.module_from_spec(_VISUAL)
_VISUAL.loader.exec_module(_chromium)
browser = _chromium.browser
LLAMA = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
}  # fmt: skip


class Payload:
    """Calls a function when it is unpickled by a reader without an allow-list."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


class Place:
    """A folder to plant in, and a mark that every payload makes if it runs.

    Attributes:
        folder: empty.
        mark: a folder that is there once a payload has run.
    """

    def __init__(self, folder: Path, run: Callable[[], Path]) -> None:
        self.folder, self.mark, self._run = folder, folder.parent / f"{folder.name}-mark", run
        folder.mkdir()

    @property
    def payload(self) -> Payload:
        """Makes the mark when it is unpickled."""
        return Payload(exec, self.code)

    @property
    def code(self) -> str:
        """Python that makes the mark."""
        return f"import os; os.makedirs({str(self.mark)!r}, exist_ok=True)"

    @property
    def pickled(self) -> bytes:
        """In letters alone, so that readers of text get as far as they can."""
        return pickle.dumps(self.payload, protocol=0)

    def put(self, name: str, content: bytes | str) -> Path:
        """Writes a file of the folder."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def run(self) -> Path:
        """A copy of the fitted run."""
        return Path(shutil.copytree(self._run(), self.folder / "run"))


@pytest.fixture
def place(tmp_path: Path, request: pytest.FixtureRequest) -> Place:
    return Place(tmp_path / "planted", lambda: request.getfixturevalue("small_run"))


@pytest.fixture(scope="session")
def small_studies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of 16 studies of noise."""
    root = tmp_path_factory.mktemp("studies") / "data"
    root.mkdir()
    rng, lines = np.random.default_rng(0), ["path,study_id,patient_id,report,split,Edema"]
    for i in range(16):
        Image.fromarray(rng.integers(0, 255, (32, 32), dtype=np.uint8)).save(root / f"{i}.png")
        split = "train" if i < 10 else "val" if i < 13 else "test"
        lines.append(f"{i}.png,study-{i},patient-{i},{'Edema is seen' if i % 2 else 'The lungs are clear'} .,{split},{i % 2}")
    (root / "studies.csv").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="session")
def small_spec(small_studies: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A report system of two steps."""
    return {
        "task": "report", "name": "small", "output": str(tmp_path_factory.mktemp("small") / "run"),
        "data": {"image_size": 32, "max_views": 1, "reader": {"name": "csv", "root": str(small_studies)}},
        "encoder": {"name": "vit", "width": 16, "depth": 1, "heads": 2, "patch": 16},
        "retriever": {"name": "nearest", "positives": 1, "negatives": 1},
        "decoder": {
            "name": "causal-lm", "trainable": True, "vocabulary": 60, "words": True, "prompt": "bare", "config": LLAMA,
        },
        "training": {"steps": 2, "save_steps": 1, "batch_size": 4},
        "generation": {"max_new_tokens": 4},
        "metrics": ["bleu"],
    }  # fmt: skip


@pytest.fixture(scope="session")
def small_run(small_spec: dict[str, Any]) -> Path:
    """Its run folder, evaluated."""
    pipeline = medxray.build(small_spec).fit(progress=False)
    pipeline.evaluate(ablations=False, subgroups=False, progress=False)
    return pipeline.folder


@pytest.fixture(scope="session")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of transformers: a Llama of one layer and its tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from medxray.llm.causal_lm import learn_tokenizer

    folder = tmp_path_factory.mktemp("llama") / "model"
    AutoModelForCausalLM.from_config(AutoConfig.for_model(vocab_size=60, **LLAMA)).save_pretrained(folder)
    learn_tokenizer(["the lungs are clear ."], 60, True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vision_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of transformers: a ViT of one layer for 32 pixels."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(
        "vit", image_size=32, patch_size=16, num_channels=1, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("vit") / "model"
    AutoModel.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True, scope="session")
def own_modules(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Code of models that a careless reader fetches stays in a folder of its own."""
    import transformers.dynamic_module_utils as dynamic

    dynamic.HF_MODULES_CACHE = str(tmp_path_factory.mktemp("modules"))
