"""Base models whose files lie: compared with the weights that are there before anything is made of them."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bounded import measured
from conftest import fit_flags, one_line, refused
from hub_stand_in import Hub
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, byte_tokenizer, tiny_folder, tiny_model
from tiny_gguf import gguf_header, gguf_string
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from leap_pl.base_model.config import load_config
from leap_pl.base_model.loading import load_model
from leap_pl.base_model.stored_weights import StoredWeights, read_shapes
from leap_pl.base_model.tokenizer import load_tokenizer
from leap_pl.base_model.vocabulary import check_tokenizer, check_tokens
from leap_pl.errors import UserError
from leap_pl.evaluation.perplexity import perplexity
from leap_pl.oneshot.prune import prune

pytestmark = pytest.mark.usefixtures("eager")

LOAD = """
from leap_pl.base_model.config import load_config
from leap_pl.base_model.loading import load_model
from leap_pl.base_model.tokenizer import load_tokenizer
import transformers, torch, gguf
load_model(sys.argv[1])
for name in sys.argv[2:]:
    told(lambda: (load_config(name), load_model(name), load_tokenizer(name)))
"""


def changed(folder: Path, copy: Path, **changes: object) -> Path:
    shutil.copytree(folder, copy)
    told = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**told, **changes}))
    return copy


# -- config.json ----------------------------------------------------------------------------------------------

LIES = [
    {"num_hidden_layers": 1_000_000},
    {"num_hidden_layers": 10**12},
    {"num_hidden_layers": 10**400},
    {"num_hidden_layers": 3},
    {"num_hidden_layers": -1},
    {"num_hidden_layers": "many"},
    {"num_hidden_layers": {"a": 1}},
    {"num_hidden_layers": [2, 10**9]},
    {"num_hidden_layers": 2.5},
    {"num_hidden_layers": True},
    {"hidden_size": 10**9},
    {"hidden_size": -32},
    {"hidden_size": 0},
    {"hidden_size": "32"},
    {"hidden_size": 64},
    {"intermediate_size": 10**7},
    {"vocab_size": 10**12},
    {"vocab_size": -1},
    {"num_attention_heads": 10**8},
    {"num_attention_heads": 0},
    {"num_key_value_heads": 3},
    {"head_dim": 10**6},
    {"num_labels": 10**9},
    {"model_type": ["llama"]},
    {"model_type": "no such model"},
    {"model_type": 3},
    {"dtype": "float3"},
    {"dtype": {"a": []}},
    {"hidden_act": "os.system"},
    {"rope_parameters": {"rope_type": "no such type"}},
    {"rope_parameters": [[]]},
    {"architectures": ["os.system"]},
    {"architectures": 7},
    {"quantization_config": {"quant_method": "none of these"}},
    {"quantization_config": 5},
    {"max_position_embeddings": "far"},
    {"transformers_weights": "other.safetensors"},
]
HARMLESS = [{"architectures": ["os.system"]}, {"architectures": 7}]  # the model's class follows from its type


def test_a_config_that_lies(tmp_path: Path) -> None:
    """Every one is a line that names the model; the memory stays what it was."""
    folder = tiny_folder(tmp_path / "good")
    folders = [changed(folder, tmp_path / f"lie-{place}", **lie) for place, lie in enumerate(LIES)]
    # And lists in a GGUF file of 30 MB, whose reader makes an array of each byte.
    file = tmp_path / "long.gguf"
    file.write_bytes(
        gguf_header(keys=1) + gguf_string(b"a") + struct.pack("<IIQ", 9, 0, 30_000_000) + bytes(30_000_000)
    )
    *found, (message, grown) = measured(LOAD, folder, *folders, file)
    assert "its lists have more than 4,194,304 items" in message
    assert grown < 200
    for lie, copy, (message, grown) in zip(LIES, folders, found, strict=True):
        if lie in HARMLESS:
            assert message.startswith("no error")
            continue
        assert str(copy) in message, (lie, message)
        assert "\n" not in message
        assert grown < 200, (lie, grown)


@pytest.mark.parametrize(
    ("lie", "words"),
    [
        ({"num_hidden_layers": 1_000_000}, "num_hidden_layers as 1000000, and the names of the weights count to 2"),
        ({"num_hidden_layers": 3}, "num_hidden_layers as 3, and the names of the weights count to 2"),
        ({"hidden_size": 10**9}, "hidden_size as 1000000000, and the largest dimension of a weight is 260"),
        ({"vocab_size": 10**12}, "vocab_size as 1000000000000, and the largest dimension of a weight is 260"),
        ({"hidden_size": -32}, "hidden_size as '-32', which is not a count"),
        ({"intermediate_size": "x" * 1000}, f"intermediate_size as '{'x' * 60}', which is not a count"),
    ],
)
def test_what_is_said_of_a_config_that_lies(tmp_path: Path, text_file, capsys, lie: dict, words: str) -> None:
    copy = changed(tiny_folder(tmp_path / "good"), tmp_path / "lie", **lie)
    assert words in refused(fit_flags(copy, text_file, tmp_path / "run"), capsys)
    assert words in refused(
        ["prune", f"--model={copy}", "--method=magnitude", f"--output_dir={tmp_path / 'o'}"], capsys
    )
    assert not (tmp_path / "o").exists()


def test_more_weights_than_the_files_hold(tmp_path: Path) -> None:
    """Each setting alone may be, for the vocabulary is as large; together they ask for forty times as many weights."""
    copy = changed(tiny_folder(tmp_path / "good"), tmp_path / "lie", hidden_size=256, intermediate_size=260)
    with pytest.raises(UserError, match=r"ask for [\d,]+ weights, and its files contain [\d,]+\. Check that config"):
        load_model(str(copy))
    copy = changed(tiny_folder(tmp_path / "gpt2", "gpt2"), tmp_path / "table", n_positions=10**6, n_ctx=10**6)
    with pytest.raises(UserError) as caught:
        load_model(str(copy))
    assert str(copy) in one_line(caught)


def test_tables_that_a_model_makes_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_folder(tmp_path / "m")
    made = AutoModelForCausalLM.from_config

    def with_table(config: Any, **options: Any) -> Any:
        model = made(config, **options)
        model.register_buffer("table", torch.empty(10**6, 400))
        return model

    load_model(str(folder))
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", with_table)
    with pytest.raises(UserError, match=r"its settings ask for tables of 400,0\d\d,\d+ numbers in addition to the"):
        load_model(str(folder))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_is_taken_for_a_liar(tmp_path: Path, family: str) -> None:
    folder = tiny_folder(tmp_path / "m", family)
    model, expected = load_model(str(folder)), tiny_model(family)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), expected.state_dict().values(), strict=True)
    )


def test_what_is_not_read_may_be_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the log of a training that wrote the folder."""
    folder = tiny_folder(tmp_path / "m")
    monkeypatch.setattr("leap_pl.base_model.stored_weights.MOST_INDEX", 100_000)
    (folder / "trainer_state.json").write_bytes(b" " * 200_000 + b"{}")
    assert load_model(str(folder)).num_parameters()


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["deep", "array", "no UTF-8", "number", "long"])
def test_descriptions_that_are_none(tmp_path: Path, monkeypatch, name: str, content: str) -> None:
    folder = tiny_folder(tmp_path / "m")
    for limit in ("MOST_DESCRIPTION", "MOST_INDEX", "MOST_VOCABULARY"):
        monkeypatch.setattr(f"leap_pl.base_model.stored_weights.{limit}", 100_000)
    raw = {
        "deep": b'{"a":' * 15_000 + b"1" + b"}" * 15_000,
        "array": b"[1, 2]",
        "no UTF-8": b'{"a": "\xff"}',
        "number": b'{"num_hidden_layers": ' + b"9" * 10_000 + b"}",
        "long": b" " * 200_000 + b"{}",
    }[content]
    (folder / name).write_bytes(raw)
    try:
        load_config(str(folder)), load_model(str(folder)), load_tokenizer(str(folder))
    except UserError as error:
        assert str(folder) in str(error)
        assert "\n" not in str(error)
        return
    # transformers goes without a generation config that it cannot read, and takes keys that it does not know.
    assert name in ("generation_config.json", "tokenizer_config.json")
    assert content != "long"


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (
            {"weight_map": {"a": "../../outside.safetensors"}},
            "names a file outside its folder: '../../outside.safetensors'",
        ),
        ({"weight_map": {"a": "/etc/passwd"}}, "names a file outside its folder: '/etc/passwd'"),
        ({"weight_map": {"a": ".."}}, "names a file outside its folder"),
        (
            {"weight_map": {"a": "part-2.safetensors"}},
            "lacks part-2.safetensors, which model.safetensors.index.json names",
        ),
        ({"weight_map": {"a": 3}}, "is not an index of weights"),
        ({"weight_map": []}, "is not an index of weights"),
        ([], "is not an index of weights"),
        ({}, "is not an index of weights"),
    ],
)
def test_indices_that_lie(tmp_path: Path, index: object, words: str) -> None:
    folder = tiny_folder(tmp_path / "m")
    shutil.move(folder / "model.safetensors", tmp_path / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError) as caught:
        load_model(str(folder))
    assert words in one_line(caught)


def test_shapes_in_files_of_every_kind(tmp_path: Path) -> None:
    model = tiny_model()
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "parts", max_shard_size="30KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    (tmp_path / "old").mkdir()
    torch.save(model.state_dict(), tmp_path / "old" / "pytorch_model.bin")
    for kind in ("one", "parts", "old"):
        found = read_shapes(tmp_path / kind)
        assert found is not None
        assert dict(found.shapes) == expected
        assert not found.packed
        assert found.numbered == 2
        assert found.largest_dimension == 260
        assert found.elements == sum(tensor.numel() for tensor in model.state_dict().values())
    (tmp_path / "none").mkdir()
    assert read_shapes(tmp_path / "none") is None
    assert StoredWeights({}).elements == StoredWeights({}).numbered == StoredWeights({}).largest_dimension == 0


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 10_000,
        b'{"a":{"dtype":"F32","shape":[9223372036854775807,9],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,99999999999999]}}',
        b'{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}',
    ],
)
@pytest.mark.parametrize("length", [None, 1 << 40, (1 << 64) - 1])
def test_headers_of_weights_that_lie(tmp_path: Path, header: bytes, length: int | None) -> None:
    folder = tiny_folder(tmp_path / "m")
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + bytes(8))
    with pytest.raises(UserError) as caught:
        load_model(str(folder))
    assert str(file) in one_line(caught)


# -- the tokenizer --------------------------------------------------------------------------------------------


def larger_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Of ordinary tokens, which any text may hold: more than the model has."""
    told = json.loads((folder / "tokenizer.json").read_text())
    told["model"]["vocab"] |= {f"extra{k}": 256 + k for k in range(40)}
    told["model"]["vocab"] |= {"th": 300}
    told["model"]["merges"] = [["t", "h"]]
    told["added_tokens"] = [token | {"id": 301} for token in told["added_tokens"]]
    (folder / "tokenizer.json").write_text(json.dumps(told))
    return PreTrainedTokenizerFast.from_pretrained(folder)


def test_a_tokenizer_larger_than_the_vocabulary(tmp_path: Path, text_file, capsys) -> None:
    """One line, before anything is learned, pruned or measured."""
    folder = tiny_folder(tmp_path / "m")
    assert max(larger_tokenizer(folder).encode("the")) >= 260
    run = fit_flags(folder, text_file, tmp_path / "run")
    words = f"the tokenizer of {folder} has 298 tokens, of ids up to 300, and the model has embeddings for 260."
    assert words in refused(run, capsys)
    assert not list((tmp_path / "run").rglob("*.ckpt")) + list((tmp_path / "run").rglob("prior*.safetensors"))
    prune = ["prune", f"--model={folder}", f"--text={text_file}", "--sequences=2", "--seq_length=32"]
    assert words in refused([*prune, f"--output_dir={tmp_path / 'out'}"], capsys)
    assert words in refused(
        ["evaluate", f"--model={folder}", f"--perplexity={text_file}", f"--output={tmp_path / 'r.json'}"], capsys
    )
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "r.json").exists()


@pytest.mark.parametrize("spelled", [False, True])
def test_an_added_token_may_lie_behind_the_vocabulary(tmp_path: Path, text_file, capsys, spelled: bool) -> None:
    """As one for padding often does. Text that spells it out is refused before it reaches the model."""
    from leap_pl.cli.main import main

    folder = tiny_folder(tmp_path / "m")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<more{k}>" for k in range(5)])
    assert tokenizer.encode("<more4>") == [261]
    tokenizer.save_pretrained(folder)
    check_tokenizer(tokenizer, 257, "m")
    with pytest.raises(UserError, match="has 262 tokens, of ids up to 256, and the model has embeddings for 256"):
        check_tokenizer(tokenizer, 256, "m")
    text = tmp_path / "text.jsonl"
    lines = text_file.read_text().splitlines(keepends=True)[:12]
    text.write_text("".join(lines) + ('{"text": "about <more4>"}\n' * 100 if spelled else ""))
    run = fit_flags(folder, text, tmp_path / "run", "--trainer.max_steps=30", "--data.validation_sequences=0")
    evaluate = ["evaluate", f"--model={folder}", f"--perplexity={text}", "--seq_length=64"]
    evaluate.append(f"--output={tmp_path / 'r.json'}")
    if not spelled:
        main([*run, "--trainer.max_steps=2"])
        main(evaluate)
        return
    words = "the text contains token 261, which was added to the tokenizer, and the model has embeddings for 260."
    assert words in refused(run, capsys)
    assert list((tmp_path / "run" / "checkpoints").glob("step=*.ckpt"))  # what was learned before it is kept
    assert words in refused(evaluate, capsys)


def test_tokens_are_checked_wherever_a_model_gets_them(model_folder) -> None:
    model = tiny_model()
    tokens = torch.full((2, 40), 259)
    check_tokens(tokens, 260, "m")
    check_tokens(tokens[:, :0], 260, "m")
    tokens[1, 7] = 260
    with pytest.raises(UserError, match="token 260"):
        check_tokens(tokens, 260, "m")
    with pytest.raises(UserError, match="token 260"):
        perplexity(model, tokens.flatten(), seq_length=20)
    with pytest.raises(UserError, match="token 260"):
        prune(model, tokens, method="wanda", pattern=0.5)
    assert np.isfinite(perplexity(model, tokens[0], seq_length=20).value)


def test_weights_packed_in_fewer_numbers_are_no_lie(tmp_path: Path) -> None:
    save_file({"a.0.weight": torch.zeros(4, 4, dtype=torch.int32)}, tmp_path / "model.safetensors")
    found = read_shapes(tmp_path)
    assert found is not None
    assert found.packed
    assert found.elements == 128
    assert load_file(tmp_path / "model.safetensors")["a.0.weight"].numel() == 16


def test_a_config_of_the_hub_that_lies(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name may come from a mask: nothing is made of it before its sizes are looked at."""
    lying = changed(tiny_folder(tmp_path / "good"), tmp_path / "lie", num_hidden_layers=2_000_000)
    hub.files["alice/base"] = {file.name: file.read_bytes() for file in lying.iterdir()}
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *_, **__: pytest.fail("it is made"))
    for load in (load_config, load_tokenizer, load_model):
        with pytest.raises(UserError, match=r"alice/base.* num_hidden_layers as 2000000, and at most 65536"):
            load("alice/base")
