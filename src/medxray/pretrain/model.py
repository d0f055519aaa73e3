"""The masked auto-encoder: a maskable encoder, a masker and a pixel decoder."""

from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from medxray.encoders import MaskableEncoder
from medxray.pretrain import Masker, Masking, PixelDecoder


class MAEOutput(NamedTuple):
    """What one pass gives.

    Attributes:
        loss: (B,) mean squared error over each image's masked patches.
        prediction: (B, N, patch * patch * C).
        masking: which tokens were visible.
        latent: (B, 1 + n, D), the encoder's output for the class token and the visible tokens.
    """

    loss: Tensor
    prediction: Tensor
    masking: Masking
    latent: Tensor


class MaskedAutoEncoder(nn.Module):
    """He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022; with the rectangle masker and the
    HD stem it is the HD X-ray MAE (arXiv:2404.17926).

    Args:
        encoder: sees the visible tokens only.
        masker: chooses them.
        decoder: predicts every patch.
        channels: C.
        normalize_patches: targets are (t - mean) / sqrt(unbiased variance + 1e-6) of each patch.
    """

    def __init__(
        self,
        encoder: MaskableEncoder,
        masker: Masker,
        decoder: PixelDecoder,
        channels: int,
        normalize_patches: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.masker = masker
        self.decoder = decoder
        self.channels = channels
        self.patch = encoder.stride
        self.normalize_patches = normalize_patches

    def forward(
        self, images: Tensor, regions: Tensor | None = None, generator: Generator | Tensor | None = None
    ) -> MAEOutput:
        """images (B, C, H, W), regions (B, h, w) or None, generator or (B,) seeds -> MAEOutput.

        Without a generator the seeds are drawn from torch's global one.
        """
        B, _, H, W = images.shape
        if generator is None:
            generator = torch.randint(2**63 - 1, (B,), device=images.device)
        masking = self.masker(regions, B, self.encoder.grid(H, W), generator)
        # A torch generator may live on another device than the images.
        return self.reconstruct(images, Masking(*(part.to(images.device) for part in masking)))

    def reconstruct(self, images: Tensor, masking: Masking) -> MAEOutput:
        """The pass with a masking that is known already."""
        grid = self.encoder.grid(images.shape[2], images.shape[3])
        seen = images
        if self.encoder.overlapping:
            pixels = self.patchify(images) * (1 - masking.mask[..., None]).to(images.dtype)
            seen = self.unpatchify(pixels, (images.shape[2], images.shape[3]))
        tokens = self.encoder.embed(seen)
        keep = masking.keep[..., None].expand(-1, -1, tokens.shape[2])
        latent = self.encoder.encode(tokens.gather(1, keep), grid, masking.keep)
        prediction = self.decoder(latent, masking.restore, grid)
        targets = self.patchify(images)
        if self.normalize_patches:
            mean, deviation = _statistics(targets)
            targets = (targets - mean) / deviation
        errors = (prediction.float() - targets.float()).square().mean(-1)
        loss = (errors * masking.mask).sum(1) / masking.mask.sum(1).clamp(min=1)
        return MAEOutput(loss, prediction, masking, latent)

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
        """The reconstruction with the visible patches as they are: (B, C, H, W)."""
        targets, prediction = self.patchify(images), output.prediction.to(images.dtype)
        if self.normalize_patches:
            mean, deviation = _statistics(targets)
            prediction = prediction * deviation + mean
        mask = output.masking.mask[..., None].to(images.dtype)
        return self.unpatchify(torch.where(mask > 0, prediction, targets), (images.shape[2], images.shape[3]))


def _statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each patch, (B, N, 1) both."""
    return patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + 1e-6).sqrt()
