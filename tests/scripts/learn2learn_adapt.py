"""MAML, ANIL, Meta-SGD and Meta-Curvature on Omniglot's benchmark, in the style of learn2learn's documentation.

Prints the meta-training loss and accuracy of each iteration, and those of a meta-test, as JSON.
"""

import json
import random
import sys

import learn2learn as l2l
import numpy as np
import torch
from learn2learn.optim.transforms import MetaCurvatureTransform
from torch import nn, optim


def fast_adapt(batch, features, learner, loss, steps, shots, ways):
    data, labels = batch
    data = features(data)
    adaptation_indices = np.zeros(data.size(0), dtype=bool)
    adaptation_indices[np.arange(shots * ways) * 2] = True
    evaluation_indices = torch.from_numpy(~adaptation_indices)
    adaptation_indices = torch.from_numpy(adaptation_indices)
    for _ in range(steps):
        learner.adapt(loss(learner(data[adaptation_indices]), labels[adaptation_indices]))
    predictions = learner(data[evaluation_indices])
    return loss(predictions, labels[evaluation_indices]), l2l.utils.accuracy(
        predictions, labels[evaluation_indices]
    )


def load(root, ways=5, shots=1):
    random.seed(42)
    return l2l.vision.benchmarks.get_tasksets(
        "omniglot",
        train_ways=ways,
        train_samples=2 * shots,
        test_ways=ways,
        test_samples=2 * shots,
        num_tasks=2000,
        root=root,
    )


def main(method, tasksets, iterations, ways=5, shots=1, tasks=4):
    np.random.seed(42)
    torch.manual_seed(42)
    features = nn.Identity()
    if method == "maml":
        learner = l2l.algorithms.MAML(l2l.vision.models.OmniglotFC(28**2, ways), lr=0.5, first_order=False)
    elif method == "metasgd":
        learner = l2l.algorithms.MetaSGD(l2l.vision.models.OmniglotFC(28**2, ways, sizes=[64, 64]), lr=0.4)
    elif method == "gbml":
        model = l2l.vision.models.OmniglotFC(28**2, ways, sizes=[32])
        learner = l2l.algorithms.GBML(model, transform=MetaCurvatureTransform, lr=0.5)
    else:
        features = nn.Sequential(l2l.nn.Flatten(), nn.Linear(28**2, 64), nn.ReLU())
        learner = l2l.algorithms.MAML(nn.Linear(64, ways), lr=0.3)
    parameters = [*features.parameters(), *learner.parameters()]
    optimizer = optim.Adam(parameters, 0.003)
    loss = nn.CrossEntropyLoss(reduction="mean")
    results = []
    for _ in range(iterations):
        optimizer.zero_grad()
        total = [0.0, 0.0]
        for _ in range(tasks):
            error, accuracy = fast_adapt(
                tasksets.train.sample(), features, learner.clone(), loss, 1, shots, ways
            )
            error.backward()
            total[0] += error.item() / tasks
            total[1] += accuracy.item() / tasks
        for p in parameters:
            p.grad.data.mul_(1.0 / tasks)
        optimizer.step()
        results.append(total)
    error, accuracy = fast_adapt(tasksets.test.sample(), features, learner.clone(), loss, 1, shots, ways)
    return [*results, [error.item(), accuracy.item()]]


if __name__ == "__main__":
    benchmark = load(sys.argv[1])
    print(json.dumps([main(method, benchmark, int(sys.argv[2])) for method in sys.argv[3:]]))
