"""What all tests share: few threads (the models are tiny), no hub, and no global state left behind."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# The machine may be shared: an example that takes long once is no failure.
settings.register_profile("shared", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("shared")


@pytest.fixture(autouse=True)
def no_state_left_behind():
    """Grad mode and the package's context variables are as before after every test."""
    from lora_shared_cache.scopes import forward_scope, layer_scope

    grad = torch.is_grad_enabled()
    yield
    assert torch.is_grad_enabled() == grad
    left = [scope for scope in (forward_scope, layer_scope) if scope.get() is not None]
    for scope in left:
        scope.set(None)
    assert not left, "a forward pass left its state behind"
