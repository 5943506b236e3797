"""Classical training, then several methods on the features, in the style of easyfsl's documentation.

Prints the losses and the accuracy of each method as JSON.
"""

import json
import random
import sys

import torch
from easyfsl.datasets import FeaturesDataset
from easyfsl.methods import (
    BDCSPN,
    PTMAP,
    TIM,
    Finetune,
    LaplacianShot,
    PrototypicalNetworks,
    SimpleShot,
    TransductiveFinetuning,
)
from easyfsl.modules import resnet10
from easyfsl.samplers import TaskSampler
from easyfsl.utils import compute_average_features_from_images, evaluate
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

path, steps = sys.argv[1], int(sys.argv[2])
random.seed(0)
torch.manual_seed(0)

data = torch.load(path)
classes = 40
images = data["train"][:classes].flatten(0, 1).expand(-1, 3, -1, -1)[..., ::2, ::2]
labels = torch.arange(classes).repeat_interleave(20)
train_loader = DataLoader(TensorDataset(images, labels), batch_size=40, shuffle=True)

model = resnet10(planes=[8, 16, 16, 32], use_fc=True, num_classes=classes)
criterion = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
losses: list[float] = []
while len(losses) < steps:
    for batch, targets in train_loader:
        optimizer.zero_grad()
        loss = criterion(model(batch), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

model.set_use_fc(False)
model.eval()
average_features = compute_average_features_from_images(train_loader, model)
with torch.no_grad():
    embeddings = {
        f"character {k}": model(own.expand(-1, 3, -1, -1)[..., ::2, ::2]).numpy()
        for k, own in enumerate(data["test"])
    }
dataset = FeaturesDataset.from_dict(embeddings)
sampler = TaskSampler(dataset, n_way=5, n_shot=5, n_query=10, n_tasks=10)
test_loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=sampler.episodic_collate_fn)
centred = {"feature_centering": average_features, "feature_normalization": 2.0}
accuracies = {}
for method in (
    PrototypicalNetworks,
    SimpleShot,
    Finetune,
    BDCSPN,
    LaplacianShot,
    PTMAP,
    TIM,
    TransductiveFinetuning,
):
    few_shot_classifier = method(nn.Identity(), **centred)
    accuracies[method.__name__] = evaluate(few_shot_classifier, test_loader, device="cpu", use_tqdm=False)
print(json.dumps([losses, accuracies]))
