"""``leap_pl export --format packed``: both ways without loss, for a mask and for any sparse model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run, fit_flags, refused
from packed_models import masked_base, sparse_folder
from random_masks import random_mask
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny_folder

from leap_pl.base_model.loading import load_model
from leap_pl.base_model.weights import find_weights
from leap_pl.cli.evaluate import evaluate_command
from leap_pl.cli.export import export_command
from leap_pl.cli.main import main
from leap_pl.comparison.entries import read_entries
from leap_pl.errors import UserError, warn_once
from leap_pl.evaluation.subject import load_subject
from leap_pl.export import packed as packed_export
from leap_pl.export.sparse_model import is_as_recorded, masks_of
from leap_pl.inputs.records import ZEROS
from leap_pl.masks import MaskSet
from leap_pl.masks.patterns import choose, read_form
from leap_pl.sparse.folder import read_masks


def same(one: Path, other: Path) -> bool:
    return one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_to_huggingface_and_back_without_loss(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    masks = sparse_folder(Path("base"), family)
    masks.save("mask.safetensors")
    main(["export", "--mask=mask.safetensors", "--output_dir=plain"])
    main(["export", "--mask=mask.safetensors", "--output_dir=packed", "--format=packed"])
    main(["export", "--model=packed", "--output_dir=unpacked"])
    main(["export", "--model=unpacked", "--output_dir=again", "--format=packed"])
    assert sorted(path.name for path in Path("unpacked").iterdir()) == sorted(p.name for p in Path("plain").iterdir())
    for name in ("mask.safetensors", "leap_pl.json", "README.md"):
        assert same(Path("plain", name), Path("unpacked", name)), name
    for name in ("model.safetensors", "leap_pl.json", "README.md"):
        assert same(Path("packed", name), Path("again", name)), name
    before, after = load_model("plain").state_dict(), load_model("unpacked").state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_the_packed_folder(finished: Run, tmp_path: Path, capsys) -> None:
    facts = export_command(str(tmp_path / "out"), ckpt_path=str(finished.checkpoint), format="packed")
    said = capsys.readouterr().out
    assert "sparsity 0.500000" in said
    assert f"packed: {facts['packed']['bytes_per_weight']:.3f} bytes a gated weight (float32), dense 4" in said
    assert read_masks(tmp_path / "out").digest_of_bits() == MaskSet.load(finished.mask).digest_of_bits()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "import leap_pl\nfrom transformers" in card
    assert "the bitmaps of the packed weights hold it" in card
    assert not (tmp_path / "out" / "mask.safetensors").exists()
    assert json.loads((tmp_path / "out" / "leap_pl.json").read_text())["packed"] == facts["packed"]


def test_bytes_a_weight(tmp_path: Path) -> None:
    """At most 2ρ + 1/8 + 1% in bfloat16, padding and sums included."""
    masks = sparse_folder(tmp_path / "base")
    facts = packed(masks, tmp_path, "auto")["packed"]
    density = masks.kept / masks.total
    assert facts["dense_bytes_per_weight"] == 2
    words = sum(mask.numel() // mask.shape[-1] * -(-mask.shape[-1] // 32) for mask in masks.masks.values())
    assert facts["bytes"] == 2 * masks.kept + 4 * words
    stored = load_file(tmp_path / "auto" / "model.safetensors")
    parts = [stored[f"{name}{suffix}"] for name in masks.masks for suffix in ("", "_bitmap")]
    assert sum(part.nbytes for part in parts) == facts["bytes"]
    assert 32 * words == sum(
        -(-mask.shape[-1] // 32) * 32 * (mask.numel() // mask.shape[-1]) for mask in masks.masks.values()
    )
    assert 2 * density < facts["bytes_per_weight"] < 2 * density + 0.25  # rows of 32 and 48 columns


def packed(masks: MaskSet, place: Path, values: str) -> dict[str, dict[str, float]]:
    masks.save(place / "mask.safetensors")
    return export_command(str(place / values), mask=str(place / "mask.safetensors"), format="packed", values=values)  # type: ignore[arg-type]


def test_int8_is_smaller_and_says_that_it_rounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    masks = sparse_folder(tmp_path / "base")
    facts = packed(masks, tmp_path, "int8")["packed"]
    assert facts["bytes_per_weight"] < 0.8
    stored = load_file(tmp_path / "int8" / "model.safetensors")
    parts = [tensor for name in masks.masks for key, tensor in stored.items() if key.startswith(name)]
    assert facts["bytes"] == sum(part.nbytes for part in parts)
    assert "rounded to int8" in (tmp_path / "int8" / "README.md").read_text()
    exact = masked_base(tmp_path, masks).state_dict()
    found = load_model(str(tmp_path / "int8")).state_dict()
    for name, weight in exact.items():
        step = 1.01 * weight.float().abs().amax() / 127 / 2 + 2**-8 * weight.float().abs() if name in masks.masks else 0
        assert bool(((found[name].float() - weight.float()).abs() <= step).all()), name
    export_command(str(tmp_path / "plain"), model=str(tmp_path / "int8"))
    assert "rounded to int8" in (tmp_path / "plain" / "README.md").read_text()
    capsys.readouterr()
    again = export_command(str(tmp_path / "again"), model=str(tmp_path / "int8"), format="packed")["packed"]
    assert again == facts  # as the model has them
    assert "kept weights were zero before they were rounded to int8; read back" in capsys.readouterr().out


def test_any_sparse_model_packs(tmp_path: Path) -> None:
    """Whoever pruned it: with -0 for zeros, as a product with a mask leaves them, and no record."""
    folder = tiny_folder(tmp_path / "foreign")
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith("proj.weight"):
            weights[name] = weight * (weight.abs() > 0.12)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    facts = export_command(str(tmp_path / "out"), model=str(folder), format="packed")
    assert facts["provenance"]["method"] == "unknown"
    before, after = load_model(str(folder)).state_dict(), load_model(str(tmp_path / "out")).state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    (entry,) = read_entries([str(tmp_path / "out")])
    assert entry.sparsity == pytest.approx(facts["sparsity"])


def test_what_prune_updated_packs_with_its_provenance(tmp_path: Path, text_file: Path) -> None:
    folder = tiny_folder(tmp_path / "base")
    flags = ["--method=sparsegpt", "--sparsity=0.6", "--sequences=2", "--seq_length=32"]
    main(["prune", f"--model={folder}", f"--output_dir={tmp_path / 'pruned'}", f"--text={text_file}", *flags])
    facts = export_command(str(tmp_path / "out"), model=str(tmp_path / "pruned" / "model"), format="packed")
    assert (facts["provenance"]["method"], facts["updated_by"]) == ("sparsegpt", "sparsegpt")
    assert facts["sparsity"] == pytest.approx(0.6, abs=0.02)
    said = "**Kept weights were changed** by `sparsegpt`;"
    assert said in (tmp_path / "out" / "README.md").read_text()
    again = export_command(str(tmp_path / "again"), model=str(tmp_path / "out"))  # and when it is unpacked
    assert again["updated_by"] == "sparsegpt"
    assert said in (tmp_path / "again" / "README.md").read_text()
    record = tmp_path / "pruned" / "model" / "leap_pl.json"
    record.write_text(json.dumps({"provenance": json.loads(record.read_text())["provenance"]}))  # of earlier versions
    former = export_command(str(tmp_path / "former"), model=str(record.parent), format="packed")
    assert former["updated_by"] == "sparsegpt"
    # The mask, for the base model's weights, says nothing of the others.
    mask = export_command(str(tmp_path / "mask"), model=str(tmp_path / "out"), format="mask")
    own = export_command(str(tmp_path / "own"), mask=str(tmp_path / "pruned" / "mask.safetensors"), format="packed")
    methods = [load_subject(model=str(tmp_path / name)).method for name in ("out", "again", "own")]
    assert methods == ["sparsegpt", "sparsegpt", "sparsegpt (mask alone)"]
    assert "updated_by" not in mask
    assert "updated_by" not in own
    assert "Kept weights are the base model's, bit for bit" in (tmp_path / "own" / "README.md").read_text()


def test_a_kept_weight_that_prune_has_set_to_0_is_kept(tmp_path: Path, text_file: Path) -> None:
    """As SparseGPT does with weights of inputs that are 0 in all of its text: here half of those of a layer."""
    folder, out = tiny_folder(tmp_path / "base", "opt"), tmp_path / "pruned"
    flags = ["--method=sparsegpt", "--pattern=2:4", "--sequences=1", "--seq_length=4"]
    main(["prune", f"--model={folder}", f"--output_dir={out}", f"--text={text_file}", *flags])
    masks, weights = MaskSet.load(out), load_file(out / "model" / "model.safetensors")
    assert any(bool((weights[name][mask] == 0).any()) for name, mask in masks.masks.items())
    export_command(str(tmp_path / "packed"), model=str(out / "model"), format="packed")
    export_command(str(tmp_path / "mask"), model=str(tmp_path / "packed"), format="mask")
    assert MaskSet.load(tmp_path / "mask").digest_of_bits() == masks.digest_of_bits()
    assert read_masks(tmp_path / "packed").digest_of_bits() == masks.digest_of_bits()
    assert load_subject(model=str(out / "model")).mask_digest == masks.digest_of_bits()


@pytest.mark.parametrize(("pattern", "kept"), [("2:4", 2), ("1:4", 1)])
def test_nm_masks_pack_the_same_way(pattern: str, kept: int, tmp_path: Path) -> None:
    masks = sparse_folder(tmp_path / "base")
    weights = find_weights(load_model(str(tmp_path / "base")))
    chosen = {n: choose(w.parameter.detach().abs().float(), read_form(pattern), "row") for n, w in weights.items()}
    packed(MaskSet(chosen, masks.with_provenance(config={"pattern": pattern}).provenance), tmp_path, "auto")
    assert read_masks(tmp_path / "auto").provenance.config["pattern"] == pattern
    card = " ".join((tmp_path / "auto" / "README.md").read_text().split())
    assert f"of every 4 consecutive inputs of an output, {kept} are kept" in card


def test_a_model_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import PreTrainedModel

    masks = sparse_folder(tmp_path / "base")
    save = PreTrainedModel.save_pretrained
    monkeypatch.setattr(
        PreTrainedModel,
        "save_pretrained",
        lambda self, folder, **more: save(self, folder, max_shard_size="9KB", **more),
    )
    packed(masks, tmp_path, "auto")
    assert len([*(tmp_path / "auto").glob("model-*.safetensors")]) > 2
    index = json.loads((tmp_path / "auto" / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) >= {f"{name}_bitmap" for name in masks.masks}
    found = load_model(str(tmp_path / "auto")).state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in masked_base(tmp_path, masks).state_dict().items())
    assert read_masks(tmp_path / "auto").digest_of_bits() == masks.digest_of_bits()


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_packed_folder_that_does_not_read_back_is_not_exported(family: str, tmp_path: Path, monkeypatch) -> None:
    masks = sparse_folder(tmp_path / "base", family)
    masks.save(tmp_path / "mask.safetensors")
    monkeypatch.setattr(
        packed_export.PackedWeight, "unpack", lambda self, dtype=None: torch.zeros(self.shape, dtype=dtype)
    )
    words = ["export", f"--mask={tmp_path / 'mask.safetensors'}", f"--output_dir={tmp_path / 'out'}", "--format=packed"]
    with pytest.raises(SystemExit):
        main(words)
    assert not (tmp_path / "out").exists()


def test_what_is_refused(tmp_path: Path, model_folder: Path, finished: Run, capsys: pytest.CaptureFixture[str]) -> None:
    out = f"--output_dir={tmp_path / 'out'}"
    line = refused(["export", f"--model={model_folder}", "--format=packed", out], capsys)
    assert "0.0% of the weights of the decoder blocks are zero" in line
    assert "--force" in line
    assert "Add --format packed" in refused(["export", f"--mask={finished.mask}", "--values=int8", out], capsys)
    assert "--model MODEL --format packed" in refused(["export", f"--model={model_folder}", out], capsys)
    line = refused(["export", f"--model={model_folder}", "--format=packed", "--perplexity=x.json", out], capsys)
    assert "--perplexity is for a mask" in line
    main(["export", f"--model={model_folder}", "--format=packed", out, "--force"])
    found = load_model(str(tmp_path / "out")).state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in load_model(str(model_folder)).state_dict().items())


def test_a_recorded_mask_that_is_not_the_models(tmp_path: Path, finished: Run, capsys) -> None:
    out = tmp_path / "out"
    export_command(str(out), mask=str(finished.mask))
    weights = load_file(out / "model.safetensors")
    save_file({name: weight + 1 for name, weight in weights.items()}, out / "model.safetensors", {"format": "pt"})
    line = refused(["export", f"--model={out}", "--format=packed", f"--output_dir={tmp_path / 'packed'}"], capsys)
    assert "that is not the model's" in line


def test_a_record_of_other_zeros_than_the_models_says_nothing_of_it(
    tmp_path: Path, finished: Run, text_file: Path
) -> None:
    """As where an exported model was pruned further, or trained, and saved into its folder."""
    out, packed, measured = tmp_path / "out", tmp_path / "packed", tmp_path / "result.json"
    of_text = {"perplexity": str(text_file), "seq_length": 32, "max_tokens": 128}
    evaluate_command(mask=str(finished.mask), output=str(measured), **of_text)  # type: ignore[arg-type]
    exported = export_command(str(out), mask=str(finished.mask), perplexity=str(measured))
    assert load_subject(model=str(out)).method == exported["provenance"]["method"] == "leap"
    before, card = load_file(out / "model.safetensors"), (out / "README.md").read_text()
    gated = MaskSet.load(out).masks
    further = {name: weight * (weight.abs() > 0.15) if name in gated else weight for name, weight in before.items()}
    filled = {name: weight + 1 if name in gated else weight for name, weight in before.items()}
    for weights, method in ((filled, "dense"), (further, "unknown")):
        save_file(weights, out / "model.safetensors", {"format": "pt"})
        warn_once.cache_clear()
        with pytest.warns(UserWarning, match=r"not those of the mask that its leap_pl\.json is of"):
            subject = load_subject(model=str(out))
        assert (subject.method, subject.mask_digest, subject.config) == (method, None, {})
        assert subject.fingerprint != exported["provenance"]["fingerprint"]
    with pytest.raises(
        UserError, match=r"has more zeros than its leap_pl\.json records: it was pruned again\. Remove mask"
    ):
        export_command(str(packed), model=str(out), format="packed")
    (out / "mask.safetensors").unlink()  # as the message says
    again = {name: weight.flip(0) if name in gated else weight for name, weight in before.items()}
    save_file(again, out / "model.safetensors", {"format": "pt"})  # as many zeros, elsewhere
    warn_once.cache_clear()
    with pytest.warns(UserWarning, match="not those of the mask"):
        assert load_subject(model=str(out)).method == "unknown"
    save_file(further, out / "model.safetensors", {"format": "pt"})
    facts = export_command(str(packed), model=str(out), format="packed")
    assert facts["provenance"]["method"] == "unknown"
    assert facts["sparsity"] > exported["sparsity"]
    assert "perplexity" not in facts
    assert "| text | sparse |" in card
    assert "| text | sparse |" not in (packed / "README.md").read_text()


def test_zeros_that_another_data_type_may_make_are_no_further_pruning(tmp_path: Path) -> None:
    """Up to a thousandth of the weights of the mask."""
    base, out = tiny_folder(tmp_path / "base"), tmp_path / "out"
    masks = random_mask(base, tmp_path / "mask.safetensors")
    export_command(str(out), mask=str(tmp_path / "mask.safetensors"))
    weights = load_file(out / "model.safetensors")
    kept = weights["model.layers.0.mlp.up_proj.weight"].view(-1)
    places = kept.nonzero().flatten()
    assert masks.total == 15_360
    for zeros, again in ((15, False), (16, True)):  # of 15.36
        kept[places[:zeros]] = 0
        save_file(weights, out / "model.safetensors", {"format": "pt"})
        model = load_model(str(out))
        assert is_as_recorded(str(out), model) != again
        if again:
            with pytest.raises(UserError, match="it was pruned again"):
                masks_of(str(out), model)
        else:
            assert masks_of(str(out), model).digest_of_bits() == masks.digest_of_bits()


def test_zeros_that_the_base_model_had_are_as_recorded(tmp_path: Path) -> None:
    """Also without the file of the mask, from which they differ: as of a repository whose cache lacks it."""
    base = tiny_folder(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][:, ::2] = 0
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    random_mask(base, tmp_path / "mask.safetensors")
    facts = export_command(str(tmp_path / "out"), mask=str(tmp_path / "mask.safetensors"))
    assert facts[ZEROS] > 0
    for _ in range(2):
        subject = load_subject(model=str(tmp_path / "out"))
        assert subject.fingerprint == facts["provenance"]["fingerprint"]
        assert subject.mask_digest == facts["mask_digest"]
        (tmp_path / "out" / "mask.safetensors").unlink(missing_ok=True)
    again = export_command(str(tmp_path / "packed"), model=str(tmp_path / "out"), format="packed")
    assert again["provenance"]["fingerprint"] == facts["provenance"]["fingerprint"]


def test_a_packed_model_is_pruned_and_learned_as_the_one_with_its_zeros(tmp_path: Path, text_file: Path) -> None:
    masks = sparse_folder(tmp_path / "base")
    masks.save(tmp_path / "mask.safetensors")
    found = []
    for form in ("huggingface", "packed"):
        folder, run = tmp_path / form, tmp_path / f"run-{form}"
        export_command(str(folder), mask=str(tmp_path / "mask.safetensors"), format=form)  # type: ignore[arg-type]
        main(["prune", f"--model={folder}", f"--output_dir={run}", "--method=magnitude", "--sparsity=0.7"])
        main([*fit_flags(folder, text_file, run), "--trainer.max_steps=2"])
        made = (MaskSet.load(path) for path in (run / "mask.safetensors", run / "checkpoints" / "mask.safetensors"))
        found.append([(mask.digest_of_bits(), mask.provenance.fingerprint) for mask in made])
    assert found[0] == found[1]


def test_sparse_and_packed_evaluate_and_compare_alike(tmp_path: Path, finished: Run, text_file: Path) -> None:
    results = []
    for form in ("huggingface", "packed"):
        export_command(str(tmp_path / form), mask=str(finished.mask), format=form)  # type: ignore[arg-type]
        output = tmp_path / f"{form}.json"
        main(
            [
                "evaluate",
                f"--model={tmp_path / form}",
                f"--perplexity={text_file}",
                "--seq_length=32",
                f"--output={output}",
            ]
        )
        results.append(json.loads(output.read_text()))
    for key in ("sparsity", "method", "config"):
        assert results[0][key] == results[1][key]
    assert results[0]["perplexity"] == results[1]["perplexity"]
    assert results[0]["model"]["mask_digest"] == results[1]["model"]["mask_digest"]
    entries = read_entries(
        [str(tmp_path / "packed.json"), str(tmp_path / "huggingface.json"), str(tmp_path / "packed")]
    )
    assert all(entry.mask is not None for entry in entries)


@pytest.mark.parametrize("of_mask", [False, True])
def test_what_is_damaged_beside_the_packed_weights_is_found(of_mask: bool, tmp_path: Path, monkeypatch) -> None:
    """A norm that reads back otherwise, and a bitmap."""
    masks = sparse_folder(tmp_path / "base")
    real = packed_export._verify

    def damaged(base: Any, masks: MaskSet, folder: Path, **options: Any) -> None:
        stored = load_file(folder / "model.safetensors")
        with safe_open(folder / "model.safetensors", "pt") as opened:
            metadata = opened.metadata()
        name = f"{next(iter(masks.masks))}_bitmap" if of_mask else "model.norm.weight"
        changed = stored[name].clone()
        changed.view(-1)[0] = ~changed.view(-1)[0] if of_mask else changed.view(-1)[0] + 1
        save_file({**stored, name: changed}, folder / "model.safetensors", metadata)
        real(base, masks, folder, **options)

    monkeypatch.setattr(packed_export, "_verify", damaged)
    with pytest.raises(UserError):
        packed(masks, tmp_path, "auto")
    assert not (tmp_path / "auto").exists()
