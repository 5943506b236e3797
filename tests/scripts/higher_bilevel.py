"""A bilevel problem: weights of the training rows, some of which are mislabelled, learned on clean rows."""

import json
import sys

import higher
import torch
from higher.patch import monkeypatch
from torch import nn
from torch.nn import functional as F


def main():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    x, clean_x = torch.randn(12, 4), torch.randn(12, 4)
    y, clean_y = (x.sum(1) > 0).long(), (clean_x.sum(1) > 0).long()
    y[:4] = 1 - y[:4]
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    weights = torch.zeros(12, requires_grad=True)
    outer = torch.optim.SGD([weights], lr=1.0)
    losses = []
    for _ in range(int(sys.argv[1])):
        fmodel = monkeypatch(model)
        diffopt = higher.create_diff_optim(torch.optim.Adam, {"lr": 0.1}, fmodel=fmodel)
        for _ in range(4):
            each = F.cross_entropy(fmodel(x), y, reduction="none")
            diffopt.step((weights.sigmoid() * each).mean())
        loss = F.cross_entropy(fmodel(clean_x), clean_y)
        outer.zero_grad()
        loss.backward()
        outer.step()
        losses.append(loss.item())
    assert all(p.grad is None for p in model.parameters())
    print(json.dumps([*losses, *weights.tolist()]))


if __name__ == "__main__":
    main()
