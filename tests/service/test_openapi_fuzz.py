"""Valid and invalid requests that schemathesis generates from /openapi.json: responses conform, no internal errors."""

from __future__ import annotations

from contextlib import suppress

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance

OPERATIONS = 17
CHECKS = [not_a_server_error, content_type_conformance, response_schema_conformance]
# Deterministic examples, no shrinking, no time limit.
SETTINGS = settings(
    max_examples=12,
    derandomize=True,
    database=None,
    deadline=None,
    phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_responses_conform_to_the_document(service, giraffe, mode):
    document = service.get("/openapi.json").json()
    operations = [found.ok() for found in schemathesis.openapi.from_dict(document).get_all_operations()]
    assert len(operations) == OPERATIONS
    base_url = str(service.base_url)
    statuses: set[int] = set()

    def check(operation) -> None:
        @SETTINGS
        @given(operation.as_strategy(generation_mode=mode))
        def ask(case) -> None:
            response = case.call(base_url=base_url, timeout=120)
            case.validate_response(response, checks=CHECKS)
            statuses.add(response.status_code)

        ask()

    drawn = set()
    for operation in operations:
        with suppress(Unsatisfiable):  # a request without parameters cannot be invalid
            check(operation)
            drawn.add(operation.path)
    assert {"/recognize", "/recognize/batch", "/entities"} <= drawn
    assert statuses <= {200, 400, 403, 404, 405, 408, 413, 415, 422}
    assert 422 in statuses if mode is GenerationMode.NEGATIVE else 200 in statuses
    answer = service.post("/recognize", content=giraffe, headers={"Content-Type": "image/png"})
    assert answer.json()["predictions"][0]["entity_id"] == "Q15083"
