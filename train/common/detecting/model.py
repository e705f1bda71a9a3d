"""torchvision's Mask R-CNN, or Faster R-CNN without masks, on a dense backbone with a pyramid."""

from collections import OrderedDict

import torch
from timm.layers import LayerNorm2d
from torch import nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from ..dense.backbone import DenseBackbone, at_depth
from ..dense.pyramid import TAPS, Pyramid

Target = dict[str, torch.Tensor]  # boxes (n, 4) in pixels, labels (n,) from 1 on, masks (n, H, W)


class Detector(nn.Module):
    """In training `detector(images, targets, seeds)`: each loss summed over the images. Else `detector(images)`.

    Proposals and objects are sampled, and their losses averaged, image by image, by the image's own seed: so a batch's
    loss is a sum over its images, however they are dealt to processes and rounds.
    """

    def __init__(
        self,
        backbone: DenseBackbone,
        kind: str,
        classes: int,
        size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        with_masks: bool,
        channels: int = 256,
        samples: int = 512,
    ) -> None:
        """kind: of the pyramid. size: longest side of images that are not for training. mean, std: of the pixels.

        channels: of the levels and the mask head. samples: proposals of an image that the heads learn from.
        """
        super().__init__()
        self.name = "Mask R-CNN" if with_masks else "Faster R-CNN"
        self.rcnn = (MaskRCNN if with_masks else FasterRCNN)(
            Levels(backbone, kind, channels),
            num_classes=classes + 1,  # 0 is the background
            box_batch_size_per_image=samples,
        )
        self.rcnn.transform = Fitted(size, mean, std, 2 * backbone.patch)
        if with_masks and channels != 256:
            self.rcnn.roi_heads.mask_head = MaskRCNNHeads(channels, [channels] * 4, dilation=1)
            self.rcnn.roi_heads.mask_predictor = MaskRCNNPredictor(channels, channels, classes + 1)

    def forward(
        self, images: torch.Tensor, targets: list[Target] | None = None, seeds: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor] | list[Target]:
        """images uint8: (B, 3, S, S) in training, else a list of (3, H, W). Returns a number () for each loss, or for
        each image its boxes (n, 4), labels (n,) from 1 on, scores (n,) and masks (n, 1, H, W), shares of 1."""
        images = [image.float() / 255 for image in images]
        if not self.training:
            return self.rcnn(images)
        pixels = torch.stack([self.rcnn.transform.normalize(image) for image in images])
        levels = self.rcnn.backbone(pixels)
        sums: dict[str, torch.Tensor] = {}
        for index, (target, seed) in enumerate(zip(targets, seeds.tolist(), strict=True)):
            torch.manual_seed(seed)
            for name, loss in self._losses(pixels, levels, index, target).items():
                sums[name.removeprefix("loss_")] = sums.get(name.removeprefix("loss_"), 0.0) + loss.float()
        return sums

    def _losses(
        self, pixels: torch.Tensor, levels: dict[str, torch.Tensor], index: int, target: Target
    ) -> dict[str, torch.Tensor]:
        """Of one image of the batch."""
        size = tuple(pixels.shape[-2:])
        image = ImageList(pixels[index : index + 1], [size])
        own = OrderedDict((name, level[index : index + 1]) for name, level in levels.items())
        proposals, of_proposals = self.rcnn.rpn(image, own, [target])
        _, of_objects = self.rcnn.roi_heads(own, proposals, [size], [target])
        return {**of_proposals, **of_objects}


class Fitted(GeneralizedRCNNTransform):
    """torchvision's, which makes an image's longest side `size`, also of images that get thinner than a pixel.

    Its sides are multiples of 2 · patch, so that the smallest level is whole.
    """

    def __init__(self, size: int, mean: tuple[float, ...], std: tuple[float, ...], unit: int) -> None:
        super().__init__(size, size, list(mean), list(std), size_divisible=unit)

    def resize(self, image: torch.Tensor, target: Target | None = None) -> tuple[torch.Tensor, Target | None]:
        """image (3, h, w), without a target."""
        longest = max(image.shape[1:])
        if min(image.shape[1:]) * self.max_size >= 2 * longest:
            return super().resize(image, target)
        size = [self.max_size if side == longest else 1 for side in image.shape[1:]]
        return nn.functional.interpolate(image[None], size, mode="bilinear", align_corners=False)[0], target


class Levels(nn.Module):
    """Images (B, 3, H, W) → five levels by name; strides 4, 8, 16, 32, 64 for patches of 16."""

    def __init__(self, backbone: DenseBackbone, kind: str, channels: int) -> None:
        super().__init__()
        self.backbone, self.out_channels = backbone, channels
        taps = [at_depth(share, len(backbone.vit.blocks)) for share in TAPS[kind]]
        self.pyramid = Pyramid(backbone.dim, taps)
        if kind == "dseq":  # maps of several depths: each level takes in the coarser ones
            self.neck = FeaturePyramidNetwork(self.pyramid.channels, channels, LastLevelMaxPool(), LayerNorm2d)
        else:
            self.neck = Apart(self.pyramid.channels, channels)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        levels = self.pyramid(self.backbone(images))
        return self.neck(OrderedDict((str(number), level) for number, level in enumerate(levels)))


class Apart(nn.Module):
    """ViTDet's way: two normed convolutions for each level, which come from one map and need not be joined."""

    def __init__(self, dims: list[int], channels: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Sequential(
                *(nn.Conv2d(dim, channels, 1, bias=False), LayerNorm2d(channels)),
                *(nn.Conv2d(channels, channels, 3, padding=1, bias=False), LayerNorm2d(channels)),
            )
            for dim in dims
        )
        self.last = LastLevelMaxPool()

    def forward(self, levels: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        maps = [conv(level) for conv, level in zip(self.convs, levels.values(), strict=True)]
        maps, names = self.last(maps, [], [*levels])
        return OrderedDict(zip(names, maps, strict=True))
