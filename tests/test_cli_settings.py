"""The command line around its commands: configuration files, plans, completion, exit codes."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from test_cli import invoke, refused, runner, tiny, write_inputs

import ttaq
from ttaq import cli
from ttaq.cards import card_path
from ttaq.checkpoint import read_header


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("settings")
    write_inputs(root)
    return root


def config(folder, **values):
    """Write a file of settings for a quick quantisation; give its path."""
    lines = {
        "model": "test_cli:tiny", "data": folder / "clean.npz", "weights": folder / "weights.safetensors",
        "method": "rtn", "images": 16, "mean": [0.5, 0.5, 0.4], "out": folder / "made.safetensors",
    } | values  # fmt: skip
    path = folder / "run.yaml"
    path.write_text("\n".join(f"{key}: {value}" for key, value in lines.items() if value is not None))
    return path


def test_a_file_sets_arguments_and_options_and_the_command_line_counts_more(folder):
    path = config(folder, bits="w8a8", exclude="[layers.0*]", override="['layers.1*=w2a4']", symmetric="true")
    result = invoke("quantize", "--config", path, "--bits", "w3a8", "--out", folder / "other.safetensors")
    assert result.exit_code == 0, result.output
    assert not (folder / "made.safetensors").exists()
    header = read_header(folder / "other.safetensors")
    recipe = ttaq.Recipe.from_json(header["report"]["recipe"])
    assert (str(recipe), recipe.exclude) == ("w3a8, first and last layer at 8 bits", ("layers.0*",))
    assert recipe.overrides == {"layers.1*": "w2a4"}
    assert recipe.weight.symmetric
    assert header["preprocessing"]["mean"] == [0.5, 0.5, 0.4]


def test_every_option_of_every_command_can_stand_in_a_file(folder):
    """The names in the help are the keys of the file."""
    path = config(folder, first_last=0, **{"per-token": "true", "num_classes": None, "seed": 3})
    result = invoke("quantize", "--config", path)
    assert result.exit_code == 0, result.output
    recipe = ttaq.Recipe.from_json(read_header(folder / "made.safetensors")["report"]["recipe"])
    assert (recipe.first_last, recipe.activation.granularity) == (None, "token")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bitz: w4a4", "sets 'bitz', which ttaq quantize does not take; did you mean bits?"),
        ("zzzz: 1", "sets 'zzzz', which ttaq quantize does not take; see ttaq quantize --help"),
        ("config: other.yaml", "sets 'config', which ttaq quantize does not take"),
        ("- w4a4", "must hold lines such as `bits: w4a4`, got a list"),
        ("bits: [w4a4", "is no YAML"),
        ("symmetric: perhaps", "symmetric in {path} must be true or false, got 'perhaps'"),
        ("override: {layer: w8a8}", "override in {path} must be one value or a list, got a mapping"),
    ],
)
def test_a_file_that_does_not_serve_is_refused_by_name(folder, text, said):
    path = folder / "odd.yaml"
    path.write_text(text)
    assert said.format(path=path) in refused("quantize", "--config", path)


def test_a_file_that_is_missing_is_named_and_a_value_of_the_wrong_kind_is_too(folder):
    assert "cannot read" in refused("quantize", "--config", folder / "none.yaml")
    result = invoke("quantize", "--config", config(folder, images="many"))
    assert result.exit_code == 2
    assert "'--images'" in result.stderr


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(folder):
    out = folder / "planned.safetensors"
    path = config(folder, method="ttaq", steps=10, out=out, budget=None, exclude="[layers.0.*]")
    result = invoke("quantize", "--config", path, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "images: 16 of the 24 in" in result.stdout
    assert "5 steps and 5 of the whole network" in result.stdout
    assert f"checkpoint: {out}, about 0.0 MiB" in result.stdout
    assert "nothing was learned or written" in result.stdout
    assert not out.exists()
    assert not card_path(out).exists()
    made = invoke("quantize", "--config", path)
    assert made.exit_code == 0, made.output
    names = [row["name"] for row in read_header(out)["report"]["blocks"]]
    assert all(any(line.split()[:1] == [name] for line in result.stdout.splitlines()) for name in names)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (("--method", "rtn"), "work: nothing is learned"),
        (("--method", "gptq"), "blocks in closed form"),
        (("--method", "qdrop", "--budget", "5min"), "work: 300 s; the steps are what fits"),
        (("--budget", "1h"), "work: 3600 s, 50% of it for the whole network; the steps are what fits"),
    ],
)
def test_a_plan_says_what_each_method_would_do(folder, extra, said):
    result = invoke("quantize", "--config", config(folder, method=None), "--dry-run", *extra)
    assert result.exit_code == 0, result.output
    assert said in result.stdout


def test_the_size_of_a_plan_is_about_that_of_the_file(folder):
    from ttaq.jobs import carry_out, open_job
    from ttaq.plans import _size

    job = open_job("test_cli:tiny", folder / "clean.npz", weights=folder / "weights.safetensors")
    report = carry_out(job, folder / "sized.safetensors", "w4a4", method="rtn", progress=False)
    header = len((folder / "sized.safetensors").read_bytes()) - sum(
        t.nbytes for t in _tensors(folder / "sized.safetensors")
    )
    assert report["file_bytes"] - header == pytest.approx(_size(ttaq.prepare(job.model, "w4a4")), rel=0.1)


def _tensors(path):
    from safetensors.torch import load_file

    return load_file(path).values()


def test_a_plan_of_streamed_weights_and_of_an_unknown_method_is_refused(folder):
    path = config(folder, method=None)
    assert "leave out --low-memory" in refused(
        "quantize", "--config", path, "--dry-run", "--low-memory", "--method", "rtn"
    )
    assert "method must be one of" in refused("quantize", "--config", path, "--dry-run", "--method", "magic")


def test_weights_that_stay_in_their_file_give_the_same_codes(folder):
    one, other = folder / "held.safetensors", folder / "streamed.safetensors"
    path = config(folder)
    assert invoke("quantize", "--config", path, "--out", one).exit_code == 0
    result = invoke("quantize", "--config", path, "--out", other, "--low-memory")
    assert result.exit_code == 0, result.output
    for name, tensor in ttaq.load(one, tiny()).state_dict().items():
        assert torch.equal(tensor, ttaq.load(other, tiny()).state_dict()[name]), name
    assert "pass --weights FILE.safetensors" in refused(
        "quantize", "test_cli:tiny", "--data", folder / "clean.npz", "--low-memory"
    )


def test_an_override_without_widths_is_refused(folder):
    sentence = refused("quantize", "--config", config(folder), "--override", "layers.1")
    assert "wanted a text such as layer1.*=w8a8, got 'layers.1'" in sentence


def test_the_shell_completes_commands_options_and_names():
    def complete(words, number):
        environment = {"_TTAQ_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(number)}
        return runner.invoke(cli.app, [], env=environment, prog_name="ttaq").stdout.split()

    assert complete("ttaq qu", 1) == ["quantize"]
    assert "--budget" in complete("ttaq quantize --bu", 2)
    assert complete("ttaq evaluate m --adapter co", 4) == ["cotta"]
    assert complete("ttaq evaluate m --adapter norm,te", 4) == ["norm,tent"]
    assert complete("ttaq evaluate m --stream gau", 4) == ["gaussian_noise"]


def test_the_help_names_the_exit_codes():
    assert "Exit codes: 0 done" in invoke("--help").stdout


def test_a_warning_is_one_sentence_without_code(folder):
    result = invoke("quantize", "--config", config(folder))
    assert "ttaq: warning: quantize: 16 images are few for w4a4; 1,024 are known to suffice\n" in result.stderr
    assert ".py" not in result.stderr


INTERRUPTIBLE = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background of a script starts without it
from ttaq.cli import main
main()
"""


def test_an_interrupted_command_ends_with_130(folder):
    command = [sys.executable, "-c", INTERRUPTIBLE, "quantize", "--config"]
    command.append(config(folder, method="qdrop", steps=100_000))
    path = os.pathsep.join(p for p in sys.path if p)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    child = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, **pipes)
    try:
        for line in child.stderr:  # it warns of few images when it has begun
            if "are few" in line:
                break
        time.sleep(0.5)
        child.send_signal(signal.SIGINT)
        said = child.communicate(timeout=60)[1]
    finally:
        child.kill()
    # Python ends by the signal itself where it came inside an exec(); a shell calls both 130
    assert child.returncode in (130, -signal.SIGINT), said
    assert said.strip() == "ttaq: interrupted"
