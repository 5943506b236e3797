"""Episodic training of a prototypical network, in the style of easyfsl's documentation.

Prints the accuracy before and after, and the losses, as JSON.
"""

import json
import random
import sys

import torch
from easyfsl.datasets import FewShotDataset
from easyfsl.methods import FewShotClassifier, PrototypicalNetworks
from easyfsl.samplers import TaskSampler
from easyfsl.utils import evaluate, sliding_average
from torch import nn
from torch.utils.data import DataLoader

path, steps = sys.argv[1], int(sys.argv[2])
random.seed(0)
torch.manual_seed(0)
N_WAY, N_SHOT, N_QUERY, DEVICE = 5, 1, 5, "cpu"


class Characters(FewShotDataset):
    def __init__(self, images: torch.Tensor) -> None:
        self.images = images.flatten(0, 1)
        self.labels = [k for k, own in enumerate(images) for _ in own]

    def __getitem__(self, item: int) -> tuple[torch.Tensor, int]:
        return self.images[item], self.labels[item]

    def __len__(self) -> int:
        return len(self.images)

    def get_labels(self) -> list[int]:
        return self.labels


def loader(images: torch.Tensor, n_tasks: int) -> DataLoader:
    dataset = Characters(images)
    sampler = TaskSampler(dataset, n_way=N_WAY, n_shot=N_SHOT, n_query=N_QUERY, n_tasks=n_tasks)
    return DataLoader(dataset, batch_sampler=sampler, num_workers=0, collate_fn=sampler.episodic_collate_fn)


def block(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)
    )


data = torch.load(path)
train_loader, test_loader = loader(data["train"], steps), loader(data["test"], 30)
backbone = nn.Sequential(block(1, 16), block(16, 16), block(16, 16), nn.Flatten())
model: FewShotClassifier = PrototypicalNetworks(backbone).to(DEVICE)
criterion = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=0.003)

before = evaluate(model, test_loader, device=DEVICE, use_tqdm=False)
model.train()
losses: list[float] = []
for support_images, support_labels, query_images, query_labels, _ in train_loader:
    optimizer.zero_grad()
    model.process_support_set(support_images.to(DEVICE), support_labels.to(DEVICE))
    loss = criterion(model(query_images.to(DEVICE)), query_labels.to(DEVICE))
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
    sliding_average(losses, 10)
after = evaluate(model, test_loader, device=DEVICE, tqdm_prefix="Validation")
print(json.dumps([before, after, losses]))
