"""Install the built wheel into an empty environment, and learn and export a mask there without the repository.

python -m experiments.package [dist]
"""

import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

# A model and a tokenizer that need no network: run by the Python of the new environment.
_MAKE = """
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

letters = sorted(pre_tokenizers.ByteLevel.alphabet())
tokens = ["<end>", *letters]
tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained("model")
config = LlamaConfig(
    vocab_size=len(tokens), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, eos_token_id=0, bos_token_id=0,
)
LlamaForCausalLM(config).save_pretrained("model")
open("text.txt", "w", encoding="utf-8").write("The quick brown fox jumps over the lazy dog.\\n\\n" * 200)
"""

_COMMANDS = (
    "leap_pl --help",
    "leap_pl fit --config short --model.base_model model --model.prior.sequences 4 --data.text text.txt"
    " --data.seq_length 32 --trainer.max_steps 3 --trainer.accelerator cpu --checkpoint.dirpath run",
    "leap_pl export --mask run/mask.safetensors --output_dir sparse",
    "leap_pl evaluate --model sparse --perplexity text.txt --seq_length 32 --output sparse.json",
    "leap_pl compare sparse.json run/mask.safetensors --output_dir comparison",
    "leap_pl export --model sparse --format packed --output_dir packed --force",
    "leap_pl generate --model packed --prompt fox --max_new_tokens 4",
)


def main(arguments: list[str] | None = None) -> None:
    """Try the wheel of the folder that the command line names.

    Raises:
        SystemExit: There is no wheel, or not one, or a command failed.
    """
    given = sys.argv[1:] if arguments is None else arguments
    folder = Path(given[0] if given else "dist")
    wheels = sorted(folder.glob("leap_pl-*.whl"))
    if len(wheels) != 1:
        raise SystemExit(f"{folder} has {len(wheels)} wheels of leap_pl instead of one: run make package")
    with tempfile.TemporaryDirectory() as place:
        venv.create(Path(place, "env"), with_pip=True)
        programs = Path(place, "env", "bin")
        # Not the repository's: an import from there would hide what the wheel lacks.
        environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
        environment["PATH"] = f"{programs}{os.pathsep}{environment['PATH']}"
        python = str(programs / "python")
        install = [python, "-m", "pip", "install", "--quiet", str(wheels[0].resolve())]
        subprocess.run(install, check=True, env=environment, cwd=place)
        subprocess.run([python, "-c", _MAKE], check=True, env=environment, cwd=place)
        for command in _COMMANDS:
            print(f"$ {command}", flush=True)
            done = subprocess.run(command.split(), env=environment, cwd=place, capture_output=True, text=True)
            if done.returncode:
                print(done.stdout, done.stderr, sep="\n")
                raise SystemExit(f"{wheels[0].name}: in an empty environment the command failed: {command}")
            print(f"  {(done.stdout.strip() or done.stderr.strip()).splitlines()[-1][:160]}")


if __name__ == "__main__":
    main()
