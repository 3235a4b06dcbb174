"""A model in two parts, its hidden states and its head, where the family is not known."""

import pytest
import torch
from tiny import VOCABULARY, tiny_model
from transformers import Llama4ForCausalLM, Llama4TextConfig, LlamaForCausalLM

from leap_pl.base_model.backbone import checkpoint_activations, head_of, set_modes, split_model
from leap_pl.errors import UserError
from leap_pl.losses.language import language_losses
from leap_pl.losses.objective import Objective

IDS = torch.randint(0, VOCABULARY, (2, 19), generator=torch.Generator().manual_seed(5))


class Shifted(LlamaForCausalLM):
    """A family that adds something to its logits."""

    def forward(self, *args: object, **kwargs: object) -> object:
        labels = kwargs.pop("labels", None)
        out = super().forward(*args, **kwargs)
        out.logits = out.logits + torch.linspace(-2, 2, out.logits.shape[-1])
        if labels is not None:
            out.loss = self.loss_function(out.logits, labels, vocab_size=out.logits.shape[-1])
        return out


@pytest.mark.filterwarnings("error:.*by an unknown method")
def test_a_model_that_is_its_own_base_model() -> None:
    """Llama 4's text model, which names the prefix of the multimodal one."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "intermediate_size_mlp": 48}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 256)
    model = Llama4ForCausalLM(Llama4TextConfig(**sizes, **tokens, num_local_experts=2)).eval()
    assert model.base_model is model
    states, head = split_model(model)
    torch.testing.assert_close(head(states(IDS).flatten(0, 1)), model(IDS).logits.flatten(0, 1))


def test_an_unknown_head_is_taken_whole_with_a_warning() -> None:
    model = tiny_model("llama")
    model.__class__ = Shifted
    model.train()
    with pytest.warns(UserWarning, match=r"Shifted computes its logits by an unknown method"):
        states, head = split_model(model)
    assert model.training
    loss, lm, _ = language_losses(states(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].reshape(-1), head, Objective(chunk=5))
    expected = model(input_ids=IDS, labels=IDS).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert abs(lm - tiny_model("llama")(input_ids=IDS, labels=IDS).loss) > 0.01
    wanted = torch.autograd.grad(expected, model.model.embed_tokens.weight)
    found = torch.autograd.grad(loss, model.model.embed_tokens.weight)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_checkpointed_models_are_not_random() -> None:
    """In train mode Phi-MoE samples its experts; blocks alone are in train mode, without which none is recomputed."""
    import transformers

    config = transformers.PhimoeConfig(
        **{"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "pad_token_id": 0},
        **{"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    )
    torch.manual_seed(0)
    model = transformers.PhimoeForCausalLM(config)
    ids = torch.randint(0, 64, (4, 32))
    with torch.no_grad():
        assert not torch.equal(*(model.train()(ids).logits for _ in range(2)))
    checkpoint_activations(model)
    set_modes(model, recomputing=True)
    runs: list[int] = []
    model.model.layers[0].self_attn.register_forward_pre_hook(lambda module, args: runs.append(1))
    passes = [model(ids).logits for _ in range(2)]
    assert torch.equal(*passes)
    passes[0].sum().backward()
    assert len(runs) == 3  # both passes, and once again in the backward one


def test_splitting_leaves_the_mode_as_it_is() -> None:
    for training in (True, False):
        model = tiny_model("llama").train(training)
        split_model(model)
        assert all(module.training == training for module in model.modules())


@pytest.mark.parametrize(("name", "value"), [("lm_head_multiplier", 3.0), ("logits_soft_cap", 2.0)])
def test_factors_and_caps_of_logits_by_other_names(name: str, value: float) -> None:
    """As Falcon-H1 and RecurrentGemma call them."""
    model = tiny_model()
    setattr(model.config, name, value)
    plain = model.lm_head.forward

    class Changed(type(model)):  # type: ignore[misc]
        def forward(self, *arguments: object, **options: object) -> object:
            found = super().forward(*arguments, **options)
            logits = found.logits
            found.logits = logits * value if name == "lm_head_multiplier" else value * torch.tanh(logits / value)
            return found

    model.__class__ = Changed
    head = head_of(model)
    assert head is not None
    hidden = torch.randn(3, 32)
    expected = plain(hidden) * value if name == "lm_head_multiplier" else value * torch.tanh(plain(hidden) / value)
    assert torch.allclose(head(hidden), expected, atol=1e-5)


def test_blocks_that_cannot_be_recomputed_are_told() -> None:
    model = tiny_model()
    model.supports_gradient_checkpointing = False
    with pytest.raises(UserError, match="cannot recompute its decoder blocks"):
        checkpoint_activations(model)
