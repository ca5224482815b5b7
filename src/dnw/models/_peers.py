"""Networks that the paper's ImageNet table compares with (Wortsman et al., 2019, table 3), from the libraries that keep them.

Contract: torchvision and timm are imported where a network is made (extra ``vision``); nothing of them is repeated here. For
small images the first convolution has no stride, and there is no pooling after it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dnw.models._library import library


def mobilenet_v2(num_classes: int = 1000, *, width: float = 1.0, image_stride: int = 2) -> nn.Module:
    """MobileNetV2 of torchvision; the last convolution has 1,280 channels at every width up to 1.

    Args:
        num_classes: of the classifier.
        width: multiplier of the number of channels.
        image_stride: of the first convolution: 2 for 224 px, 1 for 32 px.

    Raises:
        ImportError: torchvision is not installed (extra ``vision``).
    """
    model = library("torchvision.models").mobilenet_v2(num_classes=num_classes, width_mult=width)
    model.features[0][0].stride = (image_stride, image_stride)
    return _module(model)


def shufflenet_v2(num_classes: int = 1000, *, width: float = 1.0, image_stride: int = 2) -> nn.Module:
    """ShuffleNetV2 of torchvision; see :func:`mobilenet_v2`.

    Raises:
        ValueError: a width other than 0.5, 1, 1.5 and 2.
        ImportError: torchvision is not installed (extra ``vision``).
    """
    names = {0.5: "x0_5", 1.0: "x1_0", 1.5: "x1_5", 2.0: "x2_0"}
    if width not in names:
        raise ValueError(f"width={width}: a ShuffleNetV2 has one of the widths 0.5, 1, 1.5 and 2")
    model = getattr(library("torchvision.models"), f"shufflenet_v2_{names[width]}")(num_classes=num_classes)
    if image_stride == 1:
        model.conv1[0].stride, model.maxpool = (1, 1), nn.Identity()
    return _module(model)


def mnasnet_small(num_classes: int = 1000, *, image_stride: int = 2) -> nn.Module:
    """MnasNet-Small of timm, which is the published MnasNet-search1; see :func:`mobilenet_v2`.

    Raises:
        ImportError: timm is not installed (extra ``vision``).
    """
    model = library("timm").create_model("mnasnet_small", num_classes=num_classes)
    model.conv_stem.stride = (image_stride, image_stride)
    return _module(model)


def densenet_small(num_classes: int = 1000, *, width: float = 1.0, image_stride: int = 2) -> nn.Module:
    """A DenseNet of torchvision with the published multiply-adds, 142M at width 1 and 42M at 0.5; see :func:`mobilenet_v2`.

    How the published ones are built is not known. This one begins with a 3x3 convolution to 16 channels and has blocks of 2,
    8, 12 and 12 layers.

    Args:
        num_classes: of the classifier.
        width: multiplier of the growth, which is 12 channels a layer.
        image_stride: of the first convolution; with 1 there is no pooling after it either.

    Raises:
        ImportError: torchvision is not installed (extra ``vision``).
    """
    growth = max(1, round(12 * width))
    model = library("torchvision.models").DenseNet(growth, (2, 8, 12, 12), 16, num_classes=num_classes)
    model.features.conv0 = nn.Conv2d(3, 16, 3, stride=image_stride, padding=1, bias=False)
    nn.init.kaiming_normal_(model.features.conv0.weight)
    if image_stride == 1:
        model.features.pool0 = nn.Identity()
    return _module(model)


def _module(model: Any) -> nn.Module:
    assert isinstance(model, nn.Module)
    return model


def expander_edges(model: nn.Module, density: float, seed: int) -> dict[str, Tensor]:
    """The fixed edges of an expander network: in each 1x1 convolution every target reads as many sources, drawn at random.

    Deep expander networks (Prabhu et al., 2018) of factor 4 are those of density 1/4.

    Args:
        model: whose convolutions of one pixel, in one group.
        density: the fraction of its sources that a target reads, in (0, 1]; at least one.
        seed: of the drawing.

    Returns:
        A mask ``[targets, sources, 1, 1]`` by the name of each such weight, for :class:`dnw.Frozen`.

    Raises:
        ValueError: there are no such convolutions.
    """
    generator, found = torch.Generator().manual_seed(seed), dict[str, Tensor]()
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1:
            targets, sources = module.weight.shape[:2]
            rank = torch.rand(targets, sources, generator=generator).argsort(dim=1)
            mask = torch.zeros(targets, sources, dtype=torch.bool)
            mask.scatter_(1, rank[:, : max(1, round(density * sources))], True)
            found[f"{name}.weight"] = mask[:, :, None, None]
    if not found:
        raise ValueError(f"a {type(model).__name__} has no 1x1 convolutions, which an expander network makes sparse")
    return found
