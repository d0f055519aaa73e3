"""Visual tokens -> the decoder's width."""

from torch import Tensor, nn

from medxray.llm import Projector


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
