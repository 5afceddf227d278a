"""Every setting of the detector: its type, default, unit and reason; and how YAML becomes a `Config`.

A config is read as: the files named by `_base_`, then the file itself, then `key=value` overrides. Mappings merge,
lists replace, null removes. Two things must not replace each other silently: a section and a value (`optim=adamw
optim.lr=0.1`), and what a base says of a section and the same section left empty in a file, because that is what
commenting all of its lines out leaves behind. (Sections that may be absent, data.train and train.ema, are removed by
it; so is any section by `section=null` on the command line.) An override of a text setting, a path, is taken as it
stands and not read as YAML. Once all is merged, the mistakes of all sources are reported together.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveInt = Annotated[int, Field(gt=0)]
Five = Annotated[tuple[Positive, ...], Field(min_length=5, max_length=5)]

Backbone = Literal[
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152",
    "resnext50_32x4d", "resnext101_32x4d", "resnext101_32x8d", "resnext101_64x4d",
]  # fmt: skip
Norm = Literal["frozen_bn", "bn", "sync_bn", "gn"]


class Section(BaseModel):
    """A group of settings: immutable, and an unknown key is an error rather than ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


AnySection = TypeVar("AnySection", bound=Section)


class HeadConfig(Section):
    """The class and the box subnet (Lin et al. 2017, section 4): the same shape, separate weights."""

    depth: Annotated[int, Field(ge=0)] = 4  # 3x3 convolutions before the last one
    channels: PositiveInt | None = None  # of those convolutions; null: as many as the pyramid has
    norm: Literal["none", "gn"] = (
        "none"  # after each convolution; gn: GroupNorm of 32 groups, convolutions without bias
    )
    bias_before_norm: bool = False  # the convolutions keep their bias although gn has one (detectron2)
    prior_prob: Annotated[float, Field(gt=0, lt=1)] = 0.01  # score of every anchor before training (section 4.1)
    # sigmoid: one yes or no for each class. softmax: one class or the background, which has an output of its own; before
    # training the classes share prior_prob.
    activation: Literal["sigmoid", "softmax"] = "sigmoid"


class AnchorConfig(Section):
    """Boxes laid over every cell of P3..P7 (Lin et al. 2017, section 4)."""

    # Side of a square anchor in pixels of the network input, per level P3..P7; or a list per level, which then holds
    # the sides themselves and needs octave_scales: [1.0].
    sizes: Annotated[tuple[Positive | tuple[Positive, ...], ...], Field(min_length=5, max_length=5)] = (
        32.0, 64.0, 128.0, 256.0, 512.0,
    )  # fmt: skip
    octave_scales: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))
    ratios: Annotated[tuple[Positive, ...], Field(min_length=1)] = (0.5, 1.0, 2.0)  # height / width, at equal area
    # Pixels between neighbouring anchors, per level; grid: padded image size // feature map size (torchvision's rule).
    strides: Five | Literal["grid"] = (8.0, 16.0, 32.0, 64.0, 128.0)
    # Where in its cell an anchor's centre lies, in strides. 0.5 is the middle: anchors then lie alike towards all four
    # borders, so a mirrored image has mirrored targets. torchvision, detectron2 and mmdetection use 0, the corner.
    center_offset: Annotated[float, Field(ge=0, lt=1)] = 0.5
    rounding: Literal["none", "integer"] = "none"  # integer: corners around the centre rounded (torchvision)

    @model_validator(mode="after")
    def _sizes_of_equal_length(self) -> AnchorConfig:
        lengths = {len(s) if isinstance(s, tuple) else 1 for s in self.sizes}
        if len(lengths) > 1:
            raise ValueError(f"sizes must give the same number of anchor sizes for each level, got {self.sizes}")
        if any(isinstance(s, tuple) for s in self.sizes) and self.octave_scales != (1.0,):
            raise ValueError(
                f"octave_scales must be [1.0] where sizes lists every side of a level, got {list(self.octave_scales)}"
            )
        return self


class ModelConfig(Section):
    """The network; stored in every checkpoint and not to be changed afterwards."""

    backbone: Backbone = "resnet50"
    backbone_weights: str = "imagenet"  # imagenet (torchvision's download), none, or a .pt/.pth/.npz/.safetensors file
    # How many of the five parts (stem, layer1..layer4) are trained, counted from the top. null: 3 with weights (the
    # paper's), 5 without.
    trainable_layers: Annotated[int, Field(ge=0, le=5)] | None = None
    norm: Norm = "frozen_bn"  # of the backbone. frozen_bn: batch norm with the statistics that came with the weights
    norm_eps: NonNegative = 1e-5  # added to the variance; 0 in torchvision's first RetinaNet weights
    # Which convolution of a bottleneck halves the resolution: the 3x3 (torchvision), or the first 1x1 (He et al. 2016 as
    # published; the ResNets of detectron2 and mmdetection's caffe style).
    stride_in: Literal["3x3", "1x1"] = "3x3"
    fpn_channels: PositiveInt = 256
    p6_from: Literal["c5", "p5"] = "c5"
    relu_before_p7: bool = True
    head: HeadConfig = HeadConfig()
    anchors: AnchorConfig = AnchorConfig()
    channel_order: Literal["rgb", "bgr"] = "rgb"  # of what the first convolution sees, and of the next two
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)  # of values 0..255; ImageNet's
    pixel_std: tuple[Positive, Positive, Positive] = (58.395, 57.12, 57.375)
    # How pictures get their size. area: by areas where they shrink, bilinear where they grow (no aliasing, 8 bit). The others
    # are how imported networks saw theirs: float_bilinear torchvision's, pil_bilinear detectron2's, cv2_bilinear
    # mmdetection's.
    resize: Literal["area", "float_bilinear", "pil_bilinear", "cv2_bilinear"] = "area"
    # multiple_128: height and width padded to multiples of 128, the stride of P7, so that every level's grid is exact
    # and a run sees few shapes. batch_max_32: to the largest of the batch, rounded up to 32 (torchvision, detectron2,
    # mmdetection; less waste on small images).
    pad: Literal["multiple_128", "batch_max_32"] = "multiple_128"

    @field_validator("backbone_weights", mode="before")
    @classmethod
    def _null_is_not_none(cls, value: object) -> object:
        if value is None:
            raise ValueError("backbone_weights must be imagenet, a file, or none for a network from scratch, got null")
        return value

    @model_validator(mode="after")
    def _freezes_only_what_is_known(self) -> ModelConfig:
        if self.backbone_weights == "none" and self.trainable_layers not in (None, 5):
            raise ValueError(
                f"trainable_layers must be 5 (or null) with backbone_weights none, got {self.trainable_layers}: "
                "random layers would stay random; train them all, or name weights"
            )
        if self.backbone_weights == "none" and self.norm == "frozen_bn":
            raise ValueError(
                "norm must not be frozen_bn with backbone_weights none: there are no statistics to freeze; "
                "set model.norm=bn (or gn, which suits small batches)"
            )
        return self

    @model_validator(mode="after")
    def _groups_go_round(self) -> ModelConfig:
        channels = self.head.channels or self.fpn_channels
        if self.head.norm == "gn" and channels % 32:
            raise ValueError(
                f"head.channels (or fpn_channels) must be a multiple of 32 with head.norm gn, which makes 32 groups of "
                f"them, got {channels}"
            )
        return self

    @property
    def num_trainable_layers(self) -> int:
        """`trainable_layers` with its default filled in."""
        if self.trainable_layers is not None:
            return self.trainable_layers
        return 5 if self.backbone_weights == "none" else 3


NOT_PART_OF_THE_MODEL = ("backbone_weights", "trainable_layers")
"""Settings of `model` that only matter while training."""


class MatchingConfig(Section):
    """Which anchor answers for which object (Lin et al. 2017, section 4)."""

    fg_iou_thresh: Fraction = 0.5  # an anchor overlapping an object at least so much is positive
    bg_iou_thresh: Fraction = 0.4  # below this it is background; in between it is ignored
    # Give every object at least its best anchor, however bad. The paper does not; torchvision and detectron2 do.
    low_quality_matches: bool = False
    # Keep anchors that lie at least half in a crowd or ignore region out of the negatives.
    ignore_regions: bool = True

    @model_validator(mode="after")
    def _ordered(self) -> MatchingConfig:
        if self.bg_iou_thresh > self.fg_iou_thresh:
            raise ValueError(
                f"bg_iou_thresh must not exceed fg_iou_thresh, got {self.bg_iou_thresh} > {self.fg_iou_thresh}"
            )
        return self


class LossConfig(Section):
    """A class loss on all anchors plus a box loss on the positive ones (Lin et al. 2017, section 3)."""

    # focal, and focal_star (appendix A); what they are compared with: ohem (section 5.1) and bootstrap, both with plain
    # cross entropy; ghm (Li et al. 2019), quality_focal (Li et al. 2020), varifocal (Zhang et al. 2021), poly1_focal (Leng et
    # al. 2022). Cross entropy is focal with gamma 0.
    cls: Literal["focal", "focal_star", "poly1_focal", "quality_focal", "varifocal", "ghm", "ohem", "bootstrap"] = (
        "focal"
    )
    # A number weighs positives by alpha and negatives by 1 - alpha; null: both 1. A list weighs the positives of each class
    # (negatives 1), and so do inverse_frequency and effective_number, which count the objects of data.train.
    alpha: Fraction | tuple[NonNegative, ...] | Literal["inverse_frequency", "effective_number"] | None = 0.25
    alpha_exponent: NonNegative = 1.0  # of inverse_frequency
    alpha_beta: Annotated[float, Field(ge=0, lt=1)] = 0.999  # of effective_number (Cui et al. 2019)
    negative_weight: NonNegative | None = None  # of negatives; null: as alpha says
    gamma: NonNegative = 2.0  # 0 is cross entropy
    star_beta: float = 1.0  # of focal_star
    poly_epsilon: float = 1.0  # of poly1_focal
    varifocal_alpha: NonNegative = 0.75  # of varifocal: the weight of negatives
    ghm_bins: PositiveInt = 10  # of ghm
    ohem_batch: PositiveInt = 256  # of ohem: anchors kept of an image
    ohem_nms_thresh: Fraction = 0.7  # overlap with a harder anchor that removes one beforehand
    ohem_negatives_per_positive: PositiveInt | None = None  # 3 for the paper's 1:3; null: no ratio
    bootstrap_fraction: Annotated[float, Field(gt=0, le=1)] = 0.01  # of bootstrap: the share of anchors kept
    box: Literal["smooth_l1", "l1", "giou"] = "smooth_l1"
    # Where smooth L1 turns from square to straight, in encoded units. The paper is silent; its code used 1/9.
    smooth_l1_beta: Positive = 1 / 9
    box_weight: Positive = 1.0
    # global: sums over the whole optimizer step divided by its positive anchors (the paper); per_image: each image
    # by its own, then the mean of images (torchvision).
    normalizer: Literal["global", "per_image"] = "global"


SOFTMAX_FORMS = ("focal", "focal_star", "ohem", "bootstrap")


class PostprocessConfig(Section):
    """From scores of all anchors to a list of objects (Lin et al. 2017, section 4, "Inference")."""

    score_thresh: Fraction = 0.05
    topk_candidates: PositiveInt = 1000  # per level, before non-maximum suppression
    nms_thresh: Fraction = 0.5
    detections_per_img: PositiveInt = 100
    # Boxes are cut off at the picture's border before suppression (torchvision, mmdetection) or after it (detectron2).
    clip: Literal["before_nms", "after_nms"] = "before_nms"
    drop_empty: bool = False  # boxes of which nothing lies in the picture (detectron2 and mmdetection drop them)
    bound_shrinking: bool = False  # boxes are at least 1/62.5 as wide and high as their anchor (mmdetection)


class SplitConfig(Section):
    """A set of pictures and its COCO-format annotations."""

    images: str
    annotations: str


class DataConfig(Section):
    """What is read, checked, augmented and resized."""

    train: SplitConfig | None = None
    val: SplitConfig | None = None
    test: SplitConfig | None = None
    # Short side in pixels; a list draws one of them for every step (multi-scale training).
    min_size: PositiveInt | Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = 800
    max_size: PositiveInt = 1333  # bound of the long side
    eval_min_size: PositiveInt | None = None  # short side outside training; null: the largest of min_size
    hflip: Fraction = 0.5  # chance of mirroring a training picture
    # albumentations transforms, in order, on the picture as read from the file (before resizing), for example
    # - RandomBrightnessContrast: {brightness_limit: 0.2, p: 0.5}
    augment: tuple[dict[str, dict[str, Any]], ...] = ()
    augment_min_visibility: Fraction = 0.3  # objects of which a crop leaves less are dropped from that view
    # Which pictures make up an epoch. plain: each once. repeat_factor: those with rare classes more often (Gupta et al.
    # 2019). class_balanced: as many as there are, every class in about as many. Both go by the pictures of each class, the
    # loss's alpha by its objects.
    sampling: Literal["plain", "repeat_factor", "class_balanced"] = "plain"
    repeat_threshold: Annotated[float, Field(gt=0, le=1)] = 0.001  # classes in a smaller share of pictures are rare
    aspect_ratio_grouping: bool = True  # batches are all landscape or all portrait, which saves padding
    num_workers: Annotated[int, Field(ge=0)] = 2
    # Keep so many GB of pictures from epoch to epoch, once for all processes of a machine: as they are after decoding and,
    # without `augment` and where that is less, resizing. The pictures are the same, only sooner there.
    cache_gb: NonNegative = 0.0
    cache_folder: str | None = None  # null: in memory; a folder: on its disk, for this run only
    # Read JPEG files in training at a half, a quarter or an eighth of their size where that is more than the network gets (and
    # `augment` is empty). Evaluation always takes every pixel.
    scaled_decode: bool = True
    # header: every file is there and of the right size; decode: and can be read to its end; auto: decode up to 5,000
    # images (remembered), headers above.
    verify: Literal["auto", "header", "decode", "none"] = "auto"
    on_error: Literal["fail", "skip"] = "fail"  # what to do about images and entries that cannot be used
    # EXIF orientation. auto: as the majority of images shows whose JSON size tells the two apart.
    exif: Literal["auto", "apply", "ignore"] = "auto"

    @property
    def train_sizes(self) -> tuple[int, ...]:
        """The short sides of training."""
        return self.min_size if isinstance(self.min_size, tuple) else (self.min_size,)

    @property
    def eval_size(self) -> int:
        """The short side of evaluation and prediction."""
        return self.eval_min_size or max(self.train_sizes)

    @model_validator(mode="after")
    def _folder_of_something(self) -> DataConfig:
        if self.cache_folder is not None and not self.cache_gb:
            raise ValueError("cache_folder keeps nothing while cache_gb is 0; set that, too")
        return self

    @model_validator(mode="after")
    def _one_transform_each(self) -> DataConfig:
        for i, step in enumerate(self.augment):
            if len(step) != 1:
                raise ValueError(f"augment[{i}] must be one transform, `- Name: {{arguments}}`, got {step}")
        return self


class EmaConfig(Section):
    """Exponential moving average of the weights, which is then what is evaluated and used."""

    # Share of the old average kept per step, reached by way of (1 + step) / (10 + step), so that a run of a few
    # hundred steps (a few hundred images) is averaged too rather than stuck at its initial weights.
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.999


class TrainConfig(Section):
    """The training run."""

    epochs: PositiveInt = 12
    batch_size: PositiveInt = 16  # images per optimizer step, over all processes and micro-batches
    # Images per forward pass and process; null: all of the process's share; auto: as many of it as memory holds (tried before
    # the first step). The update is that of the whole batch either way.
    micro_batch: PositiveInt | Literal["auto"] | None = None
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 where the hardware has it, else fp32
    compile: Literal["auto"] | bool = (
        "auto"  # torch.compile; auto: on CUDA for long runs, on CPU never (measured: no gain)
    )
    channels_last: bool = True
    # The backbone's activations are not kept but computed again in the backward pass: less memory, more time.
    checkpoint_activations: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    init_from: str | None = None  # a checkpoint to fine-tune from; also --init-from
    ema: EmaConfig | None = None
    checkpoint_every_steps: PositiveInt | None = None  # besides every epoch
    early_stop_patience: PositiveInt | None = None  # evaluations without a better AP before stopping
    log_every: PositiveInt = 20  # steps
    trace_steps: Annotated[int, Field(ge=0)] = 0  # to profile, after the first ones; 0: none
    images_every_epochs: Annotated[int, Field(ge=0)] = 1  # predictions beside ground truth in TensorBoard; 0: never
    # Val pictures in which evaluations look at who holds the class loss, for TensorBoard, as often as that takes less than
    # a fiftieth of the time; 0: none.
    loss_images: Annotated[int, Field(ge=0)] = 8


class OptimConfig(Section):
    """Optimizer and learning rate."""

    name: Literal["sgd", "adamw"] = "sgd"
    lr: Positive = 0.01  # for lr_batch_size images a step (Lin et al. 2017, section 4.1)
    lr_batch_size: PositiveInt = 16
    scale_lr: bool = True  # by batch_size / lr_batch_size: linearly for SGD, by the square root for AdamW
    momentum: Fraction = 0.9  # SGD
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)  # AdamW
    weight_decay: NonNegative = 1e-4
    norm_bias_decay: bool = False  # decay norms and biases too
    backbone_lr_factor: NonNegative = 1.0
    schedule: Literal["multistep", "cosine"] = "multistep"
    # Fractions of the run after which the rate is multiplied by gamma (multistep): 60,000 and 80,000 of 90,000.
    milestones: tuple[NonNegative, ...] = (2 / 3, 8 / 9)
    gamma: Positive = 0.1
    final_lr_factor: Fraction = 0.0  # of the rate at the end of a cosine
    warmup_steps: Annotated[int, Field(ge=0)] = 500  # clamped, with a warning, to the length of a shorter run
    warmup_factor: Fraction = 0.001  # share of the rate at step 0, growing linearly
    clip_grad_norm: Positive | None = None

    @model_validator(mode="after")
    def _milestones_ordered(self) -> OptimConfig:
        if max(self.milestones, default=0) > 1:
            raise ValueError(
                f"milestones must be fractions of the run, neither epochs nor steps, got {list(self.milestones)}: epoch 8 of 12 "
                f"is {8 / 12:.4f}"
            )
        if list(self.milestones) != sorted(self.milestones):
            raise ValueError(f"milestones must ascend, got {list(self.milestones)}")
        return self


class EvalConfig(Section):
    """How detections are scored."""

    every_epochs: PositiveInt = 1  # the last epoch is always evaluated
    engine: Literal["hotcoco", "pycocotools"] = "hotcoco"  # the same numbers; hotcoco is about eighty times faster
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    batch_size: PositiveInt | None = None  # null: train.batch_size (or micro_batch)
    loss: bool = True  # in training, the loss of data.val too; on a GPU that takes a second look at each picture
    max_dets: tuple[PositiveInt, PositiveInt, PositiveInt] = (1, 10, 100)

    @model_validator(mode="after")
    def _max_dets_ordered(self) -> EvalConfig:
        if list(self.max_dets) != sorted(set(self.max_dets)):
            raise ValueError(f"max_dets must be three ascending numbers, got {list(self.max_dets)}")
        return self


class Config(Section):
    """A whole run. The number of classes is not here: it is read from the annotations."""

    model: ModelConfig = ModelConfig()
    matching: MatchingConfig = MatchingConfig()
    loss: LossConfig = LossConfig()
    postprocess: PostprocessConfig = PostprocessConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        if isinstance(self.train.micro_batch, int) and self.train.micro_batch > self.train.batch_size:
            raise ValueError(
                f"train.micro_batch must not exceed train.batch_size, got {self.train.micro_batch} > "
                f"{self.train.batch_size}"
            )
        if self.model.head.activation == "softmax" and self.loss.cls not in SOFTMAX_FORMS:
            raise ValueError(
                f"loss.cls must be one of {', '.join(SOFTMAX_FORMS)} with model.head.activation softmax, got {self.loss.cls}"
            )
        if max(self.data.train_sizes) > self.data.max_size or self.data.eval_size > self.data.max_size:
            raise ValueError(
                f"data.min_size and data.eval_min_size must not exceed data.max_size, got {self.data.min_size}, "
                f"{self.data.eval_min_size} and {self.data.max_size}"
            )
        return self

    def to_yaml(self) -> str:
        """The whole config as YAML that `load_config` reads back to an equal one."""
        values = json.loads(self.model_dump_json())
        return yaml.dump(values, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=110)


class ConfigError(ValueError):
    """Mistakes in a config; `str` lists all of them, each with its key, its source and what to do."""


def load_config(path: Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file with its bases, apply `key=value` overrides, and validate the whole.

    Raises:
        ConfigError: every mistake found, together.
    """
    tree = _Tree({}, {}, [])
    _merge(tree, _read_file(path, ()))
    for override in overrides:
        _apply_override(tree, override)
    return _validate(tree)


def with_overrides(config: Config, overrides: Iterable[str]) -> Config:
    """The same config after `key=value` overrides.

    Raises:
        ConfigError: every mistake found, together.
    """
    tree = _Tree(json.loads(config.model_dump_json()), {}, [])
    for override in overrides:
        _apply_override(tree, override)
    return _validate(tree)


def config_from_dict(values: Mapping[str, Any], source: str) -> Config:
    """Validate settings that were stored in a checkpoint.

    Raises:
        ConfigError: every mistake found, naming `source`.
    """
    return _validate(_Tree(dict(values), {(): source}, []))


def resolve_data_paths(config: Config) -> Config:
    """The same config with relative data and weight paths made absolute from the working directory."""
    update: dict[str, Any] = {}
    for name in ("train", "val", "test"):
        split: SplitConfig | None = getattr(config.data, name)
        if split is not None:
            absolute = {key: str(Path(value).absolute()) for key, value in split.model_dump().items()}
            update[name] = SplitConfig(**absolute)
    model = config.model
    if model.backbone_weights not in ("imagenet", "none"):
        model = model.model_copy(update={"backbone_weights": str(Path(model.backbone_weights).absolute())})
    train = config.train
    if train.init_from is not None:
        train = train.model_copy(update={"init_from": str(Path(train.init_from).absolute())})
    if config.data.cache_folder is not None:
        update["cache_folder"] = str(Path(config.data.cache_folder).absolute())
    data = config.data.model_copy(update=update)
    return config.model_copy(update={"data": data, "model": model, "train": train})


def with_micro_batch(config: Config, micro_batch: int | None) -> Config:
    """The same config, but `train.micro_batch: auto` is answered."""
    if config.train.micro_batch != "auto":
        return config
    return config.model_copy(update={"train": config.train.model_copy(update={"micro_batch": micro_batch})})


def with_model_of(config: Config, checkpoint: Config) -> Config:
    """The same config, but what nobody wrote down of the model, its post-processing and the size of pictures (all three
    numbers or none) is a checkpoint's.

    So a config that only names data and training fine-tunes, or scores, a network of any build as it is meant.

    Raises:
        ConfigError: what is written down and the rest do not go together.
    """
    own = {key: getattr(config.model, key) for key in NOT_PART_OF_THE_MODEL}
    model = _filled(config.model, checkpoint.model).model_copy(update=own)
    sizes = {key: getattr(checkpoint.data, key) for key in ("min_size", "max_size", "eval_min_size")}
    data = config.data if config.data.model_fields_set & set(sizes) else config.data.model_copy(update=sizes)
    postprocess = _filled(config.postprocess, checkpoint.postprocess)
    filled = config.model_copy(update={"model": model, "postprocess": postprocess, "data": data})
    return config_from_dict(json.loads(filled.model_dump_json()), "the config and the checkpoint's model together")


def _filled(mine: AnySection, theirs: AnySection) -> AnySection:
    said: dict[str, Any] = {}
    for key in mine.model_fields_set:
        value = getattr(mine, key)
        said[key] = _filled(value, getattr(theirs, key)) if isinstance(value, Section) else value
    return theirs.model_copy(update=said)


def flatten(values: dict[str, Any], at: str = "") -> dict[str, Any]:
    """Nested settings by their full key."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(flatten(value, f"{at}{key}.") if isinstance(value, dict) else {at + key: value})
    return flat


# ---- reading YAML -----------------------------------------------------------------------------------------------

KeyPath = tuple[str, ...]
COMMAND_LINE = "command line"


class _Tree(NamedTuple):
    values: Any
    sources: dict[KeyPath, str]  # of every key, "file:line" or COMMAND_LINE
    mistakes: list[tuple[KeyPath, str]]  # of keys that say nothing, or that cannot be what two sources say of them


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers and booleans: `1e-3` is a number; `no`, `on`, `010`, `1:30` and `2017-1-1` are words."""


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would take for more than a word."""


_RESOLVED_ANEW = ("bool", "int", "float", "timestamp")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag.rpartition(":")[2] not in _RESOLVED_ANEW]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\d[\d_]*\.\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(?:inf|Inf|INF))"
        r"|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
):
    for _reader_or_writer in (_Loader, _Dumper):
        _reader_or_writer.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first)
        )


def _parse_yaml(text: str, source: str, at: KeyPath = ()) -> _Tree:
    """What stands in a text, which is about the key `at`."""
    try:
        node = yaml.compose(text, Loader=_Loader)
        tree = _Tree(yaml.load(text, Loader=_Loader), {}, [])
        if node is not None:
            _note_lines(node, at, source, tree)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark is not None else source
        problem = getattr(error, "problem", None) or "cannot be read"
        raise ConfigError(
            f"{where}: the YAML is broken: {problem}; look for a missing colon, space or bracket"
        ) from None
    return tree


def _note_lines(node: yaml.Node, at: KeyPath, source: str, tree: _Tree) -> None:
    if isinstance(node, yaml.SequenceNode):
        for place, item in enumerate(node.value):
            _note_lines(item, (*at, str(place)), source, tree)
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        path = (*at, str(key.value))
        here = f"{source}:{key.start_mark.line + 1}"
        if path in tree.sources:
            raise ConfigError(f"{here}: `{'.'.join(path)}` stands twice, first at {tree.sources[path]}; remove one")
        if isinstance(value, yaml.ScalarNode) and not value.value and not value.style and _needs_a_value(path):
            told = f"{here}: `{'.'.join(path)}` is left empty; give it a value, or delete the line (null, written out, is the default)"
            tree.mistakes.append((path, told))
        tree.sources[path] = here
        _note_lines(value, path, source, tree)


def _read_file(path: Path, parents: tuple[Path, ...]) -> _Tree:
    resolved = path.resolve()
    if resolved in parents:
        raise ConfigError(f"{path}: `_base_` leads back to itself: {' -> '.join(map(str, (*parents, resolved)))}")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        named = f" (named by `_base_` in {parents[-1]})" if parents else ""
        raise ConfigError(f"config file {path} does not exist{named}{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}") from None
    parsed = _parse_yaml(text, str(path))
    values: Any = parsed.values if parsed.values is not None else {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a config must be a mapping of sections (model:, data:, ...), got {values!r:.60}")
    values = _text_keys(values)
    bases = values.pop("_base_", [])
    if isinstance(bases, str):
        bases = [bases]
    if not isinstance(bases, list) or not all(isinstance(b, str) for b in bases):
        raise ConfigError(f"{path}: `_base_` must be a path or a list of paths, got {bases!r}")
    tree = _Tree({}, {}, [])
    for base in bases:
        _merge(tree, _read_file(path.parent / base, (*parents, resolved)))
    _merge(tree, parsed._replace(values=values))
    return tree


def _text_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _text_keys(item) for key, item in value.items()}
    return [_text_keys(item) for item in value] if isinstance(value, list) else value


def _merge(into: _Tree, new: _Tree) -> None:
    def merge(old: dict[str, Any], values: dict[str, Any], at: KeyPath) -> None:
        for key, value in values.items():
            path, before = (*at, key), old.get(key)
            if isinstance(value, dict) and isinstance(before, dict):
                merge(before, value, path)
                continue
            where = _first_source(path, new.sources)
            mistake = None
            if before is not None:
                mistake = _irreplaceable(path, before, _first_source(path, into.sources), value, where)
            if mistake is not None:
                into.mistakes.append((path, mistake))
                continue
            for stale in [p for p in into.sources if p[: len(path)] == path]:
                del into.sources[stale]
            into.sources[path] = where
            old[key] = value

    merge(into.values, new.values, ())
    into.sources.update(new.sources)
    into.mistakes.extend(new.mistakes)


def _irreplaceable(path: KeyPath, before: Any, said_at: str, value: Any, where: str) -> str | None:
    """Why a setting that somebody wrote down may not be lost to another, if nobody asked to remove it."""
    key = ".".join(path)
    if value is None:
        field = _field(path)
        required = field is not None and _nested_section(field.annotation) is not None and not _may_be_null(field)
        if required and where != COMMAND_LINE:
            return (
                f"{where}: `{key}` must not be empty (null), because that would wipe everything that {said_at} says of it; "
                "delete the line, or name below it what should change"
            )
    elif isinstance(value, dict) != isinstance(before, dict):
        remedy = "remove one (part of a section is set by its own key, as train.epochs=3)"
        field = _field(path)
        if isinstance(value, bool) and field is not None and _may_be_null(field):
            remedy = "{} has the section with what it says elsewhere or by default, null has it not"
        return (
            f"`{key}` must be a section or a value, not both, got {_show(before)} [{said_at}] and then {_show(value)} "
            f"[{where}]; {remedy}"
        )
    return None


def _apply_override(tree: _Tree, override: str) -> None:
    key, sign, text = override.partition("=")
    parts = tuple(key.strip().split("."))
    field = _field(parts)
    is_text = field is not None and field.annotation in (str, str | None)
    if not sign or not all(parts) or not (text if is_text else text.partition("#")[0]).strip():
        told = f"override must be key=value, for example train.epochs=3, got {override!r}"
        null = (
            "; null in place of a value means the default or, where there is one, none" if sign and all(parts) else ""
        )
        tree.mistakes.append((parts, told + null))
        return
    parsed = _Tree(None if text == "null" else text, {}, [])
    if not is_text:
        parsed = _parse_yaml(text, f"override {key}", parts)
    nested: Any = _text_keys(parsed.values)
    for part in reversed(parts):
        nested = {part: nested}
    _merge(tree, _Tree(nested, dict.fromkeys((parts, *parsed.sources), COMMAND_LINE), parsed.mistakes))


# ---- telling mistakes -------------------------------------------------------------------------------------------

# What the same thing is called elsewhere.
ALIASES = {
    "learning_rate": "optim.lr", "base_lr": "optim.lr", "lr0": "optim.lr", "optimizer": "optim", "solver": "optim",
    "wd": "optim.weight_decay", "lr_scheduler": "optim.schedule", "scheduler": "optim.schedule",
    "warmup": "optim.warmup_steps", "warmup_iters": "optim.warmup_steps", "grad_clip": "optim.clip_grad_norm",
    "clip_grad": "optim.clip_grad_norm", "imgsz": "data.min_size", "img_size": "data.min_size",
    "image_size": "data.min_size", "input_size": "data.min_size", "size": "data.min_size", "workers": "data.num_workers",
    "batch": "train.batch_size", "ims_per_batch": "train.batch_size", "samples_per_gpu": "train.micro_batch",
    "accumulate": "train.micro_batch", "accumulation_steps": "train.micro_batch", "max_epochs": "train.epochs",
    "num_epochs": "train.epochs", "amp": "train.precision", "fp16": "train.precision", "dtype": "train.precision",
    "random_seed": "train.seed", "patience": "train.early_stop_patience", "early_stopping": "train.early_stop_patience",
    "model_ema": "train.ema", "focal_alpha": "loss.alpha", "focal_gamma": "loss.gamma", "conf": "postprocess.score_thresh",
    "conf_thres": "postprocess.score_thresh", "score_threshold": "postprocess.score_thresh",
    "iou": "postprocess.nms_thresh", "iou_thres": "postprocess.nms_thresh", "nms_threshold": "postprocess.nms_thresh",
    "max_det": "postprocess.detections_per_img", "pretrained": "model.backbone_weights", "weights": "model.backbone_weights",
    "arch": "model.backbone", "freeze_at": "model.trainable_layers", "frozen_stages": "model.trainable_layers",
    "aspect_ratios": "model.anchors.ratios", "scales": "model.anchors.octave_scales", "anchor_sizes": "model.anchors.sizes",
    "dataset": "data", "transforms": "data.augment", "augmentation": "data.augment", "flip": "data.hflip",
    "maxdets": "eval.max_dets", "eval_period": "eval.every_epochs", "prior": "model.head.prior_prob",
    "img_prefix": "data.train.images", "ann_file": "data.train.annotations", "load_from": "train.init_from",
}  # fmt: skip
CLASS_COUNT_KEYS = {"num_classes", "nc", "n_classes", "classes", "class_names", "names"}


def _all_keys(section: type[BaseModel] = Config, at: KeyPath = ()) -> dict[str, bool]:
    """Every valid key, and whether it is a section."""
    keys: dict[str, bool] = {}
    for name, field in section.model_fields.items():
        nested = _nested_section(field.annotation)
        keys[".".join((*at, name))] = nested is not None
        if nested is not None:
            keys.update(_all_keys(nested, (*at, name)))
    return keys


def _suggest(path: KeyPath) -> str:
    name, full = path[-1], ".".join(path)
    if name.lower() in CLASS_COUNT_KEYS:
        return "the classes are read from data.train's annotations and are never set; remove it"
    keys = _all_keys()
    same_name = [key for key in keys if key.rpartition(".")[2] == name]
    if same_name:
        return f"did you mean {' or '.join(same_name)}?"
    siblings = {key.rpartition(".")[2]: key for key in keys if key.rpartition(".")[0] == ".".join(path[:-1])}
    near = difflib.get_close_matches(name, siblings, n=1, cutoff=0.75)
    if near:
        return f"did you mean {siblings[near[0]]}?"
    if name.lower() in ALIASES:
        return f"did you mean {ALIASES[name.lower()]}?"
    near = difflib.get_close_matches(full, keys, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]}?"
    return f"valid keys here: {', '.join(sorted(siblings))}" if siblings else "remove it"


def _source(path: KeyPath, message: str, sources: Mapping[KeyPath, str]) -> str:
    """Where the keys below this one were written that the message names, or the key itself, or the nearest section around."""
    named = set(re.findall(r"\w+(?:\.\w+)*", message))
    inside = {
        where: None
        for key, where in sources.items()
        if key[: len(path)] == path and ".".join(key[len(path) :]) in named
    }
    if inside:
        return ", ".join(inside)
    return next((sources[path[:end]] for end in range(len(path), -1, -1) if path[:end] in sources), "defaults")


def _first_source(path: KeyPath, sources: Mapping[KeyPath, str]) -> str:
    """Where a key was written, or the first that stands in it, or the nearest section around."""
    inside = next((where for key, where in sources.items() if key[: len(path)] == path), None)
    return inside or _source(path, "", sources)


def _validate(tree: _Tree) -> Config:
    values = _without_nulls(tree.values, Config)
    lines = [f"  {mistake}" for _, mistake in tree.mistakes]
    try:
        # By way of JSON, pydantic's strict mode takes lists for tuples but still no text for numbers.
        config = Config.model_validate_json(json.dumps(values, default=str))
    except ValidationError as invalid:
        lines += [
            f"  {'.'.join(path) or 'config'}: {message}  [{_source(path, message, tree.sources)}]"
            for path, message in _mistakes(invalid, values)
            if path not in {told for told, _ in tree.mistakes}
        ]
    if lines:
        count = "1 mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
        raise ConfigError("\n".join([f"the config has {count}:", *lines])) from None
    return config


def _mistakes(invalid: ValidationError, values: dict[str, Any]) -> list[tuple[KeyPath, str]]:
    """What is wrong with which key, once for each."""
    mistakes: list[tuple[KeyPath, str]] = []
    wrong: dict[tuple[KeyPath, str], list[str]] = {}  # a union complains once for each of its members
    for error in invalid.errors():
        path = _written_path(error["loc"], values, error["type"])
        message = error["msg"].removeprefix("Value error, ")
        if error["type"] == "extra_forbidden":
            mistakes.append((path, f"unknown key; {_suggest(path)}"))
        elif error["type"] == "value_error":
            mistakes.append((path, message))
        elif error["type"] == "too_short" and len(error["input"]) >= error["ctx"]["min_length"]:
            continue  # long enough, but its items are wrong, which is told by itself
        elif error["type"] in ("model_type", "dict_type"):
            wrong.setdefault((path, _show(error["input"])), []).append(_section_wanted(path))
        elif error["type"] in ("too_short", "too_long"):
            wrong.setdefault((path, _show(error["input"])), []).append(_length_wanted(error["ctx"]))
        else:
            wrong.setdefault((path, _show(error["input"])), []).append(message[0].lower() + message[1:])
    lists = {path[:-1] for path, _ in wrong if path[-1].isdigit()}  # whose items are told
    for (path, got), messages in wrong.items():
        if path in lists:
            continue
        first, *others = dict.fromkeys(messages)
        expected = " or ".join([first, *(text.removeprefix("input should be ") for text in others)])
        mistakes.append((path, f"{expected}, got {got}"))
    return mistakes


def _section_wanted(path: KeyPath) -> str:
    field = _field(path)
    section = _nested_section(field.annotation) if field is not None else None
    if section is None:  # a transform, or its arguments
        return "must be a mapping, {} or {name: value, ...}"
    required = [name for name, inside in section.model_fields.items() if inside.is_required()]
    return (
        f"must be a section with {', '.join(required)}"
        if required
        else "must be a section ({} is one with all defaults)"
    )


def _length_wanted(ctx: Mapping[str, Any]) -> str:
    few = "min_length" in ctx
    return f"input should be a list of at {'least' if few else 'most'} {ctx['min_length' if few else 'max_length']}"


def _without_nulls(values: dict[str, Any], section: type[BaseModel]) -> dict[str, Any]:
    """Null removes a key; it stays where it is a value of its own (loss.alpha), and where text must stand, which tells.

    A default in place of text would not be what was meant: null for the weights of the backbone would be ImageNet's.
    """
    kept = {}
    for key, value in values.items():
        field = section.model_fields.get(key)
        nested = field and _nested_section(field.annotation)
        if value is None and field is not None and not _may_be_null(field) and field.annotation is not str:
            continue
        kept[key] = _without_nulls(value, nested) if nested and isinstance(value, dict) else value
    return kept


def _field(path: KeyPath) -> FieldInfo | None:
    """What the schema says of a key; None of one that it does not know."""
    section: type[BaseModel] | None = Config
    field = None
    for name in path:
        field = section.model_fields.get(name) if section is not None else None
        section = _nested_section(field.annotation) if field is not None else None
    return field


def _needs_a_value(path: KeyPath) -> bool:
    """Whether a key is a setting, and one that says nothing of itself about null."""
    field = _field(path)
    return field is not None and not (
        _may_be_null(field) or field.annotation is str or _nested_section(field.annotation)
    )


def _may_be_null(field: FieldInfo) -> bool:
    return type(None) in get_args(field.annotation)


def _nested_section(annotation: Any) -> type[BaseModel] | None:
    types = [t for t in (annotation, *get_args(annotation)) if isinstance(t, type)]
    return next((t for t in types if issubclass(t, BaseModel)), None)


def _written_path(loc: tuple[int | str, ...], values: Any, problem: str) -> KeyPath:
    """The part of a pydantic location that was written by the user (unions add the names of their members)."""
    path: KeyPath = ()
    for part in loc:
        if (isinstance(values, dict) and part in values) or (
            isinstance(values, list) and isinstance(part, int) and part < len(values)
        ):
            values = values[part]  # type: ignore[index]
        elif problem != "missing" or part != loc[-1]:
            continue
        path = (*path, str(part))
    return path


def _show(value: Any) -> str:
    text = json.dumps(value, default=str) if not isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
