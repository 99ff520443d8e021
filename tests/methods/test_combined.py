"""Combined: one decode, the weighted sum of its parts, and each part as it is alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from distssl import config, method, train
from distssl.context import Context
from distssl.data import graph
from distssl.data.shards import Dataset
from distssl.errors import ConfigError
from distssl.methods import combined
from tests import runs

CONFIG = Path(__file__).parent.parent.parent / "configs/pretrain/combined_rotation_jigsaw_simclr_imagenet.yaml"


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_each_image_is_decoded_once_for_all_parts(device: str) -> None:
    run = config.load(CONFIG, [], method.options)
    cfg = method.options("combined")(**run.method.options)
    assert list(cfg.parts) == ["rotation", "jigsaw", "simclr"]  # pyright: ignore[reportAttributeAccessIssue]

    def decoders(name: str, cfg: method.Options) -> int:
        traced = graph.trace(lambda sample: method.find(name).views(cfg, sample), lambda: (), backend=device)
        traced.pipeline._build_graph()
        return sum(op._op.schema.Name().startswith("decoders") for op in traced.pipeline._ops)

    assert decoders("combined", cfg) == 1
    assert decoders("simclr", method.options("simclr")()) == 2  # alone it decodes a region for each view


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.packed(tmp_path_factory.mktemp("photos"), num=32)


def test_the_loss_is_the_weighted_sum_of_the_parts_and_a_checkpoint_holds_the_backbone_once(
    packed: Path, tmp_path: Path
) -> None:
    run = runs.tiny(packed, tmp_path, "method.name=combined", "train.precision=float64")
    with Context(run.run_dir) as context:
        training = train.Training(run, context, Dataset.open(packed))
        views = next(training.batches())
        training.close()
    built = training.method
    assert isinstance(built, combined.Combined)
    outputs = built.train()({name: x.double() if x.is_floating_point() else x for name, x in views.items()})
    expected = 0.5 * outputs["rotation/loss"] + outputs["moco_v2/loss"] + outputs["simclr/loss"]
    torch.testing.assert_close(outputs["loss"], expected)
    keys = list(built.state_dict())
    assert sum(key.endswith("backbone.net.conv1.weight") for key in keys) == 1
    assert "parts.moco_v2.queue.rows" in keys
    moved = {id(parameter) for group in training.optimizer.param_groups for parameter in group["params"]}
    assert moved == {id(parameter) for parameter in built.parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ("{rotatoin: {}}", "did you mean rotation?"),
        ("{rotation: {weight: 0}}", "parts.rotation.weight=0: a number above 0 is right"),
        ("{simclr: {temprature: 1}}", "temprature"),
        ("{}", "at least 1 item"),
        ("{uda: {}}", "parts.uda learns from labels: it cannot be a part"),
    ],
)
def test_parts_that_cannot_be_are_told(tmp_path: Path, parts: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load(None, ["data.source=x", "method.name=combined", f"method.parts={parts}"], method.options)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_a_part_makes_anew_the_optimiser_forgets(packed: Path, tmp_path: Path) -> None:
    parts = {"dino": {**method.options("dino").small, "freeze_last_layer_epochs": 1}}
    built = method.build(runs.tiny(packed, tmp_path, "method.name=combined", f"method.parts={json.dumps(parts)}"))
    last = built.get_parameter("parts.dino.head.last.weight")
    for epoch, expected in enumerate(([], [last], [])):
        built.on_epoch_start(epoch)
        assert [id(parameter) for parameter in built.made_anew()] == [id(parameter) for parameter in expected]


@pytest.mark.parametrize("names", [("inpainting", "simclr"), ("simclr", "inpainting"), ("inpainting",)])
def test_what_one_part_does_not_need_still_learns_for_another(packed: Path, tmp_path: Path, names: tuple[str]) -> None:
    """Inpainting needs no more than the feature map, which this network has a convolution behind."""
    parts = json.dumps({name: method.options(name).small for name in names})
    network = ["model.backbone=mobilenetv3_small_050", "model.stem=7x7_s2_pool", "model.options={}"]
    built = method.build(runs.tiny(packed, tmp_path, *network, "method.name=combined", f"method.parts={parts}"))
    assert built.backbone.get_parameter("net.conv_head.weight").requires_grad == ("simclr" in names)
