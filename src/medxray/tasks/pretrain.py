"""Masked auto-encoding: predict the pixels of masked tokens from the visible ones."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from medxray.data import StudyImages
from medxray.encoders import Encoder, MaskableEncoder
from medxray.pretrain import MASKERS, PIXEL_DECODERS, PixelDecoderSettings
from medxray.pretrain.model import MaskedAutoEncoder
from medxray.spec import Spec
from medxray.tasks import Task
from medxray.types import Batch, Prediction, SpecError
from medxray.visual import StudyCard


class Pretrain(Task):
    """Every view is an image of its own; the loss is the mean over images."""

    sections: ClassVar[dict[str, dict[str, Any] | None]] = {
        "encoder": None,
        "masker": {"name": "random"},
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
        assert spec.masker is not None and isinstance(spec.pixel_decoder, PixelDecoderSettings)
        decoder = spec.pixel_decoder
        self.model = MaskedAutoEncoder(
            self.encoder,
            MASKERS.build(spec.masker),
            PIXEL_DECODERS.build(decoder, self.encoder),
            self.encoder.channels,
            normalize_patches=decoder.normalize_patches,
            variance_floor=decoder.variance_floor,
            predicted=decoder.predicted,
        )

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        # The encoder is held twice; it is saved once, under `encoder.`.
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        return {key: value for key, value in state.items() if not key.startswith("model.encoder.")}

    def images_of(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The views that exist as images (n, C, H, W), and the study that each is of (n,)."""
        study, view = batch.view_mask.nonzero(as_tuple=True)
        return batch.pixels[study, view], study

    def seeds_of(self, batch: Batch) -> Tensor:
        """One seed an image (n,)."""
        study, view = batch.view_mask.nonzero(as_tuple=True)
        return batch.seeds[study] + view

    def items(self, batch: Batch) -> int:
        return int(batch.view_mask.sum())

    def forward(self, batch: Batch, items: Tensor | int | None = None) -> Tensor:
        images, _ = self.images_of(batch)
        losses: Tensor = self.model(images, generator=self.seeds_of(batch)).loss
        return losses.sum() / (items if items is not None else max(1, len(losses)))

    def predict(self, batch: Batch) -> list[Prediction]:
        images, study = self.images_of(batch)
        losses = self.model(images, generator=self.seeds_of(batch)).loss.float()
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

    @torch.no_grad()
    def cards(
        self, images: StudyImages, predictions: Sequence[Prediction], train: StudyImages | None
    ) -> list[StudyCard]:
        cards = []
        self.eval()
        device = next(self.parameters()).device
        for i, prediction in enumerate(predictions):
            batch = images.collate([images[i]]).to(device)
            pixels = batch.pixels[0, :1]
            output = self.model(pixels, generator=batch.seeds[:1])
            pasted = self.model.paste(pixels, output)
            patches = self.model.patchify(torch.ones_like(pixels)) * (1 - output.masking.mask[..., None])
            visible = self.model.unpatchify(patches, (pixels.shape[-2], pixels.shape[-1]))
            error = (pasted - pixels).abs()
            shown = [pixels, pixels * visible - (1 - visible), pasted, error - 1]
            cards.append(
                StudyCard(
                    study_id=prediction.study_id,
                    images=[(x[0].mean(0).float().cpu() * 0.5 + 0.5).clamp(0, 1).numpy() for x in shown],
                    captions=["image", "visible tokens", "reconstruction", "error"],
                    scores=prediction.scores,
                )
            )
        return cards
