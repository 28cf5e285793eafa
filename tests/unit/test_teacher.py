"""Distillation: its loss, what a student learns of a teacher, and when the teacher is asked."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from se_prune.data.batches import TensorImages
from se_prune.evaluate import evaluate
from se_prune.training.losses import distillation_loss
from se_prune.training.teacher import Teacher
from tests.tiny import GREY, stripes
from tests.training import CPU, QUICK, net, same, stopped, train

# Distillation.


def test_distillation_is_zero_for_equal_outputs_and_shifted_ones():
    logits = torch.randn(7, 5)
    for temperature in (0.5, 1.0, 4.0):
        assert float(distillation_loss(logits, logits, temperature)) == pytest.approx(0.0, abs=1e-6)
        assert float(distillation_loss(logits + 3, logits, temperature)) == pytest.approx(0.0, abs=1e-5)
        assert float(distillation_loss(logits, -logits, temperature)) > 0.01


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_distillation_is_the_divergence_by_hand(temperature):
    student, teacher = [[1.0, 2.0, -1.0], [0.5, 0.0, 3.0]], [[0.0, 1.0, 1.0], [2.0, -2.0, 0.0]]
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        q = [math.exp(v / temperature) for v in s]
        p = [math.exp(v / temperature) for v in t]
        q, p = [v / sum(q) for v in q], [v / sum(p) for v in p]
        total += sum(b * math.log(b / a) for a, b in zip(q, p, strict=True))
    expected = total / 2 * temperature**2
    got = distillation_loss(torch.tensor(student).double(), torch.tensor(teacher).double(), temperature)
    assert float(got) == pytest.approx(expected, rel=1e-12)


def test_a_student_follows_its_teacher_and_leaves_it_as_it_is():
    teacher = net(1)
    train(teacher, replace(QUICK, epochs=8))
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    lies = replace_labels(stripes(96), torch.zeros(96, dtype=torch.long))
    student, sceptic = net(2), net(2)
    train(student, replace(QUICK, epochs=16, distill_weight=1.0), split=lies, teacher=teacher)
    train(sceptic, replace(QUICK, epochs=16, distill_weight=0.0), split=lies, teacher=teacher)
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    right = [
        evaluate(model, stripes(60, seed=5), GREY, device=CPU).top1 for model in (teacher, student, sceptic)
    ]
    assert right[0] > 0.9
    assert right[1] > 0.9
    assert right[2] == pytest.approx(1 / 3, abs=0.1)  # the control: with the labels alone it learns the lies


def replace_labels(split, labels):
    return TensorImages(images=split.images, labels=labels)


# The teacher, asked beforehand.


class Counted(nn.Module):
    """Counts the images that it is asked about."""

    def __init__(self, model):
        super().__init__()
        self.model, self.asked = model, 0

    def forward(self, x):
        self.asked += len(x)
        return self.model(x)


MIRRORED = replace(QUICK, epochs=5, flip=0.5, distill_weight=1.0)


def test_a_teacher_is_asked_once_per_form_of_an_image():
    teacher = Counted(net(3))
    train(net(), MIRRORED, teacher=teacher)
    assert teacher.asked == 2 * 96


@pytest.mark.parametrize("change", [{"crop_padding": 1}, {"erase": 0.5}, {"epochs": 2}])
def test_a_teacher_is_asked_each_time_where_answers_do_not_repeat(change):
    teacher, settings = Counted(net(3)), replace(MIRRORED, **change)
    train(net(), settings, teacher=teacher)
    assert teacher.asked == settings.epochs * 96


def test_known_answers_are_the_networks_own(monkeypatch):
    known, each_time = net(), net()
    train(known, MIRRORED, teacher=net(3))
    monkeypatch.setattr(Teacher, "prepare", lambda *_: None)
    train(each_time, MIRRORED, teacher=net(3))
    for name, value in known.state_dict().items():
        torch.testing.assert_close(value, each_time.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_a_run_with_known_answers_goes_on_bit_for_bit(tmp_path):
    whole, resumed = net(), net()
    train(whole, MIRRORED, teacher=net(3))
    stopped(net(), MIRRORED, tmp_path, 2, teacher=net(3))
    train(resumed, MIRRORED, teacher=net(3), resume=tmp_path)
    assert same(whole, resumed)


def test_an_unknown_image_is_asked_about():
    teacher, split = Counted(net(3).eval()), stripes(96)
    known = Teacher(teacher, torch.contiguous_format)
    known.prepare(split, MIRRORED, GREY)
    before, other = teacher.asked, torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(known(other), teacher.model(other))
    assert teacher.asked == before + 4
