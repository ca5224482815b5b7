"""ResNets as sparse training has them: a classifier without bias, He initialisation (Wortsman et al., 2019, section 4.4).

Contract: names of parameters are those of torchvision, so that weights of its networks fit but for the bias of the classifier.
They stand here because torchvision belongs to one build of torch, and taking it may bring another one.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Convolutions beside a shortcut (He et al., 2016): two of 3x3, or 1x1, 3x3 and 1x1 around a bottleneck.

    Args:
        inputs, width: channels that come in, and of the 3x3 convolutions.
        stride: of the first 3x3 convolution, in a bottleneck too ("v1.5").
        bottleneck: which of the two; its outputs are four times as wide.
    """

    def __init__(self, inputs: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        outputs = 4 * width if bottleneck else width
        if bottleneck:
            kinds = [(inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1)]
        else:
            kinds = [(inputs, width, 3, stride), (width, outputs, 3, 1)]
        self.depth = len(kinds)
        for i, (given, made, kernel, step) in enumerate(kinds, 1):
            self.add_module(f"conv{i}", nn.Conv2d(given, made, kernel, stride=step, padding=kernel // 2, bias=False))
            self.add_module(f"bn{i}", nn.BatchNorm2d(made))
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            shortcut = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        made = x
        for i in range(1, 1 + self.depth):
            made = self.get_submodule(f"bn{i}")(self.get_submodule(f"conv{i}")(made))
            made = F.relu(made) if i < self.depth else made
        return F.relu(made + self.downsample(x))


class ResNet(nn.Module):
    """Images ``[batch, 3, height, width]`` to logits through four stages of blocks.

    Args:
        num_classes: of the classifier.
        blocks: of each stage; each but the first begins with a stride of 2.
        bottleneck: see :class:`Block`.
        small_images: a 3x3 convolution without stride at first, and no pooling after it.
        channels: of the first stage; each further one has twice as many.
    """

    def __init__(
        self, num_classes: int, blocks: tuple[int, ...], bottleneck: bool, small_images: bool, channels: int = 64
    ) -> None:
        super().__init__()
        size, stride = (3, 1) if small_images else (7, 2)
        self.conv1 = nn.Conv2d(3, channels, size, stride=stride, padding=size // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.maxpool = nn.Identity() if small_images else nn.MaxPool2d(3, stride=2, padding=1)
        inputs = channels
        for stage, count in enumerate(blocks):
            width, layers = channels << stage, list[nn.Module]()
            for block in range(count):
                layers.append(Block(inputs, width, 2 if stage and not block else 1, bottleneck))
                inputs = 4 * width if bottleneck else width
            self.add_module(f"layer{1 + stage}", nn.Sequential(*layers))
        self.stages = len(blocks)
        self.fc = nn.Linear(inputs, num_classes, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(images))))
        for stage in range(1, 1 + self.stages):
            x = self.get_submodule(f"layer{stage}")(x)
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits


def resnet50(num_classes: int = 1000) -> nn.Module:
    """ResNet-50 v1.5 as in the paper's sparse training: for images of 224 pixels.

    Convolutions and the classifier, which has no bias, are initialised by He's normal rule with the fan-in.
    """
    return ResNet(num_classes, (3, 4, 6, 3), bottleneck=True, small_images=False)


def resnet18_cifar(num_classes: int = 10, *, width: float = 1.0) -> nn.Module:
    """ResNet-18 for images of 32 pixels: a 3x3 stem without stride, no pooling after it; otherwise as :func:`resnet50`.

    Args:
        num_classes: of the classifier.
        width: factor of all channels, of which the first stage has 64 at width 1.

    Raises:
        ValueError: a width that leaves no channel.
    """
    channels = round(64 * width)
    if channels < 1:
        raise ValueError(f"width={width}: a ResNet-18 has 64 times as many channels in its first stage, and at least one")
    return ResNet(num_classes, (2, 2, 2, 2), bottleneck=False, small_images=True, channels=channels)
