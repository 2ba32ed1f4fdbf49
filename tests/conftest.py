"""What all tests share: few threads (the models are tiny), no hub, and no global state left behind."""

import inspect
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


# What must hold whichever way a cache stores its tokens and runs its decode steps.
ALL_STORAGES = (
    "test_adapter_changes", "test_attach", "test_attention_function", "test_cache_contract", "test_exactness", "test_families",
    "test_generate", "test_policies", "test_private_layers", "test_refusals", "test_state_machine", "test_trajectory",
)  # fmt: skip
STORAGES = ("growing", "preallocated", "captured")
# These hardly decode: what they say of captured steps is said elsewhere.
FEW_STEPS = ("test_attach", "test_attention_function", "test_refusals")


def pytest_generate_tests(metafunc):
    asked = "storage" in metafunc.fixturenames
    module = metafunc.module.__name__.rpartition(".")[2]
    if asked or module in ALL_STORAGES:
        if not asked:
            metafunc.fixturenames.append("storage")
        metafunc.parametrize("storage", STORAGES[:2] if module in FEW_STEPS else STORAGES, indirect=True)


@pytest.fixture
def storage(request, monkeypatch):
    """Growing storage; storage allocated at once; or decode steps as they are captured, replayed by an emulation."""
    from lora_shared_cache import SharedLoRACache, graphs

    if request.param == "preallocated":
        monkeypatch.setitem(SharedLoRACache.__init__.__kwdefaults__, "max_cache_len", 300)
    if request.param == "captured":
        emulate_graphs(monkeypatch, graphs)
    return request.param


def emulate_graphs(monkeypatch, graphs) -> type:
    """CUDA graphs without CUDA: a replay runs the same Python again with everything the host knew at the time of capture."""

    class EmulatedGraph:
        captures = replays = 0

        def __init__(self, run, pool, device):
            self.run = run
            EmulatedGraph.captures += 1

        def replay(self):
            EmulatedGraph.replays += 1
            # A graph needs nobody to have prepared the model's Python for it.
            now = inspect.getclosurevars(self.run).nonlocals["now"]
            entered = any(ref() is now.cache for ref in now.attachment.active)
            now.attachment.enter(now.cache)
            try:
                return self.run()
            finally:
                if not entered:
                    now.attachment.leave(now.cache)

    monkeypatch.setattr(graphs, "CudaGraph", EmulatedGraph)
    monkeypatch.setattr(graphs.DecodeGraphs, "_why_not_on_this_device", staticmethod(lambda attachment: None))
    return EmulatedGraph


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
