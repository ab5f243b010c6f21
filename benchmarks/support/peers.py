"""Everyone that this library is measured against, in the order of importance, each a fixture by its name.

A peer that cannot run here is skipped, and its reason is printed.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import pytest
import torch

from benchmarks.support.layer import strategies
from benchmarks.support.variants import OURS


@dataclass(frozen=True)
class Peer:
    """One way to do the work.

    ``variants`` name it in each kind of section. ``package`` is what must be installed beside torch, by the name under
    which it is imported. On a CPU a ``compiled`` peer runs with --full alone.
    """

    name: str
    what: str
    variants: Mapping[str, Sequence[str]]
    package: str = ""
    needs_gpu: bool = False
    compiled: bool = False

    def reason(self, device: torch.device, full: bool) -> str | None:
        """Why it does not run here, in one line, or None."""
        if self.package and not installed(self.package):
            return f"{self.package} is not installed"
        if self.needs_gpu and device.type != "cuda":
            return "it needs a CUDA device"
        if self.compiled and device.type != "cuda" and not full:
            return "it is compiled, on a CPU with --full alone"
        if self.compiled and device.type != "cuda" and shutil.which("g++") is None:
            return "torch.compile needs g++ on a CPU"
        return None


def installed(package: str) -> bool:
    """Whether a package or module can be imported, without importing more than what is above it."""
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def _of(kinds: str, *names: str) -> dict[str, Sequence[str]]:
    return dict.fromkeys(kinds.split(), names)


OWN = Peer("ours", "this library", _of("layer ffn attention pointwise step", OURS))
PRODUCTS = Peer(
    "bare products", "every matrix product on its own: no peer, the least time", _of("layer ffn step", "products")
)
PEERS = (
    Peer(
        "flex_attention", "FlexAttention, which reads the learned vectors in its score function",
        _of("attention", "flex_attention"), compiled=True,
    ),
    Peer(
        "flash_attention_2", "flash-attn 2, without a bias", _of("attention", "flash_attention_no_bias"), "flash_attn",
        True,
    ),
    Peer(
        "flash_attention_3", "flash-attn 3, without a bias", _of("attention", "flash_attention_3_no_bias"),
        "flash_attn_interface", True,
    ),
    Peer(
        "flash_attention_4", "flash-attn 4, without a bias", _of("attention", "flash_attention_4_no_bias"),
        "flash_attn.cute", True,
    ),
    Peer(
        "sdpa_built_bias", "PyTorch's memory-efficient attention, its dense bias built from the tables",
        _of("attention", "bias_built_sdpa_memory_efficient"),
    ),
    Peer("eager", "upstream's way in plain PyTorch, padded", {
        **_of("layer step attention", "reference"), **_of("ffn", "padded"), **_of("pointwise", "eager"),
    }),
    Peer("compile_default", "upstream's way under torch.compile", {
        **_of("layer step attention", "reference_compiled"), **_of("ffn", "sliced_compiled", "boolean_mask_compiled"),
        **_of("pointwise", "compiled"),
    }, compiled=True),
    Peer("compile_max_autotune", "the same with mode='max-autotune-no-cudagraphs'", {
        **_of("layer step attention", "reference_max_autotune"), **_of("ffn", "sliced_max_autotune"),
        **_of("pointwise", "max_autotune"),
    }, compiled=True),
    Peer(
        "boolean_masks", "a mask for each modality, as public mixture-of-transformers code",
        _of("layer ffn step", "boolean_mask"),
    ),
    Peer("modality_slices", "tokens sorted by modality, as grouped BAGEL routing", _of("layer ffn", "sliced")),
    Peer("vllm_omni", "vllm-omni's routed linear", _of("ffn", "vllm_omni"), "vllm_omni", True),
    Peer("grouped_mm", "PyTorch's grouped product", _of("ffn", "grouped_mm")),
    Peer("grouped_mm_compiled", "the same under torch.compile", _of("ffn", "grouped_mm_compiled"), compiled=True),
    Peer(
        "sdpa_given_bias", "PyTorch's memory-efficient attention, its dense bias given",
        _of("attention", "sdpa_memory_efficient"),
    ),
    Peer("sdpa_no_bias", "PyTorch's attention in a decoder, which has no bias", _of("attention", "sdpa")),
    Peer("sdpa_cudnn", "cuDNN's attention, its dense bias given and frozen", _of("attention", "sdpa_cudnn"), "", True),
    Peer("xformers", "xformers' attention, its dense bias given", _of("attention", "xformers"), "xformers", True),
    Peer("liger", "Liger's Triton kernels", _of("pointwise", "liger", "liger, tanh"), "liger_kernel", True),
    Peer("quack", "quack's CuTe kernels", _of("pointwise", "quack"), "quack", True),
    Peer("sonic_moe", "sonic-moe's experts with a fixed route", _of("ffn", "sonic_moe"), "sonicmoe", True),
    Peer(
        "transformer_engine", "Transformer Engine's grouped linear and norms",
        _of("ffn pointwise", "transformer_engine"), "transformer_engine", True,
    ),
    Peer("apex", "NVIDIA apex's norms", _of("pointwise", "apex"), "apex", True),
    Peer("flash_attn_norm", "flash-attn's Triton LayerNorm", _of("pointwise", "flash-attn"), "flash_attn", True),
)  # fmt: skip
ALONGSIDE = {"attention": ("reference", "reference_no_bias"), "ffn": ("sliced",)}  # what others are checked against
ALONGSIDE_ON_GPU = {
    "ffn": ("sliced_no_norm", *(f"strategy_{name}" for name in strategies(torch.device("cuda")))),
    "attention": ("fused_no_bias", "fused_frozen_tables"),
}


def here(device: torch.device, full: bool) -> tuple[list[Peer], dict[str, str]]:
    """The peers that run here, and why each of the others does not."""
    reasons = {peer.name: peer.reason(device, full) for peer in PEERS}
    absent = {name: reason for name, reason in reasons.items() if reason is not None}
    return [peer for peer in PEERS if peer.name not in absent], absent


def measured(kind: str, device: torch.device, full: bool) -> tuple[str, ...]:
    """The variants that a section of this kind measures here."""
    peers, _ = here(device, full)
    names = [name for peer in (OWN, PRODUCTS, *peers) for name in peer.variants.get(kind, ())]
    names += ALONGSIDE.get(kind, ())
    if device.type == "cuda":
        names += ALONGSIDE_ON_GPU.get(kind, ())
    return tuple(dict.fromkeys(names))


def device_here() -> torch.device:
    """Where the benchmarks run: on a GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def peer(request: pytest.FixtureRequest, pytestconfig: pytest.Config) -> Peer:
    """The peer that a test asks for by its name; skipped with the reason why it does not run here."""
    found = {one.name: one for one in (OWN, PRODUCTS, *PEERS)}[request.param]
    if reason := found.reason(device_here(), pytestconfig.getoption("--full")):
        pytest.skip(f"{found.name}: {reason}")
    return found
