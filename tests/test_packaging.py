"""What is installed and how it lives beside Transformers.

The repository has a folder named like a package of Hugging Face (`kernels`), and programs are started in the repository
root: Transformers has to work there whether or not that package is installed. The wheel has to hold the two import
packages and nothing else.
"""

import importlib.metadata
import os
import re
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

LOAD_TINY_LLAMA = """
import torch
import transformers
from transformers.utils import is_kernels_available
import lora_shared_cache

config = transformers.LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
)
model = transformers.AutoModelForCausalLM.from_config(config)
logits = model(input_ids=torch.tensor([[1, 2, 3]])).logits
assert logits.shape == (1, 3, 32) and bool(logits.isfinite().all())
"""

# Takes an installed `kernels` away, and leaves what a user without it has: the folder in the repository root.
HIDE_KERNELS = """
import importlib.machinery
import importlib.metadata
import os
import sys

class FolderOnly:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return importlib.machinery.PathFinder.find_spec(name, [os.getcwd()]) if name == "kernels" else None

def version(name, original=importlib.metadata.version):
    if name == "kernels":
        raise importlib.metadata.PackageNotFoundError(name)
    return original(name)

sys.meta_path.insert(0, FolderOnly)
importlib.metadata.version = version
"""

# Stands for the real package where no release of it that this Transformers accepts is installed.
STAND_IN = """
from unittest.mock import MagicMock

def use_kernel_forward_from_hub(layer_name):
    return lambda cls: cls

def use_kernelized_func(*functions):
    return lambda cls: cls

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return MagicMock(name=name)
"""


def run_in_root(*parts: str, pythonpath: str = "") -> None:
    code = "\n".join(textwrap.dedent(part) for part in parts)
    # A user without an editable install: the packages come from the working directory, as `python -c` puts it first.
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT / "kernels"), pythonpath])))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_transformers_loads_a_model_from_the_root_without_the_kernels_package():
    run_in_root(
        HIDE_KERNELS,
        LOAD_TINY_LLAMA,
        """
        import kernels
        assert getattr(kernels, "__file__", None) is None, "expected the bare folder of the repository"
        assert not is_kernels_available()
        """,
    )


def test_transformers_loads_a_model_from_the_root_with_the_kernels_package(tmp_path):
    from transformers.utils import import_utils

    try:
        version = importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        version = None
    lowest, end = import_utils.KERNELS_MIN_VERSION, import_utils.KERNELS_MAX_VERSION
    numbers = [tuple(int(n) for n in re.findall(r"\d+", v or "0")) for v in (lowest, version, end)]
    if not numbers[0] <= numbers[1] < numbers[2]:
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels" / "__init__.py").write_text(STAND_IN)
        metadata = tmp_path / f"kernels-{lowest}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {lowest}\n")
    run_in_root(
        LOAD_TINY_LLAMA,
        """
        import kernels
        assert kernels.__file__, "the repository's folder hides the installed package"
        assert is_kernels_available()
        """,
        pythonpath=str(tmp_path),
    )


def test_the_kernels_folder_is_no_package():
    assert (ROOT / "kernels" / "flash_lora_attention" / "__init__.py").exists()
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would hide Hugging Face's kernels package"


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(ROOT)], check=True, capture_output=True, timeout=300)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_the_wheel_holds_the_two_packages_and_nothing_else(wheel_names):
    top_level = {name.split("/")[0] for name in wheel_names}
    (metadata,) = (name for name in top_level if name.endswith(".dist-info"))
    assert top_level == {"lora_shared_cache", "flash_lora_attention", metadata}
    for package, folder in (("lora_shared_cache", ROOT), ("flash_lora_attention", ROOT / "kernels")):
        sources = {str(path.relative_to(folder)) for path in (folder / package).rglob("*.py")}
        assert {name for name in wheel_names if name.startswith(package) and name.endswith(".py")} == sources


def test_the_wheel_holds_no_adapters(wheel_names):
    assert not [name for name in wheel_names if "adapter_" in name or name.endswith((".safetensors", ".bin", ".gguf"))]
