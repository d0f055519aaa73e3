"""The nearest rows of a large table by cosine similarity: exactly, or by an index of FAISS.

Letters: B queries, n rows of width D, k wanted rows, E rows that a query may not have.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from medxray import disk
from medxray.types import SpecError

BLOCK = 131072
# How many rows are compared in float32, and how many for queries that so few do not settle.
CANDIDATES = (64, 1024)
ROUGH_FROM = 8192
EPSILON = 1e-12
# Relative rounding error of float32.
FINE = 2.0**-24

Bonus = Callable[[int, int], Tensor]


class Found(NamedTuple):
    """Rows (B, k) int64 and their similarities (B, k) float32, best first; equal ones by row. Where fewer than k rows may
    be had, -1 with a similarity of -inf."""

    rows: Tensor
    similarity: Tensor


class ExactSearch:
    """Exact search by cosine similarity, streaming the table through memory once.

    On a CPU with instructions for products of 8-bit numbers most rows are ruled out by a pass over a copy of the table in 8
    bits; those that are left are compared in float32. That the copy cannot have hidden a row is not assumed but checked for
    each query by the rounding errors of the table and the query, which are known: s - a <= |q - q'| |f| + |q'| |f - f'| for
    the products s of q and f, and a of their copies q' and f'. So that it is small also where all rows point nearly the same
    way, as the features of radiographs do, the mean m of the rows is taken off first: q f = (q - m) (f - m) + m (f - m) +
    q m, of which the last is the same for all rows of a query, and the one before it is a number of each row. A query that
    the bound does not settle is searched in float32.

    Args:
        vectors: (n, D) float32; kept, not copied. Rows need not be of length one.
        rough: search the copy; None decides by device and size. It takes n * D bytes.

    Attributes:
        settled: queries that the bound has settled so far, and all queries that were searched with a copy.
    """

    def __init__(self, vectors: Tensor, rough: bool | None = None) -> None:
        self.vectors = vectors
        self.settled = [0, 0]
        norms = [block.float().norm(dim=1) for block in vectors.split(BLOCK)]
        self.scale = 1 / torch.cat([vectors.new_zeros(0), *norms]).clamp(min=EPSILON)
        self.rough: Tensor | None = None
        wanted = rough if rough is not None else len(vectors) >= ROUGH_FROM and _multiplies_bytes(vectors.device)
        # Of vectors of one number torch's product of bytes is wrong.
        if wanted and len(vectors) and vectors.shape[1] > 1:
            self._round()

    def _round(self) -> None:
        n, D = self.vectors.shape
        blocks, scales = self.vectors.split(BLOCK), self.scale.split(BLOCK)
        total = sum((block.T @ scale for block, scale in zip(blocks, scales, strict=True)), self.scale.new_zeros(D))
        self.mean = total / max(1, n)
        self.rough = torch.empty(n, D, dtype=torch.int8, device=self.vectors.device)
        steps, known = [], []
        for i, (block, scale) in enumerate(zip(blocks, scales, strict=True)):
            exact = block * scale[:, None] - self.mean
            self.rough[i * BLOCK : i * BLOCK + len(block)], step, lost, length = _to_bytes(exact)
            steps.append(step)
            known.append(torch.stack([exact @ self.mean, lost, length]))
        self.step, self.known = torch.cat(steps), torch.cat(known, 1)
        self.length = float(self.known[2].max())

    @torch.no_grad()
    def nearest(self, queries: Tensor, k: int, own: Tensor | None = None, bonus: Bonus | None = None) -> Found:
        """The k nearest rows of each query.

        Args:
            queries: (B, D).
            k: how many.
            own: (B, E) int64, rows that a query may not have; -1 stands for none.
            bonus: first row of a block and the one after its last -> (B, rows), added to their similarities; the search is in
                float32 then.
        """
        with torch.autocast(queries.device.type, enabled=False):
            queries = torch.cat([F.normalize(part.float(), dim=1) for part in _few(queries.detach())])
            own = own if own is not None else queries.new_zeros(len(queries), 0, dtype=torch.int64)
            if self.rough is None or bonus is not None or len(queries) == 0:
                return self._float32(queries, k, own, bonus)
            found, sure = self._bytes(queries, k, own, CANDIDATES[0])
            for candidates in (*CANDIDATES[1:], None):
                open_ones = (~sure).nonzero()[:, 0]
                if len(open_ones) == 0:
                    break
                if candidates is None:
                    again, better = self._float32(queries[open_ones], k, own[open_ones], None), sure[open_ones]
                else:
                    again, better = self._bytes(queries[open_ones], k, own[open_ones], candidates)
                found.rows[open_ones], found.similarity[open_ones], sure[open_ones] = *again, better
            self.settled[0] += int(sure.sum())
            self.settled[1] += len(queries)
        return found

    def _float32(self, queries: Tensor, k: int, own: Tensor, bonus: Bonus | None) -> Found:
        def products(start: int, stop: int) -> Tensor:
            found = (queries @ self.vectors[start:stop].T).mul_(self.scale[start:stop])
            return found if bonus is None else found.add_(bonus(start, stop))

        return _best(*_largest(products, len(self.vectors), k + own.shape[1], queries), k, own)

    def _bytes(self, queries: Tensor, k: int, own: Tensor, candidates: int) -> tuple[Found, Tensor]:
        """As `_float32`, with (B,) bool: whether the answer is known to be the same."""
        assert self.rough is not None
        table, (n, D) = self.rough, self.vectors.shape
        rounded = [_to_bytes(part - self.mean) for part in _few(queries)]
        coarse, step, lost, length = (torch.cat(parts) for parts in zip(*rounded, strict=True))
        length = length + lost
        # In units of the query's step: what is known of a row beside the product, and how much the product can be wrong.
        weights = torch.stack([torch.ones_like(step), length, lost], 1) / step[:, None]

        def bounds(start: int, stop: int) -> Tensor:
            found = torch._int_mm(coarse, table[start:stop].T).float().mul_(self.step[start:stop])
            return found.addmm_(weights, self.known[:, start:stop])

        values, rows = _largest(bounds, n, max(candidates, 2 * k) + own.shape[1], queries)
        # Sums of D numbers in float32, where they are made.
        slack = 4 * D * FINE * self.mean.norm() * self.length + 8 * FINE * (1 + length)
        values, middle = values * step[:, None] + slack[:, None], queries @ self.mean
        first = self.compare(queries, rows[:, : 2 * k + own.shape[1] + 8], k, own)
        # No row whose bound is lower can be among the best.
        least = first.similarity[:, -1] - middle
        found = self.compare(queries, rows.masked_fill(values < least[:, None], -1), k, own)
        sure = found.similarity[:, -1] - middle >= values[:, -1]
        return found, sure | (rows.shape[1] == n)

    def compare(self, queries: Tensor, rows: Tensor, k: int, own: Tensor) -> Found:
        """The best k of some rows (B, m) for each query (B, D) of length one, in float32; -1 stands for no row."""
        query, place = (rows >= 0).nonzero(as_tuple=True)
        taken = rows[query, place]
        places = zip(taken.split(_at_once(queries)), query.split(_at_once(queries)), strict=True)
        pairs = [(self.vectors.index_select(0, row).float(), queries.index_select(0, which)) for row, which in places]
        products = torch.cat([(vectors * asked).sum(1) for vectors, asked in pairs])
        values = torch.full(rows.shape, -math.inf, device=rows.device)
        values[query, place] = products * self.scale[taken]
        return _best(values, rows, k, own)


class FaissSearch(ExactSearch):
    """Approximate search by an inverted file of FAISS, whose candidates are compared exactly.

    As many lists are looked through as bring the recall, measured on rows of the table itself, to what is asked for. Where
    a query's lists hold too few rows, the exact search answers.

    Args:
        vectors: as of `ExactSearch`.
        recall: share of the true 10 nearest that is to be found.
        file: an index that `save` wrote for the same vectors.

    Attributes:
        recall: as measured.

    Raises:
        SpecError: FAISS is not installed, or the file holds an index of another table.
    """

    SAMPLE, WANTED, SEED = 256, 10, 20240

    def __init__(self, vectors: Tensor, recall: float = 0.95, file: Path | None = None) -> None:
        faiss = _faiss()
        super().__init__(vectors, rough=False)
        n, D = vectors.shape
        lists = max(1, min(4 * math.isqrt(n), n // 39))
        self.index: Any
        if file is not None:
            self.index = faiss.read_index(str(file))
            if (self.index.ntotal, self.index.d) != (n, D):
                raise SpecError(
                    f"index {file} is of {self.index.ntotal} x {self.index.d} features, {n} x {D} were expected; "
                    "delete it, and it is built anew"
                )
        else:
            quantizer = faiss.IndexFlatIP(D)
            self.index = faiss.IndexIVFScalarQuantizer(
                quantizer, D, lists, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
            )
            self.index.own_fields = True
            quantizer.this.disown()
            generator = torch.Generator().manual_seed(self.SEED)
            some = torch.randperm(n, generator=generator)[: max(39 * lists, 1)].sort().values
            self.index.train(self._unit(some).numpy())
            for start in range(0, n, BLOCK):
                self.index.add(self._unit(torch.arange(start, min(start + BLOCK, n))).numpy())
        self.recall = self._widen(recall, fixed=file is not None)

    def _unit(self, rows: Tensor) -> Tensor:
        rows = rows.to(self.vectors.device)
        return (self.vectors[rows].float() * self.scale[rows][:, None]).cpu()

    def _widen(self, wanted: float, fixed: bool) -> float:
        """Looks through twice as many lists until the recall is reached; returns it."""
        n = len(self.vectors)
        generator = torch.Generator().manual_seed(self.SEED + 1)
        rows = torch.randperm(n, generator=generator)[: self.SAMPLE].to(self.vectors.device)
        queries, own, k = self.vectors[rows], rows[:, None], min(self.WANTED, n - 1)
        if k < 1:
            return 1.0
        true = super().nearest(queries, k, own).rows
        while True:
            found = self.nearest(queries, k, own).rows
            recall = float((true[:, :, None] == found[:, None]).any(2).float().mean())
            if fixed or recall >= wanted or self.index.nprobe >= self.index.nlist:
                return recall
            self.index.nprobe = min(2 * self.index.nprobe, self.index.nlist)

    @torch.no_grad()
    def nearest(self, queries: Tensor, k: int, own: Tensor | None = None, bonus: Bonus | None = None) -> Found:
        own = own if own is not None else torch.zeros(len(queries), 0, dtype=torch.int64, device=queries.device)
        if bonus is not None:
            return super().nearest(queries, k, own, bonus)
        with torch.autocast(queries.device.type, enabled=False):
            unit = F.normalize(queries.detach().float(), dim=1)
            # A few more than are wanted: the index knows its rows in half precision.
            wanted = min(2 * k + 8 + own.shape[1], len(self.vectors))
            rows = torch.from_numpy(self.index.search(unit.cpu().numpy(), wanted)[1]).to(queries.device)
            found = self.compare(unit, rows, k, own)
        short = (found.rows < 0).any(1)
        if bool(short.any()):
            again = super().nearest(queries[short], k, own[short])
            found.rows[short], found.similarity[short] = again.rows, again.similarity
        return found

    def save(self, file: Path) -> None:
        """Writes the index: the old file or the new one stays."""
        with disk.replacing(file) as staged:
            _faiss().write_index(self.index, str(staged))


def _largest(
    products: Callable[[int, int], Tensor], n: int, count: int, queries: Tensor
) -> tuple[Tensor, Tensor]:
    """The largest of n products of each query and their rows, (B, count) or (B, n), from products (B, rows) of blocks."""
    values = queries.new_zeros(len(queries), 0)
    rows = torch.zeros(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        most, which = products(start, stop).topk(min(count, stop - start), dim=1)
        values, rows = torch.cat([values, most], 1), torch.cat([rows, which + start], 1)
    values, which = values.topk(min(count, values.shape[1]), dim=1)
    return values, rows.gather(1, which)


def _to_bytes(vectors: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(n, D) -> (n, D) int8, the step (n,) that one stands for, the length (n,) of what is lost, and the whole length (n,)."""
    step = (vectors.abs().amax(1) / 127).clamp(min=EPSILON)
    coarse = (vectors / step[:, None]).round_().clamp_(-127, 127)
    lost = (vectors - coarse * step[:, None]).norm(dim=1)
    return coarse.to(torch.int8), step, lost, vectors.norm(dim=1)


def _at_once(vectors: Tensor) -> int:
    """How many rows of D numbers torch works on without waking its threads, which takes longer than the work itself where
    other processes keep the cores busy."""
    return max(1, 16384 // vectors.shape[1])


def _few(vectors: Tensor) -> tuple[Tensor, ...]:
    return vectors.split(_at_once(vectors))


def _best(values: Tensor, rows: Tensor, k: int, own: Tensor) -> Found:
    """The k best of candidates (B, m) that are not a query's own; equal ones by row."""
    refused = (rows[..., None] == own[:, None]).any(2) if own.shape[1] else torch.zeros_like(rows, dtype=torch.bool)
    values = values.float().masked_fill(refused, -math.inf)
    order = rows.argsort(1)
    rows, values = rows.gather(1, order), values.gather(1, order)
    values, order = values.sort(dim=1, descending=True, stable=True)
    rows = rows.gather(1, order)[:, :k].masked_fill(values[:, :k] == -math.inf, -1)
    missing = k - rows.shape[1]
    if missing > 0:
        rows, values = F.pad(rows, (0, missing), value=-1), F.pad(values, (0, missing), value=-math.inf)
    return Found(rows, values[:, :k])


def _multiplies_bytes(device: torch.device) -> bool:
    """Whether products of 8-bit numbers are exact and fast there. Of a GPU both hold, but its memory is so fast that little
    is won."""
    return device.type == "cpu" and bool(getattr(torch.cpu, "_is_vnni_supported", lambda: False)())


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise SpecError(
            'retriever.index: faiss is not installed; pip install "medxray[retrieval]", or use index: exact'
        ) from error
    return faiss
