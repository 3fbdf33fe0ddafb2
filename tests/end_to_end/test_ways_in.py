"""Accepted ways in: modes, options from elsewhere, and what of torch and Hugging Face calls the backend."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from torch import nn
from transformers.generation.configuration_utils import CompileConfig

import cudagraph_backend as sg
from cudagraph_backend.compile import region_compile


@pytest.fixture(autouse=True)
def nothing_configured(monkeypatch):
    monkeypatch.delenv("SHAREDGRAPH_OPTIONS", raising=False)
    yield
    sg.unconfigure()


def function(x):
    return (x * 2 + 1).relu()


def serve(compiled, device, sizes=(5, 7, 3), reference=function):
    """Calls at some sizes, whose values are checked; what was counted."""
    with torch.no_grad():
        for n in sizes:
            x = torch.randn(n, 4, device=device)
            torch._dynamo.maybe_mark_dynamic(x, 0)
            torch.testing.assert_close(compiled(x), reference(x))
    return sg.stats()


def compiled(**kwargs):
    return torch.compile(function, backend="sharedgraph", **kwargs)


@pytest.fixture
def inductor_settings(monkeypatch):
    """Inductor's settings at each compilation of a region: a list that grows."""
    import torch._inductor.config as settings

    found, compile_region = [], region_compile.torch_internals.compile_region

    def recorded(*args, **kwargs):
        names = ("max_autotune", "coordinate_descent_tuning", "triton.cudagraphs", "epilogue_fusion")
        found.append({name: settings.get_config_copy()[name] for name in names} | {"boxed": bool(kwargs["cudagraphs"])})
        return compile_region(*args, **kwargs)

    monkeypatch.setattr(region_compile.torch_internals, "compile_region", recorded)
    return found


# ---- modes


@pytest.mark.parametrize("mode", [None, "default", "reduce-overhead"])
def test_modes_that_mean_what_happens_anyway(mode, device, inductor_settings):
    stats = serve(compiled(mode=mode), device)
    assert (stats.captures, stats.replays, stats.fallbacks) == (2, 3, {})  # sizes 3 and 4, and 8
    (settings,) = inductor_settings
    assert not settings["max_autotune"]
    assert not settings["coordinate_descent_tuning"]
    assert not settings["triton.cudagraphs"]
    assert not settings["boxed"]


@pytest.mark.parametrize("mode", ["max-autotune", "max-autotune-no-cudagraphs"])
def test_modes_that_tune(mode, device, inductor_settings):
    stats = serve(compiled(mode=mode), device)
    assert (stats.captures, stats.replays, stats.fallbacks) == (2, 3, {})
    (settings,) = inductor_settings
    assert settings["max_autotune"]
    assert settings["coordinate_descent_tuning"]
    assert not settings["triton.cudagraphs"]
    assert not settings["boxed"]


@pytest.mark.parametrize("mode", ["fast", "lite", "max_autotune", 3])
def test_another_mode_is_an_error_that_lists_these(mode):
    with pytest.raises(Exception, match="mode: got ") as raised:
        compiled(mode=mode)(torch.randn(3))
    assert f"mode: got {mode!r}; accepted is None, 'default', 'reduce-overhead', 'max-autotune'" in str(raised.value)
    assert "'max-autotune-no-cudagraphs'" in str(raised.value)
    assert isinstance(raised.value.inner_exception, sg.OptionError)


def test_settings_that_are_given_win_over_the_mode(device, inductor_settings):
    """``torch.compile`` takes a mode or options; whoever calls the backend may have both."""

    def backend(gm, inputs):
        given = {"inductor": {"coordinate_descent_tuning": False}}
        return sg.sharedgraph(gm, inputs, mode="max-autotune", options=given)

    serve(torch.compile(function, backend=backend), device)
    (settings,) = inductor_settings
    assert settings["max_autotune"]
    assert not settings["coordinate_descent_tuning"]


# ---- options from the process and its environment


def test_configured_options_hold_without_options(device):
    assert sg.configure(pad="off") == {"pad": "off"}
    stats = serve(compiled(), device)
    assert (stats.captures, stats.rows_padded) == (3, 0)


def test_options_in_the_environment_hold_without_options(device, monkeypatch):
    monkeypatch.setenv("SHAREDGRAPH_OPTIONS", '{"capture_sizes": [16], "inductor": {"epilogue_fusion": false}}')
    stats = serve(compiled(), device)
    assert (stats.captures, stats.rows_padded) == (1, 3 * 16 - 5 - 7 - 3)


def test_given_wins_over_configured_wins_over_environment(device, monkeypatch, inductor_settings):
    monkeypatch.setenv(
        "SHAREDGRAPH_OPTIONS",
        json.dumps({"capture_sizes": [16], "pad": "off", "max_graphs": 1, "inductor": {"epilogue_fusion": False}}),
    )
    sg.configure(pad="prove", max_graphs=2, inductor={"coordinate_descent_tuning": True})
    stats = serve(compiled(options={"capture_sizes": [32]}), device)
    assert (stats.captures, stats.rows_padded) == (1, 3 * 32 - 5 - 7 - 3)
    (replayer,) = sg.sharedgraph.regions()
    assert replayer.options.max_graphs == 2
    (settings,) = inductor_settings
    assert settings["coordinate_descent_tuning"]
    assert not settings["epilogue_fusion"]


def test_the_environment_is_read_at_each_compilation(device, monkeypatch):
    serve(compiled(), device, sizes=(5,))
    monkeypatch.setenv("SHAREDGRAPH_OPTIONS", '{"driver": "off"}')
    other = torch.compile(lambda x: x * 3, backend="sharedgraph")
    stats = serve(other, device, sizes=(5,), reference=lambda x: x * 3)
    assert (stats.captures, list(stats.fallbacks)) == (1, ["capture is off (option driver='off')"])


def test_what_is_configured_outlives_resets(device):
    sg.configure(driver="off")
    sg.reset()
    torch._dynamo.reset()
    assert serve(compiled(), device).captures == 0
    torch._dynamo.reset()
    sg.unconfigure()
    assert serve(compiled(), device).captures == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pad=off", r"got 'pad=off'; accepted is a JSON object of option names to values, such as .* \(Expecting"),
        ('["strict"]', "got .*; accepted is a JSON object"),
        ("3", "got .*; accepted is a JSON object"),
        ('{"padd": "off"}', "option 'padd' is unknown; accepted are capture_sizes, pad"),
        ('{"pad": "never"}', "option 'pad': got 'never'; accepted is one of 'prove'"),
    ],
)
def test_an_error_in_the_environment_names_the_variable(text, message, monkeypatch):
    monkeypatch.setenv("SHAREDGRAPH_OPTIONS", text)
    with pytest.raises(Exception, match=f"environment variable SHAREDGRAPH_OPTIONS: {message}") as raised:
        compiled()(torch.randn(3))
    assert isinstance(raised.value.inner_exception, sg.OptionError)


def test_an_error_in_what_is_configured_is_raised_at_once_and_sets_nothing():
    sg.configure(pad="off")
    with pytest.raises(sg.OptionError, match="option 'padd' is unknown; accepted are capture_sizes, pad"):
        sg.configure(strict=True, padd="off")
    with pytest.raises(sg.OptionError, match="option 'pad': got 'never'; accepted is one of 'prove'"):
        sg.configure(strict=True, pad="never")
    assert sg.configure() == {"pad": "off"}


# ---- what calls the backend for the user


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x).relu()


def wrapped_by_name(module):
    return torch.compile(module, backend="sharedgraph")


def wrapped_by_object(module):
    return torch.compile(module, backend=sg.sharedgraph)


def compiled_in_place(module):
    module.compile(backend="sharedgraph")
    return module


def optimized(module):
    return torch._dynamo.optimize("sharedgraph")(module)


def by_default_backend(module):
    torch.compiler.set_default_backend("sharedgraph")
    try:
        return torch.compile(module)
    finally:
        torch.compiler.set_default_backend(None)


WAYS = [wrapped_by_name, wrapped_by_object, compiled_in_place, optimized]
if hasattr(torch.compiler, "set_default_backend"):  # since torch 2.13
    WAYS.append(by_default_backend)


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_compile_a_module(way, device):
    module = Block().to(device)
    stats = serve(way(module), device, reference=module.forward)
    assert (stats.regions, stats.captures, stats.replays, stats.fallbacks) == (1, 2, 3, {})


def test_blocks_compiled_one_by_one(device):
    """Equal blocks share a region: each has its own place there, for the addresses of its parameters."""
    blocks = nn.Sequential(*(Block() for _ in range(3))).to(device)
    for block in blocks:
        block.compile(backend="sharedgraph")

    def reference(x):
        for block in blocks:
            x = block.forward(x)
        return x

    stats = serve(blocks, device, sizes=(5, 7, 5, 7), reference=reference)
    assert (stats.regions, stats.captures, stats.replays, stats.fallbacks) == (1, 3, 12, {})
    assert stats.read_in_place > 0


def test_filtered_guards(device):
    """Dynamo takes the filter out of the options; what is given besides it is ours."""
    scale = [2.0]

    def scaled(x):
        return x * scale[0]

    options = {"guard_filter_fn": lambda guards: [False] * len(guards), "capture_sizes": [16]}
    f = torch.compile(scaled, backend="sharedgraph", options=options)
    stats = serve(f, device, reference=lambda x: x * 2)
    assert (stats.regions, stats.captures, stats.replays) == (1, 1, 3)
    assert stats.rows_padded == 3 * 16 - 5 - 7 - 3
    scale[0] = 3.0  # nobody looks any more
    stats = serve(f, device, reference=lambda x: x * 2)
    assert (stats.regions, stats.captures, stats.replays) == (1, 1, 6)


PRECOMPILED = """
import json, sys, torch
import torch._dynamo.config as config
config.caching_precompile = True
device = sys.argv[1]

def function(x, w):
    return (x @ w).relu()

for backend in sys.argv[2:]:
    compiled = torch.compile(function, backend=backend)
    w = torch.randn(4, 4, device=device)
    for n in (5, 7, 3):
        x = torch.randn(n, 4, device=device)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x, w), function(x, w))
    if backend == "inductor":
        continue  # to compile more of a function that was precompiled is an error of torch's own
    w.requires_grad_()
    (found,) = torch.autograd.grad(compiled(x, w).sum(), w)
    (expected,) = torch.autograd.grad(function(x, w).sum(), w)
    torch.testing.assert_close(found, expected)
torch.compiler.save_cache_artifacts()
import cudagraph_backend
stats = cudagraph_backend.stats()
compilations = torch._dynamo.utils.counters["stats"]["unique_graphs"]
print(json.dumps([stats.captures, stats.replays, stats.fallbacks, compilations]))
"""


@pytest.mark.slow
def test_the_precompile_cache_neither_gives_nor_takes(device, tmp_path):
    """It knows functions by name and line alone, and would answer with Inductor's code, which captures nothing."""
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "SHAREDGRAPH_OPTIONS": '{"capture": "always"}'}
    (tmp_path / "script.py").write_text(PRECOMPILED)

    def run(*backends):
        command = [sys.executable, str(tmp_path / "script.py"), str(device), *backends]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    ours, inductors = [5, 5, {}, 3], [0, 0, {}, 0]
    assert run("sharedgraph") == ours  # sizes 5, 8 and 4, a forward, a backward
    assert run("inductor")[:3] == inductors[:3]
    again = run("inductor")
    # Precompiled; but of what Inductor's own cache gives, torch 2.11 precompiles nothing on a GPU.
    assert again in ([inductors] if device.type == "cpu" else [inductors, [0, 0, {}, 2]])
    assert run("sharedgraph") == ours
    assert run("inductor") == again  # still there
    assert run("sharedgraph", "inductor")[:3] == ours[:3]  # the second one in the same process


# ---- Hugging Face


@pytest.mark.slow
def test_compile_config_as_it_comes(device):
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval().to(device)
    ids = torch.randint(1, 64, (2, 5), device=device)
    settings = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    with without_compiling(model):
        expected = model.generate(ids, **settings)
    how = CompileConfig(backend="sharedgraph")
    assert how.mode == "reduce-overhead"
    how._compile_all_devices = True  # else only where there is a GPU
    for _ in range(2):
        found = model.generate(ids, compile_config=how, **settings)
        assert torch.equal(found.sequences, expected.sequences)
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
    stats = sg.stats()
    assert stats.fallbacks == {}
    assert stats.captures > 0
    assert stats.replays == 2 * 5  # the prompt is not compiled


@contextlib.contextmanager
def without_compiling(model):
    model.generation_config.disable_compile = True
    yield
    model.generation_config.disable_compile = False
