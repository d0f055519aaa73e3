"""BLEU, ROUGE-L and CIDEr against pycocoevalcap, and the best constant report against trying each one."""

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu as CocoBleu
from pycocoevalcap.cider.cider import Cider as CocoCider
from pycocoevalcap.rouge.rouge import Rouge as CocoRouge

import medxray.metrics
from medxray.metrics.text import Bleu, Cider, RougeL, best_constant
from medxray.types import MedxrayError

WORDS = ["the", "heart", "lungs", "are", "is", "clear", "normal", "no", "effusion", ".", "größe", "心"]


def some_reports(n: int, seed: int, shortest: int = 1) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(shortest, 40))) for _ in range(n)]


def adversarial() -> tuple[list[str], list[str]]:
    references = some_reports(40, seed=1)
    predictions = some_reports(40, seed=2, shortest=0)
    predictions[0] = ""
    predictions[1] = references[1]
    predictions[2] = "heart"
    predictions[3] = "the " * 60
    predictions[4], references[4] = "heart  is  normal", "the heart  is normal"
    predictions[5], references[5] = " ".join(WORDS * 60), " ".join(WORDS[::-1] * 60)
    references[6] = "normal"
    predictions[7], references[7] = "", ""
    return predictions, references


def coco(predictions: list[str], references: list[str]) -> dict[str, float]:
    res = {i: [p] for i, p in enumerate(predictions)}
    gts = {i: [r] for i, r in enumerate(references)}
    bleu = CocoBleu(4).compute_score(gts, res, verbose=0)[0]
    return {
        **{f"bleu-{n + 1}": value for n, value in enumerate(bleu)},
        "rouge-l": CocoRouge().compute_score(gts, res)[0],
        "cider": CocoCider().compute_score(gts, res)[0],
    }


def ours(predictions: list[str], references: list[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for metric in (Bleu(), RougeL(), Cider()):
        statistics = metric.statistics(predictions, references)
        values = metric.reduce(statistics, np.ones((1, len(predictions))))[0]
        found |= dict(zip(metric.values, values, strict=True))
    return found


@pytest.mark.parametrize(
    "pairs",
    [
        adversarial(),
        (["the heart is normal"], ["the heart is normal ."]),
        ([""], ["the heart is normal ."]),
        (["", ""], ["lungs are clear .", "no effusion ."]),
        (["normal ."] * 3, ["normal ."] * 3),
    ],
    ids=["mixed", "one study", "one empty", "all empty", "identical"],
)
def test_values_equal_pycocoevalcap(pairs):
    assert ours(*pairs) == pytest.approx(coco(*pairs), abs=1e-9)


def test_weights_are_repetitions():
    predictions, references = adversarial()
    counts = np.random.default_rng(0).integers(0, 4, len(predictions))
    for metric in (Bleu(), RougeL()):
        statistics = metric.statistics(predictions, references)
        weighted = metric.reduce(statistics, counts[None].astype(float))
        repeated = metric.reduce(statistics.repeat(counts, axis=0), np.ones((1, counts.sum())))
        np.testing.assert_allclose(weighted, repeated, rtol=1e-12)


def test_no_reference_has_a_word():
    assert ours(["normal", ""], ["", ""])["cider"] == 0


def test_metrics_are_evaluate_metrics(capsys):
    predictions, references = some_reports(8, 3), some_reports(8, 4)
    found: dict[str, float] = {}
    for name in ("bleu", "rouge-l", "cider"):
        metric = medxray.metrics.get(name)()
        found |= metric.compute(predictions=predictions, references=references)
    assert found == pytest.approx(coco(predictions, references), abs=1e-9)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("metric", ["bleu-1", "bleu-4"])
def test_best_constant_equals_trying_each(metric):
    candidates, references = some_reports(60, seed=5, shortest=4), some_reports(25, seed=6)
    candidates += [*candidates[:9], ""]
    scores = [ours([c] * len(references), references)[metric] for c in candidates]
    assert best_constant(candidates, references, metric) == candidates[int(np.argmax(scores))]


def test_best_constant_names_the_mistake():
    with pytest.raises(MedxrayError, match=r"cider.*bleu-4"):
        best_constant(["normal ."], ["normal ."], "cider")
    with pytest.raises(MedxrayError, match="no training reports"):
        best_constant([], ["normal ."])
