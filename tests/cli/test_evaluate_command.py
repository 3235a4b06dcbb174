"""leap_pl evaluate: what is measured, the result file, and what is said when it cannot be."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_folder

from leap_pl.base_model.loading import load_model
from leap_pl.base_model.tokenizer import load_tokenizer
from leap_pl.base_model.weights import find_weights, model_fingerprint
from leap_pl.cli.evaluate import evaluate_command
from leap_pl.data import held_out_tokens
from leap_pl.data.source import TextSource
from leap_pl.errors import UserError
from leap_pl.evaluation.record import read_result
from leap_pl.evaluation.texts import tokens_digest
from leap_pl.masks import MaskSet, Provenance

TEXT = "The mask keeps what the model needs, and the rest of its weights are zero.\n" * 8
SMALL = {"seq_length": 32, "batch_size": 2}


@pytest.fixture
def base(tmp_path):
    return str(tiny_folder(tmp_path / "base"))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "held-out.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in TEXT.splitlines()))
    return str(path)


@pytest.fixture
def mask(base, tmp_path):
    model = load_model(base)
    masks = {
        name: weight.parameter.abs() > weight.parameter.abs().median() for name, weight in find_weights(model).items()
    }
    provenance = Provenance(base, model_fingerprint(model), "magnitude", 0.5, config={"per": "matrix"})
    return str(MaskSet(masks, provenance).save(tmp_path / "mask.safetensors"))


def test_result_says_what_was_measured_and_how(base, text, mask, tmp_path):
    output = tmp_path / "results" / "r.json"
    result = evaluate_command(mask=mask, perplexity=text, output=str(output), **SMALL)
    assert read_result(output) == json.loads(json.dumps(result))
    figure = result["perplexity"][text]
    assert 1 < figure["value"] < 1e6
    assert (figure["seq_length"], figure["stride"]) == (32, 32)
    assert figure["tokens"] == 32 * len(figure["window_nll"]) + figure["tokens"] % 32
    assert figure["tokenizer"]["vocabulary"] == 257
    assert result["method"] == "magnitude"
    assert result["config"] == {"per": "matrix"}
    assert result["model"]["base_model"] == base
    assert result["model"]["fingerprint"] == MaskSet.load(mask).provenance.fingerprint
    assert result["sparsity"]["global"] == pytest.approx(0.5, abs=1e-3)
    assert set(result["sparsity"]["layers"]) == {"0", "1"}
    assert {"torch", "transformers", "lm_eval", "leap_pl"} <= set(result["versions"])
    assert result["times"]["seconds"]["total"] > 0
    assert result["hardware"]["cores"]


def test_same_inputs_same_file_but_for_times(text, mask, tmp_path):
    """Byte for byte, with times and what they say taken out of the file's text."""
    files = []
    for name in ("first.json", "second.json"):
        output = tmp_path / name
        result = evaluate_command(mask=mask, perplexity=text, output=str(output), **SMALL)
        times = json.dumps(result["times"], sort_keys=True, separators=(",", ":"))
        written = output.read_text(encoding="utf-8")
        assert times in written
        files.append(written.replace(times, ""))
    assert files[0] == files[1]
    assert [line.partition(":")[0] for line in written.splitlines()[1:-1]] == [f'"{key}"' for key in sorted(result)]


def test_mask_over_base_model_is_the_exported_checkpoint(text, mask, tmp_path):
    from leap_pl.cli.export import export_command

    export_command(output_dir=str(tmp_path / "exported"), mask=mask)
    over = evaluate_command(mask=mask, perplexity=text, **SMALL)
    exported = evaluate_command(model=str(tmp_path / "exported"), perplexity=text, **SMALL)
    for key in ("perplexity", "sparsity", "method", "config"):
        assert over[key] == exported[key]
    for key in ("base_model", "fingerprint", "revision"):
        assert over["model"][key] == exported["model"][key]


def test_base_model_is_dense_and_better_known(base, text):
    result = evaluate_command(model=base, perplexity=text, **SMALL)
    assert result["method"] == "dense"
    assert result["sparsity"]["global"] < 0.01


def test_training_checkpoint_is_its_hard_mask(monkeypatch, mask, text):
    import leap_pl.checkpoints.layout
    import leap_pl.training.checkpoint_weights

    monkeypatch.setattr(leap_pl.checkpoints.layout, "masks_from_checkpoint", lambda path: MaskSet.load(mask))
    monkeypatch.setattr(leap_pl.training.checkpoint_weights, "weights_from_checkpoint", lambda path: None)
    learned = evaluate_command(ckpt_path="last.ckpt", perplexity=text, **SMALL)
    assert learned["perplexity"] == evaluate_command(mask=mask, perplexity=text, **SMALL)["perplexity"]
    assert learned["model"]["ckpt_path"] == "last.ckpt"


def test_windows_begin_as_the_tokenizer_begins_a_text(text, tmp_path, capsys):
    base, plain = str(tiny_folder(tmp_path / "begun", prefix=1)), str(tiny_folder(tmp_path / "plain"))
    figures = {
        bos: evaluate_command(model=base, perplexity=text, max_tokens=96, bos=bos, **SMALL)["perplexity"][text]
        for bos in ("every", "first", "none")
    }
    assert [figure["bos"] for figure in figures.values()] == ["every", "first", "none"]
    assert [figure["stride"] for figure in figures.values()] == [31, 32, 32]
    assert [figure["predicted"] for figure in figures.values()] == [93, 93, 93]  # 3 × 31 tokens after BOS; 3 × (32 − 1)
    assert "windows of 32, stride 31, each beginning with BOS, " in capsys.readouterr().out
    every, none = figures["every"], figures["none"]
    assert every["text_digest"] == none["text_digest"] != figures["first"]["text_digest"]
    assert len({figure["value"] for figure in figures.values()}) == 3
    without = [evaluate_command(model=plain, perplexity=text, max_tokens=96, bos=bos, **SMALL) for bos in figures]
    assert without[0]["perplexity"] == without[1]["perplexity"] == without[2]["perplexity"]
    (figure,) = without[0]["perplexity"].values()
    assert {**none, "tokenizer": figure["tokenizer"]} == {**figure, "bos": "none"}


def test_text_of_another_column(base, text, tmp_path):
    body = tmp_path / "body.jsonl"
    body.write_text(Path(text).read_text().replace('"text":', '"body":'))
    named = evaluate_command(model=base, perplexity=str(body), text_column="body", **SMALL)
    plain = evaluate_command(model=base, perplexity=text, **SMALL)
    assert named["perplexity"][str(body)] == {**plain["perplexity"][text], "text_column": "body"}


def test_options_of_a_measurement_reach_it(base, text, monkeypatch):
    """And not the record alone."""
    from leap_pl.evaluation import tasks

    figures = [
        evaluate_command(base, perplexity=text, seq_length=32, max_tokens=256, stride=stride)["perplexity"][text]
        for stride in (8, None)
    ]
    assert [figure["stride"] for figure in figures] == [8, 32]
    assert figures[0]["value"] != figures[1]["value"]
    asked = {}
    monkeypatch.setattr(tasks, "check_tasks", lambda *_: None)
    monkeypatch.setattr(tasks, "evaluate_tasks", lambda *_, **options: asked.update(options) or {})
    options = {"limit": 3, "num_fewshot": 2, "batch_size": 5, "seed": 11, "bos": "none"}
    evaluate_command(base, tasks="piqa", **options)
    assert options.items() <= asked.items()


def test_the_held_out_share_is_measured_and_no_other_text(base, tmp_path):
    """The twentieth of its documents that a run without a validation text does not train on."""
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {n} of {n * n} words"}) + "\n" for n in range(400)))
    documents = [text.text for _, text in TextSource.open(str(path), share="held_out").documents(repeat=False)]
    assert 5 < len(documents) < 60
    tokens = torch.tensor(load_tokenizer(base)("\n\n".join(documents))["input_ids"])
    assert held_out_tokens(str(path), base, share="held_out").tolist() == tokens.tolist()
    figure = evaluate_command(base, perplexity=str(path), share="held_out", **SMALL)["perplexity"][str(path)]
    assert (figure["share"], figure["tokens"]) == ("held_out", len(tokens))
    assert figure["text_digest"] == tokens_digest(tokens)


def test_two_files_of_one_name_and_a_cap(base, text, tmp_path):
    other = tmp_path / "other" / "held-out.jsonl"
    other.parent.mkdir()
    other.write_text(Path(text).read_text().upper().replace('"TEXT"', '"text"'))
    result = evaluate_command(model=base, perplexity=f"{text},{other}", max_tokens=100, **SMALL)
    assert set(result["perplexity"]) == {text, str(other)}
    figure = result["perplexity"][text]
    assert (figure["tokens"], figure["max_tokens"], figure["predicted"]) == (100, 100, 93)
    assert figure["text_digest"] != result["perplexity"][str(other)]["text_digest"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "Nothing to measure"),
        ({"perplexity": "a.txt,,b.txt"}, "empty entry"),
        ({"perplexity": "a.txt"}, "Give --model"),
        ({"perplexity": "a.txt", "limit": 0}, "at least 1"),
        ({"perplexity": "a.txt", "max_tokens": 1}, "at least 2"),
        ({"tasks": "piqa", "num_fewshot": -1}, "num_fewshot -1: give a number of examples, 0 or more"),
        ({"perplexity": "a.txt", "mask": "m", "ckpt_path": "c"}, "Choose one"),
        ({"perplexity": "a.txt", "mask": "gone.safetensors"}, "no such MaskSet"),
        ({"perplexity": "a.txt", "model": "./gone"}, "no such folder"),
        # Told before a model is loaded, or hours are spent.
        ({"perplexity": "a.txt", "model": "./gone", "stride": 4096}, "stride 4096"),
        ({"perplexity": "a.txt", "model": "./gone", "batch_size": 0}, "batch_size 0"),
        ({"tasks": "piqa", "model": "./gone", "tasks_folder": "./nowhere"}, "make assets-eval"),
        ({"perplexity": "a.txt,b.txt", "model": "./gone"}, "--perplexity b.txt: There is no file b.txt"),
        ({"perplexity": "a.txt,wikitext2,c4,some/text", "model": "./gone"}, "no such folder"),
        ({"perplexity": "*.jsonl", "model": "./gone"}, "No file matches"),
        ({"tasks": "piqa,piqaa", "model": "./gone"}, "no task piqaa. Similar names: piqa"),
        (
            {"perplexity": "a.txt", "model": "./gone", "output": "/"},
            r"a folder\. Name a file in it: --output /result.json",
        ),
        ({"perplexity": "a.txt", "model": "./gone", "output": f"{__file__}/r.json"}, "is a file. Name another"),
    ],
)
def test_refuses_in_one_line(arguments, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(TEXT)  # texts are looked for before a model is
    with pytest.raises(UserError, match=says) as caught:
        evaluate_command(**arguments)
    assert "\n" not in str(caught.value)


def test_refuses_the_mask_of_another_model_and_a_missing_text(base, mask, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(TEXT)
    other = tiny_folder(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="fingerprint"):
        evaluate_command(model=str(other), mask=mask, perplexity="a.txt")
    with pytest.raises(UserError, match=r"gone\.txt"):
        evaluate_command(model=base, perplexity="gone.txt", **SMALL)
    (tmp_path / "words.jsonl").write_text('{"words": "one"}\n')
    with pytest.raises(UserError, match=r"it has: words\. Name the column of the text with --text_column\.$"):
        evaluate_command(model=base, perplexity=str(tmp_path / "words.jsonl"), **SMALL)
    with pytest.raises(UserError, match="--device"):
        evaluate_command(model=base, perplexity="a.txt", device="nowhere")


def test_windows_are_checked_before_a_text_is_read(base, text, tmp_path, monkeypatch):
    monkeypatch.setattr("leap_pl.evaluation.texts.read_text", lambda *_, **__: pytest.fail("the text was read"))
    with pytest.raises(UserError, match=r"--seq_length is 2048, and .*base supports at most 128 tokens"):
        evaluate_command(model=base, perplexity=text)
    begun = str(tiny_folder(tmp_path / "begun", prefix=1))
    with pytest.raises(UserError, match=r"seq_length 32, stride 32, .*stride from 1 to seq_length − 1, without what"):
        evaluate_command(model=begun, perplexity=text, seq_length=32, stride=32)


def test_named_texts_are_the_fields_and_c4_is_capped(monkeypatch, base):
    import leap_pl.data

    asked = []

    def held_out_tokens(text, tokenizer, **options):
        asked.append((text, options))
        return torch.arange(96)

    monkeypatch.setattr(leap_pl.data, "held_out_tokens", held_out_tokens)
    evaluate_command(model=base, perplexity="wikitext2,c4", **SMALL)
    (wikitext, of_wikitext), (c4, of_c4) = asked
    assert (wikitext, of_wikitext["config_name"], of_wikitext["split"], of_wikitext["most"]) == (
        "Salesforce/wikitext",
        "wikitext-2-raw-v1",
        "test",
        None,
    )
    assert (c4, of_c4["split"], of_c4["most"]) == ("allenai/c4", "validation", 256 * 32)
    assert of_wikitext["bos"] == of_c4["bos"] == "every"
    evaluate_command(model=base, perplexity="wikitext2,c4", **SMALL | {"bos": "none"})
    assert [options["bos"] for _, options in asked[2:]] == ["none", "none"]


def test_out_of_reach_says_what_to_give(monkeypatch, base):
    import leap_pl.data

    def held_out_tokens(*args, **options):
        raise UserError("The dataset could not be reached. Pass local files instead: --data.text FILE.jsonl.")

    monkeypatch.setattr(leap_pl.data, "held_out_tokens", held_out_tokens)
    with pytest.raises(UserError, match=r"could not be reached\. If the hub.*--perplexity FILE") as caught:
        evaluate_command(model=base, perplexity="wikitext2", **SMALL)
    assert "--data.text" not in str(caught.value)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"format": "leap_pl.evaluation", "format_version": 99}'])
def test_unreadable_result_is_one_line(tmp_path, content):
    path = tmp_path / "r.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=r"r\.json"):
        read_result(path)


def test_import_is_light():
    heavy = "('torch', 'transformers', 'lm_eval', 'matplotlib')"
    code = f"import sys, leap_pl.cli.evaluate, leap_pl.cli.compare; print([m for m in {heavy} if m in sys.modules])"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
@pytest.mark.parametrize(("asked", "slow"), [(False, True), (False, False), (True, True)])
def test_a_slow_type_is_not_computed_in_unless_asked(
    text, tmp_path, monkeypatch, capsys, kind: str, asked: bool, slow: bool
) -> None:
    import leap_pl.base_model.fast_dtype as room
    from leap_pl.cli.prune import prune_command

    stored = tmp_path / kind
    model = load_model(str(tiny_folder(tmp_path / "base"))).to(getattr(torch, kind))
    model.save_pretrained(stored)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (stored / name).write_bytes((tmp_path / "base" / name).read_bytes())
    monkeypatch.setattr(room, "_cpu_gains_by", lambda dtype: not slow)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)  # which would name AMX
    changed = slow and not asked
    typed = kind if asked else "auto"
    result = evaluate_command(model=str(stored), perplexity=text, dtype=typed, device="cpu", **SMALL)
    assert result["model"]["dtype"] == ("float32" if changed else kind)
    note = f"evaluating in float32, which is faster than {kind} on this CPU (--dtype {kind} overrides this)"
    assert (note in capsys.readouterr().err) == changed
    note = f"the model is stored in {kind}, and this CPU computes float32 faster: --dtype float32"
    for method in ("wanda", "magnitude"):  # which reads no text
        of_text = {"text": text, "seq_length": 16, "sequences": 2} if method == "wanda" else {}
        prune_command(str(stored), str(tmp_path / method), method=method, dtype=typed, device="cpu", **of_text)
        assert (note in capsys.readouterr().err) == (changed and method == "wanda")
