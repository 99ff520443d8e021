"""torchvision's ResNets with any stem and width, for small images too."""

from __future__ import annotations

from torch import Tensor, nn

STEMS = ("7x7_s2_pool", "3x3_s2", "3x3_s1")


class ResNet(nn.Module):
    """torchvision's ResNet up to the last stage, its names and its initialisation, with any stem and width.

    He et al., Deep Residual Learning, CVPR 2016; the initialisation of the residual branches' last norm with zeros
    is Goyal et al., Accurate, Large Minibatch SGD, https://arxiv.org/abs/1706.02677. [N, 3, H, W] -> [N, C, h, w],
    or with `in_channels` in place of 3.
    """

    def __init__(
        self,
        block: str,
        blocks: tuple[int, ...],
        width_per_group: int = 64,
        stem: str = STEMS[0],
        width: int = 64,
        zero_init_residual: bool = False,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        from torchvision.models import resnet

        kind = {"BasicBlock": resnet.BasicBlock, "Bottleneck": resnet.Bottleneck}[block]
        size, stride = (7, 2) if stem == "7x7_s2_pool" else (3, 2 if stem == "3x3_s2" else 1)
        self.conv1 = nn.Conv2d(in_channels, width, size, stride=stride, padding=size // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if stem == "7x7_s2_pool" else nn.Identity()

        def stage(channels: int, planes: int, count: int, stride: int) -> nn.Sequential:
            out = planes * kind.expansion
            shortcut = None
            if stride != 1 or channels != out:
                shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride=stride, bias=False), nn.BatchNorm2d(out))
            first = kind(channels, planes, stride, shortcut, base_width=width_per_group)
            return nn.Sequential(first, *(kind(out, planes, base_width=width_per_group) for _ in range(count - 1)))

        self.stages = [f"layer{number}" for number in range(1, len(blocks) + 1)]
        channels = width
        for number, (name, count) in enumerate(zip(self.stages, blocks, strict=True)):
            self.add_module(name, stage(channels, width << number, count, stride=2 if number else 1))
            channels = (width << number) * kind.expansion
        self.num_features = channels
        self._initialise(zero_init_residual, "bn2" if block == "BasicBlock" else "bn3")

    def forward(self, x: Tensor) -> Tensor:
        return self.maps(x)[-1]

    def maps(self, x: Tensor) -> list[Tensor]:
        """The output of each stage."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        found = []
        for name in self.stages:
            x = self.get_submodule(name)(x)
            found.append(x)
        return found

    def _initialise(self, zero_init_residual: bool, last_norm: str) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d) and zero_init_residual and name.endswith(f".{last_norm}"):
                nn.init.zeros_(module.weight)
