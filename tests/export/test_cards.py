"""The model card says what a model is, how it was made and what was measured of it, and nothing else."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from random_masks import random_mask
from safetensors.torch import load_file
from tiny import tiny_folder

from leap_pl.checkpoints.layout import masks_from_checkpoint
from leap_pl.cli.evaluate import evaluate_command
from leap_pl.cli.export import export_command
from leap_pl.cli.prune import prune_command
from leap_pl.errors import UserError
from leap_pl.export.card import card_of, facts_of
from leap_pl.export.hugging_face import export_model
from leap_pl.export.method import decisive_settings
from leap_pl.inputs.records import MASK, ZEROS
from leap_pl.masks import MaskSet, Provenance
from leap_pl.masks.mask_set import TRAINED


@pytest.mark.parametrize("format", ["huggingface", "packed", "mask"])
def test_card_says_where_it_comes_from(format: str, finished: Run, model_folder: Path, tmp_path: Path) -> None:
    """In two screens, without a path of the machine that it was made on."""
    export_command(str(tmp_path / "out"), ckpt_path=str(finished.checkpoint), format=format)  # type: ignore[arg-type]
    card = (tmp_path / "out" / "README.md").read_text()
    identity = masks_from_checkpoint(finished.checkpoint).provenance
    for fact in (
        f"\n# {'Mask of ' * (format == 'mask')}{model_folder.name}, 50% sparse\n",
        f"| fingerprint of the base model | `{identity.fingerprint}` |",
        "pipeline_tag: text-generation",
        "`leap`",
        "| α | `25.0 → 350.0` |",
        "| text | `text.jsonl` |",
        "| mlp.up_proj | 0.",
        "By decoder layer, the sparsity is from 0.4",
        "cite LEAP, [arXiv:2605.17289](https://arxiv.org/abs/2605.17289)",
    ):
        assert fact in card
    assert str(model_folder.parent) not in card
    assert str(finished.folder) not in card
    assert len(card.splitlines()) < 80
    assert ((tmp_path / "out" / "config.json").exists(), (tmp_path / "out" / "mask.safetensors").exists()) == {
        "huggingface": (True, True),
        "packed": (True, False),
        "mask": (False, True),
    }[format]


def test_the_facts_of_a_card_are_those_of_the_run(finished: Run, tmp_path: Path) -> None:
    """Of six steps of two micro-batches of 2 × 32 tokens, by the defaults."""
    told = decisive_settings(MaskSet.load(finished.mask).provenance)
    assert told.pop("versions")
    assert told.pop("fingerprint of the base model") == MaskSet.load(finished.mask).provenance.fingerprint
    assert told == {
        "method": "leap",
        "pattern": "unstructured",
        "target sparsity": "0.5",
        "text": "text.jsonl",
        "separator of documents": "end_token",
        "block length, tokens": "32",
        "tokens read": "768",
        "passes over the text": "1",
        "optimizer steps": "6",
        "optimizer": "AdamW",
        "learning rate": "0.001",
        "losses": "lm 1.0",
        "α": "25.0 → 350.0",
        "τ": "4.0 → 0.05",
        "prior": "magnitude",
        "seed": "0",
    }
    export_command(str(tmp_path / "mask"), mask=str(finished.mask), format="mask")
    assert "--perplexity wikitext2 --seq_length 32` measures it" in (tmp_path / "mask" / "README.md").read_text()


def test_zeros_that_rounding_makes_are_not_the_base_models(model_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "mask.safetensors"
    random_mask(model_folder, file)  # keeps small weights too
    exact = export_command(str(tmp_path / "exact"), mask=str(file))
    int8 = export_command(str(tmp_path / "int8"), mask=str(file), format="packed", values="int8")
    plain = export_command(str(tmp_path / "plain"), model=str(tmp_path / "int8"), format="huggingface")
    mask = export_command(str(tmp_path / "mask"), model=str(tmp_path / "plain"), format="mask")
    told = load_file(tmp_path / "plain" / "model.safetensors")
    kept = MaskSet.load(file).masks
    assert sum(int((told[name][bits] == 0).sum()) for name, bits in kept.items()) > exact[ZEROS]
    assert int8[ZEROS] == plain[ZEROS] == mask[ZEROS] == exact[ZEROS]


@pytest.mark.parametrize("changed", ["updated", "trained"])
def test_zeros_that_rounding_makes_of_changed_weights_are_not_counted(
    changed: str, finished: Run, model_folder: Path, capsys
) -> None:
    """They are what was zero before, and the card says so, as does the command's line."""
    masks = MaskSet.load(finished.mask)
    if changed == "trained":
        masks = masks.with_provenance(config=masks.provenance.config | {TRAINED: {"kind": "kept"}})
    facts = facts_of(masks, 3) | ({"updated_by": "sparsegpt"} if changed == "updated" else {})
    card = card_of(masks, facts)
    assert "3 of th" in card
    assert " are zero." in card
    card = card_of(masks, facts | {"rounded_to": "int8"})
    assert re.search(r"then rounded to int8; 3 of .* were zero before that\.", card)
    assert " are zero" not in card


def test_the_card_says_which_part_of_a_hub_text_was_measured(finished: Run, model_folder: Path, tmp_path: Path) -> None:
    figure = {"value": 12.3, "seq_length": 32, "stride": 32, "split": "validation", "config_name": "b"}
    masks, figures = MaskSet.load(finished.mask), {"some/text": figure}
    export_model(masks, tmp_path / "out", str(model_folder), format="mask", perplexity=figures)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| some/text (configuration b, split validation) | 12.300 | – |" in card


def test_every_method_has_its_paper() -> None:
    from leap_pl.export.method import PAPERS
    from leap_pl.gates import BernoulliGate, NMGate, TileGate
    from leap_pl.oneshot.methods import METHODS

    assert set(PAPERS) == {*METHODS, *(gate.method for gate in (BernoulliGate, NMGate, TileGate))}


def test_a_mask_that_stayed_has_no_settings_of_learning() -> None:
    """Whatever is known of how it was made."""
    learned = {"optimizer": {"lr": 0.1}, "annealing": {"alpha": {"start": 1, "end": 2}}, "prior": {"method": "wanda"}}
    fisher = {"prior": {"method": "wanda", "fisher": 0.5, "graded": True}}
    told = decisive_settings(Provenance("m", "f", "leap", config=fisher))
    assert told["prior"] == "wanda, allocated by Fisher information (0.5), graded"
    assert {"learning rate", "α", "prior"} <= decisive_settings(
        Provenance("m", "f", "leap", 0.5, config=learned)
    ).keys()
    for made in ({}, {"text": "a.txt"}):
        config = learned | {"mask": {"method": "magnitude", "sparsity": 0.5, "config": made}}
        told = decisive_settings(Provenance("m", "f", "magnitude", 0.5, config=config))
        assert not {"learning rate", "α", "prior"} & told.keys()
        assert told.get("text that the mask was made with") == made.get("text")


def test_paths_are_shortened_and_stay_distinct() -> None:
    from leap_pl.export.hub import shortened

    value = {"/home/me/a.txt": ["/home/me/b", "c/d", 1], "/tmp/a.txt": {"x": "/"}, "a/b": "~/c"}
    assert shortened(value) == {"a.txt (1)": ["b", "c/d", 1], "a.txt (2)": {"x": "/"}, "a/b": "~/c"}


@pytest.mark.parametrize(
    ("card", "stated"),
    [
        (None, {}),
        ("license: mit\n", {}),
        ("---\nlicense: apache-2.0\nlanguage: en\n---\nlicense: mit\n", {"license": "apache-2.0"}),
        (
            "---\r\nlicense: 'other'\r\nlicense_link: https://example.org/l\r\n---\r\n",
            {"license": "other", "license_link": "https://example.org/l"},
        ),
        ("---\nlicense: 'mit\nlicense_name: a: b\nlicense_link: -\n---\n", {}),
    ],
)
def test_the_licence_of_a_base_model(card: str | None, stated: dict[str, str], tmp_path: Path) -> None:
    from leap_pl.base_model.licence import licence_of

    if card is not None:
        (tmp_path / "README.md").write_text(card, newline="")
    assert licence_of(str(tmp_path)) == stated
    assert licence_of("org/none") == {}  # out of reach


def test_zeros_of_the_base_model_are_counted_apart(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "base")
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name][0, :5] = 0
    from safetensors.torch import save_file

    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    mask = random_mask(folder, tmp_path / "mask.safetensors")
    facts = export_command(str(tmp_path / "out"), mask=str(tmp_path / "mask.safetensors"))
    assert facts["zeros_of_base_model_among_kept"] == int(mask.masks[name][0, :5].sum())
    assert facts["removed"] == mask.total - mask.kept


def test_perplexities_of_another_mask_do_not_get_into_the_card(
    finished: Run, model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    """Of the base model, of another mask, or of a result that does not say: one line, before the model is loaded."""
    small = {"perplexity": str(text_file), "seq_length": 32, "max_tokens": 200}
    random_mask(model_folder, tmp_path / "other.safetensors")
    results = {
        "own": evaluate_command(mask=str(finished.mask), **small),
        "checkpoint": evaluate_command(ckpt_path=str(finished.checkpoint), **small),
        "other": evaluate_command(mask=str(tmp_path / "other.safetensors"), **small),
        "dense": evaluate_command(model=str(model_folder), **small),
    }
    silent = {key: value for key, value in results["own"]["model"].items() if key != "mask_digest"}
    results["silent"] = {**results["own"], "model": silent}
    for name, result in results.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    for name in ("other", "dense", "silent"):
        with pytest.raises(
            UserError, match=r"json (does not record its mask|was measured with a different mask)\."
        ) as caught:
            export_command(
                str(tmp_path / "no"), mask=str(finished.mask), perplexity=str(tmp_path / f"{name}.json"), model="gone"
            )
        assert "\n" not in str(caught.value)
    for name in ("own", "checkpoint"):
        out = tmp_path / f"with-{name}"
        export_command(str(out), mask=str(finished.mask), perplexity=str(tmp_path / f"{name}.json"))
        assert "## Perplexity" in (out / "README.md").read_text()
    export_command(
        str(tmp_path / "two"), mask=str(finished.mask), perplexity=f"{tmp_path}/own.json,{tmp_path}/dense.json"
    )
    of_text = next(iter(results["dense"]["perplexity"].values()))
    elsewhere = {**results["dense"], "perplexity": {f"other/{text_file.name}": of_text}}
    (tmp_path / "elsewhere.json").write_text(json.dumps(elsewhere))
    pair = f"{tmp_path}/own.json,{tmp_path}/elsewhere.json"  # the same text by another path
    same = export_command(str(tmp_path / "same"), mask=str(finished.mask), perplexity=pair)
    assert [figure["dense"] for figure in same["perplexity"].values()] == [of_text["value"]]
    figures = [next(iter(results[name]["perplexity"].values()))["value"] for name in ("own", "dense")]
    export_command(str(tmp_path / "packed"), model=str(tmp_path / "two"), format="packed")
    for folder in (tmp_path / "two", tmp_path / "packed"):  # and in what is made of it
        row = f"| text.jsonl (the first {small['max_tokens']} tokens) | {figures[0]:.3f} | {figures[1]:.3f} | 32 | 32 |"
        assert row in (folder / "README.md").read_text()
    shutil.copy(tmp_path / "dense.json", tmp_path / "again.json")
    for wrong, says in (("other", "with a different mask"), ("again", "names dense results alone")):
        with pytest.raises(UserError, match=says):
            pair = f"{tmp_path}/dense.json,{tmp_path}/{wrong}.json"
            export_command(str(tmp_path / "no"), mask=str(finished.mask), perplexity=pair, model="gone")
    longer = evaluate_command(model=str(model_folder), **small | {"seq_length": 16})
    (tmp_path / "longer.json").write_text(json.dumps(longer))
    with pytest.raises(UserError, match="cannot share a column: they differ in seq_length"):
        pair = f"{tmp_path}/own.json,{tmp_path}/longer.json"
        export_command(str(tmp_path / "no"), mask=str(finished.mask), perplexity=pair, model="gone")
    exported = evaluate_command(model=str(out), **small)
    (tmp_path / "exported.json").write_text(json.dumps(exported))
    export_command(str(tmp_path / "again"), mask=str(finished.mask), perplexity=str(tmp_path / "exported.json"))


def test_perplexities_of_other_weights_under_the_mask_do_not_get_into_the_card(
    finished: Run, model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    """Those that a one-shot method has updated, for its own mask or another's, and rounded ones."""
    small = {"perplexity": str(text_file), "seq_length": 32, "max_tokens": 200}
    options: dict[str, Any] = {"sequences": 2, "seq_length": 32, "text": str(text_file)}
    prune_command(str(model_folder), str(tmp_path / "own"), method="sparsegpt", **options)
    prune_command(str(model_folder), str(tmp_path / "again"), method="admm", mask=str(finished.mask), **options)
    export_command(str(tmp_path / "int8"), mask=str(finished.mask), format="packed", values="int8", force=True)
    cases = {
        "sparsegpt": (tmp_path / "own" / "model", tmp_path / "own" / MASK),
        "leap (weights of admm)": (tmp_path / "again" / "model", finished.mask),
        "leap (int8)": (tmp_path / "int8", finished.mask),
    }
    for method, (model, mask) in cases.items():
        measured = evaluate_command(model=str(model), **small)
        assert measured["method"] == method
        (tmp_path / "r.json").write_text(json.dumps(measured))
        with pytest.raises(UserError, match=re.escape(f"with this mask and other weights ({method}): ")):
            export_command(str(tmp_path / "no"), mask=str(mask), perplexity=str(tmp_path / "r.json"))
        alone = evaluate_command(mask=str(mask), **small)
        (tmp_path / "alone.json").write_text(json.dumps(alone))
        out = tmp_path / f"of {method}"
        export_command(str(out), mask=str(mask), perplexity=str(tmp_path / "alone.json"))
        assert "## Perplexity" in (out / "README.md").read_text()
    rounded = {"format": "packed", "values": "int8", "force": True}
    for name, before in (("alone", True), ("r", False)):  # the last of the cases is that of the rounded ones
        out, result = tmp_path / f"int8 {name}", tmp_path / f"{name}.json"
        export_command(str(out), mask=str(finished.mask), perplexity=str(result), **rounded)
        figures = (out / "README.md").read_text().partition("## Perplexity")[2].partition("Perplexity on the run")[0]
        value = next(iter(json.loads(result.read_text())["perplexity"].values()))["value"]
        assert f"| {value:.3f} |" in figures
        said = "Measured before the weights were rounded to int8"
        assert f"{said}{'.' if before else ', but for text.jsonl.'}" in (out / "README.md").read_text()
    earlier = {**json.loads((tmp_path / "alone.json").read_text()), "method": "leap"}
    (tmp_path / "earlier.json").write_text(json.dumps(earlier))
    export_command(str(tmp_path / "e"), mask=str(finished.mask), perplexity=str(tmp_path / "earlier.json"))


def test_the_card_tells_only_perplexities_that_say_of_what_they_are(finished: Run, tmp_path: Path) -> None:
    mask = MaskSet.load(finished.mask)
    config = mask.provenance.config

    def card(**changes: object) -> str:
        told = {key: value for key, value in (config | changes).items() if value is not None}
        path = mask.with_provenance(config=told).save(tmp_path / "mask.safetensors")
        export_command(str(tmp_path / "out"), mask=str(path), force=True)
        return (tmp_path / "out" / "README.md").read_text()

    assert "(4 blocks of 32 tokens): " in card()
    assert " dense." in card()
    assert "Perplexity on the run" not in card(perplexity_of=None)
    of_other_text = card(dense_perplexity_of=config["dense_perplexity_of"] | {"tokens": "0" * 16})
    assert "under the mask." in of_other_text
    assert "after step 4 of 6): " in card(perplexity_of=config["perplexity_of"] | {"step": 4})
    begun = card(data=config["data"] | {"bos": "every"})
    assert "| blocks that begin with BOS | `every` |" in begun
    assert "(4 blocks of 32 tokens, each beginning with BOS): " in begun


def test_shares_of_layers_and_projections_are_sparsities(model_folder: Path, tmp_path: Path) -> None:
    masks = random_mask(model_folder, tmp_path / "mask.safetensors", sparsity=0.3).masks
    export_command(str(tmp_path / "out"), mask=str(tmp_path / "mask.safetensors"), format="mask")
    facts = json.loads((tmp_path / "out" / "leap_pl.json").read_text())

    def removed(part: str) -> float:
        some = torch.cat([mask.flatten() for name, mask in masks.items() if part in name])
        return float((~some).double().mean())

    assert facts["sparsity_by_layer"]["1"] == pytest.approx(removed("layers.1."))
    assert facts["sparsity_by_projection"]["mlp.up_proj"] == pytest.approx(removed("mlp.up_proj"))
    assert removed("mlp.up_proj") < 0.4
    assert re.search(r"\| mlp\.up_proj \| 0\.[23]", (tmp_path / "out" / "README.md").read_text())


CODE = """
from transformers import LlamaForCausalLM


class Mine(LlamaForCausalLM):
    pass
"""


@pytest.mark.parametrize("trusted", [True, False])
@pytest.mark.parametrize("format", ["huggingface", "mask"])
def test_the_lines_that_load_a_model_with_code_of_its_own_say_so(format: Any, trusted: bool, tmp_path: Path) -> None:
    """Unless the code was not run, and is not in what was written."""
    base = tiny_folder(tmp_path / "base")
    prune_command(str(base), str(tmp_path / "pruned"), method="magnitude")
    (base / "modeling_mine.py").write_text(CODE)
    config = json.loads((base / "config.json").read_text())
    named = {"auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"}}
    (base / "config.json").write_text(json.dumps(config | named))
    words = {"mask": str(tmp_path / "pruned"), "model": str(base), "format": format, "trust_remote_code": trusted}
    export_command(str(tmp_path / "out"), **words)
    card = (tmp_path / "out" / "README.md").read_text()
    assert ('dtype="auto", trust_remote_code=True)' in card) == trusted
    assert ("code of its own, which these lines run: read it first" in card) == trusted
