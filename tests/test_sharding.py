"""What is gathered as a whole, and files that hold divided tensors; divided models learn in tests/system/test_distributed.py."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import medxray
from medxray.adapters import LoRA, adapt
from medxray.encoders import ENCODERS
from medxray.layers import Block
from medxray.llm.memory_transformer import DecoderLayer, EncoderLayer, MemoryTransformer
from medxray.sharding import Sharded, blocks_of, read_shards, shard_shapes, write_shards
from medxray.tasks import TASKS
from medxray.types import RunError, SpecError


def names(model: nn.Module) -> list[str]:
    places = {module: name for name, module in model.named_modules()}
    return [places[block] for block in blocks_of(model)]


def encoder(name: str, **settings: Any) -> nn.Module:
    made: nn.Module = ENCODERS.build(ENCODERS.settings_of(name)(name=name, **settings))
    return made


def test_blocks_of_encoders() -> None:
    vit = encoder("vit", width=16, depth=3, heads=2, patch=8)
    assert names(vit) == ["blocks.0", "blocks.1", "blocks.2"] and all(isinstance(b, Block) for b in blocks_of(vit))
    assert names(encoder("vmamba", dims=8, depths=[1, 2, 2, 1])) == [f"layers.{s}.blocks.{b}" for s in (1, 2) for b in (0, 1)]


def test_blocks_of_language_models() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2
    )
    llama = LlamaForCausalLM(config)
    assert names(llama) == [f"model.layers.{i}" for i in range(3)]
    llama.requires_grad_(False)
    adapt(llama, LoRA(), "decoder.lora")
    assert names(llama) == [f"model.layers.{i}" for i in range(3)], "adapters stay with their block"
    decoder = MemoryTransformer(0, width=16, hidden=16, heads=2, layers=2, slots=2)
    assert {type(block) for block in blocks_of(decoder)} == {EncoderLayer}, "layers that are entered elsewhere stay whole"
    assert any(isinstance(module, DecoderLayer) for module in decoder.modules())


def test_shards_of_one_process_come_back(tmp_path: Path) -> None:
    state = {
        "model/a": torch.randn(5, 3), "model/b": torch.arange(4).half(), "optimizer/step/a": torch.tensor(7.0),
        "model/seen": torch.tensor(12), "model/none": torch.zeros(0, 4),
    }  # fmt: skip
    write_shards(tmp_path / "shards", state)
    assert {path.suffix for path in (tmp_path / "shards").iterdir()} == {".safetensors"}, "nothing that runs code when it is read"
    assert shard_shapes(tmp_path / "shards") == {name: tensor.shape for name, tensor in state.items()}
    empty = {name: torch.full_like(tensor, 3) for name, tensor in state.items()}
    read_shards(tmp_path / "shards", empty)
    torch.testing.assert_close(empty, state, rtol=0, atol=0)
    with pytest.raises(RunError, match=r"shards cannot be read: .*model/c.*delete this checkpoint"):
        read_shards(tmp_path / "shards", {"model/c": torch.zeros(1)})
    with pytest.raises(RunError, match="cannot be read"):
        read_shards(tmp_path / "shards", {"model/a": torch.zeros(5, 4)})
    for file in (tmp_path / "shards").iterdir():
        file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(RunError, match="cannot be read"):
        read_shards(tmp_path / "shards", empty)


def test_what_cannot_be_divided_is_named() -> None:
    spec = medxray.Spec.read(
        {
            "task": "pretrain", "training": {"steps": 1},
            "data": {"image_size": 32, "reader": {"name": "csv", "root": "data"}},
            "encoder": {"name": "vit", "width": 16, "depth": 2, "heads": 2, "patch": 8},
        }
    )  # fmt: skip
    task = TASKS.get("pretrain")(spec, None)
    task.encoder.temperature = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(SpecError, match=r"fsdp cannot divide encoder.temperature, which is a single number; use ddp"):
        Sharded(task)
    task.encoder.temperature = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(SpecError, match=r"encoder.temperature, which is held as torch.uint8; use ddp, or leave out quantize"):
        Sharded(task)
