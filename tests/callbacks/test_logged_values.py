"""The curves of a run against its mask, at a sparsity other than one half."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.loggers import TensorBoardLogger

from leap_pl import LeapModule, TextDataModule, UserError
from leap_pl.callbacks import SparsityLogger
from leap_pl.callbacks.sparsity import spread_stride
from leap_pl.gates import Gates
from leap_pl.masks import MaskSet
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


def test_counts_are_whole_numbers() -> None:
    """Before a model is loaded, and a prior made."""
    log = SparsityLogger(every_n_steps=2.0, samples=1e6)  # type: ignore[arg-type]
    assert (log.every_n_steps, log.samples) == (2, 1_000_000)
    assert isinstance(log.samples, int)
    for name in ("every_n_steps", "histogram_every_n_steps", "samples"):
        with pytest.raises(UserError, match=rf"sparsity_log\.{name} is 10\.5; give a whole number"):
            SparsityLogger(**{name: 10.5})  # type: ignore[arg-type]


def test_densities_are_of_the_mask_and_of_the_target(finished_at_70: tuple[LeapModule, SparsityLogger]) -> None:
    module, log = finished_at_70
    metrics = log.measure(module)
    assert metrics["density/target"] == pytest.approx(0.3)
    soft = sum(float(kept) for kept in module.gates.kept.values()) / sum(module.sizes.values())
    assert metrics["density/soft"] == pytest.approx(soft)
    assert metrics["at_a_glance/density_minus_target"] == pytest.approx(soft - 0.3)
    masks = module.mask_set().masks
    assert sum(int(mask.sum()) for mask in masks.values()) == round(0.3 * sum(module.sizes.values()))
    soft_kept = {name: float(value) for name, value in module.gates.kept.items()}
    projections = {name.split(".", 3)[3].removesuffix(".weight") for name in masks}
    for of, parts in (("layer", ("000", "001")), ("projection", tuple(projections))):
        for part in parts:
            place = f"layers.{int(part)}." if of == "layer" else f"{part}.weight"
            names = [name for name in masks if place in name]
            weights = sum(module.sizes[name] for name in names)
            hard = sum(int(masks[name].sum()) for name in names) / weights
            assert metrics[f"weights_by_{of}/hard/{part}"] == pytest.approx(hard, abs=1e-6)
            soft = sum(soft_kept[name] for name in names) / weights
            assert metrics[f"weights_by_{of}/soft/{part}"] == pytest.approx(soft, abs=1e-6)
    assert metrics["schedule/alpha"] == pytest.approx(float(module.state.alpha))
    terms = {name: float(value) for name, value in module.terms.items()}
    assert metrics["loss/total"] == pytest.approx(terms["loss"])
    assert metrics["loss/lm"] == pytest.approx(terms["lm"])


def test_histograms_are_of_logits_from_every_column(
    finished_at_70: tuple[LeapModule, SparsityLogger], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In units of the noise, α/τ; an even stride would take them from some columns alone."""
    module, log = finished_at_70
    monkeypatch.setattr(log, "stride", 3)
    logger, drawn = TensorBoardLogger(tmp_path), {}
    monkeypatch.setattr(logger.experiment, "add_histogram", lambda tag, values, step: drawn.setdefault(tag, values))
    log._histograms(SimpleNamespace(loggers=[logger]), module, 2)  # type: ignore[arg-type]
    slope = float(module.state.alpha / module.state.tau)
    gates = [gate for name, gate in module.gates.items() if name.endswith("mlp.up_proj.weight")]
    expected = torch.cat([gate.logits.detach().flatten()[::13] for gate in gates]) * slope
    assert torch.allclose(drawn["weights_alpha_theta_over_tau/mlp.up_proj"], expected.clamp(-20, 20))
    assert len(drawn) == 7


@given(st.integers(0, 2000), st.sets(st.sampled_from([576, 640, 1536, 2048, 33, 1])))
def test_samples_are_of_every_column(least: int, widths: set[int]) -> None:
    stride = spread_stride(least, widths)
    assert max(least, 1) <= stride < max(least, 1) + 50
    for width in widths:
        assert len({place * stride % width for place in range(width)}) == width


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


@pytest.mark.parametrize(
    ("form", "prior", "compared"),
    [
        ("unstructured", "unstructured", True),
        ("unstructured", "2:4", True),
        ("2:4", "2:4", True),
        ("2:4", "unstructured", False),
        ("2:4", "4:8", False),
        ("8x8 tiles, dense or 2:4", "unstructured", False),
        ("8x8 tiles, dense or 2:4", "16x16 tiles, dense or 2:4", False),
    ],
)
def test_only_a_prior_of_the_gates_own_form_is_compared(
    finished_at_70: tuple[LeapModule, SparsityLogger],
    monkeypatch: pytest.MonkeyPatch,
    form: str,
    prior: str,
    compared: bool,
) -> None:
    module, _ = finished_at_70
    made = module.prior
    assert made is not None
    recorded = MaskSet(made.masks, replace(made.provenance, config={"pattern": prior}))
    monkeypatch.setattr(module.run_prior, "masks", {"prior": recorded})
    monkeypatch.setattr(Gates, "form", form)
    log = SparsityLogger(samples=1 << 30)
    log.on_fit_start(SimpleNamespace(loggers=[]), module)  # type: ignore[arg-type]
    assert ("mask/changed_from_prior" in log.measure(module)) == compared
