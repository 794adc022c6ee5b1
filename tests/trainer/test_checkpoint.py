"""Checkpoints without topology: saved at any ZeRO stage and rank count, loaded at any other."""

import json

import engine_ranks
import pytest

from shoal.trainer import checkpoint

pytestmark = pytest.mark.slow

RANKS = (1, 2, 3)
PLACES = {f"{stage} on {n}": (stage, n) for n in RANKS for stage in (0, 1, 2, 3)}
# Stage 0 is refused in bf16 (see TrainConfig); one source a stage, on differing numbers of ranks.
BF16_SOURCES = {"1 on 1": (1, 1), "2 on 2": (2, 2), "3 on 3": (3, 3)}
BF16_PLACES = {name: place for name, place in PLACES.items() if place[0]}
STEPS, MORE = 3, 2
# Losses near 4 have an ulp of 5e-7, and sums run in another order on other ranks and stages.
SUMMATION_ORDER = 2e-6
# bf16 keeps 8 bits of every weight and gradient, and ranks add gradients in bf16: the first loss
# differs by the rounding of activations, later ones by steps taken from differently rounded sums.
BF16_NOISE = 5e-3


def save_all(ranks, root, precision, places):
    """Train in every place with weights of its own, save, and go on."""
    answers = {}
    for number in RANKS:
        cases = {
            name: {
                "kind": "moe",
                "stage": stage,
                "seed": stage + 10 * number,
                "precision": precision,
                "steps": STEPS,
                "more": MORE,
                "schedule_steps": STEPS + MORE,
                "save": str(root / name),
            }
            for name, (stage, n) in places.items()
            if n == number
        }
        answers |= ranks(number).run(cases) if cases else {}
    return answers


def load_all(ranks, root, precision, sources, places):
    """Load every source in every place; return the answers by place and source."""
    answers = {}
    for number in RANKS:
        cases = {
            name: {
                "run": "load",
                "kind": "moe",
                "stage": stage,
                "precision": precision,
                "steps": STEPS + MORE,
                "more": MORE,
                "sources": {source: str(root / source) for source in sources},
            }
            for name, (stage, n) in places.items()
            if n == number
        }
        answers |= ranks(number).run(cases)
    return {name: answer["loads"] for name, answer in answers.items()}


@pytest.fixture(scope="module")
def fp32(ranks, tmp_path_factory):
    root = tmp_path_factory.mktemp("fp32")
    saved = save_all(ranks, root, "fp32", PLACES)
    return root, saved, load_all(ranks, root, "fp32", PLACES, PLACES)


@pytest.fixture(scope="module")
def bf16(ranks, tmp_path_factory):
    root = tmp_path_factory.mktemp("bf16")
    saved = save_all(ranks, root, "bf16", BF16_SOURCES)
    return root, saved, load_all(ranks, root, "bf16", BF16_SOURCES, BF16_PLACES)


def check_states(made):
    _, saved, loaded = made
    assert len({json.dumps(answer["state"]) for answer in saved.values()}) == len(saved)
    for place, loads in loaded.items():
        for source, answer in loads.items():
            assert answer["state"] == saved[source]["state"], f"{source} loaded as {place}"


def check_losses(made, tolerance):
    _, saved, loaded = made
    for place, loads in loaded.items():
        for source, answer in loads.items():
            want = saved[source]["more"]
            assert len(want) == MORE
            assert answer["more"] == pytest.approx(want, abs=tolerance), f"{source} as {place}"


def test_states_are_equal_bit_for_bit_everywhere(fp32):
    check_states(fp32)


def test_training_goes_on_as_if_nothing_had_happened(fp32):
    check_losses(fp32, SUMMATION_ORDER)


def test_the_same_place_continues_bit_for_bit(fp32):
    _, saved, loaded = fp32
    for place in PLACES:
        assert loaded[place][place]["more"] == saved[place]["more"], place


def test_bf16_masters_are_equal_bit_for_bit_everywhere(bf16):
    check_states(bf16)


def test_bf16_training_goes_on_within_its_noise(bf16):
    check_losses(bf16, BF16_NOISE)


def test_files_hold_what_the_engine_held(fp32):
    root, saved, _ = fp32
    for name in PLACES:
        found = checkpoint.newest_checkpoint(root / name)
        assert found is not None
        folder, manifest = found
        reader = checkpoint.TensorReader(folder, manifest)
        state = (
            (tensor, kind, reader.read(tensor, kind))
            for tensor, kinds in manifest.tensors.items()
            for kind in kinds
        )
        assert engine_ranks.fingerprints(state) == saved[name]["state"]


def test_there_is_no_pickle_and_one_file_a_rank(fp32):
    root, _, _ = fp32
    for name, (_, number) in PLACES.items():
        (folder,) = (root / name).glob("step-*")
        assert folder.name == "step-00000003"
        files = sorted(path.name for path in folder.iterdir())
        ours = [f"rank-{rank:05d}.safetensors" for rank in range(number)]
        assert files == ["manifest.json", *ours]
        sizes = [(folder / file).stat().st_size for file in ours]
        assert max(sizes) < 2.5 * sum(sizes) / number  # the work of writing is shared


def test_another_model_is_refused_before_anything_is_written(fp32, ranks):
    root, _, _ = fp32
    for kind in ("dense", "wide moe"):
        cases = {"load": {"run": "refused", "kind": kind, "stage": 3, "steps": 9,
                          "source": str(root / "1 on 2")}}  # fmt: skip
        answer = ranks(2).run(cases)["load"]
        assert answer["error"][0] == "DataError"
        assert "holds other parameters" in answer["error"][1]
        assert "step-00000003" in answer["error"][1] and answer["untouched"]
