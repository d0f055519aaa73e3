"""Masked auto-encoding: predict the pixels of masked tokens from the visible ones."""

import math
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from medxray import disk
from medxray.data import StudyImages
from medxray.data.transforms import height_width
from medxray.encoders import Encoder, MaskableEncoder
from medxray.encoders.attention import class_attention
from medxray.pretrain import MASKERS, PIXEL_DECODERS, MaskerSettings, PixelDecoderSettings, SegmenterSettings, Source
from medxray.pretrain.model import MAEOutput, MaskedAutoEncoder
from medxray.pretrain.regions import Contours, report
from medxray.spec import Spec
from medxray.tasks import Task
from medxray.types import Batch, Prediction, Scores, SpecError
from medxray.visual import StudyCard, mosaic
from medxray.weights import load_decoder

_STREAM = 0x2545F4914F6CDD1D


class Pretrain(Task):
    """Every view is an image of its own; the loss is the mean over images."""

    sections: ClassVar[dict[str, dict[str, Any] | None]] = {
        "encoder": None,
        "masker": {"name": "random"},
        "segmenter": {"name": "classical"},
        "pixel_decoder": {"name": "self-attention"},
    }
    metrics = ("reconstruction",)

    def __init__(self, spec: Spec, encoder: Encoder | None = None) -> None:
        super().__init__(spec, encoder)
        if not isinstance(self.encoder, MaskableEncoder):
            raise SpecError(
                f"encoder: task pretrain needs one that can encode some of its tokens (a MaskableEncoder such as "
                f"'vit'), found {type(self.encoder).__name__}"
            )
        if self.frozen_encoder:
            raise SpecError("encoder.trainable: task pretrain trains the encoder; set it to true")
        assert isinstance(spec.masker, MaskerSettings) and isinstance(spec.pixel_decoder, PixelDecoderSettings)
        decoder, self.repeats, self._progress = spec.pixel_decoder, spec.masker.repeats, 1.0
        self.model = MaskedAutoEncoder(
            self.encoder,
            MASKERS.build(spec.masker),
            PIXEL_DECODERS.build(decoder, self.encoder),
            self.encoder.channels,
            normalize_patches=decoder.normalize_patches,
            variance_floor=decoder.variance_floor,
            predicted=decoder.predicted,
            chest_weight=decoder.chest_weight,
        )
        if decoder.weights is not None:
            load_decoder(self.model.decoder, decoder.weights)
        self._sources: dict[str, Source] = {}
        self._reasons: dict[str, str] = {}
        if self.model.masker.regional or decoder.chest_weight != 1:
            assert isinstance(spec.segmenter, SegmenterSettings)
            self.segment, self.grid = Contours(spec.segmenter), self.encoder.grid(*height_width(spec.data.image_size))

    @property
    def learner(self) -> MaskedAutoEncoder:
        return self.model

    def learner_says(self, output: MAEOutput) -> dict[str, str]:
        N, visible = output.masking.mask.shape[1], output.masking.keep.shape[1]
        return {"tokens seen and predicted": f"{visible:,} visible, {output.targets.shape[1]:,} predicted of {N:,}"}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        # The encoder is held twice; it is saved once, under `encoder.`.
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        return {key: value for key, value in state.items() if not key.startswith("model.encoder.")}

    def complete(self, images: StudyImages, *, progress: bool = False) -> None:
        if isinstance(self.segment, Contours):
            regions = self.segment.of(images, workers=self.spec.data.workers, progress=progress)
            images.regions, images.grid = regions, self.grid
            self._sources |= regions.sources
            self._reasons |= regions.reasons

    def save_files(self, folder: Path) -> None:
        super().save_files(folder)
        if self._sources:
            disk.write(folder / "regions.txt", report(self._sources, self._reasons) + "\n")

    def before_step(self, step: int, steps_per_epoch: int) -> None:
        training = self.spec.training
        self._progress = step / (training.steps or math.ceil((training.epochs or 1) * steps_per_epoch))

    def _losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss of each view that exists (n,), a mean over its masks, and the study that it is of (n,)."""
        study, view = batch.view_mask.nonzero(as_tuple=True)
        images, seeds = batch.pixels[study, view], batch.seeds[study] + view
        regions = batch.regions[study, view] if batch.regions is not None else None
        repeats, self.model.masker.progress = (self.repeats, self._progress) if self.training else (1, 1.0)
        if repeats > 1:
            images = images.repeat_interleave(repeats, 0)
            regions = regions.repeat_interleave(repeats, 0) if regions is not None else None
            # The first mask of each image is that of a single one; the others are other streams.
            streams = torch.arange(repeats, device=seeds.device) * _STREAM
            seeds = (seeds[:, None] ^ streams).flatten()
        losses: Tensor = self.model(images, regions, generator=seeds).loss
        return losses.view(-1, repeats).mean(1), study

    def items(self, batch: Batch) -> int:
        return int(batch.view_mask.sum())

    def forward(self, batch: Batch, items: Tensor | int | None = None) -> Tensor:
        losses, _ = self._losses(batch)
        return losses.sum() / (items if items is not None else max(1, len(losses)))

    def predict(self, batch: Batch) -> list[Prediction]:
        losses, study = self._losses(batch)
        losses = losses.float()
        sums = torch.zeros(len(batch), device=losses.device).index_add_(0, study, losses)
        means = (sums / batch.view_mask.sum(1)).tolist()
        return [
            Prediction(name, scores={"reconstruction": value})
            for name, value in zip(batch.study_ids, means, strict=True)
        ]

    def targets(self, images: StudyImages) -> list[float]:
        return [0.0] * len(images)

    def outputs(self, predictions: Sequence[Prediction]) -> list[float]:
        return [prediction.scores["reconstruction"] for prediction in predictions]

    def notes(self, predictions: Sequence[Prediction], scores: Scores) -> list[str]:
        return report(self._sources, self._reasons).splitlines()[:1] if self._sources else []

    @torch.no_grad()
    def cards(
        self, images: StudyImages, predictions: Sequence[Prediction], train: StudyImages | None, explained: Collection[int]
    ) -> Iterator[StudyCard]:
        self.eval()
        device = next(self.parameters()).device
        for i, prediction in enumerate(predictions):
            card = StudyCard(prediction.study_id, [images.picture(i, 0)], ["image"])
            if i in explained:
                batch = images.collate([images[i]]).to(device)
                pixels, regions = batch.pixels[0, :1], batch.regions[0, :1] if batch.regions is not None else None
                output = self.model(pixels, regions, generator=batch.seeds[:1])
                pasted = self.model.paste(pixels, output)
                patches = self.model.patchify(torch.ones_like(pixels)) * (1 - output.masking.mask[..., None])
                visible = self.model.unpatchify(patches, (pixels.shape[-2], pixels.shape[-1]))
                error = (pasted - pixels).abs()
                shown = [pixels, pixels * visible - (1 - visible), pasted, error - 1]
                card.images = [(x[0].mean(0).float().cpu() * 0.5 + 0.5).clamp(0, 1).numpy() for x in shown]
                card.captions = ["image", "visible tokens", "reconstruction", "error"]
            yield card

    @torch.no_grad()
    def pictures(self, batch: Batch, folder: Path, name: str) -> list[Path]:
        """One mosaic, a row for each study's first view: what is seen and predicted, and what the encoder makes of the
        whole image."""
        encoder: Any = self.encoder
        self.model.masker.progress = 1.0
        grid = encoder.grid(batch.pixels.shape[-2], batch.pixels.shape[-1])
        seen, error_maps, looks, tokens, losses = [], [], [], [], []
        for i in range(len(batch)):
            pixels, regions = batch.pixels[i, :1], batch.regions[i, :1] if batch.regions is not None else None
            output = self.model(pixels, regions, generator=batch.seeds[i : i + 1])
            image, pasted = (self._gray(x) for x in (pixels, self.model.paste(pixels, output)))
            error_maps.append(np.abs(pasted - image))
            looked, attention = class_attention(encoder, pixels)
            tokens.append(looked.float().cpu())
            looks.append(None if attention is None else attention[0].float().view(grid).cpu().numpy())
            losses.append(float(output.loss))
            mask = output.masking.mask[0].view(grid).cpu().numpy()
            shown = mosaic.fitted(image)
            outline = None if regions is None else mosaic.outlined(shown, regions[0].float().cpu().numpy())
            seen.append((shown, outline, mosaic.fitted(mosaic.hidden(image, mask)), mosaic.fitted(pasted)))
        limit = mosaic.limit_of(error_maps)
        components = mosaic.principal_colours(torch.cat(tokens), grid)
        rows = []
        for i, (shown, *others) in enumerate(seen):
            errors = mosaic.colours(mosaic.fitted(error_maps[i] / limit))
            look = looks[i]
            heat = None if look is None else mosaic.heated(shown, look / look.max())
            parts = mosaic.blocks(components[i], shown.shape[:2])
            rows.append(mosaic.Row(batch.study_ids[i], [shown, *others, errors, heat, parts], f"loss {losses[i]:.3f}"))
        columns = ["image", "contour", "visible", "reconstruction", "error", "attention", "components"]
        notes = ["error: of gray values from 0 to 1. components: the first three of the patch tokens as red, green, blue"]
        if looks[0] is None:
            notes.append(f"attention: encoder {type(encoder).__name__} has none")
        else:
            notes.append("attention: of the class token in the last block, a mean over heads")
        if self.model.normalize_patches:
            notes.append("reconstruction: patches are predicted normalised and shown with their own mean and contrast")
        kept = [c for c in range(len(columns)) if any(row.cells[c] is not None for row in rows)]
        for row in rows:
            row.cells = [row.cells[c] for c in kept]
        columns = [columns[c] for c in kept]
        ends = {"error": f"{limit:g}", "attention": "each row's largest"}
        scales = [mosaic.Scale(columns.index(column), "0", end) for column, end in ends.items() if column in columns]
        return [mosaic.save(mosaic.mosaic(rows, columns, name, scales, notes), folder / f"{name}.png")]

    def _gray(self, pixels: Tensor) -> mosaic.Picture:
        """A normalised image (1, C, H, W) as a picture (H, W)."""
        mean, std = (pixels.new_tensor(x).view(1, -1, 1, 1) for x in (self.encoder.mean, self.encoder.std))
        picture: mosaic.Picture = (pixels * std + mean)[0].mean(0).float().clamp(0, 1).cpu().numpy()
        return picture
