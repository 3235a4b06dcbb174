"""Packed folders in transformers: ``import leap_pl``, then from_pretrained."""

import copy
import logging
import subprocess
import sys
import warnings
import weakref
from pathlib import Path
from typing import Literal

import pytest
import torch
import transformers
from packed_models import masked_base, packed_folder
from random_masks import random_mask
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import FAMILIES, byte_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from leap_pl.base_model.loading import load_model
from leap_pl.base_model.weights import find_weights, model_fingerprint
from leap_pl.errors import UserError, warn_once
from leap_pl.export.hugging_face import export_model
from leap_pl.masks import MaskSet, Provenance
from leap_pl.sparse import registration
from leap_pl.sparse.packed_linear import PackedLinear
from leap_pl.sparse.packed_weight import PackedWeight

BIAS = "model.layers.0.self_attn.q_proj.bias"
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


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # without biases, and with
def test_a_loaded_model_unpacks(family: str, tmp_path: Path) -> None:
    folder, masks = packed_folder(tmp_path, family)
    model = load(folder, "packed")
    with pytest.raises(ValueError, match="leap_pl and is not serializable"):
        model.save_pretrained(tmp_path / "saved")
    model.dequantize()
    for name, weight in masked_base(tmp_path, masks).state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    model.save_pretrained(tmp_path / "saved")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved").config.model_type == family


def test_other_types_and_the_model_without_its_head(tmp_path: Path) -> None:
    from transformers import AutoModel

    folder, masks = packed_folder(tmp_path)
    expected = masked_base(tmp_path, masks).float()
    model = load_model(str(folder), dtype="float32", memory="packed")
    layer = model.model.layers[0].mlp.up_proj
    assert layer.values.dtype == torch.float32
    assert torch.equal(layer.packed.unpack(), expected.model.layers[0].mlp.up_proj.weight)
    with pytest.warns(UserWarning, match="dense in memory"):
        bare = AutoModel.from_pretrained(folder, dtype="auto").float()
    with torch.inference_mode():
        found = bare(IDS).last_hidden_state
        assert torch.allclose(found, expected.model(IDS).last_hidden_state, atol=1e-5)


def test_a_device_map_counts_weights_as_they_will_be(tmp_path: Path) -> None:
    """It is made before they are unpacked; and what it puts aside cannot be."""
    from leap_pl.sparse.quantizer import PackedConfig, PackedQuantizer, _taken

    folder, masks = packed_folder(tmp_path)
    config = AutoConfig.from_pretrained(folder).quantization_config
    dense = masked_base(tmp_path, masks).config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(dense, dtype=torch.bfloat16)
    for memory in ("dense", "auto", "packed"):
        quantizer = PackedQuantizer(PackedConfig(**config | {"memory": memory}), pre_quantized=True)
        copied = copy.deepcopy(model)
        quantizer._process_model_before_weight_loading(copied, [str(folder / "model.safetensors")])
        for name in masks.masks:
            owner, _, tensor = name.rpartition(".")
            values = getattr(copied.get_submodule(owner), tensor)
            kept = int(masks.masks[name].sum())
            assert values.numel() == kept
            size = values.numel() * quantizer.param_element_size(copied, name, values)
            assert size == pytest.approx(2 * (kept if memory == "packed" else masks.masks[name].numel()))
        assert quantizer.param_element_size(copied, "lm_head.weight", copied.lm_head.weight) == 2
    with pytest.raises(UserError, match=r"device_map puts w on the CPU or the disk"):
        _taken("w", copied.get_submodule(owner), tensor, masks.masks[name].shape)


def test_small_weights_are_dense_in_memory_and_it_says_so(tmp_path: Path) -> None:
    folder, _ = packed_folder(tmp_path)
    warn_once.cache_clear()
    with pytest.warns(UserWarning, match="14 of 14 packed weights of LlamaForCausalLM are dense in memory"):
        model = load_model(str(folder), memory="auto")
    assert not any(isinstance(module, PackedLinear) for module in model.modules())


def test_memory_while_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed: never more than the packed model. Dense: never more than the dense model and one packed weight."""
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # in this thread, where it is counted
    monkeypatch.setattr("leap_pl.sparse.packed_weight._CHUNK", 64)  # as small beside these weights as beside real ones
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
                self.known[storage._cdata] = (
                    torch.multiprocessing.reductions.StorageWeakRef(storage),
                    storage.nbytes(),
                )
        self.known = {key: value for key, value in self.known.items() if not value[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.known.values()))
        return made


# -- registration -------------------------------------------------------------------------------------------


def test_import_is_cheap_and_registers(tmp_path: Path) -> None:
    """In a process of its own: nothing heavy is imported, and transformers loads the folder when it is imported."""
    folder, _ = packed_folder(tmp_path)
    code = "import sys, leap_pl; assert not {'torch', 'transformers', 'numpy'} & {*sys.modules}; "
    code += "from transformers import AutoModelForCausalLM as A; A.from_pretrained(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_registration_waits_for_one_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any order of imports: when the module with the table is there, or at once; and once."""
    (tmp_path / "table_of_quantizers.py").write_text("filled = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registration, "TABLE", "table_of_quantizers")
    registered: list[bool] = []
    monkeypatch.setattr(registration, "_register", lambda: registered.append("table_of_quantizers" in sys.modules))
    before = list(sys.meta_path)
    registration.register_packed_folders()
    registration.register_packed_folders()
    assert len(sys.meta_path) == len(before) + 1
    import table_of_quantizers  # type: ignore[import-not-found]

    assert table_of_quantizers.filled
    assert sys.meta_path == before
    registration.register_packed_folders()
    assert registered == [True, True]
    del sys.modules["table_of_quantizers"]


def test_without_leap_pl_the_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    """And says what it needs: transformers names the method, and the card the command."""
    from transformers.quantizers import auto

    folder, _ = packed_folder(tmp_path)
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "leap_pl")
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(folder)
    assert "Unknown quantization type, got leap_pl" in caplog.text
    assert "import leap_pl" in (folder / "README.md").read_text()


def test_another_transformers_without_quantizers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing transformers does not fail because of it."""

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
    with pytest.raises(UserError, match="memory is x; give auto, packed, dense"):
        PackedConfig("x", format="leap_pl.packed", format_version=1)


def test_a_data_type_that_packed_weights_have_not(tmp_path: Path) -> None:
    folder, _ = packed_folder(tmp_path)
    with pytest.raises(UserError, match=r"packed weights cannot be loaded in float64\. Load the model in float32"):
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


def test_weights_are_unpacked_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When one is unpacked, none of the packed ones before it is left."""
    folder, masks = packed_folder(tmp_path)
    made: list[weakref.ref[PackedWeight]] = []
    left: list[int] = []
    checked, unpack = PackedWeight.of, PackedWeight.unpack

    def kept(*parts: object) -> PackedWeight:
        made.append(weakref.ref(packed := checked(*parts)))  # type: ignore[arg-type]
        return packed

    def counted(self: PackedWeight, dtype: torch.dtype | None = None) -> torch.Tensor:
        left.append(sum(each() is not None for each in made))
        return unpack(self, dtype)

    monkeypatch.setattr(PackedWeight, "of", kept)
    monkeypatch.setattr(PackedWeight, "unpack", counted)
    load(folder, "dense")
    assert left == [1] * len(masks.masks)


@pytest.mark.parametrize("values", ["auto", "int8"])
def test_a_layer_whose_weight_the_model_reads_itself(values: Literal["auto", "int8"], tmp_path: Path) -> None:
    """Mamba multiplies by that of ``dt_proj`` in its mixer."""
    config = transformers.MambaConfig(
        vocab_size=260,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=4,
        time_step_rank=8,
        bos_token_id=256,
        eos_token_id=256,
    )
    torch.manual_seed(0)
    model = transformers.MambaForCausalLM(config).bfloat16().eval()
    model.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    weights = find_weights(model)
    assert any(name.endswith("dt_proj.weight") for name in weights)
    drawn = torch.Generator().manual_seed(0)
    kept = {name: torch.rand(w.parameter.shape, generator=drawn) < 0.4 for name, w in weights.items()}
    masks = MaskSet(kept, Provenance(str(tmp_path / "base"), model_fingerprint(model), "random", 0.6))
    export_model(masks, tmp_path / "packed", str(tmp_path / "base"), format="packed", values=values)
    expected, packed = masked_base(tmp_path, masks), load(tmp_path / "packed", "packed")
    layer = packed.backbone.layers[0].mixer.dt_proj
    assert isinstance(layer, PackedLinear)
    assert layer.weight.dtype == torch.bfloat16
    with torch.inference_mode():
        assert torch.allclose(packed(IDS).logits, expected(IDS).logits, atol=1e-2 if values == "auto" else 5e-2)


def test_layers_that_share_a_weight(tmp_path: Path) -> None:
    """As those of Zamba 2, whose hybrid blocks are one."""
    config = transformers.Zamba2Config(
        vocab_size=260,
        hidden_size=64,
        num_hidden_layers=5,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid", "mamba"],
        mamba_d_state=8,
        n_mamba_heads=8,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        bos_token_id=256,
        eos_token_id=256,
        pad_token_id=256,
    )
    torch.manual_seed(0)
    model = transformers.Zamba2ForCausalLM(config).bfloat16().eval()
    with torch.no_grad():
        for weight in find_weights(model, once=True).values():
            weight.parameter.mul_(torch.rand_like(weight.parameter) < 0.4)
    model.save_pretrained(tmp_path / "sparse")
    byte_tokenizer().save_pretrained(tmp_path / "sparse")
    export_model(None, tmp_path / "packed", str(tmp_path / "sparse"), format="packed")
    first, second = (f"model.layers.{block}.shared_transformer.feed_forward.down_proj" for block in (1, 3))
    assert model.get_submodule(first).weight is model.get_submodule(second).weight
    for memory in ("packed", "dense"):
        loaded = load(tmp_path / "packed", memory)
        assert isinstance(loaded.get_submodule(second), PackedLinear) == (memory == "packed")
        layers = [loaded.get_submodule(name) for name in (first, second)]
        held = [layer.packed.values if memory == "packed" else layer.weight for layer in layers]
        assert held[0].data_ptr() == held[1].data_ptr()
        with torch.inference_mode():
            assert torch.allclose(loaded(IDS).logits, model(IDS).logits, atol=1e-2)


def test_a_family_whose_initialisation_reads_shapes(tmp_path: Path) -> None:
    """Packed weights are one-dimensional while they are loaded, and in the files: nothing of them is initialised."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 260, "hidden_size": 32, "attention_hidden_size": 32, "intermediate_size": 48}
    config = transformers.RwkvConfig(
        **sizes, num_hidden_layers=2, context_length=64, bos_token_id=256, eos_token_id=256
    )
    transformers.RwkvForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    random_mask(tmp_path / "base", tmp_path / "mask.safetensors")
    masks = MaskSet.load(tmp_path / "mask.safetensors")
    export_model(masks, tmp_path / "packed", str(tmp_path / "base"), format="packed")
    expected = load_model(str(tmp_path / "base"))
    masks.apply_(expected)
    for memory in ("packed", "dense"):
        with torch.inference_mode():
            assert torch.allclose(load(tmp_path / "packed", memory)(IDS).logits, expected(IDS).logits, atol=1e-2)


def test_what_a_packed_file_lacks_is_initialised(tmp_path: Path) -> None:
    """As transformers does for an ordinary model, and warns of."""
    folder, _ = packed_folder(tmp_path, "qwen2")
    file = folder / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys() if name != BIAS}  # noqa: SIM118
        metadata = opened.metadata()
    save_file(tensors, file, metadata)
    bias = load(folder, "dense").get_parameter(BIAS)
    assert not bias.is_meta
    assert bool((bias == 0).all())
