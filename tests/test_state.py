"""What the state of a training is built from."""

import dataclasses
import typing

import pytest
import torch

from dfer.cli import UserError
from dfer.config import Config, DataConfig, ModelConfig, RunConfig
from dfer.precision import Precision
from dfer.state import build_state

SMALL = Config(
    data=DataConfig(size=32, num_segments=1, batch_size=1),
    model=ModelConfig(dim=16, backbone="test_resnet"),
    run=RunConfig(device="cpu", amp="off"),
)
FLOAT32 = Precision(torch.device("cpu"), None, False)


@pytest.mark.parametrize(
    ("data", "model", "refused"),
    [
        ({}, {}, True),
        ({"frames_per_segment": 2}, {}, False),
        ({"num_segments": 2}, {}, False),
        ({"batch_size": 2}, {}, False),
        ({"size": 33}, {}, False),
        ({}, {"name": "mean-pool"}, True),
        ({}, {"backbone": "test_convnext", "name": "mean-pool"}, False),  # without batch norm
    ],
)
def test_one_value_per_channel_is_refused_before_the_first_step(data, model, refused):
    config = dataclasses.replace(
        SMALL, data=dataclasses.replace(SMALL.data, **data), model=dataclasses.replace(SMALL.model, **model)
    )
    if refused:
        with pytest.raises(UserError, match="batch norm sees one value per channel"):
            build_state(config, FLOAT32, None)
        return
    net = build_state(config, FLOAT32, None).model.train()
    clips = (
        config.data.batch_size,
        config.data.num_segments * config.data.frames_per_segment,
        3,
        *2 * [config.data.size],
    )
    assert net(torch.zeros(clips)).logits.shape == (config.data.batch_size, 7)


@pytest.mark.parametrize("name", typing.get_args(typing.get_type_hints(ModelConfig)["name"]))
def test_every_model_can_be_trained(name):
    data = dataclasses.replace(SMALL.data, num_segments=4, batch_size=2)
    config = dataclasses.replace(SMALL, data=data, model=dataclasses.replace(SMALL.model, name=name))
    assert build_state(config, FLOAT32, None).step == 0


def test_a_run_in_fp16_comes_back_to_it_from_where_there_is_none():
    config = dataclasses.replace(SMALL, data=dataclasses.replace(SMALL.data, batch_size=2))
    half = FLOAT32._replace(dtype=torch.float16)
    alone, scaled = build_state(config, FLOAT32, None).state_dict(), build_state(config, half, None)
    scaled.scaler.load_state_dict(
        {"scale": 8.0, "growth_factor": 2.0, "backoff_factor": 0.5} | {"growth_interval": 9, "_growth_tracker": 0}
    )
    assert build_state(config, half, scaled.state_dict()).scaler.get_scale() == 8
    assert build_state(config, half, alone).scaler.get_scale() == torch.amp.GradScaler("cpu").get_scale()
    assert not build_state(config, FLOAT32, scaled.state_dict()).scaler.is_enabled()
