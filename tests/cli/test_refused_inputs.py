"""Models that continue no text, and paths that are none: refused in one line, before anything is read or written."""

import os
import re
from pathlib import Path

import pytest
import transformers
from conftest import failing
from tiny import byte_tokenizer

from leap_pl.base_model.loading import load_model
from leap_pl.cli.main import main
from leap_pl.errors import UserError
from leap_pl.files import atomic_file

SIZES = {
    "vocab_size": 260,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
BART = {"vocab_size": 260, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
BART |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (
            lambda: transformers.RobertaForMaskedLM(transformers.RobertaConfig(**SIZES)),
            r"\(roberta\) fills masks: each token sees those after it",
        ),
        (
            lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(**BART)),
            r"\(bart\) has an encoder and a decoder",
        ),
    ],
)
def test_a_model_that_continues_no_text(model, says: str, tmp_path: Path, text_file: Path, capsys) -> None:
    model().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    words = ["evaluate", f"--model={tmp_path / 'model'}", f"--perplexity={text_file}", "--seq_length=32"]
    assert re.search(says, failing(capsys, words))


def test_an_encoder_that_is_a_decoder_is_taken(tmp_path: Path) -> None:
    config = transformers.RobertaConfig(**SIZES, is_decoder=True)
    transformers.RobertaForCausalLM(config).save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).config.is_decoder


def test_a_revision_is_an_option_of_its_own(capsys) -> None:
    message = failing(capsys, ["evaluate", "--model=some/model@main", "--perplexity=wikitext2"])
    assert "Give some/model --revision main (of fit and recover: --model.revision)" in message


def test_a_gguf_file_in_capitals_is_one(tmp_path: Path, capsys) -> None:
    message = failing(capsys, ["evaluate", f"--model={tmp_path / 'x.GGUF'}", "--perplexity=wikitext2"])
    assert "there is no such GGUF file" in message


def test_several_texts_are_a_list(model_folder: Path, tmp_path: Path, capsys) -> None:
    words = ["prune", f"--model={model_folder}", "--text=a.jsonl,b.jsonl", f"--output_dir={tmp_path / 'out'}"]
    assert "Several files are a list: '[a.jsonl, b.jsonl]'" in failing(capsys, [*words, "--seq_length=32"])


def test_an_empty_baseline(capsys) -> None:
    assert "has an empty entry" in failing(capsys, ["compare", "a.json", "--baselines=wanda,"])


@pytest.mark.parametrize("verb", ["evaluate --perplexity=wikitext2", "generate --prompt=a", "prune --output_dir=OUT"])
@pytest.mark.parametrize("device", ["meta", "cuda:99", "gpu"])
def test_a_device_is_checked_before_anything_is_read(verb: str, device: str, tmp_path: Path, capsys) -> None:
    words = verb.replace("OUT", str(tmp_path / "out")).split()
    message = failing(capsys, [*words, "--model=no/model", f"--device={device}"])
    assert f"--device {device} cannot be used (" in message
    assert message.endswith("Give --device cpu, or another.")


def test_a_pipe_is_not_replaced(model_folder: Path, text_file: Path, tmp_path: Path, capsys) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    words = ["evaluate", f"--model={model_folder}", f"--perplexity={text_file}", f"--output={pipe}"]
    assert f"--output {pipe} is no regular file" in failing(capsys, words)
    with pytest.raises(UserError, match="is a device or a pipe"), atomic_file(pipe):
        pass
    assert pipe.is_fifo()


@pytest.mark.parametrize("option", ["--output_dir", "--model"])
def test_a_name_that_is_too_long(option: str, model_folder: Path, tmp_path: Path, capsys) -> None:
    given = {"--model": str(model_folder), "--output_dir": str(tmp_path / "out")} | {
        option: str(tmp_path / ("x" * 300))
    }
    message = failing(capsys, ["prune", "--method=magnitude", *(f"{name}={value}" for name, value in given.items())])
    assert "File name too long" in message


def test_the_usage_of_recover_is_its_own(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["recover", "--help", "all"])
    said = capsys.readouterr().out
    assert said.startswith("usage: leap_pl recover ")
    assert "leap_pl [options] fit" not in said
