"""VMamba computes what the reference implementation does: outputs and gradients, versions v2 and v0."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from medxray.encoders.scan import backends
from medxray.encoders.vmamba import VMamba
from medxray.weights import load_into

GOLDEN = Path(os.environ.get("MEDXRAY_GOLDEN", Path(__file__).parents[2].parent / "shared" / "golden"))
CASES = [
    path.stem
    for path in sorted(GOLDEN.glob("*.json"))
    if isinstance(held := json.loads(path.read_text()), dict) and held.get("reference") == "vmamba"
]


# Triton's interpreter would take minutes for each; tests/encoders/test_scan_triton.py gives it small shapes.
BACKENDS = [
    name for name, why in backends().items() if why is None and (name != "triton" or torch.cuda.is_available())
]


@pytest.fixture(params=CASES or ["absent"])
def case(request: pytest.FixtureRequest) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if request.param == "absent":
        pytest.skip(f"golden files are absent: {GOLDEN}")
    path = GOLDEN / request.param
    return json.loads(path.with_suffix(".json").read_text()), load_file(path.with_suffix(".safetensors"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_function(case: tuple[dict[str, Any], dict[str, Tensor]], backend: str) -> None:
    config, tensors = case
    device = "cuda" if backend in ("triton", "mamba-ssm") else "cpu"
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    version = "v0" if config["forward_type"] == "v0" else "v2"
    encoder = (
        VMamba(
            dims=config["dims"],
            depths=config["depths"],
            ssm_ratio=config["ssm_ratio"],
            state=config["d_state"],
            version=version,
            mlp_ratio=config["mlp_ratio"],
            channels=tensors["input"].shape[1],
            scan=backend,
        )
        .to(device)
        .eval()
    )
    weights = {key.removeprefix("weights."): t for key, t in tensors.items() if key.startswith("weights.")}
    head = {key: weights.pop(key).requires_grad_() for key in ("classifier.head.weight", "classifier.head.bias")}
    load_into(encoder, weights, "golden")

    def close(found: Tensor, name: str) -> None:
        expected = tensors[name]
        if version == "v0" and expected.ndim == 4:
            expected = expected.permute(0, 3, 1, 2)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5, msg=lambda text: f"{name}: {text}")

    images = tensors["input"].requires_grad_()
    for i, stage in enumerate(encoder.stages(images)):
        close(stage, f"stage{i}")
    features = encoder(images)
    assert features.grid is not None
    close(features.tokens.transpose(1, 2).unflatten(2, features.grid), "last_norm")
    logits = F.linear(features.pooled, *head.values())
    torch.testing.assert_close(logits, tensors["logits"], rtol=0, atol=1e-5)
    loss = logits.square().mean()
    loss.backward()
    assert loss.item() == pytest.approx(config["loss_value"], rel=1e-4)

    expected = tensors["input_grad"]
    assert images.grad is not None
    torch.testing.assert_close(images.grad, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    parameters = {**dict(encoder.named_parameters()), **head}
    assert set(parameters) == set(config["grad_norms"])
    norms = {name: p.grad.norm().item() for name, p in parameters.items() if p.grad is not None}
    assert norms == pytest.approx(config["grad_norms"], rel=1e-4)
