"""Small models with every parameter randomised, ragged batches for them, and comparisons of what they compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from onepeace_fast import OnePeaceConfig, OnePeacePretrain, RoutePlan
from onepeace_fast.config import AudioAdapterConfig, ImageAdapterConfig, TextAdapterConfig, TransformerConfig
from onepeace_fast.models.inputs import read_batch

BACKENDS = ("reference", "fused")
VOCABULARY, PADDING = 30, 1
SIZES = {"embed_dim": 48, "ffn_embed_dim": 80, "layers": 2, "attention_heads": 3, "layer_scale": 0.1}
FEATURES = ((8, 10, 5), (8, 3, 2))


def small_config(decoder: Mapping[str, object] | None = None, **encoder: object) -> OnePeaceConfig:
    """A configuration of a few thousand parameters; keywords override the encoder's fields."""
    audio = AudioAdapterConfig(
        feature_layers=FEATURES, position_layers=2, position_width=10, position_groups=4, bucket_size=8
    )
    image = ImageAdapterConfig(position_grid=3, bias_grid=4)
    adapters = {"text": TextAdapterConfig(bucket_size=6), "image": image, "audio": audio}
    unbiased = {
        "text": TextAdapterConfig(use_bias=False),
        "image": ImageAdapterConfig(position_grid=3, bias_grid=4, use_bias=False),
        "audio": AudioAdapterConfig(use_bias=False),
    }
    small = {"embed_dim": 32, "ffn_embed_dim": 40, "layers": 1, "attention_heads": 2, "layer_scale": None}
    return OnePeaceConfig(
        encoder=TransformerConfig(**{**SIZES, **adapters, **encoder}),
        decoder=TransformerConfig(**{**small, **unbiased, **(decoder or {})}),
        vocab_size=VOCABULARY,
    )


def randomise(model: OnePeacePretrain, seed: int = 0) -> None:
    """Fill every parameter with numbers that hide nothing: no zero table, unit norm or tiny LayerScale remains."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            last = name.rsplit(".", 1)[-1]
            if not parameter.dim():  # a temperature
                continue
            if parameter.dim() == 1 and last in ("weight", "c_attn"):
                value = 1 + 0.3 * noise
            elif last in ("gamma_1", "gamma_2"):
                value = 0.5 + 0.2 * noise
            elif parameter.dim() == 1 or "embed" in last or "rel_pos_table" in name or "adapter.embed_tokens" in name:
                value = 0.5 * noise
            else:
                value = noise / parameter[0].numel() ** 0.5
            parameter.copy_(value)


def small_model(
    backend: str, config: OnePeaceConfig | None = None, dtype: torch.dtype = torch.float64, seed: int = 0
) -> OnePeacePretrain:
    """A randomised model in evaluation mode, float64 so that comparisons can be tight."""
    model = OnePeacePretrain(config or small_config(), backend=backend)
    model = model.to(dtype)
    randomise(model, seed)
    return model.eval()


def text_batch(lengths: Sequence[int], width: int | None = None, seed: int = 0) -> Tensor:
    """Token ids [rows, width], padded; lengths do not count CLS."""
    width = max(lengths, default=0) if width is None else width
    tokens = torch.randint(4, VOCABULARY, (len(lengths), width), generator=torch.Generator().manual_seed(seed))
    return tokens.masked_fill(torch.arange(width) >= torch.tensor(lengths, dtype=torch.int64)[:, None], PADDING)


def image_batch(rows: int, grid: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Images of grid x grid patches."""
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randn(rows, 3, 16 * grid, 16 * grid, generator=generator, dtype=torch.float64).to(dtype)


def samples_of(frames: int) -> int:
    """Fewest samples that have this many frames."""
    for _, kernel, stride in reversed(FEATURES):
        frames = (frames - 1) * stride + kernel
    return frames


def audio_batch(frames: Sequence[int], dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Waveforms [rows, samples], zero at padding, and audio_padding [rows, 1 + frames]."""
    generator = torch.Generator().manual_seed(seed + 2)
    longest = max(frames, default=1)
    audio = torch.randn(len(frames), samples_of(longest), generator=generator, dtype=torch.float64).to(dtype)
    ends = torch.tensor([samples_of(count) for count in frames], dtype=torch.int64)
    audio = audio.masked_fill(torch.arange(audio.shape[1]) >= ends[:, None], 0)
    return audio, torch.arange(longest + 1) > torch.tensor(list(frames), dtype=torch.int64)[:, None]


def batch_of(
    text: Sequence[int] | None = None, image: tuple[int, int] | None = None, audio: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float64, seed: int = 0,
) -> dict[str, Tensor]:  # fmt: skip
    """Keyword arguments of ``encode``: text lengths, (images, grid), audio frames."""
    batch = {}
    if text is not None:
        batch["text"] = text_batch(text, seed=seed)
    if image is not None:
        batch["image"] = image_batch(*image, dtype=dtype, seed=seed)
    if audio is not None:
        batch["audio"], batch["audio_padding"] = audio_batch(audio, dtype=dtype, seed=seed)
    return batch


def valid_tokens(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """bool [rows, length] of each modality, CLS first, True at real tokens."""
    valid = {}
    if "text" in batch:
        text = batch["text"]
        valid["text"] = torch.cat([text.new_ones(text.shape[0], 1, dtype=torch.bool), text != PADDING], dim=1)
    if "image" in batch:
        rows, _, side, _ = batch["image"].shape
        valid["image"] = torch.ones(rows, 1 + (side // 16) ** 2, dtype=torch.bool)
    if "audio" in batch:
        valid["audio"] = ~batch["audio_padding"]
    return valid


def hide(batch: Mapping[str, Tensor], share: float = 0.4, seed: int = 0) -> dict[str, Tensor]:
    """Masks of a denoising pass: about ``share`` of each modality's tokens, never CLS, at least one."""
    generator, masks = torch.Generator().manual_seed(seed), {}
    for name, valid in valid_tokens(batch).items():
        mask = torch.rand(valid.shape, generator=generator) < share
        mask[:, 0], mask[:, 1] = False, True
        masks[name] = mask & valid
    return masks


def weighted_sum(outputs: Mapping[str, Tensor], valid: Mapping[str, Tensor], seed: int = 0) -> Tensor:
    """A scalar that depends on every real token, and on nothing at padding."""
    generator, total = torch.Generator().manual_seed(seed), 0.0
    for name in sorted(outputs):
        weights = torch.randn(outputs[name].shape, generator=generator, dtype=torch.float64).to(outputs[name])
        total = total + (outputs[name] * weights)[valid[name]].sum()
    return total


def at_tokens(outputs: Mapping[str, Tensor], valid: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The real tokens' rows of each output, detached."""
    return {name: output.detach()[valid[name]] for name, output in outputs.items()}


def gradients_of(model: OnePeacePretrain, loss: Tensor) -> dict[str, Tensor]:
    """Every parameter's gradient by name, absent ones left out."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: grad.clone() for name, grad in model.to_upstream_state_dict(grads=True).items() if grad is not None}


def with_gradients(
    model: OnePeacePretrain, batch: Mapping[str, Tensor], task: str = "encode", **keywords: object
) -> dict[str, Tensor]:
    """Outputs of a batch at its real tokens, and the gradients of their weighted sum, all by name."""
    outputs, valid = model(task, **batch, **keywords), valid_tokens(batch)
    return at_tokens(outputs, valid) | gradients_of(model, weighted_sum(outputs, valid))


def losses_with_gradients(model: OnePeacePretrain, task: str, inputs: Mapping[str, object]) -> dict[str, Tensor]:
    """What a pretraining task gives, and the gradients of its loss, all by name."""
    losses = model(task, **inputs)
    return {name: value.detach() for name, value in losses.items()} | gradients_of(model, losses["loss"])


def layer_inputs(model: OnePeacePretrain, batch: Mapping[str, Tensor]) -> tuple[Tensor, RoutePlan, list[Tensor]]:
    """Packed rows, plan and bias vectors of a batch, as the encoder's stack gives them to a layer, detached."""
    stack = model.encoder_wrapper
    read, _ = read_batch(stack.adapters, batch)
    tokens = stack.embed(read)
    plan = stack.plan(tokens)
    x = plan.pack({name: part.x for name, part in tokens.items()})
    bias = stack.bias({name: part.width for name, part in tokens.items()})[0]
    return x.detach(), plan, [vector.detach() for vector in bias]


class Dtypes(TorchDispatchMode):
    """The dtypes of the first tensor that every op gets that runs, by the op's name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, set[torch.dtype]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if (first := next((x for x in args if isinstance(x, Tensor)), None)) is not None:
            self.seen.setdefault(func._opname, set()).add(first.dtype)
        return func(*args, **(kwargs or {}))


def assert_close(got: Mapping[str, Tensor], want: Mapping[str, Tensor], tolerance: float = 1e-10) -> None:
    """Every tensor equal to within ``tolerance`` of its own largest magnitude; all that differ are named."""
    assert set(got) == set(want), sorted(set(got) ^ set(want))
    problems = []
    for name, value in want.items():
        assert got[name].shape == value.shape, name
        if value.numel():
            error, scale = (got[name].double() - value.double()).abs().max().item(), value.double().abs().max().item()
            if not error <= tolerance * max(scale, 1e-3):
                problems.append(f"{name}: off by {error:.2e} of {scale:.2e}")
    assert not problems, "\n".join(problems)


def assert_same_bits(got: Mapping[str, object], want: Mapping[str, object]) -> None:
    """Every tensor bitwise equal and of the same dtype, all else equal."""
    assert set(got) == set(want), sorted(set(got) ^ set(want))
    different = [
        name for name, value in want.items()
        if not (got[name].dtype == value.dtype and torch.equal(got[name], value)
                if torch.is_tensor(value) else got[name] == value)
    ]  # fmt: skip
    assert not different, different
