"""Runs that train weights and cannot: what is asked for does not belong together, and one line says so."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run, refused
from recovered_runs import Flags
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import tiny_folder

from leap_pl import LeapModule, MaskSet, UserError
from leap_pl.base_model.loading import load_model
from leap_pl.cli.main import main

pytestmark = pytest.mark.usefixtures("eager", "event_files_in_order")


def without(words: list[str], *starts: str) -> list[str]:
    return [word for word in words if not word.startswith(starts)]


def test_bad_input_is_refused_in_one_line(
    recovered: Path, recover: Flags, finished_run: Run, model_folder: Path, tmp_path: Path, capsys
) -> None:
    packed = tmp_path / "packed"
    main(["export", f"--mask={finished_run.mask}", f"--output_dir={packed}", "--format=packed"])
    other, last = tiny_folder(tmp_path / "other", seed=1), recovered / "checkpoints" / "last.ckpt"
    words, masked, pruned = recover(tmp_path / "run"), "--model.mask", tmp_path / "pruned"
    weights_of_run = recovered / "checkpoints" / "weights.safetensors"
    tiny_folder(pruned / "model")
    without_norms = tiny_folder(tmp_path / "olmo", "olmo")
    cases = {
        "this mask was made for": [*without(words, "--model.base_model"), f"--model.base_model={other}"],
        "a GPT2LMHeadModel, has no weight 'model.layers.0.self_attn.q_proj.weight', 'model.layers.0.self_attn.k_proj": [
            *without(words, "--model.base_model"),
            f"--model.base_model={tiny_folder(tmp_path / 'gpt2', 'gpt2')}",
        ],
        "the base model of this run, a LlamaForCausalLM, has no weight 'model.layers.1.self_attn.q_proj.weight'": [
            *without(words, "--model.base_model"),
            f"--model.base_model={tiny_folder(tmp_path / 'shallow', num_hidden_layers=1)}",
        ],
        f"model.mask {packed} is packed. Unpack it: leap_pl export --model": [
            *without(words, masked),
            f"{masked}={packed}",
        ],
        f"model.weights {weights_of_run} is a file. Give a Hugging Face model folder; of the mask": [
            *words,
            f"--model.weights={weights_of_run}",
        ],
        "nothing to train": [*words, "--model.train_weights=none"],
        "give one of none, kept, lora, norms": [*words, "--model.train_weights=all"],
        "no gated layer is named zz": [
            *words,
            "--model.train_weights=lora",
            "--model.weight_training.target_modules=[q_proj,zz]",
        ],
        "no mask is given. Add --model.mask": without(words, masked),
        "--model.optimizer.lr would not be used: the mask is not learned. For the weights, type "
        "--model.weight_training.lr.": [*words, "--model.optimizer.lr=1e-4"],
        "--model.warmup_steps would not": [*words, "--model.warmup_steps", "3"],
        "--model.annealing.alpha.start would not": [*words, "--model.annealing.alpha.start=1"],
        "--model.prior.method would not": [*words, "--model.prior.method=wanda"],
        "--model.gate.pattern would not": [*words, "--model.gate.pattern", "1:4"],
        "--model.objective.budget would not": [*words, "--model.objective.budget=7"],
        "--model.objective.weight would not": [*words, "--model.objective.weight", "0.5"],
        "target_modules is empty. Name layers, or leave it out": [
            *words,
            "--model.train_weights=lora",
            "--model.weight_training.target_modules=[]",
        ],
        "model.sparsity is 0.5, and a mask of 1:4 removes 0.75. Set --model.sparsity 0.75": [
            *without(words, masked),
            *("--model.gate.pattern=1:4", "--model.prior.method=magnitude"),
        ],
        **{
            f"model.gate.pattern is {pattern}, and prior.method makes masks that are unstructured or n:m. Give one": [
                *without(words, masked),
                *("--model.gate=FixedGate", f"--model.gate.pattern={pattern}", "--model.prior.method=magnitude"),
            ]
            for pattern in ("2x4", "8x8 tiles, dense or 2:4")
        },
        "the norms of OlmoForCausalLM have no weights": [
            *without(words, "--model.base_model", masked),
            *(f"--model.base_model={without_norms}", "--model.train_weights=norms"),
            *("--model.gate=FixedGate", "--model.prior.method=magnitude"),
        ],
        "is not sparse: 0.0% of its weights are 0. Name the mask with --mask": [
            *("export", f"--model={model_folder}", "--format=mask", f"--output_dir={tmp_path / 'mask'}")
        ],
        f"For a mask that stays as it is give --model.mask {finished_run.mask}": [
            *without(words, masked),
            f"--model.prior.mask={finished_run.mask}",
        ],
        "type leap_pl recover": ["fit", *words[1:]],
        "learn mask and weights together": [*words, "--model.gate=BernoulliGate"],
        "whose mask is fixed, and this is leap_pl fit": ["fit", *without(words[1:], masked), f"--ckpt_path={last}"],
        "whose mask is learned, and this is leap_pl recover": [*words, f"--ckpt_path={finished_run.checkpoint}"],
        "model.train_weights was 'kept' and is 'lora'": [*words, f"--ckpt_path={last}", "--model.train_weights=lora"],
        "has no weight model.layers.0.self_attn.q_proj.weight of the shape": [
            *words,
            f"--model.weights={tiny_folder(tmp_path / 'wide', hidden_size=64)}",
        ],
        f"model.weights {packed} is packed. Unpack it:": [*words, f"--model.weights={packed}"],
        f"model.weights {recovered} is a folder without a config.json. Give a Hugging Face model folder; leap_pl": [
            *words,
            f"--model.weights={recovered}",
        ],
        f"model.weights {pruned} has its model in a folder of its own. Give {pruned / 'model'}.": [
            *words,
            f"--model.weights={pruned}",
        ],
        "or the run's mask.safetensors; leap_pl export --format mask --ckpt_path makes one of any checkpoint": [
            *without(words, masked),
            f"{masked}={last}",
        ],
        "only kept weights under a fixed mask": [
            *without(words, masked),
            f"--model.mask={finished_run.mask}",
            f"--model.weights={model_folder}",
            "--model.train_weights=norms",
        ],
        "and --model.train_weights kept, or leave it": [
            *words,
            f"--model.weights={model_folder}",
            "--model.train_weights=lora",
        ],
        "model.weight_training.lr is -1": [*words, "--model.weight_training.lr=-1"],
    }
    for says, line in cases.items():
        assert says in refused(line, capsys), says
    assert not list(tmp_path.rglob("*.ckpt"))


def test_weights_and_mask_belong_together(recovered: Path, finished_run: Run, tmp_path: Path, capsys) -> None:
    for name in ("mask", "weights"):
        shutil.copy(recovered / "checkpoints" / f"{name}.safetensors", tmp_path)
    mask, weights = tmp_path / "mask.safetensors", tmp_path / "weights.safetensors"

    def says() -> str:
        return refused(["export", f"--mask={mask}", f"--output_dir={tmp_path / 'model'}", "--force"], capsys)

    with safe_open(weights, framework="pt") as file:
        metadata, tensors = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, weights, metadata | {"mask_digest": "0"})
    assert "has the weights of another mask" in says()
    save_file(tensors, weights, metadata | {"format_version": "2"})
    assert "has no trained weights of format version 1" in says()
    del metadata["digests"]  # as in earlier versions: with them any change is damage
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name] * float("nan")}, weights, metadata)
    assert "infinite or NaN" in says()
    save_file(tensors | {name: tensors[name][:1]}, weights, metadata)
    assert "of the shape that was trained" in says()
    weights.write_bytes(weights.read_bytes()[:100])
    assert "truncated or damaged" in says()
    weights.unlink()
    assert "weights.safetensors is missing" in says()
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda state: state.pop("trained.master.model.layers.0.mlp.up_proj.weight"), "lacks the trained weights of"),
        (lambda state: state.update({"trained.other.model.norm.weight": torch.zeros(1)}), None),
        (lambda state: state.pop("bits.model.layers.0.mlp.up_proj.weight"), "lacks the logits of"),
        (
            lambda state: state.update({"bits.model.layers.0.mlp.up_proj.weight": torch.zeros(1)}),
            "stored bits of shape",
        ),
        (
            lambda state: state.update({"trained.master.model.norm.weight": torch.zeros(2)}),
            "of the shape that was trained",
        ),
        (
            lambda state: state.update(
                {"trained.other.model.norm.weight": state.pop("trained.master.model.norm.weight")}
            ),
            "cannot be computed",
        ),
    ],
)
def test_a_damaged_checkpoint_is_refused(
    recovered: Path, tmp_path: Path, capsys, spoil: Callable[[dict[str, Any]], Any], says: str | None
) -> None:
    checkpoint = torch.load(recovered / "checkpoints" / "last.ckpt", weights_only=True)
    spoil(checkpoint["state_dict"])
    torch.save(checkpoint, tmp_path / "spoilt.ckpt")
    words = ["export", f"--ckpt_path={tmp_path / 'spoilt.ckpt'}", f"--output_dir={tmp_path / 'model'}"]
    if says is None:
        main(words)
    else:
        assert says in refused(words, capsys)
    assert (tmp_path / "model").exists() == (says is None)


def test_a_checkpoint_that_lacks_what_a_module_learns(recovered: Path, finished: Run) -> None:
    with pytest.raises(UserError, match="the checkpoint lacks what this run learns of"):
        LeapModule.load_from_checkpoint(finished.checkpoint, train_weights="kept")


def test_an_earlier_runs_files_are_replaced_by_force_alone(recovered: Path, recover: Flags, tmp_path: Path, capsys):
    shutil.copytree(recovered, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    assert "holds another run" in refused(recover(tmp_path / "run"), capsys)
    main([*recover(tmp_path / "run", "--trainer.max_steps=1"), "--force"])
    assert sorted(path.name for path in folder.iterdir() if path.suffix == ".safetensors") == [
        "mask.safetensors",
        "prior.safetensors",
        "weights.safetensors",
    ]
    (folder / "weights.safetensors").write_bytes((folder / "prior.safetensors").read_bytes())
    assert "is not a file of trained weights" in refused([*recover(tmp_path / "run"), "--force"], capsys)


def test_a_mask_whose_weights_were_trained_does_not_stand_for_them(
    recovered: Path, finished_run: Run, model_folder: Path, tmp_path: Path
) -> None:
    masks, model = MaskSet.load(recovered), load_model(str(model_folder))
    with pytest.raises(UserError, match=r"weights were trained under this mask, which does not have them\. Export"):
        masks.apply_(model)
    masks.apply_(model, check=False)
    assert masks.is_applied_to(model)
    # Alone it is what it was before that run.
    main(["export", f"--mask={recovered}", "--format=mask", f"--output_dir={tmp_path / 'mask'}"])
    alone, before = MaskSet.load(tmp_path / "mask").provenance, MaskSet.load(finished_run.mask).provenance
    figures = ("perplexity", "perplexity_of")
    assert alone.config == {name: value for name, value in before.config.items() if name not in figures}
    assert (alone.method, alone.sparsity) == (before.method, before.sparsity)
    MaskSet.load(tmp_path / "mask").apply_(load_model(str(model_folder)))
