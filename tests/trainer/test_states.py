"""States that differ by parameter: frozen, tied, untouched, of another optimiser."""

import pytest
import torch

from shoal.trainer import checkpoint

pytestmark = pytest.mark.slow

KINDS = {
    "small part beside frozen weights": {"kind": "dense", "trained": ["blocks.1.", "final_norm"]},
    "momentum, idle expert, unused": {
        "kind": "moe", "optimizer": "mixed", "idle_expert": 3, "unused": True,
    },
}  # fmt: skip
SOURCES = {f"{stage} on 2": (stage, 2) for stage in (0, 1, 2, 3)}
PLACES = SOURCES | {f"{stage} on 3": (stage, 3) for stage in (0, 1, 3)}
STEPS, MORE = 3, 2
SUMMATION_ORDER = 2e-6  # as in test_checkpoint.py


def places_on(number, places):
    return {name: stage for name, (stage, n) in places.items() if n == number}


@pytest.fixture(scope="module", params=KINDS)
def made(request, ranks, tmp_path_factory):
    """A checkpoint of every stage, loaded at every stage and on more ranks."""
    root, common = tmp_path_factory.mktemp("states"), KINDS[request.param]
    common = common | {"schedule_steps": STEPS + MORE, "more": MORE}
    saved = ranks(2).run(
        {
            name: common | {"stage": stage, "seed": stage, "steps": STEPS, "save": str(root / name)}
            for name, stage in places_on(2, SOURCES).items()
        }
    )
    sources = {name: str(root / name) for name in SOURCES}
    loaded = {}
    for number in (2, 3):
        cases = {
            name: common
            | {"run": "load", "stage": stage, "steps": STEPS + MORE}
            | {"sources": sources}
            for name, stage in places_on(number, PLACES).items()
        }
        loaded |= ranks(number).run(cases)
    return request.param, root, saved, loaded


def read_whole(root, source):
    found = checkpoint.newest_checkpoint(root / source)
    reader = checkpoint.TensorReader(*found)
    return {
        name: {state: reader.read(name, state) for state in states}
        for name, states in found[1].tensors.items()
    }


def test_every_state_is_equal_bit_for_bit_and_training_goes_on(made):
    _, _, saved, loaded = made
    for place, answer in loaded.items():
        for source, load in answer["loads"].items():
            assert load["state"] == saved[source]["state"], f"{source} loaded as {place}"
            wanted = pytest.approx(saved[source]["more"], abs=SUMMATION_ORDER)
            assert load["more"] == wanted, f"{source} loaded as {place}"


@pytest.mark.parametrize("source", SOURCES)
def test_a_checkpoint_holds_what_there_is_of_a_parameter(made, source):
    kind, root, _, _ = made
    for name, states in read_whole(root, source).items():
        if "trained" in KINDS[kind]:
            trained = name.startswith(tuple(KINDS[kind]["trained"]))
            wanted = {"weight", "exp_avg", "exp_avg_sq"} if trained else {"weight"}
        else:
            moved = states["weight"].ndim >= 2
            wanted = {"weight", "momentum"} if moved else {"weight", "exp_avg", "exp_avg_sq"}
        assert states.keys() == wanted, name
        if wanted != {"weight"} and name != "unused":
            assert all(bool(value.any()) for value in states.values()), name


@pytest.mark.parametrize("source", SOURCES)
def test_odd_parameters_are_there_once_and_untouched(made, source):
    kind, root, _, _ = made
    held = read_whole(root, source)
    if "trained" in KINDS[kind]:
        shapes = [tuple(states["weight"].shape) for states in held.values()]
        assert shapes.count((64, 32)) == 1, "the head is the embedding"
        return
    assert torch.equal(held["unused"]["weight"], torch.linspace(1, 2, 5))
    assert not held["unused"]["exp_avg"].any() and not held["unused"]["exp_avg_sq"].any()
    experts = [states for states in held.values() if states["weight"].ndim == 3]
    assert len(experts) == 4
    for states in experts:
        assert not states["momentum"][3].any(), "the idle one"
        assert all(bool(states["momentum"][expert].any()) for expert in (0, 1, 2))
        assert all(bool(states["weight"][expert].any()) for expert in range(4))


def test_another_optimiser_is_refused(made, ranks):
    kind, root, _, _ = made
    other = next(values for name, values in KINDS.items() if name != kind)
    case = KINDS[kind] | {"optimizer": other.get("optimizer", "adamw"), "trained": [""]}
    case |= {"run": "refused", "stage": 3, "steps": 9, "source": str(root / "2 on 2")}
    answer = ranks(2).run({"a": case})["a"]
    assert answer["error"][0] == "DataError" and answer["untouched"]
    assert "holds other states of" in answer["error"][1]
