"""A network for some of its classes: the same outputs, and the images of those classes alone.

Shapes: N images, K classes of the network.
"""

import copy

import pytest
import torch
from torch import nn

from se_prune import artifact
from se_prune.checkpoint import open_model
from se_prune.data import open_data
from se_prune.data.source import ClassSplit, of_classes
from se_prune.errors import DataError, SurgeryError, UsageError
from se_prune.pipeline import for_classes, like, matching
from se_prune.pipeline.classes import keep_outputs
from se_prune.records import Preprocessing
from se_prune.settings import TrainSettings
from tests.built import lively
from tests.nets import ALL

NAMES = ("Sneaker", "Bag", "Trouser")
INDICES = [1, 7, 8]


@pytest.fixture(scope="module")
def data():
    return open_data("fashion-mnist")


@pytest.fixture
def network():
    return open_model("zoo:se_resnet20", pretrained=True)


def images(n=4):
    return torch.randn(n, 1, 28, 28, generator=torch.Generator().manual_seed(1))


def test_the_outputs_of_some_classes_are_those_of_the_whole(network, data, tmp_path):
    before = copy.deepcopy(network.module.state_dict())
    small, part = for_classes(network, data, NAMES)
    assert small.header.classes == part.classes == ("trouser", "sneaker", "bag")
    with torch.no_grad():
        wanted, got = network.module(images()), small.module(images())
    assert got.shape == (4, 3)
    torch.testing.assert_close(got, wanted[:, INDICES], rtol=0, atol=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in network.module.state_dict().items())
    artifact.save(tmp_path / "three.safetensors", small)
    again = artifact.load(tmp_path / "three.safetensors")
    with torch.no_grad():
        assert torch.equal(again.module(images()), got)
    assert again.header.history[-1].details == {"kept": ["trouser", "sneaker", "bag"], "of": 10}


def test_only_images_of_those_classes_are_left_and_numbered_anew(network, data):
    _, part = for_classes(network, data, NAMES)
    for mine, whole in ((part.train, data.train), (part.test, data.test)):
        assert torch.bincount(mine.labels).tolist() == [int((whole.labels == i).sum()) for i in INDICES]
        for new, old in enumerate(INDICES):
            assert torch.equal(mine.images[mine.labels == new], whole.images[whole.labels == old])


class Wrapped:
    """A split of another kind than `TensorImages`."""

    def __init__(self, split):
        self.split = split

    def __len__(self):
        return len(self.split)

    @property
    def labels(self):
        return self.split.labels

    def take(self, indices):
        return Wrapped(self.split.take(indices))

    def batches(self, *args):
        return self.split.batches(*args)

    def training_batches(self, *args, **options):
        return self.split.training_batches(*args, **options)


def test_splits_of_any_kind_are_numbered_anew(data):
    few = data.test.take(torch.arange(60))
    plain = of_classes(type(data)(ref="x", classes=data.classes, train=few, test=few), INDICES)
    other = of_classes(
        type(data)(ref="x", classes=data.classes, train=Wrapped(few), test=Wrapped(few)), INDICES
    )
    assert isinstance(other.test, ClassSplit)
    see = Preprocessing(input_size=(1, 28, 28), mean=(0.5,), std=(0.5,))
    settings = TrainSettings(batch_size=4)
    for mine, theirs in (
        (other.test.batches(5, see), plain.test.batches(5, see)),
        (
            other.test.training_batches(settings, see, seed=0, epoch=0),
            plain.test.training_batches(settings, see, seed=0, epoch=0),
        ),
    ):
        pairs = list(zip(mine, theirs, strict=True))
        assert len(pairs) > 1
        assert all(torch.equal(a, b) and torch.equal(x, y) for (a, x), (b, y) in pairs)
    assert torch.equal(other.test.take(torch.tensor([2, 0])).labels, plain.test.labels[[2, 0]])
    assert len(other.test) == len(plain.test) > 5


def test_data_is_matched_to_the_classes_of_a_network(network, data):
    small, part = for_classes(network, data, NAMES)
    assert matching(network, data) is data
    matched = matching(small, data)
    assert matched.classes == part.classes
    assert torch.equal(matched.test.labels, part.test.labels)
    assert matching(small, part) is part
    assert like(network, small, data).header.classes == small.header.classes
    assert like(small, small, data) is small
    assert like(network, network, data) is network
    other, _ = for_classes(network, data, ["coat", "dress"])
    with pytest.raises(
        DataError, match="trained on 2 classes, and 2 of them are not in fashion-mnist: dress, coat"
    ):
        matching(other, part)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["Snaeker", "Bag"], r"no class 'Snaeker' \(did you mean 'sneaker'\?\); it has: t-shirt"),
        (["Bag"], "two classes or more"),
        (["Bag", "bag"], "two classes or more"),
        ([], "two classes or more"),
    ],
)
def test_mistakes(network, data, names, said):
    with pytest.raises(UsageError, match=said):
        for_classes(network, data, names)


@pytest.mark.parametrize("facts", ALL.values(), ids=ALL)
def test_the_head_of_any_small_network(facts):
    torch.manual_seed(0)
    model = lively(facts.build(), facts.preprocessing)
    example = torch.randn(3, *facts.input_size, generator=torch.Generator().manual_seed(2))
    small = keep_outputs(model, example, [0, 2])
    with torch.no_grad():
        torch.testing.assert_close(small(example), model(example)[:, [0, 2]], rtol=0, atol=1e-5)


class TwoHeads(nn.Module):
    """Adds up the outputs of two layers."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.conv = nn.Linear(4, 3), nn.Linear(4, 3), nn.Conv2d(1, 4, 3)

    def forward(self, x):
        x = self.conv(x).mean((2, 3))
        return torch.cat([self.a(x), self.b(x)], 1)


def test_a_head_that_is_not_one_layer_is_refused():
    with pytest.raises(SurgeryError, match="could be the one that makes the classes"):
        keep_outputs(TwoHeads().eval(), torch.randn(2, 1, 6, 6), [0, 1])
