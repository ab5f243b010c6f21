"""Pictures of the estimate for the 4 B model: all of it a model, in the colour that nothing measured has."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from onepeace_fast.config import OnePeaceConfig, TransformerConfig
from onepeace_fast.estimate import constants, scale, speed
from onepeace_fast.estimate.command import VOCABULARY
from onepeace_fast.estimate.parameters import sizes_of
from onepeace_fast.estimate.work import Batch, Work
from onepeace_fast.report.drawing import MODELLED, Picture, new_figure, plain

SAMPLES = 32
LENGTHS = {"text": [7 + round(place * 65 / (SAMPLES - 1)) for place in range(SAMPLES)], "image": [257] * SAMPLES}
COUNTS = (1, 2, 4, 8, 16, 64, 256, 1024)
SIDES = (8, 12, 16, 24, 32, 48)  # patches of an image's side
TEXT = "32 texts of 7 to 72 tokens with images of 257, on each GPU"


def pictures() -> Iterator[Picture]:
    """Samples a second beside the tax, memory by GPUs and by tokens, and what more GPUs bring."""
    sizes = sizes_of(OnePeaceConfig(vocab_size=VOCABULARY))
    packed, padded = (Work(TransformerConfig(), Batch(LENGTHS), packed) for packed in (True, False))
    source = f"onepeace-fast estimate, of {constants.kernels()['source']}; {TEXT}"
    picture = partial(Picture, source=source, modelled=True)
    ways = [(gpu, way, packed if way in speed.STRATEGIES else padded) for gpu in constants.gpus() for way in speed.WAYS]

    figure, panels = new_figure(6.4, rows=2)
    for place, (gpu, way, work) in enumerate(ways):
        time = speed.step(work, gpu, way, sizes.parameters)
        panels[0].plot([SAMPLES / time.high, SAMPLES / time.low], [place] * 2, color=MODELLED, linewidth=4)
        panels[1].plot(speed.layer(work, gpu, way).tax, [place] * 2, color=MODELLED, linewidth=4)
    for axes, title in ((panels[0], "samples a second"), (panels[1], "layer over its bare products (times)")):
        axes.set_yticks(range(len(ways)), [f"{gpu}, {way}" for gpu, way, _ in ways], fontsize=8)
        axes.set_ylim(len(ways) - 0.5, -0.5)
        axes.set_title(title)
    panels[0].set_xlim(left=0)
    panels[1].axvline(1, color="#111827", linewidth=0.8)
    yield picture("model", "The 4 B model on one GPU: samples a second beside the tax.", figure=figure)

    figure, (axes,) = new_figure(2.9)
    for way, work, style in (("packed", packed, "-"), ("eager", padded, "--")):
        peaks = [scale.memory(work, sizes, count).peak for count in COUNTS]
        axes.fill_between(
            COUNTS, [p.low / 1e9 for p in peaks], [p.high / 1e9 for p in peaks], color=MODELLED, alpha=0.3
        )
        axes.plot(COUNTS, [p.middle / 1e9 for p in peaks], style, color=MODELLED, label=way)
    for size in sorted({gpu.memory_GB for gpu in constants.gpus().values()}):
        axes.axhline(size, color="#111827", linewidth=0.8)
        names = ", ".join(name for name, gpu in constants.gpus().items() if gpu.memory_GB == size)
        axes.annotate(names, (COUNTS[-1], size), ha="right", va="bottom", fontsize=8)
    axes.set(xscale="log", xlabel="GPUs that share the model by FSDP2", ylabel="GB of each GPU", ylim=(0, None))
    axes.set_xticks(COUNTS, [str(count) for count in COUNTS])
    axes.minorticks_off()
    axes.legend()
    yield picture("model", "Memory of a GPU: the lines are what there is.", figure=figure)

    figure, (axes,) = new_figure(2.9)
    for way, style in (("packed", "-"), ("eager", "--")):
        kept = []
        for side in SIDES:
            batch = Batch({"image": [side**2 + 1] * SAMPLES})
            kept.append(Work(TransformerConfig(), batch, way == "packed").saved_bytes() / 1e9)
        axes.plot([side**2 + 1 for side in SIDES], kept, f"o{style}", color=MODELLED, markersize=3, label=way)
    axes.set(xscale="log", yscale="log", xlabel="tokens of each of 32 images", ylabel="GB kept for the backward pass")
    plain(axes.xaxis)
    plain(axes.yaxis)
    axes.legend()
    text = "Memory against sequence length: what autograd keeps, by formulas that tests hold against it."
    yield picture("memory", text, figure=figure)

    figure, (axes,) = new_figure(3.2)
    for gpu, style in zip(constants.gpus(), ("-", "--", ":"), strict=False):
        rates = [
            constants.Span(
                *(count * SAMPLES / end for end in reversed(scale.seconds(packed, gpu, "hybrid", sizes, count)))
            )
            for count in COUNTS
        ]
        axes.fill_between(COUNTS, [r.low for r in rates], [r.high for r in rates], color=MODELLED, alpha=0.25)
        axes.plot(COUNTS, [rate.middle for rate in rates], style, color=MODELLED, label=gpu)
    axes.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="samples a second, all GPUs")
    axes.set_xticks(COUNTS, [str(count) for count in COUNTS])
    axes.minorticks_off()
    plain(axes.yaxis)
    axes.legend()
    text = "What more GPUs bring: from the second machine on what is sent decides."
    yield picture("model", text, figure=figure)
