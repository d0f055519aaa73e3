"""The masked auto-encoder: a maskable encoder, a masker and a pixel decoder."""

from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from medxray.encoders import MaskableEncoder
from medxray.layers import chosen
from medxray.pretrain import Masker, Masking, PixelDecoder
from medxray.pretrain.maskers import uniform_noise


class MAEOutput(NamedTuple):
    """What one pass gives.

    Attributes:
        loss: (B,) mean squared error over each image's masked patches among the targets, by their weights.
        prediction: (B, T, patch * patch * C).
        targets: (B, T) int64, positions of the patches that were predicted.
        masking: which tokens were visible.
        latent: (B, 1 + n, D), the encoder's output for the class token and the tokens that it saw.
    """

    loss: Tensor
    prediction: Tensor
    targets: Tensor
    masking: Masking
    latent: Tensor


class MaskedAutoEncoder(nn.Module):
    """He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022; with the rectangle masker and the
    HD stem it is the HD X-ray MAE (arXiv:2404.17926).

    Args:
        encoder: sees the visible tokens only.
        masker: chooses them.
        decoder: predicts patches.
        channels: C.
        normalize_patches: targets are (t - mean) / sqrt(unbiased variance + variance_floor) of each patch.
        variance_floor: of pixels as they are normalised.
        predicted: share of all tokens that is predicted while training, chosen among the masked ones at random; None,
            like evaluation, predicts every masked one.
        chest_weight: what the error of a patch of the chest counts beside that of another.
    """

    def __init__(
        self,
        encoder: MaskableEncoder,
        masker: Masker,
        decoder: PixelDecoder,
        channels: int,
        normalize_patches: bool = False,
        variance_floor: float = 1e-6,
        predicted: float | None = None,
        chest_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.masker = masker
        self.decoder = decoder
        self.channels = channels
        self.patch = encoder.stride
        self.normalize_patches, self.variance_floor, self.predicted = normalize_patches, variance_floor, predicted
        self.chest_weight = chest_weight

    def forward(
        self, images: Tensor, regions: Tensor | None = None, generator: Generator | Tensor | None = None
    ) -> MAEOutput:
        """images (B, C, H, W), regions (B, h, w) or None, generator or (B,) seeds -> MAEOutput.

        Without a generator the seeds are drawn from torch's global one.
        """
        B, _, H, W = images.shape
        if generator is None:
            generator = torch.randint(2**63 - 1, (B,), device=images.device)
        grid = self.encoder.grid(H, W)
        masking = self.masker(regions, B, grid, generator)
        targets = self._targets(masking, generator)
        # A torch generator may live on another device than the images.
        masking = Masking(*(part.to(images.device) for part in masking))
        return self.reconstruct(images, masking, targets.to(images.device), regions)

    def _targets(self, masking: Masking, generator: Generator | Tensor) -> Tensor:
        """(B, T) masked tokens in their order, chosen by noise of their own where not all are taken."""
        (B, N), visible = masking.mask.shape, masking.keep.shape[1]
        every = masking.restore.argsort(1)[:, visible:]
        if self.predicted is None or not self.training:
            return every.sort(1).values
        count = min(N - visible, max(1, round(self.predicted * N)))
        if isinstance(generator, Tensor):
            # Another stream than the mask's.
            generator = generator ^ 0x5DEECE66D
        noise = uniform_noise(generator, B, N - visible)
        return every.gather(1, noise.argsort(dim=1, stable=True)[:, :count]).sort(1).values

    def reconstruct(
        self, images: Tensor, masking: Masking, targets: Tensor | None = None, regions: Tensor | None = None
    ) -> MAEOutput:
        """The pass with a masking that is known already.

        Args:
            images: (B, C, H, W).
            masking: which tokens are visible.
            targets: (B, T), positions to predict; None predicts all N, row by row.
            regions: (B, h, w) coverage of each token by the chest, for its weight in the loss.
        """
        grid = self.encoder.grid(images.shape[2], images.shape[3])
        if targets is None:
            targets = torch.arange(masking.mask.shape[1], device=images.device).expand(len(images), -1)
        patches, seen, blank = self.patchify(images), images, self.decoder.mask_patch
        if self.encoder.overlapping or blank is not None:
            masked = masking.mask[..., None].to(images.dtype)
            pixels = patches * (1 - masked) + (masked * blank.to(images.dtype) if blank is not None else 0)
            seen = self.unpatchify(pixels, (images.shape[2], images.shape[3]))
        keep = masking.keep if blank is None else None
        tokens = self.encoder.embed(seen) if keep is None else self.encoder.embed_visible(seen, keep)
        encode = self.encoder.encode_layers if self.decoder.every_layer else self._encode_last
        layers = encode(tokens, grid, keep)
        prediction = self.decoder(layers, masking, grid, targets)
        wanted = chosen(patches, targets)
        if self.normalize_patches:
            mean, deviation = self._statistics(wanted)
            wanted = (wanted - mean) / deviation
        errors = (prediction.float() - wanted.float()).square().mean(-1)
        weight = masking.mask.gather(1, targets)
        if regions is not None and self.chest_weight != 1:
            weight = weight * (1 + (self.chest_weight - 1) * regions.flatten(1).gather(1, targets))
        loss = (errors * weight).sum(1) / weight.sum(1).clamp(min=1e-6)
        return MAEOutput(loss, prediction, targets, masking, layers[-1])

    def _encode_last(self, tokens: Tensor, grid: tuple[int, int], keep: Tensor | None) -> list[Tensor]:
        return [self.encoder.encode(tokens, grid, keep)]

    def patchify(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) -> (B, N, patch * patch * C), row by row, channels last within a patch."""
        B, C, H, W = images.shape
        h, w, p = H // self.patch, W // self.patch, self.patch
        return images.view(B, C, h, p, w, p).permute(0, 2, 4, 3, 5, 1).reshape(B, h * w, p * p * C)

    def unpatchify(self, patches: Tensor, size: tuple[int, int]) -> Tensor:
        """The inverse of `patchify`: (B, N, patch * patch * C) -> (B, C, H, W)."""
        h, w, p, C = size[0] // self.patch, size[1] // self.patch, self.patch, self.channels
        return patches.view(-1, h, w, p, p, C).permute(0, 5, 1, 3, 2, 4).reshape(-1, C, h * p, w * p)

    def paste(self, images: Tensor, output: MAEOutput) -> Tensor:
        """The image with its masked patches as they were predicted: (B, C, H, W); others stay as they are."""
        patches, prediction = self.patchify(images), output.prediction.to(images.dtype)
        places = output.targets[..., None].expand(-1, -1, patches.shape[2])
        own = patches.gather(1, places)
        if self.normalize_patches:
            mean, deviation = self._statistics(own)
            prediction = prediction * deviation + mean
        masked = output.masking.mask.gather(1, output.targets)[..., None] > 0
        pasted = patches.scatter(1, places, torch.where(masked, prediction, own))
        return self.unpatchify(pasted, (images.shape[2], images.shape[3]))

    def _statistics(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of each patch, (B, T, 1) both."""
        return patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + self.variance_floor).sqrt()
