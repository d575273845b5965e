"""The report is one file that opens offline, shows what was measured, and says why something is not shown."""

import base64
import json
import re
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from recipes import settings, write_recipe

from fastexperts import cli
from fastexperts.errors import FastexpertsError
from fastexperts.train import page as module
from fastexperts.train.page import check_plotting, page, plot_lines, plot_load, write_report

LAYERS = ["model.layers.1.mlp.experts", "model.layers.2.mlp.experts"]


def report(**changes):
    """What `describe_run` gives of a run on a GPU."""
    points = [(step, 1 / step) for step in (1, 2, 3)]
    health = ("max_violation", "entropy_normalized", "dead_experts", "logit_norm")
    return {
        "versions": {"fastexperts": "0.1", "torch": "2.13.0"},
        "python": "3.11.2",
        "device": "NVIDIA H100 80GB HBM3",
        "processes": 1,
        "threads": 8,
        "recipe": {
            "model": {"path": "org/<model>", "config": None, "overrides": {}},
            "data": {"files": ["a.jsonl", "b.jsonl"], "packing": True},
            "training": {"method": "full", "balancing": {"rate": 0.001}},
        },
        "parameters": 30_532_122_624,
        "steps": 3,
        "losses": points,
        "eval_losses": [(3, 0.5)],
        "performance": {"perf/tokens_per_s": 8912.4, "perf/mfu": 0.4071, "perf/peak_memory": 71.25},
        "mfu_not_logged": None,
        "series": dict.fromkeys(("perf/tokens_per_s", "perf/mfu", "perf/hfu"), points)
        | {f"routing/{name}{end}": points for name in health for end in ("", "_worst")},
        "routing": {
            "layers": LAYERS,
            "experts": [4, 4],
            "load_LE": [[4, 4, 4, 4], [16, 0, 0, 0]],
            "logs": [],
        },
    } | changes


class Reader(HTMLParser):
    """Tags, attributes and text of a page; fails on tags that are not closed in order."""

    VOID = ("meta", "img")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)

    def images(self):
        return [attributes for tag, attributes in self.tags if tag == "img"]


def test_the_page_is_whole_by_itself():
    text = page(report(), "Training run")
    read = Reader(text)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in read.tags}
    prefix = "data:image/svg+xml;base64,"
    for attributes in read.images():
        assert attributes["src"].startswith(prefix)
        assert attributes["alt"]
        drawn = ET.fromstring(base64.b64decode(attributes["src"].removeprefix(prefix)))
        assert drawn.tag == "{http://www.w3.org/2000/svg}svg"
        for node in drawn.iter():
            links = [value for name, value in node.attrib.items() if name.endswith("href")]
            assert all(link.startswith(("#", "data:")) for link in links)
    assert len(read.images()) == 8, "loss, tokens, MFU, load, and four of health"
    assert not re.search(r"https?://|url\(|@import", re.sub(r"base64,[^']*", "", text))
    assert page(report(), "Training run") == text, "it depends on the report alone"


def test_the_page_shows_what_was_measured():
    shown = " ".join(Reader(page(report(), "Training run")).texts)
    for wanted in (
        "org/<model>, 30,532,122,624 parameters, trained in full, 3 steps on NVIDIA H100 80GB HBM3",
        "0.3333 training loss",
        "0.5000 evaluation loss",
        "8,912 tokens per second",
        "40.7% MFU",
        "71.2 peak memory",
        "0.33 max violation",
        "training.balancing.rate 0.001",
        "a.jsonl, b.jsonl",
        "torch 2.13.0",
    ):
        assert wanted in shown, wanted
    assert "Proof" not in shown, "it was not asked for"


def test_what_is_not_there_is_said():
    series = {name: points for name, points in report()["series"].items() if name == "perf/tokens_per_s"}
    nothing = {"layers": [], "experts": [], "load_LE": [], "logs": []}
    cpu = report(
        device="cpu",
        series=series,
        performance={"perf/tokens_per_s": 100.0},
        mfu_not_logged="the peak of cpu is not known.",
        routing=nothing,
        eval_losses=[],
    )
    read = Reader(page(cpu, "Training run"))
    shown = " ".join(read.texts)
    assert "Not logged: the peak of cpu is not known." in shown
    assert "Not logged: no experts in transformers' interface" in shown
    assert "MFU, median" not in shown
    assert len(read.images()) == 2
    assert "Not logged." in page(cpu | {"series": {}}, "Training run")


def test_routers_without_logits_have_no_plot_of_them():
    series = {name: points for name, points in report()["series"].items() if "logit" not in name}
    shown = Reader(page(report(series=series), "Training run"))
    assert len(shown.images()) == 7
    assert "Router logits" not in " ".join(shown.texts)


def test_the_proof_and_samples_of_the_demo():
    checks = [
        {"name": "logits", "measured": 2e-6, "limit": 1e-5, "passed": True, "detail": "eager: 1e-6"},
        {"name": "<gradients>", "measured": 0.5, "limit": 1e-3, "passed": False, "detail": "w & v"},
    ]
    text = page(report(checks=checks, samples=["a <b>line</b>"]), "fastexperts demo")
    shown = " ".join(Reader(text).texts)
    assert "logits 2e-06 1e-05 ok eager: 1e-6" in shown
    assert "<gradients> 0.5 0.001 FAILED w & v" in shown
    assert text.count("class='failed'") == 1
    assert "a <b>line</b>" in shown
    assert "<b>line" not in text


def test_the_heatmap_is_load_over_the_mean():
    """A layer of fewer experts has empty cells, and a layer without tokens is all zero."""
    figure = plot_load([[1, 3, 0, 0], [5, 5, 5, 1], [0, 0, 0, 0]], [2, 4, 4], [*LAYERS, "x"])
    axes = figure.axes[0]
    drawn = np.ma.filled(axes.images[0].get_array(), np.nan)
    want = [[0.5, 1.5, np.nan, np.nan], [1.25, 1.25, 1.25, 0.25], [0, 0, 0, 0]]
    np.testing.assert_allclose(drawn, want)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "2", "2"]
    norm = axes.images[0].norm
    assert (norm(0), norm(1), norm(2)) == (0, 0.5, 1), "white is 1"


def test_lines_are_the_points():
    axes = plot_lines({"one": [(1, 2.0), (5, 3.0)], "single": [(2, 1.0)]}).axes[0]
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[1, 2], [5, 3]], [[2, 1]]]
    assert axes.lines[1].get_marker() == "o", "or it would not be seen"
    assert axes.get_ylim()[0] == 0


def test_without_matplotlib_the_numbers_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    said = write_report(tmp_path, report(), "Training run")
    assert said == "report.json; no report.html: plots need matplotlib: pip install 'fastexperts[plot]'"
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    with pytest.raises(FastexpertsError, match=r"fastexperts\[plot\]"):
        check_plotting()


def test_training_writes_it(tmp_path, monkeypatch, capsys):
    content = settings(tmp_path, steps=3)
    path = write_recipe(tmp_path, content)
    monkeypatch.setattr(sys, "argv", ["fastexperts", "train", str(path)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert (stopped.value.code or 0) == 0
    assert f"In {tmp_path / 'run'}: report.html, report.json" in capsys.readouterr().out
    written = json.loads((tmp_path / "run/report.json").read_text())
    shown = Reader((tmp_path / "run/report.html").read_text())
    assert "Not logged: the peak of cpu is not known." in " ".join(shown.texts)
    assert len(shown.images()) == 7, "no MFU on a CPU"
    assert [step for step, _ in written["series"]["routing/max_violation"]] == [1, 2, 3]
    assert len(written["routing"]["logs"]) == 3
    assert "lora" not in written["recipe"]
