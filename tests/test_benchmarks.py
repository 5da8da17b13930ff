"""The benchmark queue: what counts as done, and that every method is trained by the same schedule."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "scripts"))

import comparison
import forgetless as fl
import runs


def test_a_run_of_other_settings_or_of_an_earlier_code_does_not_count_as_done(small_run, tmp_path, monkeypatch):
    folder, results = tmp_path / "runs", tmp_path / "results.json"
    settings = small_run("seqft", tasks=("colour",), evaluate={"limit": 8, "scorers": ["choice"]})
    settings.pop("output_dir")
    folder.mkdir()
    (folder / "one.yaml").write_text(json.dumps(settings | {"output_dir": str(folder / "one")}))
    fl.run(settings | {"output_dir": str(folder / "one")})
    assert runs.recorded({"one": settings}, folder, results).keys() == {"one"}
    other = settings | {"seed": 1}
    assert not runs.recorded({"one": other}, folder, results) and runs.work("one", other, folder, results) == 2
    monkeypatch.setattr(runs, "RESULTS", tmp_path)
    runs.collect({"one": settings}, folder, results, "python x.py", lambda entries: {"general": 1})
    runs.collect({"one": settings}, folder, results, "python x.py")
    assert json.loads(results.read_text())["general"] == 1  # what was measured once stays
    assert runs.recorded({"one": settings}, tmp_path / "nothing", results)
    monkeypatch.setattr(runs, "CODE", runs.CODE + 1)
    assert not runs.recorded({"one": settings}, tmp_path / "nothing", results)


def test_the_panels_of_the_step_plot_are_all_measured():
    import plot_step

    def look(cells, ratio, path):
        for title, (places, row) in plot_step.panels(cells).items():
            assert len(places) == len(row) >= 3 and places == sorted(places), title
            assert all(cell["contenders"][name]["ratio"][ratio] > 0 for cell in row for name in plot_step.LINES)

    plot_step.main(look)


@pytest.mark.parametrize("rate", [2e-5, 1e-4, 4e-3])
def test_every_trial_ends_at_a_tenth_of_its_own_rate(rate):
    train = comparison.train(rate)
    assert train["learning_rate"] == rate and train["lr_scheduler_kwargs"]["lr_end"] == pytest.approx(rate / 10)
