"""What each retriever takes from a small bank, and what none may take."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from medxray.retrieval import RETRIEVERS, Retriever
from medxray.retrieval.bank import FeatureBank
from medxray.retrieval.texts import TextIndex
from medxray.types import Batch, RunError, SpecError

N, D, K = 80, 12, 3
WORDS = ["heart", "lungs", "clear", "edema", "effusion", "rib", "fracture", "normal", "large", "left", "right", "small"]


def members(n: int = N) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(0, 2, (n, K), generator=generator).tolist()
    words = torch.randint(0, len(WORDS), (n, 8), generator=generator).tolist()
    return {
        "study_ids": [f"s{i}" for i in range(n)],
        # Patients of two studies each, and some without a name.
        "patient_ids": [f"p{i // 2}" if i % 10 else "" for i in range(n)],
        "reports": [" ".join(WORDS[w] for w in row) for row in words],
        "labels": [dict(zip("abc", row, strict=True)) for row in labels],
        "names": list("abc"),
    }


def bank(name: str, **settings: Any) -> FeatureBank:
    chosen = RETRIEVERS.settings_of(name)(name=name, pools={"by": "label", "label": "a"}, **settings)
    made = FeatureBank(RETRIEVERS.build(chosen), chosen, D)
    rows = made.fill(**members())
    made.update(torch.randn(N, D, generator=torch.Generator().manual_seed(6))[rows])
    return made


def batch(rows: list[int], epoch: int = 0) -> tuple[Tensor, Batch]:
    told = members()
    found = Batch(
        pixels=torch.zeros(len(rows), 1, 1, 1, 1),
        view_mask=torch.ones(len(rows), 1, dtype=torch.bool),
        reports=[told["reports"][i] for i in rows],
        labels=torch.tensor([[float(told["labels"][i][k]) for k in "abc"] for i in rows]),
        study_ids=[told["study_ids"][i] for i in rows],
        patient_ids=[told["patient_ids"][i] for i in rows],
        seeds=torch.tensor(rows) + 1000 * epoch,
    )
    features = torch.randn(N, D, generator=torch.Generator().manual_seed(6))[rows]
    return features, found


def rows_of(made: FeatureBank, ids: list[list[str]]) -> Tensor:
    return torch.tensor([[made.study_ids.index(name) for name in row] for row in ids])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", [n for n in RETRIEVERS.names() if n in RETRIEVERS._builtin])
def test_never_the_study_nor_its_patient(name: str, training: bool) -> None:
    made = bank(name, positives=4, negatives=2).train(training)
    features, asked = batch(list(range(N)))
    context = made(features, asked)
    assert context.positive.shape == (N, 4, D) and context.negative.shape == (N, 2, D)
    owner = dict(zip(members()["study_ids"], members()["patient_ids"], strict=True))
    sick = {s for s, row in zip(members()["study_ids"], members()["labels"], strict=True) if row["a"] == 1}
    for study, patient, positive, negative in zip(
        asked.study_ids, asked.patient_ids, context.positive_ids, context.negative_ids, strict=True
    ):
        assert len({*positive, *negative}) == 6 and set(positive) <= sick and not set(negative) & sick
        assert study not in {*positive, *negative}
        assert not patient or patient not in {owner[s] for s in (*positive, *negative)}
    assert torch.equal(context.positive, made.features[rows_of(made, context.positive_ids)])
    # A batch changes nobody's context.
    one = [made(*batch([i])) for i in range(0, N, 9)]
    assert [c.positive_ids[0] for c in one] == context.positive_ids[::9]


@pytest.mark.parametrize("name", ["label", "report"])
def test_labels_and_reports_are_hidden_in_evaluation(name: str) -> None:
    made = bank(name).eval()
    features, asked = batch(list(range(N)))
    other = batch(list(range(N)))[1]
    other.reports, other.labels = list(reversed(other.reports)), 1 - other.labels
    assert made(features, asked).positive_ids == made(features, other).positive_ids
    assert made.train()(features, asked).positive_ids != made(features, other).positive_ids


def test_random_is_new_in_each_epoch_and_fixed_by_the_seed() -> None:
    made = bank("random")
    first, again, next_epoch = (made(*batch(list(range(N)), epoch)) for epoch in (0, 0, 1))
    assert first.positive_ids == again.positive_ids != next_epoch.positive_ids
    drawn = {name for row in first.positive_ids for name in row}
    assert len(drawn) > 0.9 * made.positives, "everyone has a chance"


def test_fixed_is_the_same_for_all_others() -> None:
    made = bank("fixed")
    assert len(made.study_ids) == 8, "one more than is taken, of each pool"
    features, asked = batch(list(range(N)))
    counts = [tuple(row) for row in made(features, asked).positive_ids]
    assert len(set(counts)) <= 4 and counts.count(tuple(made.study_ids[:3])) > 70


def test_label_takes_agreement_before_nearness() -> None:
    made = bank("label").train()
    features, asked = batch(list(range(N)))
    rows = rows_of(made, made(features, asked).positive_ids)
    agree = (made.labels[: made.positives][None] == asked.labels[:, None]).sum(2).float()
    similar = F.normalize(features, dim=1) @ F.normalize(made.features[: made.positives], dim=1).T
    own = made._own(asked, 0, made.positives)
    key = (agree * 10 + similar).scatter_add(1, own.clamp(min=0), torch.where(own >= 0, -torch.inf, 0.0))
    assert torch.equal(key.topk(3).indices, rows)


def test_label_votes_where_nothing_is_known() -> None:
    made = bank("label", voters=1).eval()
    features, asked = batch([3, 30, 47])
    nearest = rows_of(made, [made(f[None], batch([i])[1]).positive_ids[0] for f, i in zip(features, [3, 30, 47], strict=True)])
    similar = F.normalize(features, dim=1) @ F.normalize(made.features, dim=1).T
    own = made._own(asked, 0, N)
    similar = similar.scatter_add(1, own.clamp(min=0), torch.where(own >= 0, -torch.inf, 0.0))
    voted = made.labels[similar.argmax(1)]
    made.train()
    asked.labels = voted
    assert torch.equal(rows_of(made, made(features, asked).positive_ids), nearest)


def test_report_takes_similar_texts() -> None:
    made = bank("report").train()
    features, asked = batch([4, 11])
    context = made(features, asked)
    for i, pool in ((0, slice(0, made.positives)), (1, slice(0, made.positives))):
        similarity = TextIndex(made.reports[pool]).similarity([asked.reports[i]])[0]
        own = made._own(asked, 0, made.positives)[i]
        similarity[own[own >= 0]] = -1
        best = similarity.topk(3).values
        taken = similarity[rows_of(made, context.positive_ids)[i]]
        torch.testing.assert_close(taken, best)


def test_text_similarity_is_that_of_scikit_learn() -> None:
    text = pytest.importorskip("sklearn.feature_extraction.text")
    reports = members()["reports"]
    judge = text.TfidfVectorizer(token_pattern=r"[a-z]+|\d+", sublinear_tf=True)
    table = judge.fit_transform(reports)
    queries = ["edema edema and a small rib", "heart", "nothing known"]
    expected = torch.from_numpy((judge.transform(queries) @ table.T).toarray()).float()
    torch.testing.assert_close(TextIndex(reports).similarity(queries), expected, atol=1e-6, rtol=0)


def test_hybrid_is_maximal_marginal_relevance() -> None:
    features, asked = batch([2, 9, 33])
    near = bank("nearest")(features, asked).positive_ids
    assert bank("hybrid", relevance=1.0)(features, asked).positive_ids == near
    made = bank("hybrid", relevance=0.3, among=10)
    found = rows_of(made, made(features, asked).positive_ids)
    ten = rows_of(made, bank("nearest", positives=10)(features, asked).positive_ids)
    for query, candidates, taken in zip(features, ten, found, strict=True):
        chosen: list[int] = []
        while len(chosen) < 3:
            def worth(row: int, chosen: list[int] = chosen, query: Tensor = query) -> float:
                same = [F.cosine_similarity(made.features[row], made.features[c], dim=0).item() for c in chosen]
                return 0.3 * F.cosine_similarity(made.features[row], query, dim=0).item() - 0.7 * max(same, default=0)
            chosen.append(max((r for r in candidates.tolist() if r not in chosen), key=worth))
        assert chosen == taken.tolist()
    assert not torch.equal(found, ten[:, :3])


def test_a_retriever_that_takes_the_study_itself_is_stopped() -> None:
    class Wrong(Retriever):
        def choose(self, queries: Any, pool: Any, count: int) -> Tensor:
            return pool.search.nearest(queries.features, count).rows

    made = bank("nearest")
    made.retriever = Wrong()
    with pytest.raises(RunError, match="took study 's4' as context of study 's4'"):
        made(*batch([4]))


def test_a_pool_that_is_too_small_says_how_many_there_are() -> None:
    with pytest.raises(SpecError, match=r"retriever.negatives: 500 normal .* the pool has \d+, up to 2 of them of one pat"):
        bank("nearest", negatives=500)
    with pytest.raises(SpecError, match=r"retriever.positives: 40 diseased .* has 30, up to 1 "):
        bank("fixed", positives=40)
