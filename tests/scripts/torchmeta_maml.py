"""MAML on Omniglot, in the style of torchmeta's documentation.

Prints the outer loss of each batch as JSON.
"""

import json
import random
import sys

import torch
import torch.nn.functional as F
from torch import nn
from torchmeta.datasets import Omniglot
from torchmeta.modules import MetaConv2d, MetaLinear, MetaModule, MetaSequential
from torchmeta.transforms import Categorical, ClassSplitter, Rotation
from torchmeta.utils.data import BatchMetaDataLoader
from torchmeta.utils.gradient_based import gradient_update_parameters

folder, batches = sys.argv[1], int(sys.argv[2])
random.seed(1)
torch.manual_seed(1)
WAYS = 5


class Network(MetaModule):
    def __init__(self):
        super().__init__()
        self.features = MetaSequential(
            MetaConv2d(1, 8, 5, stride=4), nn.ReLU(), MetaConv2d(8, 8, 5, stride=4), nn.ReLU(), nn.Flatten()
        )
        self.classifier = MetaLinear(8 * 6 * 6, WAYS)

    def forward(self, inputs, params=None):
        features = self.features(inputs, params=self.get_subdict(params, "features"))
        return self.classifier(features, params=self.get_subdict(params, "classifier"))


def to_tensor(image):
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(1, 105, 105).float() / 255


dataset = Omniglot(
    folder,
    num_classes_per_task=WAYS,
    meta_val=True,
    transform=to_tensor,
    target_transform=Categorical(num_classes=WAYS),
    class_augmentations=[Rotation([90, 180, 270])],
)
dataset = ClassSplitter(dataset, shuffle=True, num_train_per_class=2, num_test_per_class=3)
model = Network()
optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
results = []
for batch, _ in zip(BatchMetaDataLoader(dataset, batch_size=4), range(batches), strict=False):
    outer = torch.tensor(0.0)
    tasks = zip(*batch["train"], *batch["test"], strict=True)
    for train_inputs, train_targets, test_inputs, test_targets in tasks:
        inner = F.cross_entropy(model(train_inputs), train_targets)
        model.zero_grad()
        params = gradient_update_parameters(model, inner, step_size=0.3)
        outer = outer + F.cross_entropy(model(test_inputs, params=params), test_targets) / 4
    optimizer.zero_grad()
    outer.backward()
    optimizer.step()
    results.append(outer.item())
print(json.dumps(results))
