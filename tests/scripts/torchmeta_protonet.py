"""A prototypical network on Omniglot, in the style of torchmeta's documentation.

Prints the loss and the accuracy of each batch as JSON.
"""

import json
import random
import sys

import torch
from torch import nn
from torchmeta.datasets.helpers import omniglot
from torchmeta.utils.data import BatchMetaDataLoader
from torchmeta.utils.prototype import get_prototypes, prototypical_loss

folder, batches = sys.argv[1], int(sys.argv[2])
random.seed(1)
torch.manual_seed(1)
WAYS = 5

dataset = omniglot(folder, shots=1, ways=WAYS, test_shots=5, meta_val=True, seed=1, shuffle=True)
dataloader = BatchMetaDataLoader(dataset, batch_size=4, num_workers=0)


def block(inputs, outputs):
    return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]


model = nn.Sequential(*block(1, 16), *block(16, 16), *block(16, 16), *block(16, 16), nn.Flatten())
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
results = []
for batch, _ in zip(dataloader, range(batches), strict=False):
    train_inputs, train_targets = batch["train"]
    test_inputs, test_targets = batch["test"]
    train_embeddings = model(train_inputs.flatten(0, 1)).view(*train_inputs.shape[:2], -1)
    test_embeddings = model(test_inputs.flatten(0, 1)).view(*test_inputs.shape[:2], -1)
    prototypes = get_prototypes(train_embeddings, train_targets, WAYS)
    loss = prototypical_loss(prototypes, test_embeddings, test_targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        nearest = torch.cdist(test_embeddings, prototypes).argmin(-1)
        results.append([loss.item(), (nearest == test_targets).float().mean().item()])
print(json.dumps(results))
