"""What `medxray show` says of an encoder: counts that can be worked out by hand, and memory that is really taken."""

import ctypes
import gc
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry, register_flop_formula

from medxray import Spec, build
from medxray.encoders import ENCODERS, Encoder
from medxray.encoders.adapt import features_from
from medxray.encoders.vit import ViT
from medxray.summary import _from_shapes, _measured, _watched, spec_of_encoder, summarise, summarise_encoder
from medxray.types import Features, SpecError, WeightsError


def test_arithmetic_of_a_vit() -> None:
    """Two for each multiply-add of the patches, the four projections, the MLP and the two products of attention."""
    D, depth, N = 32, 3, 17
    patches = 2 * 16 * 8 * 8 * D
    block = 2 * N * (4 * D * D + 8 * D * D)
    attention = 2 * 2 * N * N * D
    found = summarise_encoder(spec_of_encoder("vit", ["width=32", "depth=3", "heads=2", "patch=8"], 32))
    assert found["FLOP an image"] == (
        f"{(patches + depth * (block + attention)) / 1e6:.1f} M forward (matrix products {depth * block / 1e6:.1f} M, "
        f"attention {depth * attention / 1e3:.1f} k, convolutions {patches / 1e3:.1f} k)"
    )
    assert found["tokens an image"] == "16 (4 x 4) of width 32"
    assert found["pixels a token"] == "8 x 8"
    assert "32 x 32 pixels; a multiply-add is 2 FLOP" in found["counted"]


def test_parts_add_up() -> None:
    for name, settings in (("vit", ["width=32", "heads=2"]), ("timm", ["model=test_vit"]), ("transformers", [])):
        found = summarise_encoder(spec_of_encoder(name, settings))
        parts = [int(value.replace(",", "")) for key, value in found.items() if key.startswith("  ")]
        whole = int(found["parameters"].replace(",", ""))
        # Single tokens and tables of positions belong to no part.
        assert len(parts) > 1 and 0.9 * whole < sum(parts) <= whole


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("vit", {}),
        ("vit", {"gradient_checkpointing": True}),
        ("vmamba", {}),
        ("vmamba", {"gradient_checkpointing": True}),
        ("timm", {}),
        ("transformers", {}),
    ],
)
def test_shapes_alone_give_what_a_pass_takes(name: str, settings: dict[str, Any]) -> None:
    encoder = ENCODERS.build(ENCODERS.settings_of(name)(name=name, **settings))
    cost = _from_shapes(encoder, 64, 96)
    assert cost is not None
    # Norms need more than one image, and what all images share, such as tables that the first pass makes, is left out.
    _watched(encoder.train(), 2, 64, 96)
    two, four = (_watched(encoder.train(), count, 64, 96)[1].kept for count in (2, 4))
    kept = cost.activations.split(" in float32, while training")[0]
    number, unit = kept.split()
    assert float(number) * {"KiB": 2**10, "MiB": 2**20}[unit] == pytest.approx((four - two) / 2, rel=0.03)
    features, watch = _watched(encoder.eval(), 1, 64, 96)
    assert cost.arithmetic == watch.arithmetic()
    assert features.grid is not None and f"({features.grid[0]} x {features.grid[1]})" in cost.tokens


def test_memory_is_that_of_the_process() -> None:
    def resident() -> int:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    if not Path("/proc/self/statm").is_file() or not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("needs Linux with glibc")
    encoder, images = ViT("tiny").train(), torch.zeros(8, 1, 224, 224)
    encoder(images)
    before = resident()
    features = encoder(images)
    taken = resident() - before
    del features
    assert _watched(encoder, 8, 224, 224)[1].kept == pytest.approx(taken, rel=0.1)


def test_full_size_ones_are_at_once() -> None:
    started = time.perf_counter()
    base = summarise_encoder(spec_of_encoder("vmamba", ["size=base"]))
    large = summarise_encoder(spec_of_encoder("vit", ["size=large"], 1280))
    assert time.perf_counter() - started < 30
    assert base["FLOP an image"].startswith("30.") and " G forward" in base["FLOP an image"]
    assert "medxray::scan" in base["FLOP an image"] and "not counted" not in base["FLOP an image"]
    assert large["tokens an image"] == "6,400 (80 x 80) of width 1024"
    assert large["FLOP an image"].startswith("7,897.")
    assert large["activations an image"] == "9.4 GiB in float32, while training"


class Conv(Encoder):
    """A convolution and what a subclass adds."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.stride = 4, 8
        self.conv = nn.Conv2d(1, 4, 8, 8)

    def more(self, tokens: Tensor) -> Tensor:
        return tokens

    def forward(self, images: Tensor) -> Features:
        features = features_from(self.conv(images))
        return Features(self.more(features.tokens), features.grid, features.pooled)


@pytest.fixture
def operation() -> Any:
    """An operation of another package, which torch does not know."""
    library = torch.library.Library("elsewhere", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: 2 * x, "CompositeExplicitAutograd")
    library.impl("twice", lambda x: torch.empty_like(x), "Meta")
    yield torch.ops.elsewhere.twice
    flop_registry.pop(torch.ops.elsewhere.twice, None)
    library._destroy()


def test_operations_without_a_formula_are_named(operation: Any) -> None:
    class Foreign(Conv):
        def more(self, tokens: Tensor) -> Tensor:
            with torch.no_grad():
                return operation(operation(tokens))

    for find in (_from_shapes, _measured):
        said = find(Foreign(), 16, 16).arithmetic
        assert said == "2.0 k forward; not counted, for want of a formula: elsewhere::twice (2 times)"

    @register_flop_formula(operation)
    def twice(x: Any, out_shape: Any = None) -> int:
        return 10**6

    assert _from_shapes(Foreign(), 16, 16).arithmetic == "2.0 M forward (elsewhere::twice 2.0 M, convolutions 2.0 k)"


def test_an_encoder_that_needs_numbers_is_measured() -> None:
    class Needy(Conv):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def more(self, tokens: Tensor) -> Tensor:
            assert tokens.sum().item() < 1e9
            return self.norm(tokens.transpose(1, 2)).transpose(1, 2)

    encoder = Needy().train()
    assert _from_shapes(encoder, 16, 24) is None
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    cost = _measured(encoder, 16, 24)
    assert cost.tokens == "6 (2 x 3) of width 4"
    assert "in evaluation" in cost.activations and "by running a black image of 16 x 24 pixels" in cost.origin
    encoder.gradient_checkpointing = True
    assert "while training" in _measured(encoder, 16, 24).activations
    assert encoder.training
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())


def test_sizes_and_mistakes(tmp_path: Path) -> None:
    assert spec_of_encoder("vit").data.image_size == 224
    assert spec_of_encoder("timm", ["model=test_vit", "image_size=96"]).data.image_size == 96
    assert spec_of_encoder("vit", image_size=[64, 32]).data.image_size == [64, 32]
    with pytest.raises(SpecError, match=r"encoder.dephts: unknown setting of 'vmamba'; did you mean 'depths'"):
        spec_of_encoder("vmamba", ["dephts=[1, 1, 1, 1]"])
    with pytest.raises(SpecError, match=r"100 x 100 is not a multiple of encoder.patch 16; take 96 x 96"):
        summarise_encoder(spec_of_encoder("vit", image_size=100))
    # Weights that a spec names are read, so that it is seen whether they fit.
    torch.save(ViT(width=32, heads=2).state_dict(), tmp_path / "vit.pt")
    settings = ["width=32", "heads=2", f"weights={tmp_path / 'vit.pt'}"]
    assert summarise_encoder(spec_of_encoder("vit", settings))["trained parameters"]
    with pytest.raises(WeightsError, match=r"vit\.pt do not fit ViT: .*missing keys"):
        summarise_encoder(spec_of_encoder("vit", [*settings, "depth=7"]))


def gibibytes(text: str) -> dict[str, float]:
    """"1.5 GiB: weights 1.0 GiB, activations 512.0 MiB" as name -> GiB, the sum under ""."""
    units = {"GiB": 1.0, "MiB": 2**-10, "KiB": 2**-20, "B": 2**-30}
    whole, _, parts = text.partition(": ")
    found = re.findall(r"([\w ]+?) ([\d.]+) ([KMG]?i?B)", parts)
    number, unit = whole.split()
    return {"": float(number) * units[unit]} | {name.strip(): float(n) * units[unit] for name, n, unit in found}


def test_a_full_size_report_system_is_shown_without_its_weights() -> None:
    found = summarise(build("r2gencsr-mimic-cxr"))
    assert found["parameters"] == "6,830,155,008" and found["  decoder"] == "6,738,415,616"
    trained = int(found["trained parameters"].replace(",", ""))
    projection = 1024 * 4096 + 4096 + 2 * 4096
    assert found["  projector"] == f"{projection:,}"
    assert trained == int(found["  encoder"].replace(",", "")) + projection
    whole, context, prompt, image, report = (int(n) for n in re.findall(r"\d+", found["tokens a study"])[:5])
    assert (image, report) == (49, 100) and whole == context + prompt + image + report
    # Six vectors, each in its own words.
    assert context % 3 == 0 and context > 6 * 10 and "estimates" in found["tokens a study"]

    bf16, four = (gibibytes(found[f"a step of 36{how}"]) for how in (", language model in bf16", ", in 4 bits"))
    for parts in (bf16, four):
        assert parts[""] == pytest.approx(sum(parts.values()) - parts[""], abs=0.3)
        assert parts["gradients and AdamW"] == pytest.approx(12 * trained / 2**30, abs=0.05)
    own = 4 * trained / 2**30
    assert bf16["weights"] == pytest.approx(own + 2 * 6_738_415_616 / 2**30, abs=0.06)
    # All but the word embeddings and the output layer, which are 2 x 32,000 x 4,096, and the norms.
    large, small = 6_738_415_616 - 2 * 32_000 * 4096 - 65 * 4096, 2 * 32_000 * 4096 + 65 * 4096
    assert four["weights"] == pytest.approx(own + (large * 4.5 / 8 + 2 * small) / 2**30, abs=0.06)
    assert four["activations"] == bf16["activations"] > 1


@pytest.mark.parametrize("residual", ["release", "after_projection", "none"])
@pytest.mark.parametrize("views", ["average", "concatenate"])
def test_tokens_of_a_study_are_those_of_its_prompt(residual: str, views: str, tmp_path: Path) -> None:
    from medxray.retrieval.context import context_tokens
    from medxray.types import Context

    task, spec = small_report(tmp_path, residual=residual, views=views)
    pooled, tokens = torch.zeros(1, 16), torch.zeros(1, 4 * (2 if views == "concatenate" else 1), 16)
    context = Context(torch.zeros(1, 2, 16), torch.zeros(1, 1, 16), [], [])
    vectors = context_tokens(spec.retriever.residual, pooled, context, task.projector.project, task.decoder.wrap_context)
    start, _ = task.decoder.prefix(task.projector(tokens), vectors)
    whole, shown_context = (int(n) for n in re.findall(r"\d+", summarise(build(spec))["tokens a study"])[:2])
    assert (whole, shown_context) == (start.shape[1] + 40, vectors.shape[1])


def test_activations_of_a_report_step_are_those_of_a_pass(tmp_path: Path) -> None:
    task, spec = small_report(tmp_path, residual="release", views="average")
    task.decoder.llm.bfloat16()
    shown = gibibytes(summarise(build(spec))["a step of 4, language model in bf16"])["activations"] * 2**30
    prompt = int(re.findall(r"\d+", summarise(build(spec))["tokens a study"])[0]) - 40

    class Step(nn.Module):
        channels = 1

        def __init__(self) -> None:
            super().__init__()
            self.task = task

        def forward(self, images: Tensor) -> Tensor:
            features = self.task.encoder(images.repeat(2, 1, 1, 1))
            vectors = torch.zeros(len(images), prompt + 40, 32, dtype=torch.bfloat16, requires_grad=True)
            mask = torch.ones(vectors.shape[:2], dtype=torch.long)
            mask[:, -1] = 0
            out = self.task.decoder.llm(
                inputs_embeds=vectors, attention_mask=mask, logits_to_keep=41, use_cache=False
            ).logits[:, :-1].float()
            self.kept = features
            return nn.functional.cross_entropy(out.flatten(0, 1), torch.zeros(len(images) * 40, dtype=torch.long))

    two, four = (_watched(Step(), count, 32, 32)[1].kept for count in (2, 4))
    assert shown == pytest.approx(4 * (four - two) / 2, rel=0.1)


def small_report(folder: Path, *, residual: str, views: str) -> tuple[Any, Spec]:
    """A report task with a frozen language model and a tokenizer, and its spec."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    known = "<pad> <s> </s> <unk> Human : < Img > / Note with . normal Generate a"
    words = {word: i for i, word in enumerate(known.split())}
    tokenizer = Tokenizer(models.WordLevel(words, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
        )
    ).save_pretrained(folder)
    spec = Spec.read({
        "task": "report",
        "data": {"reader": {"name": "csv", "root": str(folder)}, "image_size": 32, "views": views},
        "encoder": {"name": "vit", "width": 16, "depth": 1, "heads": 2, "patch": 16},
        "retriever": {"name": "nearest", "positives": 2, "negatives": 1, "residual": residual},
        "decoder": {"name": "causal-lm", "model": str(folder), "max_length": 40},
        "training": {"steps": 1, "batch_size": 4},
    })  # fmt: skip
    return build(spec).task, spec
