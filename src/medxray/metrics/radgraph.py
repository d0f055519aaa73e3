"""RadGraph F1: entities and relations of both texts (Jain et al., NeurIPS 2021; Delbrouck et al., EMNLP 2022, ACL 2024).

The network is DyGIE++ (Wadden et al., EMNLP 2019) without coreference and events, run from local files.
"""

import json
import re
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from medxray.metrics import StudyMean
from medxray.metrics.learned import device, folder_with, read_once
from medxray.types import WeightsError
from medxray.weights import load_into, load_state
from medxray.weights.architectures import read_config

_NAMED = (
    "which the archive's config.json names (microsoft/BiomedNLP-PubMedBERT-base-uncased-abstract-fulltext for RadGraph)"
)
NEEDED = {
    "*.tar.gz or weights.th": (
        "radgraph-xl.tar.gz or radgraph.tar.gz of StanfordAIMI/RRG_scorers on the Hugging Face hub, or model.tar.gz of "
        "RadGraph 1.0.0 on PhysioNet, as it is or unpacked"
    ),
    "encoder/config.json": f"of the encoder on the Hugging Face hub, {_NAMED}",
    "encoder/tokenizer.json or encoder/vocab.txt": "of the same encoder",
}
_SETTING = "metrics.radgraph.weights"


@dataclass(frozen=True)
class Entity:
    """An entity of a report.

    Attributes:
        tokens: its words, apart by spaces, in the letters of the report.
        label: such as "OBS-DP" (RadGraph) or "Observation::definitely present" (RadGraph-XL).
        start: number of its first word in the report.
        end: number of its last word.
        relations: label and number, in the report's list of entities, of what it is related to.
    """

    tokens: str
    label: str
    start: int
    end: int
    relations: tuple[tuple[str, int], ...] = ()


def rewards(predicted: Sequence[Entity], reference: Sequence[Entity]) -> tuple[float, float, float]:
    """F1 of what two reports hold: simple, partial and complete; 0 where either has no entity, also where both have none.

    Three sets are compared. simple: (tokens, label) of each entity. partial: the same, and whether it has relations.
    complete: an entity without relations as (tokens, label); one with relations as (tokens, label, relation, tokens of
    the other) for each, in lower case.
    """
    predicted_sets, reference_sets = _sets(predicted), _sets(reference)
    simple, partial, complete = (
        2 * len(own & true) / (len(own) + len(true)) if own and true else 0.0
        for own, true in zip(predicted_sets, reference_sets, strict=True)
    )
    return simple, partial, complete


def _sets(entities: Sequence[Entity]) -> tuple[set[tuple[Any, ...]], ...]:
    complete: set[tuple[Any, ...]] = set()
    for entity in entities:
        if not entity.relations:
            complete.add((entity.tokens, entity.label))
        for relation, other in entity.relations:
            complete.add((entity.tokens.lower(), entity.label, relation, entities[other].tokens.lower()))
    simple = {(entity.tokens, entity.label) for entity in entities}
    return simple, {(entity.tokens, entity.label, bool(entity.relations)) for entity in entities}, complete


class RadGraph(StudyMean):
    """F1 of RadGraph's entities and relations in both texts, each study by itself, then the mean over studies.

    Values are the rewards that the field calls simple (RG_E), partial (RG_ER) and complete (RG_ER with the whole
    relation); `rewards` tells what they compare. A study in which either text is empty or has no entity counts 0, as in
    the published tables. Texts are scored as they stand. Which model is used, RadGraph or RadGraph-XL, is told by the
    labels in its vocabulary, and so are the rules that cut a text into words. Nothing is downloaded, and nothing beyond
    the installed packages is needed.

    With an encoder of BERT-base's size one core reads about 11 reports of 41 words a second; equal texts are read once.

    Args:
        weights: folder with the published archive (*.tar.gz), or what is in it (config.json, vocabulary/, weights.th),
            and a folder encoder/ with config.json and tokenizer.json or vocab.txt of the encoder that config.json names.
        batch_size: reports at a time.

    Raises:
        WeightsError: a file is missing, or is not RadGraph's.
    """

    values = ("radgraph-simple", "radgraph-partial", "radgraph-complete")

    def __init__(self, weights: str, batch_size: int = 16) -> None:
        super().__init__()
        self.folder = folder_with(_SETTING, weights, NEEDED)
        self.batch_size = batch_size
        self._annotator: _Annotator | None = None
        self._found: dict[str, list[Entity]] = {}

    def annotate(self, texts: Sequence[str]) -> list[list[Entity]]:
        """Entities of each text, in the order of their first and last words."""
        if self._annotator is None:
            self._annotator = _load(self.folder)
        return read_once(texts, self._found, self._annotator, self.batch_size, "radgraph")

    def statistics(self, predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
        found = self.annotate([*predictions, *references])
        pairs = zip(found[: len(predictions)], found[len(predictions) :], strict=True)
        rows = [rewards(predicted, reference) for predicted, reference in pairs]
        return np.array(rows, dtype=np.float64).reshape(-1, len(self.values))


def words_v1(text: str) -> list[str]:
    """A text's words as RadGraph was trained: each of / , : . ! ? ( ) stands alone."""
    return re.findall(r"[/,:.!?()]|[^\s/,:.!?()]+", text)


_ESCAPES = {r"\n": " ", r"\f": " ", r"\u2122": " ", r"\"": "``"}
"""What stands for a character in some exported reports."""
_APART = {").": ") .", "%.": "% .", ".'": ". '", "%,": "% ,", "%)": "% )"}


def words_xl(text: str) -> list[str]:
    """A text's words as RadGraph-XL was trained: runs of letters and digits, and runs of marks, some of them cut."""
    for escape, plain in _ESCAPES.items():
        text = text.replace(escape, plain)
    joined = " ".join(re.findall(r"\w+|[^\w\s]+", text))
    for marks, apart in _APART.items():
        joined = joined.replace(marks, apart)
    return joined.split()


class _Network(nn.Module):
    """Scores of spans of words (two ends and a width) as entities, and of their pairs as relations.

    Args:
        encoder: configuration of the text encoder.
        widest: words of the longest span.
        feature_size: width of the embedding of a span's length.
        hidden: widths of the scorers' hidden layers.
        kinds: labels of entities, without the empty one.
        relations: labels of relations.
    """

    def __init__(
        self, encoder: PretrainedConfig, widest: int, feature_size: int, hidden: list[int], kinds: int, relations: int
    ) -> None:
        super().__init__()
        self.encoder = AutoModel.from_config(encoder)
        self.widths = nn.Embedding(widest, feature_size)
        span = 2 * encoder.hidden_size + feature_size
        self.entity = _scorer([span, *hidden, kinds])
        self.mention = _scorer([span, *hidden, 1])
        self.relation = _scorer([3 * span, *hidden, relations])

    def words(self, ids: Tensor, mask: Tensor, pieces: Tensor) -> Tensor:
        """Vectors (N, D) of all words, each the mean of its pieces; zero for a word that the tokenizer leaves out.

        Args:
            ids: token ids (rows, L), with a first and a last token about the pieces of each row.
            mask: (rows, L) of what is no padding.
            pieces: how many pieces each of the N words has, (N,), in the order of the rows.
        """
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        inner = mask.roll(-1, 1).bool() & mask.bool()
        inner[:, 0] = inner[:, -1] = False
        of_word = torch.repeat_interleave(torch.arange(len(pieces), device=ids.device), pieces)
        sums = states.new_zeros(len(pieces), states.shape[-1]).index_add_(0, of_word, states[inner])
        return sums / pieces.clamp(min=1)[:, None]

    def spans(self, words: Tensor, last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """First and last words (S,) of all spans, and their vectors (S, 2 D + F).

        Args:
            words: vectors of all words, (N, D).
            last: the last word of each word's text, (N,).
        """
        width = torch.arange(self.widths.num_embeddings, device=words.device)
        first = torch.arange(len(words), device=words.device)[:, None].expand(-1, len(width))
        inside = first + width <= last[:, None]
        first, width = first[inside], width.expand_as(inside)[inside]
        return first, first + width, torch.cat([words[first], words[first + width], self.widths(width)], 1)

    def relations(self, spans: Tensor, mentions: Tensor) -> Tensor:
        """Labels (P, P) of what P spans are to each other, 0 for nothing."""
        P = len(spans)
        one, other = spans[:, None].expand(-1, P, -1), spans[None].expand(P, -1, -1)
        scores = self.relation(torch.cat([one, other, one * other], 2))
        return _best(scores + (mentions[:, None] + mentions[None])[..., None])


def _scorer(widths: list[int]) -> nn.Sequential:
    layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def _best(scores: Tensor) -> Tensor:
    """Labels from 1 on, or 0 where no score is above 0."""
    best, label = scores.max(-1)
    return torch.where(best > 0, label + 1, 0)


class _Annotator:
    """Texts -> entities.

    Args:
        network: in evaluation.
        tokenizer: of its encoder.
        kinds: labels of entities.
        relations: labels of relations.
        spans_per_word: how many spans, for each word, may have relations.
        length: pieces that the encoder takes at once; a longer text is encoded in parts.
    """

    def __init__(
        self,
        network: _Network,
        tokenizer: PreTrainedTokenizerBase,
        kinds: list[str],
        relations: list[str],
        spans_per_word: float,
        length: int,
    ) -> None:
        self.network, self.tokenizer = network, tokenizer
        self.kinds, self.relations = kinds, relations
        self.spans_per_word, self.length = spans_per_word, length
        self.cut = words_xl if any("::" in kind for kind in kinds) else words_v1
        self._pieces: dict[str, list[int]] = {}

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> list[list[Entity]]:
        where = device()
        network = self.network.to(where)
        reports = [self.cut(text) for text in texts]
        lengths = torch.tensor([len(report) for report in reports], device=where)
        if not int(lengths.sum()):
            return [[] for _ in texts]
        words = network.words(*(part.to(where) for part in self._encoded(reports)))
        first, end, spans = network.spans(words, (lengths.cumsum(0) - 1).repeat_interleave(lengths))
        kinds, mentions = _best(network.entity(spans)), network.mention(spans)[:, 0]
        # A span lies in the text of its first word.
        bounds = torch.searchsorted(first, lengths.cumsum(0)).tolist()
        begins = (lengths.cumsum(0) - lengths).tolist()
        found = []
        for report, begin, bound in zip(reports, begins, pairwise([0, *bounds]), strict=True):
            own = slice(*bound)
            found.append(
                self._entities(report, first[own] - begin, end[own] - begin, spans[own], kinds[own], mentions[own])
            )
        return found

    def _entities(
        self, report: list[str], first: Tensor, end: Tensor, spans: Tensor, kinds: Tensor, mentions: Tensor
    ) -> list[Entity]:
        """The entities of one report by its spans: their first and last words, vectors, labels, scores as mentions."""
        own = kinds.nonzero()[:, 0]
        # Relations are looked for among the spans that are likeliest to have any; only those of entities are told.
        many = int(torch.ceil(torch.tensor(float(len(report))) * self.spans_per_word))
        related = torch.isin(own, mentions.topk(min(many, len(mentions))).indices).nonzero()[:, 0]
        pairs = self.network.relations(spans[own[related]], mentions[own[related]]).cpu()
        numbers: list[int] = related.tolist()
        linked: list[list[tuple[str, int]]] = [[] for _ in own]
        for i, j in pairs.nonzero().tolist():
            linked[numbers[i]].append((self.relations[int(pairs[i, j]) - 1], numbers[j]))
        places = zip(first[own].tolist(), end[own].tolist(), kinds[own].tolist(), linked, strict=True)
        return [
            Entity(" ".join(report[i : j + 1]), self.kinds[k - 1], i, j, tuple(others)) for i, j, k, others in places
        ]

    def _encoded(self, reports: list[list[str]]) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids and mask (rows, L), and the number of pieces of each word. A word is cut into pieces by itself."""
        new = [
            word for word in dict.fromkeys(word for report in reports for word in report) if word not in self._pieces
        ]
        if new:
            # Two marks that training read without the slash.
            plain = [word[1:] if word in ("/.", "/?") else word for word in new]
            self._pieces.update(zip(new, self.tokenizer(plain, add_special_tokens=False)["input_ids"], strict=True))
        rows = []
        for report in reports:
            ids = [i for word in report for i in self._pieces[word]]
            parts = [ids[start : start + self.length - 2] for start in range(0, max(len(ids), 1), self.length - 2)]
            rows += [[self.tokenizer.cls_token_id, *part, self.tokenizer.sep_token_id] for part in parts]
        padded = torch.full((len(rows), max(map(len, rows))), self.tokenizer.pad_token_id or 0)
        mask = torch.zeros_like(padded)
        for i, row in enumerate(rows):
            padded[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
        return padded, mask, torch.tensor([len(self._pieces[word]) for report in reports for word in report])


def _load(folder: Path) -> _Annotator:
    with _unpacked(folder) as files:
        if missing := [name for name in ("config.json", "vocabulary", "weights.th") if not (files / name).exists()]:
            raise WeightsError(
                f"{_SETTING}: {folder}, or the archive in it, lacks {' and '.join(missing)} of RadGraph's archive; fetch it anew"
            )
        try:
            config = json.loads((files / "config.json").read_text(encoding="utf-8"))
            kinds, relations, dataset = _labels(files / "vocabulary")
        except (OSError, ValueError) as error:
            raise WeightsError(f"{_SETTING}: {folder} does not hold RadGraph: {error}; fetch it anew") from error
        state = load_state(files / "weights.th")
    try:
        model, reader = config["model"], config["dataset_reader"]
        scorer = model["feedforward_params"]
        hidden, layers = scorer["hidden_dims"], scorer["num_layers"]
        hidden = list(hidden) if isinstance(hidden, list) else [hidden] * layers
        widest, feature_size = model["max_span_width"], model["feature_size"]
        spans_per_word = model["modules"]["relation"]["spans_per_word"]
        propagated = model["modules"].get("coref", {}).get("coref_prop", 0)
        length = reader["token_indexers"]["bert"].get("max_length")
    except (KeyError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"{_SETTING}: config.json of {folder} is not RadGraph's: no {error}; fetch it anew"
        ) from error
    if propagated or widest != reader.get("max_span_width", widest):
        raise WeightsError(
            f"{_SETTING}: {folder} holds a DyGIE++ with coreference, or whose reader and model disagree on spans; "
            "take RadGraph or RadGraph-XL"
        )
    try:
        made = read_config(folder / "encoder", local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder / "encoder", local_files_only=True, trust_remote_code=False)
        network = _Network(made, widest, feature_size, hidden, len(kinds), len(relations))
    # A config, a tokenizer and a model: each has errors of its own.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise WeightsError(
            f"{_SETTING}: {folder / 'encoder'} cannot be read: {reason}; put there config.json and tokenizer.json or "
            f"vocab.txt of the encoder, {_NAMED}"
        ) from error
    may_miss = [name for name in network.state_dict() if name.startswith("encoder.pooler.")]
    load_into(network, _renamed(state, dataset, len(hidden)), str(folder), allow_missing=may_miss)
    if len(tokenizer) > network.encoder.get_input_embeddings().num_embeddings:
        raise WeightsError(
            f"{_SETTING}: the tokenizer in {folder / 'encoder'} has {len(tokenizer)} tokens, and the weights have fewer; "
            f"take that of the encoder, {_NAMED}"
        )
    length = length or getattr(made, "max_position_embeddings", 512)
    return _Annotator(network.eval(), tokenizer, kinds, relations, spans_per_word, length)


@contextmanager
def _unpacked(folder: Path) -> Iterator[Path]:
    """A folder with config.json, vocabulary/ and weights.th: this one, or what is in its archive."""
    if (folder / "weights.th").is_file():
        yield folder
        return
    archives = sorted(folder.glob("*.tar.gz"))
    if len(archives) > 1:
        raise WeightsError(
            f"{_SETTING}: {folder} holds {len(archives)} archives ({', '.join(a.name for a in archives)}); keep one of them"
        )
    with tempfile.TemporaryDirectory() as scratch:
        try:
            with tarfile.open(archives[0]) as archive:
                archive.extractall(scratch, filter="data")
        except (tarfile.TarError, OSError, EOFError) as error:
            raise WeightsError(f"{_SETTING}: {archives[0]} cannot be unpacked: {error}; fetch it anew") from error
        # Some archives hold the files in a folder.
        yield next((file.parent for file in sorted(Path(scratch).rglob("weights.th"))), Path(scratch))


def _labels(vocabulary: Path) -> tuple[list[str], list[str], str]:
    """Labels of entities and of relations, and the name of the data set that they were learned from."""
    files = sorted(vocabulary.glob("*__ner_labels.txt"))
    if len(files) != 1:
        raise ValueError(f"vocabulary/ has {len(files)} files *__ner_labels.txt, expected one")
    dataset = files[0].name.removesuffix("__ner_labels.txt")
    empty, *kinds = files[0].read_text(encoding="utf-8").removesuffix("\n").split("\n")
    if empty:
        raise ValueError(f"vocabulary/{files[0].name} begins with {empty!r}, expected an empty label")
    path = vocabulary / f"{dataset}__relation_labels.txt"
    return kinds, path.read_text(encoding="utf-8").removesuffix("\n").split("\n"), dataset


def _renamed(state: dict[str, Tensor], dataset: str, layers: int) -> dict[str, Tensor]:
    """The published tensors under the names of `_Network`."""
    entity, relation = f"{dataset}__ner_labels", f"{dataset}__relation_labels"
    names = {
        "_embedder.token_embedder_bert._matched_embedder.transformer_model.": "encoder.",
        "_endpoint_span_extractor._span_width_embedding.": "widths.",
    }
    for own, inner, last in (
        ("entity", f"_ner._ner_scorers.{entity}.0._module.", f"_ner._ner_scorers.{entity}.1._module."),
        (
            "mention",
            f"_relation._mention_pruners.{relation}._scorer.0._module.",
            f"_relation._mention_pruners.{relation}._scorer.1._module.",
        ),
        ("relation", f"_relation._relation_feedforwards.{relation}.", f"_relation._relation_scorers.{relation}."),
    ):
        names |= {f"{inner}_linear_layers.{i}.": f"{own}.{2 * i}." for i in range(layers)} | {
            last: f"{own}.{2 * layers}."
        }
    return {
        own + key.removeprefix(theirs): tensor
        for key, tensor in state.items()
        for theirs, own in names.items()
        # Some versions of transformers save these numbers 0, 1, 2 ... with a model.
        if key.startswith(theirs) and not key.endswith("position_ids")
    }
