"""The masked auto-encoder around any part: loss, patches, pasting, seeds, learning."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from medxray.encoders import ENCODERS
from medxray.encoders.vit import ViT
from medxray.layers import sincos_positions
from medxray.pretrain import PIXEL_DECODERS
from medxray.pretrain.decoders import CrossAttentionDecoder, LinearDecoder, SelfAttentionDecoder
from medxray.pretrain.maskers import RandomMasker, RectangleMasker
from medxray.pretrain.model import MaskedAutoEncoder
from medxray.training import checkpoint_activations
from medxray.types import SpecError

DECODERS = {"self": SelfAttentionDecoder, "cross": CrossAttentionDecoder, "linear": LinearDecoder}


def model(
    channels: int = 1, normalize: bool = False, ratio: float = 0.75, decoder: str = "self", predicted: float | None = None
) -> MaskedAutoEncoder:
    torch.manual_seed(0)
    encoder = ViT(width=32, depth=2, heads=2, patch=8, channels=channels)
    made = LinearDecoder(encoder) if decoder == "linear" else DECODERS[decoder](encoder, dim=16, depth=1, heads=2)
    return MaskedAutoEncoder(encoder, RandomMasker(ratio), made, channels, normalize, predicted=predicted)


def images_like(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("channels", [1, 3])
def test_patches_are_undone(channels: int) -> None:
    images = torch.arange(2 * channels * 24 * 40.0).view(2, channels, 24, 40)
    mae = model(channels)
    patches = mae.patchify(images)
    assert patches.shape == (2, 15, 64 * channels)
    # The second patch is the first row's second; its pixels run row by row with the channels innermost.
    assert torch.equal(patches[0, 1], images[0, :, :8, 8:16].permute(1, 2, 0).flatten())
    assert torch.equal(mae.unpatchify(patches, (24, 40)), images)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("normalize", [False, True])
def test_loss_is_the_mean_over_masked_patches_of_each_image(normalize: bool, decoder: str) -> None:
    mae = model(normalize=normalize, decoder=decoder)
    images = images_like(3, 1, 32, 48)
    output = mae(images, generator=torch.arange(3))
    assert output.loss.shape == (3,) and output.prediction.shape == (3, 18, 64)
    assert output.latent.shape == (3, 1 + (24 if decoder == "linear" else 6), 32)
    for i in range(3):
        assert torch.equal(output.targets[i], output.masking.mask[i].nonzero()[:, 0])
        target = mae.patchify(images)[i, output.targets[i]]
        if normalize:
            target = (target - target.mean(1, keepdim=True)) / (target.var(1, keepdim=True) + 1e-6).sqrt()
        torch.testing.assert_close(output.loss[i], ((output.prediction[i] - target) ** 2).mean())
    # Every patch may be asked for; those that are visible do not count.
    whole = mae.reconstruct(images, output.masking)
    assert whole.prediction.shape == (3, 24, 64)
    torch.testing.assert_close(whole.loss, output.loss)


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_share_of_the_masked_patches(decoder: str) -> None:
    """While training, a chosen few; the prediction of each does not hang on which others are asked for."""
    mae = model(decoder=decoder, predicted=0.25)
    images, seeds = images_like(3, 1, 32, 48), torch.tensor([5, 6, 7])
    few = mae.train()(images, generator=seeds)
    assert few.prediction.shape == (3, 6, 64)
    assert (few.masking.mask.gather(1, few.targets) == 1).all()
    assert all(len(row.unique()) == 6 for row in few.targets) and not torch.equal(few.targets[0], few.targets[1])
    alone = mae(images[1:2], generator=seeds[1:2])
    assert torch.equal(alone.targets, few.targets[1:2])
    every = mae.reconstruct(images, few.masking)
    expected = every.prediction.gather(1, few.targets[..., None].expand(-1, -1, 64))
    torch.testing.assert_close(few.prediction, expected, rtol=1e-4, atol=1e-5)
    assert mae.eval()(images, generator=seeds).prediction.shape == (3, 18, 64)
    # Over many images each masked patch is chosen as often as any other.
    many = mae.train()(torch.zeros(2000, 1, 32, 48), generator=torch.arange(2000))
    chosen = torch.zeros_like(many.masking.mask).scatter(1, many.targets, 1.0)
    assert ((chosen.sum(0) / many.masking.mask.sum(0)) - 1 / 3).abs().max() < 0.05
    # No more than there are.
    full = model(decoder=decoder, predicted=1.0).train()
    assert full(images, generator=seeds).prediction.shape == (3, 18, 64)


@pytest.mark.parametrize("decoder", DECODERS)
def test_masked_pixels_cannot_leak(decoder: str) -> None:
    mae = model(decoder=decoder)
    images = images_like(2, 1, 32, 32, seed=2)
    first = mae(images, generator=torch.arange(2))
    hidden = mae.unpatchify(first.masking.mask[..., None].expand(-1, -1, 64), (32, 32))
    second = mae(images + hidden, generator=torch.arange(2))
    assert torch.equal(first.prediction, second.prediction)
    assert not torch.equal(first.loss, second.loss)


@pytest.mark.parametrize("normalize", [False, True])
def test_paste_keeps_visible_pixels_and_undoes_the_normalisation(normalize: bool) -> None:
    mae = model(normalize=normalize)
    images = images_like(2, 1, 32, 32, seed=3) * 3 + 1
    output = mae(images, generator=torch.arange(2))
    target = mae.patchify(images).gather(1, output.targets[..., None].expand(-1, -1, 64))
    perfect = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    pasted = mae.paste(images, output._replace(prediction=perfect if normalize else target))
    torch.testing.assert_close(pasted, images, rtol=1e-5, atol=1e-5)
    whole = mae.paste(images, mae.reconstruct(images, output.masking))
    pasted = mae.paste(images, output)
    torch.testing.assert_close(pasted, whole, rtol=1e-5, atol=1e-5)
    visible = mae.unpatchify(1 - output.masking.mask[..., None].expand(-1, -1, 64), (32, 32)).bool()
    assert torch.equal(pasted[visible], images[visible])
    assert not torch.allclose(pasted[~visible], images[~visible])


def test_a_floor_under_the_variance_quietens_black_borders() -> None:
    mae = model(normalize=True)
    images = images_like(1, 1, 32, 32)
    images[..., :16] = -1 + 1e-3 * images[..., :16]
    patches = mae.patchify(images)[0]
    for floor, loud in ((1e-6, True), (1e-2, False)):
        mae.variance_floor = floor
        mean, deviation = mae._statistics(patches)
        size = ((patches - mean) / deviation).square().mean(1).view(4, 4)
        assert (size[:, 2:] > 0.9).all() and (size[:, :2].mean() > 0.4) == loud


def test_cross_attention_is_what_it_says() -> None:
    """Each block: queries over a mix of every layer, written out."""
    torch.manual_seed(0)
    encoder = ViT(width=16, depth=3, heads=2, patch=8).eval()
    decoder = CrossAttentionDecoder(encoder, dim=8, depth=2, heads=2)
    images = images_like(1, 1, 16, 24)
    masking = RandomMasker(0.5)(None, 1, (2, 3), torch.tensor([1]))
    tokens = encoder.embed(images).gather(1, masking.keep[..., None].expand(-1, -1, 16))
    layers = encoder.encode_layers(tokens, (2, 3), masking.keep)
    assert len(layers) == encoder.depth == 3
    torch.testing.assert_close(layers[-1], encoder.encode(tokens, (2, 3), masking.keep))
    found = decoder(layers, masking, (2, 3), torch.tensor([[5, 0]]))

    x = decoder.mask_token[0] + sincos_positions(8, 2, 3, torch.device("cpu"))[0, [5, 0]]
    for k, block in enumerate(decoder.decoder_blocks):
        seen = block.seen_norm(sum(decoder.mix[k, i] * layer[0] for i, layer in enumerate(layers)))
        q = block.attn.q(block.norm1(x)).view(2, 2, 4)
        keys, values = (t.view(-1, 2, 4) for t in block.attn.kv(seen).chunk(2, -1))
        weights = torch.einsum("thd,nhd->htn", q, keys).div(2).softmax(2)
        x = x + block.attn.proj(torch.einsum("htn,nhd->thd", weights, values).flatten(1))
        x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
    torch.testing.assert_close(found[0], decoder.decoder_pred(decoder.decoder_norm(x)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PIXEL_DECODERS.names())
def test_every_decoder_takes_every_maskable_encoder(name: str) -> None:
    settings = PIXEL_DECODERS.settings_of(name)(name=name)
    for more in ({}, {"stem": "convolutions"}, {"positions": "rope", "registers": 2, "layer_scale": 0.1}, {"channels": 3}):
        encoder = ENCODERS.build(ENCODERS.settings_of("vit")(name="vit", width=32, depth=2, heads=2, **more))
        mae = MaskedAutoEncoder(encoder, RandomMasker(), PIXEL_DECODERS.build(settings, encoder), encoder.channels)
        output = mae(images_like(2, encoder.channels, 32, 48), generator=torch.arange(2))
        assert output.prediction.shape == (2, 5, 256 * encoder.channels) and output.loss.isfinite().all()
        output.loss.mean().backward()
        assert not [key for key, p in mae.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


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


@pytest.mark.parametrize("decoder", DECODERS)
def test_everything_learns(decoder: str) -> None:
    """A dark and a bright image are told apart from a quarter of their tokens."""
    mae = model(decoder=decoder)
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


@pytest.mark.parametrize("stem", ["linear", "hd", "convolutions"])
@pytest.mark.parametrize("positions", ["sincos", "learned", "rope"])
@pytest.mark.parametrize("channels", [1, 3])
def test_visible_tokens_are_those_of_the_whole_image(stem: str, positions: str, channels: int) -> None:
    torch.manual_seed(0)
    patch = 32 if stem == "hd" else 8
    encoder = ViT(
        width=32, depth=1, heads=2, patch=patch, stem=stem, positions=positions, channels=channels  # type: ignore[arg-type]
    ).eval()
    images = images_like(2, channels, 3 * patch, 4 * patch)
    keep = torch.tensor([[11, 0, 5], [2, 3, 7]])
    expected = encoder.embed(images).gather(1, keep[..., None].expand(-1, -1, 32))
    torch.testing.assert_close(encoder.embed_visible(images, keep), expected, rtol=1e-4, atol=1e-5)


def kept_for_backward(run: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """What a pass gives, and how many numbers it keeps for the backward pass."""
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()
    return result, sum(kept)


@pytest.mark.parametrize("decoder", DECODERS)
def test_recomputing_mlps_changes_nothing_but_memory(decoder: str) -> None:
    images, found = images_like(2, 1, 32, 32), []
    for what in (False, "mlp"):
        mae = model(decoder=decoder).train()
        checkpoint_activations(mae, what)
        loss, kept = kept_for_backward(lambda mae=mae: mae(images, generator=torch.arange(2)).loss.mean())
        loss.backward()
        found.append((loss, {key: p.grad for key, p in mae.named_parameters()}, kept))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-5, atol=1e-8)
    assert found[1][2] < 0.75 * found[0][2]


def test_a_chest_counts_as_often_as_it_is_told() -> None:
    mae = model()
    mae.chest_weight = 3.0
    images = images_like(2, 1, 32, 32)
    regions = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(1))
    output = mae(images, regions, generator=torch.arange(2))
    wanted = mae.patchify(images).gather(1, output.targets[..., None].expand(-1, -1, 64))
    errors = (output.prediction - wanted).square().mean(-1)
    weights = 1 + 2 * regions.flatten(1).gather(1, output.targets)
    torch.testing.assert_close(output.loss, (errors * weights).sum(1) / weights.sum(1))
    mae.chest_weight = 1.0
    torch.testing.assert_close(mae(images, regions, generator=torch.arange(2)).loss, errors.mean(1))


def test_linear_is_simmim() -> None:
    """The encoder sees the whole grid, with the learned pixels in place of masked patches; one linear layer follows."""
    mae = model(decoder="linear")
    images = images_like(2, 1, 32, 32)
    output = mae(images, generator=torch.arange(2))
    patches, blank = mae.patchify(images), mae.decoder.mask_patch
    assert blank is not None and output.latent.shape[1] == 17
    seen = mae.unpatchify(torch.where(output.masking.mask[..., None] > 0, blank, patches), (32, 32))
    tokens = mae.encoder.encode(mae.encoder.embed(seen), (4, 4))[:, 1:]
    expected = mae.decoder.decoder_pred(tokens).gather(1, output.targets[..., None].expand(-1, -1, 64))  # type: ignore[operator]
    torch.testing.assert_close(output.prediction, expected, rtol=1e-4, atol=1e-5)
