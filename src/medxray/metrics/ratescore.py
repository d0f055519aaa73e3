"""RaTEScore (Zhao et al., EMNLP 2024): entities of both texts, matched by their meaning and weighed by their kinds."""

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForTokenClassification, AutoTokenizer

from medxray.metrics import StudyMean
from medxray.metrics.learned import device, folder_with, read_once
from medxray.types import WeightsError
from medxray.weights.architectures import read_config

TAGGER, ENCODER = "RaTE-NER-Deberta", "BioLORD-2023-C"
_SETTING = "metrics.ratescore.weights"
NEEDED = {
    f"{folder}/{name}".replace(" or ", f" or {folder}/"): f"of {owner}/{folder} on the Hugging Face hub"
    for owner, folder in (("Angelakeke", TAGGER), ("FremyCompany", ENCODER))
    for name in ("config.json", "model.safetensors or pytorch_model.bin", "tokenizer.json or spm.model or vocab.txt")
}

KINDS = ("ABNORMALITY", "ANATOMY", "DISEASE", "NON-ABNORMALITY", "NON-DISEASE")
AFFINITIES = {
    "long": np.array([
        [0.4276119164393705, 0.6240929990607657, 0.0034478181112993847, 0.5431049700217344, 0.27005425386213877],
        [0.7487824274337533, 0.2856134859160784, 0.4592143222158069, 0.02097055139911715, 0.00013736314126696204],
        [0.8396510075734789, 0.9950209388542061, 0.8460555030578727, 0.9820689020512646, 0.3789136708096537],
        [0.16546764653692908, 0.018670610691852826, 0.719397354576018, 0.0009357166071730684, 0.0927333564267591],
        [0.7759420231214385, 0.1839139293714062, 0.10073046076318157, 0.03860183811876373, 0.34065681486566446],
    ]),
    "short": np.array([
        [0.4070293318365468, 0.6952639610605605, 0.28342529466226446, 0.9479148658006686, 0.23875064111146294],
        [0.5829759950441763, 0.7709590751917746, 0.0006059634829551632, 0.794672584951181, 0.27982942400798977],
        [0.8840397619834857, 0.9637659445696822, 0.19018958438059513, 0.6962283914800402, 0.943727057946997],
        [0.1712744286898638, 0.4485149671497294, 0.00045065329822896076, 0.0007887930317199857, 0.8555432840895761],
        [0.9555801066212176, 0.13122106162635216, 0.6072996585919443, 0.05650711141169969, 0.3214769399791204],
    ]),
}  # fmt: skip
"""How much an entity of one of `KINDS` (row) counts whose nearest in the other text is of another (column), as published."""
PENALTIES = {"long": 0.8716553966489615, "short": 0.3611577852354489}
"""What is left of the similarity of two entities of which one is present and the other denied."""
_ONE_SIDED = 0.5
_NER_LENGTH, _NAME_LENGTH = 512, 30

Affinity = Literal["long", "short"]
Entity = tuple[str, str]
"""A name and one of `KINDS`."""


class RaTEScore(StudyMean):
    """RaTEScore of each study, then the mean over studies.

    A token classifier marks anatomy, abnormalities, diseases and what is denied of both, sentence by sentence; a text
    encoder makes a vector of each name. Every entity of one text is held against the nearest of the other: the cosine,
    less where one is denied and the other is not, weighed by both kinds. The score is the harmonic mean of both
    directions, and 0.5 where either text has no entity, as published. Texts are scored as they stand. Nothing is
    downloaded, and nothing beyond the installed packages is needed.

    The release cuts sentences by medspaCy's rules, which need packages that do not go with ours. Ours agree with them in
    .95 of 2,735 raw reports of the Indiana collection (.98 of the sentences), in .99 of the same in lower case and in .89
    where lines are broken after 70 letters; they were fitted on all of these. Like medspaCy's, they cut only before a
    capital letter or an enumeration (and "this"), so that most of a report in lower case is read as one sentence.

    Entities that are as near are taken as torch.topk takes them, which is the release's way and no rule. A text without
    a sentence has no entity here; the release takes the next text's in its place.

    With models of BERT-base's size one core scores about 5 pairs of reports of 41 words a second (200 raw reports of the
    Indiana collection). Equal sentences and names are read once, so that larger sets go faster.

    Args:
        weights: folder with RaTE-NER-Deberta/ and BioLORD-2023-C/, each as the Hugging Face hub has it: config.json,
            model.safetensors (or pytorch_model.bin), tokenizer.json. Another encoder may lie under that name.
        affinity: published weights of the kinds: "long", the release's default, or "short".
        batch_size: sentences at a time.

    Raises:
        WeightsError: a file is missing, or a model is not the one that is needed.
    """

    values = ("ratescore",)

    def __init__(self, weights: str, affinity: Affinity = "long", batch_size: int = 32) -> None:
        super().__init__()
        self.folder = folder_with(_SETTING, weights, NEEDED)
        self.affinity = affinity
        self.batch_size = batch_size
        self._models: tuple[_Tagger, _Encoder] | None = None
        self._tagged: dict[str, list[Entity]] = {}
        self._vectors: dict[str, Tensor] = {}

    def entities(self, texts: Sequence[str]) -> list[list[Entity]]:
        """Names and kinds of the entities of each text, in order."""
        tagger, _ = self._loaded()
        cut = [sentences(text) for text in texts]
        found = iter(
            read_once([s for one in cut for s in one], self._tagged, tagger, self.batch_size, "ratescore: entities")
        )
        return [[entity for _ in one for entity in next(found)] for one in cut]

    def statistics(self, predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
        _, encoder = self._loaded()
        found = self.entities([*predictions, *references])
        names = [name for one in found for name, _ in one]
        vectors = iter(read_once(names, self._vectors, encoder, self.batch_size, "ratescore: names"))
        texts = [(_stacked([next(vectors) for _ in one]), [KINDS.index(kind) for _, kind in one]) for one in found]
        pairs = zip(texts[: len(predictions)], texts[len(predictions) :], strict=True)
        return np.array([[rate(*own, *true, self.affinity)] for own, true in pairs], dtype=np.float64).reshape(-1, 1)

    def _loaded(self) -> "tuple[_Tagger, _Encoder]":
        if self._models is None:
            self._models = _Tagger(self.folder / TAGGER), _Encoder(self.folder / ENCODER)
        return self._models


def _stacked(vectors: list[Tensor]) -> Tensor:
    return torch.stack(vectors) if vectors else torch.zeros(0, 0)


def rate(
    predicted: Tensor,
    predicted_kinds: Sequence[int],
    reference: Tensor,
    reference_kinds: Sequence[int],
    affinity: Affinity = "long",
) -> float:
    """The score of two texts by their entities.

    Args:
        predicted: vectors of a text's entities, of length 1, (E, D).
        predicted_kinds: places of their kinds in `KINDS`.
        reference: those of the other text.
        reference_kinds: likewise.
        affinity: which weights.
    """
    if not len(predicted_kinds) or not len(reference_kinds):
        return _ONE_SIDED
    kinds = np.asarray(predicted_kinds), np.asarray(reference_kinds)
    precision = _weighed(predicted @ reference.T, *kinds, affinity)
    recall = _weighed(reference @ predicted.T, *kinds[::-1], affinity)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _weighed(cosines: Tensor, own: np.ndarray, other: np.ndarray, affinity: Affinity) -> float:
    # A name that stands twice in the other text, once denied, is as near both times: topk chooses as in the release.
    best, nearest = (found[:, 0].numpy() for found in cosines.topk(1))
    matched = other[nearest]
    weights = AFFINITIES[affinity][own, matched]
    anatomy, denied = KINDS.index("ANATOMY"), np.array([kind.startswith("NON-") for kind in KINDS])
    opposed = (denied[own] != denied[matched]) & (own != anatomy) & (matched != anatomy)
    values = best * np.where(opposed, PENALTIES[affinity], 1.0)
    return float((weights * values).sum() / weights.sum())


_END = re.compile(
    # A stop before a capital letter, an enumeration, or "this".
    r"(?<!\bDr)[.!?][\"')\]]*\s+(?=[\"'(\[]*[A-Z]|\d{1,2}\.\s+[A-Z]|this\b)"
    # A stop left over at the end of the text.
    r"|(?<=\w\.)\s+(?=\.\s*$)"
    # A line that begins like a sentence.
    r"|\s*\n\s*(?=[A-Z0-9])"
)
_SHORTEST = 3


def sentences(text: str) -> list[str]:
    """The sentences of a raw report; a number that enumerates stays with its sentence."""
    found, start = [], 0
    for match in _END.finditer(text):
        piece = text[start : match.end()].strip()
        if not re.fullmatch(r"\d{1,2}\.", piece):
            found.append(piece)
            start = match.end()
    return [piece for piece in (*found, text[start:].strip()) if len(piece) >= _SHORTEST]


def spans(labels: Sequence[str]) -> list[tuple[int, int, str]]:
    """First and last tokens of entities, and their kinds, by the release's reading of IOB labels.

    An entity begins at B- and goes on over I-, whatever their kinds. The label of the end token ends an entity as any
    other: where it is I-, the last entity is kept only if O, or nothing, stands before it.

    Args:
        labels: of all tokens, those of the beginning and the end of the text included.
    """
    found: list[tuple[int, int, str]] = []
    first, kind, adjoining = None, "", False
    for i, (label, following) in enumerate(pairwise(labels[1:]), start=1):
        if label == "O":
            continue
        if label.startswith("B-"):
            first, kind = i, label[2:]
        if not following.startswith("I-"):
            if first is not None:
                found.append((first, i, kind))
            first, adjoining = None, following != "O"
    if first is not None and not adjoining:
        found.append((first, len(labels) - 2, kind))
    return found


class _Tagger:
    """Sentences -> entities."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer, self.model = _read(folder, AutoModelForTokenClassification)
        self.labels: dict[int, str] = self.model.config.id2label
        expected = {"O", *(f"{mark}-{kind}" for mark in "BI" for kind in KINDS)}
        if unknown := sorted(set(self.labels.values()) - expected):
            raise WeightsError(
                f"{_SETTING}: {folder} gives the label {unknown[0]!r}; expected O, and B- and I- before {', '.join(KINDS)}; "
                f"take Angelakeke/{TAGGER}"
            )

    @torch.inference_mode()
    def __call__(self, texts: list[str]) -> list[list[Entity]]:
        where = device()
        batch = self.tokenizer(texts, padding=True, truncation=True, max_length=_NER_LENGTH, return_tensors="pt").to(
            where
        )
        choices = self.model.to(where)(**batch).logits.argmax(-1)
        found = []
        for ids, choice, mask in zip(batch["input_ids"], choices, batch["attention_mask"].bool(), strict=True):
            tokens = self.tokenizer.convert_ids_to_tokens(ids[mask].tolist())
            marked = spans([self.labels[label] for label in choice[mask].tolist()])
            found.append([(self.tokenizer.convert_tokens_to_string(tokens[i : j + 1]), kind) for i, j, kind in marked])
        return found


class _Encoder:
    """Names -> vectors (D,) of length 1, from the first token's."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer, self.model = _read(folder, AutoModel)

    @torch.inference_mode()
    def __call__(self, texts: list[str]) -> list[Tensor]:
        where = device()
        batch = self.tokenizer(texts, padding=True, truncation=True, max_length=_NAME_LENGTH, return_tensors="pt").to(
            where
        )
        first = self.model.to(where)(**batch).last_hidden_state[:, 0]
        return list(torch.nn.functional.normalize(first, dim=1).cpu())


def _read(folder: Path, reader: Any) -> tuple[Any, Any]:
    """Tokenizer and model of a folder, every tensor of it but a pooler, which is not used."""
    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        read_config(folder, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        model, told = reader.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **options)
    # A config, a tokenizer and a model: each has errors of its own.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise WeightsError(
            f"{_SETTING}: {folder} cannot be read: {reason}; fetch it from the Hugging Face hub anew"
        ) from error
    if missing := sorted(key for key in told["missing_keys"] if "pooler" not in key):
        raise WeightsError(
            f"{_SETTING}: the weights in {folder} lack {len(missing)} tensors of {type(model).__name__} "
            f"({', '.join(missing[:3])}); fetch it from the Hugging Face hub anew"
        )
    return tokenizer, model.eval()
