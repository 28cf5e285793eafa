"""What a report shows beside accuracy: parts of networks, gates after the cut, changed images, hashes."""

import base64
import collections
import dataclasses
import hashlib
import io

import pytest
import torch
from PIL import Image

from se_prune.data.batches import TensorImages
from se_prune.data.source import DataSource, open_data
from se_prune.gates.sites import find_sites
from se_prune.gates.statistics import collect
from se_prune.gates.summary import liveliest, profile
from se_prune.pipeline import details
from se_prune.pipeline.measure import Silent, Structure
from se_prune.pipeline.parts import layer_parts, part_operations
from se_prune.results import Evaluation, OperationTime
from se_prune.surgery.cut import cut
from tests.built import built, random_plan
from tests.evidence import CPU, data

SHAPES = {
    "zoo:se_resnet20": {
        "stem": ["conv1"],
        "stage 1, 28 × 28": ["layer1.0.conv1", "layer1.2.conv2"],
        "stage 2, 14 × 14": ["layer2.0.conv1", "layer2.0.downsample.0"],
        "SE blocks": ["layer1.0.se.reduce", "layer3.2.se.expand"],
        "head": ["fc"],
    },
    "timm:mobilenetv3_small_100": {
        "stem": ["conv_stem"],
        "SE blocks": ["blocks.0.0.se.conv_reduce"],
        "stage 1, 16 × 16": ["blocks.0.0.conv_pw"],
        "head": ["conv_head", "classifier"],
    },
    "torchvision:mobilenet_v3_small": {
        "stem": ["features.0.0"],
        "SE blocks": ["features.1.block.1.fc1"],
        "head": ["classifier.0", "classifier.3"],
    },
    "timm:regnety_002": {
        "stem": ["stem.conv"],
        "SE blocks": ["s1.b1.se.fc1"],
        "stage 5, 2 × 2": ["s4.b1.conv3.conv"],
        "head": ["head.fc"],
    },
}


@pytest.mark.parametrize("name", SHAPES)
def test_layers_are_told_apart_by_where_they_run(name):
    network = built(name)
    parts = layer_parts(network.model, network.example, network.sites)
    found = collections.defaultdict(list)
    for layer, part in parts.items():
        found[part].append(layer)
    for part, layers in SHAPES[name].items():
        assert set(layers) <= set(found[part]), (part, found[part])
    gates = sum(len(site.layers) for site in network.sites)
    assert len(found["SE blocks"]) == gates
    assert [part for part in found if part.startswith("stage")] == sorted(p for p in found if "stage" in p)
    assert set(parts) >= set(network.cost.per_layer)


def test_a_network_without_sites_has_stem_and_head():
    network = built("zoo:resnet20")
    parts = layer_parts(network.model, network.example, ())
    assert (parts["conv1"], parts["fc"]) == ("stem", "head")
    assert parts["layer2.0.conv1"] == "stage 2, 14 × 14"


def op(name, kind="Conv", layer=None):
    return OperationTime(name=name, kind=kind, ms=1.0, layer=layer)


def test_operations_between_the_layers_of_a_graph_belong_to_the_gate_or_the_stage():
    network = built("zoo:se_resnet20")
    parts = layer_parts(network.model, network.example, network.sites)
    listed = [
        (op("relu", layer="conv1"), "stem"),
        (op("getitem_6", layer="layer1.0.conv2"), "stage 1, 28 × 28"),
        (op("order", "ReorderOutput"), "stage 1, 28 × 28"),
        (op("mean", "ReduceMean"), "SE blocks"),
        (op("order_2", "ReorderInput"), "SE blocks"),
        (op("relu_2", layer="layer1.0.se.reduce"), "SE blocks"),
        (op("sigmoid", layer="layer1.0.se.expand"), "SE blocks"),
        (op("order_3", "ReorderOutput"), "SE blocks"),
        (op("mul", "Mul"), "SE blocks"),
        (op("add", "Add"), "stage 1, 28 × 28"),
        (op("scale", layer="layer1.1.se"), "SE blocks"),
        (op("last", layer="layer3.2.conv2"), "stage 3, 7 × 7"),
        (op("pool", "ReduceMean"), "stage 3, 7 × 7"),
        (op("linear", "Gemm", layer="fc"), "head"),
    ]
    found = part_operations([item for item, _ in listed], parts, network.sites)
    assert [item.part for item in found] == [part for _, part in listed]


def test_modules_of_an_eager_network_belong_to_the_gate_that_holds_them():
    network = built("zoo:se_resnet20")
    parts = layer_parts(network.model, network.example, network.sites)
    listed = [
        (op("conv1", layer="conv1"), "stem"),
        (op("bn1", "BatchNorm2d"), "stem"),
        (op("layer1.0.conv2", layer="layer1.0.conv2"), "stage 1, 28 × 28"),
        (op("layer1.0.se.squeeze", "AdaptiveAvgPool2d"), "SE blocks"),
        (op("layer1.0.se.reduce", layer="layer1.0.se.reduce"), "SE blocks"),
        (op("layer1.0.se.sigmoid", "Sigmoid"), "SE blocks"),
        (op("layer1.0.downsample", "Identity"), "stage 1, 28 × 28"),
        (op("outside of modules", "functions"), "between modules"),
    ]
    found = part_operations([item for item, _ in listed], parts, network.sites)
    assert [item.part for item in found] == [part for _, part in listed]


def structure(network):
    return Structure(
        example=network.example[:1], sites=network.sites, couplings=network.couplings, cost=network.cost
    )


def test_kept_channels_are_those_of_the_cut_network():
    network = built("zoo:se_mobilenet_x025")
    plan = random_plan(network, "sparsity", 0.4)
    module = cut(network.model, network.example, plan)
    sites = {site.name: site for site in find_sites(module, network.example)}
    fewer = 0
    for site in network.sites:
        kept = details.kept_channels(structure(network), plan, site)
        assert len(kept) == sites[site.name].channels
        assert kept == tuple(sorted(set(kept)))
        norm = f"{site.name.rpartition('.')[0]}.bn2.weight"
        assert torch.equal(module.state_dict()[norm], network.model.state_dict()[norm][list(kept)])
        fewer += len(kept) < site.channels
    assert fewer > 3


def test_profiles_hold_the_spread_within_classes_and_the_liveliest_of_many():
    network = built("zoo:se_resnet20")
    split = data((1, 28, 28), 10, n=40)
    names = [f"class {i}" for i in range(10)]
    statistics = collect(
        network.model, network.sites, split, network.preprocessing, classes=names, device=CPU
    )
    site = network.sites[2].name
    record = profile(statistics, site, ["class 3"], channels=range(16))
    assert record.channels == tuple(range(16))
    gates = {}
    handle = dict(network.model.named_modules())[f"{site}.sigmoid"].register_forward_hook(
        lambda _, __, output: gates.update(s=output.flatten(1))
    )
    with torch.no_grad():
        network.model(split.images[split.labels == 3])
    handle.remove()
    assert record.per_class["class 3"] == pytest.approx(gates["s"].mean(0).tolist(), abs=1e-5)
    spread = gates["s"].std(0, correction=0).tolist()
    assert record.per_class_std["class 3"] == pytest.approx(spread, abs=1e-4)
    assert len(liveliest(statistics, 4)) == 4
    assert set(liveliest(statistics, 4)) <= set(liveliest(statistics, 5))
    assert liveliest(statistics, 99) == tuple(names)


def answers(*predictions):
    return Evaluation(
        n=len(predictions), top1=0.5, top5=1.0, top1_ci95=(0.4, 0.6), loss=1.0, predictions=predictions
    )


def test_changed_images_are_lost_and_won_in_turn_and_look_like_themselves():
    images = torch.randint(0, 256, (6, 1, 28, 28), dtype=torch.uint8)
    split = TensorImages(images=images, labels=torch.tensor([0, 0, 1, 1, 2, 0]))
    found = details.changed_images(split, answers(0, 0, 1, 2, 1, 1), answers(1, 0, 0, 1, 0, -1))
    assert [(item.index, item.label, item.first, item.second) for item in found] == [
        (0, 0, 0, 1),
        (3, 1, 2, 1),
        (2, 1, 1, 0),
        (4, 2, 1, 0),
    ]
    for item in found:
        with Image.open(io.BytesIO(base64.b64decode(item.data))) as picture:
            assert (item.mime, picture.format) == ("image/png", "PNG")
            assert picture.tobytes() == images[item.index].numpy().tobytes()
    assert details.changed_images(split, answers(*[0] * 6), answers(*[0] * 6)) == ()


def test_large_images_become_small_and_few():
    count = 60
    images = torch.randint(0, 256, (count, 3, 200, 160), dtype=torch.uint8)
    split = TensorImages(images=images, labels=torch.arange(count) % 3)
    first = answers(*(split.labels.tolist()))
    found = details.changed_images(split, first, answers(*(((split.labels + 1) % 3).tolist())))
    assert len(found) == details.CHANGED
    assert collections.Counter(item.label for item in found) == {0: 8, 1: 8, 2: 8}
    with Image.open(io.BytesIO(base64.b64decode(found[0].data))) as picture:
        assert (picture.format, picture.size) == ("JPEG", (96, 96))


def test_hashes_are_those_of_the_files_and_of_both_splits(tmp_path):
    file = tmp_path / "a.bin"
    file.write_bytes(b"weights")
    package = tmp_path / "b.mlpackage" / "Data"
    package.mkdir(parents=True)
    (package / "w.bin").write_bytes(b"more")
    source = open_data("fashion-mnist")
    found = details.hashes(source, [file, package.parent])
    assert found["a.bin"] == hashlib.sha256(b"weights").hexdigest()
    assert found["b.mlpackage/Data/w.bin"] == hashlib.sha256(b"more").hexdigest()
    splits = {"training images and labels", "test images and labels"}
    assert set(found) == {"a.bin", "b.mlpackage/Data/w.bin"} | splits
    other = TensorImages(images=source.test.images, labels=source.test.labels.flip(0))
    changed = details.hashes(dataclasses.replace(source, test=other), [])
    assert changed["training images and labels"] == found["training images and labels"]
    assert changed["test images and labels"] != found["test images and labels"]


def test_hashes_of_folders_are_of_names_and_not_of_where_they_lie(tmp_path):
    for place in ("here", "there"):
        for split in ("train", "val"):
            for name in ("cat", "dog"):
                folder = tmp_path / place / split / name
                folder.mkdir(parents=True)
                Image.new("L", (8, 8)).save(folder / "1.png")
    first, second = (details.hashes(open_data(str(tmp_path / p), workers=0), []) for p in ("here", "there"))
    assert first == second
    assert set(first) == {"training file names and labels", "test file names and labels"}


def test_gates_of_the_pruned_network_are_measured_on_training_images():
    network = built("zoo:se_resnet20")
    plan = random_plan(network, "sparsity", 0.3)
    module = cut(network.model, network.example, plan)
    images = torch.randint(0, 256, (30, 1, 28, 28), dtype=torch.uint8)
    split = TensorImages(images=images, labels=torch.arange(30) % 3)
    source = DataSource(ref="x", classes=("a", "b", "c"), train=split, test=split.take(torch.arange(0)))
    from se_prune.artifact import Network
    from se_prune.records import ArchSpec, ArtifactHeader

    header = ArtifactHeader(arch=ArchSpec(ref="zoo:se_resnet20"), preprocessing=network.preprocessing)
    fields = details.gates_after(
        Network(module=module, header=header),
        source,
        structure(network),
        plan,
        ("a", "c"),
        device=CPU,
        seed=0,
        show=Silent(),
    )
    assert fields["gate_images"] == 30
    assert len(fields["sites_after"]) == len(network.sites)
    for site, gate in zip(network.sites, fields["profiles_after"], strict=True):
        assert list(gate.per_class) == ["a", "c"]
        assert len(gate.mean) == len(gate.channels) <= site.channels


def test_of_many_sites_some_are_drawn_from_the_first_to_the_last():
    assert details.spread_evenly(range(5), 24) == range(5)
    found = details.spread_evenly(range(50), 24)
    assert (len(set(found)), found[0], found[-1]) == (24, 0, 49)
