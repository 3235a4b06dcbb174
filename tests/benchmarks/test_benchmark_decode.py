"""The benchmark of decoding with packed weights."""

import json
from pathlib import Path

from benchmarks import decode


def test_layers_and_models_are_measured(model_folder: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "decode.json"
    words = ["--tiny", "--layers", "tiny", "--models", "llama-3.2-1b", str(model_folder), "--density", "0.5", "0.3"]
    words += ["--rows", "1", "3", "--threads", "1", "--repeats", "1", "--tokens", "2", "--output", str(output)]
    decode.main(words)
    assert "| faster |" in capsys.readouterr().out
    rows = json.loads(output.read_text())["rows"]
    assert [(row["of"], row["shape"]) for row in rows[::4]] == [
        *(("tiny", "48×64"), ("tiny", "64×96"), ("llama-3.2-1b", "model"), (model_folder.name, "model")),
    ]
    assert [(row["rows"], row["density"]) for row in rows[:4]] == [(1, 0.5), (1, 0.3), (3, 0.5), (3, 0.3)]
    assert all(row["faster"] > 0 and row["limit"] > 1 for row in rows)
    # Two bytes a kept weight and a bit for each: of the tiny layers, whose rows are whole words.
    assert abs(rows[0]["limit"] - 2 / (2 * 0.5 + 1 / 8)) < 0.1


def test_a_packed_model_says_what_its_masked_one_says(model_folder: Path) -> None:
    import torch

    model = decode.model_named(str(model_folder), {})
    packed = decode.packed_model(model, 0.5)
    layers = {name: layer for name, layer in packed.named_modules() if isinstance(layer, decode.PackedLinear)}
    assert len(layers) == 7 * model.config.num_hidden_layers
    ids = torch.randint(0, model.config.vocab_size, (1, 5))
    with torch.inference_mode():
        found = packed(ids).logits
        for name, layer in layers.items():
            model.get_submodule(name).weight.copy_(layer.packed.unpack())
        torch.testing.assert_close(found, model(ids).logits, rtol=0.05, atol=0.05)
