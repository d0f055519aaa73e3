"""Features of the training studies that may be context, with their names, labels and reports."""

import hashlib
import json
import logging
import warnings
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medxray import disk
from medxray.retrieval import Pool, Queries, Retriever, RetrieverSettings, pools
from medxray.retrieval.search import ExactSearch, FaissSearch
from medxray.types import Batch, Context, RunError, SpecError

LOG = logging.getLogger(__name__)
NAMES = ("diseased", "normal")


class FeatureBank(nn.Module):
    """Pooled features of both pools, and the choice of context from them.

    While the encoder learns, the features are part of the model's state: a checkpoint holds them as they were, so that a
    resumed run is equal to an unbroken one. Of a frozen encoder, and after a fit, they lie in an Arrow file that is mapped
    into memory. Memory: 4 * n * D bytes, and a quarter as much again where large pools are searched in 8 bits first.

    Args:
        retriever: what chooses.
        settings: how many, from which pools.
        width: D of the encoder.
        learning: the encoder is trained.

    Attributes:
        study_ids, patient_ids, reports: of the n members, diseased first.
        labels: (n, K) 1 present, 0 absent, NaN uncertain or missing.
        positives: how many of them are diseased.
        encoder: hash of the encoder that made the features; "" while it learns.
    """

    features: Tensor
    labels: Tensor
    FILE = "bank.arrow"

    def __init__(
        self, retriever: Retriever, settings: RetrieverSettings, width: int, learning: bool = True
    ) -> None:
        super().__init__()
        self.retriever = retriever
        self.settings = settings
        self.width = width
        self.learning = learning
        self.encoder = ""
        self._indices: dict[str, Path] = {}
        self._members([], [], [], torch.zeros(0, 0), 0, torch.zeros(0, width))

    def _members(
        self, study_ids: list[str], patient_ids: list[str], reports: list[str], labels: Tensor, positives: int,
        features: Tensor,
    ) -> None:  # fmt: skip
        self.study_ids, self.patient_ids, self.reports, self.positives = study_ids, patient_ids, reports, positives
        self.register_buffer("features", features, persistent=self.learning)
        self.register_buffer("labels", labels, persistent=False)
        self._pools: list[Pool] = []
        self._searched: tuple[Tensor, int] | None = None
        self._rows: dict[str, int] = {name: row for row, name in enumerate(study_ids)}
        self._patients: dict[str, list[int]] = defaultdict(list)
        for row, patient in enumerate(patient_ids):
            if patient:
                self._patients[patient].append(row)

    def fill(
        self,
        study_ids: Sequence[str],
        patient_ids: Sequence[str],
        reports: Sequence[str],
        labels: Sequence[Mapping[str, int | None]],
        names: Sequence[str] = (),
    ) -> list[int]:
        """Decides which of n training studies may be context. Returns their rows, diseased first.

        Args:
            study_ids, patient_ids, reports, labels: of the training studies.
            names: order of the labels.

        Raises:
            SpecError: a pool is empty, or smaller than the number asked for.
        """
        settings = self.settings
        rows: list[int] = []
        positives = 0
        split = pools.split(settings.pools, reports, [dict(row) for row in labels])
        for name, pool, count in zip(NAMES, split, (settings.positives, settings.negatives), strict=True):
            chosen = self.retriever.candidates(pool, patient_ids, count, settings.pools)
            most = max(Counter(patient_ids[row] or f" {row}" for row in chosen).values(), default=0)
            if len(chosen) - most < count:
                asked = "positives" if name == "diseased" else "negatives"
                raise SpecError(
                    f"retriever.{asked}: {count} {name} context studies were asked for, but the pool has {len(chosen)}, up to "
                    f"{most} of them of one patient, who cannot have those; lower it to {max(0, len(chosen) - most)} or less, "
                    "or choose other pools"
                )
            rows += chosen
            if name == "diseased":
                positives = len(rows)
        values = [[labels[row].get(name) for name in names] for row in rows]
        known = [[float(v) if v in (0, 1) else float("nan") for v in row] for row in values]
        self._members(
            [study_ids[row] for row in rows],
            [patient_ids[row] for row in rows],
            [reports[row] for row in rows],
            torch.tensor(known).reshape(len(rows), len(names)).to(self.features.device),
            positives,
            torch.zeros(len(rows), self.width, device=self.features.device),
        )
        return rows

    @torch.no_grad()
    def update(self, features: Tensor, encoder: str = "") -> float:
        """Takes new features (n, D).

        Args:
            features: of the members, in their order.
            encoder: hash of the encoder that made them, where it will not change.

        Returns:
            How far they have moved, as the mean of 1 - cosine similarity.
        """
        features = features.float().to(self.features.device)
        moved = 1 - F.cosine_similarity(features, self.features, dim=1).mean() if len(features) else features.new_zeros(())
        self.register_buffer("features", features, persistent=self.learning)
        self.encoder, self._indices = encoder, {}
        return float(moved)

    def settle(self, encoder: str) -> None:
        """The fit is over: the features stay as they are, and `save` writes them in place of the model's state."""
        self.learning, self.encoder = False, encoder
        self.register_buffer("features", self.features, persistent=False)

    def save(self, folder: Path) -> None:
        """Writes the members with their features into bank.arrow of a run folder, and the indices of FAISS beside it."""
        table = {
            "study_id": self.study_ids,
            "patient_id": self.patient_ids,
            "report": self.reports,
            "labels": self.labels.cpu().numpy(),
        }
        facts = {"encoder": self.encoder, "positives": self.positives}
        write_arrow(folder / self.FILE, table, self.features, facts)
        for name, pool in zip(NAMES, self._pools, strict=False):
            if isinstance(pool.search, FaissSearch):
                pool.search.save(folder / f"bank-{name}.faiss")

    def restore(self, folder: Path) -> None:
        """Reads what `save` wrote, mapped into memory.

        Raises:
            RunError: there is no such file, or it is of features of another width.
        """
        path = folder / self.FILE
        if not path.is_file():
            raise RunError(f"run folder {folder} has no {self.FILE}, which holds its context studies; fit it again")
        table, features, facts = read_arrow(path)
        if features.shape[1] != self.width:
            raise RunError(
                f"{path} holds features of width {features.shape[1]}, but the encoder's are {self.width} wide; it is the "
                "bank of another encoder: fit again, or restore the former file"
            )
        self.learning, self.encoder = False, str(facts["encoder"])
        self._members(
            table["study_id"], table["patient_id"], table["report"], table["labels"], int(facts["positives"]), features
        )
        self._indices = {n: file for n in NAMES if (file := folder / f"bank-{n}.faiss").is_file()}

    def check(self, encoder: str) -> None:
        """Compares the hash of an encoder with that of the one that made the features.

        Raises:
            RunError: it was another one.
        """
        if encoder != self.encoder:
            raise RunError(
                f"the bank of context features is of another encoder: its hash is {self.encoder[:12] or 'missing'}, "
                f"that of this encoder {encoder[:12]}; put back the {self.FILE} of this run, or fit again"
            )

    @property
    def pools(self) -> list[Pool]:
        """The diseased and the normal pool, with what searches them; made anew when features have changed."""
        # A checkpoint is loaded into the same tensor, which counts such changes.
        version = self.features._version
        if self._searched is None or self._searched[0] is not self.features or self._searched[1] != version:
            self._searched = self.features, version
            spans = ((0, self.positives), (self.positives, len(self.study_ids)))
            texts = [pool.__dict__.get("texts") for pool in self._pools]
            self._pools = [
                Pool(
                    self.features[start:stop],
                    self.labels[start:stop],
                    self.reports[start:stop],
                    self._search(self.features[start:stop], name),
                )
                for name, (start, stop) in zip(NAMES, spans, strict=True)
            ]
            for pool, text in zip(self._pools, texts, strict=False):
                if text is not None:  # reports do not change with the encoder
                    pool.texts = text
        return self._pools

    def _search(self, features: Tensor, name: str) -> ExactSearch:
        if self.settings.index == "exact" or len(features) < self.settings.index_from:
            return ExactSearch(features)
        search = FaissSearch(features, self.settings.recall, self._indices.get(name))
        LOG.info("faiss index of %d %s studies: recall %.3f", len(features), name, search.recall)
        return search

    @property
    def recall(self) -> dict[str, float]:
        """Pool -> recall of its approximate index; none where search is exact."""
        pools = zip(NAMES, self.pools, strict=True)
        return {name: pool.search.recall for name, pool in pools if isinstance(pool.search, FaissSearch)}

    @torch.no_grad()
    def forward(self, queries: Tensor, batch: Batch) -> Context:
        """Context for the studies of a batch with pooled features `queries` (B, D).

        A retriever is told their labels and reports in training alone.

        Raises:
            RunError: a study would be its own context; never happens, but is checked at run time.
        """
        B, settings = len(batch), self.settings
        told = self.training and batch.labels.shape[1] == self.labels.shape[1]
        labels = batch.labels.to(queries.device)
        asked = Queries(
            features=queries.detach(),
            own=torch.zeros(B, 0, dtype=torch.int64, device=queries.device),
            seeds=batch.seeds.tolist(),
            labels=labels.masked_fill((labels != 0) & (labels != 1), torch.nan)
            if told
            else torch.full((B, self.labels.shape[1]), torch.nan, device=queries.device),
            reports=batch.reports if self.training else [""] * B,
        )
        spans = ((0, self.positives), (self.positives, len(self.study_ids)))
        own = [self._own(batch, start, stop).to(queries.device) for start, stop in spans]
        asked = self.retriever.complete(asked, list(zip(self.pools, own, strict=True)))
        taken = []
        for pool, refused, (start, _), count in zip(
            self.pools, own, spans, (settings.positives, settings.negatives), strict=True
        ):
            asked.own = refused
            rows = (
                self.retriever.choose(asked, pool, count)
                if count
                else torch.zeros(B, 0, dtype=torch.int64, device=queries.device)
            )
            taken.append(rows + start)
        both = torch.cat(taken, 1)
        chosen = both.tolist()
        self._check(chosen, batch)
        ids = [[self.study_ids[row] for row in rows] for rows in chosen]
        n = settings.positives
        vectors = self.features[both].to(queries.dtype)
        return Context(vectors[:, :n], vectors[:, n:], [row[:n] for row in ids], [row[n:] for row in ids])

    def report(self, study: str) -> str:
        """The report of a member."""
        return self.reports[self._rows[study]]

    def _own(self, batch: Batch, start: int, stop: int) -> Tensor:
        """(B, E) rows of a pool that are a study itself or of its patient, padded with -1."""
        found = []
        for study, patient in zip(batch.study_ids, batch.patient_ids, strict=True):
            rows = set(self._patients.get(patient, ()) if patient else ())
            if study in self._rows:
                rows.add(self._rows[study])
            found.append(sorted(row - start for row in rows if start <= row < stop))
        most = max(map(len, found), default=0)
        return torch.tensor([rows + [-1] * (most - len(rows)) for rows in found], dtype=torch.int64).reshape(len(found), most)

    def _check(self, chosen: list[list[int]], batch: Batch) -> None:
        # By names, so that a wrong row of `_own` or of a retriever cannot pass.
        for rows, study, patient in zip(chosen, batch.study_ids, batch.patient_ids, strict=True):
            for row in rows:
                if row < 0 or self.study_ids[row] == study or (patient and self.patient_ids[row] == patient):
                    raise RunError(
                        f"retriever {self.settings.name!r} took study {self.study_ids[row]!r} as context of study {study!r}, "
                        "which is the study itself or one of its patient; correct its `choose`"
                    )


def write_arrow(path: Path, table: Mapping[str, Any], features: Tensor, facts: Mapping[str, Any]) -> None:
    """Writes columns, n features (n, D) float32 and a few facts as one Arrow file: the old file or the new one stays."""
    import pyarrow as arrow

    def column(values: Any) -> Any:
        if isinstance(values, np.ndarray):
            return arrow.FixedSizeListArray.from_arrays(arrow.array(values.reshape(-1)), values.shape[1])
        return arrow.array(values, arrow.string())

    columns = {name: column(values) for name, values in table.items()}
    columns["features"] = column(features.detach().cpu().float().contiguous().numpy())
    told = dict(facts) | {"sha256": _sum(table, features)}
    schema = arrow.schema([(name, values.type) for name, values in columns.items()], {"facts": json.dumps(told)})
    # One batch, so that the features are one piece of memory.
    batch = arrow.record_batch(list(columns.values()), schema=schema)
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk.replacing(path) as staged, arrow.OSFile(str(staged), "wb") as file, arrow.ipc.new_file(file, schema) as writer:
        writer.write_batch(batch)


def _sum(table: Mapping[str, Any], features: Tensor) -> str:
    """SHA-256 of columns by name and of features."""
    digest = hashlib.sha256()
    for name, values in sorted({**table, "features": features.detach().cpu().float()}.items()):
        digest.update(name.encode())
        numbers = isinstance(values, (np.ndarray, Tensor))
        digest.update(np.ascontiguousarray(values).data if numbers else json.dumps(list(values)).encode())
    return digest.hexdigest()


def read_arrow(path: Path) -> tuple[dict[str, Any], Tensor, dict[str, Any]]:
    """What `write_arrow` wrote: columns, features (n, D) mapped into memory, and facts.

    Raises:
        RunError: it cannot be read.
    """
    import pyarrow as arrow

    def numbers(values: Any) -> Tensor:
        flat = values.flatten().to_numpy(zero_copy_only=True).reshape(len(values), values.type.list_size)
        with warnings.catch_warnings():
            # The file cannot be written by way of the tensor, which nobody does.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(flat)

    try:
        reader = arrow.ipc.open_file(arrow.memory_map(str(path)))
        batch = reader.get_batch(0)
        # Wrong offsets would lead out of the file.
        batch.validate(full=True)
        facts: dict[str, Any] = json.loads(reader.schema.metadata[b"facts"])
        columns = {name: batch.column(name) for name in batch.schema.names}
        features = numbers(columns.pop("features"))
        lists = {
            name: numbers(values) if arrow.types.is_fixed_size_list(values.type) else values.to_pylist()
            for name, values in columns.items()
        }
    except (OSError, arrow.ArrowException, KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(f"bank {path} cannot be read: {error}; restore the file, or fit again") from error
    if facts.pop("sha256", None) not in (None, _sum(lists, features)):
        raise RunError(f"bank {path} is damaged: it is not what was written; restore the file, or fit again")
    return lists, features, facts
