"""The masked auto-encoder around any part: loss, patches, pasting, seeds, learning."""

import pytest
import torch

from medxray.encoders.vit import ViT
from medxray.pretrain.decoders import SelfAttentionDecoder
from medxray.pretrain.maskers import RandomMasker, RectangleMasker
from medxray.pretrain.model import MaskedAutoEncoder
from medxray.types import SpecError


def model(channels: int = 1, normalize: bool = False, ratio: float = 0.75) -> MaskedAutoEncoder:
    torch.manual_seed(0)
    encoder = ViT(width=32, depth=2, heads=2, patch=8, channels=channels)
    decoder = SelfAttentionDecoder(32, 64 * channels, dim=16, depth=1, heads=2)
    return MaskedAutoEncoder(encoder, RandomMasker(ratio), decoder, channels, normalize)


@pytest.mark.parametrize("channels", [1, 3])
def test_patches_are_undone(channels: int) -> None:
    images = torch.arange(2 * channels * 24 * 40.0).view(2, channels, 24, 40)
    mae = model(channels)
    patches = mae.patchify(images)
    assert patches.shape == (2, 15, 64 * channels)
    # The second patch is the first row's second; its pixels run row by row with the channels innermost.
    assert torch.equal(patches[0, 1], images[0, :, :8, 8:16].permute(1, 2, 0).flatten())
    assert torch.equal(mae.unpatchify(patches, (24, 40)), images)


@pytest.mark.parametrize("normalize", [False, True])
def test_loss_is_the_mean_over_masked_patches_of_each_image(normalize: bool) -> None:
    mae = model(normalize=normalize)
    images = torch.randn(3, 1, 32, 48, generator=torch.Generator().manual_seed(1))
    output = mae(images, generator=torch.arange(3))
    assert output.loss.shape == (3,) and output.prediction.shape == (3, 24, 64)
    assert output.latent.shape == (3, 1 + 6, 32)
    for i in range(3):
        target = mae.patchify(images)[i]
        if normalize:
            target = (target - target.mean(1, keepdim=True)) / (target.var(1, keepdim=True) + 1e-6).sqrt()
        masked = output.masking.mask[i].bool()
        expected = ((output.prediction[i] - target)[masked] ** 2).mean()
        torch.testing.assert_close(output.loss[i], expected)


def test_masked_pixels_cannot_leak() -> None:
    mae = model()
    images = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(2))
    first = mae(images, generator=torch.arange(2))
    hidden = mae.unpatchify(first.masking.mask[..., None].expand(-1, -1, 64), (32, 32))
    second = mae(images + hidden, generator=torch.arange(2))
    assert torch.equal(first.prediction, second.prediction)
    assert not torch.equal(first.loss, second.loss)


@pytest.mark.parametrize("normalize", [False, True])
def test_paste_keeps_visible_pixels_and_undoes_the_normalisation(normalize: bool) -> None:
    mae = model(normalize=normalize)
    images = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(3)) * 3 + 1
    output = mae(images, generator=torch.arange(2))
    target = mae.patchify(images)
    perfect = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    pasted = mae.paste(images, output._replace(prediction=perfect if normalize else target))
    torch.testing.assert_close(pasted, images, rtol=1e-5, atol=1e-5)
    pasted = mae.paste(images, output)
    visible = mae.unpatchify(1 - output.masking.mask[..., None].expand(-1, -1, 64), (32, 32)).bool()
    assert torch.equal(pasted[visible], images[visible])
    assert not torch.allclose(pasted[~visible], images[~visible])


def test_an_image_does_not_depend_on_its_neighbours() -> None:
    mae = model().eval()
    images = torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(4))
    together = mae(images, generator=torch.tensor([7, 8, 9]))
    alone = mae(images[1:2], generator=torch.tensor([8]))
    torch.testing.assert_close(together.loss[1:2], alone.loss)


def test_without_a_generator_the_global_seed_decides() -> None:
    mae = model()
    images = torch.randn(2, 1, 32, 32)
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        masks.append(mae(images).masking.mask)
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


def test_everything_learns() -> None:
    """A dark and a bright image are told apart from a quarter of their tokens."""
    mae = model()
    mae.masker = RectangleMasker(0.8, 0.6)
    images = torch.tensor([-1.0, 1.0])[:, None, None, None].expand(-1, 1, 32, 32)
    optimiser = torch.optim.AdamW(mae.parameters(), lr=1e-2)
    losses = []
    for step in range(30):
        loss = mae(images, generator=torch.tensor([step, step + 1000])).loss.mean()
        optimiser.zero_grad()
        loss.backward()
        if step == 0:
            assert not [name for name, p in mae.named_parameters() if p.grad is None or not p.grad.any()]
        optimiser.step()
        losses.append(loss.item())
    assert max(losses[-5:]) < 0.1 * losses[0]


def test_an_image_that_patches_do_not_fill_is_refused() -> None:
    with pytest.raises(SpecError, match=r"30 x 32 is not a multiple of encoder.patch 8"):
        model()(torch.zeros(1, 1, 30, 32))
