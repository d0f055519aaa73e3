"""What public models are made of, for those that packaged specs name: so that they can be shown, and built without
memory, where their weights are not. The numbers are those of the config.json beside each model's weights."""

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
            return AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
        if path is not None:
            return AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        try:
            return AutoConfig.from_pretrained(source, trust_remote_code=False, local_files_only=True)
        except OSError:
            if source not in ARCHITECTURES:
                return AutoConfig.from_pretrained(source, trust_remote_code=False)
        return AutoConfig.for_model(**ARCHITECTURES[source])
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WeightsError(
            f"{setting} {source!r}: what it is made of is not known here ({reason}); connect to the network once, give a "
            f"folder with its config.json, or take one of {', '.join(ARCHITECTURES)}"
        ) from error
