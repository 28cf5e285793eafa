"""The files of a report: what is written where, what is not replaced, and records that cannot be read."""

import json

import pytest

from se_prune.errors import SePruneError, UsageError
from se_prune.report import load_run, write_report
from se_prune.results import Run
from se_prune.schema import from_json, to_json
from tests.runs import make_run


@pytest.fixture(scope="module")
def run():
    return make_run()


def test_three_files_are_written_and_the_json_reads_back(tmp_path, run):
    written = write_report([run], tmp_path / "deep" / "half.html")
    assert written == [tmp_path / "deep" / f"half.{suffix}" for suffix in ("html", "md", "json")]
    assert sorted(tmp_path.rglob("*.*")) == sorted(written)
    [record] = json.loads(written[2].read_text())
    assert from_json(Run, json.dumps(record)) == run
    assert record["stages"][0]["evaluation"]["predictions"] == list(run.stages[0].evaluation.predictions)
    assert record["stages"][0]["evaluation"]["top1"] == 0.9431
    assert load_run(written[2]) == run


def test_no_run_and_no_html_name_are_refused(tmp_path, run):
    with pytest.raises(UsageError, match="there is no run to report"):
        write_report([], tmp_path / "a.html")
    with pytest.raises(UsageError, match=r"got .*a\.pdf; give -o a name that ends in \.html"):
        write_report([run], tmp_path / "a.pdf")
    assert list(tmp_path.iterdir()) == []
    assert write_report([run], tmp_path / "a")[0] == tmp_path / "a.html"


def test_a_run_record_is_not_replaced_by_the_reports_json(tmp_path, run):
    record = tmp_path / "half.json"
    record.write_text(to_json(run))
    with pytest.raises(
        UsageError, match=r"would replace the run record .*half\.json; .* such as half-report\.html"
    ):
        write_report([run], tmp_path / "half.html")
    assert load_run(record) == run
    assert list(tmp_path.iterdir()) == [record]
    for _ in range(2):
        assert len(write_report([run], tmp_path / "half-report.html")) == 3


def test_a_missing_or_damaged_record_says_what_to_do(tmp_path, run):
    with pytest.raises(
        SePruneError, match=r"cannot read the run record .*no\.json: No such file.*`se-prune run`"
    ):
        load_run(tmp_path / "no.json")
    cases = {
        to_json(run)[:-20]: r"is not valid: .*damaged or of another version; copy it again",
        "{}": r"is not valid: .*repeat the run",
        "[": r"is damaged \(",
        f"[{to_json(run)},{to_json(run)}]": "report of 2 runs; give the record of one run",
    }
    for content, message in cases.items():
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(SePruneError, match=message):
            load_run(tmp_path / "run.json")
