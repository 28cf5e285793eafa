"""`compress`: a module in hand, with a loader of the caller's own."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import se_prune
from se_prune import artifact
from se_prune.data.hand import HandImages, read_batches
from se_prune.errors import BudgetError, DataError, UsageError
from se_prune.records import ArchSpec, Preprocessing
from se_prune.settings import TrainSettings
from tests.built import lively
from tests.nets import RESIDUAL


def net():
    torch.manual_seed(0)
    return lively(RESIDUAL.build(), RESIDUAL.preprocessing)


def loader(n=48, batch=10, labels=True):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(n, *RESIDUAL.input_size, generator=generator)
    columns = (images, torch.arange(n) % RESIDUAL.classes) if labels else (images,)
    return DataLoader(TensorDataset(*columns), batch_size=batch)


def gap(first, second):
    """Return the mean squared difference of two networks' outputs, relative to the variance of the first's."""
    images = next(iter(loader(200, 200, labels=False)))[0]
    with torch.no_grad():
        wanted, got = first(images), second(images)
    return float((wanted - got).square().mean() / wanted.var(0).mean())


@pytest.mark.parametrize("labels", [True, False])
def test_a_module_in_hand_becomes_smaller(labels):
    model = net()
    before = copy.deepcopy(model.state_dict())
    result = se_prune.compress(model, loader(labels=labels), macs=0.6)
    small = result.network.module
    assert result.after.macs <= 0.6 * result.before.macs
    assert result.max_abs_diff_masked < 1e-9
    assert any(fit.kept for fit in result.refits)
    assert not small.training
    assert gap(model, small) < 0.7 * gap(model, result.cut)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_every_option_is_passed_on():
    result = se_prune.compress(
        net(),
        loader(),
        sparsity=0.2,
        criterion="l1",
        round_to=2,
        min_channels=3,
        hidden="keep",
        repair="none",
    )
    plan = result.plan
    assert (plan.criterion, plan.round_to, plan.min_channels, plan.hidden) == ("l1", 2, 3, "keep")
    assert (plan.budget.kind, plan.budget.value) == ("sparsity", 0.2)
    assert result.refits == ()


def test_an_artifact_needs_a_factory(tmp_path):
    unnamed = se_prune.compress(net(), loader(), macs=0.6)
    with pytest.raises(UsageError, match="names the factory"):
        artifact.save(tmp_path / "small.safetensors", unnamed.network)
    assert not list(tmp_path.iterdir())
    arch = ArchSpec(ref="zoo:se_resnet20")
    torch.manual_seed(0)
    model = se_prune.open_model("zoo:se_resnet20", pretrained=True).module
    images = torch.randn(40, 1, 28, 28, generator=torch.Generator().manual_seed(2))
    named = se_prune.compress(model, [images], macs=0.6, arch=arch, criterion="gate-energy", repair="bn")
    artifact.save(tmp_path / "small.safetensors", named.network)
    again = artifact.load(tmp_path / "small.safetensors")
    with torch.no_grad():
        assert torch.equal(again.module(images), named.network.module(images))


@pytest.mark.parametrize("criterion", ["taylor", "hessian", "gate-fisher"])
def test_criteria_of_the_loss_need_labels(criterion):
    with pytest.raises(UsageError, match="needs labels"):
        se_prune.compress(net(), loader(labels=False), macs=0.6, criterion=criterion)
    assert se_prune.compress(net(), loader(), macs=0.6, criterion=criterion).after.macs > 0


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        ([], "there are no images"),
        (["a"], "each batch must be a tensor of images"),
        ([[]], "each batch must be a tensor of images"),
        (
            [torch.zeros(2, 3)],
            r"each batch must be a tensor of images .* got Tensor of shape \(2, 3\); .* in a list",
        ),
        ([torch.zeros(2, 3, 4, 4, dtype=torch.uint8)], r"must be floats, .* got torch\.uint8"),
        ([torch.full((2, 3, 4, 4), float("nan"))], "NaN or infinite"),
        ([torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 5, 5)], "must have one size"),
    ],
)
def test_batches_of_another_kind_are_refused(batches, said):
    with pytest.raises(DataError, match=said):
        read_batches(batches, 10)


def test_labels_that_the_network_does_not_have_are_refused():
    bad = [(next(iter(loader()))[0], torch.full((10,), 7))]
    with pytest.raises(UsageError, match="labels must be 0 to"):
        se_prune.compress(net(), bad, macs=0.6)


class Named(nn.Module):
    """Gives its logits by name."""

    def __init__(self):
        super().__init__()
        self.inner = net()

    def forward(self, x):
        return {"logits": self.inner(x)}


def test_networks_and_images_that_do_not_go_together_are_refused():
    image = next(iter(loader()))[0]
    with pytest.raises(DataError, match=r"fails on float32 images of shape \(1, .*give the batches that"):
        se_prune.compress(net(), [image[:, :1]], macs=0.6)
    with pytest.raises(DataError, match=r"model\.float\(\)"):
        se_prune.compress(net().double(), [image], macs=0.6)
    with pytest.raises(UsageError, match=r"must give logits \(N, K\) .*got dict; wrap it"):
        se_prune.compress(Named(), [image], macs=0.6)


def test_a_budget_is_needed_and_must_be_possible():
    with pytest.raises(UsageError, match="--sparsity"):
        se_prune.compress(net(), loader())
    with pytest.raises(BudgetError, match="must stay"):
        se_prune.compress(net(), loader(), macs=0.0001)


def test_no_more_images_are_read_than_asked_for():
    asked = []

    def batches():
        for i in range(10):
            asked.append(i)
            yield torch.full((4, 1, 2, 2), float(i)), torch.full((4,), i)

    images, labelled = read_batches(batches(), 10)
    assert asked == [0, 1, 2]
    assert len(images) == 10
    assert labelled
    assert images.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 2
    assert images.take(torch.tensor([9, 0])).images[:, 0, 0, 0].tolist() == [2.0, 0.0]
    parts = list(images.batches(4, Preprocessing(input_size=(1, 2, 2), mean=(0.0,), std=(1.0,))))
    assert [len(labels) for _, labels in parts] == [4, 4, 2]


def test_images_in_hand_are_not_augmented():
    images = HandImages(images=torch.zeros(2, 1, 2, 2), labels=torch.zeros(2, dtype=torch.long))
    with pytest.raises(UsageError, match="your own loop"):
        images.training_batches(TrainSettings(), RESIDUAL.preprocessing, seed=0, epoch=0)


class Twice(nn.Module):
    """A convolution that runs twice, and functional forms."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 2)
        self.free = nn.Parameter(torch.randn(6, 8, 1, 1))
        self.c, self.d = nn.Conv2d(6, 10, 1), nn.Conv2d(10, 8, 1)

    def forward(self, x):
        x = self.b(self.b(self.a(x).relu()).relu())
        x = nn.functional.conv2d(x, self.free)
        return self.fc(self.d(self.c(x).relu()).mean((2, 3)))


def test_functional_forms_and_reused_modules_are_handled_or_refused_with_a_reason():
    torch.manual_seed(0)
    images = torch.randn(20, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    result = se_prune.compress(Twice().eval(), [images], sparsity=0.3, criterion="l2")
    assert {g.name for g in result.plan.groups} == {"c", "d"}
    reasons = {g.name: g.note for g in result.plan.refused}
    assert set(reasons) >= {"a", "fc"}
    assert all(reasons.values())
