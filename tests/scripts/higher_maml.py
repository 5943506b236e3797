"""MAML as with higher: ``higher_maml.py STEPS [images.pt]``; images are ``[classes, rows, 1, h, w]``."""

import json
import sys

import higher
import torch
from torch import nn
from torch.nn import functional as F


def task(images, ways=5):
    chosen = images[torch.randperm(len(images))[:ways]]
    labels = torch.arange(ways)
    return chosen[:, 0], labels, chosen[:, 1:4].flatten(0, 1), labels.repeat_interleave(3)


def main():
    torch.manual_seed(0)
    images = torch.load(sys.argv[2]).double() if len(sys.argv) > 2 else torch.rand(12, 4, 1, 8, 8).double()
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.BatchNorm2d(8, momentum=1, affine=True),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.LazyLinear(5),
    ).double()
    net(images[:, 0])
    meta_opt = torch.optim.Adam(net.parameters(), lr=1e-3)
    losses = []
    for _ in range(int(sys.argv[1])):
        net.train()
        inner_opt = torch.optim.SGD(net.parameters(), lr=1e-1)
        meta_opt.zero_grad()
        for _ in range(2):
            x_spt, y_spt, x_qry, y_qry = task(images)
            with higher.innerloop_ctx(net, inner_opt, copy_initial_weights=False) as (fnet, diffopt):
                for _ in range(3):
                    diffopt.step(F.cross_entropy(fnet(x_spt), y_spt))
                qry_loss = F.cross_entropy(fnet(x_qry), y_qry)
                losses.append(qry_loss.item())
                qry_loss.backward()
        meta_opt.step()

    net.train()
    x_spt, y_spt, x_qry, y_qry = task(images)
    with higher.innerloop_ctx(net, inner_opt, track_higher_grads=False) as (fnet, diffopt):
        for _ in range(3):
            diffopt.step(F.cross_entropy(fnet(x_spt), y_spt))
        losses.append(F.cross_entropy(fnet(x_qry).detach(), y_qry).item())
    print(json.dumps(losses))


if __name__ == "__main__":
    main()
