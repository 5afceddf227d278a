"""Reading configs: what is merged, what is refused, and how mistakes are told."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from detector.config import AnchorConfig, Config, EmaConfig, SplitConfig, flatten, resolve_data_paths
from detector.config_errors import ALIASES, CLASS_COUNT_KEYS, _all_keys
from detector.config_yaml import config_from_dict, load_config, to_yaml, with_model_of
from detector.errors import ConfigError

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes files into an empty folder and gives the path of the first."""

    def write_files(main: str = "", **others: str) -> Path:
        for name, text in {"main": main, **others}.items():
            (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
        return tmp_path / "main.yaml"

    return write_files


def mistakes(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


# ---- reading and merging


@pytest.mark.parametrize("text", ["", "# nothing but a comment\n", "train: null\n", "{}"])
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


def test_the_same_base_by_two_ways_is_no_cycle(write: Write) -> None:
    path = write("_base_: [a.yaml, b.yaml]", a="_base_: c.yaml", b="_base_: c.yaml", c="train: {epochs: 3}")
    assert load_config(path).train.epochs == 3


def test_bases_that_lead_back_are_told(write: Write) -> None:
    assert "leads back to itself" in mistakes(write("_base_: main.yaml"))
    assert "leads back to itself" in mistakes(write("_base_: a.yaml", a="_base_: b.yaml", b="_base_: main.yaml"))


@pytest.mark.parametrize("base", ["3", "[a.yaml, 3]", "{a: b}", "null"])
def test_a_base_must_be_a_path_or_paths(base: str, write: Write) -> None:
    assert "`_base_` must be a path or a list of paths" in mistakes(write(f"_base_: {base}", a=""))


def test_a_missing_file_is_told_with_the_nearest_name(write: Write) -> None:
    path = write("_base_: othr.yaml", other="")
    assert re.search(
        r"othr\.yaml does not exist \(named by .*main\.yaml\); did you mean .*other\.yaml\?", mistakes(path)
    )
    told = mistakes(path.with_name("mian.yaml"))
    assert told.startswith(f"config file {path.with_name('mian.yaml')} does not exist; did you mean {path}?")
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
        ("a: &x {b: *x}", "main.yaml"),
        ("a: &x [*x]", "main.yaml"),
        ("train: 1\n\x00", "main.yaml"),
    ],
)
def test_broken_yaml_is_told_with_its_line(text: str, where: str, write: Write) -> None:
    told = mistakes(write(text))
    assert f"{where}: the YAML is broken" in told


def test_a_file_that_is_no_text_is_told(tmp_path: Path) -> None:
    (tmp_path / "main.yaml").write_bytes(b"\xff\xfe\x00\x81")
    assert "cannot be read" in mistakes(tmp_path / "main.yaml")


@pytest.mark.parametrize("text", ["- a\n- b\n", "3", "words"])
def test_a_config_must_be_a_mapping(text: str, write: Write) -> None:
    assert "a config must be a mapping of sections" in mistakes(write(text))


def test_tags_that_would_run_code_are_refused_and_nothing_runs(write: Write, tmp_path: Path) -> None:
    told = mistakes(write(f'train: !!python/object/apply:os.mkdir ["{tmp_path}/ran"]'))
    assert "could not determine a constructor" in told
    assert not (tmp_path / "ran").exists()


def test_a_key_that_stands_twice_is_told_with_both_lines(write: Write) -> None:
    told = mistakes(write("train: {epochs: 2}\noptim:\n  lr: 0.1\n  lr: 0.2\n"))
    assert re.search(r"main\.yaml:4: `optim\.lr` stands twice, first at .*main\.yaml:3", told)


def test_a_key_that_stands_twice_inside_a_list_is_told_too(write: Write) -> None:
    text = "data:\n  augment:\n    - VerticalFlip: {}\n    - Blur:\n        p: 0.5\n        p: 0.1\n"
    told = mistakes(write(text))
    assert re.search(r"main\.yaml:6: `data\.augment\.1\.Blur\.p` stands twice, first at .*main\.yaml:5", told)
    assert "`data.augment.0.Blur.p` stands twice" in mistakes(write(), "data.augment=[{Blur: {p: 0.5, p: 0.1}}]")
    config = load_config(write("data: {augment: [{Blur: {p: 0.5}}, {Blur: {p: 0.1}}]}"))
    assert config.data.augment == ({"Blur": {"p": 0.5}}, {"Blur": {"p": 0.1}}), (
        "the same name in two items is no mistake"
    )


def test_an_empty_section_of_a_file_must_not_wipe_what_its_base_says(write: Write) -> None:
    for text, base, key, line in (
        ("optim:\n  # lr: 0.1\n", "optim: {lr: 0.5}", "optim", 2),
        ("train:\n  epochs: 2\nmodel:\n  head:\n", "model: {head: {depth: 2}}", "model.head", 5),
        ("model: {anchors: null}", "model: {anchors: {rounding: integer}}", "model.anchors", 2),
    ):
        path = write(f"_base_: base.yaml\n{text}", base=base)
        told = mistakes(path)
        assert f"  {path}:{line}: `{key}` must not be empty" in told
        assert f"wipe everything that {path.with_name('base.yaml')}:1 says of it" in told
    assert "`loss` must not be empty" in mistakes(write("_base_: [a.yaml, b.yaml]", a="loss: {gamma: 1}", b="loss:"))


def test_an_empty_section_that_wipes_nothing_or_may_be_absent_is_no_mistake(write: Write) -> None:
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
def test_a_section_and_a_value_of_the_same_key_are_told_with_both_files(
    base: str, main: str, key: str, write: Write
) -> None:
    path = write(f"_base_: base.yaml\n{main}\n", base=base)
    told = mistakes(path)
    assert told.startswith(f"the config has 1 mistake:\n  `{key}` must be a section or a value, not both, got ")
    assert f"[{path.with_name('base.yaml')}:1]" in told
    assert f"[{path}:2]" in told


# ---- overrides


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
def test_an_override_that_would_discard_another_or_the_files_is_told(
    overrides: list[str], got: str, write: Write
) -> None:
    path = write("train: {ema: null}\ndata: {train: {images: i}}\n")
    told = mistakes(path, *overrides).replace(str(path), path.name)
    assert re.search(r"\n  `[a-z.]+` must be a section or a value, not both, got ", told)
    assert got in told


def test_a_section_that_is_a_value_hides_no_other_mistake_and_is_told_how_to_be_one(write: Write) -> None:
    told = mistakes(write("train: {ema: {}}"), "train.ema=true", "optim.lr=", "optim.lrr=3")
    assert told.splitlines() == [
        "the config has 3 mistakes:",
        f"  `train.ema` must be a section or a value, not both, got {{}} [{write('train: {ema: {}}')}:1] and then true "
        "[command line]; {} has the section with what it says elsewhere or by default, null has it not",
        "  override must be key=value, for example train.epochs=3, got 'optim.lr='; null in place of a value means the default "
        "or, where there is one, none",
        "  optim.lrr: unknown key; did you mean optim.lr?  [command line]",
    ]
    told = mistakes(write("train: {ema: true}\ndata: {train: 5, augment: [{HorizontalFlip: 5}]}"))
    assert "train.ema: must be a section ({} is one with all defaults), got true" in told
    assert "data.train: must be a section with images, annotations, got 5" in told
    assert "data.augment.0.HorizontalFlip: must be a mapping, {} or {name: value, ...}, got 5" in told
    told = mistakes(write("_base_: base.yaml\ntrain: 5", base="train: {epohcs: 3}"), "=3", "=4", "train=")
    assert told.startswith("the config has 5 mistakes:")
    assert all(text in told for text in ("`train` must be a section or", "train.epohcs", "'=3'", "'=4'", "'train='"))


def test_a_setting_left_empty_in_a_file_is_not_taken_for_the_default(write: Write) -> None:
    path = write("_base_: base.yaml\noptim:\n  lr:\n", base="optim: {lr: 0.5}")
    assert f"  {path}:3: `optim.lr` is left empty; give it a value, or delete the line" in mistakes(path)
    several = mistakes(write("optim:\n  lr:\n  momentm: 3\ntrain:\n  epohcs: 3\n  batch_size:\n"))
    assert several.startswith("the config has 4 mistakes:")
    assert all(
        k in several for k in ("`optim.lr` is left", "optim.momentm", "train.epohcs", "`train.batch_size` is left")
    )
    assert "`optim.lr` is left empty" in mistakes(write(), "optim={lr: , weight_decay: 0.1}")
    assert load_config(write("_base_: base.yaml\noptim: {lr: null}", base="optim: {lr: 0.5}")).optim == Config().optim
    assert load_config(write("loss: {alpha: }\ntrain: {micro_batch: }")).loss.alpha is None


def test_lists_and_values_replace_each_other(write: Write) -> None:
    path = write("data: {min_size: 300}\nmodel: {anchors: {strides: grid}}\n")
    config = load_config(path, ["data.min_size=[200, 300]", "model.anchors.strides=[4, 8, 16, 32, 64]"])
    assert config.data.min_size == (200, 300)
    assert config.model.anchors.strides == (4, 8, 16, 32, 64)
    assert load_config(path, ["data.min_size=[200, 300]", "data.min_size=100"]).data.min_size == 100


@pytest.mark.parametrize(
    "text",
    ["/d/set #2", "2024", "C:\\x: y", "[1, 2", "{a}", "'quoted'", "true", "1e5", "a=b", " x ", "*x", "%", "~", "Ünï"],
)
def test_a_text_setting_is_taken_from_the_command_line_as_it_stands(text: str, write: Write) -> None:
    config = load_config(
        write("data: {train: {images: i, annotations: a}}\nmodel: {norm: bn}\n"),
        [f"data.train.images={text}", f"train.init_from={text}", f"model.backbone_weights={text}"],
    )
    assert config.data.train == SplitConfig(images=text, annotations="a")
    assert config.train.init_from == text
    assert config.model.backbone_weights == text


def test_null_is_no_text(write: Write) -> None:
    path = write("data: {train: {images: i, annotations: a}}\ntrain: {init_from: a.pt}\n")
    assert load_config(path, ["train.init_from=null"]).train.init_from is None
    assert "data.train.images: input should be a valid string, got null" in mistakes(path, "data.train.images=null")


def test_weights_that_are_null_are_not_taken_for_imagenets(write: Write) -> None:
    told = "model.backbone_weights: backbone_weights must be imagenet, a file, or none for a network from scratch, got null"
    assert f"{told}  [command line]" in mistakes(write(), "model.backbone_weights=null")
    path = write("_base_: base.yaml\nmodel: {backbone_weights: }", base="model: {backbone_weights: w.pth}")
    assert f"{told}  [{path}:2]" in mistakes(path)


@pytest.mark.parametrize(
    "override", ["", "train.epochs", "=3", "train..epochs=3", ".=1", "train.init_from=", "optim.lr=", "optim.lr=# 3"]
)
def test_an_override_must_be_key_and_value(override: str, write: Write) -> None:
    assert "override must be key=value, for example train.epochs=3" in mistakes(write(), override)


def test_mistakes_of_overrides_are_told_as_such(write: Write) -> None:
    path = write("data: {train: {images: i, annotations: a}}\n")
    assert "train.epochs: input should be a valid integer, got 'x'  [command line]" in mistakes(path, "train.epochs=x")
    assert "[command line]" in mistakes(path, "data.train={images: 3}")  # the file's line for this key is stale
    told = mistakes(write("data: {val: null}\n"), "data.val.images=i")
    assert "data.val.annotations: field required" in told
    assert told.endswith("[command line]")
    assert "override train.epochs:1: the YAML is broken" in mistakes(path, "train.epochs=[1")


# ---- values


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 0.001), ("1E+2", 100.0), ("1.5e-2", 0.015), (".5", 0.5), ("2", 2.0)]
)
def test_numbers_may_be_written_with_an_exponent(text: str, value: float, write: Write) -> None:
    assert load_config(write(f"optim: {{lr: {text}}}")).optim.lr == value


@pytest.mark.parametrize("word", ["yes", "no", "on", "off", "y", "n", "1:30", "010", "2017-1-1", "0o17"])
def test_words_that_yaml_once_took_for_more_are_words(word: str, write: Write) -> None:
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
def test_a_list_that_is_too_short_is_told_with_the_place_that_is_missing(
    key: str, value: str, missing: int, write: Write
) -> None:
    text = mistakes(write("data: {train: {images: i, annotations: a}}"), f"{key}={value}")
    assert f"  {key}.{missing}: field required, got " in text


@pytest.mark.parametrize(
    ("key", "value", "told"),
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
        ("model.anchors.strides", "foo", "valid array or 'grid', got 'foo'"),
        ("train.seed", "9223372036854775808", "less than 9223372036854775808, got 9223372036854775808"),
        ("train", "3", re.escape("must be a section ({} is one with all defaults), got 3")),
    ],
)
def test_wrong_values_are_told_once_with_key_and_value(key: str, value: str, told: str, write: Write) -> None:
    text = mistakes(write("data: {train: {images: i, annotations: a}}"), f"{key}={value}")
    assert text.startswith("the config has 1 mistake:\n")
    assert re.search(rf"^  {re.escape(key)}: .*{told}  \[command line\]$", text, re.MULTILINE)


def test_items_of_lists_are_told_by_their_place(write: Write) -> None:
    told = mistakes(write("model:\n  anchors:\n    sizes: [32, a, 128, b, 512]\n"))
    assert told.startswith("the config has 2 mistakes:")
    for place, value in ((1, "a"), (3, "b")):
        assert re.search(rf"model\.anchors\.sizes\.{place}: .*, got '{value}'  \[.*main\.yaml:3\]", told)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["matching.bg_iou_thresh=0.6"], "bg_iou_thresh must not exceed fg_iou_thresh, got 0.6 > 0.5"),
        (["data.cache_folder=/tmp"], "cache_folder keeps nothing while cache_gb is 0"),
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
def test_settings_that_contradict_each_other_are_told(overrides: list[str], told: str, write: Write) -> None:
    text = mistakes(write(), *overrides)
    assert re.search(told, text)
    assert "[command line]" in text


def test_all_mistakes_are_told_at_once_with_file_and_line(write: Write) -> None:
    path = write(
        "_base_: base.yaml\ntrain:\n  epochs: many\n  learning_rate: 1\n", base="\n\noptim:\n  lr: -1\nfoo: 1\n"
    )
    told = mistakes(path, "data.imgsz=3").splitlines()
    assert told[0] == "the config has 5 mistakes:"
    base, main = path.with_name("base.yaml"), path
    assert sorted(told[1:]) == sorted(
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
def test_unknown_keys_are_told_with_the_nearest_valid_one(key: str, suggestion: str, write: Write) -> None:
    told = mistakes(write(), f"{key}=3")
    assert f"  {key}: unknown key; " in told
    assert any(text in told for text in suggestion.split("|"))


@pytest.mark.parametrize("alias", ALIASES)
def test_every_alias_leads_to_an_existing_key(alias: str, write: Write) -> None:
    assert ALIASES[alias] in _all_keys()
    assert f"did you mean {ALIASES[alias]}" in mistakes(write(f"{alias}: 3"))


@pytest.mark.parametrize("key", sorted(CLASS_COUNT_KEYS))
@pytest.mark.parametrize("section", ["", "model.", "data.", "model.head."])
def test_the_number_of_classes_is_never_set(key: str, section: str, write: Write) -> None:
    assert "the classes are read from data.train's annotations" in mistakes(write(), f"{section}{key}=3")


def test_a_null_does_not_hide_an_unknown_key(write: Write) -> None:
    assert "foo: unknown key" in mistakes(write("foo: null"))


# ---- the object


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


def test_torchvisions_detectron2s_and_mmdetections_anchors_can_be_said() -> None:
    """Their numbers: tests/test_anchors.py."""
    lists = {"sizes": [[x, x * 1.26, x * 1.59] for x in (32, 64, 128, 256, 512)], "octave_scales": [1.0]}
    config = config_from_dict({"model": {"anchors": {**lists, "strides": "grid", "rounding": "integer"}}}, "x")
    assert isinstance(config.model.anchors, AnchorConfig)
    assert config.model.anchors.sizes[0] == (32.0, 32 * 1.26, 32 * 1.59)


def test_stored_settings_are_checked_and_their_source_named() -> None:
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


def test_relative_paths_become_absolute_and_the_rest_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_group_norm_needs_channels_that_its_groups_divide(text: str, write: Write) -> None:
    assert "must be a multiple of 32 with head.norm gn" in mistakes(write(f"model: {text}"))


def test_what_nobody_says_of_the_model_is_taken_from_another(write: Write) -> None:
    theirs = config_from_dict(
        {"model": {"backbone": "resnet18", "norm": "gn", "head": {"depth": 2, "norm": "gn"}, "fpn_channels": 64},
         "postprocess": {"clip": "after_nms", "nms_thresh": 0.6}}, "x"
    )  # fmt: skip
    assert with_model_of(load_config(write("")), theirs).model == theirs.model
    assert with_model_of(load_config(write("")), theirs).postprocess == theirs.postprocess
    said = load_config(write("model: {fpn_channels: 256, head: {depth: 3}}\ndata: {min_size: 640}"))
    filled = with_model_of(said, theirs)
    assert (filled.model.backbone, filled.model.norm, filled.model.head.norm) == ("resnet18", "gn", "gn")
    assert (filled.model.fpn_channels, filled.model.head.depth) == (256, 3), "also where it is the default that is said"
    assert filled.data == said.data
    thresh = with_model_of(load_config(write("postprocess: {nms_thresh: 0.5}")), theirs).postprocess
    assert (thresh.nms_thresh, thresh.clip) == (0.5, "after_nms")
    assert with_model_of(filled, Config()) == filled, "everything is said now"


def test_where_weights_came_from_and_what_was_trained_is_no_part_of_the_model(write: Write) -> None:
    """A network that was trained from scratch has weights now, so layers of it may be frozen."""
    theirs = config_from_dict({"model": {"backbone_weights": "none", "norm": "bn"}}, "x")
    filled = with_model_of(load_config(write("model: {trainable_layers: 2}")), theirs).model
    assert (filled.norm, filled.trainable_layers) == ("bn", 2)


def test_what_is_said_and_what_is_taken_must_go_together(write: Write) -> None:
    theirs = config_from_dict({"model": {"anchors": {"sizes": [[8, 9]] * 5, "octave_scales": [1]}}}, "x")
    with pytest.raises(ConfigError, match=r"octave_scales must be \[1.0\]"):
        with_model_of(load_config(write("model: {anchors: {octave_scales: [1, 1.5]}}")), theirs)


def test_the_base_recipe_says_every_setting_with_its_default(repo_root: Path) -> None:
    """The README promises it."""
    path = repo_root / "configs" / "_base_" / "retinanet.yaml"
    assert load_config(path) == Config()
    said = {key for key, _ in flatten(yaml.safe_load(path.read_text())).items()}
    settings = {key for key, section in _all_keys().items() if not section}
    optional = ("data.train", "data.val", "data.test", "train.ema")
    assert said == {key for key in settings if not key.startswith(tuple(f"{name}." for name in optional))} | {*optional}
