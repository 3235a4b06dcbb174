"""The curves of a run against its mask, at a sparsity other than one half."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from leap_pl import LeapModule, TextDataModule
from leap_pl.callbacks import SparsityLogger
from leap_pl.prior import Prior

pytestmark = pytest.mark.usefixtures("eager")


@pytest.fixture(scope="module")
def finished_at_70(
    model_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[LeapModule, SparsityLogger]:
    """A run of two steps at 70%, as its last step left it, and its log of every bit."""
    quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    folder = str(tmp_path_factory.mktemp("priors"))
    module = LeapModule(
        str(model_folder), sparsity=0.7, dtype="float32", prior=Prior(method="magnitude", cache_dir=folder)
    )
    log = SparsityLogger(samples=1 << 30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEAP_PL_COMPILE", "0")
        L.Trainer(accelerator="cpu", max_steps=2, enable_model_summary=False, callbacks=[log], **quiet).fit(
            module, TextDataModule(text=str(text_file), seq_length=32, batch_size=2, validation_sequences=0)
        )
    assert log.stride == 1
    return module, log


def test_densities_are_of_the_mask_and_of_the_target(finished_at_70: tuple[LeapModule, SparsityLogger]) -> None:
    module, log = finished_at_70
    metrics = log.measure(module)
    assert metrics["density/target"] == pytest.approx(0.3)
    soft = sum(float(kept) for kept in module.gates.kept.values()) / sum(module.sizes.values())
    assert metrics["density/soft"] == pytest.approx(soft)
    assert metrics["at_a_glance/density_minus_target"] == pytest.approx(soft - 0.3)
    masks = module.mask_set().masks
    kept, sizes = torch.zeros(2), torch.zeros(2)
    for name, mask in masks.items():
        layer = int(name.split(".")[2])
        kept[layer] += int(mask.sum())
        sizes[layer] += mask.numel()
    assert float(kept.sum() / sizes.sum()) == pytest.approx(0.3, abs=1e-4)
    for layer in (0, 1):
        found = metrics[f"weights_by_layer/hard/00{layer}"]
        assert found == pytest.approx(float(kept[layer] / sizes[layer]), abs=1e-6)
    assert metrics["schedule/alpha"] == pytest.approx(float(module.state.alpha))
    terms = {name: float(value) for name, value in module.terms.items()}
    assert metrics["loss/total"] == pytest.approx(terms["loss"])
    assert metrics["loss/lm"] == pytest.approx(terms["lm"])


def test_bits_that_changed_are_counted(finished_at_70: tuple[LeapModule, SparsityLogger]) -> None:
    module, log = finished_at_70
    prior, learned = module.prior, module.mask_set().masks
    assert prior is not None
    changed = sum(int((learned[name] != mask).sum()) for name, mask in prior.masks.items())
    assert log.measure(module)["mask/changed_from_prior"] == pytest.approx(changed / sum(module.sizes.values()))
    gate = module.gates["model.layers.0.mlp.up_proj.weight"]
    with torch.no_grad():
        moved = gate.logits.flatten()[:20].clone()
        gate.logits.flatten()[:20] = 9.0
        metrics = log.measure(module)
        gate.logits.flatten()[:20] = moved
    opened = int((~module.mask_set().masks["model.layers.0.mlp.up_proj.weight"].flatten()[:20]).sum())
    assert opened > 0  # and as many elsewhere are closed
    assert metrics["mask/changed_since_last_log"] == pytest.approx(2 * opened / sum(module.sizes.values()), rel=1e-6)
