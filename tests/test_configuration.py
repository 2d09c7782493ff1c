"""YAML files of the benchmark: what they ask for in ttaq's words, and what is refused by name."""

import pytest
import torch
from test_order import Domains, small
from tiny import images, resnet
from torch.optim import SGD, Adam

import ttaq
from ttaq.adaptation import METHODS
from ttaq.configuration import ADAPTATIONS, IGNORED, OPTIONS, SETTINGS, read_configuration
from ttaq.streams import CORRUPTIONS, STREAMS

SAMPLE = """
SETTING: mixed_domains
RNG_SEED: 3
DATA_DIR: ./data
MODEL:
  ADAPTATION: eata
  ARCH: Standard
TEST:
  BATCH_SIZE: 200
  NUM_WORKERS: 4
CORRUPTION:
  DATASET: cifar10_c
  SEVERITY:
    - 5
  TYPE: [fog, snow]
  NUM_EX: 500
OPTIM:
  METHOD: SGD
  LR: 5e-3
  MOMENTUM: 0.8
  NESTEROV: false
  STEPS: 2
EATA:
  MARGIN_E0: 0.4
  FISHER_ALPHA: 1.0
  D_MARGIN: 0.4
SAR:
  RESET_CONSTANT_EM: 0.2
"""


def test_a_file_is_read(tmp_path):
    path = tmp_path / "eata.yaml"
    path.write_text(SAMPLE)
    stream, method, options = read_configuration(path)
    assert (stream.order, stream.reset, stream.dataset) == ("mixed", False, "cifar10_c")
    assert stream.arguments == {
        "severity": 5, "images": 500, "batch_size": 200, "seed": 3, "table": "cifar", "corruptions": ("fog", "snow"),
    }  # fmt: skip
    assert method == "eata"
    optimizer = options.pop("optimizer")([torch.nn.Parameter(torch.zeros(1))], lr=options["lr"])
    assert isinstance(optimizer, SGD)
    assert (optimizer.defaults["momentum"], optimizer.defaults["nesterov"], optimizer.defaults["lr"]) == (
        0.8,
        False,
        5e-3,
    )
    assert options == {"margin": 0.4, "anchor_weight": 1.0, "d": 0.4, "lr": 5e-3, "full_batch": 0, "steps": 2}


def test_what_is_left_out_has_defaults():
    stream, method, options = read_configuration({})
    assert (stream.order, method, options) == ("continual", "source", {})
    assert stream.arguments == {"severity": 5, "images": None, "batch_size": 128, "seed": 1, "table": "cifar"}
    assert read_configuration({"MODEL": {"ADAPTATION": "tent"}}).options == {}
    options = read_configuration({"MODEL": {"ADAPTATION": "tent"}, "OPTIM": {"LR": "2.5e-4"}}).options
    optimizer = options["optimizer"]([torch.nn.Parameter(torch.zeros(1))], lr=options["lr"])
    assert isinstance(optimizer, Adam)
    assert (optimizer.defaults["lr"], optimizer.defaults["betas"]) == (2.5e-4, (0.9, 0.999))
    assert read_configuration({"CORRUPTION": {"DATASET": "imagenet_c"}}).stream.arguments["table"] == "imagenet"


def test_a_file_runs():
    asked = {"MODEL": {"ADAPTATION": "tent"}, "SETTING": "reset_each_shift", "TEST": {"BATCH_SIZE": 8}}
    stream, method, options = read_configuration(asked | {"OPTIM": {"METHOD": "SGD", "LR": 0.01}})
    assert stream.reset
    batches = stream.make(Domains(small(8)))
    assert [name for name, _ in batches.domains] == list(CORRUPTIONS)
    assert len(batches) == 15
    adapter = ttaq.adapt(resnet(), method, **options)
    adapter(images())
    assert adapter.method.optimizer.param_groups[0]["lr"] == 0.01  # at a batch of 8, too
    assert adapter.method.optimizer.param_groups[0]["nesterov"]


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting_is_a_stream(setting):
    levels = [5, 4, 3, 2, 1] if setting == "gradual" else [4]
    asked = {"SETTING": setting, "CORRUPTION": {"SEVERITY": levels, "TYPE": "fog"}, "TEST": {"DELTA_DIRICHLET": 0.2}}
    stream = read_configuration(asked).stream
    assert stream.order in STREAMS
    assert stream.arguments["severity"] == max(levels)
    assert ("concentration" in stream.arguments) == ("correlated" in setting)
    assert len(stream.make(Domains(small(8)))) == (9 if setting == "gradual" else 1)
    assert stream.reset == setting.startswith("reset")


@pytest.mark.parametrize("adaptation", [name for name, (method, _) in ADAPTATIONS.items() if method in METHODS])
def test_every_option_is_one_of_its_method(adaptation):
    """Each key of a method's section, and the optimizer's, is taken by the method itself."""
    asked = {"MODEL.ADAPTATION": adaptation, "OPTIM.LR": 1e-3}
    samples = {"DEYO.AUG_TYPE": "pixel", "ROTTA.MEMORY_SIZE": 8, "ROTTA.UPDATE_FREQUENCY": 8, "LAME.KNN": 3}
    samples |= {"TEST.N_AUGMENTATIONS": 2, "ROID.USE_PRIOR_CORRECTION": False}
    asked |= {key: samples.get(key, 0.5) for key in OPTIONS.get(adaptation, {})}
    _, method, options = read_configuration(asked)
    options |= {"anchor": [images()]} if method == "eata" else {}
    adapter = ttaq.adapt(resnet(), method, **options)
    assert adapter(images()).shape == (8, 6)


def test_keys_of_other_methods_and_of_the_machine_are_known():
    keys = {key: 0.5 for section in OPTIONS.values() for key in section} | dict.fromkeys(IGNORED, "x")
    assert read_configuration({"MODEL.ADAPTATION": "norm_test"} | keys)[1:] == ("norm", {"statistics": "batch"})


def test_eata_without_its_anchor_is_eta():
    asked = {"MODEL": {"ADAPTATION": "eata"}, "EATA": {"FISHER_ALPHA": 0.0, "D_MARGIN": 0.05}}
    assert read_configuration(asked)[1:] == ("eta", {"d": 0.05})


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"OPTIM": {"RATE": 1}}, "OPTIM.RATE is not known; take it out, or use OPTIM.BETA, OPTIM.DAMPENING, OPTIM.LR"),
        ({"RMT": {"LAMBDA": 1}}, "RMT.LAMBDA is not known; take it out, or use CORRUPTION.DATASET"),
        ({"DEYO": {"ROW_START": 56}}, "DEYO.ROW_START is not known; take it out, or use DEYO.AUG_TYPE, DEYO.MARGIN"),
        ({"MODEL": {"ADAPTATION": "memo"}}, "MODEL.ADAPTATION must be one of norm_test, norm_alpha"),
        ({"SETTING": "gradual_correlated"}, "SETTING must be one of continual, reset_each_shift"),
        ({"MODEL": {"EPISODIC": True}}, "MODEL.EPISODIC must be False, got True; ttaq knows no other"),
        ({"TEST": {"WINDOW_LENGTH": 8}}, "TEST.WINDOW_LENGTH must be 1, got 8"),
        ({"CORRUPTION": {"SEVERITY": [5, 3]}}, r"CORRUPTION.SEVERITY must be one, got \[5, 3\]"),
        ({"CORRUPTION": {"SEVERITY": []}}, r"CORRUPTION.SEVERITY must be one, got \[\]"),
        ({"TEST": {"BATCH_SIZE": "many"}}, "TEST.BATCH_SIZE must be a whole number, got 'many'; write it so"),
        ({"TEST": {"BATCH_SIZE": 1.5}}, "TEST.BATCH_SIZE must be a whole number, got 1.5"),
        ({"MODEL.ADAPTATION": "tent", "OPTIM.LR": "x"}, "OPTIM.LR must be a number, got 'x'"),
        ({"MODEL.ADAPTATION": "tent", "OPTIM.METHOD": "LBFGS"}, "OPTIM.METHOD must be one of Adam, SGD, got 'LBFGS'"),
        (
            {"MODEL.ADAPTATION": "tent", "OPTIM.METHOD": "SGD", "OPTIM.NESTEROV": "maybe"},
            "OPTIM.NESTEROV must be True or False",
        ),
    ],
)
def test_what_has_no_equal_is_refused_by_name(content, says):
    with pytest.raises(ValueError, match=f"^configuration: {says}") as error:
        read_configuration(content)
    assert "\n" not in str(error.value)


def test_bad_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^configuration: cannot read .*none.yaml \(No such file"):
        read_configuration(tmp_path / "none.yaml")
    for text, says in [("a: [", "is no YAML"), ("- a", "must hold sections and keys, got list"), ("", "got NoneType")]:
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ValueError, match=says):
            read_configuration(tmp_path / "bad.yaml")
