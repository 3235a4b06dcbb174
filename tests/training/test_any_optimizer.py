"""Every optimizer of torch learns masks and weights, or is refused in one line before a model is loaded."""

from pathlib import Path

import pytest
from conftest import fit_flags, refused

from leap_pl.cli.main import main
from leap_pl.masks import MaskSet
from leap_pl.training.run_settings import optimizers

REFUSED = {
    ("SparseAdam", "none"): "SparseAdam cannot learn masks or weights: SparseAdam does not support dense gradients",
    ("SparseAdam", "kept"): "SparseAdam cannot learn masks or weights: SparseAdam does not support dense gradients",
    ("LBFGS", "kept"): "model.optimizer does not take its settings: LBFGS doesn't support per-parameter options",
    ("Muon", "kept"): "model.optimizer does not take its settings: Muon only supports 2D parameters",
}

pytestmark = pytest.mark.usefixtures("eager")


@pytest.mark.parametrize("kind", ["none", "kept"])
@pytest.mark.parametrize("name", sorted(optimizers()))
def test_an_optimizer_learns_or_is_refused(
    name: str, kind: str, model_folder: Path, text_file: Path, tmp_path: Path, capsys
) -> None:
    words = fit_flags(model_folder, text_file, tmp_path, f"--model.optimizer={name}", f"--model.train_weights={kind}")
    if (name, kind) in REFUSED:
        assert REFUSED[name, kind] in refused(words, capsys)
        assert not (tmp_path / "checkpoints").exists()
        return
    main(words)
    masks = MaskSet.load(tmp_path / "checkpoints" / "mask.safetensors")
    assert masks.provenance.config["optimizer"]["class"] == name
