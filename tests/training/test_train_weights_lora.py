"""Low-rank updates under a fixed mask, from the run to the exported model; and masks of tiles."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run, fit_flags, refused
from recovered_runs import FAST, Flags, exact_zeros, weights_in
from safetensors.torch import load_file
from stopped_runs import curves
from test_plain_trainer import data, trainer
from tiny import FAMILIES, tiny_folder, tiny_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from leap_pl import LeapModule, MaskSet, UserError
from leap_pl.cli.export import export_command
from leap_pl.cli.main import main
from leap_pl.cli.prune import prune_command
from leap_pl.comparison.entries import read_entries
from leap_pl.evaluation.subject import load_subject
from leap_pl.losses.objective import Objective
from leap_pl.masks.kept_weights import KeptWeights
from leap_pl.masks.mask_set import Provenance
from leap_pl.training.weights import LowRank, WeightTraining

pytestmark = pytest.mark.usefixtures("eager", "event_files_in_order")

PROVENANCE = Provenance(base_model="m", fingerprint="f", method="magnitude", sparsity=0.0)
LORA = "--model.train_weights=lora"


def learn(base_model: Path, mask: Path, text_file: Path, **settings: Any) -> LeapModule:
    module = LeapModule(
        str(base_model),
        dtype="float32",
        mask=str(mask),
        train_weights="lora",
        weight_training=WeightTraining(lr=0.05, warmup_steps=0, r=4, **settings),
        objective=Objective(budget=0, weight=0),
    )
    trainer(max_steps=2).fit(module, data(text_file))
    return module


@pytest.mark.parametrize("family", FAMILIES)
def test_the_exported_model_is_the_one_that_was_trained(family: str, text_file: Path, tmp_path: Path) -> None:
    """Merged logits are the unmerged ones to rounding, and every zero of the mask is kept."""
    base = tiny_folder(tmp_path / "base", family)
    prune_command(str(base), str(tmp_path / "pruned"), method="magnitude", sparsity=0.4)
    module = learn(base, tmp_path / "pruned", text_file)
    module.save_mask(tmp_path / "mask.safetensors")
    module.save_weights(tmp_path / "weights.safetensors", tmp_path / "mask.safetensors")
    export_command(str(tmp_path / "model"), mask=str(tmp_path / "mask.safetensors"))
    masks = MaskSet.load(tmp_path / "pruned")
    assert masks.digest_of_bits() == MaskSet.load(tmp_path / "model").digest_of_bits()
    exact_zeros(load_file(tmp_path / "weights.safetensors"), masks)
    merged, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "model"), torch.arange(64).view(2, 32)
    assert module.model is not None
    module.model.eval()
    with torch.no_grad():
        logits, unmerged = merged(input_ids=ids).logits, module.model
        with module.state.passing("hard"):
            torch.testing.assert_close(unmerged(input_ids=ids).logits, logits, rtol=1e-4, atol=1e-4)
        with module.state.passing("dense"):
            assert not torch.allclose(unmerged(input_ids=ids).logits, logits, rtol=1e-4, atol=1e-2)


def test_moved_is_what_the_mask_keeps_and_a_run_resumes_bit_for_bit(
    recover: Flags, finished_run: Run, model_folder: Path, tmp_path: Path
) -> None:
    main(recover(tmp_path / "whole", LORA))
    again = recover(tmp_path / "again", f"--ckpt_path={tmp_path / 'whole' / 'checkpoints' / 'step=2.ckpt'}")
    main([word for word in again if not word.startswith(("--model", "--data"))])
    for file in ("mask.safetensors", "weights.safetensors"):
        ends = [(tmp_path / name / "checkpoints" / file).read_bytes() for name in ("whole", "again")]
        assert ends[0] == ends[1]
    masks, weights = MaskSet.load(finished_run.mask), weights_in(tmp_path / "whole")
    base = load_file(model_folder / "model.safetensors")
    moved = sum(float((weights[name] - base[name])[mask].square().sum()) for name, mask in masks.masks.items())
    start = sum(float(base[name].square().sum()) for name in masks.masks)
    drawn = curves(tmp_path / "whole" / "tensorboard")["moved/all"]
    assert drawn[4] == pytest.approx((moved / start) ** 0.5, rel=1e-4)


def test_norms_resume_bit_for_bit(recover: Flags, tmp_path: Path) -> None:
    main(recover(tmp_path / "whole", "--model.train_weights=norms"))
    main(recover(tmp_path / "again", f"--ckpt_path={tmp_path / 'whole' / 'checkpoints' / 'step=2.ckpt'}"))
    ends = [(tmp_path / name / "checkpoints" / "weights.safetensors").read_bytes() for name in ("whole", "again")]
    assert ends[0] == ends[1]


@pytest.mark.parametrize(
    ("targets", "ends"),
    [
        (["q_proj", "layers.1.mlp.down_proj"], {"0.self_attn.q_proj", "1.self_attn.q_proj", "1.mlp.down_proj"}),
        (None, None),
    ],
)
def test_the_named_layers_alone_are_trained(
    targets: list[str] | None, ends: set[str] | None, finished_run: Run, model_folder: Path, text_file: Path
) -> None:
    module = learn(model_folder, finished_run.mask, text_file, target_modules=targets)
    expected = {*module.gates} if ends is None else {f"model.layers.{end}.weight" for end in ends}
    assert {*module.trained} == expected
    assert all(bool(module.trained[name].lora_B.any()) for name in expected)  # type: ignore[union-attr, operator]


def test_weights_under_a_mask_of_tiles(
    model_folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The mask of a run is named by its folder, which has it with the checkpoints."""
    gate = ["--model.gate=TileGate", "--model.gate.tile=8", "--model.sparsity=0.4"]
    main(fit_flags(model_folder, text_file, tmp_path / "learned", *gate, "--trainer.max_steps=1"))
    words = fit_flags(model_folder, text_file, tmp_path / "run", *FAST)
    words = ["recover", *(word for word in words[1:] if not word.startswith("--model.prior.method"))]
    main([*words, f"--model.mask={tmp_path / 'learned'}"])
    made = MaskSet.load(tmp_path / "run")
    assert made.digest_of_bits() == MaskSet.load(tmp_path / "learned").digest_of_bits()
    assert made.provenance.config["pattern"] == "8x8 tiles, dense or 2:4"
    exact_zeros(weights_in(tmp_path / "run"), made)
    export_command(str(tmp_path / "model"), mask=str(tmp_path / "run"))
    exact_zeros(load_file(tmp_path / "model" / "model.safetensors"), made)
    assert load_subject(mask=str(tmp_path / "run")).origin["mask"] == str(tmp_path / "run/checkpoints/mask.safetensors")
    (entry,) = read_entries([str(tmp_path / "run")])
    assert entry.bits == made.digest_of_bits()
    line = refused([*words, f"--model.mask={tmp_path}", "--force"], capsys)
    assert f"{tmp_path} is a folder without a mask.safetensors. Name a MaskSet file" in line


def test_the_product_is_in_full_float32_whatever_the_process_has_set() -> None:
    class Precisions(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found.setdefault(func.overloadpacket.__name__, set()).add(torch.get_float32_matmul_precision())
            return func(*args, **(kwargs or {}))

    found: dict[str, set[str]] = {}
    torch.set_float32_matmul_precision("high")
    parts = {"lora_A": torch.randn(2, 8), "lora_B": torch.randn(4, 2)}
    with Precisions():
        LowRank.value(torch.randn(4, 8), parts, WeightTraining())
    assert found["mm"] == {"highest"}
    assert torch.get_float32_matmul_precision() == "high"


def test_a_checkpoint_keeps_the_dtype_of_what_the_model_has_in_another() -> None:
    """Some families keep a norm in float32; a bfloat16 run trains it in float32 too, and its export says the same."""
    model = tiny_model("llama").bfloat16()
    model.model.norm.float()
    made: dict[str, torch.dtype] = {}

    def value(name: str, base: Tensor) -> Tensor:
        made[name] = base.dtype
        return base + 1e-4

    names = ["model.norm.weight", "model.layers.0.input_layernorm.weight"]
    before = model.model.norm.weight.detach().clone()
    masks = MaskSet({"model.layers.0.mlp.up_proj.weight": torch.ones(48, 32, dtype=torch.bool)}, PROVENANCE)
    KeptWeights(names, value, torch.float16).apply_(model, masks)
    assert made == {names[0]: torch.float32, names[1]: torch.float16}
    assert torch.equal(model.model.norm.weight, before + 1e-4)
    assert model.model.layers[0].input_layernorm.weight.dtype == torch.bfloat16


def test_trained_weights_that_the_models_dtype_cannot_hold_are_refused() -> None:
    masks = MaskSet({"model.layers.0.mlp.up_proj.weight": torch.ones(48, 32, dtype=torch.bool)}, PROVENANCE)
    kept = KeptWeights(["model.norm.weight"], lambda name, base: torch.full((32,), 1e5))
    with pytest.raises(UserError, match=r"infinite or NaN in torch\.float16"):
        kept.apply_(tiny_model().half(), masks)
