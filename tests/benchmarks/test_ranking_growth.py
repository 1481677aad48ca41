# SPDX-License-Identifier: Apache-2.0
from benchmarks.ranking_growth import FACTOR, PLANTED, _compared, _model
from recsys.core.config import validate
from recsys.scaling.data import PlantedData


def test_growing_does_not_jump_and_equal_compute_is_equal() -> None:
    data = PlantedData(validate(PlantedData.Config, {**PLANTED, "test": 500}))
    found = _compared(data, 1536, 0)
    each = {name: _model(data, expansion, 0).costs().flops for name, expansion in (("small", 1.0), ("full", FACTOR))}
    assert found["grown"]["jump"] < 1e-4
    assert found["small"]["flops"] == 1024 * each["small"]
    assert found["grown"]["flops"] == 1024 * each["small"] + 512 * each["full"]
    assert 0 <= found["grown"]["flops"] - found["scratch, equal compute"]["flops"] < each["full"]
    assert found["scratch, equal rows"]["flops"] == 1536 * each["full"]
    assert len({round(one["auc"], 6) for one in found.values()}) == 4
