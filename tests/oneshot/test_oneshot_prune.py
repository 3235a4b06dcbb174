"""``prune`` on every family's tiny model."""

import json
import logging
import sys
from collections import UserDict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from matrices import all_matrices, tokens
from tiny import FAMILIES, tiny_model, token_dependent_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BloomConfig, BloomForCausalLM, GptOssConfig, GptOssForCausalLM

from leap_pl.base_model.weights import find_weights, model_fingerprint
from leap_pl.errors import UserError
from leap_pl.masks import MaskSet
from leap_pl.masks.bits import PackedMasks
from leap_pl.masks.patterns import NM, Pattern, Unstructured
from leap_pl.oneshot.allocation import OwlOptions, read_layer_sparsities
from leap_pl.oneshot.damping import NotSolvableError
from leap_pl.oneshot.fisher import FisherOptions
from leap_pl.oneshot.methods import METHODS
from leap_pl.oneshot.prune import _Run, prune
from leap_pl.oneshot.sparsegpt import SparseGPTOptions
from leap_pl.oneshot.walk import WalkOptions

# -- prune --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", [Unstructured(0.6), NM(2, 4)], ids=repr)
def test_every_family_is_pruned_exactly(family: str, method: str, pattern: Pattern) -> None:
    model = tiny_model(family)
    dense = {name: weight.parameter.clone() for name, weight in find_weights(model).items()}
    fingerprint = model_fingerprint(model)
    pruned = prune(model, tokens(), method=method, pattern=pattern, progress=False)

    assert pruned.masks.provenance.fingerprint == fingerprint
    assert list(pruned.masks.masks) == list(dense)
    parameters = dict(model.named_parameters())
    for name, mask in pruned.masks.masks.items():
        assert not parameters[name][~mask].any()
        assert torch.isfinite(parameters[name]).all()
        if not METHODS[method].updates:
            assert torch.equal(parameters[name], dense[name] * mask)
        else:
            assert not torch.equal(parameters[name], dense[name] * mask)
    for matrix in all_matrices(model):
        mask_OI = matrix.view(pruned.masks.masks[matrix.weight.name])
        if isinstance(pattern, NM):
            groups = mask_OI[:, : matrix.size // 4 * 4].unflatten(1, (-1, 4))
            assert (groups.sum(2) == 2).all()
        elif method in ("wanda", "sparseswaps"):
            assert (mask_OI.sum(1) == round(0.4 * matrix.size)).all()
        else:
            assert int(mask_OI.sum()) == round(0.4 * mask_OI.numel())
        assert 0 < pruned.errors[matrix.name] < 1
    assert not pruned.dampings
    assert torch.isfinite(model(input_ids=tokens()).logits).all()


@pytest.mark.parametrize("method", ["wanda", "admm"])
def test_a_layer_error_is_that_of_its_outputs(method: str) -> None:
    """‖X(W' − W)ᵀ‖² / ‖XWᵀ‖², of the first block, whose inputs no pruning changes."""
    model, seen = tiny_model().eval(), []
    name = "model.layers.0.mlp.up_proj"
    dense, block = model.get_submodule(name).weight.detach().double(), tokens()
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    with torch.no_grad():
        model(input_ids=block)
    hook.remove()
    error = prune(model, block, method=method, pattern=0.5, progress=False).errors[f"{name}.weight"]
    x, pruned = seen[0].flatten(0, -2).double(), model.get_submodule(name).weight.detach().double()
    expected = (x @ (pruned - dense).T).square().sum() / (x @ dense.T).square().sum()
    assert error == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_errors_fall_from_method_to_method(family: str) -> None:
    means = []
    for method in METHODS:
        model = tiny_model(family)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name or "ln_" in name:  # inputs of unequal size: else magnitude is as good as Wanda
                    parameter.mul_(torch.linspace(0.2, 3, parameter.numel()))
        errors = prune(model, tokens(24), method=method, pattern=0.5, progress=False).errors
        means.append(sum(errors.values()) / len(errors))
    assert all(earlier > later for earlier, later in pairwise(means)), means


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["gemma3", "mixtral", "gpt2"])
def test_without_update_the_model_is_bit_identical(family: str, method: str) -> None:
    model = tiny_model(family).to(torch.bfloat16)
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    masks = prune(model, tokens(), method=method, pattern=0.5, update=False, progress=False).masks
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training
    assert model.get_experts_implementation() == tiny_model(family).get_experts_implementation()
    updated = prune(model, tokens(), method=method, pattern=0.5, progress=False).masks
    assert all(torch.equal(masks.masks[name], updated.masks[name]) for name in masks.masks)


class Precisions(TorchDispatchMode):
    """The precisions of float32 products that hold where each operation runs."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, set[str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found.setdefault(func.overloadpacket.__name__, set()).add(torch.get_float32_matmul_precision())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["admm", "sparsegpt", "sparseswaps"])
def test_hessians_and_solves_are_in_full_float32(method: str) -> None:
    """Of all products only the model's own are as the process has set them."""
    torch.set_float32_matmul_precision("high")
    with Precisions() as operations:
        prune(tiny_model(), tokens(), method=method, progress=False)
    assert torch.get_float32_matmul_precision() == "high"
    solved = {"admm": "cholesky_inverse", "sparsegpt": "addr_", "sparseswaps": "gather"}[method]
    assert operations.found["addmm_"] == operations.found[solved] == {"highest"}  # of the Hessian, and within the solve
    assert operations.found["mm"] == {"high", "highest"}
    assert operations.found["silu"] == {"high"}


def test_magnitude_needs_no_text() -> None:
    with_text = prune(tiny_model(), tokens(), method="magnitude", progress=False)
    without = prune(tiny_model(), None, method="magnitude", progress=False)
    assert all(torch.equal(with_text.masks.masks[n], without.masks.masks[n]) for n in without.masks.masks)
    assert with_text.errors
    assert not without.errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_models(method: str, dtype: torch.dtype) -> None:
    model = tiny_model("llama").to(dtype)
    pruned = prune(model, tokens(), method=method, pattern=0.5, progress=False)
    assert pruned.masks.sparsity == pytest.approx(0.5)
    assert all(p.dtype == dtype and torch.isfinite(p).all() for p in model.parameters())


def test_weights_that_the_data_type_cannot_hold_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the last block too, after which nothing reads them."""
    real = _Run._solve

    def huge(self: Any, matrix: Any, dense_OI: torch.Tensor, *given: Any) -> Any:
        found = real(self, matrix, dense_OI, *given)
        last = ".layers.1.mlp.down_proj" in matrix.name
        return found._replace(weight=torch.full_like(dense_OI, 1e5)) if last else found

    monkeypatch.setattr(_Run, "_solve", huge)
    model = tiny_model("llama").half()
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.down_proj.*too large for float16\. Load the model in"):
        prune(model, tokens(), method="sparsegpt", pattern=0.5, progress=False)
    prune(tiny_model("llama").bfloat16(), tokens(), method="sparsegpt", pattern=0.5, progress=False)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "admm"])
def test_dead_and_huge_inputs_and_few_tokens(method: str) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[:6] = 0
            layer.post_attention_layernorm.weight[3] = 1e5
            layer.mlp.up_proj.weight[:9] = 0
    pruned = prune(model, tokens(1, 5), method=method, pattern=0.5, progress=False)
    assert pruned.masks.sparsity == pytest.approx(0.5)
    assert all(0 <= error < 1 for error in pruned.errors.values())
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "admm"])
def test_an_expert_without_tokens_is_pruned_by_magnitude(method: str, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("mixtral", num_local_experts=16, num_experts_per_tok=1)
    with caplog.at_level(logging.WARNING):
        pruned = prune(model, tokens(1, 4), method=method, pattern=0.5, progress=False)
    assert pruned.unseen
    assert pruned.unseen[0] in caplog.text
    assert pruned.masks.sparsity == pytest.approx(0.5)
    for matrix in all_matrices(model):
        if matrix.name in pruned.unseen:
            kept = matrix.view(pruned.masks.masks[matrix.weight.name])
            assert int(kept.sum()) == kept.numel() // 2
            original = matrix.view(dict(tiny_model("mixtral", num_local_experts=16, num_experts_per_tok=1)
                                        .named_parameters())[matrix.weight.name])  # fmt: skip
            assert original[kept].abs().min() >= original[~kept].abs().max()
            assert torch.equal(matrix.dense(), original * kept)


@pytest.mark.parametrize("method", ["wanda", "sparseswaps", "sparsegpt", "admm"])
def test_inputs_that_are_all_zero_say_nothing(method: str) -> None:
    """Every score would be 0, and which weights are kept would be a matter of their places."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight.zero_()
    up = model.model.layers[1].mlp.up_proj.weight.detach().clone()
    pruned = prune(model, tokens(), method=method, pattern=0.5, progress=False)
    name = "model.layers.1.mlp.up_proj.weight"
    assert name in pruned.unseen
    assert "model.layers.0.mlp.up_proj.weight" not in pruned.unseen
    kept = pruned.masks.masks[name]
    assert int(kept.sum()) == kept.numel() // 2
    assert up[kept].abs().min() >= up[~kept].abs().max()


@pytest.mark.parametrize("method", METHODS)
def test_transposed_experts_with_biases(method: str) -> None:
    config = GptOssConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=3,
        num_experts_per_tok=2,
        sliding_window=8,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    torch.manual_seed(0)
    model = GptOssForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.0 if "router.bias" in name else 0.15  # every expert is to see tokens
            parameter.copy_(torch.randn_like(parameter) * spread + (parameter.ndim == 1) * parameter)
    pruned = prune(model, tokens(), method=method, pattern=NM(2, 4), progress=False)
    assert not pruned.unseen
    experts = [matrix for matrix in all_matrices(model) if matrix.expert is not None]
    assert len(experts) == 12
    for matrix in experts:
        kept = matrix.view(pruned.masks.masks[matrix.weight.name])
        assert (kept.unflatten(1, (-1, 4)).sum(2) == 2).all()
        assert 0 < pruned.errors[matrix.name] < 1


def test_arguments_that_grow_with_the_batch() -> None:
    """Bloom's attention bias is (sequences·heads, 1, length); the last batch has fewer sequences."""
    model = BloomForCausalLM(BloomConfig(vocab_size=260, hidden_size=32, n_layer=2, n_head=4)).eval()
    pruned = prune(model, tokens(5), method="sparsegpt", walk=WalkOptions(batch_size=3), progress=False)
    assert pruned.masks.sparsity == pytest.approx(0.5)


def test_sequences_of_a_length_that_nothing_can_be_computed_on() -> None:
    model = tiny_model("gpt2", n_positions=8)
    with pytest.raises(UserError, match="seq_length is 40, and the model supports at most 8 tokens"):
        prune(model, tokens(2), method="wanda", progress=False)
    with pytest.raises(UserError, match=r"sequences of 1 have none to predict\. Give 2 or more with --seq_length"):
        prune(model, tokens(2)[:, :1], method="wanda", fisher=0.5, progress=False)
    with pytest.raises(UserError, match=r"sequences of 3 have none to predict\. Give 4 or more"):
        walk = WalkOptions(first_target=3)
        prune(model, tokens(2)[:, :3], method="wanda", fisher=0.5, walk=walk, progress=False)


# -- sparsity per layer -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_sparsity_per_layer(method: str, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text("[0.25, 0.75]")
    (tmp_path / "s.txt").write_text("0.25\n0.75\n")
    for source in ([0.25, 0.75], tmp_path / "s.json", str(tmp_path / "s.txt")):
        sparsities = read_layer_sparsities(source)
        assert sparsities == [0.25, 0.75]
    pruned = prune(tiny_model(), tokens(), method=method, layer_sparsity=sparsities, progress=False)
    assert pruned.masks.densities("layer") == pytest.approx({"0": 0.75, "1": 0.25})
    assert pruned.masks.provenance.sparsity == pytest.approx(0.5)


def test_owl_gives_less_sparsity_where_there_are_outliers() -> None:
    model = tiny_model("llama", num_hidden_layers=3)
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[:2] *= 40
    pruned = prune(model, tokens(), method="wanda", pattern=0.5, owl=OwlOptions(), progress=False)
    densities = pruned.masks.densities("layer")
    assert densities["1"] == max(densities.values())
    assert max(densities.values()) - min(densities.values()) == pytest.approx(0.16, abs=0.03)
    assert pruned.masks.sparsity == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("text", ["", "[0.5, 1.5]", "a b", '[{"a": 1}]', "0.5 -0.1", f"[{10**400}]"])
def test_nonsense_sparsities_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "s").write_text(text)
    with pytest.raises(UserError):
        read_layer_sparsities(tmp_path / "s")


# -- weights for a given mask -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_weights_for_a_given_mask(family: str, tmp_path: Path) -> None:
    blocks_NT = tokens(24)
    plain = tiny_model(family)
    wanda = prune(plain, blocks_NT, method="wanda", pattern=0.5, progress=False)
    earlier = {**wanda.masks.provenance.config, "weight_update": {"method": "admm", "target": "dense"}}
    mask = MaskSet.load(wanda.masks.with_provenance(config=earlier).save(tmp_path / "mask.safetensors"))
    assert mask.provenance.config["weight_update"]["target"] == "dense"  # a target that there was once
    model = tiny_model(family)
    updated = prune(model, blocks_NT, method="admm", mask=mask, progress=False)
    parameters = dict(model.named_parameters())
    for name, kept in mask.masks.items():
        assert torch.equal(updated.masks.masks[name], kept)
        assert not parameters[name][~kept].any()
    assert updated.masks.provenance.method == "wanda"
    assert updated.masks.provenance.config["weight_update"]["target"] == "layer"
    json.dumps(updated.masks.provenance.config)
    assert sum(updated.errors.values()) < sum(wanda.errors.values())
    with torch.no_grad():
        expected = tiny_model(family)(input_ids=blocks_NT).logits
        distance = [float((m(input_ids=blocks_NT).logits - expected).square().mean()) for m in (plain, model)]
    assert distance[1] < distance[0]


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_masks_are_bits_as_soon_as_their_block_is_pruned(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held, block = [], _Run.block

    def counted(run: _Run, *arguments: Any) -> None:
        block(run, *arguments)
        held.append(sum(bits.nbytes for bits in run.bits.values()))

    monkeypatch.setattr(_Run, "block", counted)
    masks = prune(tiny_model("mixtral"), tokens(), method=method, progress=False).masks
    assert isinstance(masks.masks, PackedMasks)
    each = masks.total // 8 // len(held)
    assert held == [each * (index + 1) for index in range(len(held))]


def test_a_given_mask_is_unpacked_once_for_all_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = prune(tiny_model("mixtral"), tokens(), method="wanda", progress=False).masks
    unpacked, read = [], PackedMasks.__getitem__
    monkeypatch.setattr(PackedMasks, "__getitem__", lambda masks, name: unpacked.append(name) or read(masks, name))
    prune(tiny_model("mixtral"), tokens(), method="admm", mask=mask, progress=False)
    assert sorted(unpacked) == sorted(mask.masks)


def test_experts_that_no_token_reached_keep_their_weights_under_a_given_mask(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sizes = {"num_local_experts": 16, "num_experts_per_tok": 1}
    mask = prune(tiny_model("mixtral", **sizes), None, method="magnitude", progress=False).masks
    model = tiny_model("mixtral", **sizes)
    dense = {matrix.name: matrix.dense() for matrix in all_matrices(model)}
    found = prune(model, tokens(1, 4), method="admm", mask=mask, progress=False)
    assert found.unseen
    assert "the weights that the mask keeps stay as they are. More sequences" in caplog.text
    assert "magnitude" not in caplog.text
    for matrix in all_matrices(model):
        if matrix.name in found.unseen:
            kept = matrix.view(mask.masks[matrix.weight.name])
            assert torch.equal(matrix.dense(), dense[matrix.name] * kept)


def test_a_raised_damping_is_recorded_and_said(caplog: pytest.LogCaptureFixture) -> None:
    """Of Hessians of a few tokens, which are singular."""
    pruned = prune(
        tiny_model(), tokens(1, 5), method="sparsegpt", options=SparseGPTOptions(damping=0.0), progress=False
    )
    assert pruned.dampings
    assert min(pruned.dampings.values()) > 0
    assert "damping 0 failed" in caplog.text


def test_a_matrix_that_no_damping_solves_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise NotSolvableError("no damping")

    monkeypatch.setattr("leap_pl.oneshot.admm.admm_prune", fails)
    with pytest.raises(UserError, match=r"q_proj.*too extreme; prune it with --method wanda"):
        prune(tiny_model(), tokens(), method="admm", progress=False)


# -- what is refused ----------------------------------------------------------------------------------------


def test_nonfinite_weights_and_inputs_are_named() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.down_proj\.weight holds NaN"):
        prune(model, tokens(), method="wanda", progress=False)
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[0] = float("inf")
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.q_proj\.weight: its inputs are not finite"):
        prune(model, tokens(), method="admm", progress=False)


def test_contradictions_are_refused() -> None:
    model = tiny_model()
    mask = prune(tiny_model(), None, method="magnitude", progress=False).masks
    cases: list[tuple[dict[str, object], str]] = [
        ({"method": "wanda", "blocks_NT": None}, "calibration text"),
        ({"blocks_NT": tokens()[0]}, r"not \[sequences, seq_length\]"),
        ({"blocks_NT": tokens()[:0]}, r"not \[sequences, seq_length\]"),
        ({"method": "wanda", "mask": mask}, "--method admm"),
        ({"method": "wanda", "pattern": NM(2, 4), "owl": OwlOptions()}, "pattern 2:4"),
        ({"method": "wanda", "layer_sparsity": [0.5] * 3}, "3 layer sparsities"),
        ({"method": "wanda", "layer_sparsity": [0.5] * 2, "owl": OwlOptions()}, "Choose one"),
        ({"method": "admm", "mask": mask, "owl": OwlOptions()}, "Choose one"),
        ({"method": "wanda", "fisher": FisherOptions(), "owl": OwlOptions()}, "both --owl and --fisher. Choose one"),
        ({"method": "admm", "mask": mask, "fisher": FisherOptions()}, "Choose one"),
        ({"method": "wanda", "pattern": NM(2, 4), "fisher": FisherOptions()}, "leave out --pattern, or --fisher"),
        ({"method": "magnitude", "blocks_NT": None, "fisher": FisherOptions()}, "Fisher allocation needs calibration"),
        ({"method": "wanda", "pattern": 0.05, "owl": OwlOptions()}, "Lower --owl"),
        ({"method": "wanda", "pattern": 1.0}, "sparsity"),
        ({"method": "wanda", "pattern": 0.0, "fisher": FisherOptions()}, "Fisher allocation needs a sparsity above 0"),
    ]
    for settings, message in cases:
        settings = {"blocks_NT": tokens(), "progress": False, **settings}
        with pytest.raises(UserError, match=message):
            prune(model, **settings)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="method wanda takes no options, and not SparseGPTOptions"):
        prune(model, tokens(), method="wanda", options=SparseGPTOptions())
    with pytest.raises(UserError, match="fingerprint"):
        prune(tiny_model(seed=1), tokens(), method="admm", mask=mask)
    with pytest.raises(UserError, match="outside"):
        prune(model, tokens(), weights=find_weights(model, ["lm_head"]))


def test_token_dependent_arguments_are_refused() -> None:
    model = token_dependent_model()
    for sequences in (8, 5, 2):  # in two batches, also of unequal sizes, and in one
        with pytest.raises(UserError, match=r"depend on the tokens.*block by block\. Give --method magnitude\.$"):
            prune(model, tokens(sequences), method="wanda", progress=False)


def test_a_model_that_cannot_be_walked_is_pruned_as_the_message_says() -> None:
    """Fisher information is that of the whole model, which runs."""
    model = token_dependent_model()
    for blocks, settings in ((None, {}), (tokens(), {"fisher": 0.5})):
        found = prune(model, blocks, method="magnitude", **settings, update=False, progress=False)
        assert found.masks.sparsity == pytest.approx(0.5, abs=1e-3)
        assert not found.errors
    with pytest.raises(UserError, match=r"block by block\. Give --owl false\.$"):
        prune(model, tokens(), method="magnitude", owl=OwlOptions(), progress=False)
    with pytest.raises(UserError, match=r"block by block\. Give --method magnitude without --mask\.$"):
        prune(model, tokens(), method="admm", mask=found.masks, progress=False)


def test_blocks_that_pass_keys_and_values_on_are_refused() -> None:
    """As Gemma 4 does, in a mapping that all blocks have: replayed, it would be that of the last batch."""
    model, passed = tiny_model(), UserDict[str, Any]()

    def give(module: torch.nn.Module, args: object, kwargs: dict[str, object]) -> tuple[object, dict[str, object]]:
        return args, {**kwargs, "shared": passed}

    for layer in model.model.layers:
        layer.register_forward_pre_hook(give, with_kwargs=True)
    assert prune(model, tokens(), method="wanda", progress=False).masks.sparsity == pytest.approx(0.5)
    hook = model.model.layers[0].register_forward_hook(lambda module, args, output: passed.update(keys=torch.ones(1)))
    with pytest.raises(UserError, match=r"layers\.0 has arguments that depend on the tokens"):
        prune(model, tokens(), method="wanda", progress=False)
    hook.remove()


def test_progress_in_a_file_is_not_drawn_for_every_matrix(capsys, monkeypatch) -> None:
    """Errors of matrices are shown as they come on a terminal; a file gets what the interval lets through."""
    drawn = {}
    for terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda shown=terminal: shown, raising=False)
        prune(tiny_model(), tokens(), method="wanda", pattern=0.5)
        drawn[terminal] = capsys.readouterr().err.count("error")
    assert drawn[True] >= 7 * 2  # of each of seven matrices in two blocks
    assert drawn[False] <= 3  # with the last, once a block at most
