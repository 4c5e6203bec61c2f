"""The backbone: torchvision's ResNet-18 without its last stage."""

from torch import Tensor, nn
from torchvision.models import resnet18


class ResNet18(nn.Module):
    """`[N, 3, H, W]`, normalised RGB -> `[N, 256, H // 16, W // 16]`.

    Args:
        weights: a name of torchvision's, such as IMAGENET1K_V1; None initialises randomly.
    """

    stride = 16
    out_channels = 256
    mean = (0.485, 0.456, 0.406)  # of RGB in [0, 1]
    std = (0.229, 0.224, 0.225)

    def __init__(self, weights: str | None = None):
        super().__init__()
        whole = resnet18(weights=weights)
        self.layers = nn.Sequential(whole.conv1, whole.bn1, whole.relu, whole.maxpool, whole.layer1, whole.layer2, whole.layer3)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)
