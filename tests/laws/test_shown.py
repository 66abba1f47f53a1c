"""What a call found, as text, in a notebook, as a data frame and in a logger: the same numbers everywhere."""

import re

import cases
import pytest
from cases import CASES

import torch_flowprune as fp
from torch_flowprune.tables import Table

BATCHES = CASES["mlp"].batches((4, 4))
SHOWN = {
    "report": lambda: fp.global_prune(cases.mlp(), "magnitude", 0.5),
    "scores": lambda: fp.scores(cases.mlp(), "magnitude"),
    "diagnosis": lambda: fp.diagnose(cases.mlp(), BATCHES),
    "comparison": lambda: fp.compare(cases.mlp(), ["magnitude", "snip"], [0.3, 0.6], BATCHES, held_out=BATCHES),
    "coupling": lambda: fp.couple(cases.mlp(), BATCHES[0][0]),
}


def test_a_table_is_aligned_and_escaped():
    table = Table(("name", "n"), [("a<b", "1"), ("long one", "1,000")])
    assert str(table).splitlines() == ["name          n", "a<b           1", "long one  1,000"]
    assert "a&lt;b" in table.html()
    assert table.html().count("<tr>") == 3
    assert '<td style="text-align: right">1,000</td>' in table.html()


@pytest.mark.parametrize("kind", SHOWN)
def test_a_notebook_shows_the_numbers_of_the_text(kind):
    found = SHOWN[kind]()
    html = found._repr_html_()
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", html)
    assert cells
    text = str(found)
    assert all(cell in text for cell in cells if cell and kind != "coupling")
    assert html.count("<tr>") == html.count("</tr>") > 1
    if kind == "coupling":
        assert "0.weight" in cells
        assert "2 groups; 75% of the output channels can be removed" in html


def test_a_frame_has_a_row_a_layer():
    pytest.importorskip("pandas")
    report = SHOWN["report"]()
    frame = report.to_dataframe()
    assert list(frame["name"]) == [layer.name for layer in report.layers]
    assert frame["pruned"].sum() == report.pruned
    assert list(frame["sparsity"]) == [layer.sparsity for layer in report.layers]
    comparison = SHOWN["comparison"]()
    assert list(comparison.to_dataframe()["loss"]) == [outcome.loss for outcome in comparison.outcomes]


class Run:
    """As a run of wandb takes values."""

    def __init__(self):
        self.logged = []

    def log(self, values, step=None):
        self.logged.append((values, step))


def test_a_report_is_logged_by_whatever_logs():
    report, run = SHOWN["report"](), Run()
    report.log(run, step=3)
    ((values, step),) = run.logged
    assert step == 3
    assert values["pruning/sparsity"] == report.sparsity
    assert values["pruning/sparsity/0.weight"] == report.layers[0].sparsity
    channels = fp.global_prune(cases.mlp(), "magnitude", 0.5, granularity="channel", example_inputs=BATCHES[0][0])
    channels.log(run)
    assert run.logged[1][0]["pruning/parameters"] == channels.left.parameters
    with pytest.raises(TypeError, match=r"writer should have add_scalar\(tag, value, step\).*; got int"):
        report.log(3)


def test_a_report_is_logged_by_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    report = SHOWN["report"]()
    with SummaryWriter(tmp_path) as writer:
        report.log(writer, 7)
    events = EventAccumulator(str(tmp_path)).Reload()
    (event,) = events.Scalars("pruning/sparsity")
    assert (event.step, event.value) == (7, pytest.approx(report.sparsity))
