"""What other libraries keep to themselves is taken away, by name, and the work is done all the same."""

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Run, fit_flags
from tiny import tiny_model
from torch import Tensor, nn

from leap_pl.base_model import backbone
from leap_pl.callbacks import lightning_internals
from leap_pl.cli.arguments import options_of
from leap_pl.distributed import strategy
from leap_pl.errors import warn_once
from leap_pl.kernels import compiled as compiling
from leap_pl.kernels import inductor
from leap_pl.masks import MaskSet


@pytest.fixture(autouse=True)
def _warned_of_nothing_yet() -> Iterator[None]:
    warn_once.cache_clear()
    yield
    warn_once.cache_clear()


@contextmanager
def warned(*told: str) -> Iterator[None]:
    """Each of what is ``told`` is warned of once, and nothing else."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    messages = [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
    assert len(messages) == len(told), messages
    assert all(part in message for part, message in zip(told, messages, strict=True)), messages


# -- Lightning, in a version with other names ---------------------------------------------------------------

# Runs the command line on a Lightning in which these names are spelled otherwise, wherever they stand.
ANOTHER_LIGHTNING = """
import re, sys
from importlib.machinery import PathFinder, SourceFileLoader

names = re.compile(rb"\\b(" + "|".join(sys.argv.pop(1).split(",")).encode() + rb")\\b")

class Renaming(SourceFileLoader):
    def get_code(self, fullname):
        return compile(names.sub(rb"_otherwise\\1", self.get_data(self.path)), self.path, "exec")

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        spec = PathFinder.find_spec(fullname, path, target)
        if fullname.split(".")[0] == "lightning" and spec and isinstance(spec.loader, SourceFileLoader):
            spec.loader = Renaming(spec.loader.name, spec.loader.path)
        return spec

sys.meta_path.insert(0, Finder)
import os, signal
import leap_pl.cli.fit, transformers.models.llama.modeling_llama  # once for both runs
from leap_pl import LeapModule
from leap_pl.cli.main import main

before = LeapModule.on_before_zero_grad

def stopped(self, optimizer):  # within a step, and before its validation
    if self.global_step == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    return before(self, optimizer)

for stop, words in ((stopped, sys.argv[1:]), (before, [*sys.argv[1:], "--ckpt_path", "last"])):
    run = os.fork()
    if not run:
        LeapModule.on_before_zero_grad = stop
        try:
            main(words)
        except SystemExit as end:
            sys.stderr.flush()
            os._exit(end.code)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(run, 0)[1])
    print(f"ended with {code};", file=sys.stderr, flush=True)
"""

SAVING = (*lightning_internals._METHODS, *lightning_internals._STATE)


def fit_twice(names: tuple[str, ...], flags: list[str]) -> tuple[str, str]:
    """What ``fit`` says where Lightning has other ``names``: stopped at step 3, and resumed."""
    environment = os.environ | {"LEAP_PL_COMPILE": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", ANOTHER_LIGHTNING, ",".join(names), *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    stopped, _, resumed = done.stderr.partition("ended with 143;")
    assert resumed.endswith("ended with 0;\n"), done.stderr
    return stopped, resumed


def same_masks(one: Path, other: Path) -> bool:
    masks, others = MaskSet.load(one).masks, MaskSet.load(other).masks
    return all(torch.equal(mask, others[name]) for name, mask in masks.items())


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (SAVING, "saves differently"),
        (("_should_check_val_fx", "_data_fetcher"), "does not show whether a validation is due"),
        (("_skip_next_val", "_can_stop_early", "_accelerator_connector"), None),
        (("_prepare_subcommand_parser", "_parse_ckpt_path", "_subcommand_parsers", "_get", "_trainer"), None),
        (("_batches_that_stepped",), "counts steps differently"),
    ],
    ids=["saving", "validating", "stopping", "command line", "loops"],
)
def test_a_run_is_stopped_and_resumed_with_another_lightning(
    names: tuple[str, ...], says: str | None, finished: Run, model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    flags = [*fit_flags(model_folder, text_file, tmp_path), "--trainer.val_check_interval=4"]
    said, resumed = fit_twice(names, flags)
    assert "the checkpoint of step 3 is in" in said
    for told in (said, resumed):
        assert told.count("this version of Lightning") <= 1
    assert (says or "this version of Lightning") in said + resumed or says is None
    assert "this version of Lightning" not in said + resumed or says is not None
    assert same_masks(tmp_path / "checkpoints" / "mask.safetensors", finished.mask)
    assert (tmp_path / "checkpoints" / "last.ckpt").exists()


def test_sharded_checkpoints_are_folders_where_the_strategy_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sharding:
        pass

    monkeypatch.setattr(strategy, "ModelParallelStrategy", Sharding)
    trainer: Any = SimpleNamespace(strategy=Sharding())
    with warned("does not expose the save_distributed_checkpoint"):
        assert strategy.saves_shards(trainer)
        assert strategy.saves_shards(trainer)
    trainer.strategy._save_distributed_checkpoint = False
    assert not strategy.saves_shards(trainer)


# -- torch --------------------------------------------------------------------------------------------------


def gate_like(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x * y + 1, (x * y).sum()


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """How kernels are compiled is found out anew."""
    monkeypatch.delenv("LEAP_PL_COMPILE", raising=False)
    monkeypatch.setattr(compiling, "_backends", {})
    torch._dynamo.reset()
    if not compiling.can_compile(torch.device("cpu")):
        pytest.skip("torch.compile does not work here")
    assert compiling._backends == {"cpu": compiling.DirectKernel}  # else what is taken away below was not in use
    compiling._backends.clear()
    torch._dynamo.reset()


def computes(backend: Any) -> None:
    kernel = compiling.compiled(gate_like)
    for x in (torch.ones(3, 4), 2 * torch.ones(3, 4), torch.ones(5, 6)):
        made, total = kernel(x, 2 * x)
        assert torch.equal(made, 2 * x * x + 1)
        assert float(total) == float(2 * (x * x).sum())
    assert compiling._backends == {"cpu": backend}


def test_kernels_where_torch_hides_its_code(anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import compile_fx

    before = compile_fx.compile_fx_inner

    def hiding(*arguments: Any, **settings: Any) -> Any:
        code = before(*arguments, **settings)

        def call(inputs: list[Any]) -> Any:
            return code(inputs)

        call._boxed_call = True  # type: ignore[attr-defined]
        return call

    monkeypatch.setattr(compile_fx, "compile_fx_inner", hiding)
    with warned("does not expose its compiled code"):
        computes(compiling.DirectKernel)


@pytest.mark.parametrize("module", ["torch._functorch", "torch._inductor.compile_fx"])
def test_kernels_where_a_module_of_torch_is_gone(anew: None, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """The way that is tried is the way that is gone: what was found out before would not tell."""
    gone = {"torch._functorch": "config", "torch._inductor.compile_fx": "compile_fx_inner"}[module]
    compile_and_note = inductor.compile_and_note

    def without(*arguments: Any) -> Any:
        kernel = compile_and_note(*arguments)

        def call(*given: Any) -> Any:
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(sys.modules, f"{module}.{gone}", None)
                patch.delattr(f"{module}.{gone}")
                return kernel(*given)

        return call

    monkeypatch.setattr("leap_pl.kernels.direct.compile_and_note", without)
    with warned("compiled code cannot be called directly"):
        computes(compiling._torch_compile)


def test_kernels_that_would_compute_something_else_are_not_called_directly(
    anew: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    between = compiling.DirectKernel.__call__.__globals__["_Call"].between

    def wrong(arguments: Any, result: Any, graph: Any, inputs: Any, outputs: Any) -> Any:
        return between(arguments, result, lambda _: outputs, inputs, outputs)  # always those of the first call

    monkeypatch.setattr("leap_pl.kernels.direct._Call.between", wrong)
    with warned("computes a wrong result"):
        computes(compiling._torch_compile)


def test_kernels_where_sizes_cannot_be_kept_apart(anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.fx import experimental

    monkeypatch.setitem(sys.modules, "torch.fx.experimental._config", None)
    monkeypatch.delattr(experimental, "_config")
    with inductor.sizes_apart() as nothing:
        assert nothing is None


def test_ddp_sends_all_where_it_cannot_be_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(nn.parallel.DistributedDataParallel, "_set_params_and_buffers_to_ignore_for_model")
    with warned():
        strategy.reduce_only(nn.Linear(2, 2), ["weight"])
    monkeypatch.setattr(strategy.dist, "is_initialized", lambda: True)
    with warned("broadcasts the frozen weights"):
        strategy.reduce_only(nn.Linear(2, 2), ["weight"])
        strategy.reduce_only(nn.Linear(2, 2), ["weight"])


# -- transformers and the parser ----------------------------------------------------------------------------


def test_hidden_states_are_the_same_where_transformers_looks_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model(), torch.arange(24).reshape(2, 12)
    expected = backbone.split_model(model)[0](ids)
    monkeypatch.setattr(backbone, "LOOK", "look_for_sequences")
    with warned():
        assert torch.equal(backbone.split_model(model)[0](ids), expected)
    with warned("transformers has no look_for_sequences"):
        for _ in range(2):
            with backbone._unpacked(torch.device("cuda")):
                pass


def test_options_are_suggested_where_argparse_hides_its_table() -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_argument("--data.seq_length", type=int)
    assert "--data.seq_length" in options_of(parser)
    hidden: Any = SimpleNamespace(get_defaults=parser.get_defaults)
    assert options_of(hidden) == ["--data.seq_length"]


def test_counts_of_another_lightning_are_not_resumed_on_other_ranks() -> None:
    from leap_pl.checkpoints.rewind import batch_counts
    from leap_pl.errors import UserError

    loops: Mapping[str, Any] = {"fit_loop": {"epoch_loop.batches": {"total": {}, "current": {}}}}
    with pytest.raises(UserError, match="counts batches differently"):
        batch_counts({"loops": loops})
    assert batch_counts({}) == []


def test_counts_within_a_step_are_not_resumed_on_other_ranks() -> None:
    """The gradients that the step has accumulated are in no checkpoint."""
    from leap_pl.checkpoints.layout import count_for_ranks
    from leap_pl.errors import UserError

    counts = dict.fromkeys(("ready", "started", "processed", "completed"), 3)
    loops = {"fit_loop": {"epoch_loop.batch_progress": {"total": {**counts}, "current": {**counts}}}}
    found, given = SimpleNamespace(ranks=2, accumulation=2), SimpleNamespace(ranks=1)
    with pytest.raises(UserError, match="within an optimizer step of 2 ranks"):
        count_for_ranks({"loops": loops}, found, given)  # type: ignore[arg-type]
