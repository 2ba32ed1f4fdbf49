"""One KV cache for all LoRA agents of a Transformers model.

``SharedLoRACache`` stores the base model's keys and values once and per adapter only its low-rank down-projections;
pass it as ``past_key_values``. See DESIGN notes in docs/design.md and the method in arXiv 2602.01053 (LRAgent).
"""

from .attach import attach, detach
from .attention import ATTENTION_NAME, register_attention
from .cache import SharedLoRACache
from .errors import SharedCacheError, TrajectoryError, UnsupportedAdapterError, UnsupportedModelError
from .shared_a import SharedAProjection, project_to_shared_a, share_down_projections
from .sharing import LayerResult, PolicyResult, SharingReport, sharing_report

__version__ = "0.1.0"

__all__ = [
    "ATTENTION_NAME",
    "LayerResult",
    "PolicyResult",
    "SharedAProjection",
    "SharedCacheError",
    "SharedLoRACache",
    "SharingReport",
    "TrajectoryError",
    "UnsupportedAdapterError",
    "UnsupportedModelError",
    "attach",
    "detach",
    "project_to_shared_a",
    "share_down_projections",
    "sharing_report",
]

register_attention()
