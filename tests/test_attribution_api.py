"""What all methods share: presets, chunks that fit the memory, the progress bar, and replaced operations."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cxrkit
from cxrkit.attribution import progress, registry
from cxrkit.attribution.operations import plain_name, traced
from cxrkit.errors import AttributionError, ParameterError


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        x = self.act(self.conv(x))
        x = F.relu(x + 0.1, inplace=True)
        return self.head(self.act(x * 2).mean((2, 3)))


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return Tiny()


@pytest.fixture
def images():
    return torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def probe(monkeypatch):
    """A registered method whose function a test can set."""

    def register(function, options=(), **changes):
        base = registry.card("saliency")
        card = dataclasses.replace(base, name="probe", options=options, **changes)
        entry = registry.Entry(card, function, lambda model: True)
        monkeypatch.setitem(registry._entries, "probe", entry)

    return register


def test_a_preset_sets_options_and_output_and_what_is_named_beside_it_wins(tiny, images, probe):
    seen = []

    def function(explained, images, *, window=1, stride=1):
        seen.append((explained.output, window, stride))
        return images.expand(-1, 2, -1, -1)

    probe(function, ("window", "stride"), presets={"covid": {"window": 50, "stride": 4, "output": "probability"}})
    cxrkit.attribute(tiny, images[:2], "probe", preset="covid")
    cxrkit.attribute(tiny, images[:2], "probe", preset="covid", window=7)
    cxrkit.attribute(tiny, images[:2], "probe", preset="covid", output="logit")
    cxrkit.attribute(tiny, images[:2], "probe")
    assert seen == [("probability", 50, 4), ("probability", 7, 4), ("logit", 50, 4), ("logit", 1, 1)]
    with pytest.raises(ParameterError, match=r"unknown preset of probe: 'covi'; did you mean 'covid'"):
        cxrkit.attribute(tiny, images[:2], "probe", preset="covi")


def test_every_preset_names_options_that_exist():
    for card in registry.methods():
        for paper, settings in card.presets.items():
            assert paper in ("bcos", "normgrad", "covid", "path", "relevance"), (card.name, paper)
            assert set(settings) <= {*card.options, "output"}, (card.name, paper)
            assert settings.get("output", "logit") in card.outputs, (card.name, paper)


def test_a_chunk_that_does_not_fit_is_halved_and_nothing_is_lost_or_done_twice(tiny, images, probe):
    sizes, rows = [], []

    def function(explained, images):
        sizes.append(len(images))
        if len(images) > 2:
            raise torch.OutOfMemoryError("made up")
        rows.append((explained.first_row, len(images)))
        return images.expand(-1, 2, -1, -1)

    probe(function)
    maps = cxrkit.attribute(tiny, images, "probe")
    assert torch.equal(maps, images.expand(-1, 2, -1, -1))
    assert sizes == [4, 2, 2, 1]
    assert rows == [(0, 2), (2, 2), (4, 1)]
    with pytest.raises(torch.OutOfMemoryError):
        cxrkit.attribute(tiny, images, "probe", chunk=4)  # the caller's own size is kept


def test_one_image_that_does_not_fit_is_an_error(tiny, images, probe):
    def function(explained, images):
        raise torch.OutOfMemoryError("made up")

    probe(function)
    with pytest.raises(torch.OutOfMemoryError):
        cxrkit.attribute(tiny, images, "probe")


def test_weights_keep_their_storage_and_their_order(tiny, images):
    before = [(p.data_ptr(), p.stride()) for p in tiny.parameters()]
    cxrkit.attribute(tiny, images, "saliency")
    assert [(p.data_ptr(), p.stride()) for p in tiny.parameters()] == before


def test_the_share_of_work_done_rises_to_the_end(tiny, images, probe, monkeypatch):
    shares = []

    def function(explained, images):
        list(explained.steps(range(3)))
        return images.expand(-1, 2, -1, -1)

    class Bar:
        def __enter__(self):
            return shares.append

        def __exit__(self, *error):
            return None

    monkeypatch.setattr("cxrkit.attribution.api.progress_bar", lambda shown, text: Bar())
    probe(function)
    cxrkit.attribute(tiny, images, "probe", chunk=2)
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert 0.8 < shares[-1] < 1
    assert len(shares) == 9


def test_the_bar_shows_when_asked_and_only_after_a_while(capsys, monkeypatch):
    with progress.progress_bar(True, "maps") as report:
        report(0.5)
    assert capsys.readouterr().err == ""  # two seconds haven't passed
    monkeypatch.setattr(progress, "_DELAY", 0)
    with progress.progress_bar(True, "maps") as report:
        report(0.5)
    assert "maps:" in capsys.readouterr().err
    for shown in (False, None):  # no terminal here
        with progress.progress_bar(shown, "maps") as report:
            report(0.5)
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (torch.relu, "relu"),
        (torch.relu_, "relu"),
        (torch.Tensor.relu_, "relu"),
        (F.relu, "relu"),
        (torch.Tensor.__add__, "add"),
        (torch.Tensor.__iadd__, "add"),
        (torch.Tensor.add_, "add"),
        (torch.Tensor.__mul__, "mul"),
        (torch.Tensor.__getitem__, "getitem"),
        (torch.cat, "cat"),
        (torch.Tensor.shape.__get__, None),
        (torch.Tensor.size, None),
    ],
)
def test_calls_have_one_name_however_they_are_written(function, name):
    assert plain_name(function) == name


def by_rule(rule, model, images):
    """Logits with every call made by the rule."""
    return traced(model, model, images.clone().requires_grad_(), rule)[0]


def test_every_call_is_seen_with_its_layer_whether_module_or_function_shared_or_in_place(tiny, images):
    seen = []

    def rule(call, *args, **kwargs):
        seen.append((call.name, call.layer))
        return call.original(*args, **kwargs)

    assert torch.equal(by_rule(rule, tiny, images), tiny(images))
    names = ["conv2d", "relu", "add", "relu", "mul", "relu", "mean", "linear"]
    assert [name for name, _ in seen] == names
    assert [layer for name, layer in seen if name == "relu"] == ["act", "", "act"]
    seen.clear()
    tiny(images.clone().requires_grad_())
    assert not seen  # undone


def test_a_tensor_given_by_keyword_reaches_the_rule_by_position(images):
    class ByKeyword(nn.Module):
        def forward(self, x):
            return torch.relu(input=x - 0.5).flatten(1)

    def rule(call, x, *args, **kwargs):
        return x * 0 if call.name == "relu" else call.original(x, *args, **kwargs)

    assert not by_rule(rule, ByKeyword(), images).any()


@pytest.mark.parametrize(
    "body",
    [lambda x: (x.relu_(), x)[1], lambda x: (F.relu(x, inplace=True), x)[1], lambda x: (F.relu(x, True), x)[1]],
)
def test_a_network_that_relies_on_a_change_in_place_is_refused(body, images):
    class InPlace(nn.Module):
        def forward(self, x):
            return body(x * 2).flatten(1)

    with pytest.raises(AttributionError, match=r"tensor that relu changed in place; write it out of place"):
        by_rule(lambda call, *args, **kwargs: call.original(*args, **kwargs), InPlace(), images)


def test_scripted_networks_are_refused(tiny, images):
    with pytest.raises(AttributionError, match=r"network is a TorchScript module"):
        by_rule(None, torch.jit.trace(tiny.eval(), images), images)


def test_hooks_go_also_after_an_error(tiny, images):
    def rule(call, *args, **kwargs):
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        by_rule(rule, tiny, images)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny.modules())


def test_a_network_that_autograd_cannot_follow_is_refused(images):
    class Overwriting(nn.Module):
        def forward(self, x):
            x = torch.sigmoid(x)
            x.add_(1)  # sigmoid's gradient needs what was here
            return x.flatten(1)

    with pytest.raises(AttributionError, match=r"overwrites a tensor .* in place"):
        cxrkit.attribute(Overwriting(), images, "saliency")
