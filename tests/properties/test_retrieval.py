"""What holds of search and retrieval for any table, any patients and any pools."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from medxray.retrieval import RETRIEVERS
from medxray.retrieval.bank import FeatureBank
from medxray.retrieval.search import ExactSearch
from medxray.types import Batch, SpecError

D = 8


@pytest.mark.parametrize("rough", [False, True])
@given(n=st.integers(0, 60), width=st.integers(1, 16), k=st.integers(1, 12), seed=st.integers(0, 999),
       kind=st.sampled_from(["any", "near", "equal", "zero"]), data=st.data())  # fmt: skip
def test_search_is_that_of_all_pairs(
    rough: bool, n: int, width: int, k: int, seed: int, kind: str, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, queries = torch.randn(n, width, generator=generator), torch.randn(4, width, generator=generator)
    if kind == "near":
        rows = 50 + 0.01 * rows
    if kind == "equal" and n:
        rows = rows[:1].expand(n, -1).contiguous()
    if kind == "zero":
        rows = rows * (torch.arange(n) % 2)[:, None]
    own = torch.tensor(data.draw(st.tuples(*[st.tuples(*[st.integers(-1, n - 1)] * 2)] * 4)))
    found = ExactSearch(rows, rough=rough).nearest(queries, k, own)
    similarity = F.normalize(queries.double(), dim=1) @ F.normalize(rows.double(), dim=1).T
    for i, refused in enumerate(own):
        similarity[i, refused[refused >= 0]] = -torch.inf
    best = similarity.sort(1, descending=True).values[:, :k]
    there = best > -torch.inf
    expected = F.pad(best, (0, k - best.shape[1]), value=-torch.inf)
    torch.testing.assert_close(found.similarity.double(), expected, atol=2e-6, rtol=0)
    assert torch.equal(found.rows >= 0, F.pad(there, (0, k - best.shape[1]))), "-1 where there is none"
    for i in range(4):
        taken = found.rows[i][found.rows[i] >= 0]
        assert len(taken.unique()) == len(taken) and not torch.isin(taken, own[i]).any()
        torch.testing.assert_close(similarity[i][taken], best[i][: len(taken)], atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", RETRIEVERS.names())
@given(told=st.lists(st.tuples(st.sampled_from(["", "a", "b", "c", "d"]), st.booleans()), min_size=2, max_size=14),
       counts=st.tuples(st.integers(1, 3), st.integers(1, 3)), training=st.booleans(), seed=st.integers(0, 99))  # fmt: skip
def test_nobody_is_their_own_context(
    name: str, told: list[tuple[str, bool]], counts: tuple[int, int], training: bool, seed: int
) -> None:
    n = len(told)
    ids, owners = [f"s{i}" for i in range(n)], [patient for patient, _ in told]
    labels: list[dict[str, int | None]] = [{"ill": int(ill)} for _, ill in told]
    settings: Any = RETRIEVERS.settings_of(name)(
        name=name, positives=counts[0], negatives=counts[1], pools={"by": "label", "label": "ill"}
    )
    bank = FeatureBank(RETRIEVERS.build(settings), settings, D)
    reports = [f"word{i} and more" for i in range(n)]
    try:
        rows = bank.fill(study_ids=ids, patient_ids=owners, reports=reports, labels=labels, names=["ill"])
    except SpecError as error:
        assert "pool" in str(error), "too few studies of a pool are refused before anything is fitted"
        return
    features = torch.randn(n, D, generator=torch.Generator().manual_seed(seed))
    bank.update(features[rows])
    bank.train(training)
    batch = Batch(
        pixels=torch.zeros(n, 1, 1, 1, 1), view_mask=torch.ones(n, 1, dtype=torch.bool), reports=reports,
        labels=torch.tensor([[float(ill)] for _, ill in told]), study_ids=ids, patient_ids=owners, seeds=torch.arange(n),
    )  # fmt: skip
    context = bank(features, batch)
    patient, ill = dict(zip(ids, owners, strict=True)), dict(zip(ids, (ill for _, ill in told), strict=True))
    for i, taken in enumerate(zip(context.positive_ids, context.negative_ids, strict=True)):
        assert [len(pool) for pool in taken] == list(counts)
        assert [{ill[one] for one in pool} for pool in taken] == [{True}, {False}]
        for one in (*taken[0], *taken[1]):
            assert one != ids[i] and (not patient[one] or patient[one] != owners[i])
        assert all(len({*pool}) == len(pool) for pool in taken)
