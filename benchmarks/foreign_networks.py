"""Networks that nobody here wrote, through the compiler: python benchmarks/foreign_networks.py

Prints a table as Markdown: of networks of torchvision, timm and transformers, whichever are installed, with 90 % of their
weights 0 and some channels dead: how many channels stay, which operators PyTorch runs, how far outputs are from the network's.
"""

from __future__ import annotations

import argparse
import warnings
from collections import Counter
from collections.abc import Callable

import torch
from _torchvision import models
from torch import Tensor, nn

import dnw.compile

Made = tuple[nn.Module, Tensor]
TORCHVISION = """resnet18:64 resnet50:64 resnext50_32x4d:64 wide_resnet50_2:64 vgg11_bn:64 densenet121:64 googlenet:64
squeezenet1_1:64 mobilenet_v2:64 mobilenet_v3_small:64 mobilenet_v3_large:64 shufflenet_v2_x1_0:64 mnasnet1_0:64
efficientnet_b0:64 regnet_y_400mf:64 convnext_tiny:64 vit_b_16:224 swin_t:224"""
TIMM = """resnet18:64 resnet50:64 mobilenetv3_small_100:64 efficientnet_b0:64 tf_efficientnet_b0:64 regnety_002:64
convnext_atto:64 vit_tiny_patch16_224:224 deit_tiny_patch16_224:224 swin_tiny_patch4_window7_224:224 mixer_s32_224:224
poolformer_s12:64 ghostnet_100:64 res2net50_14w_8s:64 dpn68:64"""


def made() -> dict[str, Callable[[], Made]]:
    """Each network and an input of two images, by name."""
    found: dict[str, Callable[[], Made]] = {}

    def images(make: Callable[[], nn.Module], side: str) -> Callable[[], Made]:
        return lambda: (make(), torch.randn(2, 3, int(side), int(side)))

    for name, side in (entry.split(":") for entry in TORCHVISION.split()):
        found[f"torchvision {name}"] = images(lambda name=name: getattr(models(), name)(weights=None), side)  # type: ignore[misc]
    try:
        models()
        import timm
    except ImportError:
        pass
    else:
        for name, side in (entry.split(":") for entry in TIMM.split()):
            found[f"timm {name}"] = images(lambda name=name: timm.create_model(name), side)  # type: ignore[misc]
    try:
        import transformers
    except ImportError:
        return found | {"torch LSTM": _recurrent}
    words = torch.randint(100, (2, 32))
    bert = transformers.BertConfig(
        hidden_size=96, num_hidden_layers=3, num_attention_heads=4, intermediate_size=192, vocab_size=100
    )
    gpt = transformers.GPT2Config(n_embd=96, n_layer=3, n_head=4, vocab_size=100, n_positions=64, use_cache=False)
    found["transformers BERT, small"] = lambda: (transformers.BertModel(bert), words)
    found["transformers GPT-2, small"] = lambda: (transformers.GPT2LMHeadModel(gpt), words)
    return found | {"torch LSTM": _recurrent}


class Recurrent(nn.Module):
    """A classifier of sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(16, 64, batch_first=True), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(x)[0][:, -1])


def _recurrent() -> Made:
    return Recurrent(), torch.randn(2, 20, 16)


def sparse(model: nn.Module, zeros: float = 0.9, dead: float = 0.1) -> nn.Module:
    """With few weights, norms that are nothing special, and some channels that their norms switch off; in eval mode."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            weight = getattr(module, "weight", None)
            if isinstance(module, (nn.Conv2d, nn.Linear)) or type(module).__name__ == "Conv1D":
                kept = torch.rand(weight.shape, generator=generator) >= zeros
                scale = (1.5 / max(1.0, weight[0].numel() * (1 - zeros))) ** 0.5
                weight.copy_(torch.randn(weight.shape, generator=generator) * kept * scale)
            elif isinstance(module, nn.BatchNorm2d):
                weight.uniform_(0.5, 1.5, generator=generator)
                weight[torch.rand(weight.shape, generator=generator) < dead] = 0
                module.bias.normal_(0, 0.3, generator=generator)
                module.running_mean.normal_(0, 0.2, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def row(name: str, make: Callable[[], Made]) -> str:
    """One network."""
    torch.manual_seed(0)
    model, example = make()
    size = "x".join(map(str, example.shape[1:]))
    try:
        report = dnw.compile.compile(sparse(model), example).report
    except (ValueError, RuntimeError) as error:
        return f"| {name} | {size} | refused: {str(error).splitlines()[0]} | | | |"
    foreign = ", ".join(f"`{kind}` ({count})" for kind, count in Counter(row.kind for row in report.way("PyTorch")).items())
    before, after = report.channels
    layers = f"{len(report.way('sparse'))}, {len(report.way('dense')) + len(report.way('apart'))}"
    return f"| {name} | {size} | {after / before:.0%} | {layers} | {foreign or '-'} | {report.error:.0e} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="only networks with one of these in their names")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    print("| network | input | channels that stay | layers sparse, dense | in PyTorch | error |\n|---|---|---|---|---|---|")
    for name, make in made().items():
        if not arguments.names or any(part in name for part in arguments.names):
            print(row(name, make), flush=True)


if __name__ == "__main__":
    main()
