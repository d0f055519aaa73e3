"""BLEU, ROUGE-L and CIDEr against pycocoevalcap, and the best constant report against trying each one."""

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu as CocoBleu
from pycocoevalcap.cider.cider import Cider as CocoCider
from pycocoevalcap.rouge.rouge import Rouge as CocoRouge

import medxray.metrics
from medxray.metrics import intervals, text
from medxray.metrics.text import Bleu, Cider, RougeL, best_constant
from medxray.types import MedxrayError

WORDS = ["the", "heart", "lungs", "are", "is", "clear", "normal", "no", "effusion", ".", "größe", "心"]


def some_reports(n: int, seed: int, shortest: int = 1) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(shortest, 40))) for _ in range(n)]


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
        (["the heart is normal"], ["the heart is normal ."]),
        ([""], ["the heart is normal ."]),
        (["", ""], ["lungs are clear .", "no effusion ."]),
        (["normal ."] * 3, ["normal ."] * 3),
    ],
    ids=["one study", "one empty", "all empty", "identical"],
)
def test_few_values_equal_pycocoevalcap(pairs):
    assert ours(*pairs) == pytest.approx(coco(*pairs), abs=1e-9)


def test_values_equal_pycocoevalcap(hard_pairs):
    """By each way that a user has to them, and for a part of the studies scored apart."""
    predictions, references = hard_pairs
    peer, part = coco(predictions, references), slice(100, 200)
    computed: dict[str, float] = {}
    scored: dict[str, float] = {}
    for metric in (Bleu(), RougeL(), Cider()):
        computed |= metric.compute(predictions=predictions, references=references)
        found = intervals.score(metric, predictions, references, [""] * 500, resamples=0)
        scored |= {name: score.value for name, score in found.items()}
    assert computed == pytest.approx(peer, abs=1e-9)
    assert scored == pytest.approx(peer, abs=1e-9)
    assert ours(predictions[part], references[part]) == pytest.approx(coco(predictions[part], references[part]), abs=1e-9)


def test_each_study_has_its_value(hard_pairs):
    predictions, references = hard_pairs
    gts, res = ({i: [t] for i, t in enumerate(texts)} for texts in (references, predictions))
    assert RougeL().statistics(*hard_pairs)[:, 0] == pytest.approx(CocoRouge().compute_score(gts, res)[1], abs=1e-9)
    assert Cider().statistics(*hard_pairs)[:, 0] == pytest.approx(CocoCider().compute_score(gts, res)[1], abs=1e-9)
    each = CocoBleu(4).compute_score(gts, res, verbose=0)[1]
    alone = Bleu().each(Bleu().statistics(*hard_pairs)).T
    np.testing.assert_allclose(alone, each, rtol=0, atol=1e-9)


def test_a_subset_is_cut_out_of_the_statistics(hard_pairs):
    """That is scoring it anew, but for CIDEr, whose words keep the weights that the whole set gives them."""
    predictions, references = hard_pairs
    rows = np.random.default_rng(0).permutation(500)[:150]
    chosen, wanted = [predictions[i] for i in rows], [references[i] for i in rows]
    for metric in (Bleu(), RougeL(), Cider()):
        cut = metric.reduce(metric.statistics(predictions, references)[rows], np.ones((1, 150)))
        anew = metric.reduce(metric.statistics(chosen, wanted), np.ones((1, 150)))
        if isinstance(metric, Cider):
            assert abs(cut - anew) > 1e-3
            gts, res = ({i: [t] for i, t in enumerate(texts)} for texts in (references, predictions))
            anew = CocoCider().compute_score(gts, res)[1][rows].mean()
        assert cut == pytest.approx(anew, abs=1e-9)


def test_a_prediction_without_reference_is_named():
    for metric in (Bleu(), Cider()):
        with pytest.raises(MedxrayError, match="2 predictions, 1 references"):
            metric.statistics(["a", "b"], ["a"])


def test_weights_are_repetitions(hard_pairs):
    predictions, references = hard_pairs
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


@pytest.mark.parametrize("metric", ["bleu-1", "bleu-4", "rouge-l", "cider"])
@pytest.mark.parametrize("together", [2, 10_000], ids=["in parts", "at once"])
def test_best_constant_equals_trying_each(metric, together, monkeypatch):
    monkeypatch.setattr(text, "_TOGETHER", together)
    monkeypatch.setattr(text, "_CANDIDATES", 10 * together)
    candidates, references = some_reports(60, seed=5, shortest=4), [*some_reports(25, seed=6), "normal  .", ""]
    candidates += [*candidates[:9], "", "the the the the", "unheard of"]
    scores = [ours([c] * len(references), references)[metric] for c in candidates]
    assert best_constant(candidates, references, metric) == candidates[int(np.argmax(scores))]


@pytest.mark.parametrize(
    ("judge", "metric", "column"),
    [(text._constant_bleu, Bleu(), 3), (text._constant_rouge, RougeL(), 0), (text._constant_cider, Cider(), 0)],
    ids=["bleu-4", "rouge-l", "cider"],
)
def test_constants_have_the_scores_of_the_metric(judge, metric, column):
    candidates, references = [*some_reports(20, seed=7), "", "no no"], some_reports(30, seed=8)
    found = np.asarray(judge(candidates, references)).reshape(len(candidates), -1)[:, column]
    ones = np.ones((1, len(references)))
    each = [metric.reduce(metric.statistics([c] * 30, references), ones)[0, column] for c in candidates]
    assert found == pytest.approx(each, abs=1e-12)


def test_best_constant_names_the_mistake():
    with pytest.raises(MedxrayError, match=r"meteor.*bleu-4.*rouge-l.*cider"):
        best_constant(["normal ."], ["normal ."], "meteor")
    with pytest.raises(MedxrayError, match="no training reports"):
        best_constant([], ["normal ."])
