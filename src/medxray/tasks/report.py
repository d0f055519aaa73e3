"""Report generation: encoder, projector, context samples, language model (R2GenGPT; with a retriever, R2GenCSR)."""

import functools
import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from medxray import processes
from medxray.cache import cache_folder
from medxray.data import Studies, StudyImages
from medxray.data.seeds import seed_of
from medxray.encoders import Encoder
from medxray.encoders.frozen import features_key, fingerprint
from medxray.llm import PROJECTORS, REPORT_DECODERS, StudyTexts
from medxray.metrics.clinical import label_report
from medxray.metrics.floors import Floor
from medxray.metrics.text import best_constant
from medxray.progress import progress_bar
from medxray.registry import nearest
from medxray.retrieval import RETRIEVERS, RetrieverSettings
from medxray.retrieval.bank import FeatureBank, read_arrow, write_arrow
from medxray.retrieval.context import context_tokens
from medxray.spec import GenerationSpec, Spec
from medxray.tasks import Task, join_views
from medxray.types import Batch, Prediction, RunError, Scores, SpecError, WeightsError
from medxray.visual import ContextCard, StudyCard
from medxray.weights.systems import is_run, load_system
from medxray.weights.writing import export

LOG = logging.getLogger(__name__)
CONTEXT_PICTURES = 1000
"""Context studies at most whose images stand on the page; each is read for it."""
PROTOCOLS = ("full", "r2gen")
BEST_CONSTANT = "best constant report"
CHOOSE_BY = ("bleu-4", "bleu-1", "bleu-2", "bleu-3", "rouge-l", "cider")
"""Values by which a constant report can be chosen; the first stands in for others."""


class Report(Task):
    """Image tokens and context in a language model's prompt; the loss is the mean over report tokens."""

    sections: ClassVar[dict[str, dict[str, Any] | None]] = {
        "encoder": None,
        "projector": {"name": "linear"},
        "retriever": {},
        "decoder": None,
    }
    metrics = ("bleu", "rouge-l", "cider")
    reports = True

    def __init__(self, spec: Spec, encoder: Encoder | None = None) -> None:
        super().__init__(spec, encoder)
        assert spec.decoder is not None and spec.projector is not None
        self.decoder = REPORT_DECODERS.build(spec.decoder, spec.seed)
        self.projector = PROJECTORS.build(spec.projector, self.encoder.width, self.decoder.width)
        self.generation: GenerationSpec = spec.generation or GenerationSpec()
        self.bank: FeatureBank | None = None
        if spec.retriever is not None:
            settings = spec.retriever
            assert isinstance(settings, RetrieverSettings)
            if settings.context_text and not self.decoder.reads_texts:
                raise SpecError(
                    f"retriever.context_text: decoder {spec.decoder.name!r} reads no texts; set it to false, or take causal-lm"
                )
            retriever = RETRIEVERS.build(settings)
            self.bank = FeatureBank(retriever, settings, self.encoder.width, learning=not self.frozen_encoder)
            # Every process computes it; sending it with each step would cost more than the step.
            self._ddp_params_and_buffers_to_ignore = ["bank.features", "bank.labels"]
        self._context_images: StudyImages | None = None
        self._staleness: dict[str, float] = {}
        self._bank_unchecked = False
        self._context_batches: list[Batch] = []

    def prepare(self, studies: Studies) -> None:
        super().prepare(studies)
        train = studies.splits["train"]
        begin = self.spec.weights
        if begin is not None and is_run(begin):
            # Its words, not those of this training set.
            self.decoder.restore(Path(begin).expanduser())
        else:
            self.decoder.prepare(train["report"])
        if self.bank is not None:
            labels = [dict(row) for row in train["labels"]]
            self.bank.fill(train["study_id"], train["patient_id"], train["report"], labels, self.labels)

    def begin_with(self, source: str) -> None:
        load_system(self, source)

    def export(self, folder: Path, format: str | None) -> bool:
        """Into encoder/ and language_model/ what transformers has an architecture for, beside projector.safetensors."""
        if format not in (None, "transformers"):
            return super().export(folder, format)
        if (folder / "spec.yaml").exists():
            raise WeightsError(f"{folder} is a run folder, whose files would be mixed up; name another")
        written, reason = self.decoder.export(folder / "language_model"), ""
        encoder: Any = self.plain_encoder()
        try:
            if hasattr(encoder, "save"):
                encoder.save(folder / "encoder")
            else:
                export(encoder, folder / "encoder", "transformers", self.spec.data.image_size)
            written = True
        except WeightsError as error:
            reason = str(error)
        if written:
            state = {key: value.detach().cpu().contiguous() for key, value in self.projector.state_dict().items()}
            save_file(state, folder / "projector.safetensors", metadata={"format": "pt"})
        elif format is not None:
            raise WeightsError(f"{reason}; transformers has no architecture of this decoder either; take format medxray")
        return written

    @property
    def needs_studies(self) -> bool:
        return self.bank is not None or not self.decoder.references()

    def save_files(self, folder: Path) -> None:
        super().save_files(folder)
        self.decoder.save(folder)
        if self.bank is not None:
            self.bank.save(folder)

    def restore(self, folder: Path) -> None:
        super().restore(folder)
        self.decoder.restore(folder)
        if self.bank is not None:
            self.bank.restore(folder)
            # The encoder's weights come after this.
            self._bank_unchecked = True

    def references(self) -> dict[str, str]:
        return self.decoder.references()

    def copy_public(self, folder: Path) -> dict[str, Any]:
        if not self.decoder.references():
            return {}
        self.decoder.copy_public(folder / "public" / "decoder")
        return {"decoder": {"model": "./public/decoder"}}

    def frozen_public(self) -> tuple[str, ...]:
        if not self.decoder.references():
            return ()
        trained = {name for name, parameter in self.decoder.named_parameters() if parameter.requires_grad}
        return tuple(f"decoder.{name}" for name in self.decoder.state_dict() if name not in trained)

    def watch(self, images: StudyImages) -> None:
        if self.bank is None:
            return
        places = {name: i for i, name in enumerate(images.study_ids)}
        outside = [name for name in self.bank.study_ids if name not in places]
        if outside:
            raise RunError(f"study {outside[0]!r} may be context but is not in the training split; fit anew with fresh")
        rows = [places[name] for name in self.bank.study_ids]
        self._context_batches = []
        if images.features is not None:
            views = torch.tensor([len(images.images[row]) for row in rows])[:, None, None]
            # Zeros stand where a view is missing.
            self.bank.update((images.features.pooled[rows] / views).sum(1), fingerprint(self.encoder))
            return
        self._context_images = images.still(rows)
        if self.frozen_encoder:
            self._build_once()

    def before_step(self, step: int, steps_per_epoch: int) -> None:
        if self.looks_before(step, steps_per_epoch):
            moved = self.refresh()
            if step:
                self._staleness = {"bank_steps_old": self._every(steps_per_epoch), "bank_moved": moved}

    def looks_before(self, step: int, steps_per_epoch: int) -> bool:
        return self.bank is not None and not self.frozen_encoder and step % self._every(steps_per_epoch) == 0

    def _every(self, steps_per_epoch: int) -> int:
        """Steps from one refresh of the bank to the next."""
        assert self.bank is not None
        settings = self.bank.settings
        return settings.refresh or max(1, round(settings.refresh_epochs * steps_per_epoch))

    def logged(self) -> dict[str, float]:
        staleness, self._staleness = self._staleness, {}
        return staleness

    def after_fit(self) -> None:
        if self.bank is not None:
            if not self.frozen_encoder:
                self.refresh()
            self.bank.settle(fingerprint(self.encoder))

    @torch.no_grad()
    def refresh(self) -> float:
        """Computes the bank's features anew with the encoder as it is, each process its part; returns how far they moved, as
        1 - cosine."""
        assert self.bank is not None and self._context_images is not None
        training, started = self.training, time.perf_counter()
        self.eval()
        device = self.bank.features.device
        size = self.spec.training.batch_size
        count = len(self._context_images)
        own = processes.own_batches(range(count), size)
        batches: Iterable[Batch] = self._context_batches or (self._context_images.of(rows) for _, rows in own)
        # A handful of images stays decoded between refreshes; a whole training set does not.
        if count <= 4 * size:
            batches = self._context_batches = list(batches)
        shown = progress_bar(batches, desc="context", total=len(own), unit="batch", delay=2, leave=False)
        pooled = [self.study_features(batch.to(device)).pooled.float().cpu() for batch in shown]
        made = [(number, features) for (number, _), features in zip(own, pooled, strict=True)]
        moved = self.bank.update(torch.cat(processes.union(made, -(-count // size))))
        self.train(training)
        # A log without clocks cannot hold it.
        LOG.info("features of %d context studies in %.1f s", len(self._context_images), time.perf_counter() - started)
        return moved

    def _build_once(self) -> None:
        """The bank of a frozen encoder whose training images are cropped, so that their features are not kept otherwise."""
        assert self.bank is not None and self._context_images is not None
        path = cache_folder() / "banks" / f"{features_key(self.encoder, self._context_images)}.arrow"
        # A machine that has the file helps one that has not.
        if any(processes.union([(processes.rank(), not path.is_file())], processes.world())):
            self.refresh()
            write_arrow(path, {"study_id": self.bank.study_ids}, self.bank.features, {})
        self.bank.update(read_arrow(path)[1], fingerprint(self.encoder))

    def items(self, batch: Batch) -> int:
        return self.decoder.count(batch.reports)

    def forward(self, batch: Batch, items: Tensor | int | None = None) -> Tensor:
        visual, context, who = self.inputs(batch)
        total = self.decoder.loss(visual, context, batch.reports, **self.texts(batch, who))
        return total / (items if items is not None else max(1, self.items(batch)))

    def inputs(
        self, batch: Batch, with_context: bool = True
    ) -> tuple[Tensor, Tensor | None, list[dict[str, list[tuple[str, float]]]]]:
        """Image tokens (B, N, D) and context tokens (B, T, D) in the decoder's width, and who the context is: by pool
        its studies, each with the cosine similarity of its pooled features to the study's."""
        encoded = self.encode(batch)
        features = join_views(encoded, batch.view_mask, self.spec.data.views)
        visual = self.projector.on_grid(features.tokens, encoded.grid)
        nobody: list[dict[str, list[tuple[str, float]]]] = [{} for _ in batch.study_ids]
        if self.bank is None or not with_context:
            return visual, None, nobody
        if self._bank_unchecked:
            self.bank.check(fingerprint(self.encoder))
            self._bank_unchecked = False
        context = self.bank(features.pooled, batch)
        tokens = context_tokens(
            self.bank.settings.residual, features.pooled, context, self.projector.project, self.decoder.wrap_context
        )
        near = [
            F.cosine_similarity(features.pooled[:, None].float(), samples.float(), dim=-1).tolist()
            for samples in (context.positive, context.negative)
        ]
        who = [
            {"positive": list(zip(p, pn, strict=True)), "negative": list(zip(n, nn, strict=True))}
            for p, n, pn, nn in zip(context.positive_ids, context.negative_ids, *near, strict=True)
        ]
        return visual, tokens, who

    def texts(self, batch: Batch, who: Sequence[dict[str, list[tuple[str, float]]]]) -> dict[str, StudyTexts]:
        """What the decoder reads beside images, of a batch and those whom `inputs` took as its context: the argument
        `texts`; nothing for a decoder that reads none."""
        if not self.decoder.reads_texts:
            return {}
        context: list[list[tuple[str, str]]] = []
        if self.bank is not None and self.bank.settings.context_text:
            report, pools = self.bank.report, ("negative", "positive")
            context = [[(pool, report(name)) for pool in pools for name, _ in own.get(pool, ())] for own in who]
        return {"texts": StudyTexts(batch.indications, batch.priors, context if any(context) else ())}

    def predict(self, batch: Batch, with_context: bool = True) -> list[Prediction]:
        visual, context, who = self.inputs(batch, with_context)
        seeds = [seed_of(self.spec.seed, name) for name in batch.study_ids]
        generated = self.decoder.generate(visual, context, self.generation, seeds, **self.texts(batch, who))
        return [
            Prediction(
                name,
                text=report.text,
                context={pool: [study for study, _ in taken] for pool, taken in own.items()},
                similarity={pool: [near for _, near in taken] for pool, taken in own.items()},
                log_probabilities=report.log_probabilities,
                tokens=list(report.tokens),
            )
            for name, report, own in zip(batch.study_ids, generated, who, strict=True)
        ]

    def prediction_order(self, images: StudyImages) -> Sequence[int]:
        """By the length of what is read of each study, so that the prompts of a batch need little padding."""
        lengths = self.decoder.reading_lengths(StudyTexts(images.indications, images.priors), len(images))
        return sorted(range(len(images)), key=lambda row: lengths[row])

    def targets(self, images: StudyImages) -> list[str]:
        return list(images.reports)

    def as_scored(self, targets: list[str], protocol: str | None) -> tuple[list[str], str]:
        cleaning = self.spec.data.cleaning
        cleaned = "references as they stand" if cleaning == "none" else f"references cleaned by {cleaning}"
        if protocol in (None, "full"):
            return targets, f"full: {cleaned}, whole"
        if protocol == "r2gen":
            return self.decoder.cut(targets), f"r2gen: {cleaned}, cut after {self.decoder.limit}"
        raise SpecError(f"protocol: no {protocol!r}{nearest(protocol, PROTOCOLS)}; expected one of {', '.join(PROTOCOLS)}")

    def outputs(self, predictions: Sequence[Prediction]) -> list[str]:
        return [prediction.text for prediction in predictions]

    def floors(
        self, train: StudyImages, val: StudyImages, images: StudyImages, references: list[Any] | None = None
    ) -> dict[str, Floor]:
        n, reports = len(images), list(train.reports)
        wanted = self.targets(val) if references is None else references
        counts = Counter(reports)
        frequent = [max(counts, key=lambda report: counts[report])] * n
        alike = [reports[i] for i in nearest_pixels(train.thumbnails(), images.thumbnails())]

        @functools.cache
        def constant(value: str) -> list[str]:
            return [best_constant(reports, wanted, value)] * n

        return {
            BEST_CONSTANT: lambda value: constant(value if value in CHOOSE_BY else CHOOSE_BY[0]),
            "most frequent report": lambda _: frequent,
            "nearest image's report": lambda _: alike,
        }

    def ablations(self) -> dict[str, Callable[[Batch], list[Prediction]]]:
        if self.bank is None:
            return {}
        return {"same model, context off": lambda batch: self.predict(batch, with_context=False)}

    def notes(self, predictions: Sequence[Prediction], scores: Scores) -> list[str]:
        notes = []
        if BEST_CONSTANT in scores.comparisons:
            notes.append(f"{BEST_CONSTANT}: the training report that is best for the validation studies by the metric itself")
            others = [name for name in scores if name not in CHOOSE_BY]
            notes[0] += f"; by {CHOOSE_BY[0]} for {', '.join(others)}" if others else ""
        if self.bank is not None:
            recalls = [f"{recall:.3f} of the {name} studies" for name, recall in self.bank.recall.items()]
            notes += [f"context is searched approximately; recall of the nearest: {', '.join(recalls)}"] if recalls else []
        return notes

    def cards(
        self, images: StudyImages, predictions: Sequence[Prediction], train: StudyImages | None, explained: Collection[int]
    ) -> Iterator[StudyCard]:
        places = {name: i for i, name in enumerate(train.study_ids)} if train is not None else {}
        pictured: set[str] = set()

        def card(name: str, pool: str, near: float | None) -> ContextCard:
            if train is None or name not in places:
                return ContextCard(name, pool, None, "", near)
            # The page keeps the first picture of each.
            image = None
            if name not in pictured and len(pictured) < CONTEXT_PICTURES:
                pictured.add(name)
                image = train.picture(places[name], 0)
            return ContextCard(name, pool, image, train.reports[places[name]], near)

        for i, prediction in enumerate(predictions):
            told: dict[str, Any] = {}
            if i in explained:
                attention, remark = self.attention(images.collate([images[i]]), prediction.text)
                told = {
                    "confidence": [word.probability for word in prediction.words],
                    "attention": attention,
                    "pointed": finding_words(prediction.text),
                    "remark": remark,
                }
            unknown: list[None] = [None] * len(images)
            yield StudyCard(
                study_id=prediction.study_id,
                images=[images.picture(i, v) for v in range(len(images.views[i]))],
                captions=list(images.views[i]),
                reference=images.reports[i],
                prediction=prediction.text,
                context=[
                    card(name, {"positive": "diseased", "negative": "normal"}[pool], near)
                    for pool, names in prediction.context.items()
                    for name, near in zip(names, prediction.similarity.get(pool) or unknown, strict=False)
                ],
                **told,
            )

    @torch.no_grad()
    def attention(self, batch: Batch, report: str) -> tuple[list[np.ndarray], str]:
        """What each word of a report of one study looked at, one study at a time because a pass keeps its weights.

        Returns:
            For each view a map (words, h, w); the shares of a word sum to one over the views. And a remark for a reader:
            why there is no map, or that one stands for all views.
        """
        batch = batch.to(next(self.encoder.parameters()).device)
        batch.features = encoded = self.encode(batch)
        visual, context, who = self.inputs(batch)
        found = self.decoder.attend(visual, context, [report], **self.texts(batch, who))
        if found is None:
            return [], "This language model has no attention to the image's tokens that could be drawn."
        views = int(batch.view_mask.sum())
        grid = self.projector.grid(encoded.grid) if encoded.grid is not None else None
        joined = grid is not None and visual.shape[1] == batch.view_mask.shape[1] * grid[0] * grid[1]
        if grid is None or not (joined or visual.shape[1] == grid[0] * grid[1]):
            return [], "The tokens that the words looked at are no map of the image, so their attention is not drawn."
        maps = found[0].unflatten(1, (-1, *grid)).cpu().numpy()
        if not joined and views > 1:
            # One map stands for the mean of all views, and so for each of them.
            return [maps[:, 0] / views] * views, "The views are averaged before words are written: one map for all of them."
        return list(maps[:, :views].swapaxes(0, 1)), ""


def finding_words(report: str) -> list[int]:
    """Places in `report.split()` of the words of sentences that name a finding as present or in doubt."""
    places: list[int] = []
    start = 0
    for sentence in re.split(r"(?<=[.;!?])\s+", report):
        count = len(sentence.split())
        if any(label_report(sentence).values()):
            places += range(start, start + count)
        start += count
    return places


def nearest_pixels(train: np.ndarray, queries: np.ndarray) -> list[int]:
    """For each of B thumbnails (B, P) the training thumbnail (n, P) at the smallest squared distance."""
    if len(train) == 0:
        raise SpecError("data: no training studies to compare with")
    squared = (train**2).sum(1)[None] - 2 * queries @ train.T
    return [int(i) for i in squared.argmin(1)]
