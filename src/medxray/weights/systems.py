"""Checkpoints of whole report systems: medxray's run folders, and R2GenGPT's, R2GenCSR's and R2Gen's files."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medxray.types import WeightsError
from medxray.weights import encoder_state, load_state, refuse
from medxray.weights.families import rename

# R2GenGPT and R2GenCSR save what they train, under the names of a module around Swin or VMamba and Llama. Those of the
# Q-Former are of its first public code; those of layers with adapters begin as peft's models do.
_R2GENGPT = (
    (r"^llama_proj\.(weight|bias)$", r"projector.linear.\1"),
    (r"^layer_norm\.", "projector.norm."),
    (r"^query_tokens$", "projector.queries"),
    (r"^Qformer\.bert\.embeddings\.LayerNorm\.", "projector.qformer.layernorm."),
    (r"^Qformer\.bert\.", "projector.qformer."),
    (r"^(projector\.qformer\..*attention)\.self\.", r"\1.attention."),
    (r"^llama_model\.", "decoder.llm."),
)
# The word embeddings a second time, and what a Q-Former has for texts.
_NOT_USED = re.compile(
    r"embed_tokens\.|Qformer\.cls\.|Qformer\.bert\.embeddings\.(word|position)_|Qformer\..*\.\d+\.(intermediate|output)\."
)
_RESNET = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
_SWIN_LAYERS = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
LORA = re.compile(r"\.lora_[AB]\.")


def kind_of(state: dict[str, Tensor], source: str) -> str:
    """"r2gen", or "r2gengpt", which is R2GenCSR's too.

    Raises:
        WeightsError: it is neither's.
    """
    for kind, prefixes in (("r2gen", ("encoder_decoder.",)), ("r2gengpt", ("llama_proj.", "layer_norm.", "Qformer."))):
        if any(key.startswith(prefixes) for key in state):
            return kind
    raise WeightsError(
        f"weights {source}: of no system that is known; R2GenGPT's and R2GenCSR's files hold llama_proj.*, R2Gen's "
        f"encoder_decoder.*, this one {', '.join(list(state)[:3])}; those of an encoder alone go to encoder.weights"
    )


def is_run(source: str) -> bool:
    """Whether a source is a folder, which can only be a run's, and not another project's file."""
    return Path(source).expanduser().is_dir()


def holds_encoder(source: str) -> bool:
    """Whether a system's checkpoint has every weight of its encoder, so that no other file is needed for it.

    Raises:
        WeightsError: it cannot be read.
    """
    if is_run(source):
        return any(key.startswith("encoder.") for key in load_state(_of_run(source)))
    found = [key for key in load_state(Path(source).expanduser()) if key.startswith(("visual_encoder.", "visual_extractor."))]
    return bool(found) and not any(LORA.search(key) for key in found)


def load_system(task: nn.Module, source: str) -> None:
    """Loads a task's encoder, projector and decoder from a checkpoint of a whole system.

    What the file was trained with must fit; what its training left as it was, it does not hold: then the task has it already,
    from the public weights that its spec names. Of R2GenGPT's and R2GenCSR's files everything is loaded or nothing. Of a run
    the context studies are not taken: a system may go on with others, or with none.

    Args:
        task: has the three parts; its decoder knows its vocabulary.
        source: a run folder, or a file as those projects save it.

    Raises:
        WeightsError: no such file, or of another system, language model or encoder, with the keys.
    """
    if is_run(source):
        state = load_state(_of_run(source))
        _put(task, {_plain(key): (key, tensor) for key, tensor in state.items() if not key.startswith("bank.")}, source)
        return
    state = load_state(Path(source).expanduser())
    if kind_of(state, source) == "r2gen":
        _load_r2gen(task, state, source)
    else:
        _load_r2gengpt(task, state, source)


def _of_run(source: str) -> Path:
    """The tensors of a run folder.

    Raises:
        WeightsError: it is no run's, or its fit has not ended.
    """
    folder = Path(source).expanduser()
    if not (folder / "model.safetensors").is_file():
        found = ", ".join(sorted(file.name for file in folder.iterdir())[:10]) or "nothing"
        raise WeightsError(
            f"weights {source}: no fitted run, which would hold model.safetensors (found: {found}); run fit to its end, or "
            "name another folder"
        )
    return folder / "model.safetensors"


def _load_r2gengpt(task: Any, state: dict[str, Tensor], source: str) -> None:
    visual = {key: value for key, value in state.items() if key.startswith("visual_encoder.")}
    # own name -> the file's, and its tensor
    found: dict[str, tuple[str, Tensor]] = {}
    whole = {key: value for key, value in visual.items() if not LORA.search(key)}
    if whole:
        plain = {_plain(key.removeprefix("visual_encoder.")): value for key, value in whole.items()}
        for name, tensor in encoder_state(task.encoder, plain, source).items():
            found[f"encoder.{name}"] = (f"visual_encoder.{name}", tensor)
    for key, tensor in state.items():
        if key in whole or _NOT_USED.match(key):
            continue
        if key in visual:
            layer, adapter = LORA.split(_plain(key.removeprefix("visual_encoder.")))[0], LORA.search(key)
            assert adapter is not None
            layer = re.sub(r"\.self\.(query|key|value)$", lambda match: f".{_SWIN_LAYERS[match[1]]}", layer)
            found[f"encoder.model.{layer}{key[adapter.start():]}"] = (key, tensor)
            continue
        found[_plain(rename(key, _R2GENGPT))] = (key, tensor)
    _put(task, found, source)


def _put(task: Any, found: dict[str, tuple[str, Tensor]], source: str) -> None:
    """Copies tensors into the task, or tells all that is wrong in the file's names."""
    own = {_plain(name): tensor for name, tensor in task.state_dict().items()}
    trained = [_plain(name) for name, parameter in task.named_parameters() if parameter.requires_grad]
    missing = [name for name in trained if name not in found]
    extra = [key for name, (key, _) in found.items() if name not in own]
    wrong = [
        f"{key} is {tuple(tensor.shape)} in the file and {tuple(own[name].shape)} in the model"
        for name, (key, tensor) in found.items()
        if name in own and tensor.shape != own[name].shape
    ]
    hints = _hints(task, found, missing, extra)
    try:
        refuse(source, "the spec's system", missing, extra, wrong)
    except WeightsError as error:
        raise WeightsError(f"{error}{''.join(f'; {hint}' for hint in hints)}") from None
    with torch.no_grad():
        for name, (_, tensor) in found.items():
            own[name].copy_(tensor)


def _hints(task: Any, found: dict[str, tuple[str, Tensor]], missing: Sequence[str], extra: Sequence[str]) -> list[str]:
    """What most likely is the matter."""
    hints = []
    norm = found.get("projector.norm.weight")
    if norm is not None and len(norm[1]) != task.decoder.width:
        hints.append(f"the file is for a language model of width {len(norm[1])}, decoder.model has {task.decoder.width}")
    for part, prefix in (("encoder", "visual_encoder."), ("decoder", "llama_model.")):
        if any(key.startswith(prefix) and LORA.search(key) for key in extra):
            hints.append(f"the file holds adapters: set {part}.lora={{}}")
        if any(name.startswith(f"{part}.") and LORA.search(name) for name in missing):
            hints.append(f"the file holds no adapters: set {part}.lora=null")
    encoder = [name for name, _ in task.encoder.named_parameters()]
    if encoder and not any(name.startswith("encoder.") for name in found) and any(n.startswith("encoder.") for n in missing):
        hints.append("the file was trained with a frozen encoder: set encoder.trainable=false")
    if any(key.startswith("Qformer.") for key in extra):
        hints.append("the file holds a Q-Former: set projector.name=q-former")
    return hints


def _plain(name: str) -> str:
    """Without what peft puts around a model and its layers."""
    return name.replace("base_model.model.", "").replace(".base_layer.", ".")


def _load_r2gen(task: Any, state: dict[str, Tensor], source: str) -> None:
    for part in (task.projector, task.decoder):
        if not hasattr(part, "adopt"):
            raise WeightsError(
                f"weights {source}: R2Gen's; its spec has projector linear-relu and decoder memory-transformer, found "
                f"{type(part).__name__}"
            )
    prefix = "visual_extractor.model."
    visual = {}
    for key, value in state.items():
        number, _, rest = key.removeprefix(prefix).partition(".")
        if key.startswith(prefix) and number in _RESNET:
            visual[f"{_RESNET[number]}.{rest}"] = value
    own = task.encoder.state_dict()
    found = encoder_state(task.encoder, visual, source)
    taken = task.projector.adopt(state) | task.decoder.adopt(state, source)
    lost = [key for key in state if key.startswith("encoder_decoder.") and key not in taken and not key.endswith(".pe")]
    refuse(source, "the spec's system", [], lost, [])
    with torch.no_grad():
        for name, tensor in found.items():
            own[name].copy_(tensor)
