"""The block ``plot`` of a framework's file, and the command for LLaMA-Factory where that is not installed."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from plot_align.cli.main import dispatch
from plot_align.config import PlotConfig
from plot_align.errors import InputError
from plot_align.plugins.block import read_block


def test_options_of_both_classes_and_a_preference(preference, tmp_path):
    path = preference.save(tmp_path / "preference.safetensors")
    block = read_block({"alpha": 0.1, "geometry": "norm", "preference": str(path)})
    assert block.config == PlotConfig.from_options(alpha=0.1, geometry="norm")
    assert block.preference.provenance == preference.provenance


def test_no_block_is_none_and_an_empty_one_takes_the_defaults():
    assert read_block(None) is None
    assert (read_block({}).config, read_block({}).preference) == (PlotConfig(), None)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (True, r"^plot is True, expected a mapping of options; write {} for the defaults$"),
        ({"alfa": 1}, r"^unknown option 'alfa' in plot; did you mean 'alpha'\?$"),
        ({"preferences": "p"}, r"^unknown option 'preferences' in plot; did you mean 'preference'\?$"),
        ({3: 1}, r"^unknown option '3' in plot; see docs/options.md$"),
        ({"alpha": "1e-1"}, r"^in plot: alpha is '1e-1'; expected a finite number, 0 or more.$"),
        ({"slices": 0}, r"^in plot: slices is 0; expected 1 or more.$"),
        ({"preference": "none.safetensors"}, r"^in plot: preference file none.safetensors does not exist; make one"),
    ],
)
def test_a_mistake_is_one_sentence(block, message):
    with pytest.raises(InputError, match=message):
        read_block(block)


@pytest.mark.skipif(find_spec("llamafactory") is not None, reason="LLaMA-Factory is installed")
def test_the_command_says_that_llama_factory_is_missing(tmp_path):
    path = tmp_path / "dpo.yaml"
    path.write_text("stage: dpo\nplot: {alpha: 0.1}\n", encoding="utf-8")
    with pytest.raises(
        InputError, match=r"^llamafactory-train needs LLaMA-Factory, which is not installed; pip install"
    ):
        dispatch(["llamafactory-train", str(path)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.yaml"], "^FILE.yaml missing.yaml cannot be read"),
        (["dpo.yaml", "alpha"], "^unexpected argument 'alpha'; expected KEY=VALUE after the file$"),
        ([], "^the following arguments are required: FILE.yaml; see"),
    ],
)
def test_the_command_refuses_other_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        dispatch(["llamafactory-train", *arguments])
