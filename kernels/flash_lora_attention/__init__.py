"""Flash-LoRA-Attention: attention over keys and values that are a shared base part plus a low-rank part per adapter.

PyTorch (and Triton) only: this package knows no Transformers and no PEFT, and nothing of caches or adapters by name.
"""

from .interface import flash_lora_attention
from .merge import merge_states
from .reference import flash_lora_attention_reference
from .rope import apply_rope

__all__ = ["apply_rope", "flash_lora_attention", "flash_lora_attention_reference", "merge_states"]
