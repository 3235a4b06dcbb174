"""A kind of gate is one file, which may lie outside the package; one that lacks something is refused when defined."""

import re
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import fit_flags, refused
from python_runs import data, trainer
from tiny import tiny_model
from torch import Tensor

from leap_pl import LeapModule, UserError
from leap_pl.base_model.weights import find_weights
from leap_pl.checkpoints.layout import masks_from_checkpoint
from leap_pl.cli.main import main
from leap_pl.gates import (
    BernoulliGate,
    FixedGate,
    Gate,
    Gates,
    GateState,
    NMGate,
    TileGate,
    attach,
    check_linear,
    detach,
    gate_kinds,
)
from leap_pl.masks import MaskSet
from leap_pl.prior import Prior

pytestmark = pytest.mark.usefixtures("eager")

ROWS = '''
"""Gates that keep or remove whole rows: one logit for all inputs of an output."""

import torch
from torch import nn

from leap_pl.gates import Gate, Gates
from leap_pl.masks.top_k import Cut, closest_top_k

SEEN = []  # (share of the run, scale of the rows) at each pass


class RowGates(Gates):
    def choose(self, sparsity):
        sizes = [torch.full_like(gate.held(), gate.shape[gate.input_dim]) for gate in self.values()]
        cuts = closest_top_k(list(self.held()), sizes, round(sparsity * self.numel))
        for gate, cut in zip(self.values(), cuts, strict=True):
            gate.cut = cut

    def curves(self, stride):
        return {"rows/scale": float(self.first.state.scales["row_scale"])}


class RowGate(Gate):
    collection = RowGates
    method = "rows"
    scales = {"row_scale": 30.0}

    def __init__(self, weight, state, lean: float = 0.1):
        super().__init__(weight, state)
        self.lean = lean
        ones = weight.parameter.narrow(self.input_dim, 0, 1)
        self.logits = nn.Parameter(torch.zeros_like(ones, dtype=torch.float32))
        self.cut = Cut(0.0, 0)

    def settings(self):
        return {"lean": self.lean}

    def soften(self, weight, key_0, key_1):
        SEEN.append((self.state.fraction, float(self.state.scales["row_scale"])))
        mask = torch.sigmoid(self.state.slopes["row_scale"] * self.logits).expand(self.shape)
        masked = mask * weight
        return masked.to(weight.dtype), mask.sum(), masked.float().square().sum()

    @torch.no_grad()
    def start_from(self, prior, seed):
        if prior is not None:
            self.logits.copy_((prior.float().mean(self.input_dim, keepdim=True) - 0.5) * self.lean)

    def hard_mask(self):
        return self.cut.mask(self.held()).expand(self.shape)
'''


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The module of another's gates, on the path."""
    folder = tmp_path_factory.mktemp("outside")
    (folder / "rowgates.py").write_text(ROWS, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        return import_module("rowgates")


@pytest.fixture(scope="module")
def run(rows: ModuleType, model_folder: Path, text_file: Path, tmp_path_factory) -> tuple[Path, Any]:
    """A finished run with them, and its gates."""
    folder = tmp_path_factory.mktemp("rows")
    rows.SEEN.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEAP_PL_COMPILE", "0")
        cli = main(fit_flags(model_folder, text_file, folder, "--model.gate=rowgates.RowGate", "--model.gate.lean=0.2"))
    return folder, cli.model.gates


def test_it_learns_and_its_masks_are_as_sparse_as_rows_can_be(run: tuple[Path, Any], rows: ModuleType) -> None:
    folder, gates = run
    assert isinstance(gates, rows.RowGates)
    learned = MaskSet.load(folder / "checkpoints" / "mask.safetensors")
    assert learned.provenance.method == "rows"
    assert learned.provenance.config["gate"] == {"class_path": "RowGate", "init_args": {"lean": 0.2}}
    kept, removed = [], []  # of each row, its logit and its length
    for name, mask in learned.masks.items():
        assert torch.equal(mask.any(1), mask.all(1))
        for logit, row in zip(gates[name].logits.detach().flatten(), mask, strict=True):
            (kept if row.all() else removed).append((float(logit), row.numel()))
    assert min(kept)[0] >= max(removed)[0]
    asked, count = round(0.5 * learned.total), learned.total - learned.kept
    edge = [length for logit, length in kept if logit == min(kept)[0]]
    edge += [length for logit, length in removed if logit == max(removed)[0]]
    assert abs(count - asked) <= max(edge) / 2  # one row more or less would be no closer
    prior = MaskSet.load(folder / "checkpoints" / "prior.safetensors")
    starts = {name: (mask.float().mean(1) - 0.5) * 0.2 for name, mask in prior.masks.items()}
    assert all((gates[name].logits.detach()[:, 0] != start).any() for name, start in starts.items())


def test_it_reads_the_place_in_the_run_and_a_scale_of_its_own(run: tuple[Path, Any], rows: ModuleType) -> None:
    places = dict.fromkeys(rows.SEEN)
    assert list(places)[:6] == [(step / 6, 30.0) for step in range(6)]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run[0] / "tensorboard"))
    events.Reload()
    assert events.Scalars("rows/scale")[-1].value == 30
    assert {"density/soft", "weights_by_layer/hard/000", "mask/changed_from_prior"} <= set(events.Tags()["scalars"])


def test_its_checkpoint_gives_the_mask_and_is_exported(run: tuple[Path, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    checkpoint = run[0] / "checkpoints" / "last.ckpt"
    learned = MaskSet.load(run[0] / "checkpoints" / "mask.safetensors")
    again = masks_from_checkpoint(checkpoint)
    assert all(torch.equal(again.masks[name], mask) for name, mask in learned.masks.items())
    facts = main(["export", f"--ckpt_path={checkpoint}", f"--output_dir={tmp_path / 'model'}"])
    assert facts["removed"] == learned.total - learned.kept
    weights = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "model").named_parameters())
    assert all(not weights[name][~mask].any() for name, mask in learned.masks.items())


@pytest.mark.parametrize("typed", [["--model.gate=rowgates.RowGate"], []], ids=["typed", "from the checkpoint"])
def test_it_resumes_bit_identical(run: tuple[Path, Any], model_folder, text_file, tmp_path: Path, typed) -> None:
    earlier = run[0] / "checkpoints" / "step=4.ckpt"
    main(fit_flags(model_folder, text_file, tmp_path, *typed, f"--ckpt_path={earlier}"))
    assert not (tmp_path / "checkpoints" / "step=4.ckpt").exists()  # not from the start
    one, other = (
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for folder in (run[0], tmp_path)
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_example_of_contributing_works(model_folder, text_file, tmp_path: Path, monkeypatch) -> None:
    """It is run as it stands there."""
    text = (Path(__file__).parents[2] / "docs" / "extend.md").read_text(encoding="utf-8")
    section = re.search(r"\n## Add a gate\n(.*?)(\n##|\Z)", text, re.DOTALL)
    assert section
    code = re.findall(r"```python\n# (\w+)\.py\n(.*?)```", section[1], re.DOTALL)
    for name, lines in code:
        (tmp_path / f"{name}.py").write_text(lines, encoding="utf-8")
    gate = re.findall(r"leap_pl fit --model\.gate (\S+)", section[1])
    assert len(code) == len(gate) == 1
    monkeypatch.syspath_prepend(tmp_path)
    cli = main(fit_flags(model_folder, text_file, tmp_path, f"--model.gate={gate[0]}", "--trainer.max_steps=2"))
    kind = type(cli.model.gates.first)
    assert f"{kind.__module__}.{kind.__name__}" == gate[0]
    learned = MaskSet.load(tmp_path / "checkpoints" / "mask.safetensors")
    assert learned.kept == learned.total - round(0.5 * learned.total)
    assert learned.provenance.method == "calm"


# -- with weights that are trained ------------------------------------------------------------------------


class OfItsWeight(BernoulliGate):
    """Keeps large weights more."""

    def soften(self, weight: Tensor, key_0: Tensor, key_1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mask = torch.sigmoid(self.state.slope * self.logits + 5 * weight.abs())
        masked = mask * weight
        return masked.to(weight.dtype), mask.sum(), masked.float().square().sum()


class AtRandom(BernoulliGate):
    """Draws without the keys: the backward pass would have another mask."""

    def soften(self, weight: Tensor, key_0: Tensor, key_1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        masked = torch.rand_like(weight) * weight
        return masked, self.logits.sum(), masked.float().square().sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [BernoulliGate, NMGate, TileGate, FixedGate, OfItsWeight, AtRandom])
def test_the_mask_of_a_trained_weight_is_that_of_its_gradient(kind: type[Gate], dtype: torch.dtype) -> None:
    weights = find_weights(tiny_model().to(dtype))
    for name, gate in attach(weights, kind, GateState(seed=1)).items():
        weight = weights[name].parameter.detach()
        gate.start_from(weight.abs() > weight.abs().median(), 0)
        if kind in (OfItsWeight, AtRandom):
            with pytest.raises(UserError, match=rf"{kind.__name__} computes its soft mask from the weight, or another"):
                check_linear(gate, weight)
        else:
            check_linear(gate, weight)


def test_weights_are_not_trained_where_the_mask_depends_on_them(model_folder: Path, text_file: Path) -> None:
    settings: Any = {"dtype": "float32", "gate": OfItsWeight, "prior": Prior(method="magnitude")}
    trainer(max_steps=1).fit(LeapModule(str(model_folder), **settings), data(text_file))
    with pytest.raises(UserError, match=r"OfItsWeight computes .* set --model.train_weights none"):
        trainer(max_steps=1).fit(LeapModule(str(model_folder), train_weights="kept", **settings), data(text_file))


# -- what is no kind of gate ------------------------------------------------------------------------------


def test_a_gate_that_lacks_something_is_refused_when_it_is_defined() -> None:
    with pytest.raises(
        TypeError, match=r"Half is a kind of gate and does not define hard_mask, start_from, collection"
    ):

        class Half(Gate):
            def settings(self) -> dict[str, Any]:
                return {}

            def soften(self, *args: Any) -> Any: ...

    with pytest.raises(TypeError, match=r"Lone is .* does not define collection \(a class of Gates\)\. Define"):

        class Lone(BernoulliGate):
            collection = BernoulliGate  # type: ignore[assignment]

    assert "Half" not in gate_kinds()


def test_a_base_of_kinds_may_lack_what_its_kinds_define() -> None:
    class Base(Gate, abstract=True):
        collection = Gates

        def settings(self) -> dict[str, Any]:
            return {}

    assert "Base" not in gate_kinds()
    with pytest.raises(TypeError, match="abstract"):
        Base(None, GateState())  # type: ignore[abstract, arg-type]
    with pytest.raises(TypeError, match="Kind is a kind of gate and does not define hard_mask, soften, start_from"):

        class Kind(Base): ...

    class Whole(NMGate):
        """Of a kind that is whole, another one is too."""

    assert gate_kinds()["Whole"] is Whole


def test_a_bad_gate_on_the_command_line_ends_in_one_line(
    model_folder, text_file, tmp_path: Path, monkeypatch, capsys
) -> None:
    lines = ["from leap_pl.gates import Gate, Gates", "class Bad(Gate):", "    collection = Gates"]
    (tmp_path / "badgates.py").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    message = refused(fit_flags(model_folder, text_file, tmp_path, "--model.gate=badgates.Bad"), capsys)
    assert "Bad is a kind of gate and does not define hard_mask, settings, soften, start_from" in message
    message = refused(fit_flags(model_folder, text_file, tmp_path, "--model.gate=leap_pl.gates.Gate"), capsys)
    assert "model.gate is leap_pl.gates.gate.Gate, but must be a subclass of Gate that is not abstract." in message


# -- all gates of a model ---------------------------------------------------------------------------------


def test_gates_of_one_model_are_of_one_kind(rows: ModuleType) -> None:
    from bare_gates import gate_of, nm_gate

    from leap_pl.errors import UserError

    one = {"a": gate_of((4, 8), name="a"), "b": gate_of((4, 8), name="b")}
    gates = Gates.of(one)
    assert dict(gates) == one
    assert gates.numel == 64
    assert gates.unused == ["a", "b"]
    for other in (nm_gate((4, 8)), gate_of((4, 8), spread=0.5)):
        with pytest.raises(UserError, match="the gates of a model must have the same kind and settings: a has Bern"):
            gates | {"w": other}
    assert len(Gates.of({})) == 0
    with pytest.raises(ValueError, match="there are no gates"):
        Gates.of({}).describe()


def test_a_kind_with_its_own_softening_is_softened_by_it_in_a_block_too() -> None:
    class Halved(BernoulliGate):
        def soften(self, weight: Tensor, key_0: Tensor, key_1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            masked, kept, energy = super().soften(weight, key_0, key_1)
            return masked / 2, kept, energy

    class Named(BernoulliGate):
        pass

    model = tiny_model()
    weights, state = find_weights(model), GateState()
    seen: list[Tensor] = []
    for kind in (Named, Halved):
        gates = attach(weights, kind, state)
        for gate in gates.values():
            gate.start_from(None, 0)
        weight = next(iter(weights.values()))
        hook = weight.module.register_forward_hook(lambda module, *_: seen.append(module.weight.detach()))
        model(torch.arange(8)[None])
        hook.remove()
        detach(weights)
    assert torch.equal(seen[1], seen[0] / 2)
