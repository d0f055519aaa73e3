"""What stands before the first learned token takes no part in the backward pass, and changes neither loss nor gradient."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from medxray.llm.causal_lm import CausalLM, learn_tokenizer


@pytest.mark.parametrize("trainable", [False, True])
def test_loss_and_gradient_with_and_without(trainable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reports = ["the heart is large .", "clear lungs and a normal heart"]
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    learn_tokenizer(reports, 300, words=False).save_pretrained(tmp_path)
    decoder = CausalLM(0, model=str(tmp_path), trainable=trainable)
    visual = torch.randn(2, 5, 32, requires_grad=True)
    context = torch.cat([decoder.wrap_context(torch.randn(2, 1, 32), pool) for pool in ("negative", "positive")], 1).detach()
    lengths: list[int] = []
    decoder.llm.base_model.layers[0].register_forward_pre_hook(lambda layer, inputs: lengths.append(inputs[0].shape[1]))

    def run(context: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        visual.grad = None
        lengths.clear()
        loss = decoder.loss(visual, context, reports)
        loss.backward()
        assert visual.grad is not None
        return loss.detach(), visual.grad.clone()

    loss, gradient = run(context)
    passes = list(lengths)
    again, other = run(context.clone().requires_grad_())
    torch.testing.assert_close(loss, again)
    torch.testing.assert_close(gradient, other, atol=1e-6, rtol=1e-4)
    if trainable:
        assert passes == lengths and len(passes) == 1
    else:
        assert len(passes) == 2 and passes[0] > context.shape[1] and sum(passes) == sum(lengths)
