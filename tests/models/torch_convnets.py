"""VGG and MobileNetV2 with the module structure, and so the names, that torchvision's have."""

from torch import nn


class VGGModel(nn.Module):
    """`layers` as in torchvision's `cfgs`; without `hidden` the classifier is one linear layer."""

    def __init__(self, layers, hidden=(), pool_size=1, classes=10, channels=3):
        super().__init__()
        features, width = [], channels
        for layer in layers:
            if layer == "M":
                features.append(nn.MaxPool2d(kernel_size=2, stride=2))
                continue
            conv = nn.Conv2d(width, layer, kernel_size=3, padding=1)
            features += [conv, nn.BatchNorm2d(layer), nn.ReLU(inplace=True)]
            width = layer
        self.features = nn.Sequential(*features)
        self.avgpool = nn.AdaptiveAvgPool2d(pool_size)
        width *= pool_size**2
        steps = []
        for units in hidden:
            steps += [nn.Linear(width, units), nn.ReLU(True), nn.Dropout()]
            width = units
        last = nn.Linear(width, classes)
        self.classifier = nn.Sequential(*steps, last) if hidden else last

    def forward(self, x):
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def _conv_norm(width_in, width, size=3, stride=1, groups=1):
    return nn.Sequential(
        nn.Conv2d(width_in, width, size, stride, (size - 1) // 2, groups=groups, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU6(inplace=True),
    )


class _InvertedResidual(nn.Module):
    def __init__(self, width_in, expanded, width, stride, residual):
        super().__init__()
        steps, channels = [], width_in
        if expanded:
            steps, channels = [_conv_norm(width_in, expanded, size=1)], expanded
        self.conv = nn.Sequential(
            *steps,
            _conv_norm(channels, channels, stride=stride, groups=channels),
            nn.Conv2d(channels, width, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.residual = residual

    def forward(self, x):
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetModel(nn.Module):
    """MobileNetV2, its blocks given as `(expanded, width, stride, residual)`."""

    def __init__(self, blocks, stem=8, stem_stride=1, last=24, classes=10, channels=3):
        super().__init__()
        steps, width = [_conv_norm(channels, stem, stride=stem_stride)], stem
        for block in blocks:
            steps.append(_InvertedResidual(width, *block))
            width = block[1]
        self.features = nn.Sequential(*steps, _conv_norm(width, last, size=1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, classes))

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))
