"""Visual tokens -> the decoder's width."""

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from medxray.llm import Projector
from medxray.types import SpecError

Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(gt=0)]


class LinearProjector(Projector):
    """One linear layer; LayerNorm on the image's tokens only, as R2GenGPT and R2GenCSR do."""

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_width, out_width)
        self.norm = nn.LayerNorm(out_width)

    def forward(self, tokens: Tensor) -> Tensor:
        image: Tensor = self.norm(self.linear(tokens))
        return image

    def project(self, pooled: Tensor) -> Tensor:
        vector: Tensor = self.linear(pooled)
        return vector


class LinearReLUProjector(Projector):
    """One linear layer, ReLU and dropout, as R2Gen embeds its visual tokens.

    Args:
        dropout: of the image's tokens.
    """

    def __init__(self, in_width: int, out_width: int, dropout: Share = 0.5) -> None:
        super().__init__()
        self.linear = nn.Linear(in_width, out_width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        image: Tensor = self.dropout(self.project(tokens))
        return image

    def project(self, pooled: Tensor) -> Tensor:
        vector: Tensor = self.linear(pooled).relu()
        return vector

    def adopt(self, state: dict[str, Tensor], source: str = "the checkpoint") -> set[str]:
        """Takes the projector's part of R2Gen's own checkpoint, `encoder_decoder.att_embed.*`; returns the keys.

        Raises:
            WeightsError: keys that are missing, or shapes that disagree.
        """
        from medxray.weights import load_into

        prefix = "encoder_decoder.att_embed.0."
        own = {key: value for key, value in state.items() if key.startswith(prefix)}
        load_into(self.linear, {key.removeprefix(prefix): value for key, value in own.items()}, source)
        return set(own)


class QFormerProjector(Projector):
    """R2GenCSR's other projection: learned queries read the image's tokens by cross-attention in a small BERT
    (BLIP-2's Q-Former); then a linear layer and LayerNorm. N' is the number of queries.

    A global vector is read as an image of one token, and the queries that read it are averaged.

    Args:
        queries: tokens that stand in the prompt.
        layers: of the BERT.
        width: of its layers.
        heads: of its attention.
        hidden: width inside its MLPs.
        cross_every: the first of every so many layers looks at the image.
        dropout: in attention and after each layer.
    """

    def __init__(
        self,
        in_width: int,
        out_width: int,
        queries: Positive = 64,
        layers: Positive = 2,
        width: Positive = 768,
        heads: Positive = 12,
        hidden: Positive = 3072,
        cross_every: Positive = 2,
        dropout: Share = 0.1,
    ) -> None:
        super().__init__()
        from transformers import Blip2QFormerConfig, Blip2QFormerModel

        if width % heads:
            raise ValueError(f"width {width} is not a multiple of its {heads} heads; change one of them")
        self.queries = nn.Parameter(torch.empty(1, queries, width))
        nn.init.normal_(self.queries, std=0.02)
        self.qformer: Any = Blip2QFormerModel(
            Blip2QFormerConfig(
                hidden_size=width,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                intermediate_size=hidden,
                cross_attention_frequency=cross_every,
                encoder_hidden_size=in_width,
                hidden_dropout_prob=dropout,
                attention_probs_dropout_prob=dropout,
            )
        )
        self.linear = nn.Linear(width, out_width)
        self.norm = nn.LayerNorm(out_width)

    def forward(self, tokens: Tensor) -> Tensor:
        image: Tensor = self.norm(self._read(tokens))
        return image

    def grid(self, grid: tuple[int, int]) -> None:
        return None

    def project(self, pooled: Tensor) -> Tensor:
        return self._read(pooled.reshape(-1, 1, pooled.shape[-1])).mean(1).reshape(*pooled.shape[:-1], -1)

    def _read(self, tokens: Tensor) -> Tensor:
        queries = self.queries.expand(tokens.shape[0], -1, -1)
        read: Tensor = self.linear(self.qformer(query_embeds=queries, encoder_hidden_states=tokens).last_hidden_state)
        return read


class PixelShuffleProjector(Projector):
    """Every `factor` x `factor` neighbouring tokens of a map become one, which keeps what they hold and shortens the
    prompt (pixel shuffle backwards); then a linear layer or an MLP, and LayerNorm.

    A map of odd sides is filled up by its last row and column. A global vector stands for all the neighbours.

    Args:
        factor: s, neighbours a side.
        hidden: width inside an MLP; one linear layer if null.
    """

    def __init__(self, in_width: int, out_width: int, factor: Positive = 2, hidden: Positive | None = None) -> None:
        super().__init__()
        self.factor = factor
        joined = factor * factor * in_width
        self.linear: nn.Module = nn.Linear(joined, out_width)
        if hidden is not None:
            self.linear = nn.Sequential(nn.Linear(joined, hidden), nn.GELU(), nn.Linear(hidden, out_width))
        self.norm = nn.LayerNorm(out_width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.on_grid(tokens, None)

    def on_grid(self, tokens: Tensor, grid: tuple[int, int] | None) -> Tensor:
        image: Tensor = self.norm(self.linear(self.joined(tokens, grid)))
        return image

    def project(self, pooled: Tensor) -> Tensor:
        vector: Tensor = self.linear(torch.cat([pooled] * self.factor**2, dim=-1))
        return vector

    def grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        return -(-grid[0] // self.factor), -(-grid[1] // self.factor)

    def joined(self, tokens: Tensor, grid: tuple[int, int] | None) -> Tensor:
        """tokens (B, V * h * w, D) of V views -> (B, V * ceil(h / s) * ceil(w / s), s * s * D), row by row.

        Raises:
            SpecError: the tokens are no map of that grid.
        """
        if grid is None:
            raise SpecError(
                "projector 'pixel-shuffle': the encoder's tokens are no map, so that none are neighbours; "
                "take linear or q-former, or an encoder with a grid"
            )
        (B, N, D), (h, w), s = tokens.shape, grid, self.factor
        if N % (h * w):
            raise SpecError(f"projector 'pixel-shuffle': {N} tokens are no views of {h} x {w}; correct the encoder's grid")
        rows, columns = (
            torch.arange(-(-side // s) * s, device=tokens.device).clamp(max=side - 1) for side in (h, w)
        )
        filled = tokens.reshape(B, N // (h * w), h, w, D)[:, :, rows[:, None], columns]
        blocks = filled.unflatten(3, (-1, s)).unflatten(2, (-1, s))
        return blocks.transpose(3, 4).flatten(4).flatten(1, 3)
