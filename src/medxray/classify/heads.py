"""Classification heads."""

from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from medxray.classify import Head, JoiningHead, MemoryHead
from medxray.classify.texts import embed
from medxray.layers import Block, initialise
from medxray.types import Features, SpecError

Positive = Annotated[int, Field(gt=0)]


class LinearHead(Head):
    """A norm, dropout and one linear layer on one vector an image.

    Args:
        pooling: the encoder's own pooled vector, or the largest value of each channel over the tokens, by which a
            small finding counts as much as a large one.
        norm: `layer`, or `batch`, which brings each channel to one scale over the studies and learns no factors, as MAE's
            linear probe does (He et al., CVPR 2022, appendix A.1): what an encoder seems worth then hangs less on the scale of
            its channels, and so on how long the probe is trained. It takes at least two studies a step.
        dropout: share of the pooled vector that is dropped while training.
    """

    def __init__(
        self,
        width: int,
        classes: int,
        pooling: Literal["encoder", "max"] = "encoder",
        norm: Literal["layer", "batch"] = "layer",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.pooling = pooling
        self.norm = nn.LayerNorm(width) if norm == "layer" else nn.BatchNorm1d(width, affine=False, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Features) -> Tensor:
        pooled = features.pooled if self.pooling == "encoder" else features.tokens.amax(1)
        logits: Tensor = self.linear(self.dropout(self.norm(pooled)))
        return logits


class AttentiveProbe(Head):
    """Learned queries look at the tokens by cross-attention, and one linear layer reads what they find (arXiv:2202.03026).

    Tokens are normalised without learned factors, so that what is measured is the encoder.

    Args:
        queries: one for every label, which may then look at a place of its own, or a single one for all.
        heads: attention heads.
    """

    def __init__(
        self, width: int, classes: int, queries: Literal["per-label", "single"] = "per-label", heads: Positive = 8
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"heads must divide the encoder's width {width}, found {heads}")
        self.heads = heads
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.query_token = nn.Parameter(torch.empty(classes if queries == "per-label" else 1, width))
        # Without biases: a key's would change no weight, and a value's only the bias of the logits.
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.weight = nn.Parameter(torch.empty(classes, width))
        self.bias = nn.Parameter(torch.zeros(classes))
        for projection in (self.key, self.value):
            nn.init.xavier_uniform_(projection.weight)
        for parameter in (self.query_token, self.weight):
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, features: Features) -> Tensor:
        tokens = self.norm(features.tokens)
        queries = self.query_token.expand(tokens.shape[0], -1, -1)
        q, k, v = (
            x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in (queries, self.key(tokens), self.value(tokens))
        )
        found = F.scaled_dot_product_attention(q.to(k.dtype), k, v).transpose(1, 2).flatten(2)
        return (found * self.weight).sum(2) + self.bias


class LabelTextFusion(JoiningHead):
    """Every label's text is a token beside the image's in the encoder's last block, and gives the label's logit
    (arXiv:2404.17926, section on disease recognition). With an encoder that is frozen or has no such block to share, it
    is a block of the head's own, after the encoder.

    The logits go through batch normalisation: fit with at least two studies a step.

    Args:
        texts: where the labels' vectors come from: a sentence encoder, by its Hugging Face name or folder, or a .npz,
            .safetensors or .json file of label -> vector; None learns them. A fitted head keeps them.
        prompt: what the sentence encoder reads of a label, with {label} in it.
        text_width: numbers in a label's vector.
        heads: attention heads of a block of its own.
    """

    texts: Tensor

    def __init__(
        self,
        width: int,
        classes: int,
        texts: str | None = None,
        prompt: str = "{label}",
        text_width: Positive = 768,
        heads: Positive = 8,
    ) -> None:
        super().__init__()
        if "{label}" not in prompt:
            raise ValueError(f"prompt must hold {{label}}, found {prompt!r}")
        if width % heads:
            raise ValueError(f"heads must divide the encoder's width {width}, found {heads}")
        self.source, self.prompt, self.text_width = texts, prompt, text_width
        if texts is None:
            self.texts = nn.Parameter(torch.randn(classes, text_width))
        else:
            self.register_buffer("texts", torch.zeros(classes, text_width))
        self.project = nn.Linear(text_width, width)
        self.block: nn.Module | None = Block(width, heads)
        self.norm: nn.Module | None = nn.LayerNorm(width, eps=1e-6)
        self.weight = nn.Parameter(torch.empty(classes, width))
        self.batch_norm = nn.BatchNorm1d(classes)
        initialise(self)
        nn.init.trunc_normal_(self.weight, std=0.02)

    def read_labels(self, labels: Sequence[str]) -> None:
        if self.source is not None:
            self.texts.copy_(embed(self.source, labels, self.prompt, self.text_width))

    def join(self) -> None:
        self.block = self.norm = None

    def forward(self, features: Features, last: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        tokens = self.project(self.texts).expand(features.tokens.shape[0], -1, -1)
        if last is not None:
            joined = last(tokens)
        else:
            assert self.block is not None and self.norm is not None
            joined = self.norm(self.block(torch.cat([features.tokens, tokens], 1)))
        # No bias: the normalisation has one.
        logits = (joined[:, -self.weight.shape[0] :] * self.weight).sum(2)
        if self.training and len(logits) < 2:
            raise SpecError(
                "head label-text-fusion: batch normalisation needs 2 studies a step and process, found 1; raise "
                "training.batch_size"
            )
        normalised: Tensor = self.batch_norm(logits)
        return normalised


class KNearest(MemoryHead):
    """The k training studies whose pooled features are nearest by cosine vote on each label, with weights
    exp(similarity / temperature) as in DINO (arXiv:2104.14294).

    For a label those vote for whom it is known; a training study's own patient never does. The encoder must be frozen.
    What is fitted is a scale and a shift of each label's logit, which make probabilities of the votes and leave their
    order: `training.steps: 1` is the plain vote.

    Args:
        k: neighbours that vote.
        temperature: the smaller, the more the nearest count.
    """

    features: Tensor
    labels: Tensor
    owners: Tensor
    EDGE = 1e-3

    def __init__(
        self, width: int, classes: int, k: Positive = 20, temperature: Annotated[float, Field(gt=0)] = 0.07
    ) -> None:
        super().__init__()
        self.k, self.temperature = k, temperature
        self.width = width
        self.scale = nn.Parameter(torch.ones(classes))
        self.shift = nn.Parameter(torch.zeros(classes))
        self.reserve(0)

    def reserve(self, studies: int) -> None:
        device = self.scale.device
        self.register_buffer("features", torch.zeros(studies, self.width, device=device))
        self.register_buffer("labels", torch.full((studies, len(self.scale)), torch.nan, device=device))
        self.register_buffer("owners", torch.zeros(studies, dtype=torch.int64, device=device))

    def fill(self, pooled: Tensor, labels: Tensor, owners: Tensor) -> None:
        most = int(owners.unique(return_counts=True)[1].max()) if len(owners) else 0
        if len(pooled) - most < self.k:
            raise SpecError(
                f"head.k: {self.k} neighbours of other patients were asked for, but the training set has "
                f"{len(pooled)} studies, {most} of them of one patient; lower it to {max(1, len(pooled) - most)} or less"
            )
        self.features.copy_(F.normalize(pooled.float(), dim=1))
        self.labels.copy_(labels)
        self.owners.copy_(owners)

    def forward(self, features: Features, owners: Tensor | None = None) -> Tensor:
        # Votes of 0 and 1 are kept apart from their neighbours, and finite.
        votes = self.EDGE + (1 - 2 * self.EDGE) * self.votes(features.pooled, owners)
        return votes.logit() * self.scale + self.shift

    @torch.no_grad()
    def votes(self, pooled: Tensor, owners: Tensor | None = None) -> Tensor:
        """pooled (B, D), and whose they are (B,) -> shares of the votes for each label (B, K); a half where nobody votes."""
        # Neighbours are not told apart in half precision.
        with torch.autocast(pooled.device.type, enabled=False):
            similar = F.normalize(pooled.float(), dim=1) @ self.features.T
        if owners is not None:
            similar = similar.masked_fill(owners[:, None] == self.owners, -torch.inf)
        found = []
        for label in self.labels.unbind(1):
            nearest, rows = similar.masked_fill(label.isnan() | (label < 0), -torch.inf).topk(self.k)
            # Relative to the nearest one; at a low temperature every weight could be zero otherwise.
            weights = ((nearest - nearest[:, :1]) / self.temperature).exp().nan_to_num(0)
            total = weights.sum(1)
            found.append(((weights * label[rows].nan_to_num(0)).sum(1) / total).where(total > 0, 0.5))
        return torch.stack(found, 1)
