"""Base models: found and loaded."""

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from conftest import one_line
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer, tiny_folder, tiny_model
from tokenizers import pre_tokenizers
from torch import nn
from transformers import PreTrainedModel

import leap_pl.base_model.fast_dtype
import leap_pl.base_model.loading
from leap_pl.base_model.config import load_config
from leap_pl.base_model.fast_dtype import fast_dtype, is_slow
from leap_pl.base_model.loading import load_model
from leap_pl.base_model.sequence_length import check_sequence_length, longest_sequence
from leap_pl.base_model.tokenizer import load_tokenizer, save_tokenizer
from leap_pl.base_model.vocabulary import digest_of_tokenization, digest_of_vocabulary
from leap_pl.base_model.weights import find_weights, model_fingerprint
from leap_pl.errors import UserError
from leap_pl.training.optimizers import check_state


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The hub is not asked; an attempt fails the test."""
    attempts: list[object] = []

    def refuse(_: socket.socket, address: object) -> None:
        attempts.append(address)
        raise OSError("no network in tests")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    yield
    assert not attempts


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gemma3", "opt"])
def test_a_saved_folder(tmp_path: Path, family: str) -> None:
    folder = str(tiny_folder(tmp_path / "m", family))
    model, expected = load_model(folder), tiny_model(family)
    assert isinstance(model, PreTrainedModel)
    assert type(model) is type(expected)
    assert not model.training
    assert model.dtype == torch.float32
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.state_dict().items())
    assert longest_sequence(load_config(folder)) == 128
    assert load_tokenizer(folder).encode("ab", add_special_tokens=False)


def test_an_older_name_of_the_longest_sequence(tmp_path: Path) -> None:
    config = transformers.MptConfig(d_model=16, n_heads=2, n_layers=1, max_seq_len=16, vocab_size=64)
    with pytest.raises(UserError, match="supports at most 16 tokens"):
        check_sequence_length(config, 32, "the model", "--seq_length")


def test_float8_is_dequantised_on_every_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers keeps it on a GPU that multiplies it, so that a mask would fit on one host and not on another."""
    model = tiny_model("llama", hidden_size=128, intermediate_size=128, num_attention_heads=4).bfloat16()
    model.save_pretrained(tmp_path)
    state, scales = load_file(tmp_path / "model.safetensors"), {}
    for name in [name for name in state if "proj" in name]:
        scales[f"{name}_scale_inv"] = torch.ones(-(-state[name].shape[0] // 128), 1)
        state[name] = state[name].to(torch.float8_e4m3fn)
    save_file(state | scales, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    here = load_model(str(tmp_path))
    (tmp_path / "short").mkdir()
    for name in ("model.safetensors", "config.json"):
        (tmp_path / "short" / name).write_bytes((tmp_path / name).read_bytes())
    short = tmp_path / "short" / "config.json"
    short.write_text(json.dumps(json.loads(short.read_text()) | {"num_hidden_layers": 1}))
    with pytest.raises(UserError, match=r"does not read model\.layers\.1\."):  # but for the scales, which were used
        load_model(str(tmp_path / "short"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    there = load_model(str(tmp_path))
    assert {parameter.dtype for parameter in there.parameters()} == {torch.bfloat16}
    assert model_fingerprint(here) == model_fingerprint(there)
    assert torch.equal(there.model.layers[0].mlp.up_proj.weight, state["model.layers.0.mlp.up_proj.weight"].bfloat16())


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to")]
)
def test_a_model_larger_than_the_memory_is_not_called_damaged(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(UserError, match=r"there is not enough memory to load it\. Use a smaller model"):
        load_model(str(tiny_folder(tmp_path / "m")))


def test_other_quantised_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_folder(tmp_path / "m")
    load = transformers.AutoModelForCausalLM.from_pretrained

    def quantised(*args: object, **options: object) -> object:
        model, found = load(*args, **options)
        options["config"].quantization_config = {"quant_method": "gptq"}  # type: ignore[attr-defined]
        model.is_quantized = True
        return model, found

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", quantised)
    with pytest.raises(UserError, match=r"its weights are quantised \(gptq\).*Give the model that it was made from\."):
        load_model(str(folder))


@pytest.mark.parametrize("described", [True, False])
def test_scales_that_no_layer_reads_are_of_other_weights(tmp_path: Path, described: bool) -> None:
    """transformers does not know the tool that has quantised the model, and would read bytes as weights."""
    folder = tiny_folder(tmp_path / "m")
    file, name = folder / "model.safetensors", "model.layers.0.self_attn.q_proj.weight"
    state = load_file(file)
    scale = state[name].abs().max() / 448
    state |= {name: (state[name] / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale.reshape(1)}
    save_file(state, file, {"format": "pt"})
    words = rf"LlamaForCausalLM does not read {name}_scale, which its files contain, so that it would be another model"
    if described:
        config = folder / "config.json"
        text = json.loads(config.read_text()) | {"quantization_config": {"quant_method": "modelopt"}}
        config.write_text(json.dumps(text))
        words = r"its weights are quantised \(modelopt\)"
    with pytest.raises(UserError, match=words):
        load_model(str(folder))


def test_files_of_another_model_are_not_read_in_part(tmp_path: Path) -> None:
    """Biases that the class does not have, and blocks that config.json does not count."""
    biased = tiny_folder(tmp_path / "biased", "qwen2")
    config = biased / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "llama"}))
    with pytest.raises(UserError, match=r"does not read model\.layers\.0\.self_attn\.k_proj\.bias, .*and 3 more"):
        load_model(str(biased))
    normed = tiny_folder(tmp_path / "normed", "qwen3")
    config = normed / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "llama"}))
    with pytest.raises(UserError, match=r"does not read model\.layers\.0\.self_attn\.k_norm\.weight, .*and 1 more"):
        load_model(str(normed))
    for more, words in (({}, r"does not read model\.layers\.1\."), ({"num_nextn_predict_layers": 1}, None)):
        short = tiny_folder(tmp_path / f"short-{len(more)}")
        config = short / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 1} | more))
        if words:
            with pytest.raises(UserError, match=words):
                load_model(str(short))
        else:  # the second block predicts a further token
            assert len(load_model(str(short)).model.layers) == 1


@pytest.mark.parametrize(
    "more",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.0.self_attn.k_scale",
        "vision_tower.patch.weight",
        "vision_tower.encoder.layers.5.self_attn.q_proj.weight",
        "audio_tower.layers.7.fc1.weight",
    ],
)
def test_what_files_have_besides_is_left(tmp_path: Path, more: str) -> None:
    folder = tiny_folder(tmp_path / "m")
    file = folder / "model.safetensors"
    save_file(load_file(file) | {more: torch.ones(2)}, file, {"format": "pt"})
    assert model_fingerprint(load_model(str(folder))) == model_fingerprint(tiny_model())


def test_an_id_of_the_hub_names_its_owner() -> None:
    """Else it is the model of one place, and a folder that is not there of another."""
    with pytest.raises(UserError, match=r"gpt2: there is no such folder, .*as openai-community/gpt2 for gpt2\."):
        load_model("gpt2")


@pytest.mark.parametrize("part", ["vision", "audio", "video"])
def test_the_processors_of_a_multimodal_model_go_with_its_tokenizer(part: str, tmp_path: Path) -> None:
    folder, out = tiny_folder(tmp_path / "m"), tmp_path / "out"
    names = ["preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"]
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {f"{part}_config": {"hidden_size": 8}}))
    for name in names:
        (folder / name).write_text(json.dumps({"of": name}))
    (folder / names[1]).unlink()
    out.mkdir()
    save_tokenizer(str(folder), out)
    assert [(out / name).exists() for name in names] == [True, False, True]
    assert (out / "tokenizer.json").is_file()
    (folder / names[1]).write_text(json.dumps({"of": names[1]}))
    save_tokenizer(str(folder), out)
    assert [json.loads((out / name).read_text())["of"] for name in names] == names


@pytest.mark.parametrize("method", ["fp8", "mxfp4", "mxfp8", "compressed-tensors"])
def test_formats_that_can_be_dequantised_are_asked_to_be(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, seen = tiny_folder(tmp_path / "m"), []
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {"quant_method": method}}))

    def stop(*_: object, **options: object) -> object:
        seen.append(options["config"].quantization_config)  # type: ignore[attr-defined]
        raise OSError("enough")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", stop)
    with pytest.raises(UserError, match="enough"):
        load_model(str(folder))
    assert seen[0]["dequantize"] is True


def test_a_relative_folder_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_folder(tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    assert load_config("m").model_type == "llama"
    assert load_config("./m").model_type == "llama"


@pytest.mark.parametrize(
    ("family", "probabilities"),
    [
        ("gpt2", ["attn_pdrop", "embd_pdrop", "resid_pdrop", "summary_first_dropout"]),
        ("opt", ["dropout", "attention_dropout", "layerdrop"]),
        ("gpt_neox", ["hidden_dropout", "attention_dropout"]),
        ("phi3", ["attention_dropout", "resid_pdrop", "embd_pdrop"]),
    ],
)
def test_dropout_is_set_to_zero(tmp_path: Path, family: str, probabilities: list[str]) -> None:
    """And in training mode the model gives one answer; by default it keeps its dropout."""
    folder = str(tiny_folder(tmp_path / "m", family, **dict.fromkeys(probabilities, 0.25)))
    ids = torch.arange(24)[None]
    kept, model = load_model(folder).train(), load_model(folder, dropout=False)
    assert [getattr(kept.config, key) for key in probabilities] == [0.25] * len(probabilities)
    assert [getattr(model.config, key) for key in probabilities] == [0.0] * len(probabilities)
    assert any(m.p > 0 for m in kept.modules() if isinstance(m, nn.Dropout)) or family == "opt"
    assert all(m.p == 0 for m in model.modules() if isinstance(m, nn.Dropout))
    with torch.no_grad():
        assert not torch.equal(kept(ids).logits, kept(ids).logits)
        expected = model(ids).logits
        assert torch.equal(model.train()(ids).logits, expected)


@pytest.mark.parametrize("load", [load_model, load_config, load_tokenizer])
@pytest.mark.parametrize("name", ["./none", "/none/at/all", "~/none-at-all", "a/b/c", "..\\none"])
def test_a_folder_that_is_not_there(load: object, name: str) -> None:
    with pytest.raises(UserError, match="there is no such folder") as caught:
        load(name)  # type: ignore[operator]
    assert name in one_line(caught)


def test_a_file_that_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.bin").write_text("x")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"m\.bin is a file\. Give a Hugging Face model folder, a \.gguf file"):
        load_model("m.bin")


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_text("x")
    with pytest.raises(UserError, match=r"holds no config\.json \(found: weights\.bin\)") as caught:
        load_model(str(tmp_path))
    one_line(caught)


def test_a_gguf_file_that_is_not_there_or_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such GGUF file") as caught:
        load_model(str(tmp_path / "none.gguf"))
    one_line(caught)
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + b"\0" * 20)
    with pytest.raises(UserError, match=r"bad\.gguf could not be read.*Check that the files are complete") as caught:
        load_model(str(tmp_path / "bad.gguf"))
    one_line(caught)


@pytest.mark.parametrize("broken", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("how", ["truncated", "empty", "missing"])
def test_a_folder_with_a_damaged_file(tmp_path: Path, broken: str, how: str) -> None:
    folder = tiny_folder(tmp_path / "m")
    content = (folder / broken).read_bytes()
    if how == "missing":
        (folder / broken).unlink()
    else:
        (folder / broken).write_bytes(content[: len(content) // 2] if how == "truncated" else b"")
    with pytest.raises(UserError) as caught:
        load_model(str(folder))
    assert str(folder) in one_line(caught)


@pytest.mark.parametrize("load", [load_model, load_config, load_tokenizer])
def test_a_hub_id_without_a_network(load: object) -> None:
    with pytest.raises(UserError, match="nobody/nothing could not be fetched from the hub") as caught:
        load("nobody/nothing")  # type: ignore[operator]
    assert "give a local folder" in one_line(caught)


@pytest.mark.parametrize(("kind", "instruction"), [(torch.bfloat16, "avx512_bf16"), (torch.float16, "avx512_fp16")])
@pytest.mark.parametrize(("instructions", "slower"), [(False, None), (True, "kind"), (True, "float32")])
def test_the_fast_dtype_of_a_cpu_is_the_one_it_multiplies_faster(
    monkeypatch: pytest.MonkeyPatch, kind: torch.dtype, instruction: str, instructions: bool, slower: str | None
) -> None:
    slow = {"kind": kind, "float32": torch.float32, None: None}[slower]
    multiplied: list[torch.dtype] = []

    def mm(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        multiplied.append(left.dtype)
        time.sleep(0.02 if left.dtype == slow else 0)
        return left

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_tile": False, instruction: instructions})
    monkeypatch.setattr(torch, "mm", mm)
    leap_pl.base_model.fast_dtype._cpu_gains_by.cache_clear()
    try:
        assert [is_slow(kind, torch.device("cpu")) for _ in range(2)] == [slower != "float32"] * 2
        if kind == torch.bfloat16:  # what is learned in; float16 is refused there
            assert fast_dtype(torch.device("cpu")) == ("bfloat16" if slower == "float32" else "float32")
        assert not is_slow(torch.float32, torch.device("cpu"))
        assert not is_slow(torch.float16, torch.device("meta"))
    finally:
        leap_pl.base_model.fast_dtype._cpu_gains_by.cache_clear()
    # What is emulated is not even tried, and nothing is measured twice; in turns, so that other work delays both.
    rounds = leap_pl.base_model.fast_dtype.ROUNDS if instructions else 0
    assert multiplied == rounds * [kind, torch.float32]


@pytest.mark.skipif(not hasattr(transformers, "Gemma4TextConfig"), reason="transformers has no Gemma 4")
def test_a_config_whose_settings_differ_by_layer(tmp_path: Path) -> None:
    """Reading such a setting of the whole model raises."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    heads = {"head_dim": 16, "global_head_dim": 32, "layer_types": ["sliding_attention", "full_attention"]}
    less = {"num_hidden_layers": 2, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "vocab_size": 64}
    config = transformers.Gemma4TextConfig(**sizes, **heads, **less)
    with pytest.raises(RuntimeError, match="head_dim"):
        _ = config.head_dim
    transformers.Gemma4ForCausalLM(config).save_pretrained(tmp_path / "m")
    assert {weight.layer for weight in find_weights(load_model(str(tmp_path / "m"))).values()} == {0, 1}


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "gpt2", "llama"])
def test_a_folder_without_a_vocabulary_has_no_tokenizer(tmp_path: Path, family: str) -> None:
    """transformers makes one of special tokens alone."""
    folder = tiny_folder(tmp_path / "model", family)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(UserError, match=r"tokenizer .*(has no vocabulary|could not be read)"):
        load_tokenizer(str(folder))


def test_a_text_model_that_is_taken_out_of_a_multimodal_one_is_told_of(tmp_path: Path) -> None:
    """Qwen 3.5 is loaded as its text model; processors would make its folder look multimodal."""
    text = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "layer_types": ["full_attention"] * 2}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
    config = transformers.Qwen3_5Config(text_config=text, vision_config=vision)
    folder = tmp_path / "model"
    transformers.Qwen3_5ForConditionalGeneration(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text("{}")
    with pytest.warns(UserWarning, match="its text model alone is loaded, and written, without its vision"):
        model = load_model(str(folder))
    assert type(model).__name__ == "Qwen3_5ForCausalLM"
    (tmp_path / "written").mkdir()
    save_tokenizer(str(folder), tmp_path / "written")
    assert (tmp_path / "written" / "tokenizer.json").exists()
    assert not (tmp_path / "written" / "preprocessor_config.json").exists()


def test_tokenizers_of_one_vocabulary_are_told_apart_by_how_they_cut() -> None:
    one, other = byte_tokenizer(), byte_tokenizer()
    assert digest_of_tokenization(one) == digest_of_tokenization(other)
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert digest_of_vocabulary(one) == digest_of_vocabulary(other)
    assert digest_of_tokenization(one) != digest_of_tokenization(other)


def test_an_optimizer_without_states_is_not_sharded(tmp_path: Path) -> None:
    strategy = ModelParallelStrategy()
    with pytest.raises(UserError, match="has no states of its optimizer, as of SGD without momentum"):
        check_state({"optimizer_states": [{"state": {}}]}, tmp_path / "a.ckpt", strategy)
    check_state({"optimizer_states": [{"state": {"a": {"exp_avg": 0}}}]}, tmp_path / "a.ckpt", strategy)
    check_state({"optimizer_states": [{"state": {}}]}, tmp_path / "a.ckpt", object())
