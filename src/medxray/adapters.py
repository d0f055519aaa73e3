"""Low-rank adapters (LoRA, arXiv:2106.09685) in place of training a model's own weights; made by peft."""

import copy
import re
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from medxray.types import SpecError

USUAL = (
    ("q_proj", "v_proj"), ("query", "value"), ("q", "v"), ("query_key_value",), ("qkv",), ("c_attn",), ("in_proj", "out_proj"),
)  # fmt: skip
"""Names that libraries give to what queries and values come from, or to a Mamba block's projections."""
ADAPTER = re.compile(r"\.lora_[AB]\.default\.weight$")


class LoRA(BaseModel):
    """Low-rank updates of some linear layers, W + alpha / rank B A: they alone are trained, all else stays as it was."""

    model_config = ConfigDict(extra="forbid", strict=True)

    rank: int = Field(16, gt=0)
    alpha: float = Field(16, gt=0, description="the update is scaled by alpha / rank")
    dropout: float = Field(0.1, ge=0, lt=1, description="of what goes into an update, in training")
    targets: list[str] | None = Field(
        None, min_length=1, description="last parts of the layers' names, such as q_proj; queries and values if null"
    )


def adapt(model: nn.Module, settings: LoRA, where: str) -> None:
    """Puts adapters beside a model's layers, in place, and stops all other gradients. B is zero at first.

    A layer `x` becomes `x.base_layer`, `x.lora_A.default` and `x.lora_B.default`.

    Args:
        model: any module with linear layers.
        settings: which, and how wide.
        where: the setting's path in a spec, for messages.

    Raises:
        SpecError: peft is not installed, or the model has no such layers.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise SpecError(f'{where} needs the package peft ({error}); pip install "medxray[lora]"') from error
    names = _linear(model)
    targets = settings.targets or next((list(usual) for usual in USUAL if names.keys() >= set(usual)), None)
    unknown = [target for target in targets or () if target not in names and target.rpartition(".")[2] not in names]
    if targets is None or unknown:
        told = f"no linear layer is named {', '.join(unknown)}" if unknown else "which layers are queries and values is not known"
        raise SpecError(f"{where}.targets: {told}; name some of {', '.join(sorted(names)) or 'none: it has no linear layer'}")
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=targets,
        # GPT-2's layers hold their weights the other way round.
        fan_in_fan_out=not issubclass(names[targets[0].rpartition(".")[2]], nn.Linear),
    )
    model.requires_grad_(False)
    inject_adapter_in_model(config, model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            # Beside weights of 16 bits or fewer: what is trained needs more.
            parameter.data = parameter.data.float()


def train_adapters(model: nn.Module, mode: bool) -> None:
    """Switches the dropout of a model's adapters; the model itself stays as it is."""
    for module in model.modules():
        dropout = getattr(module, "lora_dropout", None)
        if isinstance(dropout, nn.Module):
            dropout.train(mode)


def without_adapters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an adapted model as they were before, under their own names."""
    return {name.replace(".base_layer.", "."): tensor for name, tensor in state.items() if not ADAPTER.search(name)}


def merged(state: dict[str, Tensor], settings: LoRA) -> dict[str, Tensor]:
    """The tensors of an adapted model as one without adapters that computes the same."""
    plain = without_adapters(state)
    for name, B in state.items():
        if name.endswith(".lora_B.default.weight"):
            layer = name.removesuffix(".lora_B.default.weight")
            update = settings.alpha / settings.rank * B @ state[f"{layer}.lora_A.default.weight"]
            weight = plain[f"{layer}.weight"]
            plain[f"{layer}.weight"] = weight + (update if weight.shape == update.shape else update.T).to(weight.dtype)
    return plain


def unadapted(model: nn.Module, settings: LoRA) -> nn.Module:
    """A copy of an adapted model as one without adapters that computes the same."""
    plain = copy.deepcopy(model)
    for name, module in list(plain.named_modules()):
        inner = getattr(module, "base_layer", None)
        if isinstance(inner, nn.Module):
            parent, _, last = name.rpartition(".")
            setattr(plain.get_submodule(parent), last, inner)
    plain.load_state_dict(merged(model.state_dict(), settings))
    return plain


def _linear(model: nn.Module) -> dict[str, type]:
    """Last parts of the names of linear layers, and of what class they are."""
    from transformers.pytorch_utils import Conv1D

    kinds: tuple[Any, ...] = (nn.Linear, Conv1D)
    return {name.rpartition(".")[2]: type(module) for name, module in model.named_modules() if isinstance(module, kinds)}
