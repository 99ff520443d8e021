"""Object detection: torchvision's Faster R-CNN with a feature pyramid on the backbone.

Ren, He, Girshick, Sun, Faster R-CNN, NeurIPS 2015, https://arxiv.org/abs/1506.01497; Lin et al., Feature Pyramid
Networks for Object Detection, CVPR 2017, https://arxiv.org/abs/1612.03144. Two things are changed so that a step is the
same at any number of ranks: anchors and proposals are sampled by a hash of (seed, step, sample id), and the losses'
means are over what all ranks sampled.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, faster_rcnn, rpn
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, feature_pyramid_network

from distssl import collectives
from distssl.data import draws
from distssl.data.shards import Dataset
from distssl.downstream import frames, labels
from distssl.downstream.labels import Boxes, Labelled
from distssl.downstream.task import Facts, Network, Recipe, Views, unnormalised
from distssl.errors import ConfigError
from distssl.nn.backbones import Backbone

STRIDES_AN_ANCHOR = 8  # the side of a level's anchors, in its strides, as in torchvision's default
VISIBLE = 0.25  # of a box's area must be in the window
MULTIPLE = 32  # of the views' side
SHOWN = 0.5  # the score from which a picture shows a box


class Detect(Network):
    kind = "boxes"
    recipe: ClassVar[Recipe] = Recipe(batch=16, size_px=256)

    def build(self) -> None:
        if self.how.size_px % MULTIPLE:  # torchvision would pad the images, and put the anchors elsewhere
            raise ConfigError(f"eval.fit.size_px={self.how.size_px}: detection needs a multiple of {MULTIPLE}")
        channels = self.map_channels
        width = min(256, max(32, channels[-1] // 8))  # a ResNet-50's is the paper's
        pyramid = _Pyramid(self.backbone, channels, width)
        sides = [x.shape[-1] for x in pyramid.eval()(torch.zeros(1, 3, self.how.size_px, self.how.size_px)).values()]
        names = [str(level) for level in range(len(channels))]
        self.detector = FasterRCNN(
            pyramid,
            rpn_anchor_generator=rpn.AnchorGenerator(
                tuple((round(STRIDES_AN_ANCHOR * self.how.size_px / side),) for side in sides),
                ((0.5, 1.0, 2.0),) * len(sides),
            ),
            box_roi_pool=MultiScaleRoIAlign(names, output_size=7, sampling_ratio=2),
            box_head=faster_rcnn.TwoMLPHead(width * 7 * 7, 4 * width),
            box_predictor=faster_rcnn.FastRCNNPredictor(4 * width, self.facts.num_classes + 1),
            min_size=self.how.size_px,
            max_size=self.how.size_px,
            image_mean=[0.0, 0.0, 0.0],  # views are normalised
            image_std=[1.0, 1.0, 1.0],
            _skip_resize=True,
        )
        self.samplers = Sampler(256, 0.5), Sampler(512, 0.25)  # torchvision's numbers
        for part, sampler in zip((self.detector.rpn, self.detector.roi_heads), self.samplers, strict=True):
            setattr(part, "fg_bg_sampler", sampler)  # noqa: B010 - to pyright a module's attributes are tensors

    @classmethod
    def facts_of(cls, data: Labelled, num_classes: int | None) -> Facts:
        return Facts(num_classes=labels.num_classes(data, cls.kind, num_classes))

    @classmethod
    def annotations(cls, dataset: Dataset, ids: np.ndarray) -> dict[int, Boxes]:
        return labels.boxes(dataset, ids)

    def loss(self, views: Views, known: Sequence[Boxes]) -> Tensor:
        images = list(views["image"])
        targets = [
            _target(boxes, frame, image) for boxes, frame, image in zip(known, views["frame"], images, strict=True)
        ]
        for nth, sampler in enumerate(self.samplers):
            sampler.start(draws.hash64(self.seed, self.step, nth, views["id"].cpu().numpy()))
        parts = self.detector(images, targets)
        of_proposals, of_boxes = (sampler.share_of_rank().to(images[0]) for sampler in self.samplers)
        first = parts["loss_objectness"] + parts["loss_rpn_box_reg"]
        return of_proposals * first + of_boxes * (parts["loss_classifier"] + parts["loss_box_reg"])

    def judge(self, views: Views, known: Sequence[Boxes]) -> list[dict[str, np.ndarray]]:
        found = self.detector(list(views["image"]))
        judged = []
        for boxes, frame, true in zip(found, views["frame"].cpu(), known, strict=True):
            corners = frames.boxes_out_of_view(boxes["boxes"].cpu(), frame)
            judged.append(
                {
                    "boxes": corners.float().numpy(),
                    "scores": boxes["scores"].float().cpu().numpy(),
                    "labels": boxes["labels"].cpu().numpy() - 1,
                    "true_boxes": true.corners.numpy(),
                    "true_labels": true.labels.numpy(),
                }
            )
        return judged

    @classmethod
    def score(cls, judged: Sequence[list[dict[str, np.ndarray]]]) -> dict[str, float]:
        return average_precision([image for batch in judged for image in batch])

    def picture(self, views: Views, known: Sequence[Boxes]) -> list[Tensor]:
        from torchvision.utils import draw_bounding_boxes

        found = self.detector(list(views["image"]))
        rows = []
        for image, boxes, true, frame in zip(
            unnormalised(views["image"]), found, known, views["frame"].cpu(), strict=True
        ):
            sure = boxes["boxes"][boxes["scores"] >= SHOWN].cpu()
            for corners in (frames.boxes_into_view(true.corners, frame), sure):
                rows.append(draw_bounding_boxes(image, corners, colors="red") if len(corners) else image)
        return rows


class _Pyramid(nn.Module):
    """Images -> {level: [N, width, h, w]}, the backbone's maps and one of half the last one's size."""

    def __init__(self, backbone: Backbone, channels: list[int], width: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.out_channels = width
        extra = feature_pyramid_network.LastLevelMaxPool()
        self.fpn = FeaturePyramidNetwork(channels, width, extra_blocks=extra)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        return self.fpn(OrderedDict((str(level), y) for level, y in enumerate(self.backbone.pyramid(x))))


class Sampler:
    """Chooses as torchvision's BalancedPositiveNegativeSampler, but by a hash instead of a generator."""

    def __init__(self, num_per_image: int, positive_share: float) -> None:
        self.num_per_image = num_per_image
        self.positive_share = positive_share
        self.keys: np.ndarray = np.empty(0, np.uint64)
        self.num_chosen = 0

    def start(self, keys: np.ndarray) -> None:
        """keys: uint64 [N], one an image."""
        self.keys, self.num_chosen = keys, 0

    def __call__(self, matched: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """matched: of each image, a class from 1 on, 0 for background, -1 for neither -> two uint8 masks an image."""
        positive, negative = [], []
        for key, classes in zip(self.keys, matched, strict=True):
            order = draws.hash64(key, np.arange(len(classes)))
            most = int(self.num_per_image * self.positive_share)
            chosen = self._first(classes >= 1, order, most)
            others = self._first(classes == 0, order, self.num_per_image - int(chosen.sum()))
            self.num_chosen += int(chosen.sum() + others.sum())
            positive.append(chosen)
            negative.append(others)
        return positive, negative

    def share_of_rank(self) -> Tensor:
        """What makes a mean over this rank's choice, after DDP's mean over ranks, one over all of them."""
        num = torch.tensor(float(self.num_chosen), dtype=torch.float64)
        return collectives.world_size() * num / collectives.sum_(num).clamp_min(1)

    @staticmethod
    def _first(candidates: Tensor, order: np.ndarray, num: int) -> Tensor:
        at = np.flatnonzero(candidates.cpu().numpy())
        kept = at[np.argsort(order[at], kind="stable")[:num]]
        chosen = torch.zeros_like(candidates, dtype=torch.uint8)
        chosen[torch.from_numpy(kept)] = 1
        return chosen


def _target(boxes: Boxes, frame: Tensor, image: Tensor) -> dict[str, Tensor]:
    """The boxes in a view, clipped to it, as torchvision wants them: classes from 1 on."""
    corners = frames.boxes_into_view(boxes.corners.to(image), frame)
    clipped = corners.clamp(0, image.shape[-1])
    kept = _area(clipped) >= VISIBLE * _area(corners).clamp_min(1)
    return {"boxes": clipped[kept], "labels": boxes.labels.to(image.device)[kept] + 1}


def _area(corners: Tensor) -> Tensor:
    return (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])


def average_precision(images: Sequence[dict[str, np.ndarray]]) -> dict[str, float]:
    """COCO's ap (mean over IoU 0.50 to 0.95) and ap50, by torchmetrics and pycocotools."""
    if not any(len(image["true_labels"]) for image in images):
        raise ConfigError("eval.test_source: none of its images has a box")
    from torchmetrics.detection import MeanAveragePrecision

    metric = MeanAveragePrecision(iou_type="bbox")
    metric.warn_on_many_detections = False
    as_tensors = [{key: torch.from_numpy(value) for key, value in image.items()} for image in images]
    metric.update(
        [{key: image[key] for key in ("boxes", "scores", "labels")} for image in as_tensors],
        [{"boxes": image["true_boxes"], "labels": image["true_labels"]} for image in as_tensors],
    )
    found = metric.compute()
    return {"ap": float(found["map"]), "ap50": float(found["map_50"])}
