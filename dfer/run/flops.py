"""What a model computes for a clip, counted without computing it."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dfer.config import Config
from dfer.model.build import build_model

_CLIPS = 2  # in a batch whose operators are counted; batch norm takes no single value


def flops_a_clip(config: Config) -> float:
    """Return the FLOP of convolutions and products for a clip, forwards and backwards, without those in the CRF.

    They are counted on tensors without content: nothing lies on a GPU, and nothing that a step does is touched.

    Raises:
        Exception: of whatever class, if some operator cannot be done without content.
    """
    data = config.data
    num_frames = data.num_segments * data.frames_per_segment
    with torch.device("meta"):
        model = build_model(config.model, num_frames).train()
    # Of a CPU, as models ask for a device that has autocast, which meta has not.
    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter:
        model.to_empty(device="cpu")
        prediction = model(torch.zeros(_CLIPS, num_frames, 3, data.size, data.size))
        loss = prediction.logits.sum()
        if prediction.marginals is not None:
            loss = loss + prediction.marginals.sum()
        loss.backward()
    return counter.get_total_flops() / _CLIPS
