"""RaTEScore: sentences, entities and the score by their definition, with small random models that are made here.

The package RaTEScore is compared with where it is installed; medspaCy, which it needs for sentences, stands aside.
"""

import itertools
import json
import shutil
import sys
import types
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForTokenClassification, BertModel

import medxray.metrics
from medxray.metrics.ratescore import AFFINITIES, ENCODER, KINDS, PENALTIES, TAGGER, RaTEScore, rate, sentences, spans
from medxray.types import WeightsError

LABELS = ["O", *(f"{mark}-{kind}" for kind in KINDS for mark in "BI")]
OPPOSED = {
    ("DISEASE", "NON-DISEASE"), ("DISEASE", "NON-ABNORMALITY"), ("ABNORMALITY", "NON-DISEASE"),
    ("ABNORMALITY", "NON-ABNORMALITY"),
}  # fmt: skip
WORDS = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "no", "left", "effusion", "edema", "heart", "large", ".", "##s", "is",
    "pneumothorax", "small", "lung", "the", "lungs", "clear",
]  # fmt: skip
TEXTS = [
    "Large left effusions. No edema. The heart is large.", "No pneumothorax. Lungs clear.", "The heart is small.", "",
    "Small left pneumothorax. No edema.", "no edema . the heart is large . small effusion .", "zebra", " . ",
    "Left lung clear. Small left effusion. Heart is large. No pneumothorax.", "No edema.",
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Heart is large. No edema.", ["Heart is large.", "No edema."]),
        ("1. No edema. 2. Small effusion.", ["1. No edema.", "2. Small effusion."]),
        ("heart is large . no edema .", ["heart is large . no edema ."]),
        ("nodule in the apex . this may be a scar .", ["nodule in the apex .", "this may be a scar ."]),
        (
            "A 1.5 cm nodule. Told to Dr. Smith at 5 p.m. today.",
            ["A 1.5 cm nodule.", "Told to Dr. Smith at 5 p.m. today."],
        ),
        ("No edema. .", ["No edema."]),
        ("IMPRESSION:\n No edema.\nHeart is\n large.", ["IMPRESSION:", "No edema.", "Heart is\n large."]),
        ('Is it pneumonia? "Yes." (Left.) No!', ["Is it pneumonia?", '"Yes."', "(Left.)", "No!"]),
        ("A. No.", ["No."]),
        ("", []),
        (" .\n ", []),
    ],
)
def test_sentences(text, expected):
    assert sentences(text) == expected


# B and I of two kinds; beside them what the release's own reading gives.
READINGS = [
    ("- O O O -", []),
    ("- B O O -", [(1, 1, "b")]),
    ("- B I I -", [(1, 3, "b")]),
    ("- B I O O", [(1, 2, "b")]),
    ("- B B O O", [(1, 1, "b"), (2, 2, "b")]),
    ("- B I C I O", [(1, 2, "b"), (3, 4, "c")]),
    ("- B J O O", [(1, 2, "b")]),
    ("- I I O O", []),
    ("- I B I O", [(2, 3, "b")]),
    ("- O O B O", [(3, 3, "b")]),
    ("- O B I I", [(2, 3, "b")]),
    ("- B O B I", [(1, 1, "b"), (3, 3, "b")]),
    ("- O C B I", [(2, 2, "c")]),
    ("- B I B I", [(1, 2, "b")]),
    ("- B B B B", [(1, 1, "b"), (2, 2, "b"), (3, 3, "b")]),
    ("- -", []),
]


@pytest.mark.parametrize(("labels", "expected"), READINGS)
def test_labels_are_read_as_in_the_release(labels, expected):
    names = {"-": "O", "O": "O", "B": "B-b", "I": "I-b", "C": "B-c", "J": "I-c"}
    assert spans([names[label] for label in labels.split()]) == expected


def unit(rng: np.random.Generator, size: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.tensor(rng.normal(size=(size, 6)), dtype=torch.float32), dim=1)


# As the release names them; the whole tables are compared with the package's below.
PUBLISHED = {
    "long": {
        "abnormality_abnormality": 0.4276119164393705, "abnormality_anatomy": 0.6240929990607657,
        "anatomy_abnormality": 0.7487824274337533, "disease_anatomy": 0.9950209388542061,
        "non-disease_disease": 0.10073046076318157, "disease_non-disease": 0.3789136708096537,
        "non-abnormality_non-disease": 0.0927333564267591,
    },
    "short": {
        "non-abnormality_disease": 0.00045065329822896076, "disease_disease": 0.19018958438059513,
        "anatomy_non-abnormality": 0.794672584951181, "non-disease_non-disease": 0.3214769399791204,
    },
}  # fmt: skip


def test_affinities_are_the_published_ones():
    for affinity, pairs in PUBLISHED.items():
        for pair, value in pairs.items():
            own, other = (KINDS.index(kind.upper()) for kind in pair.split("_"))
            assert AFFINITIES[affinity][own, other] == value
    assert PENALTIES == {"long": 0.8716553966489615, "short": 0.3611577852354489}


Vectors = Sequence[torch.Tensor] | torch.Tensor


def rate_by_hand(
    predicted: Vectors, predicted_kinds: list[int], reference: Vectors, reference_kinds: list[int], affinity: str
) -> float:
    """One entity at a time."""

    def one_way(own: Vectors, own_kinds: list[int], other: Vectors, other_kinds: list[int]) -> float:
        total = weights = 0.0
        for vector, kind in zip(own, own_kinds, strict=True):
            cosines = [float(vector @ one) for one in other]
            place = int(np.argmax(cosines))
            nearest, names = other_kinds[place], (KINDS[kind], KINDS[other_kinds[place]])
            weight = float(AFFINITIES[affinity][kind, nearest])
            opposed = names in OPPOSED or names[::-1] in OPPOSED
            total += cosines[place] * weight * (PENALTIES[affinity] if opposed else 1)
            weights += weight
        return total / weights

    if not predicted_kinds or not reference_kinds:
        return 0.5
    precision = one_way(predicted, predicted_kinds, reference, reference_kinds)
    recall = one_way(reference, reference_kinds, predicted, predicted_kinds)
    return 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize("affinity", ["long", "short"])
def test_rate_is_the_mean_of_both_directions_weighed_by_kinds(affinity):
    rng = np.random.default_rng(0)
    for _ in range(100):
        sizes = rng.integers(1, 9, 2)
        (own, true), (own_kinds, true_kinds) = (
            (unit(rng, n) for n in sizes),
            (rng.integers(0, 5, n).tolist() for n in sizes),
        )
        expected = rate_by_hand(own, own_kinds, true, true_kinds, affinity)
        assert rate(own, own_kinds, true, true_kinds, affinity) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_rate_of_identical_empty_and_opposed_texts():
    rng = np.random.default_rng(0)
    vectors = unit(rng, 5)
    for affinity in ("long", "short"):
        assert rate(vectors, [0, 1, 2, 3, 4], vectors, [0, 1, 2, 3, 4], affinity) == pytest.approx(1)
        assert rate(vectors, [0] * 5, vectors, [3] * 5, affinity) == pytest.approx(PENALTIES[affinity])
        assert rate(vectors, [1] * 5, vectors, [3] * 5, affinity) == pytest.approx(1)
    empty = torch.zeros(0, 6)
    assert rate(empty, [], vectors, [0] * 5) == rate(vectors, [0] * 5, empty, []) == rate(empty, [], empty, []) == 0.5
    right = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert rate(right[0], [0], right[1], [0]) == 0


def made(folder: Path, seed: int = 5) -> Path:
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": len(WORDS), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 40, "initializer_range": 1.0,
    }  # fmt: skip
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {label: i for i, label in enumerate(LABELS)}}
    BertForTokenClassification(BertConfig(**sizes, **names)).save_pretrained(folder / TAGGER)
    BertModel(BertConfig(**sizes)).save_pretrained(folder / ENCODER)
    for name in (TAGGER, ENCODER):
        (folder / name / "vocab.txt").write_text("\n".join(WORDS) + "\n")
        AutoTokenizer.from_pretrained(folder / name).save_pretrained(folder / name)
    return folder


@torch.no_grad()
def entities_by_hand(folder: Path, text: str) -> list[tuple[str, str]]:
    """One sentence at a time, words by hand."""
    tagger = BertForTokenClassification.from_pretrained(folder / TAGGER).eval()
    found = []
    for sentence in sentences(text):
        tokens = []
        for word in sentence.lower().replace(".", " . ").split():
            split = word not in WORDS and word.endswith("s") and word[:-1] in WORDS
            tokens += [word[:-1], "##s"] if split else [word if word in WORDS else "[UNK]"]
        ids = torch.tensor([[2, *(WORDS.index(token) for token in tokens), 3]])
        labels = [LABELS[i] for i in tagger(input_ids=ids).logits[0].argmax(1).tolist()]
        for first, last, kind in spans(labels):
            found.append((" ".join(tokens[first - 1 : last]).replace(" ##", "").replace(" .", "."), kind))
    return found


@torch.no_grad()
def score_by_hand(folder: Path, predicted: list[tuple[str, str]], reference: list[tuple[str, str]]) -> float:
    """One name at a time."""
    encoder = BertModel.from_pretrained(folder / ENCODER).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / ENCODER)
    vectors = []
    for name, _ in (*predicted, *reference):
        first = encoder(**tokenizer(name, return_tensors="pt")).last_hidden_state[0, 0]
        vectors.append(first / first.norm())
    kinds = [KINDS.index(kind) for _, kind in (*predicted, *reference)]
    n = len(predicted)
    return rate_by_hand(vectors[:n], kinds[:n], vectors[n:], kinds[n:], "long")


def test_entities_and_scores_are_those_of_the_models(tmp_path):
    folder = made(tmp_path)
    metric = medxray.metrics.get("ratescore")(weights=str(folder), batch_size=3)
    found = metric.entities(TEXTS)
    assert found == [entities_by_hand(folder, text) for text in TEXTS]
    assert len({kind for one in found for _, kind in one}) > 2
    assert any(name not in WORDS for one in found for name, _ in one)  # of several tokens
    references = [*TEXTS[3:], *TEXTS[:3]]
    rows = metric.statistics(TEXTS, references)
    expected = [score_by_hand(folder, a, b) for a, b in zip(found, metric.entities(references), strict=True)]
    assert rows.shape == (len(TEXTS), 1) and rows[:, 0] == pytest.approx(expected, abs=1e-5)
    assert len(set(rows[:, 0].round(4))) > 2
    assert metric.compute(predictions=TEXTS, references=references) == {"ratescore": pytest.approx(rows.mean())}
    same = metric.statistics(TEXTS, TEXTS)[:, 0]
    assert same == pytest.approx([1 if one else 0.5 for one in found], abs=1e-5)
    assert metric.statistics([], []).shape == (0, 1)
    other = RaTEScore(str(folder), "short").statistics(TEXTS, references)
    assert (abs(other - rows) > 1e-3).any()


def test_equal_sentences_and_names_are_read_once(tmp_path):
    metric = RaTEScore(str(made(tmp_path)), batch_size=4)
    expected = metric.statistics(TEXTS, TEXTS[::-1])
    read: list[str] = []
    models = metric._loaded()
    metric._models = tuple(lambda texts, own=own: read.extend(texts) or own(texts) for own in models)  # type: ignore[assignment]
    assert (metric.statistics(TEXTS[::-1], TEXTS) == pytest.approx(expected[::-1], abs=1e-6)) and read == []
    metric.entities(["Lungs clear. The heart is large. No edema. No edema. Edema."])
    assert read == ["Edema."]


def test_what_is_missing_is_named_with_its_source(tmp_path):
    with pytest.raises(
        WeightsError, match=r"no folder .*absent; .*Angelakeke/RaTE-NER-Deberta.*FremyCompany/BioLORD-2023-C"
    ):
        RaTEScore(str(tmp_path / "absent"))
    folder = made(tmp_path / "whole")
    for file, shown in (
        (
            f"{TAGGER}/model.safetensors",
            "model.safetensors or RaTE-NER-Deberta/pytorch_model.bin; .*Angelakeke/RaTE-NER-Deberta",
        ),
        (f"{ENCODER}/config.json", "config.json; fetch .*FremyCompany/BioLORD-2023-C on the Hugging Face hub"),
    ):
        shutil.move(folder / file, tmp_path / "kept")
        with pytest.raises(
            WeightsError, match=rf"metrics.ratescore.weights: .*whole lacks {file.split('/')[0]}/{shown}"
        ):
            RaTEScore(str(folder))
        shutil.move(tmp_path / "kept", folder / file)
    RaTEScore(str(folder))


def test_what_is_not_the_model_is_refused(tmp_path):
    folder = made(tmp_path)
    config = json.loads((folder / TAGGER / "config.json").read_text())
    labels = config["id2label"]
    (folder / TAGGER / "config.json").write_text(json.dumps({**config, "id2label": {**labels, "1": "B-DRUG"}}))
    with pytest.raises(WeightsError, match=r"label 'B-DRUG'; expected O, .*ABNORMALITY.*take Angelakeke"):
        RaTEScore(str(folder)).entities(["No edema."])
    (folder / TAGGER / "config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"RaTE-NER-Deberta cannot be read: "):
        RaTEScore(str(folder)).entities(["No edema."])
    (folder / TAGGER / "config.json").write_text(json.dumps(config))
    # A text encoder without the classifier would get a random one.
    shutil.copy(folder / ENCODER / "model.safetensors", folder / TAGGER / "model.safetensors")
    with pytest.raises(WeightsError, match=r"lack 2 tensors of BertForTokenClassification \(classifier.bias, "):
        RaTEScore(str(folder)).entities(["No edema."])


@pytest.fixture
def package(monkeypatch):
    """RaTEScore with our sentences in the place of medspaCy's."""

    class Cut:
        def __init__(self, text: str) -> None:
            self.sents = sentences(text)

    stand_in = types.ModuleType("medspacy")
    stand_in.load = lambda **_: Cut  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "medspacy", stand_in)
    yield pytest.importorskip("RaTEScore")
    for name in [name for name in sys.modules if name.split(".")[0] == "RaTEScore"]:
        monkeypatch.delitem(sys.modules, name)


def test_spans_equal_the_package(package):
    post_process = sys.modules["RaTEScore.utils"].post_process

    class Tokenizer:
        convert_tokens_to_string = staticmethod(" ".join)

    names = ["O", "B-a", "I-a", "B-b", "I-b"]
    for size in range(6):
        tokens = ["[CLS]", *(f"t{i}" for i in range(size)), "[SEP]"]
        for labels in itertools.product(names, repeat=size + 1):
            expected = post_process(tokens, ["O", *labels], Tokenizer)
            assert [(" ".join(tokens[i : j + 1]), kind) for i, j, kind in spans(["O", *labels])] == expected


@pytest.mark.parametrize("affinity", ["long", "short"])
def test_rate_equals_the_package(package, affinity):
    matrices = {"long": package.scorer.DEFAULT_MATRIX_LONG, "short": package.scorer.DEFAULT_MATRIX_SHORT}
    matrix = {tuple(key.upper().split("_")): value for key, value in matrices[affinity].items()}
    compute = sys.modules["RaTEScore.utils"].compute
    rng = np.random.default_rng(0)
    for _ in range(500):
        sizes = rng.integers(1, 12, 2)
        (own, true), (own_kinds, true_kinds) = (
            [f(rng, n) for n in sizes] for f in (unit, lambda r, n: r.integers(0, 5, n))
        )
        own[: min(sizes) // 2] = true[: min(sizes) // 2]
        names = [[KINDS[kind] for kind in kinds] for kinds in (own_kinds, true_kinds)]
        one, two = compute(true, own, names[1], names[0], matrix), compute(own, true, names[0], names[1], matrix)
        expected = 2 * one * two / (one + two) if one + two else 0
        assert rate(own, own_kinds, true, true_kinds, affinity) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_scores_equal_the_package(package, tmp_path):
    folder = made(tmp_path)
    # Of a text without a sentence the release takes the next text's in its place.
    texts = [text for text in TEXTS if sentences(text)]
    theirs = package.RaTEScore(str(folder / TAGGER), str(folder / ENCODER), use_gpu=False)
    expected = theirs.compute_score(texts, texts[::-1])
    assert RaTEScore(str(folder)).statistics(texts, texts[::-1])[:, 0] == pytest.approx(expected, abs=1e-6)
