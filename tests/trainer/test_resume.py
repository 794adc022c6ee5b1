"""Chains of segments on other ranks and stages against runs that nothing interrupted."""

import pytest
import torch
from engine_ranks import shape
from loop_runs import curve, make_case

from shoal.configs.errors import StoppedOnRequest
from shoal.trainer import checkpoint

pytestmark = pytest.mark.slow

SEGMENT = 2
"""Steps of every segment."""
CHAINS = {
    "ranks 1 2 4 1": [(1, 1), (2, 1), (4, 1), (1, 1)],
    "stages 0 1 2 3 1": [(2, 0), (2, 1), (2, 2), (2, 3), (2, 1)],
}
"""Ranks and stage of every segment."""
TOLERANCE = 1e-5
"""Of losses and weights. Ranks and stages add in other orders: measured are 5e-7, and 2e-7."""


def zero_gradients(kind):
    """Return the parameters whose true gradient is zero, and where: what Adam makes noise of.

    A bias of keys adds the same to every score of a query, which the softmax does not see. Adam
    divides what rounding leaves of such a gradient by its own size: a step of up to the rate.
    """
    width = shape(kind).width
    keys = slice(width, 2 * width)
    return {f"blocks.{block}.attention.qkv.bias": keys for block in range(shape(kind).num_layers)}


def run_at(ranks, place, folder, steps, stop_after=None):
    number, stage = place
    case = make_case(folder, run="loop", kind="gpt2", stage=stage, loader=True)
    case |= {"steps": steps} | ({"stop_after": stop_after} if stop_after else {})
    return ranks(number).run({"a": case})["a"]


def run_chain(ranks, places, folder):
    """Run the segments; return the keys of the rows that they took, by step."""
    keys, steps = {}, SEGMENT * len(places)
    for number, place in enumerate(places, 1):
        last = number == len(places)
        answer = run_at(ranks, place, folder, steps, None if last else SEGMENT)
        kind = answer["error"] and answer["error"][0]
        assert kind == (None if last else StoppedOnRequest.__name__), answer["error"]
        first = SEGMENT * (number - 1)
        keys |= {step: answer["keys"][step] for step in range(first, first + SEGMENT)}
    return keys


def read_weights(folder):
    found, manifest = checkpoint.newest_checkpoint(folder / "checkpoints")
    reader = checkpoint.TensorReader(found, manifest)
    return {name: reader.read(name) for name in manifest.tensors}


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_ends_where_an_uninterrupted_run_does(ranks, tmp_path, name):
    places = CHAINS[name]
    keys = run_chain(ranks, places, tmp_path / "chain")
    whole = run_at(ranks, places[0], tmp_path / "whole", SEGMENT * len(places))
    assert whole["error"] is None and keys == whole["keys"]
    assert len(set(map(tuple, keys.values()))) == SEGMENT * len(places), "rows differ by step"
    losses, wanted = curve(tmp_path / "chain"), curve(tmp_path / "whole")
    assert losses == pytest.approx(wanted, abs=TOLERANCE)
    assert wanted[len(wanted)] < wanted[1] - 0.3, "and something is learned"
    noise = zero_gradients("gpt2")
    found, true = read_weights(tmp_path / "chain"), read_weights(tmp_path / "whole")
    assert noise.keys() < found.keys() == true.keys()
    for tensor, value in found.items():
        gap = (value - true[tensor]).abs()
        if tensor in noise:
            gap[noise[tensor]] = 0
        assert float(gap.max()) <= TOLERANCE, tensor


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_same_ranks_and_stage_end_in_the_same_bits(ranks, tmp_path, stage):
    place = (2, stage)
    keys = run_chain(ranks, [place, place], tmp_path / "chain")
    assert keys == run_at(ranks, place, tmp_path / "whole", 2 * SEGMENT)["keys"]
    assert curve(tmp_path / "chain") == curve(tmp_path / "whole")
    found, true = read_weights(tmp_path / "chain"), read_weights(tmp_path / "whole")
    for tensor, value in found.items():
        assert torch.equal(value.view(torch.int32), true[tensor].view(torch.int32)), tensor
