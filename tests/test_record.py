"""What `run.json` holds is JSON, whatever was measured."""

from __future__ import annotations

import json
import math

from tawny.record import LinearRecord, Record, measured_numbers


def test_numbers_that_are_not_finite_are_null_in_the_file_and_infinite_again_when_read():
    linear = LinearRecord("q", (2, 2), 0, 0, 0.5, 2, 0.5, "row", math.inf, "hessian", 0.1, {"loss": math.nan})
    dense = {"perplexity": math.inf, "stderr": math.nan, "windows": 4}
    record = Record(linears=[linear], evaluation={"dense": dense}, allocation={"q": 0.5})

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    read = json.loads(record.to_json(), parse_constant=refuse)
    assert read["linears"][0]["error"] is None and read["linears"][0]["notes"] == {"loss": None}
    assert read["evaluation"]["dense"] == {"perplexity": None, "stderr": None, "windows": 4}
    assert read["linears"][0]["shape"] == [2, 2] and read["allocation"] == {"q": 0.5}
    known = measured_numbers(read)
    assert known["linears"][0]["error"] == known["evaluation"]["dense"]["perplexity"] == math.inf
    assert known["evaluation"]["dense"]["windows"] == 4
