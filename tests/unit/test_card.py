"""Model cards: front matter that Hugging Face reads, and what stands below it."""

import json

import pytest

from se_prune.records import ArchSpec, ArtifactHeader, HistoryEntry, Preprocessing
from se_prune.report import card
from se_prune.results import Run
from se_prune.schema import from_json, json_schema, to_json
from tests.runs import CLASSES, HOSTILE, make_run

GREY = Preprocessing(input_size=(1, 28, 28), mean=(0.286,), std=(0.353,))


def header(**changes):
    fields = {
        "arch": ArchSpec(ref="zoo:se_resnet20"),
        "preprocessing": GREY,
        "classes": CLASSES,
        "plan": make_run().plan,
        "history": (
            HistoryEntry(stage="opened", details={"arch": "zoo:se_resnet20", "weights": "bundled"}),
            HistoryEntry(
                stage="apply",
                details={
                    "criterion": "energy",
                    "budget": {"kind": "macs", "value": 0.5},
                    "macs": [41_000_000, 20_049_000],
                    "repair": {"mode": "refit"},
                },
            ),
            HistoryEntry(
                stage="finetune",
                details={
                    "data": "fashion-mnist",
                    "train_images": 12000,
                    "seed": 7,
                    "settings": {"epochs": 8},
                    "distilled": True,
                },
            ),
            HistoryEntry(stage="evaluate", details={"top1": 0.9}),
        ),
    }
    return ArtifactHeader(**{**fields, **changes})


def written(run=None, **changes):
    return card.render(card.of_run(run or make_run(), header(**changes), "pruned.safetensors"))


def front(source):
    return yaml_of(source.split("---\n")[1])


def yaml_of(text):
    """Read the front matter: keys, each with JSON."""
    return {
        key: json.loads(value)
        for key, _, value in (line.partition(": ") for line in text.strip().split("\n"))
    }


def test_the_front_matter_is_what_the_hub_reads():
    hub = pytest.importorskip("huggingface_hub")
    source = written()
    data = hub.ModelCard(source, ignore_metadata_errors=False).data
    assert (data.library_name, data.pipeline_tag) == ("se-prune", "image-classification")
    assert data.model_name == "se_resnet20 at half of its MACs"
    results = {(r.metric_name, r.metric_value) for r in data.eval_results}
    assert results == {("top-1", 0.9398), ("top-5", 0.998)}
    assert {r.dataset_name for r in data.eval_results} == {"fashion-mnist"}
    assert front(source)["tags"][1] == "squeeze-and-excitation"


def test_it_says_what_it_is_how_it_was_made_and_what_it_costs():
    source = written()
    for part in (
        "cut by se-prune to 48.9 % of its MACs",
        "pixels in [0, 1], minus 0.286, over 0.353",
        "Classes: T-shirt/top, Trouser,",
        'se_prune.open_model("pruned.safetensors")',
        "1. Opened: arch zoo:se_resnet20, weights bundled.",
        "budget macs 0.5: 41.00 M → 20.05 M MACs, then repaired without labels.",
        "3. Finetune: 8 epochs with the dense network as teacher on 12,000 training images of fashion-mnist, seed 7.",
        "| top-1 | 93.98 % | 94.31 % |",
        "| top-1, 95 % interval | 93.50–94.43 % | 93.84–94.75 % |",
        "−0.33 points, exact two-sided McNemar p = 0.12.",
        "| MACs for one image | 20.05 M | 41.00 M |",
        "| size on disk | 598.0 kB | 1.14 MB |",
        "1.38× as fast as the dense network",
        "Exported for onnx, 583.1 kB: same top-1 as in torch on 100.0 % of 64 images",
        "se-prune run recipes/half.toml -o runs/half",
        "| dense.safetensors | abab",
    ):
        assert part in source, part
    assert [line for line in source.splitlines() if line.startswith("## ")] == [
        f"## {title}"
        for title in ("Intended use", "Limits", "How it was made", "Evaluation", "Cost", "How to reproduce")
    ]


def test_the_weakest_classes_come_first():
    per_class = make_run().stages[-1].evaluation.per_class
    weakest = min(per_class, key=per_class.get)
    lines = written().splitlines()
    table = lines.index("| class | this network | dense network |")
    assert lines[table + 2].startswith(f"| {weakest} | ")


def test_what_is_not_known_is_left_out():
    poor = make_run(
        latency=None, exported=(), paired=None, environment={}, hashes={}, stages=make_run().stages[:1]
    )
    source = written(poor, plan=None, history=(), classes=())
    assert "as it was trained" in source
    assert "Nothing is recorded." in source
    assert "McNemar" not in source
    assert "Latency" not in source
    assert "Exported" not in source


def test_hostile_names_stay_text():
    source = written(make_run(name=HOSTILE), classes=(HOSTILE, "b"))
    assert front(source)["model-index"][0]["name"] == HOSTILE
    body = source.split("---\n", 2)[2]
    assert "<script>" not in body
    assert r"\<script\>" in body


def fits(value, schema, whole):
    """Check a JSON value against the part of JSON Schema that pydantic writes."""
    if "$ref" in schema:
        return fits(value, whole["$defs"][schema["$ref"].rpartition("/")[2]], whole)
    if "anyOf" in schema:
        return any(fits(value, part, whole) for part in schema["anyOf"])
    if "const" in schema or "enum" in schema:
        return value in schema.get("enum", [schema.get("const")])
    kind = schema.get("type")
    if kind == "object":
        known = schema.get("properties", {})
        rest = schema.get("additionalProperties", True)
        if not isinstance(value, dict) or not set(schema.get("required", ())) <= set(value):
            return False
        for key, item in value.items():
            part = known.get(key, rest)
            if part is False or (isinstance(part, dict) and not fits(item, part, whole)):
                return False
        return True
    if kind == "array":
        if not isinstance(value, list):
            return False
        if "prefixItems" in schema:
            return len(value) == len(schema["prefixItems"]) and all(
                fits(item, part, whole) for item, part in zip(value, schema["prefixItems"], strict=True)
            )
        return all(fits(item, schema["items"], whole) for item in value)
    types = {"string": str, "integer": int, "number": int | float, "boolean": bool, "null": type(None)}
    return kind is None or isinstance(value, types[kind])


def test_the_published_schema_fits_records_and_nothing_else():
    schema = json_schema(Run)
    record = json.loads(to_json(make_run()))
    assert schema["title"] == "Run, schema version 1"
    assert schema["properties"]["schema_version"]["const"] == 1
    assert set(schema["properties"]) == set(record)
    assert fits(record, schema, schema)
    for change in ({"seed": "7"}, {"unknown": 1}, {"schema_version": 2}, {"stages": [{}]}):
        assert not fits({**record, **change}, schema, schema), change
    assert not fits({key: record[key] for key in record if key != "plan"}, schema, schema)


NEW = {
    "labels", "parts", "operations", "sites_after", "profiles_after", "gate_images", "changed", "hashes",
}  # fmt: skip


def test_records_of_earlier_versions_are_read():
    record = json.loads(to_json(make_run()))
    old = {key: value for key, value in record.items() if key not in NEW}
    for profile in old["profiles"]:
        del profile["per_class_std"], profile["channels"]
    run = from_json(Run, json.dumps(old))
    assert run.labels == ()
    assert run.profiles[0].per_class_std == {}
    assert run.operations is None
