"""What a training step draws: every pass its own DropPath, in the order in which the passes are packed."""

import pytest
import torch
from models._small import BACKENDS, batch_of, hide, small_config, small_model

from onepeace_fast.models import stack as stack_module

BATCH = batch_of(text=[5, 2, 3, 4], image=(4, 3))


def masks():
    alone, pair = hide(BATCH, seed=1), hide(BATCH, seed=2)
    return {**alone, **{f"vl_{name}": mask for name, mask in pair.items()}}


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_pass_of_a_step_draws_its_own_drop_path_and_is_encoded_with_it(backend, monkeypatch):
    drawn, used = [], []
    draw = stack_module.draw_drop_path
    monkeypatch.setattr(stack_module, "draw_drop_path", lambda *a: drawn.append(draw(*a)) or drawn[-1])
    model = small_model(backend, small_config(layers=4, drop_path_rate=0.6)).train()
    transformer = model.encoder_wrapper.fusion_model

    def note(module, arguments):
        used.append(arguments[1].drop_path if backend == "fused" else arguments[3])

    transformer.register_forward_pre_hook(note)
    torch.manual_seed(0)
    model.vision_language_loss(**BATCH, masks=masks())
    assert len(drawn) == 6  # two teachers, three students; then the pair's teacher
    assert len({tuple(keep.flatten().tolist()) for keep in drawn}) == 6
    given = torch.cat(used, dim=2)
    assert torch.equal(given.double(), torch.cat(drawn, dim=2).double())
