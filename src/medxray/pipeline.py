"""One spec, fitted, judged and used: fit, evaluate, predict, save, load. Knows tasks only by their base class."""

import functools
import itertools
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from medxray import disk, processes
from medxray.data import Sample, Studies, StudyImages, collate, load_studies, study_from
from medxray.encoders import Encoder
from medxray.encoders.adapt import as_encoder
from medxray.encoders.frozen import compute_once
from medxray.evaluation import Judged, judge, write_predictions
from medxray.metrics import METRICS, Metric, available
from medxray.metrics.intervals import score_all
from medxray.model_card import counts, write_card
from medxray.progress import progress_bar, quiet
from medxray.registry import Settings, nearest
from medxray.spec import DataSpec, Overrides, Spec
from medxray.tasks import TASKS, Task, join_views
from medxray.training import fit, load_trained, save_trained, strategy_of
from medxray.types import Batch, DataError, Prediction, RunError, Scores, SpecError, WeightsError
from medxray.visual import StudyCard
from medxray.visual.charts import training_curves
from medxray.visual.page import fragment
from medxray.visual.report_page import report_page

CARDS = 24
"""Studies of the page whose cards take a pass of the model, such as for attention."""
PICTURED, PAGE = 6, 12
FILES = ("task.json", "references.json", "environment.json")

Predict = Callable[[Batch], list[Prediction]]


def build(
    spec: str | Path | Mapping[str, Any] | Spec,
    overrides: Overrides | None = None,
    *,
    encoder: nn.Module | None = None,
) -> "Pipeline":
    """A pipeline from a packaged spec's name, a YAML file, a mapping or a Spec.

    Args:
        spec: what to build; checked whole before any weight or image is touched.
        overrides: a nested mapping, or strings such as "encoder.name=vit".
        encoder: a module to take in place of the spec's encoder: an `Encoder`, or any module whose output is a
            map (B, D, h, w), tokens (B, N, D), one vector (B, D) or `Features`.

    Raises:
        SpecError: with a line for each mistake.
    """
    if encoder is None:
        return Pipeline(Spec.read(spec, overrides))
    read = Spec.read(spec, overrides)
    replaced = {**read.to_dict(), "encoder": {"name": "module", "trainable": getattr(read.encoder, "trainable", True)}}
    return Pipeline(Spec.read(replaced), encoder)


def load(
    folder: str | Path,
    *,
    spec: str | Path | Mapping[str, Any] | Spec | None = None,
    overrides: Overrides | None = None,
    encoder: nn.Module | None = None,
) -> "Pipeline":
    """A fitted pipeline from a run folder or from what `Pipeline.save` wrote, or from another project's checkpoint.

    What such a checkpoint lacks, such as the context studies or a vocabulary, is made from the spec's data set; without
    either, as for R2GenGPT, no data set is needed but to evaluate.

    Args:
        folder: a run folder, or a file of R2GenCSR, R2GenGPT or R2Gen.
        spec: for such a file: what system it is, such as "r2gencsr-mimic-cxr".
        overrides: of that spec.
        encoder: the module that the pipeline was built with, where it was.

    Raises:
        RunError: no such folder, or a fit that has not finished.
        WeightsError: tensors that do not fit.
    """
    folder = Path(folder)
    if spec is not None:
        return _from_checkpoint(folder, Spec.read(spec, overrides), encoder)
    if folder.is_file():
        raise RunError(f"{folder} is a file; for another project's checkpoint name its spec too: spec='r2gencsr-mimic-cxr'")
    disk.settle(folder)
    for name in ("spec.yaml", "model.safetensors", "task.json"):
        if not (folder / name).is_file():
            found = ", ".join(sorted(p.name for p in folder.iterdir())) if folder.is_dir() else "no such folder"
            raise RunError(
                f"{folder} is not a finished run: {name} is missing (found: {found or 'an empty folder'}); "
                "run fit to its end, or name another folder"
            )
    data = Spec.read(folder / "spec.yaml").to_dict()
    # The run's own tensors are loaded below, so that where they once came from need not be there.
    data["weights"] = None
    data["encoder"] = {**data["encoder"], "weights": None}
    if data.get("pixel_decoder", {}).get("weights") is not None:
        data["pixel_decoder"] = {**data["pixel_decoder"], "weights": None}
    model = data.get("decoder", {}).get("model")
    if isinstance(model, str) and model.startswith("./"):
        if not (folder / model).resolve().is_relative_to(folder.resolve()):
            raise RunError(f"{folder / 'spec.yaml'}: decoder.model {model!r} leads out of the run folder; name a folder inside")
        data["decoder"] = {**data["decoder"], "model": str(folder / model)}
    pipeline = Pipeline(Spec.read(data), encoder)
    pipeline.folder = folder
    pipeline.task.restore(folder)
    load_trained(pipeline.task, folder / "model.safetensors")
    pipeline.fitted = True
    return pipeline


def _from_checkpoint(file: Path, spec: Spec, encoder: nn.Module | None) -> "Pipeline":
    """A pipeline whose weights are those of a whole system's checkpoint; runs/NAME-FILE is its folder."""
    if not file.is_file():
        raise RunError(f"{file}: a spec was named, so a checkpoint file was expected; a run folder has its own spec")
    output = spec.output or f"runs/{spec.name}-{file.stem}"
    pipeline = Pipeline(Spec.read(spec, {"weights": str(file), "output": output}), encoder)
    task = pipeline.task
    if task.needs_studies:
        pipeline._prepare()
        task.watch(pipeline.images("train"))
        task.after_fit()
    else:
        task.views = 1 if spec.data.views == "single" else spec.data.max_views
        task.begin_with(str(file))
    pipeline.fitted = True
    return pipeline


class Pipeline:
    """A task built from a spec, with its data and its run folder. Made by `build` and `load`.

    Attributes:
        spec: complete and checked.
        folder: the run folder: spec.yaml, facts.json, environment.json, model.safetensors, checkpoints/, log.jsonl,
            scores.json, predictions.parquet, report.html.
        fitted: True once the weights are those of a finished fit.
        given: the module that stands in place of the spec's encoder, if any.
    """

    def __init__(self, spec: Spec, encoder: nn.Module | None = None) -> None:
        self.spec = spec
        self.folder = spec.run_folder
        self.fitted = False
        self.given = encoder
        self._task: Task | None = None
        self._studies: Studies | None = None
        self._progress = False

    def __repr__(self) -> str:
        state = "fitted" if self.fitted else "not fitted"
        return f"Pipeline({self.spec.name}: {self.spec.task}, {state}, {self.folder})"

    def _repr_html_(self) -> str:
        """For a notebook: parts with their settings, and how the fit went."""
        curves = "".join(training_curves(read_log(self.folder))) if self.fitted else ""
        return self.spec._repr_html_() + (fragment(f'<div class="curves">{curves}</div>') if curves else "")

    @property
    def task(self) -> Task:
        """The model, built on first use with the spec's seed."""
        if self._task is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.spec.seed)
                encoder: Encoder | None = None
                if self.given is not None:
                    encoder = as_encoder(self.given, self.spec.data.image_size)
                self._task = TASKS.get(self.spec.task)(self.spec, encoder)
            self._task.eval().to(processes.device())
        return self._task

    @property
    def studies(self) -> Studies:
        """The data set, read and checked on first use."""
        if self._studies is None:
            with quiet(not self._progress):
                found = load_studies(self.spec.data, reports=TASKS.get(self.spec.task).reports)
            if _names_of(self.folder) not in (None, found.reader.mark):
                raise RunError(
                    f"{self.folder}: the names of patients were made with another key than the one that is found now, which "
                    "would divide them otherwise; name the key of this fit by data.reader.key_file or MEDXRAY_KEY, or fit again"
                )
            self._studies = found
        return self._studies

    def images(self, split: str, *, train: bool = False) -> StudyImages:
        """The studies of a split as the encoder takes them."""
        self.studies.require(split)
        encoder = self.task.encoder
        images = StudyImages(
            self.studies.splits[split],
            self.studies.root,
            self.spec.data,
            channels=encoder.channels,
            mean=encoder.mean,
            std=encoder.std,
            labels=self.task.labels,
            seed=self.spec.seed,
            train=train,
            max_views=self.studies.views,
            reader=self.studies.reader,
        )
        self.task.complete(images, progress=self._progress)
        if self.task.frozen_encoder and not (train and self.spec.data.crops):
            images.features = compute_once(
                self.task.encoder, images, self.spec.training.batch_size, progress=self._progress
            )
        return images

    @processes.together()
    def fit(self, *, fresh: bool = False, progress: bool = True) -> "Pipeline":
        """Fits the pipeline, or goes on where an interrupted fit stopped; a finished run is loaded as it is. Several processes,
        as `torchrun` starts them, share the work; each must call it.

        Args:
            fresh: delete what the run folder holds and begin anew.
            progress: show a bar.

        Raises:
            RunError: the run folder is that of another spec, or cannot be written; or another process was lost.
            DataError, SpecError, WeightsError: something given cannot be used; nothing is written then.
        """
        self._progress = progress
        strategy_of(self.spec.training, processes.world())
        if fresh and _is_main() and self.folder.exists():
            _check_run_folder(self.folder)
            with disk.held(self.folder, "fit"):
                disk.remove(self.folder)
        processes.wait()
        if (self.folder / "spec.yaml").is_file():
            self._check_spec()
        if (self.folder / "model.safetensors").is_file():
            loaded = load(self.folder, encoder=self.given)
            self._task, self.fitted = loaded.task, True
            return self
        task = self.task
        self.studies.require("train", "val")
        self._prepare()
        (metrics, left_out), selected = self._metrics(), self.spec.training.selected
        better = {name: metric.higher_is_better for metric in metrics for name in metric.values} | {"loss": False}
        for name in selected:
            if name not in better:
                raise SpecError(
                    f"training.select: validation has no metric {name!r}{nearest(name, better)} "
                    f"(found: {', '.join([*better, *left_out])}); name one of them, or add it to metrics"
                )
        if len({better[name] for name in selected}) > 1:
            raise SpecError(
                f"training.select: of {' and '.join(selected)} some are better when higher and some when lower; "
                "take metrics of one kind"
            )
        for name in self.spec.training.oversample:
            if name not in task.labels:
                raise SpecError(
                    f"training.oversample: no label {name!r}{nearest(name, task.labels)} "
                    f"(found: {', '.join(task.labels) or 'none'})"
                )
        task.to(next(task.encoder.parameters()).device)
        task.check_encoder()
        train, val = self.images("train", train=True), self.images("val")
        if self.spec.training.validation_studies is not None:
            val = val.still(range(min(len(val), self.spec.training.validation_studies)))
        def validate() -> dict[str, float]:
            found = {"loss": validation_loss(task, val, self.spec.training.batch_size)}
            if set(selected) != {"loss"}:
                predictions = self._predict_all(task.predict, val, "validate", progress=False)
                made, references = task.outputs(predictions), task.as_scored(task.targets(val), self.spec.protocol)[0]
                for metric in metrics:
                    metric.choose(made, references)
                scores = score_all(metrics, made, references, val.patient_ids, resamples=0)
                found |= {name: score.value for name, score in scores.items()}
            found[self.spec.training.select] = sum(weight * found[name] for name, weight in selected.items())
            return found

        drawn = self._pictured(val)
        with disk.held(self.folder, "fit") if _is_main() else nullcontext(), quiet(not progress):
            if _is_main():
                self._begin()
            fit(
                task,
                train,
                self.folder,
                validate,
                pictured=val.collate([val[row] for row in drawn]) if drawn else None,
                higher_is_better=all(better[name] for name in selected),
                progress=progress,
            )
            if _is_main():
                self._finish()
        processes.wait()
        self.fitted = True
        return self

    @processes.together()
    @torch.no_grad()
    def evaluate(
        self,
        split: str | None = None,
        *,
        beside: "Mapping[str, Pipeline] | None" = None,
        ablations: bool = True,
        subgroups: bool = True,
        protocol: str | None = None,
        progress: bool = True,
    ) -> Scores:
        """Scores on a split with 95 % intervals, beside the floors that a fit must beat.

        What a metric has to choose, such as a threshold, each system chooses on the validation studies.

        Also writes scores.json, predictions.parquet and report.html to the run folder. Several processes predict a part of the
        studies each; all must call it.

        Args:
            split: "test" where the data set has one, else "val".
            beside: other fitted pipelines of the same task and data, a row of the table each.
            ablations: judge the same model with a part switched off too, which for reports takes as long again.
            subgroups: score by sex, band of age, view and manufacturer too, where the data set tells them.
            protocol: what reports are scored against: "full" takes the cleaned references whole, "r2gen" cuts them as the
                decoder's targets, as R2Gen, R2GenGPT and R2GenCSR do. The spec's if None.
            progress: show a bar.
        """
        self._need_fit()
        self._progress = progress
        protocol = self.spec.protocol if protocol is None else protocol
        self.task.as_scored([], protocol)
        if split is None:
            split = "test" if len(self.studies.splits.get("test", ())) else "val"
        task, images = self.task, {split: self.images(split), "train": self.images("train").still()}
        if split != "val" and len(self.studies.splits["val"]):
            images["val"] = self.images("val")
        metrics, left_out = self._metrics()

        @functools.cache
        def said(on: str) -> list[Prediction]:
            return self._predict_all(task.predict, images[on], "evaluate" if on == split else "validate", progress)

        def other(row: str, predict: Predict, pipeline: Pipeline) -> Callable[[str], list[Any]]:
            def outputs(on: str) -> list[Any]:
                shown = images[on] if pipeline is self else pipeline.images(on)
                return pipeline.task.outputs(pipeline._predict_all(predict, shown, row, progress))

            return outputs

        others = {row: other(row, predict, self) for row, predict in task.ablations().items()} if ablations else {}
        for row, pipeline in (beside or {}).items():
            pipeline._need_fit()
            others[row] = other(row, pipeline.task.predict, pipeline)
        with quiet(not progress):
            judged = judge(
                task, metrics, split, images, said(split), lambda on: task.outputs(said(on)), others,
                protocol=protocol, subgroups=subgroups,
            )  # fmt: skip
        scores = judged.scores
        scores.notes += left_out
        if _is_main():
            self._write_scores(judged, split, images, said(split), progress)
        processes.wait()
        return scores

    def _write_scores(
        self, judged: Judged, split: str, images: Mapping[str, StudyImages], said: list[Prediction], progress: bool
    ) -> None:
        """scores.json, predictions.parquet and report.html of an evaluation."""
        task, scores, shown = self.task, judged.scores, images[split]
        # Files of two evaluations must not stand beside each other.
        with self._written(), disk.held(self.folder, "evaluate"), disk.replacing_together(self.folder) as staged:
            _write_json(staged / "scores.json", scores.to_dict())
            write_predictions(staged / "predictions.parquet", said, judged.references, shown.patient_ids, split)
            report_page(
                staged / "report.html",
                title=self.spec.name,
                spec_yaml=self.spec.to_yaml(),
                log=read_log(self.folder),
                scores=scores,
                studies=task.cards(shown, said, images["train"], set(_spread(len(shown), CARDS))),
                facts=self.facts(),
                notes=[f"protocol {scores.protocol}"] if scores.protocol else [],
                values=judged.each,
                calibration=judged.calibration,
                count=len(shown),
                progress=progress,
            )

    @torch.no_grad()
    def predict(self, studies: Any, *, progress: bool = False) -> Any:
        """Reports, probabilities or reconstruction errors of new studies.

        Args:
            studies: one study or a list of them. A study is a path, array or PIL image; a tuple of those, its
                views, frontal first; or a mapping with "images" and, if known, "study_id" and "patient_id".
            progress: show a bar.

        Returns:
            A `Prediction` for one study, a list of them for a list. Of a list several processes read and predict a part each;
            all must call it, and get all of it.
        """
        self._need_fit()
        task = self.task
        if not isinstance(studies, list):
            return self._run(task.predict, [collate(self._samples([studies]), task.views)], 1, "predict", progress)[0]
        with processes.together():
            own = processes.own_batches(studies, self.prediction_batch)
            batches = (collate(self._samples(part), task.views) for _, part in own)
            found = iter(self._run(task.predict, batches, len(own), "predict", progress))
            made = [(number, list(itertools.islice(found, len(part)))) for number, part in own]
            return list(itertools.chain.from_iterable(processes.union(made, -(-len(studies) // self.prediction_batch))))

    def read(self, studies: Sequence[Any]) -> list[Sample]:
        """Studies decoded as the model takes them; `predict` and `features` take them in place of files.

        Leaves the model alone, so that other threads may read while one predicts.

        Raises:
            ImageError, DataError: as `predict`.
        """
        self._need_fit()
        return self._samples(studies)

    def decoder(self, data: DataSpec | None = None) -> Callable[[Any], Sample]:
        """What `read` does to each study. It holds nothing of the model, and can be sent to other processes.

        Args:
            data: how files become images; as the spec says if None.
        """
        self._need_fit()
        encoder, task, data = self.task.encoder, self.task, data or self.spec.data
        # Settings of a part are of a class made at run time, which does not travel; which reader there was is all the same here.
        data = DataSpec.model_construct(**{**dict(data), "reader": Settings(name=data.reader.name)})
        return functools.partial(
            study_from,
            spec=data,
            channels=encoder.channels,
            mean=encoder.mean,
            std=encoder.std,
            labels=task.labels,
            seed=self.spec.seed,
            max_views=task.views,
            segment=task.segment,
            grid=task.grid,
        )

    @torch.no_grad()
    def features(self, studies: Sequence[Any]) -> NDArray[np.float32]:
        """(n, D): the encoder's pooled vector of each study, the mean over its views.

        Args:
            studies: a list, as `predict` takes it.
        """
        self._need_fit()
        task, samples = self.task, self._samples(studies)
        size, device = self.prediction_batch, next(self.task.encoder.parameters()).device
        task.eval()
        found = [np.zeros((0, task.encoder.width), np.float32)]
        for i in range(0, len(samples), size):
            batch = collate(samples[i : i + size], task.views).to(device)
            # Not `task.encode`, which may end before the encoder's last block.
            pooled = join_views(Task.encode(task, batch), batch.view_mask, "average").pooled
            found.append(pooled.float().cpu().numpy())
        return np.concatenate(found)

    @torch.no_grad()
    def pictures(self, studies: Any = None, folder: str | Path | None = None, *, progress: bool = False) -> list[Path]:
        """Draws what the model makes of studies, as after each epoch of a fit.

        Args:
            studies: as `predict` takes them; None takes the validation studies that the fit drew.
            folder: where the PNG files go; pictures/ of the run folder if None.
            progress: show a bar.

        Returns:
            The files, each of at most 12 studies.

        Raises:
            RunError: the task draws nothing, or the files cannot be written.
        """
        self._need_fit()
        if type(self.task).pictures is Task.pictures:
            raise RunError(f"task {self.spec.task} draws no pictures; its studies are in report.html after evaluate")
        if studies is None:
            images = self.images("val")
            samples = [images[row] for row in self._pictured(images) or _spread(len(images), PICTURED)]
            name, views = "validation", images.max_views
        else:
            samples = self._samples(studies if isinstance(studies, list) else [studies])
            name, views = "studies", self.task.views
        folder = Path(folder) if folder is not None else self.folder / "pictures"
        pages = [samples[i : i + PAGE] for i in range(0, len(samples), PAGE)]
        device, files = next(self.task.encoder.parameters()).device, []
        self.task.eval()
        for i, page in enumerate(progress_bar(pages, desc="pictures", unit="page", disable=not progress)):
            page_name = f"{name}-{i + 1:03d}" if len(pages) > 1 else name
            try:
                files += self.task.pictures(collate(page, views).to(device), folder, page_name)
            except OSError as error:
                reason = error.strerror or error
                raise RunError(f"{folder} cannot be written: {reason}; name another folder for the pictures") from error
        return files

    @torch.no_grad()
    def cards(self, rows: Sequence[int] = range(3), split: str = "test") -> list[StudyCard]:
        """Studies of a split beside what the model says of them, as `report.html` has them; a notebook shows each.

        Args:
            rows: which, in the order of the split.
            split: of the data set.

        Raises:
            RunError: not fitted yet.
            DataError: no such split, or no such study in it.
        """
        self._need_fit()
        count = len(self.studies.splits.get(split, ()))
        self.studies.require(split)
        if wrong := [row for row in rows if not 0 <= row < count]:
            raise DataError(f"split {split!r} has {count} studies, 0 to {count - 1}; found {wrong[0]}")
        images, train = self.images(split).still(list(rows)), self.images("train").still()
        found = self._predict_all(self.task.predict, images, "cards", progress=False)
        # One by one, since of cards of one page only the first has the image of a context study.
        alone = (self.task.cards(images.still([i]), [prediction], train, {0}) for i, prediction in enumerate(found))
        return [card for cards in alone for card in cards]

    def save(self, folder: str | Path, *, complete: bool = False) -> Path:
        """Writes what `load` needs. Frozen public weights stay named by hash unless `complete`.

        Raises:
            RunError: not fitted yet, or the folder holds something else.
        """
        self._need_fit()
        folder = Path(folder)
        if folder.exists() and any(folder.iterdir()):
            disk.settle(folder)
            _check_run_folder(folder)
        spec, references = self.spec, self.task.references()
        with disk.replacing_together(folder) as staged:
            if complete:
                spec = Spec.read(spec, self.task.copy_public(staged))
                references = {}
            self.task.save_files(staged)
            _write_json(staged / "references.json", references)
            mark = self._studies.reader.mark if self._studies is not None else _names_of(self.folder)
            _write_json(staged / "environment.json", environment() | ({"names": mark} if mark else {}))
            disk.write(staged / "spec.yaml", spec.to_yaml())
            for name in ("facts.json", "scores.json"):
                if (self.folder / name).is_file() and self.folder.resolve() != folder.resolve():
                    shutil.copyfile(self.folder / name, staged / name)
            save_trained(self.task, staged / "model.safetensors")
        return folder

    def export(
        self, folder: str | Path, format: Literal["timm", "transformers", "medxray"] | None = None
    ) -> Path:
        """Writes what was fitted as other libraries read it, for images of `data.image_size`.

        Of reports transformers gets the language model, with low-rank updates merged, and the encoder, each where it has
        that architecture, in folders that `AutoModelForCausalLM.from_pretrained` and `AutoModel.from_pretrained` read.

        Args:
            folder: gets it.
            format: timm and transformers take an encoder; medxray is `save` with everything that is needed in it. None is
                transformers for reports, medxray where that has place for no part of them, and timm for other tasks.

        Raises:
            RunError: not fitted yet.
            WeightsError: the format has no place for the model, or for a setting of it.
        """
        self._need_fit()
        folder = Path(folder)
        if format != "medxray":
            with disk.replacing_together(folder) as staged:
                written = self.task.export(staged, format)
                if written and (folder / "spec.yaml").exists():
                    raise WeightsError(f"{folder} is a run folder, whose files would be mixed up; name another")
            if written:
                return folder
        return self.save(folder, complete=True)

    def card(self, path: str | Path | None = None, *, license: str = "unknown") -> Path:
        """Writes a model card of the run folder: its parts, data, recipe, scores, floors, subgroups, use and limits.

        Args:
            path: gets it, as a page where it ends in .html, else in Markdown; README.md of the run folder if None.
            license: of the weights, as the Hugging Face hub calls it.

        Raises:
            RunError: nothing was fitted here, or the file cannot be written.
        """
        return write_card(self.folder, path, license=license)

    def facts(self) -> dict[str, str]:
        """What a reader of a run wants to know beside its scores."""
        count = sum(p.numel() for p in self.task.parameters())
        trained = sum(p.numel() for p in self.task.parameters() if p.requires_grad)
        versions = environment()
        return {
            "parameters": f"{count:,}",
            "trained parameters": f"{trained:,}",
            "studies": ", ".join(f"{name} {len(rows):,}" for name, rows in self.studies.splits.items() if len(rows)),
            "left out": f"{len(self.studies.skipped)} unreadable or empty",
            "python": versions["python"],
            **{name: versions["packages"][name] for name in ("medxray", "torch", "transformers")},
        }

    def _prepare(self) -> None:
        """Tells the task what only data can tell, and gives it the weights that the spec begins with."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.spec.seed)
            self.task.prepare(self.studies)
        if self.spec.weights is not None:
            self.task.begin_with(self.spec.weights)

    def _samples(self, studies: Sequence[Any]) -> list[Sample]:
        decode = self.decoder()
        return [value if isinstance(value, Sample) else decode(value) for value in studies]

    def _pictured(self, images: StudyImages) -> list[int]:
        """The validation studies that a fit draws, the same all along; none for a task that draws nothing."""
        if type(self.task).pictures is Task.pictures:
            return []
        judged = min(len(images), self.spec.training.validation_studies or len(images))
        return _spread(judged, self.spec.training.pictures)

    @property
    def prediction_batch(self) -> int:
        """Studies that the model predicts at once."""
        generation = self.spec.generation
        return generation.batch_size if generation is not None else self.spec.training.batch_size

    def _predict_all(
        self, predict: Predict, images: StudyImages, what: str, progress: bool
    ) -> list[Prediction]:
        """A prediction a study, in the order of the data set whatever the order in which, and the process by which, they are
        made."""
        own = processes.own_batches(self.task.prediction_order(images), self.prediction_batch)
        found = self._run(predict, (images.of(rows) for _, rows in own), len(own), what, progress)
        made = zip((row for _, rows in own for row in rows), found, strict=True)
        return processes.union(list(made), len(images))

    def _run(
        self,
        predict: Predict,
        batches: Iterable[Batch],
        count: int,
        what: str,
        progress: bool,
    ) -> list[Prediction]:
        self.task.eval()
        device = next(self.task.encoder.parameters()).device
        found: list[Prediction] = []
        with torch.no_grad():
            for batch in progress_bar(batches, total=count, desc=what, unit="batch", disable=not progress):
                found += predict(batch.to(device))
        return found

    def _metrics(self) -> tuple[list[Metric], list[str]]:
        """The spec's metrics that can be computed here, and what is left out."""
        names = self.spec.metrics or [METRICS.settings_of(name)(name=name) for name in self.task.metrics]
        given = {METRICS.get(name).takes for name in self.task.metrics}
        for settings in names:
            if (takes := METRICS.get(settings.name).takes) not in given:
                raise SpecError(f"metrics: {settings.name!r} judges {takes}, which {self.spec.task} does not give; leave it out")
        metrics = [METRICS.build(settings) for settings in names]
        for metric in metrics:
            if hasattr(metric, "labels"):
                metric.labels = list(self.task.labels)
        return available(metrics)

    def _need_fit(self) -> None:
        if self.fitted:
            return
        if (self.folder / "model.safetensors").is_file():
            self._check_spec()
            loaded = load(self.folder, encoder=self.given)
            self._task, self.fitted = loaded.task, True
            return
        raise RunError(f"{self.spec.name} is not fitted yet ({self.folder} holds no weights); call fit() first")

    def _check_spec(self) -> None:
        old, new = Spec.read(self.folder / "spec.yaml").to_dict(), self.spec.to_dict()
        differing = list(_differences(old, new))
        if differing:
            shown = "; ".join(f"{path}: {a!r} there, {b!r} here" for path, a, b in differing[:5])
            raise RunError(
                f"run folder {self.folder} belongs to another spec ({shown}); "
                "name another folder with output=..., or start anew with fresh"
            )

    def _finish(self) -> None:
        with self._written():
            self.task.save_files(self.folder)
            _write_json(self.folder / "references.json", self.task.references())
            # The sign that the fit has ended.
            save_trained(self.task, self.folder / "model.safetensors")

    @contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"run folder {self.folder} cannot be written: {error.strerror or error}; what was saved before is whole: free "
                "some space and give the same command again"
            ) from error

    def _begin(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            disk.write(self.folder / "spec.yaml", self.spec.to_yaml())
            mark = self.studies.reader.mark
            _write_json(self.folder / "environment.json", environment() | ({"names": mark} if mark else {}))
            _write_json(self.folder / "facts.json", counts(self.task, self.studies))
            if self.studies.skipped:
                rows = "".join(json.dumps(row) + "\n" for row in self.studies.skipped)
                disk.write(self.folder / "skipped.jsonl", rows)
        except OSError as error:
            raise RunError(
                f"run folder {self.folder} cannot be written: {error.strerror}; free some space, or name another with output=..."
            ) from error


@torch.no_grad()
def validation_loss(task: Task, images: StudyImages, batch_size: int) -> float:
    """Mean loss over all items of a split, each process its part of the batches."""
    device = next(task.encoder.parameters()).device
    made = []
    for number, rows in processes.own_batches(range(len(images)), batch_size):
        batch = images.of(rows)
        count = task.items(batch)
        made.append((number, (float(task(batch.to(device), count)) * count if count else 0.0, count)))
    total, items = 0.0, 0
    for loss, count in processes.union(made, -(-len(images) // batch_size)):
        total += loss
        items += count
    return total / max(1, items)


def environment() -> dict[str, Any]:
    """Versions and the machine, as far as they can change a number."""
    names = ("medxray", "torch", "torchvision", "transformers", "accelerate", "datasets", "timm", "numpy")
    packages = {}
    for name in names:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = "not installed"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "packages": packages,
    }


def _names_of(folder: Path) -> str | None:
    """What a run folder tells of how its patients were named; None where it tells nothing."""
    try:
        return str(json.loads((folder / "environment.json").read_text(encoding="utf-8"))["names"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Lines of a run's log; none where there is no log.

    Raises:
        RunError: it is damaged.
    """
    path = folder / "log.jsonl"
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}); restore it, or remove it: its curves are then not drawn") from error


def _is_main() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _check_run_folder(folder: Path) -> None:
    held = [path for path in folder.iterdir() if not disk.is_left(path)] if folder.is_dir() else []
    if held and not (folder / "spec.yaml").is_file():
        raise RunError(f"{folder} holds files but no spec.yaml, so it is no run folder; nothing in it was touched")


def _differences(old: Any, new: Any, path: str = "") -> Iterable[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            # None of them changes what a run computes.
            if (path, key) in (("", "output"), ("data", "workers"), ("training", "strategy")):
                continue
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
    elif old != new:
        yield path, old, new


def _spread(n: int, most: int) -> list[int]:
    """At most so many rows, evenly over n."""
    return sorted({int(i * n / min(n, most)) for i in range(min(n, most))})


def _write_json(path: Path, data: Any) -> None:
    disk.write(path, json.dumps(data, indent=1) + "\n")
