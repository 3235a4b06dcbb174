"""Code planted at every string of a mask, a result, a record, a model folder and a tasks folder: nothing runs.

What would run is seen by an audit hook: imports of the planted module, unpickled names, started processes.
"""

import base64
import copy
import json
import pickle
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hostile_files import PROVENANCE, RESULT, SHAPES, mask_file
from tiny import byte_tokenizer, tiny_folder, tiny_model

from leap_pl.base_model.config import load_config
from leap_pl.base_model.hub_kernels import without_hub_kernels
from leap_pl.base_model.loading import load_model
from leap_pl.base_model.tokenizer import load_tokenizer
from leap_pl.base_model.weights import find_weights, model_fingerprint
from leap_pl.cli.main import main
from leap_pl.cli.quiet import quiet_lm_eval
from leap_pl.comparison.entries import read_entries
from leap_pl.comparison.table import make_table
from leap_pl.errors import UserError
from leap_pl.evaluation.subject import exported_record, load_subject
from leap_pl.evaluation.tasks import evaluate_tasks
from leap_pl.export.card import card_of, facts_of
from leap_pl.masks import MaskSet, Provenance

EVIL = "leap_pl_evil"
WATCHED = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.startfile",
    "subprocess.Popen",
    "pickle.find_class",
    "pty.spawn",
)


class Watch:
    """What ran while it was switched on. A hook cannot be taken away again."""

    def __init__(self) -> None:
        self.on, self.ran = False, []
        sys.addaudithook(self.hear)

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.on and (event in WATCHED or (event == "import" and EVIL in str(arguments[0]))):
            self.ran.append((event, str(arguments)[:200]))


WATCH = Watch()


class Planted:
    """A module that makes a file when it is imported, and what would run it if a string were taken for code."""

    def __init__(self, folder: Path) -> None:
        self.mark = folder / "ran"
        self.code = f"open({str(self.mark)!r}, 'w').close()\n"
        package = folder / "path" / EVIL
        package.mkdir(parents=True)
        for name in ("__init__", "module"):
            (package / f"{name}.py").write_text(self.code + "class Config: pass\n")
        self.path = str(package.parent)
        command = f"touch {self.mark}"
        trap = b"cos\nsystem\n(S" + repr(command).encode() + b"\ntR."
        assert b"system" in trap
        self.values: list[Any] = [
            "os.system",
            {"class_path": "os.system", "init_args": {"command": command}},
            {"class_path": f"{EVIL}.module.Config", "init_args": {}},
            [f"{EVIL}.module.Config"],
            f"{EVIL}.module",
            f"{EVIL}.module.Config",
            f"!!python/object/apply:os.system ['{command}']",
            f"!function {EVIL}.module.Config",
            f"{{{{ cycler.__init__.__globals__.os.system('{command}') }}}}",
            f"$({command})",
            f"; {command} #",
            base64.b64encode(trap).decode(),
            trap.decode(),
        ]

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Make sure that nothing runs within the statement."""
        sys.path.insert(0, self.path)
        WATCH.ran.clear()
        WATCH.on = True
        try:
            yield
        finally:
            WATCH.on = False
            sys.path.remove(self.path)
        assert not WATCH.ran
        assert not self.mark.exists()
        assert not [name for name in sys.modules if EVIL in name]


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Planted:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return Planted(tmp_path)


def strings(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the keys that lead to each string inside ``value``."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        if isinstance(inner, str):
            yield (*above, key)
        yield from strings(inner, (*above, key))


def variants(value: Any, planted: Planted) -> Iterator[Any]:
    """Yield ``value`` with each of the planted values at each of its strings, and as each of its keys."""
    for place in strings(value):
        for put in planted.values:
            changed = copy.deepcopy(value)
            holder = changed
            for key in place[:-1]:
                holder = holder[key]
            holder[place[-1]] = put
            yield changed
            if isinstance(put, str) and isinstance(holder, dict):
                holder[put] = holder.pop(place[-1])
                yield changed


def use(path: Path) -> str:
    """Read and use what is in ``path``: how it ended."""
    try:
        if path.suffix == ".safetensors":
            mask = MaskSet.load(path)
            card_of(mask, facts_of(mask, 0))
        table = make_table(read_entries([str(path)]), {"wanda"})
        table.text(80), table.markdown(), table.csv()
    except UserError:
        return "refused"
    return "accepted"


def test_the_watch_sees_what_runs(planted: Planted) -> None:
    import importlib
    import os

    for run in (
        lambda: importlib.import_module(f"{EVIL}.module"),
        lambda: os.system("true"),
        lambda: pickle.loads(planted.values[-1].replace("touch", "true ").encode()),
    ):
        with pytest.raises(AssertionError), planted.watched():
            run()
        planted.mark.unlink(missing_ok=True)
        for name in [name for name in sys.modules if EVIL in name]:
            del sys.modules[name]


def test_at_every_string_of_a_mask(planted: Planted, tmp_path: Path) -> None:
    ends = []
    with planted.watched():
        for provenance in variants(PROVENANCE, planted):
            (tmp_path / "m.safetensors").write_bytes(mask_file(json.dumps(SHAPES), json.dumps(provenance)))
            ends.append(use(tmp_path / "m.safetensors"))
        for put in planted.values:
            for shapes in ({**SHAPES, next(iter(SHAPES)): put}, put):
                (tmp_path / "m.safetensors").write_bytes(mask_file(json.dumps(shapes), json.dumps(PROVENANCE)))
                ends.append(use(tmp_path / "m.safetensors"))
    assert len(ends) > 200
    assert set(ends) == {"refused", "accepted"}


def test_at_every_string_of_a_result(planted: Planted, tmp_path: Path) -> None:
    ends = []
    with planted.watched():
        for result in variants(RESULT, planted):
            (tmp_path / "r.json").write_text(json.dumps(result))
            ends.append(use(tmp_path / "r.json"))
    assert len(ends) > 300
    assert set(ends) == {"refused", "accepted"}


def test_at_every_string_of_a_record(planted: Planted, tmp_path: Path) -> None:
    ends = []
    with planted.watched():
        for record in variants({"provenance": PROVENANCE, "README": "x"}, planted):
            (tmp_path / "leap_pl.json").write_text(json.dumps(record))
            try:
                exported_record(tmp_path)
                ends.append("accepted")
            except UserError:
                ends.append("refused")
    assert set(ends) == {"refused", "accepted"}


# -- model folders ------------------------------------------------------------------------------------------


def mask_of(model: Path, base_model: str, path: Path) -> Path:
    """A mask of half the weights of the model in ``model``, said to be of ``base_model``."""
    base = load_model(str(model))
    masks = {
        name: torch.arange(w.parameter.numel()).view(w.parameter.shape) % 2 == 0
        for name, w in find_weights(base).items()
    }
    return MaskSet(masks, Provenance(base_model, model_fingerprint(base), "leap", 0.5)).save(path)


@pytest.fixture
def hostile_model(planted: Planted, tmp_path: Path) -> Path:
    """A model whose files name code wherever such files may."""
    folder = tiny_folder(tmp_path / "model")
    (folder / "evil.py").write_text(planted.code + "from transformers import LlamaConfig as Config\n")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(planted.code + "def generate(*a, **k): pass\n")
    named = {"auto_map": dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "evil.Config")}
    tokens = {"auto_map": {"AutoTokenizer": ["evil.Config", "evil.Config"]}, "chat_template": planted.values[8]}
    generation = {"auto_map": named["auto_map"], "custom_generate": "custom_generate"}
    for name, change in (("config", named), ("tokenizer_config", tokens), ("generation_config", generation)):
        path = folder / f"{name}.json"
        told = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**told, **change, "trust_remote_code": True}))
    return folder


@pytest.mark.parametrize("verb", ["evaluate", "evaluate --mask", "export", "export --format packed", "prune"])
def test_a_model_folder_that_names_code(
    planted: Planted, hostile_model: Path, text_file: Path, tmp_path: Path, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leap_pl.evaluation.record.commit", lambda: None)  # which asks git
    monkeypatch.setattr("leap_pl.evaluation.record._processor", lambda: "x")  # which asks uname on some machines
    mask = mask_of(hostile_model, str(hostile_model), tmp_path / "mask.safetensors")
    measure = [f"--perplexity={text_file}", "--seq_length=32", "--max_tokens=64", "--device=cpu"]
    pruned = [f"--text={text_file}", "--seq_length=32", "--sequences=2", "--method=sparsegpt"]
    words = {
        "evaluate": ["evaluate", f"--model={hostile_model}", *measure],
        "evaluate --mask": ["evaluate", f"--mask={mask}", *measure],
        "export": ["export", f"--mask={mask}", f"--output_dir={tmp_path / 'out'}"],
        "export --format packed": ["export", f"--mask={mask}", "--format=packed", f"--output_dir={tmp_path / 'out'}"],
        "prune": ["prune", f"--model={hostile_model}", *pruned, f"--output_dir={tmp_path / 'out'}"],
    }[verb]
    with planted.watched():
        main(words)
    if "evaluate" not in verb:  # names no code that it does not have
        written = tmp_path / "out" / ("model" if verb == "prune" else "")
        for name in ("config.json", "tokenizer_config.json"):
            assert "auto_map" in (hostile_model / name).read_text()
            assert "auto_map" not in (written / name).read_text()


def test_a_model_that_needs_its_code_is_refused_for_that(planted: Planted, tmp_path: Path) -> None:
    """Also one whose configuration transformers has a class for, and no causal language model."""
    folder = tiny_folder(tmp_path / "model")
    path = folder / "config.json"
    named = {"model_type": "clip_text_model", "auto_map": {"AutoModelForCausalLM": "evil.Model"}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **named}))
    (folder / "evil.py").write_text(planted.code)
    with pytest.raises(UserError, match=r"comes with code of its own.*--trust_remote_code"), planted.watched():
        load_model(str(folder))


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_at_every_string_of_a_model_folder(planted: Planted, tmp_path: Path, file: str) -> None:
    """Loaded as it is, or refused in one line."""
    folder = tiny_folder(tmp_path / "model")
    intact = json.loads((folder / file).read_text())
    extra = {"auto_map": {"AutoConfig": "x"}, "attn_implementation": "x", "model_type": intact.get("model_type", "x")}
    ends = []
    for changed in variants({**intact, **extra}, planted):
        (folder / file).write_text(json.dumps(changed))
        with planted.watched():
            try:
                load_model(str(folder))
                load_tokenizer(str(folder))
                ends.append("accepted")
            except UserError as error:
                assert len(str(error).splitlines()) == 1
                ends.append("refused")
    assert len(ends) > 20


def test_a_base_model_of_another_type_is_not_trusted(planted: Planted, tmp_path: Path, text_file: Path, capsys) -> None:
    """Whose code runs is typed: by --trust_remote_code and --model, and never by a mask alone."""
    folder = tiny_folder(tmp_path / "model")
    mask = mask_of(folder, str(folder), tmp_path / "mask.safetensors")
    told = json.loads((folder / "config.json").read_text())
    told |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}
    (folder / "config.json").write_text(json.dumps(told))
    code = "from transformers import LlamaConfig\nclass Config(LlamaConfig):\n    model_type = 'evil'\n"
    (folder / "evil.py").write_text(planted.code + code)
    for trusted in ([], ["--trust_remote_code"]):
        for words in (
            ["evaluate", f"--mask={mask}", f"--perplexity={text_file}", *trusted],
            ["export", f"--mask={mask}", f"--output_dir={tmp_path / 'out'}", *trusted],
        ):
            with pytest.raises(SystemExit), planted.watched():
                main(words)
            (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("leap_pl ")]
            assert ("--model NAME" in line) == bool(trusted)
    with pytest.raises(UserError, match="--model NAME"), planted.watched():
        load_subject(mask=str(mask), trust_remote_code=True)
    # A pull request of the hub is a revision, and anyone's.
    MaskSet.load(mask).with_provenance(revision="refs/pr/1").save(mask)
    for words in (
        ["evaluate", f"--mask={mask}", f"--model={folder}", f"--perplexity={text_file}", "--trust_remote_code"],
        ["export", f"--mask={mask}", f"--model={folder}", f"--output_dir={tmp_path / 'out'}", "--trust_remote_code"],
    ):
        with pytest.raises(SystemExit), planted.watched():
            main(words)
        assert (
            "whose revision comes only from a file: refs/pr/1. Confirm it with --revision NAME."
            in capsys.readouterr().err
        )
    # What is typed is trusted: the code is there to be run.
    load_config(str(folder), trust_remote_code=True)
    assert planted.mark.exists()


@pytest.mark.parametrize("trusted", [False, True])
def test_an_adapter_is_no_base_model(planted: Planted, tmp_path: Path, trusted: bool) -> None:
    """It would load another model, which its own file names."""
    folder, other = tiny_folder(tmp_path / "model"), tiny_folder(tmp_path / "other", seed=1)
    adapter = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(other),
        "auto_mapping": {"parent_library": f"{EVIL}.module", "base_model_class": "Config"},
        "megatron_config": {},
        "megatron_core": f"{EVIL}.module",
        "target_modules": ["q_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(UserError, match=r"model is an adapter \(adapter_config.json\)"), planted.watched():
        load_model(str(folder), trust_remote_code=trusted)


@pytest.mark.parametrize("key", ["attn_implementation", "experts_implementation"])
def test_kernels_from_the_hub_are_code(planted: Planted, tmp_path: Path, key: str) -> None:
    folder = tiny_folder(tmp_path / "model")
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**told, key: "somebody/kernel:function"}))
    with pytest.raises(UserError, match="asks for kernels from the hub"), planted.watched():
        load_model(str(folder))


@pytest.mark.parametrize("kind", ["attn", "experts"])
def test_kernels_by_the_names_that_transformers_uses_itself(planted: Planted, tmp_path: Path, kind: str) -> None:
    """transformers reads such names of a file up to 5.24, and since then ignores them."""
    folder = tiny_folder(tmp_path / "model")
    told = json.loads((folder / "config.json").read_text())
    for key in (f"_{kind}_implementation", f"_{kind}_implementation_internal"):
        (folder / "config.json").write_text(json.dumps({**told, key: "somebody/kernel:function"}))
        with planted.watched():
            try:
                used = getattr(load_model(str(folder)).config, f"_{kind}_implementation")
            except UserError as error:
                assert "asks for kernels from the hub" in str(error)
            else:
                assert "/" not in str(used)


def test_kernels_that_transformers_takes_by_itself_are_code_too(
    planted: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to 5.24 it has them only on request; since then wherever there is a device that they are made for."""
    from transformers.integrations import hub_kernels

    asked: list[str] = []

    def fetch(name: str, **_: object) -> None:
        asked.append(name)
        raise RuntimeError("no network")

    monkeypatch.setattr(hub_kernels, "get_kernel", fetch)
    monkeypatch.setattr("transformers.modeling_utils.kernelize", lambda *_, **__: pytest.fail("kernels are used"))
    folder = tiny_folder(tmp_path / "model")
    model = load_model(str(folder))
    assert not model.use_kernels
    mask = mask_of(folder, str(folder), tmp_path / "mask.safetensors")
    for form in ("huggingface", "packed"):
        main(["export", f"--mask={mask}", f"--output_dir={tmp_path / form}", f"--format={form}"])
        load_model(str(tmp_path / form)).train().eval()
    # A model whose class asks for one when it is built, where there is a GPU.
    monkeypatch.setattr("transformers.models.rwkv.modeling_rwkv.is_ninja_available", lambda: True)
    monkeypatch.setattr("transformers.models.rwkv.modeling_rwkv.is_torch_cuda_available", lambda: True)
    rwkv = transformers.RwkvConfig(vocab_size=260, hidden_size=32, num_hidden_layers=2, context_length=64)
    with without_hub_kernels():
        transformers.RwkvForCausalLM(rwkv).save_pretrained(tmp_path / "rwkv")
    with planted.watched():
        load_model(str(tmp_path / "rwkv"))
    assert not asked
    load_model(str(tmp_path / "rwkv"), trust_remote_code=True)
    assert ("kernels-community/rwkv" in asked) == transformers.utils.is_kernels_available()


def test_kernels_for_models_of_gguf_files_are_code_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers asks for them after it has loaded one of some kinds, also where all its weights are dequantised."""
    if not transformers.utils.is_kernels_available():
        pytest.skip("transformers has had kernels among its dependencies since 5.25")
    from kernels import LayerRepository
    from transformers.integrations.gguf.kernels import kernelize_ggml_layers

    asked: list[Any] = []

    def load(self: object) -> None:
        asked.append(self)
        raise RuntimeError("no network")

    monkeypatch.setattr(LayerRepository, "load", load)
    with without_hub_kernels():
        kernelize_ggml_layers(tiny_model())
    assert not asked
    kernelize_ggml_layers(tiny_model())
    assert asked


def test_kernels_of_another_part_of_the_model_are_code_too(
    planted: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = transformers.Gemma3Config(
        text_config={"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48, "vocab_size": 260},
        vision_config={"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2},
    )
    config.save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    for key, implementation, says in (
        ("attn_implementation", {"vision_config": "somebody/kernel"}, "asks for kernels from the hub"),
        ("attn_implementation", "flash_attention_2", "asks for flash_attention_2, which is not installed"),
        ("attn_implementation", "paged|flash_attention_3", "flash_attention_3, which is not installed"),
        ("attn_implementation", "flash_attention_9", "flash_attention_9, which is not installed"),
        ("experts_implementation", "deepgemm", "asks for kernels from the hub"),
        ("text_config", {**told["text_config"], "transformers_weights": "other.safetensors"}, "names other files of w"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**told, key: implementation}))
        with pytest.raises(UserError, match=says), planted.watched():
            load_model(str(tmp_path))
    monkeypatch.setattr(transformers.utils.import_utils, "is_flash_attn_2_available", lambda: True)
    (tmp_path / "config.json").write_text(json.dumps({**told, "attn_implementation": "flash_attention_2"}))
    load_config(str(tmp_path))


@pytest.mark.parametrize("implementation", ["flash", "flash_attention_2", "paged|flash_attention_2", "my_flash"])
def test_flash_attention_that_a_model_replaces_by_a_kernel_is_code(
    implementation: str, planted: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPT-OSS has a list of kernels of the hub, the first of which is taken for any other flash attention."""
    transformers.GptOssConfig(num_hidden_layers=1, hidden_size=32, intermediate_size=48).save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**told, "attn_implementation": implementation}))
    monkeypatch.setattr(transformers.utils.import_utils, "is_flash_attn_2_available", lambda: True)
    with pytest.raises(UserError, match="transformers may fetch it from the hub"), planted.watched():
        load_config(str(tmp_path))


# -- tasks --------------------------------------------------------------------------------------------------


def test_a_tasks_folder_is_data(planted: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Definitions, modules and readers that lie in it are neither read nor imported; templates are text."""
    place = tmp_path / "tasks" / "piqa"
    place.mkdir(parents=True)
    for folder in (place, place.parent):
        for name in ("utils.py", "piqa.py", "json.py", "__init__.py"):
            (folder / name).write_text(planted.code)
        for name in ("piqa.yaml", "_piqa.yaml", "default.yaml"):
            (folder / name).write_text("task: piqa\nprocess_docs: !function utils.run\ninclude: utils.py\n")
    row = {"goal": planted.values[8], "sol1": planted.values[0], "sol2": planted.values[6], "label": 1}
    (place / "validation.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.chdir(place)
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # which starts processes
    with quiet_lm_eval(), planted.watched():  # as the command does, and without it lm-eval asks git for a commit
        found = evaluate_tasks(tiny_model(), byte_tokenizer(), ["piqa"], tasks_folder=place.parent)
    assert found["piqa"]["samples"] == 1
    shutil.rmtree(place)
