"""A prototypical network on Omniglot, in the style of learn2learn's documentation.

Prints the loss and the accuracy of each step as JSON.
"""

import json
import random
import sys

import learn2learn as l2l
import torch
from learn2learn.data.transforms import ConsecutiveLabels, KShots, LoadData, NWays, RemapLabels
from torch.nn.functional import cross_entropy

root, steps = sys.argv[1], int(sys.argv[2])
random.seed(1)
torch.manual_seed(1)
WAYS, SHOTS, QUERIES = 5, 1, 5

images, labels = torch.load(root)
dataset = l2l.data.MetaDataset(torch.utils.data.TensorDataset(images, labels))
transforms = [
    NWays(dataset, WAYS),
    KShots(dataset, SHOTS + QUERIES),
    LoadData(dataset),
    RemapLabels(dataset),
    ConsecutiveLabels(dataset),
]
tasks = l2l.data.TaskDataset(dataset, task_transforms=transforms, num_tasks=200)

model = l2l.vision.models.CNN4Backbone(hidden_size=16, channels=1, layers=4)
head = l2l.nn.PrototypicalClassifier()
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
results = []
for _ in range(steps):
    data, targets = tasks.sample()
    (support, support_labels), (query, query_labels) = l2l.data.partition_task(data, targets, shots=SHOTS)
    embeddings = model(torch.cat([support, query]))
    head.fit_(embeddings[: len(support)], support_labels)
    logits = head(embeddings[len(support) :])
    loss = cross_entropy(logits, query_labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    results.append([loss.item(), l2l.utils.accuracy(logits, query_labels).item()])
print(json.dumps(results))
