"""Networks whose output is as large as their input, or has several parts: segmentation, detection, images."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.graph.families.convolutional import conv_bn
from tests.graph.families.family import Family, images


class UNet(nn.Module):
    """Encoder and decoder with skips, transposed convolutions, padding to the skip's size."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = conv_bn(3, 8), conv_bn(8, 16), conv_bn(16, 16)
        self.up2, self.up1 = nn.ConvTranspose2d(16, 16, 2, 2), nn.ConvTranspose2d(16, 8, 2, 2)
        self.merge2, self.merge1 = conv_bn(32, 16), conv_bn(16, 8)
        self.out = nn.Conv2d(8, 2, 1)

    @staticmethod
    def join(skip: Tensor, x: Tensor) -> Tensor:
        rows, columns = skip.size(2) - x.size(2), skip.size(3) - x.size(3)
        x = F.pad(x, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])
        return torch.cat([skip, x], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        c = self.bottom(F.max_pool2d(b, 2))
        b = self.merge2(self.join(b, self.up2(c)))
        return self.out(self.merge1(self.join(a, self.up1(b))))


class Segmenter(nn.Module):
    """Dilated convolutions side by side (ASPP), bilinear upsampling to the size of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8, stride=2)
        self.rates = nn.ModuleList([nn.Conv2d(8, 4, 3, padding=r, dilation=r) for r in (1, 2, 3)])
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1), nn.ReLU())
        self.project = conv_bn(16, 8, 1)
        self.classify = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.stem(x)
        pooled = F.interpolate(self.pool(y), size=y.shape[-2:], mode="bilinear", align_corners=False)
        y = self.project(torch.cat([*(F.relu(conv(y)) for conv in self.rates), pooled], dim=1))
        return {"out": F.interpolate(self.classify(y), size=x.shape[-2:], mode="bilinear", align_corners=False)}


class Detector(nn.Module):
    """A feature pyramid, heads shared by its levels, anchors as a buffer, boxes decoded: several outputs."""

    anchors: Tensor

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.stage1, self.stage2 = conv_bn(3, 8, stride=2), conv_bn(8, 16, stride=2)
        self.lateral1, self.lateral2 = nn.Conv2d(8, 8, 1), nn.Conv2d(16, 8, 1)
        self.classify = nn.Sequential(conv_bn(8, 8), nn.Conv2d(8, classes, 1))
        self.regress = nn.Sequential(conv_bn(8, 8), nn.Conv2d(8, 4, 1))
        self.classes = classes
        self.register_buffer("anchors", torch.rand(80, 4) + 0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        fine = self.stage1(x)
        coarse = self.stage2(fine)
        p2 = self.lateral2(coarse)
        p1 = self.lateral1(fine) + F.interpolate(p2, scale_factor=2.0, mode="nearest")
        scores, offsets = [], []
        for level in (p1, p2):
            scores.append(self.classify(level).permute(0, 2, 3, 1).reshape(x.shape[0], -1, self.classes))
            offsets.append(self.regress(level).permute(0, 2, 3, 1).reshape(x.shape[0], -1, 4))
        delta = torch.cat(offsets, 1)
        centre = self.anchors[:, :2] + delta[..., :2] * self.anchors[:, 2:]
        size = self.anchors[:, 2:] * torch.exp(delta[..., 2:].clamp(max=2.0))
        boxes = torch.cat([centre - size / 2, centre + size / 2], dim=-1)
        return torch.sigmoid(torch.cat(scores, 1)), boxes, [p1, p2]


class TimeBlock(nn.Module):
    """GroupNorm, SiLU, convolution, with the time embedding added in the middle."""

    def __init__(self, inputs: int, outputs: int, time: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time = nn.Linear(time, outputs)
        self.norm2, self.conv2 = nn.GroupNorm(4, outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = y + self.time(F.silu(time))[:, :, None, None]
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class DiffusionUNet(nn.Module):
    """Noise and a time step in, noise out: sinusoidal embedding, attention at the bottom, nearest upsampling."""

    def __init__(self, width: int = 8, time: int = 16) -> None:
        super().__init__()
        self.width = width
        self.time = nn.Sequential(nn.Linear(width, time), nn.SiLU(), nn.Linear(time, time))
        self.conv_in = nn.Conv2d(3, width, 3, padding=1)
        self.down = TimeBlock(width, 2 * width, time)
        self.middle = TimeBlock(2 * width, 2 * width, time)
        self.qkv, self.project = nn.Conv2d(2 * width, 6 * width, 1), nn.Conv2d(2 * width, 2 * width, 1)
        self.up = TimeBlock(4 * width, width, time)
        self.out = nn.Sequential(nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, 3, 3, padding=1))

    def embed(self, step: Tensor) -> Tensor:
        half = self.width // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=step.device) / half)
        angles = step.float()[:, None] * frequencies[None]
        return self.time(torch.cat([angles.sin(), angles.cos()], dim=-1))

    def attend(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = self.qkv(x).reshape(b, 3, c, h * w).unbind(1)
        scores = torch.einsum("bci,bcj->bij", q, k) / math.sqrt(c)
        y = torch.einsum("bij,bcj->bci", scores.softmax(dim=-1), v)
        return x + self.project(y.reshape(b, c, h, w))

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        time = self.embed(step)
        a = self.down(self.conv_in(x), time)
        b = self.attend(self.middle(F.avg_pool2d(a, 2), time))
        b = F.interpolate(b, scale_factor=2, mode="nearest")
        return self.out(self.up(torch.cat([a, b], 1), time))


class SuperResolution(nn.Module):
    """PixelShuffle, PReLU, a global skip with bicubic upsampling, the result clamped."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 5, padding=2), nn.PReLU(), nn.Conv2d(8, 12, 3, padding=1))
        self.shuffle = nn.PixelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.shuffle(self.body(x))
        return torch.clamp(y + F.interpolate(x, scale_factor=2.0, mode="bicubic", align_corners=False), -1.0, 1.0)


class SpatialTransformer(nn.Module):
    """An affine transform found from the image, then grid_sample."""

    def __init__(self) -> None:
        super().__init__()
        self.localise = nn.Sequential(conv_bn(3, 4, stride=4), nn.Flatten(), nn.Linear(64, 6))
        self.classify = nn.Sequential(conv_bn(3, 4, stride=4), nn.Flatten(), nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        theta = self.localise(x).view(-1, 2, 3).tanh()
        grid = F.affine_grid(theta, list(x.size()), align_corners=False)
        return self.classify(F.grid_sample(x, grid, align_corners=False))


def smooth(x: Tensor) -> Tensor:
    """Images without sharp edges, four times as large: a small shift of a sample changes little."""
    return F.interpolate(x, scale_factor=4, mode="bicubic")


FAMILIES = [
    Family("U-Net", "dense prediction", UNet, images(3, 18, 18)),
    Family("Segmentation head (ASPP)", "dense prediction", Segmenter, images(3, 16, 16)),
    Family("Detector with pyramid and heads", "dense prediction", Detector, images(3, 16, 16)),
    Family(
        "Diffusion U-Net with time embedding",
        "dense prediction",
        DiffusionUNet,
        lambda n: (torch.randn(n, 3, 8, 8), torch.randint(0, 1000, (n,))),
    ),
    Family("Super-resolution", "dense prediction", SuperResolution, images(3, 8, 8)),
    Family("Spatial transformer", "dense prediction", SpatialTransformer, lambda n: smooth(torch.randn(n, 3, 4, 4))),
]
