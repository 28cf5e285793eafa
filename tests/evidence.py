"""Networks with everything that a criterion may look at, measured on random images."""

import torch

from se_prune.channels import couplings
from se_prune.gates.energies import collect_energies
from se_prune.gates.sites import find_sites
from se_prune.gates.statistics import collect
from se_prune.records import Preprocessing
from se_prune.scoring import Evidence
from tests.built import lively

CPU = torch.device("cpu")


class Tensors:
    """Float images as a split whose batches are as given."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.labels)

    def first(self, limit):
        """Return the first `limit` images, or all for None."""
        return Tensors(self.images[:limit], self.labels[:limit])

    def batches(self, batch_size, _=None):
        yield from zip(self.images.split(batch_size), self.labels.split(batch_size), strict=True)


def data(size, classes, n=14):
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(n, *size, generator=generator) * torch.linspace(0.3, 2, n).view(-1, 1, 1, 1)
    return Tensors(images, torch.arange(n) % classes)


def evidence(model, size, classes, split=None):
    """Measure a network on random images of its size."""
    split = split or data(size, classes)
    preprocessing = Preprocessing(input_size=size, mean=(0.0,) * size[0], std=(1.0,) * size[0])
    example = split.images[:1]
    sites = find_sites(model, example)
    names = [str(i) for i in range(classes)]
    return Evidence(
        model=model,
        example=example,
        sites=sites,
        couplings=couplings(model, example, sites),
        seed=0,
        device=CPU,
        statistics=collect(model, sites, split, preprocessing, classes=names, device=CPU),
        energies=collect_energies(model, split, preprocessing, classes=classes, device=CPU),
        batches=lambda limit: split.first(limit).batches(4),
    )


def measured(facts, change=None):
    torch.manual_seed(0)
    model = lively(facts.build(), facts.preprocessing)
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith(("reduce", "fc.0")):
                module.weight.abs_()  # no hidden unit is dead
        if change is not None:
            change(model)
    return evidence(model, facts.input_size, facts.classes)
