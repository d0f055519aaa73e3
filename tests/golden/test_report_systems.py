"""R2GenGPT and R2GenCSR as their reference implementations compute them, through the library's own classes."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from medxray import build
from medxray.types import Context, Features

GOLDEN = Path(os.environ.get("MEDXRAY_GOLDEN", Path(__file__).parents[3] / "shared" / "golden"))
CASES = [
    path
    for path in sorted(GOLDEN.glob("*.json"))
    if isinstance(data := json.loads(path.read_text()), dict) and data.get("reference") in ("r2gengpt", "r2gencsr")
]
pytestmark = pytest.mark.skipif(not CASES, reason=f"no golden tensors in {GOLDEN}; name their folder by MEDXRAY_GOLDEN")


def tokenizer_of(case: dict) -> PreTrainedTokenizerFast:
    """The case's toy tokenizer: pieces by a regular expression, white space runs being one unknown piece."""
    tokenizer = Tokenizer(models.WordLevel(case["vocab"], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"</s>|</|[A-Za-z]+|[<>:.,]|\s+|."), behavior="isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="</s>", bos_token="<pad>"
    )


def llm_folder(case: dict, tensors: dict, folder: Path) -> Path:
    llm = case["llm"]
    config = LlamaConfig(
        vocab_size=llm["vocab"],
        hidden_size=llm["hidden_size"],
        intermediate_size=llm["intermediate_size"],
        num_hidden_layers=llm["layers"],
        num_attention_heads=llm["heads"],
    )
    model = LlamaForCausalLM(config)
    prefix = "weights.llama_model."
    model.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    model.save_pretrained(folder)
    tokenizer_of(case).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_inputs_loss_and_gradients(path: Path, tmp_path: Path) -> None:
    case, tensors = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
    swin = case["swin"]
    spec = {
        "task": "report",
        "data": {"reader": {"name": "csv", "root": str(tmp_path)}, "image_size": swin["image_size"], "max_views": 2},
        "encoder": {
            "name": "transformers",
            "channels": 3,
            "config": {
                "model_type": "swin",
                "image_size": swin["image_size"],
                "patch_size": swin["patch_size"],
                "embed_dim": swin["embed_dim"],
                "depths": swin["depths"],
                "num_heads": swin["num_heads"],
                "window_size": swin["window_size"],
            },
        },
        "decoder": {
            "name": "causal-lm",
            "model": str(llm_folder(case, tensors, tmp_path / "llm")),
            "max_length": case["max_length"],
        },
        "training": {"steps": 1},
    }
    pairs = case["context_pair"]
    if pairs:
        spec["retriever"] = {
            "name": "fixed", "positives": pairs, "negatives": pairs, "residual": case["residual"],
            "pools": {"by": "random"},
        }  # fmt: skip
    task = build(spec).task.eval()
    weights = {k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")}
    task.encoder.model.load_state_dict(
        {k.removeprefix("visual_encoder."): v for k, v in weights.items() if k.startswith("visual_encoder.")}
    )
    task.projector.linear.load_state_dict({"weight": weights["llama_proj.weight"], "bias": weights["llama_proj.bias"]})
    task.projector.norm.load_state_dict({"weight": weights["layer_norm.weight"], "bias": weights["layer_norm.bias"]})

    from medxray.retrieval.context import context_tokens
    from medxray.tasks import join_views

    views = torch.stack([tensors[f"view{i}"] for i in range(case.get("views", 1))], dim=1)
    B, V = views.shape[:2]
    flat = task.encoder(views.flatten(0, 1))
    per_view = Features(flat.tokens.unflatten(0, (B, V)), flat.grid, flat.pooled.unflatten(0, (B, V)))
    study = join_views(per_view, torch.ones(B, V, dtype=torch.bool), "average")
    visual, context = task.projector(study.tokens), None
    if pairs:
        with torch.no_grad():
            positive = task.encoder(tensors["positive_images"]).pooled.expand(B, -1, -1)
            negative = task.encoder(tensors["negative_images"]).pooled.expand(B, -1, -1)
        context = context_tokens(
            case["residual"],
            study.pooled,
            Context(positive, negative, [], []),
            task.projector.project,
            task.decoder.wrap_context,
        )
    embeddings, attention, labels = task.decoder.assemble(visual, context, case["texts"])
    # The reference pads to max_length, we to the longest report of the batch: what is more there is padding.
    n = embeddings.shape[1]
    assert not tensors["attention_mask"][:, n:].any() and (tensors["labels"][:, n:] == -100).all()
    torch.testing.assert_close(embeddings, tensors["inputs_embeds"][:, :n], atol=1e-5, rtol=0)
    assert torch.equal(attention, tensors["attention_mask"][:, :n])
    assert torch.equal(labels, tensors["labels"][:, :n])
    loss = task.decoder.loss(visual, context, case["texts"]) / task.decoder.count(case["texts"])
    assert loss.item() == pytest.approx(case["loss_value"], rel=1e-4)
    loss.backward()
    torch.testing.assert_close(task.projector.norm.weight.grad, tensors["layer_norm_weight_grad"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(task.projector.linear.weight.grad, tensors["proj_weight_grad"], rtol=1e-4, atol=1e-6)
