"""Records: their JSON is exact, they cannot be changed, and what does not belong in them is refused."""

import dataclasses
import json
import math
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from se_prune import recipe, records, results, timing
from se_prune import settings as training_settings
from se_prune.errors import SePruneError, nearest
from se_prune.pipeline import progress
from se_prune.records import ArchSpec, Budget, HistoryEntry, Plan
from se_prune.results import Latency, Run, SiteSummary
from se_prune.runtimes import table
from se_prune.schema import from_dict, from_json, to_dict, to_json
from se_prune.training.loop import StepLog, TrainResult
from tests import runs

RECORDS = [
    value
    for module in (records, training_settings, results, recipe, timing, table, progress)
    for value in vars(module).values()
    if dataclasses.is_dataclass(value) and value.__module__ == module.__name__
    if value is not timing.LayerTimes  # a record and what was asked of it
]
#: Those that stay in memory between two stages, and so say nothing about unknown keys.
IN_MEMORY = {records.LayerSlice, records.Coupling, records.LayerCost}
FILED = [cls for cls in RECORDS if cls not in IN_MEMORY]

# Values of free form (arguments, settings and results in a history) are JSON values, whose numbers are finite.
FINITE = st.floats(allow_nan=False, allow_infinity=False)
PLAIN = st.booleans() | st.integers(-(2**63), 2**63 - 1) | FINITE | st.text()
JSON_VALUES = st.recursive(
    st.none() | PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def parts(hint):
    """Return the members of a union without None, or the type alone."""
    if get_origin(hint) in {Union, types.UnionType}:
        return [part for part in get_args(hint) if part is not type(None)]
    return [hint]


def strategy(hint):
    """Return a hypothesis strategy for a field's type."""
    origin, args = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        hints = get_type_hints(hint)
        return st.builds(hint, **{f.name: strategy(hints[f.name]) for f in dataclasses.fields(hint)})
    if origin in {Union, types.UnionType}:
        return st.one_of(st.none() if part is type(None) else strategy(part) for part in args)
    if origin is Literal:
        return st.sampled_from(args)
    if origin is tuple and args[-1] is Ellipsis:
        return st.lists(strategy(args[0]), max_size=2).map(tuple)
    if origin is tuple:
        return st.tuples(*map(strategy, args))
    if origin is dict and args[1] is Any:
        return st.dictionaries(st.text(), JSON_VALUES, max_size=3)
    if origin is dict and len(parts(args[1])) > 1:
        return st.dictionaries(st.text(), PLAIN, max_size=3)
    if origin is dict:
        return st.dictionaries(st.text(), strategy(args[1]), max_size=2)
    return {int: st.integers(), float: st.floats(), bool: st.booleans(), str: st.text()}[hint]


def sample(hint):
    """Return one value of a field's type, with one element in every container."""
    origin, args = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        hints = get_type_hints(hint)
        return hint(**{f.name: sample(hints[f.name]) for f in dataclasses.fields(hint)})
    if origin in {Union, types.UnionType}:
        return sample(parts(hint)[0])
    if origin is Literal:
        return args[0]
    if origin is tuple:
        return tuple(sample(part) for part in args if part is not Ellipsis)
    if origin is dict:
        return {"key": 1 if args[1] is Any else sample(args[1])}
    return {int: 1, float: 0.5, bool: True, str: "x"}[hint]


def nested(hint, document):
    """Yield every record inside a document: its class, and the dictionary that holds it."""
    origin, args = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        yield hint, document
        hints = get_type_hints(hint)
        for field in dataclasses.fields(hint):
            yield from nested(hints[field.name], document[field.name])
    elif origin in {Union, types.UnionType}:
        yield from nested(parts(hint)[0], document)
    elif origin is tuple:
        yield from nested(args[0], document[0])
    elif origin is dict and args[1] is not Any:
        yield from nested(args[1], document["key"])


def by_class(classes):
    return pytest.mark.parametrize("cls", classes, ids=lambda cls: cls.__name__)


def test_all_records_are_here():
    names = {cls.__name__ for cls in RECORDS}
    assert {"ArchSpec", "Plan", "Run", "ArtifactHeader", "TrainSettings", "RunRecipe", "Coupling"} <= names
    assert len(names) == len(RECORDS) >= 29


@by_class(RECORDS)
@settings(max_examples=20, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_json_is_exact(cls, data):
    value = data.draw(strategy(cls))
    text = to_json(value)
    again = from_json(cls, text)
    assert repr(again) == repr(value)  # tells 1 from 1.0, -0.0 from 0.0 and lists from tuples, and knows NaN
    assert to_json(again) == text
    assert repr(from_dict(cls, to_dict(value))) == repr(value)
    assert repr(from_json(cls, to_json(value, indent=2))) == repr(value)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, -0.0, 5e-324, 0.1 + 0.2, 1e308])
def test_numbers_that_json_would_lose(number):
    value = Budget(kind="macs", value=number)
    again = from_json(Budget, to_json(value).encode())
    assert math.copysign(1, again.value) == math.copysign(1, number)
    assert again.value == number or (math.isnan(again.value) and math.isnan(number))
    inside = dataclasses.replace(runs.plan(), budget=value)
    assert repr(from_json(Plan, to_json(inside))) == repr(inside)


def test_arguments_keep_their_types():
    value = ArchSpec(ref="x", kwargs={"a": True, "b": 1, "c": 1.0, "d": "1", "e": "true"})
    assert to_json(value) == '{"ref":"x","kwargs":{"a":true,"b":1,"c":1.0,"d":"1","e":"true"}}'
    assert repr(from_json(ArchSpec, to_json(value))) == repr(value)


def test_a_whole_run_is_exact():
    run = runs.make_run()
    assert from_json(Run, to_json(run)) == run
    assert json.loads(to_json(run))["stages"][0]["evaluation"]["n"] == runs.N_IMAGES


@by_class(RECORDS)
def test_records_are_frozen_slotted_and_take_keywords_only(cls):
    value = sample(cls)
    for field in dataclasses.fields(cls):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field.name, None)
    assert not hasattr(value, "__dict__")
    with pytest.raises(AttributeError):
        object.__setattr__(value, "another", 1)
    names = [field.name for field in dataclasses.fields(cls)]
    object.__setattr__(value, names[0], getattr(value, names[0]))  # the control: a field's slot can be set
    with pytest.raises(TypeError, match="positional"):
        cls(*[getattr(value, name) for name in names])


@pytest.mark.parametrize("cls", [StepLog, TrainResult], ids=lambda cls: cls.__name__)
def test_the_records_of_training_are_frozen_too(cls):
    value = sample(cls)
    with pytest.raises(dataclasses.FrozenInstanceError):
        value.loss = 0.0
    assert not hasattr(value, "__dict__")


@by_class(FILED)
def test_an_unknown_key_is_refused_at_every_depth_with_the_nearest(cls):
    document = to_dict(sample(cls))
    assert from_dict(cls, document) == sample(cls)  # the control
    seen = 0
    for inner, place in list(nested(cls, document)):
        for field in dataclasses.fields(inner):
            wrong = f"{field.name}_"
            place[wrong] = place[field.name]
            with pytest.raises(SePruneError) as caught:
                from_dict(cls, document, what="the file")
            message = str(caught.value)
            assert message.startswith("the file is not valid: ")
            assert f"{wrong}: Unexpected keyword argument (did you mean '{field.name}'?)." in message
            del place[wrong]
            seen += 1
    assert seen >= len(dataclasses.fields(cls))
    assert from_dict(cls, document) == sample(cls)


def test_the_nearest_key_is_found_in_records_of_pairs():
    document = to_dict(runs.make_run())
    document["latency"][1]["treads"] = 1
    with pytest.raises(SePruneError, match=r"latency\.1\.treads: .*did you mean 'threads'\?"):
        from_dict(Run, document)


def test_a_misspelled_key_is_named_before_the_one_that_is_missing():
    with pytest.raises(SePruneError, match=r"valeu: Unexpected keyword argument \(did you mean 'value'"):
        from_dict(Budget, {"kind": "macs", "valeu": 0.5})
    with pytest.raises(SePruneError, match="value: Field required"):
        from_dict(Budget, {"kind": "macs"})


def test_a_key_like_nothing_has_no_suggestion():
    with pytest.raises(SePruneError) as caught:
        from_json(Budget, '{"kind": "macs", "value": 1, "zzzzzz": 1}')
    assert "zzzzzz: Unexpected keyword argument." in str(caught.value)
    assert nearest("zzzzzz", ["kind", "value"]) == ""
    assert nearest("vlue", ["kind", "value"]) == " (did you mean 'value'?)"


@by_class(RECORDS)
def test_a_wrong_type_is_named(cls):
    for field in dataclasses.fields(cls):
        document = to_dict(sample(cls))
        document[field.name] = object()
        with pytest.raises(SePruneError) as caught:
            from_dict(cls, document, what="the file")
        assert f"the file is not valid: {field.name}" in str(caught.value)
        assert "nput should be" in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("cls", "changes", "message"),
    [
        (Budget, {"value": "much"}, "value: Input should be a valid number"),
        (
            Budget,
            {"kind": "energy"},
            "kind: Input should be 'sparsity', 'macs', 'params', 'latency' or 'latency_ms'",
        ),
        (Plan, {"round_to": 1.5}, "round_to: Input should be a valid integer"),
        (Plan, {"groups": 3}, "groups: Input should be a valid tuple"),
        (Latency, {"threads": None}, "threads: Input should be a valid integer"),
        (HistoryEntry, {"details": []}, "details: Input should be a valid dictionary"),
        (SiteSummary, {"advice": "perhaps"}, "advice: Input should be 'keep' or 'fold'"),
    ],
)
def test_what_wrong_types_say(cls, changes, message):
    document = to_dict(sample(cls))
    with pytest.raises(SePruneError, match=message):
        from_dict(cls, {**document, **changes})


@by_class([cls for cls in RECORDS if "schema_version" in cls.__dataclass_fields__])
def test_another_schema_version_is_refused(cls):
    document = to_dict(sample(cls))
    assert document["schema_version"] == 1
    for version in (0, 2, "1", None):
        with pytest.raises(SePruneError, match="schema_version: Input should be 1"):
            from_dict(cls, {**document, "schema_version": version})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{nope", "the document: Invalid JSON"),
        ("[]", "the document: Input should be an object"),
        ("", "the document: Invalid JSON: EOF"),
        ("null", "the document: Input should be an object"),
    ],
)
def test_what_is_no_document(text, message):
    with pytest.raises(SePruneError, match=f"my file is not valid: {message}"):
        from_json(Budget, text, what="my file")


def test_a_plan_counts_its_channels_without_hidden_units():
    groups = [g for g in runs.GROUPS if g[1] != "hidden"]
    assert runs.plan().channels_removed == sum(g[3] for g in groups) == 168
    assert runs.plan().channels_total == sum(g[2] for g in groups) == 352


def test_layers_of_a_coupling_by_role():
    group = dataclasses.replace(sample(records.ChannelGroup), members=("a", "b", "c"))
    slices = tuple(
        records.LayerSlice(layer=layer, role=role, index=(0,), root=(0,))
        for layer, role in (("a", "out"), ("b", "channelwise"), ("c", "in"), ("d", "in"))
    )
    coupling = records.Coupling(group=group, slices=slices)
    assert (coupling.layers("out"), coupling.layers("in")) == (("a",), ("c", "d"))
