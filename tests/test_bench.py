"""python -m forgetless.bench: what a cell holds, what is kept when it is started again, what is counted as memory and as a leak. Nothing here asserts a time."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
import torch
from torch import nn

from forgetless.bench import memory, osft, refresh, step
from forgetless.bench.__main__ import main
from forgetless.bench.measure import Times, interleaved, live_bytes
from forgetless.bench.results import Results

OPTIONS = ["osft", "--shapes", "48x32", "--tokens", "8", "--repeats", "2"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The file of one call: a tall, a square and a wide layer, half frozen, all contenders that are here."""
    path = tmp_path_factory.mktemp("bench") / "made" / "out.json"
    assert main([*OPTIONS, "--shapes", "48x32", "32x32", "32x48", "--frozen", "0.5", "--out", str(path)]) == 0
    return json.loads(path.read_text())


def test_a_cell_says_what_was_measured_on_what_and_with_which_versions(measured):
    assert [cell["shape"] for cell in measured["cells"]] == [[48, 32], [32, 32], [32, 48]]
    assert measured["environment"]["device"] == "cpu" and measured["environment"]["cores"]
    for cell in measured["cells"]:
        assert cell["versions"]["torch"] and cell["versions"]["peft"]
        assert cell["settings"]["contenders"] == list(cell["contenders"]) and cell["settings"]["repeats"] == 2
        for name, own in cell["contenders"].items():
            for clock in ("cpu", "wall"):
                assert own["seconds"][clock]["low"] <= own["seconds"][clock]["median"] <= own["seconds"][clock]["high"]
                assert len(own["raw"][clock]) == 2
            assert list(own["phases"]) == ["forward", "backward", "step"]
            assert (own["init"] is None) == (name == "adamw")
            assert own["ratio"]["adamw"]["bytes"] == own["bytes"] / cell["contenders"]["adamw"]["bytes"]
        assert cell["contenders"]["adamw"]["ratio"]["adamw"]["time"] == 1 == cell["contenders"]["peft-osf"]["ratio"]["peft-osf"]["init"]


def test_the_leak_of_ours_is_rounding_and_the_peers_is_not(measured):
    for cell in measured["cells"]:
        for name, own in cell["contenders"].items():
            if name in ("adamw", "peft-osf"):
                assert own["leak"] > 0.1, name
            elif name == "mini-trainer":
                assert own["leak"] < 1e-3
            else:
                assert own["leak"] < 1e-5, name
    assert measured["cells"][0]["contenders"]["coordinates"]["trains"] == {"elements": 48 * 32, "dtypes": ["float32"]}


def test_memory_is_that_of_a_layer_counted_by_hand(measured):
    square = measured["cells"][1]["contenders"]
    n, k, step = 32, 16, 4
    assert square["adamw"]["bytes"] == 4 * (4 * n * n) + step  # weight, gradient, two moments
    low = 2 * n * (n - k) + (n - k)  # U, V, S
    # the weight; the factors as they began, and as they are, with gradients and moments; its S_low is a view that keeps the k other values alive
    assert square["peft-osf"]["bytes"] == 4 * (n * n + 5 * low + k) + 3 * step


def test_a_storage_counts_once_wherever_it_is_held():
    class Holder:
        pass

    W = nn.Parameter(torch.zeros(6, 4))
    W.grad = torch.ones(6, 4)
    holder = Holder()
    holder.views = {"row": W[0], "turned": (W.mT, [W.detach()])}
    holder.itself = holder
    assert live_bytes(holder) == 6 * 4 * 4  # the leaf with the gradient is not among the views
    assert live_bytes(holder, W) == 2 * 6 * 4 * 4
    assert live_bytes(nn.Linear(4, 6), holder) == (6 * 4 + 6 + 6 * 4) * 4
    assert live_bytes(torch.zeros(100)[:2]) == 400  # what a view keeps alive


def test_contenders_take_turns():
    order = []
    times = interleaved({name: {"only": lambda name=name: order.append(name)} for name in "ABC"}, 3, torch.device("cpu"))
    assert "".join(order) == "ABCABCABC"
    assert all(isinstance(t, Times) and len(t.cpu) == len(t.wall) == len(t.phases["only"]) == 3 for t in times.values())


def test_groups_hold_adamw_and_a_ratio_across_groups_says_what_it_went_through(tmp_path):
    names = ["adamw", "peft-osf", "coordinates"]
    assert osft.groups(names, 1000, 0) == [["adamw", "peft-osf"], ["adamw", "coordinates"]]
    assert osft.groups(["adamw"], 1000, 0) == [["adamw"]]
    path = tmp_path / "out.json"
    main([*OPTIONS, "--frozen", "0.5", "--contenders", *names[1:], "--memory", "0", "--out", str(path)])
    cell = json.loads(path.read_text())["cells"][0]
    assert cell["groups"] == [["adamw", "peft-osf"], ["adamw", "coordinates"]]
    ours, peft = (cell["contenders"][name]["ratio"] for name in ("coordinates", "peft-osf"))
    assert ours["peft-osf"]["through"] == "adamw" and "through" not in peft["peft-osf"]
    assert ours["peft-osf"]["time"] == pytest.approx(ours["adamw"]["time"] / peft["adamw"]["time"])


def test_measured_cells_are_kept_until_settings_or_versions_change(tmp_path, monkeypatch, capsys):
    path = tmp_path / "out.json"
    command = [*OPTIONS, "--contenders", "coordinates", "--out", str(path)]

    def cells(*more: str) -> list:
        main([*command, *more])
        return json.loads(path.read_text())["cells"]

    first = cells("--frozen", "0.5")
    monkeypatch.setattr(osft, "measure", lambda *_: pytest.fail("measured again"))
    assert cells("--frozen", "0.5") == first
    assert "kept" in capsys.readouterr().err
    monkeypatch.undo()
    both = cells("--frozen", "0.5", "0.75")
    assert both[0] == first[0] and [cell["frozen"] for cell in both] == [0.5, 0.75]
    again = cells("--frozen", "0.5", "--again")
    assert len(again) == 2 and both[1] in again and first[0] not in again
    assert len(cells("--frozen", "0.5", "--repeats", "3")) == 3  # other settings stand beside the first
    real = osft.versions
    monkeypatch.setattr(osft, "versions", lambda *names: real(*names) | {"torch": "0"})
    assert len(cells("--frozen", "0.5")) == 3  # another version takes the place of what it measured before


def test_a_missing_peer_is_named_and_the_rest_is_measured(tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "mini_trainer" else find(name, *rest))
    for name in [name for name in sys.modules if name.partition(".")[0] == "mini_trainer"]:
        monkeypatch.delitem(sys.modules, name)
    path = tmp_path / "out.json"
    assert main([*OPTIONS, "--frozen", "0.5", "--contenders", "mini-trainer", "coordinates", "--out", str(path)]) == 0
    written, shown = json.loads(path.read_text()), capsys.readouterr()
    assert "pip install" in written["missing"]["mini-trainer"] and written["cells"][0]["missing"] == written["missing"]
    assert list(written["cells"][0]["contenders"]) == ["adamw", "coordinates"]
    assert "without mini-trainer: not installed" in shown.out and "without mini-trainer" in shown.err


def test_bf16_layers_and_named_shapes(tmp_path, capsys):
    path = tmp_path / "out.json"
    main([*OPTIONS, "--frozen", "0.5", "--dtype", "bf16", "--contenders", "peft-osf", "coordinates", "--out", str(path)])
    found = json.loads(path.read_text())["cells"][0]["contenders"]
    assert found["coordinates"]["trains"]["dtypes"] == ["bfloat16"] and found["adamw"]["bytes"] == 4 * 2 * 48 * 32 + 4
    assert osft.shape("t5-large") == [(1024, 1024), (4096, 1024), (1024, 4096)] and osft.shape("8x6") == [(8, 6)]
    for wrong in (["--shapes", "8by6"], ["--frozen", "1.5"], ["--tokens", "0"], ["--contenders", "nobody"]):
        with pytest.raises(SystemExit):
            main(["osft", *wrong])
    assert "neither OUTxIN" in capsys.readouterr().err


def test_a_file_of_something_else_is_not_overwritten(tmp_path, capsys):
    path = tmp_path / "out.json"
    path.write_text("[1, 2]")
    assert main([*OPTIONS, "--out", str(path)]) == 2
    assert "holds no cells" in capsys.readouterr().err and path.read_text() == "[1, 2]"
    assert Results(tmp_path / "none.json", osft.KEY).cells == []


# -- step ------------------------------------------------------------------------------------------------------------------------------

STEP = ["step", "--layers", "1", "--repeats", "2", "--refreshes", "1"]


def test_a_step_is_measured_plain_and_choosing_and_its_state_has_nothing_hidden(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(step.BLOCKS, "small", ([(48, 32), (32, 48)], 2))
    path = tmp_path / "out.json"
    names = ["adamw-foreach", "gorp", "gorp-warm", "gorp-open", "gorp-dense", "gorp-released"]
    assert main([*STEP, "--shapes", "small", "--rank", "4", "--space", "6", "--contenders", *names, "--out", str(path)]) == 0
    cell = json.loads(path.read_text())["cells"][0]
    found = cell["contenders"]
    assert list(found) == ["adamw", *names] and cell["elements"] == 2 * 48 * 32 and cell["settings"]["onednn"] in (True, False)
    for name, own in found.items():
        assert len(own["raw"]["cpu"]) == 2 and own["ratio"]["plain"] > 0
        assert ("refresh" in own) == ("gap 10" in own["ratio"]) == (name in ("gorp", "gorp-warm", "gorp-open", "gorp-released"))
        assert own.get("hidden_bytes", 0) == 0, name
    assert found["adamw"]["bytes"] == 8 * 2 * 48 * 32 + 2 * 4  # two moments, a step count a tensor
    # two moments (out, r), Q (in, r), S (in, k), a step count and a count of updates a tensor
    assert found["gorp"]["bytes"] == sum(4 * (2 * m * 4 + n * 4 + n * 6) + 12 for m, n in ((48, 32), (32, 48)))
    assert found["gorp"]["bytes"] - found["gorp-open"]["bytes"] == 4 * 6 * (32 + 48)
    shown = capsys.readouterr().out
    assert "small x 1" in shown and "gorp-warm" in shown
    main([*STEP, "--shapes", "small", "--rank", "4", "--space", "6", "--contenders", *names, "--out", str(path)])
    assert "measured before, kept" in capsys.readouterr().err


def test_a_step_without_a_peer_and_a_rank_that_does_not_fit(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "galore_torch", None)  # import fails
    path = tmp_path / "out.json"
    assert main([*STEP, "--rank", "2", "--space", "0", "--contenders", "galore-torch", "--out", str(path)]) == 0
    assert list(json.loads(path.read_text())["cells"][0]["contenders"]) == ["adamw"] and "without galore-torch" in capsys.readouterr().out
    assert main([*STEP, "--rank", "8", "--space", "190", "--out", str(path)]) == 2
    assert "do not fit the narrowest layer of smollm2, of 192" in capsys.readouterr().err


def test_a_refresh_says_how_much_of_the_best_directions_it_holds_and_stays_off_the_space(tmp_path, capsys):
    path = tmp_path / "out.json"
    assert main(["refresh", "--shapes", "48x40", "40x48", "--rank", "4", "--space", "6", "--repeats", "2", "--out", str(path)]) == 0
    cells = json.loads(path.read_text())["cells"]
    assert [cell["shape"] for cell in cells] == [[48, 40], [40, 48]] and list(cells[0]["rules"]) == list(refresh.RULES)
    for cell in cells:
        for rule, own in cell["rules"].items():
            assert (
                own["captured"]["median"] == pytest.approx(1, abs=1e-3)
                if rule not in ("cold", "warm")
                else 0.5 < own["captured"]["median"] < 1 + 1e-6
            )
            assert own["closed"] < 1e-5 and len(own["raw"]["cpu"]) == 2
    assert "captured" in capsys.readouterr().out
    assert main(["refresh", "--shapes", "48x40", "--rank", "30", "--space", "20", "--out", str(path)]) == 2
    assert "do not fit a layer of 48x40" in capsys.readouterr().err


def test_a_training_step_is_measured_whole_beside_adamw_on_the_same_layers(tmp_path, capsys):
    path = tmp_path / "out.json"
    options = ["train", "--shapes", "tiny", "--space", "4", "--tokens", "12", "--rows", "2", "--repeats", "2", "--out", str(path)]
    assert main([*options, "--contenders", "gorp", "gorp-rank-8-warm", "osft-75", "osft-adapter-75", "lora"]) == 0
    cells = {cell["contender"]: cell for cell in json.loads(path.read_text())["cells"]}
    assert list(cells) == ["gorp", "gorp-rank-8-warm", "osft-75", "osft-adapter-75", "lora"]
    linear = 2 * (32 * 32 * 2 + 16 * 32 * 2 + 3 * 32 * 64)  # query, output; key, value; the MLP; of two blocks
    for name, own in cells.items():
        assert own["tokens"] == 12 and own["space"] == 4
        assert list(own["phases"]) == ["forward", "backward", "statistics", "step"] and len(own["raw"]["own"]["cpu"]) == 2
        assert own["ratio"]["bytes"] == own["bytes"] / own["adamw"]["bytes"] and own["ratio"]["time"] > 0
        # every number of the model, a gradient and two moments of what learns; a step count a tensor
        rest = own["adamw"]["bytes"] - (4 * (linear + 128 * 32 + 5 * 32) + 3 * 4 * linear + 14 * 4)
        assert 0 <= rest < 200, name  # rotary frequencies
    assert cells["osft-75"]["bytes"] < cells["gorp"]["bytes"]
    assert "gorp-rank-8-warm" in capsys.readouterr().out
    assert main(
        [*options, "--contenders", "lora", "lora-4bit"]
    ) == 0 and "lora: 2 blocks of tiny, 2 rows of 12 tokens, 4 directions closed: measured before" in (capsys.readouterr().err)
    small = {cell["contender"]: cell for cell in json.loads(path.read_text())["cells"]}
    assert len(small) == 6 and small["lora-4bit"]["bytes"] < small["lora"]["bytes"]
    assert main([*options, "--space", "40"]) == 2 and main([*options, "--tokens", "3"]) == 2
    err = capsys.readouterr().err
    assert "have 32 inputs" in err and "more than the 4 tokens" in err


def test_the_most_a_process_holds_is_measured_in_a_process_of_its_own(tmp_path, capsys, monkeypatch):
    path, apart, names = tmp_path / "out.json", memory.apart, []
    # one contender really in a process of its own; the others here, which is quicker
    monkeypatch.setattr(memory, "apart", lambda key, name, *more: (apart if name == "adamw" else here)(key, name, *more))

    def here(key, name, *more):
        names.append(name)
        return memory.peaks(key, name, *more) | {"peak": 1000 * len(names)}  # what this process has held at most says nothing of one contender

    options = ["memory", "--shapes", "tiny", "--space", "4", "--tokens", "12", "--rows", "2", "--out", str(path)]
    assert main([*options, "--contenders", "gorp-rank-8-kept", "gorp-rank-8"]) == 0
    found = json.loads(path.read_text())["cells"][0]["contenders"]
    assert list(found) == ["adamw", "gorp-rank-8-kept", "gorp-rank-8"] and names == list(found)[1:]
    linear = 2 * (32 * 32 * 2 + 16 * 32 * 2 + 3 * 32 * 64)
    for name, own in found.items():
        assert 4 * (linear + 128 * 32 + 5 * 32) <= own["weights"] < own["after_backward"], name
    assert found["adamw"]["peak"] > found["adamw"]["weights"] and memory.resident("VmHWM") >= memory.resident("VmRSS") > 0
    assert (
        found["gorp-rank-8-kept"]["after_backward"] - found["gorp-rank-8"]["after_backward"] > 0.7 * 4 * linear
    )  # all gradients but for what is read of them
    out = capsys.readouterr().out
    assert "x kept" in out and out.splitlines()[3].split()[-2] == "2.00"  # gorp-rank-8's over gorp-rank-8-kept's
