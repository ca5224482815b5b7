"""ResNets of torchvision, changed as sparse training has them: a classifier without bias, He initialisation.

Contract: torchvision is imported where a network is made (extra ``vision``); nothing of it is repeated here.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from dnw.models._library import library


def resnet50(num_classes: int = 1000) -> nn.Module:
    """ResNet-50 v1.5 as in the paper's sparse training (Wortsman et al., 2019, section 4.4): for images of 224 pixels.

    Convolutions and the classifier, which has no bias, are initialised by He's normal rule with the fan-in.

    Raises:
        ImportError: torchvision is not installed (extra ``vision``).
    """
    return _prepared(library("torchvision.models").resnet50(num_classes=num_classes))


def resnet18_cifar(num_classes: int = 10) -> nn.Module:
    """ResNet-18 for images of 32 pixels: a 3x3 stem without stride, no pooling after it; otherwise as :func:`resnet50`."""
    model = library("torchvision.models").resnet18(num_classes=num_classes)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return _prepared(model)


def _prepared(model: Any) -> nn.Module:
    model.fc = nn.Linear(model.fc.in_features, model.fc.out_features, bias=False)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
    return model
