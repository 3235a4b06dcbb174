"""Packed folders in transformers: ``import leap_pl``, then from_pretrained."""

import gc
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from packed_models import masked_base, packed_folder
from tiny import FAMILIES
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from leap_pl.base_model.loading import load_model
from leap_pl.errors import UserError
from leap_pl.sparse.packed_linear import PackedLinear
from leap_pl.sparse.packed_weight import PackedWeight

IDS = torch.arange(12)[None]


def load(folder: Path, memory: str, **options: object):
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config["memory"] = memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(folder, config=config, dtype="auto", **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_and_answers_alike(family: str, tmp_path: Path) -> None:
    folder, masks = packed_folder(tmp_path, family)
    expected = masked_base(tmp_path, masks)
    for memory in ("packed", "dense"):
        model = load(folder, memory)
        packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
        assert bool(packed) == (memory == "packed" and family != "gpt2")
        assert not model.training
        assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
        with torch.inference_mode():
            assert torch.allclose(model(IDS).logits, expected(IDS).logits, atol=1e-2)
    for name, weight in expected.state_dict().items():  # the last one is dense
        assert torch.equal(model.state_dict()[name], weight), name
    assert not hasattr(model.config, "quantization_config")


def test_a_loaded_model_unpacks(tmp_path: Path) -> None:
    folder, masks = packed_folder(tmp_path)
    model = load(folder, "packed")
    with pytest.raises(ValueError, match="leap_pl and is not serializable"):
        model.save_pretrained(tmp_path / "saved")
    model.dequantize()
    for name, weight in masked_base(tmp_path, masks).state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    model.save_pretrained(tmp_path / "saved")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved").config.model_type == "llama"


def test_other_types_and_the_model_without_its_head(tmp_path: Path) -> None:
    from transformers import AutoModel

    folder, masks = packed_folder(tmp_path)
    expected = masked_base(tmp_path, masks).float()
    model = load_model(str(folder), dtype="float32", memory="packed")
    layer = model.model.layers[0].mlp.up_proj
    assert layer.values.dtype == torch.float32
    assert torch.equal(layer.packed.unpack(), expected.model.layers[0].mlp.up_proj.weight)
    bare = AutoModel.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        found = bare(IDS).last_hidden_state
        assert torch.allclose(found, expected.model(IDS).last_hidden_state, atol=1e-5)


def test_small_weights_are_dense_in_memory_and_it_says_so(tmp_path: Path) -> None:
    from leap_pl.errors import warn_once

    folder, _ = packed_folder(tmp_path)
    warn_once.cache_clear()
    with pytest.warns(UserWarning, match="14 of 14 packed weights of LlamaForCausalLM are dense in memory"):
        model = load_model(str(folder), memory="auto")
    assert not any(isinstance(module, PackedLinear) for module in model.modules())


def test_memory_while_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed: never more than the packed model. Dense: never more than the dense model and one packed weight."""
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # in this thread, where it is counted
    folder, masks = packed_folder(tmp_path)
    largest = 2 * max(mask.numel() for mask in masks.masks.values())
    size = (folder / "model.safetensors").stat().st_size
    dense = (tmp_path / "base" / "model.safetensors").stat().st_size
    for memory, most in (("packed", size + largest), ("dense", dense + largest)):
        with Living() as living:
            model = load(folder, memory)
        assert living.peak > most / 3  # it sees them at all
        assert living.peak <= most
        del model


class Living(TorchDispatchMode):
    """Counts the bytes of the storages that are alive of all that torch makes, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.peak, self.known = 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, list | tuple) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                self.known[storage._cdata] = (torch.multiprocessing.reductions.StorageWeakRef(storage), storage.nbytes())
        self.known = {key: value for key, value in self.known.items() if not value[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.known.values()))
        return made


# -- registration -------------------------------------------------------------------------------------------


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


def test_import_is_cheap_and_registers_in_any_order(tmp_path: Path) -> None:
    folder, _ = packed_folder(tmp_path)
    load = "from transformers import AutoModelForCausalLM as A; A.from_pretrained(sys.argv[1])"
    first = "import sys, leap_pl; assert not {'torch', 'transformers', 'numpy'} & {*sys.modules}; " + load
    second = f"import sys; from transformers import AutoModelForCausalLM; import leap_pl; {load}"
    for code in (first, second):
        done = run(code, str(folder))
        assert done.returncode == 0, done.stderr


def test_without_leap_pl_the_folder_is_refused(tmp_path: Path) -> None:
    folder, _ = packed_folder(tmp_path)
    done = run("import sys; from transformers import AutoModelForCausalLM as A; A.from_pretrained(sys.argv[1])", str(folder))
    assert done.returncode == 1
    assert "Unknown quantization type, got leap_pl" in done.stderr + done.stdout
    assert "import leap_pl" in (folder / "README.md").read_text()


def test_another_transformers_without_quantizers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing transformers does not fail because of it."""
    from leap_pl.errors import warn_once
    from leap_pl.sparse import registration

    def missing(name: str) -> None:
        raise ImportError("cannot import name 'register_quantizer'")

    warn_once.cache_clear()
    monkeypatch.setattr(registration, "import_module", missing)
    with pytest.warns(UserWarning, match="cannot load packed folders of leap_pl"):
        registration._register()


def test_a_dense_model_is_not_packed_while_it_is_loaded(model_folder: Path) -> None:
    from leap_pl.sparse.quantizer import PackedConfig

    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForCausalLM.from_pretrained(
            model_folder, quantization_config=PackedConfig(format="leap_pl.packed", format_version=1)
        )
    with pytest.raises(UserError, match="memory is 'x'; give auto, packed, dense"):
        PackedConfig("x", format="leap_pl.packed", format_version=1)


def test_weights_are_unpacked_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When one is unpacked, none of the packed ones before it is left."""
    folder, masks = packed_folder(tmp_path)
    left = []
    unpack = PackedWeight.unpack

    def counted(self: PackedWeight, dtype: torch.dtype | None = None) -> torch.Tensor:
        gc.collect()
        left.append(sum(isinstance(each, PackedWeight) for each in gc.get_objects()))
        return unpack(self, dtype)

    monkeypatch.setattr(PackedWeight, "unpack", counted)
    load(folder, "dense")
    assert left == [1] * len(masks.masks)
