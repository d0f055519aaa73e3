"""An encoder of your own, three ways: a decorator, an entry point, a module instance.

As an entry point, your package's pyproject.toml says:

    [project.entry-points."medxray.encoders"]
    my-cnn = "my_package:MyCNN"
"""

import sys

import torch

import medxray


@medxray.encoders.register("my-cnn", replace=True)
class MyCNN(medxray.Encoder):
    """Three convolutions."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.width, self.stride = width, 16
        layers = [(1, width // 4, 4), (width // 4, width // 2, 2), (width // 2, width, 2)]
        self.layers = torch.nn.Sequential(
            *(m for a, b, s in layers for m in (torch.nn.Conv2d(a, b, 2 * s - 1, s, s - 1), torch.nn.GELU()))
        )

    def forward(self, images: torch.Tensor) -> medxray.Features:
        maps = self.layers(images)
        tokens = maps.flatten(2).transpose(1, 2)
        return medxray.Features(tokens, (maps.shape[2], maps.shape[3]), tokens.mean(1))


if __name__ == "__main__":
    overrides = {"encoder": {"name": "my-cnn", "width": 64}, "name": "own-encoder"}
    by_name = medxray.build("r2gencsr-phantom", overrides)
    by_instance = medxray.build("r2gencsr-phantom", {"name": "own-module"}, encoder=MyCNN(width=64).layers)
    print(by_name.fit().evaluate() if "--fit" in sys.argv else f"built {by_name} and {by_instance}")
