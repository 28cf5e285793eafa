"""Data sets of libraries, and classes that are matched by name."""

import numpy as np
import pytest

from se_prune.artifact import Network
from se_prune.data import open_data
from se_prune.errors import DataError
from se_prune.pipeline import new_network
from se_prune.pipeline.classes import like
from se_prune.pipeline.measure import matching
from se_prune.records import ArchSpec, ArtifactHeader
from tests.tiny import png_folder
from tests.unit.test_data_scale import RGB, _Brightness, values


def test_sets_of_arrays_are_held_in_memory(tmp_path, monkeypatch):
    class Arrays:
        classes = ("ant", "bee")
        targets = (0, 1, 1)
        data = np.arange(3 * 4 * 4 * 3, dtype=np.uint8).reshape(3, 4, 4, 3)

        def __len__(self):
            return 3

    monkeypatch.setattr("timm.data.create_dataset", lambda *a, **k: Arrays())
    data = open_data(f"torch/cifar10@{tmp_path}")
    assert data.name == "torch/cifar10"
    assert data.train.images.shape == (3, 3, 4, 4)
    own = data.preprocessing
    assert own.input_size == (3, 4, 4)
    ((images, _),) = data.train.batches(3, own)
    assert images.mean((0, 2, 3)).tolist() == pytest.approx([0] * 3, abs=1e-3)
    assert images.std((0, 2, 3), correction=0).tolist() == pytest.approx([1] * 3, abs=1e-3)
    assert new_network("zoo:se_resnet20", data, 0).header.preprocessing.input_size[0] == 3
    assert data.train.images[1, 2, 0, 0] == Arrays.data[1, 0, 0, 2]
    assert (data.classes, data.train.labels.tolist()) == (("ant", "bee"), [0, 1, 1])


def test_a_hugging_face_set_on_the_disk(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = png_folder(tmp_path / "data")
    data = open_data(f"hfds/{folder}@{tmp_path / 'cache'}", workers=0)
    assert data.classes == ("ant", "bee")
    assert values(data.test.batches(9, RGB)) == [(v, int(v >= 100)) for v in (0, 10, 20, 100, 110, 120)]


# Class maps.


def network(*classes, module=None):
    header = ArtifactHeader(arch=ArchSpec(ref="in hand"), preprocessing=RGB, classes=classes)
    return Network(module=module or _Brightness(), header=header)


def test_classes_are_matched_by_name(tmp_path):
    data = open_data(str(png_folder(tmp_path / "data")), workers=0)
    assert matching(network("ant", "bee"), data) is data
    assert matching(network(), data) is data
    assert matching(network("0", "1"), data) is data
    turned = matching(network("bee", "ant"), data)
    assert turned.classes == ("bee", "ant")
    assert turned.test.labels.tolist() == [1, 1, 1, 0, 0, 0]
    assert [y for _, y in values(turned.test.batches(4, RGB))] == [1, 1, 1, 0, 0, 0]
    with pytest.raises(DataError, match=r"2 classes, and 1 of them are not in .*: wasp .it has ant, bee"):
        matching(network("ant", "wasp"), data)
    with pytest.raises(
        DataError, match=r"number their classes in another way .class 0 is 'ant' of one and 'bee'"
    ):
        like(network("bee", "ant"), network("ant", "bee"), data)
