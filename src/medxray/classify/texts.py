"""Names of labels as vectors: from a file, or by a sentence encoder."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from medxray.registry import nearest
from medxray.types import SpecError, WeightsError

FILES = (".npz", ".safetensors", ".json")


def embed(source: str, labels: Sequence[str], prompt: str, width: int) -> Tensor:
    """Vectors (K, width) float32 of K labels.

    Args:
        source: a .npz, .safetensors or .json file, label -> vector; or the Hugging Face name or folder of a sentence
            encoder, whose token vectors are averaged.
        labels: names.
        prompt: what the sentence encoder is given, with {label} in it.
        width: what is expected.

    Raises:
        SpecError: a label without a vector, or vectors of another width.
        WeightsError: nothing by that name can be loaded.
    """
    path = Path(source).expanduser()
    if path.suffix in FILES:
        table = _table(path)
        lacking = [label for label in labels if label not in table]
        if lacking:
            raise SpecError(
                f"head.texts {source!r}: no vector for label {lacking[0]!r}{nearest(lacking[0], table)} "
                f"({len(lacking)} of {len(labels)} lack one; found: {', '.join(table) or 'none'}); add it, or name the "
                "labels of the file in data.labels"
            )
        rows = [table[label] for label in labels]
        shapes = {label: tuple(row.shape) for label, row in zip(labels, rows, strict=True)}
    else:
        vectors = _sentences(source, [prompt.replace("{label}", label) for label in labels])
        rows, shapes = list(vectors), {label: tuple(vectors.shape[1:]) for label in labels}
    for label, shape in shapes.items():
        if shape != (width,):
            found = f"{shape[0]} numbers" if len(shape) == 1 else f"an array {shape}"
            raise SpecError(
                f"head.texts {source!r}: {width} numbers a label were expected, found {found} for {label!r}; "
                "set head.text_width to theirs"
            )
    stacked = torch.stack(rows).float()
    if not bool(stacked.isfinite().all()):
        raise SpecError(f"head.texts {source!r}: vectors with numbers that are not finite; make the file anew")
    return stacked


def _table(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise WeightsError(f"head.texts {str(path)!r}: no such file; give one of label -> vector, or a sentence encoder")
    try:
        found: Mapping[str, Any]
        if path.suffix == ".safetensors":
            found = load_file(path)
        elif path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                found = dict(arrays)
        else:
            found = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                raise ValueError(f"a mapping of label -> vector was expected, found {type(found).__name__}")
        return {str(label): torch.as_tensor(vector, dtype=torch.float32) for label, vector in found.items()}
    except (OSError, EOFError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise WeightsError(f"head.texts {str(path)!r} cannot be read: {error}; expected label -> vector") from error


@torch.no_grad()
def _sentences(source: str, texts: list[str]) -> Tensor:
    """(K, D): the mean of the last layer over each text's tokens."""
    from transformers import AutoModel, AutoTokenizer

    from medxray.weights.architectures import read_config

    path = Path(source).expanduser()
    name = str(path) if path.exists() else source
    try:
        read_config(name, local_files_only=path.exists())
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, local_files_only=path.exists())
        model = AutoModel.from_pretrained(
            name, dtype=torch.float32, trust_remote_code=False, local_files_only=path.exists()
        ).eval()
        inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        tokens = model(**inputs).last_hidden_state
    # A file, a hub, a tokenizer and a model: each has errors of its own.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise WeightsError(
            f"head.texts {source!r} cannot be loaded: {reason}; expected the Hugging Face name or the folder of a text "
            f"encoder with its tokenizer, or a file of label -> vector ({', '.join(FILES)})"
        ) from error
    mask = inputs["attention_mask"][..., None].to(tokens.dtype)
    mean: Tensor = (tokens * mask).sum(1) / mask.sum(1)
    return mean
