# SPDX-License-Identifier: Apache-2.0
"""Bytes between ranks beside a simulation that sends every vector, and what the steps on paper must have in common."""

import itertools

import pytest

from pipelines.cli import main
from recsys.scaling.communication import PLACEMENTS, Gpus, Placement, Workload, exchanged_bytes, step

NODE, NUMBER = 4, 2
WORK = Workload(rows=1e6, fields=24, ids=1.0, width=8, batch=16, dense=1e6, flops=1e6)


def simulated(ranks: int, placement: Placement) -> tuple[float, float]:
    """What rank 0 sends in its node and beyond it for vectors and their gradients, one message after another.

    Between nodes a sum over a node's ranks is sent once, by its ranks in turn, as collectives that know of nodes do.
    """
    vector = WORK.width * NUMBER
    near = min(NODE, ranks)
    sent = {True: 0.0, False: 0.0}
    for sample_rank, field in itertools.product(range(ranks), range(WORK.fields)):
        samples = WORK.batch * vector
        owner = field % ranks
        if placement == "table_wise":
            if owner == 0 and sample_rank != 0:
                sent[sample_rank < near] += samples  # the pooled vectors
            if sample_rank == 0 and owner != 0:
                sent[owner < near] += samples  # their gradients
        elif sample_rank != 0:  # a part of every sum, and gradients of own samples to everybody
            inside = sample_rank < near
            sent[True] += 2 * samples * (1 if inside else 1 - 1 / near)
            sent[False] += 2 * samples * (0 if inside else 1 / near)
    return sent[True], sent[False]


@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 12])
@pytest.mark.parametrize("placement", ["table_wise", "row_wise"])
def test_vectors_are_what_a_simulation_sends(placement: Placement, ranks: int) -> None:
    inside, beyond = exchanged_bytes(WORK, ranks, placement, NUMBER, NODE)
    near = min(NODE, ranks)
    ids = WORK.batch * WORK.fields * 12 / ranks
    one_inside, one_beyond = simulated(ranks, placement)
    assert inside - ids * (near - 1) == pytest.approx(one_inside)
    assert beyond - ids * (ranks - near) == pytest.approx(one_beyond)


def test_one_rank_sends_nothing_and_more_send_no_more_than_the_vectors_table_by_table() -> None:
    for placement in PLACEMENTS:
        assert exchanged_bytes(WORK, 1, placement) == (0.0, 0.0)
    all_vectors = WORK.batch * WORK.fields * (2 * WORK.width * NUMBER + 12)
    totals = [sum(exchanged_bytes(WORK, 2**n, "table_wise")) for n in range(11)]
    assert totals == sorted(totals) and totals[-1] < all_vectors
    by_rows = [sum(exchanged_bytes(WORK, 2**n, "row_wise")) for n in range(11)]
    assert by_rows[-1] > 500 * totals[-1], "row by row every rank takes part in the sums of all samples"


def test_rows_in_a_node_send_beyond_it_what_whole_tables_do() -> None:
    for ranks in (8, 16, 64):
        assert exchanged_bytes(WORK, ranks, "row_wise_in_node")[1] == exchanged_bytes(WORK, ranks, "table_wise")[1]
        assert exchanged_bytes(WORK, ranks, "row_wise_in_node")[0] > exchanged_bytes(WORK, ranks, "table_wise")[0]


def test_memory_is_shared_out_and_a_step_is_its_parts() -> None:
    gpus = Gpus()
    eight, sixteen = step(WORK, 8, "table_wise", gpus), step(WORK, 16, "table_wise", gpus)
    tables = WORK.rows * (WORK.width + 1) * 4
    assert eight.memory - sixteen.memory == pytest.approx(tables / 16)
    assert eight.products == pytest.approx(3 * WORK.flops * WORK.batch / (gpus.flops * gpus.mfu))
    assert eight.seconds == pytest.approx(eight.look_ups + eight.exchange + max(eight.products, eight.average))
    assert step(WORK.model_copy(update={"flops": 1e12}), 8, "table_wise").binds == "products"
    assert step(WORK, 1024, "row_wise").binds == "exchange"


def test_the_command_prints_how_a_recipe_grows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scale", "tokenmixer_large_7b", "--paper", "--set", "model.blocks=1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines if "table_wise" in line] == ["8", "16", "32", "64", "128", "256", "512", "1,024"]
