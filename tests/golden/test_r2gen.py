"""R2Gen's decoder as its reference implementation computes it, through the library's own classes."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from medxray import Spec, build

GOLDEN = Path(os.environ.get("MEDXRAY_GOLDEN", Path(__file__).parents[3] / "shared" / "golden"))
CASES = [
    path
    for path in sorted(GOLDEN.glob("*.json"))
    if isinstance(data := json.loads(path.read_text()), dict) and data.get("reference") == "r2gen"
]
pytestmark = pytest.mark.skipif(not CASES, reason=f"no golden tensors in {GOLDEN}; name their folder by MEDXRAY_GOLDEN")


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_log_probabilities_and_ids(path: Path, tmp_path: Path) -> None:
    case, tensors = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
    assert case["rm_num_heads"] == case["num_heads"] and case["bos"] == case["eos"] == case["pad"] == 0
    width = case["d_vf"]
    spec = Spec.read({
        "task": "report",
        "data": {"reader": {"name": "csv", "root": str(tmp_path)}, "image_size": 32},
        # As wide as the recorded visual features.
        "encoder": {"name": "vit", "width": width, "depth": 1, "heads": 2, "patch": 16},
        "projector": {"name": "linear-relu"},
        "decoder": {
            "name": "memory-transformer", "width": case["d_model"], "hidden": case["d_ff"], "heads": case["num_heads"],
            "layers": case["num_layers"], "slots": case["rm_num_slots"], "dropout": case["dropout"], "threshold": 1,
            "max_length": case["max_seq_length"],
        },
        "generation": {
            "rule": "r2gen", "beams": case["beam_size"], "max_new_tokens": case["max_seq_length"],
            "no_repeat_ngram": 3 if case["block_trigrams"] else 0,
        },
        "training": {"steps": 1},
    })  # fmt: skip
    task = build(spec).task.eval()
    # Any words will do that are as many as the reference's, `<unk>` with them.
    task.decoder.prepare([" ".join(f"w{i:03d}" for i in range(case["vocab_size_plus_pad"] - 2))])
    weights = {f"encoder_decoder.{k.removeprefix('weights.')}": v for k, v in tensors.items() if k.startswith("weights.")}
    taken = task.decoder.adopt(weights) | task.projector.adopt(weights)
    assert set(weights) - taken == {"encoder_decoder.model.tgt_embed.1.pe"}, "positions are computed"

    visual, ids = task.projector(tensors["att_feats"]), tensors["ids"]
    found = task.decoder(visual, None, ids[:, :-1]).log_softmax(-1)
    torch.testing.assert_close(found, tensors["logprobs"], atol=1e-5, rtol=0)
    words = task.decoder.words
    for name, beams in (("greedy", 1), ("beam3", case["beam_size"])):
        generation = spec.generation.model_copy(update={"beams": beams})
        texts = [report.text.split() for report in task.decoder.generate(visual, None, generation)]
        assert texts == [[words[i - 1] for i in line if i] for line in tensors[name].tolist()], name
    # The loss is that of the words of each report and of its end.
    reports = [" ".join(words[i - 1] for i in line if i) for line in ids.tolist()]
    L = ids.shape[1] - 1
    own = tensors["logprobs"].gather(2, ids[:, 1:, None])[..., 0]
    by_hand = -sum(own[b, : min(L, len(report.split()) + 1)].sum().item() for b, report in enumerate(reports))
    if case["max_seq_length"] > L:
        assert task.decoder.loss(visual, None, reports).item() == pytest.approx(by_hand, rel=1e-4)
