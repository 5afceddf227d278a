"""Reading configs: merging, validation, error messages, and old formats."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from detector.config import (
    AnchorConfig,
    Config,
    EmaConfig,
    SplitConfig,
    config_differences,
    flatten,
    resolve_data_paths,
)
from detector.config_errors import ALIASES, CLASS_COUNT_KEYS, all_keys
from detector.config_formats import FORMAT, MOVED
from detector.config_yaml import config_from_dict, load_config, to_yaml, with_model_of
from detector.errors import ConfigError

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write files into an empty folder; returns the path of the first."""

    def write_files(main: str = "", **others: str) -> Path:
        for name, text in {"main": main, **others}.items():
            (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
        return tmp_path / "main.yaml"

    return write_files


def mistakes(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


# --- reading and merging


@pytest.mark.parametrize("text", ["", "# only a comment\n", "train: null\n", "{}"])
def test_an_empty_file_gives_the_defaults(text: str, write: Write) -> None:
    assert load_config(write(text)) == Config()


def test_all_configs_of_the_repository_are_valid(repo_root: Path) -> None:
    for path in (repo_root / "configs").glob("*.yaml"):
        load_config(path)


def test_mappings_merge_over_bases_and_lists_replace(write: Write) -> None:
    path = write(
        "_base_: [a.yaml, b.yaml]\noptim: {lr: 0.5}\n",
        a="_base_: deep.yaml\ntrain: {epochs: 2, seed: 1}\n",
        b="train: {seed: 2}\ndata: {min_size: [300]}\n",
        deep="train: {epochs: 1, batch_size: 3}\noptim: {lr: 0.1, momentum: 0.5}\ndata: {min_size: [100, 200]}\n",
    )
    config = load_config(path)
    assert (config.train.epochs, config.train.seed, config.train.batch_size) == (2, 2, 3)
    assert (config.optim.lr, config.optim.momentum) == (0.5, 0.5)
    assert config.data.min_size == (300,)


def test_bases_are_relative_to_the_file_that_names_them(tmp_path: Path) -> None:
    (tmp_path / "bases").mkdir()
    (tmp_path / "bases" / "a.yaml").write_text("_base_: b.yaml\n")
    (tmp_path / "bases" / "b.yaml").write_text("train: {epochs: 7}\n")
    (tmp_path / "main.yaml").write_text("_base_: bases/a.yaml\n")
    assert load_config(tmp_path / "main.yaml").train.epochs == 7


def test_a_base_reached_in_two_ways_is_no_cycle(write: Write) -> None:
    path = write("_base_: [a.yaml, b.yaml]", a="_base_: c.yaml", b="_base_: c.yaml", c="train: {epochs: 3}")
    assert load_config(path).train.epochs == 3


def test_circular_bases_are_an_error(write: Write) -> None:
    assert "`_base_` is circular" in mistakes(write("_base_: main.yaml"))
    assert "`_base_` is circular" in mistakes(write("_base_: a.yaml", a="_base_: b.yaml", b="_base_: main.yaml"))


@pytest.mark.parametrize("base", ["3", "[a.yaml, 3]", "{a: b}", "null"])
def test_a_base_must_be_a_path_or_paths(base: str, write: Write) -> None:
    assert "`_base_` must be a path or a list of paths" in mistakes(write(f"_base_: {base}", a=""))


def test_a_missing_file_is_reported_with_the_nearest_name(write: Write) -> None:
    path = write("_base_: othr.yaml", other="")
    assert re.search(
        r"othr\.yaml does not exist \(named by .*main\.yaml\); did you mean .*other\.yaml\?", mistakes(path)
    )
    message = mistakes(path.with_name("mian.yaml"))
    assert message.startswith(f"config file {path.with_name('mian.yaml')} does not exist; did you mean {path}?")
    assert "cannot be read" in mistakes(path.parent)  # a folder


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("train: {epochs: 3", "main.yaml:1"),
        ("train:\n  epochs: 3\n seed: 3\n", "main.yaml:3"),
        ("a: 1\n\tb: 2", "main.yaml:2"),
        ("train: {epochs: [1}\n", "main.yaml:1"),
        ("? [a]\n: 1", "main.yaml:1"),
        ("train: *unknown", "main.yaml:1"),
        ("a: &x {b: *x}", "main.yaml:1"),
        ("a: &x [*x]", "main.yaml:1"),
        ("train: 1\n\x00", "main.yaml:2"),
    ],
)
def test_invalid_yaml_is_reported_with_its_line(text: str, where: str, write: Write) -> None:
    message = mistakes(write(text))
    assert f"{where}: invalid YAML" in message


def test_a_file_that_is_not_text_is_reported(tmp_path: Path) -> None:
    (tmp_path / "main.yaml").write_bytes(b"\xff\xfe\x00\x81")
    assert "cannot be read" in mistakes(tmp_path / "main.yaml")


@pytest.mark.parametrize("text", ["- a\n- b\n", "3", "words"])
def test_a_config_must_be_a_mapping(text: str, write: Write) -> None:
    assert "a config must be a mapping of sections" in mistakes(write(text))


def test_yaml_tags_never_run_code(write: Write, tmp_path: Path) -> None:
    message = mistakes(write(f'train: !!python/object/apply:os.mkdir ["{tmp_path}/ran"]'))
    assert "main.yaml:1: invalid YAML: the tag tag:yaml.org,2002:python/object/apply:os.mkdir is not" in message
    assert not (tmp_path / "ran").exists()


def test_a_duplicate_key_is_reported_with_both_lines(write: Write) -> None:
    message = mistakes(write("train: {epochs: 2}\noptim:\n  lr: 0.1\n  lr: 0.2\n"))
    assert re.search(r"main\.yaml:4: `optim\.lr` is set twice, first at .*main\.yaml:3", message)


def test_a_duplicate_key_inside_a_list_is_reported_too(write: Write) -> None:
    text = "data:\n  augment:\n    - VerticalFlip: {}\n    - Blur:\n        p: 0.5\n        p: 0.1\n"
    message = mistakes(write(text))
    assert re.search(r"main\.yaml:6: `data\.augment\.1\.Blur\.p` is set twice, first at .*main\.yaml:5", message)
    assert "`data.augment.0.Blur.p` is set twice" in mistakes(write(), "data.augment=[{Blur: {p: 0.5, p: 0.1}}]")
    config = load_config(write("data: {augment: [{Blur: {p: 0.5}}, {Blur: {p: 0.1}}]}"))
    assert config.data.augment == ({"Blur": {"p": 0.5}}, {"Blur": {"p": 0.1}}), (
        "the same name in two items is no duplicate"
    )


def test_an_empty_section_of_a_file_must_not_discard_the_settings_of_its_base(write: Write) -> None:
    for text, base, key, line in (
        ("optim:\n  # lr: 0.1\n", "optim: {lr: 0.5}", "optim", 2),
        ("train:\n  epochs: 2\nmodel:\n  head:\n", "model: {head: {depth: 2}}", "model.head", 5),
        ("model: {anchors: null}", "model: {anchors: {ratios: [1]}}", "model.anchors", 2),
    ):
        path = write(f"_base_: base.yaml\n{text}", base=base)
        message = mistakes(path)
        assert f"  {path}:{line}: `{key}` must not be empty" in message
        assert f"which would discard its settings at {path.with_name('base.yaml')}:1" in message
    assert "`loss` must not be empty" in mistakes(write("_base_: [a.yaml, b.yaml]", a="loss: {gamma: 1}", b="loss:"))


def test_an_empty_section_that_discards_nothing_or_may_be_absent_is_accepted(write: Write) -> None:
    assert load_config(write("_base_: base.yaml\noptim:\n", base="train: {epochs: 2}")).optim == Config().optim
    assert load_config(write("_base_: base.yaml\noptim: {lr: 0.5}\n", base="optim:\n")).optim.lr == 0.5
    split = "{images: i, annotations: a}"
    base = f"data: {{train: {split}, val: {split}, test: {split}}}\ntrain: {{ema: {{}}, epochs: 2}}\n"
    config = load_config(
        write("_base_: base.yaml\ndata: {train: null, val: null, test: null}\ntrain: {ema: null}", base=base)
    )
    assert (config.data.train, config.data.val, config.data.test, config.train.ema) == (None, None, None, None)
    assert config.train.epochs == 2


@pytest.mark.parametrize(
    ("base", "main", "key"),
    [
        ("optim: adamw\n", "optim: {lr: 0.1}", "optim"),
        ("optim: {lr: 0.1}\n", "optim: adamw", "optim"),
        ("optim: {lr: 0.1}\n", "optim: [adamw]", "optim"),
        ("data: {min_size: [1, 2]}\n", "data: {min_size: {short: 3}}", "data.min_size"),
    ],
)
def test_a_section_and_a_value_under_one_key_are_reported_with_both_files(
    base: str, main: str, key: str, write: Write
) -> None:
    path = write(f"_base_: base.yaml\n{main}\n", base=base)
    message = mistakes(path)
    assert message.startswith(f"the config has 1 mistake:\n  `{key}` must be a section or a value, not both, got ")
    assert f"[{path.with_name('base.yaml')}:1]" in message
    assert f"[{path}:2]" in message


# --- overrides


def test_overrides_win_and_create_optional_sections(write: Write) -> None:
    config = load_config(
        write("train: {epochs: 2}"),
        [
            "train.epochs=5",
            "train.ema.decay=0.9",
            "data.train={images: i, annotations: a.json}",
            "data.min_size=[100, 200]",
            "optim.lr=1e-3",
            "model.backbone=resnet18",
        ],
    )
    assert config.train.epochs == 5
    assert config.train.ema == EmaConfig(decay=0.9)
    assert config.data.train == SplitConfig(images="i", annotations="a.json")
    assert config.data.min_size == (100, 200)
    assert config.optim.lr == 0.001
    assert config.model.backbone == "resnet18"


def test_null_removes_a_key_or_section_and_is_a_value_where_there_is_one(write: Write) -> None:
    path = write("train: {epochs: 2, ema: {decay: 0.9}}\nloss: {gamma: 1.0}\n")
    config = load_config(path, ["train.epochs=null", "train.ema=null", "loss.gamma=null", "loss.alpha=null"])
    assert config.train.epochs == Config().train.epochs
    assert config.train.ema is None
    assert config.loss.gamma == 2.0
    assert config.loss.alpha is None
    assert load_config(path, ["loss=null"]).loss == Config().loss
    assert load_config(path, ["loss=null", "loss.alpha=0.5"]).loss == Config().loss.model_copy(update={"alpha": 0.5})


@pytest.mark.parametrize(
    ("overrides", "got"),
    [
        (["optim=adamw", "optim.lr=0.1"], """'adamw' [command line] and then {"lr": 0.1} [command line]"""),
        (["optim.lr=0.1", "optim=adamw"], """{"lr": 0.1} [command line] and then 'adamw' [command line]"""),
        (["data=3"], """{"train": {"images": "i"}} [main.yaml:2] and then 3 [command line]"""),
        (["data.train=i"], """{"images": "i"} [main.yaml:2] and then 'i' [command line]"""),
        (["data.train.images.x=3"], """'i' [main.yaml:2] and then {"x": 3} [command line]"""),
        (["data.val.images=i", "data.val=i"], """{"images": "i"} [command line] and then 'i' [command line]"""),
        (["train.ema=true", "train.ema.decay=0.9"], """true [command line] and then {"decay": 0.9} [command line]"""),
    ],
)
def test_an_override_must_not_discard_another_or_the_settings_of_the_file(
    overrides: list[str], got: str, write: Write
) -> None:
    path = write("train: {ema: null}\ndata: {train: {images: i}}\n")
    message = mistakes(path, *overrides).replace(str(path), path.name)
    assert re.search(r"\n  `[a-z.]+` must be a section or a value, not both, got ", message)
    assert got in message


def test_a_value_in_place_of_a_section_hides_no_other_mistake_and_has_a_remedy(write: Write) -> None:
    message = mistakes(write("train: {ema: {}}"), "train.ema=true", "optim.lr=", "optim.lrr=3")
    assert message.splitlines() == [
        "the config has 3 mistakes:",
        f"  `train.ema` must be a section or a value, not both, got {{}} [{write('train: {ema: {}}')}:1] and then true "
        "[command line]; {} turns the section on with the settings given elsewhere and the defaults, null turns it off",
        "  override must be key=value, for example train.epochs=3, got 'optim.lr='; use null as the value for the "
        "default, or for none where a setting may be absent",
        "  optim.lrr: unknown key; did you mean optim.lr?  [command line]",
    ]
    message = mistakes(write("train: {ema: true}\ndata: {train: 5, augment: [{HorizontalFlip: 5}]}"))
    assert "train.ema: must be a section ({} has all defaults), got true" in message
    assert "data.train: must be a section with images, annotations, got 5" in message
    assert "data.augment.0.HorizontalFlip: must be a mapping, {} or {name: value, ...}, got 5" in message
    message = mistakes(write("_base_: base.yaml\ntrain: 5", base="train: {epohcs: 3}"), "=3", "=4", "train=")
    assert message.startswith("the config has 5 mistakes:")
    assert all(text in message for text in ("`train` must be a section or", "train.epohcs", "'=3'", "'=4'", "'train='"))


def test_a_setting_without_a_value_is_not_read_as_the_default(write: Write) -> None:
    path = write("_base_: base.yaml\noptim:\n  lr:\n", base="optim: {lr: 0.5}")
    assert f"  {path}:3: `optim.lr` has no value; add one, or delete the line" in mistakes(path)
    several = mistakes(write("optim:\n  lr:\n  momentm: 3\ntrain:\n  epohcs: 3\n  batch_size:\n"))
    assert several.startswith("the config has 4 mistakes:")
    assert all(
        k in several for k in ("`optim.lr` has no", "optim.momentm", "train.epohcs", "`train.batch_size` has no")
    )
    assert "`optim.lr` has no value" in mistakes(write(), "optim={lr: , weight_decay: 0.1}")
    assert load_config(write("_base_: base.yaml\noptim: {lr: null}", base="optim: {lr: 0.5}")).optim == Config().optim
    assert load_config(write("loss: {alpha: }\ntrain: {micro_batch: }")).loss.alpha is None


def test_lists_and_values_replace_each_other(write: Write) -> None:
    path = write("data: {min_size: 300}\nloss: {alpha: inverse_frequency}\n")
    config = load_config(path, ["data.min_size=[200, 300]", "loss.alpha=[0.5, 0.75]"])
    assert config.data.min_size == (200, 300)
    assert config.loss.alpha == (0.5, 0.75)
    assert load_config(path, ["data.min_size=[200, 300]", "data.min_size=100"]).data.min_size == 100


@pytest.mark.parametrize(
    "text",
    ["/d/set #2", "2024", "C:\\x: y", "[1, 2", "{a}", "'quoted'", "true", "1e5", "a=b", " x ", "*x", "%", "~", "Ünï"],
)
def test_text_settings_on_the_command_line_are_not_parsed(text: str, write: Write) -> None:
    config = load_config(
        write("data: {train: {images: i, annotations: a}}\nmodel: {norm: bn}\n"),
        [f"data.train.images={text}", f"train.init_from={text}", f"model.backbone_weights={text}"],
    )
    assert config.data.train == SplitConfig(images=text, annotations="a")
    assert config.train.init_from == text
    assert config.model.backbone_weights == text


def test_null_is_not_text(write: Write) -> None:
    path = write("data: {train: {images: i, annotations: a}}\ntrain: {init_from: a.pt}\n")
    assert load_config(path, ["train.init_from=null"]).train.init_from is None
    assert "data.train.images: input should be a valid string, got null" in mistakes(path, "data.train.images=null")


def test_null_backbone_weights_are_not_read_as_imagenets(write: Write) -> None:
    rule = "backbone_weights must be imagenet, a file, or none for a network from scratch, got null"
    message = f"model.backbone_weights: {rule}"
    assert f"{message}  [command line]" in mistakes(write(), "model.backbone_weights=null")
    path = write("_base_: base.yaml\nmodel: {backbone_weights: }", base="model: {backbone_weights: w.pth}")
    assert f"{message}  [{path}:2]" in mistakes(path)


@pytest.mark.parametrize(
    "override", ["", "train.epochs", "=3", "train..epochs=3", ".=1", "train.init_from=", "optim.lr=", "optim.lr=# 3"]
)
def test_an_override_must_be_key_and_value(override: str, write: Write) -> None:
    assert "override must be key=value, for example train.epochs=3" in mistakes(write(), override)


def test_mistakes_in_overrides_name_the_command_line(write: Write) -> None:
    path = write("data: {train: {images: i, annotations: a}}\n")
    assert "train.epochs: input should be a valid integer, got 'x'  [command line]" in mistakes(path, "train.epochs=x")
    assert "[command line]" in mistakes(path, "data.train={images: 3}")  # the file's line for this key is stale
    message = mistakes(write("data: {val: null}\n"), "data.val.images=i")
    assert "data.val.annotations: field required" in message
    assert message.endswith("[command line]")
    assert "override train.epochs:1: invalid YAML" in mistakes(path, "train.epochs=[1")


# --- values


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 0.001), ("1E+2", 100.0), ("1.5e-2", 0.015), (".5", 0.5), ("2", 2.0)]
)
def test_numbers_may_be_written_with_an_exponent(text: str, value: float, write: Write) -> None:
    assert load_config(write(f"optim: {{lr: {text}}}")).optim.lr == value


@pytest.mark.parametrize("word", ["yes", "no", "on", "off", "y", "n", "1:30", "010", "2017-1-1", "0o17"])
def test_text_that_yaml_1_1_converts_stays_text(word: str, write: Write) -> None:
    path = write(f"data: {{train: {{images: {word}, annotations: a.json}}}}")
    train = load_config(path).data.train
    assert train is not None
    assert train.images == word
    assert f"input should be a valid boolean, got '{word}'" in mistakes(path, f"train.channels_last={word}")
    assert f"input should be a valid integer, got '{word}'" in mistakes(path, f"train.seed={word}")


@pytest.mark.parametrize("text", [".nan", ".inf", "-.inf", "1e999"])
def test_numbers_must_be_finite(text: str, write: Write) -> None:
    assert "optim.lr: input should be a finite number" in mistakes(write(f"optim: {{lr: {text}}}"))


@pytest.mark.parametrize(
    ("key", "value", "missing"),
    [("eval.max_dets", "[100]", 1), ("optim.betas", "[0.9]", 1), ("model.pixel_mean", "[1,2]", 2)],
)
def test_a_list_that_is_too_short_is_reported_with_the_missing_index(
    key: str, value: str, missing: int, write: Write
) -> None:
    text = mistakes(write("data: {train: {images: i, annotations: a}}"), f"{key}={value}")
    assert f"  {key}.{missing}: field required, got " in text


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.epochs", "true", "valid integer, got true"),
        ("train.epochs", "1.5", "valid integer, got 1.5"),
        ("train.epochs", "'3'", "valid integer, got '3'"),
        ("train.epochs", "0", "greater than 0, got 0"),
        ("train.channels_last", "1", "valid boolean, got 1"),
        ("optim.lr", "false", "valid number, got false"),
        ("optim.lr", "-1", "greater than 0, got -1"),
        (
            "loss.alpha",
            "1.5",
            "less than or equal to 1 or a valid array or 'inverse_frequency' or 'effective_number', got 1.5",
        ),
        ("model.backbone", "resnet51", "'resnet18', .*, got 'resnet51'"),
        ("data.min_size", "abc", "valid integer or a valid array, got 'abc'"),
        ("train.compile", "on", "'auto' or a valid boolean, got 'on'"),
        ("model.compat.anchor_spacing", "foo", "'fixed' or 'grid', got 'foo'"),
        ("train.seed", "9223372036854775808", "less than 9223372036854775808, got 9223372036854775808"),
        ("train", "3", re.escape("must be a section ({} has all defaults), got 3")),
    ],
)
def test_an_invalid_value_is_reported_once_with_key_and_value(key: str, value: str, message: str, write: Write) -> None:
    text = mistakes(write("data: {train: {images: i, annotations: a}}"), f"{key}={value}")
    assert text.startswith("the config has 1 mistake:\n")
    assert re.search(rf"^  {re.escape(key)}: .*{message}  \[command line\]$", text, re.MULTILINE)


def test_invalid_list_items_are_reported_by_index(write: Write) -> None:
    message = mistakes(write("model:\n  anchors:\n    sizes: [32, a, 128, b, 512]\n"))
    assert message.startswith("the config has 2 mistakes:")
    for place, value in ((1, "a"), (3, "b")):
        assert re.search(rf"model\.anchors\.sizes\.{place}: .*, got '{value}'  \[.*main\.yaml:3\]", message)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["matching.bg_iou_thresh=0.6"], "bg_iou_thresh must not exceed fg_iou_thresh, got 0.6 > 0.5"),
        (["data.cache_folder=/tmp"], "cache_folder requires a cache_gb above 0"),
        (["train.micro_batch=32"], "train.micro_batch must not exceed train.batch_size, got 32 > 16"),
        (["data.min_size=2000"], "must not exceed data.max_size"),
        (["data.eval_min_size=2000"], "must not exceed data.max_size"),
        (["optim.milestones=[0.9, 0.5]"], "milestones must ascend"),
        (["eval.max_dets=[1, 1, 100]"], "max_dets must be three ascending numbers"),
        (["model.backbone_weights=none"], "norm must not be frozen_bn with backbone_weights none"),
        (["model={backbone_weights: none, norm: bn, trainable_layers: 3}"], "trainable_layers must be 5"),
        (["model.anchors.sizes=[[1,2],[1,2],[1,2],[1,2],[1]]"], "same number of anchor sizes for each level"),
        (["model.anchors.sizes=[[1,2],[1,2],[1,2],[1,2],[1,2]]"], r"octave_scales must be \[1.0\] where sizes lists"),
        (["data.augment=[{A: {}, B: {}}]"], r"augment\[0\] must be one transform"),
    ],
)
def test_contradictory_settings_are_reported(overrides: list[str], message: str, write: Write) -> None:
    text = mistakes(write(), *overrides)
    assert re.search(message, text)
    assert "[command line]" in text


def test_all_mistakes_are_reported_together_with_file_and_line(write: Write) -> None:
    path = write(
        "_base_: base.yaml\ntrain:\n  epochs: many\n  learning_rate: 1\n", base="\n\noptim:\n  lr: -1\nfoo: 1\n"
    )
    message = mistakes(path, "data.imgsz=3").splitlines()
    assert message[0] == "the config has 5 mistakes:"
    base, main = path.with_name("base.yaml"), path
    assert sorted(message[1:]) == sorted(
        [
            f"  train.epochs: input should be a valid integer, got 'many'  [{main}:3]",
            f"  train.learning_rate: unknown key; did you mean optim.lr?  [{main}:4]",
            f"  optim.lr: input should be greater than 0, got -1  [{base}:4]",
            "  foo: unknown key; valid keys here: data, eval, loss, matching, model, optim, postprocess, train"
            f"  [{base}:5]",
            "  data.imgsz: unknown key; did you mean data.min_size?  [command line]",
        ]
    )


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("train.learning_rate", "did you mean optim.lr?"),
        ("imgsz", "did you mean data.min_size?"),
        ("train.lr", "did you mean optim.lr?"),
        ("optim.momentun", "did you mean optim.momentum?"),
        ("batch_size", "did you mean train.batch_size or eval.batch_size?"),
        ("model.num_classes", "the classes are read from data.train's annotations and are never set; remove it"),
        ("modle", "did you mean model?"),
        ("model.head.int", "valid keys here: channels, depth, norm, prior_prob|did you mean"),
        ("data.train.imgs", "did you mean data.train.images?"),
    ],
)
def test_unknown_keys_are_reported_with_the_nearest_valid_one(key: str, suggestion: str, write: Write) -> None:
    message = mistakes(write(), f"{key}=3")
    assert f"  {key}: unknown key; " in message
    assert any(text in message for text in suggestion.split("|"))


@pytest.mark.parametrize("alias", ALIASES)
def test_every_alias_leads_to_an_existing_key(alias: str, write: Write) -> None:
    assert ALIASES[alias] in all_keys()
    assert f"did you mean {ALIASES[alias]}" in mistakes(write(f"{alias}: 3"))


@pytest.mark.parametrize("key", sorted(CLASS_COUNT_KEYS))
@pytest.mark.parametrize("section", ["", "model.", "data.", "model.head."])
def test_the_number_of_classes_is_never_set(key: str, section: str, write: Write) -> None:
    assert "the classes are read from data.train's annotations" in mistakes(write(), f"{section}{key}=3")


def test_a_null_does_not_hide_an_unknown_key(write: Write) -> None:
    assert "foo: unknown key" in mistakes(write("foo: null"))


# --- the object


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Config().train.epochs = 3  # type: ignore[misc]


def test_derived_values_fill_in_the_defaults() -> None:
    base = Config()
    assert base.model.num_trainable_layers == 3
    assert config_from_dict({"model": {"backbone_weights": "none", "norm": "bn"}}, "x").model.num_trainable_layers == 5
    assert config_from_dict({"model": {"trainable_layers": 0}}, "x").model.num_trainable_layers == 0
    assert (base.data.train_sizes, base.data.eval_size) == ((800,), 800)
    several = config_from_dict({"data": {"min_size": [640, 800, 720]}}, "x").data
    assert (several.train_sizes, several.eval_size) == ((640, 800, 720), 800)


def test_anchor_sizes_may_be_listed_per_level() -> None:
    lists = {"sizes": [[x, x * 1.26, x * 1.59] for x in (32, 64, 128, 256, 512)], "octave_scales": [1.0]}
    config = config_from_dict({"model": {"anchors": lists}}, "x")
    assert isinstance(config.model.anchors, AnchorConfig)
    assert config.model.anchors.sizes[0] == (32.0, 32 * 1.26, 32 * 1.59)


def test_stored_settings_are_validated_and_their_source_named() -> None:
    with pytest.raises(ConfigError, match=r"train\.epochs: .*got 0  \[run/last\.pt\]"):
        config_from_dict({"train": {"epochs": 0}}, "run/last.pt")


TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=130)
WORDS = st.sampled_from(
    ["1e5", "1e-3", "no", "on", "y", "1:30", "010", "0x1f", "null", "~", "2017-01-01", ".5", "<<", "="]
)


@given(
    images=WORDS | TEXT,
    annotations=WORDS | TEXT,
    lr=st.floats(1e-12, 1e12),
    betas=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    alpha=st.none() | st.floats(0, 1),
    sizes=st.integers(1, 1333) | st.lists(st.integers(1, 1333), min_size=1, max_size=4).map(tuple),
    seed=st.integers(0, 2**63 - 1),
    augment=st.dictionaries(TEXT, st.floats(allow_nan=False, allow_infinity=False) | st.booleans() | TEXT, max_size=2),
)
@settings(max_examples=50, deadline=None)
def test_a_config_survives_its_own_yaml(
    tmp_path_factory: pytest.TempPathFactory,
    images: str,
    annotations: str,
    lr: float,
    betas: tuple[float, float],
    alpha: float | None,
    sizes: Any,
    seed: int,
    augment: dict[str, Any],
) -> None:
    config = Config.model_validate(
        {
            "data": {
                "train": {"images": images, "annotations": annotations},
                "min_size": sizes,
                "augment": ({"Blur": augment},),
            },
            "optim": {"lr": lr, "betas": betas},
            "loss": {"alpha": alpha},
            "train": {"seed": seed, "ema": {"decay": 0.5}},
        }
    )
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(path) == config
    assert yaml.safe_load(to_yaml(config))  # other tools read it, too


def test_relative_paths_become_absolute_and_other_settings_do_not_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = config_from_dict(
        {
            "data": {
                "train": {"images": "i", "annotations": "/abs/a.json"},
                "val": {"images": "../v", "annotations": "v.json"},
            },
            "model": {"backbone_weights": "w.pth"},
            "train": {"init_from": "last.pt"},
        },
        "x",
    )
    resolved = resolve_data_paths(config)
    assert resolved.data.train == SplitConfig(images=f"{tmp_path}/i", annotations="/abs/a.json")
    assert resolved.data.val is not None
    assert resolved.data.val.annotations == f"{tmp_path}/v.json"
    assert resolved.data.test is None
    assert resolved.model.backbone_weights == f"{tmp_path}/w.pth"
    assert resolved.train.init_from == f"{tmp_path}/last.pt"
    assert resolve_data_paths(resolved) == resolved
    assert resolve_data_paths(Config()) == Config()  # imagenet is no path


@pytest.mark.parametrize("text", ["{head: {norm: gn, channels: 48}}", "{head: {norm: gn}, fpn_channels: 48}"])
def test_group_norm_needs_channels_divisible_by_its_groups(text: str, write: Write) -> None:
    assert "must be a multiple of 32 with head.norm gn" in mistakes(write(f"model: {text}"))


def test_model_settings_missing_from_the_config_come_from_the_checkpoint(write: Write) -> None:
    stored = config_from_dict(
        {"model": {"backbone": "resnet18", "norm": "gn", "head": {"depth": 2, "norm": "gn"}, "fpn_channels": 64,
                   "compat": {"clip": "after_nms"}},
         "postprocess": {"topk_candidates": 500, "nms_thresh": 0.6}}, "x"
    )  # fmt: skip
    assert with_model_of(load_config(write("")), stored).model == stored.model
    assert with_model_of(load_config(write("")), stored).postprocess == stored.postprocess
    written = load_config(write("model: {fpn_channels: 256, head: {depth: 3}}\ndata: {min_size: 640}"))
    filled = with_model_of(written, stored)
    assert (filled.model.backbone, filled.model.norm, filled.model.head.norm) == ("resnet18", "gn", "gn")
    assert (filled.model.fpn_channels, filled.model.head.depth) == (256, 3), "even if the written value is the default"
    assert filled.data == written.data
    thresh = with_model_of(load_config(write("postprocess: {nms_thresh: 0.5}")), stored).postprocess
    assert (thresh.nms_thresh, thresh.topk_candidates) == (0.5, 500)
    assert with_model_of(filled, Config()) == filled, "every setting is written now"


def test_backbone_weights_and_trainable_layers_are_not_part_of_the_model(write: Write) -> None:
    """A network that was trained from scratch has weights now, so some of its layers may be frozen."""
    stored = config_from_dict({"model": {"backbone_weights": "none", "norm": "bn"}}, "x")
    filled = with_model_of(load_config(write("model: {trainable_layers: 2}")), stored).model
    assert (filled.norm, filled.trainable_layers) == ("bn", 2)


def test_written_and_filled_in_settings_must_be_consistent(write: Write) -> None:
    stored = config_from_dict({"model": {"anchors": {"sizes": [[8, 9]] * 5, "octave_scales": [1]}}}, "x")
    with pytest.raises(ConfigError, match=r"octave_scales must be \[1.0\]"):
        with_model_of(load_config(write("model: {anchors: {octave_scales: [1, 1.5]}}")), stored)


def test_the_base_recipe_lists_every_setting_with_its_default(repo_root: Path) -> None:
    path = repo_root / "configs" / "_base_" / "retinanet.yaml"
    assert load_config(path) == Config()
    listed = set(flatten(yaml.safe_load(path.read_text())))
    settings = {key for key, section in all_keys().items() if not section}
    optional = ("data.train", "data.val", "data.test", "train.ema")
    assert listed == {key for key in settings if not key.startswith(tuple(f"{name}." for name in optional))} | {
        *optional
    }


# --- formats


GOLDEN = Path(__file__).resolve().parent / "golden"
OLD_VALUES = {
    "norm_eps": "0.001", "stride_in": "1x1", "p6_from": "p5", "relu_before_p7": "false", "bias_before_norm": "true",
    "strides": "grid", "center_offset": "0.0", "rounding": "integer", "channel_order": "bgr", "resize": "cv2_bilinear",
    "clip": "after_nms", "drop_empty": "true", "bound_shrinking": "true",
}  # fmt: skip
"""A value other than the default for every setting that moved after format 1, by its old name."""


def test_a_config_of_format_1_loads_with_its_settings_in_their_current_place() -> None:
    """The file was written by the code of that format (tests/golden/make_format_1.py)."""
    config = load_config(GOLDEN / "format_1" / "config.yaml")
    stored = yaml.safe_load((GOLDEN / "format_1" / "config.yaml").read_text())
    current = flatten(config.model_dump(mode="json"))
    moved = {".".join(old): ".".join(new) for old, new in MOVED.items()}
    for key, value in flatten(stored).items():
        assert current[moved.get(key, key)] == value, key
    assert config == config_from_dict(stored, "x")
    assert all(value != getattr(Config().model.compat, key) for key, value in config.model.compat)


@pytest.mark.parametrize("old", MOVED, ids=".".join)
def test_old_keys_are_accepted_in_files_and_overrides(old: tuple[str, ...], write: Write) -> None:
    value, key, new = OLD_VALUES[old[-1]], ".".join(old), ".".join(MOVED[old])
    expected = load_config(write(), [f"{new}={value}"])
    assert config_differences(expected, Config(), [new]), "another value than the default"
    assert load_config(write(), [f"{key}={value}"]) == expected
    nested: Any = yaml.safe_load(value)
    for part in reversed(old):
        nested = {part: nested}
    assert load_config(write(yaml.safe_dump(nested))) == expected
    assert load_config(write(yaml.safe_dump({"format": 1, **nested}))) == expected
    section = yaml.safe_dump(nested[old[0]], default_flow_style=True)
    assert load_config(write(), [f"{old[0]}={section}"]) == expected


def test_old_and_current_keys_merge_in_the_order_of_the_files(write: Write) -> None:
    path = write(
        "_base_: [a.yaml, b.yaml]\n",
        a="model: {compat: {resize: pil_bilinear, clip: after_nms}}",
        b="model: {resize: cv2_bilinear}",
    )
    compat = load_config(path).model.compat
    assert (compat.resize, compat.clip) == ("cv2_bilinear", "after_nms")
    assert load_config(path, ["model.compat.resize=area"]).model.compat.resize == "area"
    path = write("_base_: a.yaml\nmodel: {compat: {resize: area}}", a="model: {resize: cv2_bilinear}")
    assert load_config(path).model.compat.resize == "area"


def test_mistakes_under_old_keys_are_reported_under_the_current_ones(write: Write) -> None:
    path = write("model:\n  resize: nearest\n  stride_in:\n")
    message = mistakes(path, "postprocess.clip=never")
    assert f"{path}:3: `model.compat.stride_in` has no value" in message
    assert re.search(rf"model\.compat\.resize: .*, got 'nearest'  \[{re.escape(str(path))}:2\]", message)
    assert re.search(r"model\.compat\.clip: .*, got 'never'  \[command line\]", message)
    message = mistakes(write("model: {resize: area, compat: {resize: area}}"))
    assert "`model.compat.resize` is set twice" in message
    assert "model.compat: must be a section" in mistakes(write("model: {compat: 3, resize: area}"))


def test_only_the_strides_of_the_pyramid_are_accepted(write: Write) -> None:
    path = write("model: {anchors: {strides: [8, 16, 32, 64, 128.0]}}")
    assert load_config(path).model.compat.anchor_spacing == "fixed"
    message = mistakes(write(), "model.anchors.strides=[4, 8, 16, 32, 64]")
    assert "model.compat.anchor_spacing: input should be 'fixed' or 'grid', got [4, 8, 16, 32, 64]" in message


def test_a_newer_format_is_refused_by_name(write: Write) -> None:
    path = write(f"format: {FORMAT + 1}\nmodel: {{new: 1}}\n")
    assert mistakes(path) == (
        f"config {path} has format {FORMAT + 1}, this version reads up to {FORMAT}; update retinanet-detector"
    )
    assert load_config(write(f"format: {FORMAT}\n")) == Config()


@pytest.mark.parametrize("number", ["0", "-1", "1.5", "true", "two", "null", "[2]"])
def test_a_format_must_be_a_number(number: str, write: Write) -> None:
    assert "must have a format of 1 to 2, got " in mistakes(write(f"format: {number}\n"))


def test_written_configs_have_the_current_format() -> None:
    assert to_yaml(Config()).startswith(f"format: {FORMAT}\n")


# --- comparing


def test_equal_configs_have_no_differences() -> None:
    assert config_differences(Config(), Config()) == []


def test_differences_are_listed_with_both_values() -> None:
    other = config_from_dict({"optim": {"lr": 0.5}, "train": {"ema": {"decay": 0.9}}}, "x")
    assert sorted(config_differences(Config(), other)) == [("optim.lr", 0.01, 0.5), ("train.ema.decay", None, 0.9)]
    assert config_differences(Config(), other, ["optim"]) == [("optim.lr", 0.01, 0.5)]
    assert config_differences(Config(), other, ["optim.lr", "loss"]) == [("optim.lr", 0.01, 0.5)]
    assert config_differences(Config(), other, []) == []
    assert config_differences(Config(), other, ["optim.l"]) == [], "a key, not the start of one"


def test_a_missing_file_with_the_name_of_a_recipe_names_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("_base_: elsewhere/_base_/retinanet.yaml\n")
    with pytest.raises(ConfigError, match=r"`_base_` in .*; the recipe of this name is .*_base_/retinanet\.yaml"):
        load_config(tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match=r"; the recipe of this name is .*configs/quickstart\.yaml"):
        load_config(tmp_path / "configs" / "quickstart.yaml")


# --- configs of unknown origin


@pytest.mark.parametrize("kind", ["FIFO", "folder", "device", "loop", "name"])
def test_a_config_that_is_no_regular_file_is_an_error_at_once(kind: str, write: Write, tmp_path: Path) -> None:
    path = tmp_path / "special.yaml"
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind != "name":
        path.symlink_to("/dev/zero" if kind == "device" else path)
    name = "x" * 300 + ".yaml" if kind == "name" else path.name
    reason = r"cannot be read: (is a |Too many levels|File name too long)"
    assert re.search(reason, mistakes(tmp_path / name))
    assert re.search(reason + ".*named by `_base_` in .*main.yaml", mistakes(write(f"_base_: {name}")))


@pytest.mark.parametrize("base", ['"a\\0b"', '"\\ud800"', "''", '"\\e[2J"', "[.]", "'[abc'", "'**/..'"])
def test_a_base_that_no_file_can_be_is_an_error(base: str, write: Write) -> None:
    assert "main.yaml" in mistakes(write(f"_base_: {base}"))


def test_bases_that_each_name_two_bases_are_read_a_bounded_number_of_times(write: Write) -> None:
    files = {f"b{k}": f"_base_: [b{k + 1}.yaml, b{k + 1}.yaml]" for k in range(30)}
    assert "must be read from at most 100 files" in mistakes(write("_base_: [b0.yaml]", **files, b30=""))


def test_thousands_of_mistakes_are_a_short_error_soon(write: Write) -> None:
    text = mistakes(write("\n".join(f"unknown{k}: {k}" for k in range(7000))))
    assert text.startswith("the config has 7,000 mistakes:\n  unknown0: unknown key")
    assert re.search(r"\n  and 6,9\d\d more$", text)
    assert len(text.encode()) <= 4000


@pytest.mark.parametrize(
    "text",
    ["a: " + "x" * 130_000, "x" * 130_000 + ": 1", f"loss: {{alpha: [{'7, ' * 20_000}]}}", "model: [1]",
     "data: {augment: [{A: {b: {c: 1}}}]}", "- - - - - 1", f"train: {{epochs: {'9' * 40}}}",
     '"\\e[2J": 3', "optim: {lr: '\\e'}"],
)  # fmt: skip
def test_the_error_of_any_value_is_harmless_and_short(text: str, write: Write) -> None:
    message = mistakes(write(text + "\n"), "nothing.here=3")
    assert len(message.encode()) <= 4000
    assert "\x1b" not in message


def test_the_config_of_a_checkpoint_has_the_budget_of_a_file() -> None:
    nested: dict[str, Any] = {}
    for _ in range(40):
        nested = {"a": nested}
    for values in (nested, {"data": {"augment": [{"x": {"y": [0] * 600_000}}]}}):
        with pytest.raises(ConfigError, match="its config is too large, or nested too deeply"):
            config_from_dict(values, "x.pt")


@pytest.mark.parametrize("override", ["a." * 5000 + "b=1", "data.train.images=/tmp/\udcff"])
def test_an_override_that_no_config_can_hold_is_an_error(override: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("train: {epochs: 1}")
    with pytest.raises(ConfigError, match="override must be key=value, in UTF-8, got"):
        load_config(tmp_path / "c.yaml", [override])
