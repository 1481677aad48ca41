# SPDX-License-Identifier: Apache-2.0
"""Turning the kernels on leaves the losses of every ranker where the references have them."""

from typing import Any

import pytest

from recsys.data.spec import InputSpec
from tests.recsys.ranking.test_every_ranker import LENGTHS, VARIANTS, built
from tests.recsys.training.courses import assert_same_course

QUICK = ("tokenmixer_large",)


@pytest.mark.parametrize("variant", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in VARIANTS])
def test_a_training_runs_the_same_course_on_kernels_and_on_references(
    variant: str, spec: InputSpec, make_rows: Any, make_batch: Any
) -> None:
    batches = [make_batch(make_rows(LENGTHS * 4, seed)) for seed in range(4)]
    ran = {choice.op for choice in assert_same_course(lambda: built(spec, variant), batches)}
    if variant == "tokenmixer_large":
        assert ran == {"rms_norm", "token_swiglu"}
