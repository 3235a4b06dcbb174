"""The weights of a base model: which of them are gated, and the fingerprint of all."""

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from conftest import one_line
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, tiny_folder, tiny_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from leap_pl.base_model.loading import load_model
from leap_pl.base_model.stored_weights import read_shapes
from leap_pl.base_model.weights import (
    FINGERPRINT_SAMPLES,
    Weight,
    _describe,
    _weights_of,
    decoder_blocks,
    find_weights,
    fingerprint,
    model_fingerprint,
    rest_fingerprint,
)
from leap_pl.cli.export import export_command
from leap_pl.cli.prune import prune_command
from leap_pl.errors import UserError, warn_once
from leap_pl.evaluation.subject import realised_sparsity
from leap_pl.gates import BernoulliGate, GateState, attach, detach
from leap_pl.training.trained_weights import TrainedWeights
from leap_pl.training.weights import WeightTraining, norms_in, norms_of

BLOCKS = {"opt": "model.decoder.layers", "gpt_neox": "gpt_neox.layers", "gpt2": "transformer.h"}
ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
LLAMA = [*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
PROJECTIONS = {
    "phi3": ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"],
    "opt": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2"],
    "gpt_neox": ["attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
    "gpt2": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
    "mixtral": [*ATTENTION, "mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_default_is_every_linear_of_the_blocks(family: str) -> None:
    model = tiny_model(family)
    weights = find_weights(model)
    for layer in (0, 1):
        found = [w.projection for w in weights.values() if w.layer == layer]
        assert sorted(found) == sorted(PROJECTIONS.get(family, LLAMA))
    parameters = dict(model.named_parameters())
    assert list(weights) == [name for name in parameters if name in weights]
    for name, weight in weights.items():
        assert weight.name == name
        assert weight.parameter is parameters[name]
        assert weight.parameter is getattr(weight.module, weight.tensor)
        assert weight.layer is not None
        assert (
            name.removesuffix(".weight") == f"{BLOCKS.get(family, 'model.layers')}.{weight.layer}.{weight.projection}"
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_input_dim_is_the_one_that_inputs_run_along(family: str) -> None:
    for weight in find_weights(tiny_model(family)).values():
        if isinstance(weight.module, nn.Linear):
            assert weight.parameter.shape[weight.input_dim] == weight.module.in_features
        elif isinstance(weight.module, Conv1D):
            assert weight.parameter.shape[weight.input_dim] == weight.module.nx
        else:
            inputs = {"mlp.experts.gate_up_proj": 32, "mlp.experts.down_proj": 48}[weight.projection]
            assert weight.parameter.ndim == 3
            assert weight.parameter.shape[weight.input_dim] == inputs


@pytest.mark.parametrize("family", ["Llama4Text", "GptOss", "Mixtral"])
def test_input_dim_of_stacked_experts_by_what_they_compute(family: str) -> None:
    """Without one of its inputs, an expert gives what it gives when that input's weights are zero."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    kinds = {"Llama4Text": Llama4TextExperts, "GptOss": GptOssExperts, "Mixtral": MixtralExperts}
    config = getattr(transformers, f"{family}Config")(
        hidden_size=6, intermediate_size=10, num_local_experts=2, num_experts_per_tok=2, num_hidden_layers=1
    )
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    experts = kinds[family](config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    model = nn.ModuleDict({"experts": experts})
    inputs = torch.randn(4, 6)

    def output(x: torch.Tensor) -> torch.Tensor:
        if family == "Llama4Text":
            return experts(x)
        every = torch.arange(2).expand(4, 2)
        return experts(x, every, torch.full((4, 2), 0.5))

    weight = next(w for w in _described(model) if w.tensor == "gate_up_proj")
    lacking = inputs.clone()
    lacking[:, 2] = 0
    with torch.no_grad():
        expected = output(lacking)
        assert not torch.allclose(output(inputs), expected)
        weight.parameter.select(weight.input_dim, 2).zero_()
        torch.testing.assert_close(output(inputs), expected)


def _described(model: nn.Module) -> list[Weight]:
    found = (_describe(*place, "nowhere", 0) for place in _weights_of(model))
    return [weight for weight in found if weight is not None]


@pytest.mark.parametrize("family", FAMILIES)
def test_decoder_blocks(family: str) -> None:
    model = tiny_model(family)
    name, blocks = decoder_blocks(model)
    assert name == BLOCKS.get(family, "model.layers")
    assert model.get_submodule(name) is blocks
    assert len(blocks) == 2


def test_a_model_without_blocks_is_refused() -> None:
    model = tiny_model("llama")
    model.config.num_hidden_layers = 5
    with pytest.raises(UserError, match="no list of 5 decoder blocks"):
        find_weights(model)


@pytest.mark.parametrize(
    ("targets", "ignore", "expected"),
    [
        (["Linear"], ["lm_head"], [f"{i}.{p}" for i in (0, 1) for p in LLAMA]),
        (["re:.*\\.mlp\\..*"], [], [f"{i}.mlp.{p}_proj" for i in (0, 1) for p in ("gate", "up", "down")]),
        (["re:.*up_proj$"], [], ["0.mlp.up_proj", "1.mlp.up_proj"]),
        (["re:.*up_proj\\.weight$"], [], ["0.mlp.up_proj", "1.mlp.up_proj"]),
        (["model.layers.1.mlp.up_proj"], [], ["1.mlp.up_proj"]),
        (["model.layers.1.mlp.up_proj.weight"], [], ["1.mlp.up_proj"]),
        (["model.layers.1.mlp.up_proj", "re:.*0.*o_proj"], [], ["0.self_attn.o_proj", "1.mlp.up_proj"]),
        (
            None,
            ["re:.*self_attn", "model.layers.0.mlp.up_proj"],
            ["0.mlp.gate_proj", "0.mlp.down_proj"] + [f"1.{p}" for p in LLAMA[4:]],
        ),
        (None, ["re:model\\.layers\\.0\\."], [f"1.{p}" for p in LLAMA]),
    ],
)  # fmt: skip
def test_targets_and_ignore(targets: list[str] | None, ignore: list[str], expected: list[str]) -> None:
    found = find_weights(tiny_model("llama"), targets, ignore)
    assert list(found) == [f"model.layers.{name}.weight" for name in expected]


def test_class_names() -> None:
    assert len(find_weights(tiny_model("gpt2"), ["Conv1D"])) == 8
    experts = find_weights(tiny_model("mixtral"), ["MixtralExperts"])
    assert [w.projection for w in experts.values()] == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] * 2
    # Only by name: the default leaves routers and heads alone.
    assert len(find_weights(tiny_model("mixtral"), ["re:.*mlp\\.gate"])) == 2
    (head,) = find_weights(tiny_model("llama"), ["lm_head"]).values()
    assert (head.layer, head.projection) == (None, "lm_head")


@pytest.mark.parametrize("pattern", ["up_proj", "re:up_proj", "linear", "re:layers", "Embedding", "embed_tokens"])
def test_a_part_of_a_name_is_no_name(pattern: str) -> None:
    with pytest.raises(UserError, match="nothing to gate"):
        find_weights(tiny_model("llama"), [pattern])


@pytest.mark.parametrize("family", FAMILIES)
def test_when_nothing_matches_the_message_lists_what_does(family: str) -> None:
    model = tiny_model(family)
    with pytest.raises(UserError) as caught:
        find_weights(model, ["nonsense"], ["re:more"])
    message = one_line(caught)
    assert "nonsense without re:more" in message
    assert type(model).__name__ in message
    listed = re.findall(r"re:\S+?(?=[,.]?(?:\s|$))", message.split("It has:")[1])
    matched = {w.projection for pattern in listed for w in find_weights(model, [pattern]).values()}
    assert matched >= set(PROJECTIONS.get(family, LLAMA))


def test_everything_ignored_is_nothing_to_gate() -> None:
    with pytest.raises(UserError, match=r"the default .* without re:\.\* matches no weight"):
        find_weights(tiny_model("llama"), None, ["re:.*"])


def test_a_pattern_that_is_no_regular_expression() -> None:
    with pytest.raises(UserError, match=r"re:\( is not a regular expression"):
        find_weights(tiny_model("llama"), ["re:("])


def test_a_tied_head_is_refused() -> None:
    tied = tiny_model("llama", tie_word_embeddings=True)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    with pytest.raises(UserError, match=r"lm_head\.weight is the same tensor as model\.embed_tokens\.weight"):
        find_weights(tied, ["Linear"])
    assert len(find_weights(tied, ["Linear"], ["lm_head"])) == 14


# -- fingerprints -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_gates_do_not_change_the_fingerprint_nor_the_weights_found(family: str) -> None:
    model = tiny_model(family)
    before, weights = model_fingerprint(model), find_weights(model)
    assert re.fullmatch("[0-9a-f]{16}", before)
    attach(weights, BernoulliGate, GateState())
    assert model_fingerprint(model) == before
    again = find_weights(model)
    assert list(again) == list(weights)
    assert all(again[n].parameter is weights[n].parameter for n in weights)
    assert [w.input_dim for w in again.values()] == [w.input_dim for w in weights.values()]
    by_class = {"gpt2": "Conv1D", "mixtral": "MixtralExperts"}.get(family, "Linear")
    assert set(find_weights(model, [by_class], ["lm_head", "embed_out"])) & set(weights)
    detach(weights)
    assert model_fingerprint(model) == before


def test_one_checkpoint_in_two_precisions_has_one_fingerprint(tmp_path: Path) -> None:
    folder = str(tiny_folder(tmp_path / "m"))
    loaded = {dtype: load_model(folder, dtype=dtype) for dtype in ("auto", "float32", "bfloat16")}
    assert loaded["bfloat16"].dtype == torch.bfloat16
    assert len({model_fingerprint(m) for m in (*loaded.values(), tiny_model("llama"))}) == 1
    assert len({rest_fingerprint(m) for m in (*loaded.values(), tiny_model("llama"))}) == 1


@pytest.mark.parametrize("layout", ["safetensors", "sharded", "bin"])
def test_weights_are_loaded_as_they_are_stored_whatever_config_says(layout: str, tmp_path: Path) -> None:
    """transformers rounds them to the type of config.json: they would not be the files', nor of one fingerprint."""
    folder, model = tmp_path / "m", tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0] *= 2.0**-17
    if layout == "bin":
        model.config.save_pretrained(folder)
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    else:
        model.save_pretrained(folder, max_shard_size="20KB" if layout == "sharded" else "5GB")
    assert (folder / "model.safetensors.index.json").exists() == (layout == "sharded")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    loaded = load_model(str(folder))
    assert loaded.dtype == torch.float32
    assert all(torch.equal(one, other) for one, other in zip(loaded.parameters(), model.parameters(), strict=True))
    others = [load_model(str(folder), dtype=dtype) for dtype in ("float32", "bfloat16", "float16")]
    assert [each.dtype for each in others] == [torch.float32, torch.bfloat16, torch.float16]
    assert {model_fingerprint(each) for each in others} == {model_fingerprint(model)}
    assert {rest_fingerprint(each) for each in others} == {rest_fingerprint(model)}


def test_matrices_of_another_type_than_most_are_said_to_be_rounded(tmp_path: Path) -> None:
    """The model has one data type: an export of it does not have their bits."""
    folder, wide = tiny_folder(tmp_path / "m"), "model.layers.1.mlp.up_proj.weight"
    exact = load_file(folder / "model.safetensors")
    save_file({name: tensor if name == wide else tensor.bfloat16() for name, tensor in exact.items()},
              folder / "model.safetensors", {"format": "pt"})  # fmt: skip
    prune_command(str(folder), str(tmp_path / "mask"), method="magnitude")
    stored = read_shapes(folder)
    assert stored is not None
    parameters = {name: tensor.bfloat16() for name, tensor in exact.items() if name != wide}
    for blocks, rounded in (("model.layers", [wide]), ("model.language_model.layers", [])):
        assert stored.rounded_in(parameters, torch.bfloat16, blocks) == rounded
    warn_once.cache_clear()
    with pytest.warns(UserWarning, match=f"most of its weights are stored in bfloat16, to which {wide} are rounded"):
        export_command(str(tmp_path / "out"), mask=str(tmp_path / "mask"))
    export_command(str(tmp_path / "packed"), model=str(tmp_path / "out"), format="packed")
    for made in ("out", "packed"):
        card = (tmp_path / made / "README.md").read_text()
        assert "the base model's, some of them rounded from another data type; 0 of them were zero already" in card
        assert "bit for bit" not in card


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_every_parameter_is_in_one_of_two_fingerprints(family: str) -> None:
    model = tiny_model(family)
    before = [model_fingerprint(model), rest_fingerprint(model)]
    for name, parameter in model.named_parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.add_(1)
            now = [model_fingerprint(model), rest_fingerprint(model)]
            parameter.copy_(kept)
        assert sum(a != b for a, b in zip(now, before, strict=True)) == 1, name


def test_float16_which_rounds_small_weights_keeps_the_fingerprint(tmp_path: Path) -> None:
    folder, model = str(tmp_path / "m"), tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0] *= 2.0**-17  # float16 is 2**-24 apart there
        model.model.embed_tokens.weight[0] *= 2.0**-17
    model.to(torch.bfloat16).save_pretrained(folder)
    stored, rounded = load_model(folder), load_model(folder, dtype="float16")
    assert (stored.dtype, rounded.dtype) == (torch.bfloat16, torch.float16)
    one, other = (each.model.layers[0].mlp.up_proj.weight for each in (rounded, stored))
    assert not torch.equal(one.bfloat16(), other)
    assert model_fingerprint(rounded) == model_fingerprint(stored)
    assert rest_fingerprint(rounded) == rest_fingerprint(stored)
    with torch.no_grad():
        rounded.model.layers[0].mlp.up_proj.weight[1] = 0  # pruned since, it is another model
        assert model_fingerprint(rounded) != model_fingerprint(stored)
        rounded.model.layers[0].mlp.up_proj.weight.copy_(other)
    assert model_fingerprint(rounded) == model_fingerprint(stored)
    again = str(tmp_path / "rounded")  # saved, it is another model
    rounded.save_pretrained(again)
    assert model_fingerprint(load_model(again, dtype="float16")) != model_fingerprint(stored)


SMALL = {
    **{"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
EXPERTS = {"num_experts": 3, "num_local_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8}


@pytest.mark.parametrize(
    ("stem", "more", "routers"),
    [
        ("Llama4", {"intermediate_size_mlp": 24, "interleave_moe_layer_step": 1, **EXPERTS}, ["feed_forward.router"]),
        ("Qwen2Moe", {"shared_expert_intermediate_size": 8, **EXPERTS}, ["mlp.shared_expert_gate"]),
        ("Phimoe", EXPERTS, ["mlp.router"]),
        ("HunYuanMoEV1", {"moe_topk": 2, **EXPERTS}, ["mlp.gate.wg"]),
    ],
)
def test_a_router_is_no_projection(stem: str, more: dict[str, object], routers: list[str]) -> None:
    """Pruning one sends tokens to other experts; by name it can be chosen all the same."""
    name = f"{stem}TextConfig" if stem == "Llama4" else f"{stem}Config"
    model = getattr(transformers, f"{stem}ForCausalLM")(getattr(transformers, name)(**SMALL, **more))
    found = {weight.projection for weight in find_weights(model).values()}
    assert any("experts" in projection for projection in found)
    assert not found & set(routers)
    named = {weight.projection for weight in find_weights(model, [f"re:.*{router}" for router in routers]).values()}
    assert named >= set(routers)


def test_coefficients_that_mix_streams_are_no_projections() -> None:
    """Gemma 3n's AltUp: four streams, mixed by matrices of 4 × 4 and 16 × 4."""
    config = transformers.Gemma3nTextConfig(
        **SMALL,
        **{"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "laurel_rank": 4},
        **{"num_kv_shared_layers": 0, "layer_types": ["full_attention"] * 2, "activation_sparsity_pattern": [0.0, 0.0]},
    )
    found = {weight.projection for weight in find_weights(transformers.Gemma3nForCausalLM(config)).values()}
    assert {"self_attn.q_proj", "mlp.down_proj", "laurel.linear_left", "per_layer_input_gate"} <= found
    assert not any("coefs" in projection for projection in found)


def test_experts_in_a_form_of_their_own_are_told() -> None:
    """DBRX has all experts of a block in one matrix, which the default leaves dense."""
    ffn = {"hidden_size": 16, "ffn_hidden_size": 24, "moe_num_experts": 3, "moe_top_k": 2}
    config = transformers.DbrxConfig(
        **{"d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 32, "vocab_size": 64},
        ffn_config=ffn,
        attn_config={"kv_n_heads": 2, "rope_theta": 10000.0},
    )
    model = transformers.DbrxForCausalLM(config)
    warn_once.cache_clear()
    with pytest.warns(UserWarning, match=r"experts\.mlp\.w1, .* stay dense, and the sparsity is that of the other"):
        find_weights(model)
    warn_once.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find_weights(model, ignore=["re:.*experts.*"])
        for family in FAMILIES:
            find_weights(tiny_model(family))


@pytest.mark.parametrize(("outputs", "selected"), [(3, False), (48, True)])
def test_a_linear_called_gate_is_a_router_if_it_has_an_output_for_each_expert(outputs: int, selected: bool) -> None:
    model = tiny_model("mixtral")  # of three experts
    model.model.layers[0].extra = torch.nn.ModuleDict({"gate": torch.nn.Linear(32, outputs)})
    assert ("model.layers.0.extra.gate.weight" in find_weights(model)) == selected


def test_other_weights_of_three_dimensions_are_no_experts() -> None:
    """Mixing coefficients and gates of recurrent layers."""
    rwkv = transformers.RwkvForCausalLM(
        transformers.RwkvConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, context_length=32)
    )
    found = find_weights(rwkv).values()
    assert {weight.parameter.ndim for weight in found} == {2}
    assert any(parameter.ndim == 3 for parameter in rwkv.parameters())


@pytest.mark.parametrize("module", [torch.nn.Conv1d(4, 4, 3, groups=4), torch.nn.Conv1d(4, 8, 1)])
def test_a_convolution_is_no_projection(module: torch.nn.Module) -> None:
    """Of hybrid models: three dimensions, as stacked experts have."""
    model = tiny_model("llama")
    before = find_weights(model)
    model.model.layers[0].conv = module
    assert find_weights(model).keys() == before.keys()


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_one_changed_weight_changes_the_fingerprint(family: str) -> None:
    """First and last of every tensor, and every element of a tiny one, targeted or not."""
    model = tiny_model(family)
    before = model_fingerprint(model)
    prefix = decoder_blocks(model)[0]
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or not name.startswith(prefix):
            continue
        inside = [parameter.numel() // 3] if parameter.numel() <= FINGERPRINT_SAMPLES else []
        for place in (0, *inside, -1):
            flat = parameter.data.view(-1)
            old = flat[place].clone()
            flat[place] = old * 1.01
            assert model_fingerprint(model) != before, name
            flat[place] = old
    assert model_fingerprint(model) == before


def test_what_is_outside_the_blocks_does_not_count() -> None:
    model = tiny_model("llama")
    before = model_fingerprint(model)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.model.embed_tokens.weight.zero_()
    assert model_fingerprint(model) == before


def test_names_and_shapes_count_and_order_does_not() -> None:
    a, b = torch.arange(6.0), torch.ones(4)
    assert fingerprint({"a": a, "b": b}) == fingerprint({"b": b, "a": a})
    assert fingerprint({"a": a}) != fingerprint({"b": a})
    assert fingerprint({"a": a}) != fingerprint({"a": a.view(2, 3)})
    assert fingerprint({"a": a, "b": b}) != fingerprint({"a": b, "b": a})


def test_of_a_large_tensor_evenly_spaced_elements_count() -> None:
    """First and last among them, and 4096 in all; a matrix seen transposed is its own."""
    large = torch.zeros(300, 400)
    before = fingerprint({"a": large})
    counted = 0
    for place in [0, large.numel() - 1, *range(1, 290)]:
        large.view(-1)[place] = 1
        counted += fingerprint({"a": large}) != before
        large.view(-1)[place] = 0
    assert 2 + 289 * 4096 // large.numel() - 1 <= counted <= 2 + 289 * 4096 // large.numel() + 1
    million = torch.zeros(1025, 1024)  # 4096 times whose number of elements is beyond 32 bits
    before = fingerprint({"a": million})
    million[-1, -1] = 1
    assert fingerprint({"a": million}) != before
    matrix = torch.randn(80, 90)
    assert fingerprint({"a": matrix.T}) == fingerprint({"a": matrix.T.contiguous()})


def test_norms_of_a_model_that_also_sees_are_those_that_text_passes() -> None:
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**small, "vocab_size": 260, "num_key_value_heads": 2, "head_dim": 8}
    vision = {**small, "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = transformers.Gemma3ForConditionalGeneration(config)
    every, found = ({norm.name for norm in norms} for norms in (norms_in(model), norms_of(model)))
    within = decoder_blocks(model)[0].removesuffix(".layers")
    assert found == {name for name in every if name.startswith(f"{within}.")}
    assert f"{within}.norm.weight" in found
    assert any("vision" in name for name in every - found)
    for targets in (["Linear"], [r"re:.*\.mlp\..*"], [r"re:.*q_proj"], None):
        chosen = find_weights(model, targets, ["lm_head"])  # which is the embeddings' here
        assert chosen
        assert all(name.startswith(f"{within}.") for name in chosen)
    with pytest.raises(UserError, match=r"lm_head\.weight is the same tensor"):
        find_weights(model, ["Linear"])
    with pytest.raises(UserError, match=r"vision_tower\.\* matches no weight of Gemma3"):
        find_weights(model, ["Linear", "re:.*vision_tower.*"])


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_of_a_model_of_text_are_all_of_its_norms(family: str) -> None:
    model = tiny_model(family)
    assert [norm.name for norm in norms_of(model)] == [norm.name for norm in norms_in(model)]


def test_stacked_experts_are_known_by_the_name_of_their_module_too() -> None:
    """A class of another name, as of remote code, would leave most weights of the model dense."""
    model = tiny_model("mixtral")
    expected = list(find_weights(model))
    experts = type(model.model.layers[0].mlp.experts)
    other = type("NaiveMoe", (experts,), {})
    for layer in model.model.layers:
        layer.mlp.experts.__class__ = other
    assert list(find_weights(model)) == expected
    assert any(parameter.parameter.ndim == 3 for parameter in find_weights(model).values())


def test_a_tensor_that_layers_share_is_counted_once() -> None:
    """As Zamba 2 shares its blocks; gating it is refused."""
    model = tiny_model()
    first, second = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    with torch.no_grad():
        first.mlp.up_proj.weight[0] = 0
    with pytest.raises(UserError, match="is the same tensor as"):
        find_weights(model)
    found = find_weights(model, once=True)
    assert "model.layers.0.mlp.up_proj.weight" in found
    assert "model.layers.1.mlp.up_proj.weight" not in found
    counted = realised_sparsity(model)
    assert counted["counted"] == sum(weight.parameter.numel() for weight in found.values())
    assert counted["weights"]["model.layers.0.mlp.up_proj.weight"] == pytest.approx(1 / first.mlp.up_proj.out_features)
    of_first = sum(weight.parameter.numel() for name, weight in found.items() if ".layers.0." in name)
    assert counted["layers"] == pytest.approx({"0": first.mlp.up_proj.in_features / of_first, "1": 0})
    assert counted["projections"].pop("mlp.up_proj") == pytest.approx(1 / first.mlp.up_proj.out_features)
    assert {*counted["projections"].values()} == {0}


def test_what_selects_tokens_or_experts_is_not_gated() -> None:
    """The indexer of sparse attention has no gradient of the loss, and the router of ZAYA is several layers."""
    config = transformers.DeepseekV32Config(
        vocab_size=260, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        first_k_dense_replace=1, index_n_heads=2, index_head_dim=8, index_topk=4,
    )  # fmt: skip
    found = find_weights(transformers.DeepseekV32ForCausalLM(config))
    assert any(".self_attn." in name for name in found)
    assert not any(".indexer." in name for name in found)


def test_norms_that_blocks_share_are_one() -> None:
    """As in Zamba 2, whose blocks are one."""
    model = tiny_model()
    first, second = model.model.layers
    second.input_layernorm.weight = first.input_layernorm.weight
    whole = TrainedWeights("norms", WeightTraining(), None, GateState(), torch.float32)
    whole.train_norms(norms_of(model))
    names = [name for name in whole if "input_layernorm" in name]
    assert names == ["model.layers.0.input_layernorm.weight"]


def test_rwkv_keeps_its_weights_when_it_is_used(tmp_path: Path) -> None:
    """transformers divides some of them in place at the first use in eval mode."""
    config = transformers.RwkvConfig(
        vocab_size=260, hidden_size=16, num_hidden_layers=2, context_length=32, rescale_every=1
    )
    torch.manual_seed(0)
    made = transformers.RwkvForCausalLM(config).eval()
    made.save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        logits = model(ids).logits
        expected = made(ids).logits  # which divides
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert torch.allclose(logits, expected, atol=1e-3)  # but for the epsilon of its norms
