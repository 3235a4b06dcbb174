"""``prune_command``: what ``leap_pl prune`` does."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refused
from tiny import tiny_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from leap_pl.cli.export import export_command
from leap_pl.cli.main import main
from leap_pl.cli.prune import prune_command
from leap_pl.data.source import TextSource
from leap_pl.errors import UserError
from leap_pl.evaluation.subject import load_subject
from leap_pl.masks import MaskSet
from leap_pl.oneshot.allocation import OwlOptions


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(f"Line {i} of a text that calibrates, {i * i}." for i in range(400)))
    return path


def run(folder: Path, text: Path, output: Path, **changes: Any) -> Any:
    settings: dict[str, Any] = {"seq_length": 32, "sequences": 6, "device": "cpu", **changes}
    return prune_command(str(folder), str(output), str(text), **settings)


def test_no_token_of_what_begins_a_text_is_predicted(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eager: None
) -> None:
    """By the loss of the Fisher allocation, with a tokenizer that begins texts with two tokens."""
    from leap_pl.oneshot import prune as room

    real, seen = room.prune, []
    monkeypatch.setattr(room, "prune", lambda *a, **k: (seen.append(k["walk"].first_target), real(*a, **k))[1])
    begun = tiny_folder(tmp_path / "begun", prefix=2)
    for bos in ("every", "first", "none"):
        run(begun, text, tmp_path / bos, bos=bos)
    assert seen == [2, 1, 1]


def test_calibration_begins_as_the_tokenizer_begins_a_text(
    folder: Path, text: Path, tmp_path: Path, eager: None
) -> None:
    begun = tiny_folder(tmp_path / "begun", prefix=1)
    masks = [run(begun, text, tmp_path / bos, bos=bos, fisher=0.5).masks for bos in ("every", "first")]
    assert [mask.provenance.config["bos"] for mask in masks] == ["every", "first"]
    plain = run(folder, text, tmp_path / "plain", fisher=0.5).masks
    assert "bos" not in plain.provenance.config
    assert plain.digest_of_bits() == masks[1].digest_of_bits() != masks[0].digest_of_bits()


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparseswaps", "sparsegpt", "admm"])
def test_mask_and_model_are_written(method: str, folder: Path, text: Path, tmp_path: Path) -> None:
    run(folder, text, tmp_path / "out", method=method, sparsity=0.6)
    mask = MaskSet.load(tmp_path / "out" / "mask.safetensors")
    base = AutoModelForCausalLM.from_pretrained(folder)
    mask.check(base)
    assert mask.provenance.method == method
    assert mask.provenance.base_model == str(folder)
    assert mask.provenance.sparsity == 0.6
    assert mask.sparsity == pytest.approx(0.6, abs=0.01)
    errors = json.loads((tmp_path / "out" / "errors.json").read_text())["layer_error"]
    assert bool(errors) == (method != "magnitude")
    changed = (tmp_path / "out" / "model").is_dir()
    assert changed == (method in ("sparsegpt", "admm"))
    if changed:
        written = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
        parameters, dense = dict(written.named_parameters()), dict(base.named_parameters())
        for name, kept in mask.masks.items():
            assert not parameters[name][~kept].any()
        untouched = [name for name in dense if name not in mask.masks]
        assert all(torch.equal(parameters[name], dense[name]) for name in untouched)
        assert AutoTokenizer.from_pretrained(tmp_path / "out" / "model")("ab")["input_ids"]
        # It is known as what it is, and not taken for a base model.
        subject = load_subject(model=str(tmp_path / "out" / "model"))
        told = mask.provenance
        assert (subject.method, subject.base_model, subject.fingerprint, subject.asked) == (
            method,
            str(folder),
            told.fingerprint,
            0.6,
        )


def test_a_model_that_was_pruned_again_is_not_what_its_record_says(folder: Path, text: Path, tmp_path: Path) -> None:
    run(folder, text, tmp_path / "out", method="sparsegpt")
    place = str(tmp_path / "out" / "model")
    assert load_subject(model=place).method == "sparsegpt"
    export_command(str(tmp_path / "packed"), model=place, format="packed")
    model = AutoModelForCausalLM.from_pretrained(place)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[:, ::2] = 0
    model.save_pretrained(place)
    with pytest.warns(UserWarning, match="measured as a model without a record"):
        assert load_subject(model=place).method == "unknown"
    with pytest.raises(UserError, match="it was pruned again"):
        export_command(str(tmp_path / "again"), model=place, format="packed")


def test_a_matrix_of_which_nothing_is_left_is_named(folder: Path, text: Path, tmp_path: Path, capsys) -> None:
    run(folder, text, tmp_path / "out", method="magnitude", pattern="1:1000", targets=["re:.*up_proj"])
    said = capsys.readouterr().err
    assert "nothing is left of 2 of 2 matrices: model.layers.0.mlp.up_proj.weight, model.layers.1" in said
    run(folder, text, tmp_path / "most", method="magnitude", sparsity=0.9)
    assert "nothing is left" not in capsys.readouterr().err


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparseswaps"])
def test_a_model_that_is_not_written_is_not_changed(
    method: str, folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every page of it that is written to would leave the file that it is mapped from for memory."""
    from leap_pl.base_model import loading

    loaded, real = [], loading.load_model
    monkeypatch.setattr(loading, "load_model", lambda *a, **k: (loaded.append(real(*a, **k)), loaded[-1])[1])
    sparse = run(folder, text, tmp_path / "sparse", method="admm", sparsity=0.6) and tmp_path / "sparse" / "model"
    with pytest.warns(UserWarning, match=r"is sparse already: 60\.\d% of the weights to prune are 0"):
        pruned = run(sparse, text, tmp_path / "out", method=method, sparsity=0.8)
    assert pruned.masks.sparsity == pytest.approx(0.8, abs=0.01)
    before = AutoModelForCausalLM.from_pretrained(sparse).state_dict()
    after = loaded[-1].state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mask": "MASK"}, "--method wanda cannot do"),
        ({"pattern": "2:4", "owl": True}, "leave out --pattern, or --owl"),
        ({"pattern": "2:4", "fisher": 0.5}, "leave out --pattern, or --fisher"),
        ({"pattern": "2:4", "layer_sparsity": [0.5, 0.5]}, "leave out --pattern, or --layer_sparsity"),
        ({"owl": True, "fisher": 0.5}, "both --owl and --fisher"),
        ({"mask": "MASK", "method": "admm", "owl": True}, "both --mask and --owl"),
    ],
)
def test_options_that_contradict_each_other_are_refused_before_the_model_is_loaded(
    changes: dict[str, Any], words: str, folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from leap_pl.base_model import loading

    if "mask" in changes:
        run(folder, text, tmp_path / "given", method="magnitude")
        changes = {**changes, "mask": str(tmp_path / "given")}
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(UserError, match=words):
        run(folder, text, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_pattern_layers_mask_and_targets(folder: Path, text: Path, tmp_path: Path) -> None:
    pruned = run(folder, text, tmp_path / "nm", pattern="2:4", method="magnitude")
    assert pruned.masks.sparsity == 0.5
    pruned = run(folder, text, tmp_path / "layers", layer_sparsity=[0.25, 0.75])
    assert pruned.masks.densities("layer") == {"0": 0.75, "1": 0.25}
    pruned = run(folder, text, tmp_path / "owl", owl=True)
    assert pruned.masks.provenance.config["owl"]["threshold"] == 5.0
    pruned = run(folder, text, tmp_path / "mlp", targets=["re:.*mlp"], ignore=["re:.*down"])
    assert set(pruned.masks.densities("projection")) == {"mlp.gate_proj", "mlp.up_proj"}
    given = MaskSet.load(tmp_path / "owl" / "mask.safetensors")
    run(folder, text, tmp_path / "update", method="admm", mask=str(tmp_path / "owl" / "mask.safetensors"))
    kept = MaskSet.load(tmp_path / "update" / "mask.safetensors")
    assert all(torch.equal(kept.masks[name], given.masks[name]) for name in given.masks)
    assert (tmp_path / "update" / "model").is_dir()


def test_nothing_is_written_where_something_is_wrong(folder: Path, text: Path, tmp_path: Path) -> None:
    for changes, message in (
        ({"seq_length": 300}, "128 tokens"),
        ({"pattern": "4:2"}, "pattern"),
        ({"pattern": "2:4", "sparsity": 0.6}, "Leave one out"),
        ({"layer_sparsity": [0.5]}, "decoder blocks"),
        ({"mask": str(tmp_path / "none")}, "no such MaskSet"),
        ({"device": "nowhere"}, "--device"),
        ({"targets": ["re:.*nothing"]}, "nothing to gate"),
        ({"method": "admm", "damping": -1.0}, "--damping"),
    ):
        with pytest.raises(UserError, match=message):
            run(folder, text, tmp_path / "out", **changes)
        assert not list(tmp_path.iterdir()), changes
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(UserError, match="--force"):
        run(folder, text, tmp_path / "out", method="magnitude")
    with pytest.raises(UserError, match="leap_pl did not write: mine"):
        run(folder, text, tmp_path / "out", method="magnitude", force=True)
    (tmp_path / "out" / "mine").unlink()
    for _ in range(2):
        run(folder, text, tmp_path / "out", method="magnitude", force=True)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["errors.json", "leap_pl.json", "mask.safetensors"]


def test_what_is_wrong_with_the_text_is_said_in_the_options_of_prune(folder: Path, text: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"body": line}) + "\n" for line in text.read_text().split("\n\n")))
    for given, message in (
        (rows, r"has no column 'text'; it has: body\. Name the column of the text with --text_column\.$"),
        (tmp_path / "none.jsonl", r"There is no file"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            run(folder, given, tmp_path / "out")
        assert "--data." not in str(caught.value)
    (tmp_path / "short.txt").write_text("a")
    with pytest.raises(UserError, match=r"Give more text, or lower --seq_length\.$"):
        run(folder, tmp_path / "short.txt", tmp_path / "out")
    named = run(folder, rows, tmp_path / "out", text_column="body").masks
    rows.write_text(rows.read_text().replace('{"body":', '{"text":'))
    assert named.digest_of_bits() == run(folder, rows, tmp_path / "text").masks.digest_of_bits()


# Printed by an earlier version, whose options of methods had their defaults in every config.
FORMER_CONFIG = """\
model: {model}
output_dir: {output}
text: {text}
config_name: null
split: train
text_column: text
seq_length: 32
sequences: 6
separator: end_token
seed: 0
method: {method}
sparsity: 0.5
pattern: null
layer_sparsity: null
owl: false
owl_threshold: 5.0
owl_spread: 0.08
fisher: null
fisher_rows: 0.25
mask: null
mask_target: layer
damping: null
block_size: 128
iterations: 20
targets: null
ignore: null
dtype: auto
revision: null
trust_remote_code: false
device: cpu
batch_size: 4
offload: true
force: false
"""


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparseswaps", "sparsegpt", "admm"])
def test_a_config_that_an_earlier_version_printed_is_read(
    method: str, folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "former.yaml"
    config.write_text(FORMER_CONFIG.format(model=folder, output=tmp_path / "out", text=text, method=method))
    main(["prune", "--config", str(config)])
    said = capsys.readouterr()
    assert not any(word in said.out + said.err for word in ("mask_target", "block_size", "iterations"))
    former = MaskSet.load(tmp_path / "out" / "mask.safetensors")
    now = run(folder, text, tmp_path / "now", method=method).masks
    assert former.digest_of_bits() == now.digest_of_bits()
    assert former.provenance.config == now.provenance.config


@pytest.mark.parametrize(
    ("former", "changed", "says"),
    [
        ("block_size: 128", "block_size: 64", "--block_size is not for wanda but for sparsegpt. Leave it out"),
        ("iterations: 20", "iterations: 10", "--iterations is not for wanda but for admm. Leave it out"),
        ("damping: null", "damping: 0.01", "--damping is not for wanda but for sparsegpt, admm. Leave it out"),
        ("mask_target: layer", "mask_target: dense", "there is no option --mask_target. Leave it out"),
    ],
)
def test_a_former_option_with_another_value_is_refused(
    former: str, changed: str, says: str, folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "former.yaml"
    words = FORMER_CONFIG.format(model=folder, output=tmp_path / "out", text=text, method="wanda")
    assert former in words
    config.write_text(words.replace(former, changed))
    assert says in refused(["prune", "--config", str(config)], capsys)
    assert not (tmp_path / "out").exists()


def test_former_options_are_not_listed(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--help"], ["--model=m", "--output_dir=o", "--print_config"]):
        with pytest.raises(SystemExit):
            main(["prune", *words])
        assert "mask_target" not in capsys.readouterr().out


def test_the_commands_module_is_light() -> None:
    code = "import sys, leap_pl.cli.prune; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fisher": 0.0}, "--fisher 0: give a number above 0 and at most 1"),
        ({"fisher": 1.5}, "--fisher 1.5: give a number above 0 and at most 1"),
        ({"fisher": 0.5, "fisher_rows": -1.0}, "--fisher_rows -1: give a number from 0 to 1"),
    ],
)
def test_fisher_of_no_such_strength_is_refused(folder, text, tmp_path, settings, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(folder, text, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_fisher_allocation_by_command(folder, text, tmp_path) -> None:
    pruned = run(folder, text, tmp_path / "out", fisher=0.5)
    assert pruned.masks.provenance.config["fisher"]["strength"] == 0.5
    assert abs(pruned.masks.sparsity - 0.5) < 0.02
    kept = [mask.sum(1) for mask in pruned.masks.masks.values()]
    assert any(len(rows.unique()) > 1 for rows in kept)
    even = run(folder, text, tmp_path / "even", fisher=0.5, fisher_rows=0).masks.masks.values()
    assert all(len(mask.sum(1).unique()) == 1 for mask in even)
    assert len({int(mask.sum(1)[0]) / mask.shape[1] for mask in even}) > 1  # by matrices it goes on


def test_activations_between_blocks_stay_on_the_device(folder: Path, text: Path, tmp_path: Path) -> None:
    masks = [run(folder, text, tmp_path / str(offload), offload=offload).masks for offload in (True, False)]
    assert masks[0].digest_of_bits() == masks[1].digest_of_bits()


@pytest.mark.parametrize("spread", [0.02, 0.2])
def test_outliers_move_the_sparsity_of_blocks_by_the_spread(
    folder: Path, text: Path, tmp_path: Path, spread: float
) -> None:
    made = run(folder, text, tmp_path / "out", owl=True, owl_spread=spread).masks
    densities = made.densities("layer").values()
    assert max(densities) - min(densities) == pytest.approx(2 * spread, abs=1 / 32)  # rows have 32 inputs
    assert made.sparsity == pytest.approx(0.5, abs=0.01)


def test_all_that_chooses_the_text_and_the_sparsity_is_handed_on(folder, text, tmp_path: Path, monkeypatch) -> None:
    """The record of the mask names it, whatever was read."""
    import leap_pl.data
    from leap_pl.oneshot import prune as room

    seen: dict[str, Any] = {}
    blocks, pruned = leap_pl.data.calibration_blocks, room.prune

    def calibration_blocks(*arguments: Any, **settings: Any) -> Any:
        seen.update(settings)
        return blocks(*arguments, **{**settings, "config_name": None, "split": "train"})

    def prune(model: Any, *arguments: Any, **settings: Any) -> Any:
        seen.update(dtype=model.dtype, owl=settings["owl"], options=settings["options"])
        return pruned(model, *arguments, **settings)

    monkeypatch.setattr(leap_pl.data, "calibration_blocks", calibration_blocks)
    monkeypatch.setattr(room, "prune", prune)
    monkeypatch.setattr(TextSource, "is_local", False)
    chosen = {"config_name": "b", "split": "test", "separator": "blank_line", "seed": 3, "bos": "none"}
    prune_command(
        str(folder), str(tmp_path / "out"), text=str(text), seq_length=32, sequences=4, method="sparsegpt",
        dtype="bfloat16", owl=True, owl_threshold=3.0, owl_spread=0.05, damping=0.02, device="cpu", **chosen,
    )  # fmt: skip
    assert {name: seen[name] for name in chosen} == chosen
    assert (seen["seq_length"], seen["sequences"], seen["dtype"]) == (32, 4, torch.bfloat16)
    assert seen["owl"] == OwlOptions(3.0, 0.05)
    assert seen["options"].damping == 0.02
    config = MaskSet.load(tmp_path / "out" / "mask.safetensors").provenance.config
    assert {name: config[name] for name in ("config_name", "split", "separator", "seed")} == {
        name: chosen[name] for name in ("config_name", "split", "separator", "seed")
    }
