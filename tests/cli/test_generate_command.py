"""``leap_pl generate``: dense, sparse and packed continue a prompt alike."""

import json
import shutil
import sys
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Run, refused
from tiny import byte_tokenizer, tiny_folder, tiny_model
from tokenizers import processors

from leap_pl.base_model.loading import load_model
from leap_pl.cli.export import export_command
from leap_pl.cli.generate import generate_command
from leap_pl.cli.main import main
from leap_pl.errors import UserError
from leap_pl.evaluation import generation
from leap_pl.evaluation.generation import continue_prompt


def test_the_prompt_is_not_a_part_of_the_pace(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that counts how often it is asked: at the start, with the prompt, and with each token."""
    clock = count()
    monkeypatch.setattr(generation, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    made = continue_prompt(load_model(str(model_folder)), byte_tokenizer(), "a", max_new_tokens=4)
    assert made.tokens > 1
    assert (made.first_seconds, made.next_seconds) == (2, made.tokens - 1)
    assert made.tokens_per_second == 1


@pytest.fixture(scope="module")
def folders(finished_run: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("exports")
    for form in ("huggingface", "packed"):
        export_command(str(place / form), mask=str(finished_run.mask), format=form)  # type: ignore[arg-type]
    return {form: place / form for form in ("huggingface", "packed")}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"seed": 5}, "--seed would not be used: at --temperature 0 nothing is drawn"),
        ({"memory": "packed"}, r"--memory packed: .* is not packed\. Pack it with leap_pl export --model"),
        ({"device": "meta"}, r"--device meta cannot be used \(.*\)\. Give --device cpu"),
    ],
)
def test_what_would_not_be_used(options: dict[str, Any], says: str, folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=says):
        generate_command(str(folders["huggingface"]), "the mask", **options)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers(temperature: float) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="the model's logits are not finite"):
        continue_prompt(model, byte_tokenizer(), "the", max_new_tokens=2, temperature=temperature, seed=0)


@pytest.mark.filterwarnings("ignore:14 of 14 packed weights")
def test_sparse_and_packed_answer_alike(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    made = {}
    for form, memory in (("huggingface", "auto"), ("packed", "auto"), ("packed", "packed"), ("packed", "dense")):
        made[form, memory] = generate_command(
            str(folders[form]),
            "the mask",
            max_new_tokens=12,
            memory=memory,
            device="cpu",  # type: ignore[arg-type]
        )
    assert len({one["text"] for one in made.values()}) == 1
    assert made["packed", "packed"]["bytes"] < made["packed", "dense"]["bytes"] == made["huggingface", "auto"]["bytes"]
    said = capsys.readouterr()
    assert made["packed", "packed"]["text"].strip() in said.out
    assert "tokens a second; the weights take" in said.err


def test_a_prompt_is_continued_and_not_ended_before(model_folder: Path) -> None:
    """By a tokenizer that puts EOS after every text."""
    model, tokenizer = load_model(str(model_folder)), byte_tokenizer(prefix=1)
    around = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<|begin 0|>", "<|end|>")]
    template = processors.TemplateProcessing(single=["<|begin 0|>", "$A", "<|end|>"], special_tokens=around)
    plain = continue_prompt(model, tokenizer, "a prompt", max_new_tokens=8)
    tokenizer.backend_tokenizer.post_processor = template
    assert tokenizer("a").input_ids[-1] == 256
    found = continue_prompt(model, tokenizer, "a prompt", max_new_tokens=8)
    assert (found.text, found.prompt_tokens) == (plain.text, plain.prompt_tokens)
    assert plain.prompt_tokens == 1 + len("a prompt")  # it begins as the tokenizer begins a text


def test_a_prompt_is_text_whatever_it_begins_with(model_folder: Path) -> None:
    made = generate_command(str(model_folder), "~/x is a file", max_new_tokens=2, device="cpu")
    assert made["prompt_tokens"] == len("~/x is a file")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA: 2 GiB.\nMore words."), " on the device: CUDA: 2 GiB. Lower --batch_size or"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 2 bytes."), ": DefaultCPUAllocator: can't allocate"),
        (MemoryError(), ": MemoryError Lower --batch_size"),
        (OSError(12, "Cannot allocate memory"), ": [Errno 12] Cannot allocate memory Lower"),
    ],
)
def test_no_memory_is_one_line(model_folder: Path, monkeypatch, capsys, error: Exception, said: str) -> None:
    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("leap_pl.evaluation.generation.continue_prompt", full)
    message = refused(["generate", f"--model={model_folder}", "--prompt=a"], capsys)
    assert f"out of memory{said}" in message
    assert ("--device cpu" in message) == ("CUDA" in message)


def test_a_prompt_may_spell_its_beginning_out(model_folder: Path) -> None:
    """As chat templates do: BOS stands there once."""
    model, tokenizer = load_model(str(model_folder)), byte_tokenizer(prefix=1)
    around = [("<|begin 0|>", tokenizer.convert_tokens_to_ids("<|begin 0|>"))]
    template = processors.TemplateProcessing(single=["<|begin 0|>", "$A"], special_tokens=around)
    tokenizer.backend_tokenizer.post_processor = template
    plain, spelled = (
        continue_prompt(model, tokenizer, prompt, max_new_tokens=8) for prompt in ("a prompt", "<|begin 0|>a prompt")
    )
    assert (plain.text, plain.prompt_tokens) == (spelled.text, spelled.prompt_tokens)
    assert plain.prompt_tokens == 1 + len("a prompt")


def test_sampling_has_a_seed(model_folder: Path) -> None:
    made = [
        generate_command(str(model_folder), "a", max_new_tokens=20, temperature=2.0, seed=seed, device="cpu")["text"]
        for seed in (1, 1, 2)
    ]
    assert made[0] == made[1] != made[2]


def test_the_temperature_is_that_of_the_whole_distribution(model_folder: Path, monkeypatch) -> None:
    model, tokenizer = load_model(str(model_folder)), byte_tokenizer()
    taken = []
    real = model.generate

    def noted(*arguments: Any, generation_config: Any, **settings: Any) -> Any:
        taken.append((generation_config.do_sample, generation_config.temperature, generation_config.top_k))
        return real(*arguments, generation_config=generation_config, **settings)

    monkeypatch.setattr(model, "generate", noted)
    greedy, cold, hot = (
        continue_prompt(model, tokenizer, "a", max_new_tokens=12, temperature=t).text for t in (0, 1e-4, 5.0)
    )
    assert greedy == cold != hot
    assert taken[1:] == [(True, 1e-4, 0), (True, 5.0, 0)]


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_the_models_own_settings_of_generation_are_not_read(
    temperature: float, model_folder: Path, tmp_path: Path
) -> None:
    """But for the end token: the continuation is the model's, of the likeliest tokens or of its distribution."""
    folder = shutil.copytree(model_folder, tmp_path / "m")
    own = {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "num_beams": 2, "top_p": 0.1, "top_k": 1, "min_p": 0.9}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 256, "do_sample": True, **own}))
    texts = [
        generate_command(str(place), "a", max_new_tokens=20, temperature=temperature, device="cpu")["text"]
        for place in (model_folder, folder)
    ]
    assert texts[0] == texts[1]


def test_a_continuation_ends_where_the_model_ends_a_turn(model_folder: Path, tmp_path: Path) -> None:
    """Which chat models say in their own settings, and may be another token than the tokenizer's."""
    from leap_pl.base_model.loading import load_model
    from leap_pl.base_model.tokenizer import load_tokenizer
    from leap_pl.evaluation.generation import continue_prompt

    model, tokenizer = load_model(str(model_folder), dtype="float32"), load_tokenizer(str(model_folder))
    ids = tokenizer("a", return_tensors="pt").input_ids
    likeliest = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)[0, ids.shape[1] :].tolist()
    end = next(token for token in likeliest[1:] if token != likeliest[0])
    model.generation_config.eos_token_id = [256, end]
    assert continue_prompt(model, tokenizer, "a", max_new_tokens=6).tokens == likeliest.index(end) + 1


def test_packed_weights_are_dense_on_another_device(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from leap_pl.base_model import config, loading
    from leap_pl.cli import device

    asked = []

    def load(*args: object, memory: str, **options: object) -> None:
        asked.append(memory)
        raise UserError("far enough")

    monkeypatch.setattr(loading, "load_model", load)
    monkeypatch.setattr(config, "is_packed_config", lambda _: True)
    monkeypatch.setattr(device, "check_device", lambda name: None)
    monkeypatch.setattr(device.torch.cuda, "is_available", lambda: True)
    for memory, where in (("auto", "auto"), ("auto", "cuda:1"), ("packed", "auto"), ("auto", "cpu")):
        with pytest.raises(UserError, match="far enough"):
            generate_command(str(model_folder), "a", memory=memory, device=where)  # type: ignore[arg-type]
    assert asked == ["dense", "dense", "packed", "auto"]
    # By default what the folder says.
    asked.clear()
    stored = {"quant_method": "leap_pl", "memory": "packed"}
    monkeypatch.setattr(config, "load_config", lambda *_, **__: SimpleNamespace(quantization_config=stored))
    for where in ("auto", "cpu"):
        with pytest.raises(UserError, match="far enough"):
            generate_command(str(model_folder), "a", device=where)
    stored.pop("memory")
    with pytest.raises(UserError, match="far enough"):
        generate_command(str(model_folder), "a", device="cpu")
    assert asked == ["packed", "packed", "auto"]


def test_what_a_model_writes_cannot_control_the_terminal(model_folder: Path, monkeypatch, capsys) -> None:
    from leap_pl.evaluation import generation

    made = generation.Continuation("\x1b[2J two\nlines", 1, 2, 0.1, 0.1)
    monkeypatch.setattr(generation, "continue_prompt", lambda *_, **__: made)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    main(["generate", f"--model={model_folder}", "--prompt=a", "--device=cpu"])
    assert capsys.readouterr().out == "\\x1b[2J two\nlines\n"


def test_what_is_refused(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", f"--model={model_folder}", "--device=cpu"]
    assert "128 tokens" in refused([*words, "--prompt=a", "--max_new_tokens=128"], capsys)
    assert "--max_new_tokens is 0" in refused([*words, "--prompt=a", "--max_new_tokens=0"], capsys)
    assert "there is no such folder" in refused(["generate", "--model=./none", "--prompt=a"], capsys)
    folder = tiny_folder(tmp_path / "added")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<|{n}|>" for n in range(len(tokenizer), 300)] + ["<|beyond|>"])
    tokenizer.save_pretrained(folder)
    line = refused(["generate", f"--model={folder}", "--prompt=a <|beyond|>", "--device=cpu"], capsys)
    assert "the text contains token 300, which was added to the tokenizer, and the model has embeddings for" in line
    folder = tiny_folder(tmp_path / "cut")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-50])
    assert "could not be read" in refused(["generate", f"--model={folder}", "--prompt=a"], capsys)


def test_the_data_type_is_the_one_that_is_typed(model_folder: Path, capsys) -> None:
    for dtype in ("bfloat16", "float32"):
        generate_command(str(model_folder), "a", max_new_tokens=1, dtype=dtype, device="cpu")  # type: ignore[arg-type]
        assert f"(cpu, {dtype})" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prompt", "options", "says"),
    [
        ("caf\udce9", {}, "the prompt has bytes that are not UTF-8"),
        ("a\0b", {}, "the prompt has bytes that are not UTF-8, or NUL"),
        ("a", {"device": "hpu"}, r"--device hpu cannot be used \(.*\)\. Give --device cpu"),
    ],
)
def test_what_cannot_be_continued(prompt: str, options: dict[str, Any], says: str, model_folder: Path) -> None:
    with pytest.raises(UserError, match=says):
        generate_command(str(model_folder), prompt, **options)


def test_a_temperature_that_would_overflow(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", f"--model={model_folder}", "--prompt=a", "--temperature=1e-40"]
    assert "--temperature is 1e-40; give 1e-06 or more, or 0" in refused(words, capsys)
    made = generate_command(str(model_folder), "a", temperature=1e-6, max_new_tokens=4, device="cpu")
    assert made["text"] == generate_command(str(model_folder), "a", max_new_tokens=4, device="cpu")["text"]
