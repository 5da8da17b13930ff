"""The documentation as a whole: links lead somewhere, the site builds without a warning and fetches nothing, what is made by a script is as the script makes it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from docs_reader import PAGES, ROOT, anchors, links

LINKED_FROM = [*PAGES, "CHANGELOG.md", "dev/LOG.md"]


def script(name: str):
    """A script of docs/figures as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "figures" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", LINKED_FROM)
def test_links_within_the_repository_lead_somewhere(page):
    dead = []
    for number, link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        made = target.parent == ROOT / "docs" / "reference"  # by the site, which holds links into it to their headings
        if not target.exists() and not made:
            dead.append(f"{page}:{number}: {link}: no such file")
        elif anchor and target.suffix == ".md" and not made and anchor not in anchors(target.relative_to(ROOT).as_posix()):
            dead.append(f"{page}:{number}: {link}: no such heading")
    assert not dead, "\n".join(dead)


def test_a_link_to_scaling_stands_where_the_page_does():
    linked = "](../scaling.md)" in (ROOT / "docs" / "howto" / "several_gpus.md").read_text()
    assert linked == (ROOT / "docs" / "scaling.md").exists()


def test_every_folder_that_a_page_names_is_there():
    named = {path for page in PAGES for path in re.findall(r"`((?:benchmarks|docs|dev|src|tests|examples)/[\w./-]+)`", (ROOT / page).read_text())}
    assert not [path for path in sorted(named) if not (ROOT / path).exists()]


# -- what is made ----------------------------------------------------------------------------------------------------------------------


def between(page: str, mark: str) -> str:
    text = (ROOT / page).read_text()
    assert f"<!-- {mark} -->\n" in text
    return text.partition(f"<!-- {mark} -->\n")[2].partition("\n<!-- end -->")[0]


@pytest.mark.parametrize("part", ["from the registry", "from docs/leaderboard.md"])
def test_what_choose_says_is_what_registry_and_leaderboard_say(part):
    mark, make = next((mark, make) for mark, make in script("choose").MADE.items() if mark.startswith(part))
    assert between("docs/choose.md", mark) == make(), "run: python docs/figures/choose.py"


def test_the_leaderboard_s_numbers_are_there_at_all():
    found = script("choose").board()
    assert set(found) == {"options", "bare"} and all({"gorp", "seqft"} <= rows.keys() for rows in found.values())


def test_the_table_of_7b_is_that_of_its_numbers():
    seven = script("seven_billion")
    assert between("docs/faq.md", "made by: python docs/figures/seven_billion.py") == seven.markdown(json.loads(seven.NUMBERS.read_text())["methods"])


def test_the_tables_of_70b_are_those_of_their_numbers():
    seventy = script("seventy_billion")
    found = json.loads(seventy.NUMBERS.read_text())["methods"]
    assert between("docs/scaling.md", "made by: python docs/figures/seventy_billion.py") == seventy.markdown(found)
    page, gorp = (ROOT / "docs" / "scaling.md").read_text(), found["`gorp`, `rank: 8`"]["sent"]
    assert f"sends {gorp['gradients_gathered_instead'] / gorp['a_choice']:.0f} times fewer bytes" in page
    assert f"as much as {(gorp['a_step']['weights'] + gorp['a_step']['gradients']) / gorp['a_choice']:.0f} choices" in page
    memory = json.loads((ROOT / "benchmarks" / "results" / "sharding_memory.json").read_text())
    assert all(f"| {name} | {one['peak_bytes'] / 1e9:.2f} | {one['measured'] / 1e9:.2f} |" in page for name, one in memory.items())


@pytest.mark.slow
def test_the_numbers_of_70b_are_what_estimate_says_now():
    seventy = script("seventy_billion")
    written, now = json.loads(seventy.NUMBERS.read_text())["methods"], seventy.plan()
    assert written.keys() == now.keys()
    for name in now:
        for key in ("a_step", "a_choice"):
            assert now[name]["sent"][key] == pytest.approx(written[name]["sent"][key]), f"{name}: run python docs/figures/seventy_billion.py"
        assert sum(now[name]["peak"].values()) == pytest.approx(sum(written[name]["peak"].values()), rel=0.02)


@pytest.mark.slow
def test_the_numbers_of_7b_are_what_estimate_says_now():
    seven = script("seven_billion")
    written, now = json.loads(seven.NUMBERS.read_text())["methods"], seven.plan()
    assert written.keys() == now.keys()
    for name in now:
        assert all(abs(written[name][key] / now[name][key] - 1) < 0.02 for key in ("peak", "last", "all")), (
            f"{name}: run python docs/figures/seven_billion.py"
        )


def test_numbers_beside_the_pictures_are_the_script_s():
    numbers, text = json.loads((ROOT / "benchmarks" / "results" / "explained.json").read_text()), (ROOT / "docs" / "explained.md").read_text()
    layers, leak = numbers["layers"], numbers["leak"]
    assert f"{layers['self_attn.q_proj']['closed']} of 576 hold 95 %" in text and f"{layers['mlp.down_proj']['closed']} of 1536" in text
    gate = layers["mlp.gate_proj"]
    assert f"{gate['new_gradient_in_space']:.0%}".replace("%", " %") + f" of their energy is taken off by {gate['closed']} directions" in text
    assert f"hold {gate['old_inputs_in_space']:.0%}".replace("%", " %") + " of the energy of the old task's inputs" in text
    halves = [
        f"{gate[key]:.0%}".replace("%", " %") for key in ("weight_energy_in_half", "input_energy_in_half", "input_energy_in_as_many_of_its_own")
    ]
    assert f"{halves[0]} of this weight and {halves[1]} of the old inputs" in text and f"would hold {halves[2]}" in text
    shares = [f"{100 * leak[name]['share_least']:.1f} to {100 * leak[name]['share_most']:.1f} %" for name in list(leak)[:2]]
    assert all(share in text for share in shares)


# -- the site --------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site; a warning is an error."""
    out = tmp_path_factory.mktemp("site") / "site"
    # never with --quiet: what is not said is not counted either
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(ROOT / "mkdocs.yml"), "-d", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, timeout=500)
    assert done.returncode == 0, done.stderr or done.stdout
    return out


def test_every_page_is_in_the_site_and_its_menu(site):
    menu = (site / "index.html").read_text()
    for page in PAGES:
        if page.startswith("docs/") and page != "docs/leaderboard_notes.md":
            place = "." if page == "docs/index.md" else page.removeprefix("docs/").removesuffix(".md") + "/"
            assert (site / place / "index.html").is_file() and f'href="{place}"' in menu, page


def test_nothing_is_fetched_from_elsewhere(site):
    fetched = re.compile(
        r'<(?:script|img|iframe|source)[^>]+src="(https?:)?//|<link[^>]+rel="(?:stylesheet|preconnect|icon|preload)"[^>]*href="(https?:)?//'
    )
    assert not [page for page in site.rglob("*.html") if fetched.search(page.read_text())]
    assert not [sheet for sheet in site.rglob("*.css") if re.search(r"url\(.?(https?:)?//|@import", sheet.read_text())]


def test_the_reference_has_every_command_every_method_and_every_public_name(site):
    import typer.main

    import forgetless as fl
    from forgetless import cli
    from forgetless.methods import REGISTRY

    page = {name: (site / "reference" / name / "index.html").read_text() for name in ("commands", "methods", "config", "runs", "optimizer", "dropin")}
    visible = [name for name, command in typer.main.get_command(cli.app).commands.items() if not command.hidden]
    assert not [name for name in visible if f'<h2 id="{name}"' not in page["commands"]]
    assert not [name for name in REGISTRY if f'<h2 id="{name}"' not in page["methods"]]
    whole = "".join(page.values())
    absent = [
        name for name in fl.__all__ if name not in ("methods", "Task", "TaskStream") and not re.search(rf'id="forgetless\.[\w.]*\.{name}"', whole)
    ]
    assert not absent


def test_a_file_outside_docs_that_a_page_links_to_is_in_the_site(site):
    assert (site / "repository" / "benchmarks" / "results" / "explained.json").is_file()
    assert "forgetless run examples/t5-large/order1.yaml" in re.sub(
        r"<[^>]+>", "", (site / "repository/examples/t5-large/order1.yaml/index.html").read_text()
    )
