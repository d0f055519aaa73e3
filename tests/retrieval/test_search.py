"""The exact search against a plain product and sort, on tables that are easy and hard for 8 bits."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from medxray.retrieval import search
from medxray.retrieval.search import ExactSearch, FaissSearch
from medxray.types import SpecError


def table(kind: str, n: int = 3000, width: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    rows = torch.randn(n, width, generator=generator)
    if kind == "narrow":  # all nearly the same way, as pooled features are
        rows = 20 * torch.randn(width, generator=generator) + 0.3 * rows
    if kind == "copies":  # more of them than are compared, nearer to one another than 8 bits can tell
        rows = rows[:2].repeat(n // 2, 1) + 1e-3 * rows
    return rows * torch.rand(n, 1, generator=generator).add(0.1)


def plain(rows: Tensor, queries: Tensor, k: int, own: Tensor | None) -> tuple[Tensor, Tensor]:
    similarity = F.normalize(queries.double(), dim=1) @ F.normalize(rows.double(), dim=1).T
    for i, refused in enumerate(own if own is not None else ()):
        similarity[i, refused[refused >= 0]] = -torch.inf
    values, which = similarity.topk(k, dim=1)
    return values, which


@pytest.mark.parametrize("rough", [False, True])
@pytest.mark.parametrize("kind", ["easy", "narrow", "copies"])
def test_the_nearest_are_those_of_a_plain_product(kind: str, rough: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "BLOCK", 700)
    rows = table(kind)
    queries = rows[:40] + 0.01 * torch.randn(40, 64, generator=torch.Generator().manual_seed(1))
    # The query's own row, the nearest one, and for half of them one more.
    own = torch.stack([torch.arange(40), torch.where(torch.arange(40) % 2 == 0, torch.arange(40) + 10, -1)], 1)
    index = ExactSearch(rows, rough=rough)
    found = index.nearest(queries, 5, own)
    values, which = plain(rows, queries, 5, own)
    torch.testing.assert_close(found.similarity.double(), values, atol=1e-6, rtol=0)
    assert not (found.rows[..., None] == own[:, None]).any()
    if kind == "easy":  # elsewhere some are equal in float32
        assert torch.equal(found.rows, which)
    if rough:
        settled, asked = index.settled
        assert asked == 40
        # What cannot be told in 8 bits is seen, and searched in float32; a bound that nothing passes would be no help.
        assert settled == 0 if kind == "copies" else settled > 30


def test_without_the_bound_the_answer_would_be_wrong() -> None:
    rows = table("copies")
    queries = rows[:40] + 0.01 * torch.randn(40, 64, generator=torch.Generator().manual_seed(1))
    index = ExactSearch(rows, rough=True)
    found, sure = index._bytes(F.normalize(queries, dim=1), 5, torch.zeros(40, 0, dtype=torch.int64), 16)
    wrong = (plain(rows, queries, 5, None)[0] - found.similarity.double()).abs().amax(1) > 1e-6
    assert wrong.any() and not (wrong & sure).any()


def test_more_asked_for_than_there_are() -> None:
    rows = torch.eye(4)
    own = torch.tensor([[1, 2]])
    for rough in (False, True):
        found = ExactSearch(rows, rough=rough).nearest(torch.tensor([[1.0, 0.9, 0.8, 0.7]]), 3, own)
        assert found.rows.tolist() == [[0, 3, -1]] and found.similarity[0, 2] == -torch.inf


def test_autocast_and_equal_rows_change_nothing() -> None:
    rows = torch.ones(9000, 8)
    index = ExactSearch(rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = index.nearest(torch.ones(2, 8), 3, torch.tensor([[0], [-1]]))
    assert found.similarity.dtype == torch.float32
    torch.testing.assert_close(found.similarity, torch.ones(2, 3))


@pytest.fixture
def faiss() -> None:
    pytest.importorskip("faiss")


def test_faiss_reaches_the_recall_that_is_asked_for(faiss: None, tmp_path: Path) -> None:
    rows = table("easy", 4000)
    exact = ExactSearch(rows, rough=False)
    own = torch.arange(100)[:, None]
    true = exact.nearest(rows[:100], 5, own).rows
    shares = {}
    for recall in (0.3, 0.99):
        index = FaissSearch(rows, recall)
        found = index.nearest(rows[:100], 5, own)
        assert index.recall >= recall and not (found.rows == own).any()
        shares[recall] = float((true[:, :, None] == found.rows[:, None]).any(2).float().mean())
    assert shares[0.99] > 0.95 > shares[0.3]
    index.save(tmp_path / "index")
    again = FaissSearch(rows, 0.99, tmp_path / "index")
    assert torch.equal(again.nearest(rows[:100], 5, own).rows, found.rows) and again.recall == index.recall
    with pytest.raises(SpecError, match="4000 x 64 features, 3000 x 64 were expected"):
        FaissSearch(rows[:3000], 0.9, tmp_path / "index")
    # Lists that hold too few rows leave it to the exact search.
    index.index.nprobe = 1
    assert (index.nearest(rows[:5], 500).rows >= 0).all()
