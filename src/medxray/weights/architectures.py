"""What public models are made of, for those that packaged specs name: so that they can be shown, and built without
memory, where their weights are not. The numbers are those of the config.json beside each model's weights."""

import json
from pathlib import Path
from typing import Any

from medxray.types import WeightsError

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-2-7b-chat-hf": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "vocab_size": 32000,
    },
    "Qwen/Qwen1.5-1.8B-Chat": {
        "model_type": "qwen2",
        "hidden_size": 2048,
        "intermediate_size": 5504,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "vocab_size": 151936,
    },
    "microsoft/swin-base-patch4-window7-224": {
        "model_type": "swin",
        "image_size": 224,
        "patch_size": 4,
        "num_channels": 3,
        "embed_dim": 128,
        "depths": [2, 2, 18, 2],
        "num_heads": [4, 8, 16, 32],
        "window_size": 7,
        "drop_path_rate": 0.1,
    },
}
"""Name on the Hugging Face hub -> settings of a transformers configuration."""


INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
"""Which file holds which tensor of a model in several."""


def read_config(source: str | Path, **options: Any) -> Any:
    """The transformers configuration of a model, once nothing in it leads to code or out of its folder.

    Args:
        source: a folder, or a name on the hub.
        options: of `AutoConfig.from_pretrained`.

    Raises:
        OSError, ValueError: transformers cannot read it, or has no such architecture; it asks for an attention kernel of the
            hub, which is a program; or a part of the weights lies outside of the folder.
    """
    from transformers import AutoConfig

    for index in (Path(source) / name for name in INDICES):
        parts = json.loads(index.read_text(encoding="utf-8"))["weight_map"] if index.is_file() else {}
        for part in parts.values():
            if Path(part).name != part:
                raise ValueError(f"{index} names {part!r}, which lies outside of the folder; put it inside and mend the index")
    return without_kernels(AutoConfig.from_pretrained(source, trust_remote_code=False, **options))


def without_kernels(config: Any) -> Any:
    """A transformers configuration as it is.

    Raises:
        ValueError: it asks for an attention kernel of the hub.
    """
    configs = [config]
    for one in configs:
        kernel = one._attn_implementation or ""
        if "/" in kernel:
            raise ValueError(f"attn_implementation asks for {kernel!r}, a program of the hub, which is never run; remove it")
        configs += [part for name in one.sub_configs if (part := getattr(one, name, None)) is not None]
    return config


def config_of(source: str, setting: str, path: Path | None = None) -> Any:
    """The transformers configuration of a model, from its folder, the hub's cache on this machine, `ARCHITECTURES`, or the
    hub.

    Args:
        source: a name on the hub, or what the user called the file or folder.
        setting: the spec's key, for messages.
        path: the folder or .gguf file that `source` stands for, where it is on this machine.

    Raises:
        WeightsError: it cannot be found out.
    """
    from transformers import AutoConfig

    try:
        if path is not None and path.suffix == ".gguf":
            return read_config(path.parent, gguf_file=path.name, local_files_only=True)
        if path is not None:
            return read_config(path, local_files_only=True)
        try:
            return read_config(source, local_files_only=True)
        except OSError:
            if source not in ARCHITECTURES:
                return read_config(source)
        return AutoConfig.for_model(**ARCHITECTURES[source])
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WeightsError(
            f"{setting} {source!r}: what it is made of is not known here ({reason}); connect to the network once, give a "
            f"folder with its config.json, or take one of {', '.join(ARCHITECTURES)}"
        ) from error
