"""Backbones by name: torchvision's classics, resnets of any width and stem, and all of timm; nothing is downloaded.

torchvision and timm take seconds to import, so they are imported by the functions that need them.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distssl.errors import ConfigError
from distssl.nn import sobel_filter
from distssl.nn.micro_batches import MicroBatches
from distssl.nn.resnet import STEMS, ResNet

# name: block, blocks a stage, width per group
_RESNETS: dict[str, tuple[str, tuple[int, ...], int]] = {
    "resnet8": ("BasicBlock", (1, 1, 1), 64),
    "resnet10": ("BasicBlock", (1, 1, 1, 1), 64),
    "resnet18": ("BasicBlock", (2, 2, 2, 2), 64),
    "resnet34": ("BasicBlock", (3, 4, 6, 3), 64),
    "resnet50": ("Bottleneck", (3, 4, 6, 3), 64),
    "resnet101": ("Bottleneck", (3, 4, 23, 3), 64),
    "wide_resnet50_2": ("Bottleneck", (3, 4, 6, 3), 128),
}
_PLAIN = {"alexnet": 63, "vgg16": 32, "vgg16_bn": 32}  # the smallest side of an image that leaves a place, px


class Backbone(nn.Module, ABC):
    """A network without its classifier. Its parameters lie in `net` under the names of the library it comes from."""

    def __init__(self, net: nn.Module, num_features: int) -> None:
        super().__init__()
        self.net = net
        self.num_features = num_features
        self.micro_batches: MicroBatches | None = None  # in training; None: the whole batch at once

    def feature_map(self, x: Tensor) -> Tensor:
        """Images [N, 3, H, W] -> [N, C, h, w], the last layer that has places; some of timm's have C != D."""
        return self._in_parts(self._feature_map, x)

    def features(self, x: Tensor) -> Tensor:
        """Images [N, 3, H, W] -> [N, D] with D = num_features."""
        return self._in_parts(self._features, x)

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)

    def pyramid(self, x: Tensor) -> list[Tensor]:
        """Images [N, 3, H, W] -> feature maps [N, C, h, w], largest first; the last is `feature_map`'s.

        A ResNet gives one a stage, any other network its feature map alone.
        """
        return [self.feature_map(x)]

    def use_maps(self, size_px: int) -> list[tuple[int, int, int]]:
        """Train what the `pyramid` of a square image needs; its maps' shapes (C, h, w).

        Other parameters stop learning, like the norm that some of timm's networks have behind the feature map:
        DistributedDataParallel wants a gradient of every one that learns.
        """
        parameter, was_training = next(self.parameters()), self.training
        image = torch.zeros(1, 3, size_px, size_px, dtype=parameter.dtype, device=parameter.device)
        with torch.enable_grad():
            maps = self.eval().pyramid(image)
        self.train(was_training)
        learning = [parameter for parameter in self.parameters() if parameter.requires_grad]
        sums = [x.sum() for x in maps if x.requires_grad]
        gradients = torch.autograd.grad(sums, learning, allow_unused=True) if sums else [None] * len(learning)
        for parameter, gradient in zip(learning, gradients, strict=True):
            parameter.requires_grad_(gradient is not None)
        return [(x.shape[1], x.shape[2], x.shape[3]) for x in maps]

    @abstractmethod
    def stages(self) -> dict[str, int]:
        """The stage of each parameter, by its name: 0 is nearest to the image."""

    @abstractmethod
    def _feature_map(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def _features(self, x: Tensor) -> Tensor: ...

    def _in_parts(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if self.micro_batches is None or not self.training:
            return function(x)
        return self.micro_batches.run(self, function, x)


def build(name: str, stem: str = "7x7_s2_pool", sobel: bool = False, **options: Any) -> Backbone:
    """The backbone `name` with random weights; with `sobel`, not timm's, behind a Sobel filter.

    - resnet18, 34, 50, 101 and wide_resnet50_2: torchvision's; resnet10 has one basic block a stage, and resnet8 the
      first three of these stages. D is the pooled last stage. `stem` is "7x7_s2_pool" (ImageNet's), "3x3_s2" or
      "3x3_s1" (a 3x3 convolution with stride 2 or 1 and no pooling, for small images). Options: width=64, the first
      stage's channels, doubled at each stage; zero_init_residual=False.
    - alexnet, vgg16, vgg16_bn: torchvision's convolutions; D is their pooled feature map, not the 4096 of the layers
      the literature calls fc6 and fc7, which hold nine tenths of the parameters and want 224 px.
    - any other name is timm's, with timm's options (img_size, dynamic_img_size, ...); D is what a classifier would get.

    Raises ConfigError for an unknown name, stem or option, a small stem for a net that has none, or a network that
    drops something at random: its numbers would be a worker's own, and not in the checkpoint.
    """
    if stem not in STEMS:
        raise ConfigError(f"model.stem={stem} is unknown: use {', '.join(STEMS)}")
    if name in _RESNETS:
        return _build_resnet(name, stem, sobel, options)
    if name not in _PLAIN:
        _require_timm(name)
    if stem != STEMS[0]:
        raise ConfigError(f"model.stem={stem} needs one of {', '.join(_RESNETS)}; {name} has only its own stem")
    if name in _PLAIN:
        if options:
            raise ConfigError(f"model.options.{next(iter(options))} is not an option of {name}, which has none")
        return _build_plain(name, sobel)
    if sobel:
        raise ConfigError(f"model.sobel=true needs one of {', '.join([*_RESNETS, *_PLAIN])}; {name} is timm's")
    return _build_timm(name, options)


class Convolutional(Backbone):
    """A `net` of [N, C, H, W] -> [N, D, h, w]; the features are its global average. `front`: what images pass first."""

    def __init__(self, net: nn.Module, num_features: int, front: nn.Module, least_px: int = 1) -> None:
        super().__init__(net, num_features)
        self.front, self.least_px = front, least_px

    def pyramid(self, x: Tensor) -> list[Tensor]:
        return self.net.maps(self.front(x)) if isinstance(self.net, ResNet) else super().pyramid(x)

    def stages(self) -> dict[str, int]:
        tops = ["conv1 bn1", *self.net.stages] if isinstance(self.net, ResNet) else _layers(self.net)
        number = {prefix: i for i, prefixes in enumerate(tops) for prefix in prefixes.split()}
        return {
            name: next(stage for prefix, stage in number.items() if name.startswith(f"net.{prefix}."))
            for name, _ in self.named_parameters()
        }

    def _feature_map(self, x: Tensor) -> Tensor:
        if (size_px := min(x.shape[2:])) < self.least_px:
            raise ConfigError(f"the backbone takes images of {self.least_px} px or more, not of {size_px}")
        return self.net(self.front(x))

    def _features(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(self._feature_map(x), 1).flatten(1)  # [N, D]


class Timm(Backbone):
    """A network of timm without its classifier; a transformer's feature map is its patch tokens in their places."""

    def _feature_map(self, x: Tensor) -> Tensor:
        self._check_size(x)
        y = self.net.forward_features(x)  # pyright: ignore[reportCallIssue]
        if y.dim() == 4:
            return y.permute(0, 3, 1, 2) if getattr(self.net, "output_fmt", "NCHW") == "NHWC" else y
        patches = y[:, getattr(self.net, "num_prefix_tokens", 0) :]  # [N, P, C]
        height = round((patches.shape[1] * x.shape[2] / x.shape[3]) ** 0.5)  # patches are square
        return patches.transpose(1, 2).unflatten(2, (height, -1))  # [N, C, h, w]

    def _features(self, x: Tensor) -> Tensor:
        self._check_size(x)
        return self.net(x)

    def _check_size(self, x: Tensor) -> None:
        """Raises ConfigError for images of a size that a transformer was not built for."""
        patches = getattr(self.net, "patch_embed", None)
        sides = getattr(patches, "img_size", None)
        if sides and getattr(patches, "strict_img_size", False) and tuple(x.shape[2:]) != tuple(sides):
            raise ConfigError(
                f"the backbone takes images of {sides[0]} px, not {x.shape[2]}: say eval.fit.size_px={sides[0]} (for "
                "frozen features eval.size_px), or model.options={dynamic_img_size: true}"
            )

    def stages(self) -> dict[str, int]:
        from timm.models import group_parameters

        matcher = self.net.group_matcher(coarse=True)  # pyright: ignore[reportCallIssue]
        grouped = group_parameters(self.net, matcher, reverse=True)
        return {f"net.{name}": stage for name, stage in grouped.items()}  # pyright: ignore[reportReturnType]


def _layers(net: nn.Module) -> list[str]:
    """The modules of a plain network that hold parameters of their own, in their order; a norm goes with its layer."""
    layers: list[str] = []
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            layers.append(name)
        elif list(module.parameters(recurse=False)):
            layers[-1] += f" {name}"
    return layers


def _build_resnet(name: str, stem: str, sobel: bool, options: dict[str, Any]) -> Backbone:
    known = ("width", "zero_init_residual")
    unknown = [option for option in options if option not in known]
    if unknown:
        raise ConfigError(
            *(f"model.options.{option} is not an option of {name}: it has {', '.join(known)}" for option in unknown)
        )
    width = options.get("width", 64)
    if not isinstance(width, int) or width < 1:
        raise ConfigError(f"model.options.width={width!r}: a whole number of at least 1 is right")
    block, blocks, width_per_group = _RESNETS[name]
    net = ResNet(block, blocks, width_per_group, stem, in_channels=2 if sobel else 3, **options)
    return Convolutional(net, net.num_features, _front(sobel))


def _front(sobel: bool) -> nn.Module:
    return sobel_filter.Sobel() if sobel else nn.Identity()


def _build_plain(name: str, sobel: bool) -> Backbone:
    from torchvision.models import alexnet, vgg

    if name == "alexnet":
        net = alexnet(weights=None).features
        if sobel:
            net[0] = nn.Conv2d(2, 64, kernel_size=11, stride=4, padding=2)
        return Convolutional(nn.Sequential(OrderedDict(features=net)), 256, _front(sobel), _PLAIN[name])
    # torchvision's constructor would fill the classifier's 120 million weights first: seconds, to throw them away.
    features = vgg.make_layers(vgg.cfgs["D"], batch_norm=name == "vgg16_bn")
    if sobel:
        features[0] = nn.Conv2d(2, 64, kernel_size=3, padding=1)
    for module in features.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(module.bias)  # pyright: ignore[reportArgumentType]
    return Convolutional(nn.Sequential(OrderedDict(features=features)), 512, _front(sobel), _PLAIN[name])


def _require_timm(name: str) -> None:
    import timm

    if not timm.is_model(name):
        names = [*_RESNETS, *_PLAIN, *timm.list_models()]
        near = difflib.get_close_matches(name, names, n=5, cutoff=0.5)
        raise ConfigError(f"model.backbone={name} is unknown; nearest: {', '.join(near) or ', '.join(_RESNETS)}")


def _build_timm(name: str, options: dict[str, Any]) -> Backbone:
    import timm

    try:
        net = timm.create_model(name, pretrained=False, num_classes=0, **options)
    except TypeError as error:  # the only sign timm gives of an option it does not know
        raise ConfigError(f"model.backbone={name} does not take these options: {error}") from error
    if any(_drops(module) for module in net.modules()):
        raise ConfigError(
            f"model.options={options}: {name} drops activations at random, and the result would depend on the number "
            "of workers; drop_path_rate: 0 is right, and so for drop_rate and the like"
        )
    return Timm(net, int(getattr(net, "head_hidden_size", net.num_features)))  # pyright: ignore[reportArgumentType]


def _drops(module: nn.Module) -> bool:
    """Whether it is one of torch's or timm's modules that drop something in training."""
    from timm.layers.drop import DropBlock2d, DropPath
    from timm.layers.patch_dropout import PatchDropout

    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    if isinstance(module, DropPath | DropBlock2d):
        return bool(module.drop_prob)
    return isinstance(module, PatchDropout) and module.prob > 0
