"""Learning rates and momentum of each layer, learned through the steps that they make."""

import json
import sys

import higher
import torch
from torch import nn
from torch.nn import functional as F


def main():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    x, y = torch.randn(10, 4), torch.randn(10, 2)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    groups = [{"params": p, "lr": 0.05} for p in model.parameters()]
    opt = torch.optim.SGD(groups, lr=0.01, momentum=0.5)
    trainable = higher.optim.get_trainable_opt_params(opt)
    override = {"lr": trainable["lr"], "momentum": trainable["momentum"]}
    meta_opt = torch.optim.Adam(higher.utils.flatten(override), lr=1e-2)
    losses = []
    for _ in range(int(sys.argv[1])):
        with higher.innerloop_ctx(model, opt, override=override) as (fmodel, diffopt):
            for _ in range(5):
                diffopt.step(F.mse_loss(fmodel(x), y))
            loss = F.mse_loss(fmodel(x), y)
        meta_opt.zero_grad()
        loss.backward()
        meta_opt.step()
        losses.append(loss.item())
    higher.optim.apply_trainable_opt_params(opt, override)
    learned = [group[name] for group in opt.param_groups for name in ("lr", "momentum")]
    print(json.dumps([*losses, *learned]))


if __name__ == "__main__":
    main()
