"""Every setting of the detector: its type, default, unit and reason.

How YAML files and overrides become a `Config`: `detector.config_yaml`. Choices (`Literal`) that other modules share are
declared here once; this module imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]

Backbone = Literal[
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152",
    "resnext50_32x4d", "resnext101_32x4d", "resnext101_32x8d", "resnext101_64x4d",
]  # fmt: skip
Norm = Literal["frozen_bn", "bn", "sync_bn", "gn"]
HeadNorm = Literal["none", "gn"]
Activation = Literal["sigmoid", "softmax"]
StrideIn = Literal["3x3", "1x1"]
PyramidInput = Literal["c5", "p5"]
AnchorSpacing = Literal["fixed", "grid"]
AnchorRounding = Literal["none", "integer"]
ChannelOrder = Literal["rgb", "bgr"]
Resize = Literal["area", "float_bilinear", "pil_bilinear", "cv2_bilinear"]
Pad = Literal["multiple_128", "batch_max_32"]
Clip = Literal["before_nms", "after_nms"]
ClassLossKind = Literal[
    "focal", "focal_star", "poly1_focal", "quality_focal", "varifocal", "ghm", "ohem", "bootstrap",
]  # fmt: skip
BoxLossKind = Literal["smooth_l1", "l1", "giou"]
Normalizer = Literal["global", "per_image"]
Sampling = Literal["plain", "repeat_factor", "class_balanced"]
Verify = Literal["auto", "header", "decode", "none"]
OnError = Literal["fail", "skip"]
OnNonfinite = Literal["stop", "skip"]
Exif = Literal["auto", "apply", "ignore"]
Precision = Literal["fp32", "bf16", "fp16"]
Device = Literal["auto", "cpu", "cuda"]
Engine = Literal["hotcoco", "pycocotools"]


class Section(BaseModel):
    """A group of settings: immutable, and an unknown key is an error rather than ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


AnySection = TypeVar("AnySection", bound=Section)

NOT_PART_OF_THE_MODEL = ("backbone_weights", "trainable_layers")
"""Settings of `model` that matter only in training."""


class HeadConfig(Section):
    """The class and the box subnet (Lin et al. 2017, section 4): the same shape, separate weights."""

    depth: NonNegativeInt = 4  # 3x3 convolutions before the last one
    channels: PositiveInt | None = None  # of those convolutions; null: fpn_channels
    # After each of those convolutions. gn: GroupNorm with 32 groups; the convolutions then have no bias.
    norm: HeadNorm = "none"
    prior_prob: Annotated[float, Field(gt=0, lt=1)] = 0.01  # score of every anchor before training (section 4.1)
    # softmax: one class or the background, which has an additional output; at first, the classes share prior_prob.
    activation: Activation = "sigmoid"


class AnchorConfig(Section):
    """The anchors of every cell of P3..P7 (Lin et al. 2017, section 4)."""

    # Side of a square anchor in pixels of the network input, per level P3..P7; or a list of sides per level, which
    # requires octave_scales: [1.0].
    sizes: Annotated[tuple[Positive | tuple[Positive, ...], ...], Field(min_length=5, max_length=5)] = (
        32.0, 64.0, 128.0, 256.0, 512.0,
    )  # fmt: skip
    octave_scales: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))
    ratios: Annotated[tuple[Positive, ...], Field(min_length=1)] = (0.5, 1.0, 2.0)  # height / width, at equal area

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


class CompatConfig(Section):
    """Details in which networks of torchvision, detectron2 and mmdetection differ from ours.

    The importers set them (docs/weights.md has the table); a network trained here needs none of them.
    """

    norm_eps: NonNegative = 1e-5  # added to the variance in the backbone's norms; 0 in torchvision's first weights
    # The convolution of a bottleneck block that has stride 2: the 3x3 (torchvision), or the first 1x1 (He et al. 2016;
    # the ResNets of detectron2 and mmdetection's caffe style).
    stride_in: StrideIn = "3x3"
    p6_from: PyramidInput = "c5"  # the input of P6; the paper's is C5
    relu_before_p7: bool = True  # mmdetection: false
    bias_before_norm: bool = False  # the subnets' convolutions keep their bias with head.norm gn (detectron2)
    anchor_spacing: AnchorSpacing = "fixed"  # fixed: 8..128; grid: padded image size // feature map size (torchvision)
    # Centre of the anchors within their cell, in strides. 0.5 is the middle: the distances to all four borders are then
    # the same, so a mirrored image has mirrored targets. torchvision, detectron2 and mmdetection use 0, the corner.
    anchor_center_offset: Annotated[float, Field(ge=0, lt=1)] = 0.5
    anchor_rounding: AnchorRounding = "none"  # integer: corners relative to the centre are rounded (torchvision)
    channel_order: ChannelOrder = "rgb"  # of the network's input, model.pixel_mean and model.pixel_std
    # How images are resized. area: area interpolation to shrink, bilinear to enlarge (no aliasing, 8 bit);
    # float_bilinear: torchvision; pil_bilinear: detectron2; cv2_bilinear: mmdetection.
    resize: Resize = "area"
    clip: Clip = "before_nms"  # whether boxes are clipped to the image before NMS or after it (detectron2)
    drop_empty: bool = False  # drop boxes entirely outside the image (detectron2, mmdetection)
    bound_shrinking: bool = False  # boxes are at least 1/62.5 as wide and high as their anchor (mmdetection)


class ModelConfig(Section):
    """The network; stored in every checkpoint and not to be changed afterwards."""

    backbone: Backbone = "resnet50"
    backbone_weights: str = "imagenet"  # imagenet (torchvision's download), none, or a .pt/.pth/.npz/.safetensors file
    # How many of the five stages (stem, layer1..layer4) are trained, counted from the top. null: 3 with weights (the
    # paper's), 5 without.
    trainable_layers: Annotated[int, Field(ge=0, le=5)] | None = None
    norm: Norm = "frozen_bn"  # of the backbone. frozen_bn: batch norm with the statistics of the loaded weights
    fpn_channels: PositiveInt = 256
    head: HeadConfig = HeadConfig()
    anchors: AnchorConfig = AnchorConfig()
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)  # of values 0..255; ImageNet's
    pixel_std: tuple[Positive, Positive, Positive] = (58.395, 57.12, 57.375)
    # multiple_128: pad to multiples of 128, the stride of P7: the grid of every level is exact, and a run has few input
    # shapes. batch_max_32: pad to the largest image of the batch, rounded up to 32 (other frameworks; less padding).
    pad: Pad = "multiple_128"
    compat: CompatConfig = CompatConfig()

    @field_validator("backbone_weights", mode="before")
    @classmethod
    def _null_is_not_none(cls, value: object) -> object:
        if value is None:
            raise ValueError("backbone_weights must be imagenet, a file, or none for a network from scratch, got null")
        return value

    @model_validator(mode="after")
    def _can_be_built(self) -> ModelConfig:
        if self.backbone_weights == "none" and self.trainable_layers not in (None, 5):
            raise ValueError(
                f"trainable_layers must be 5 (or null) with backbone_weights none, got {self.trainable_layers}: "
                "random layers would stay random; train them all, or set backbone_weights"
            )
        if self.backbone_weights == "none" and self.norm == "frozen_bn":
            raise ValueError(
                "norm must not be frozen_bn with backbone_weights none: there are no statistics to freeze; "
                "set model.norm=bn (or gn, which suits small batches)"
            )
        channels = self.head.channels or self.fpn_channels
        if self.head.norm == "gn" and channels % 32:
            raise ValueError(
                "head.channels (or fpn_channels) must be a multiple of 32 with head.norm gn, which has 32 groups, got "
                f"{channels}"
            )
        return self

    @property
    def num_trainable_layers(self) -> int:
        """`trainable_layers` with its default filled in."""
        if self.trainable_layers is not None:
            return self.trainable_layers
        return 5 if self.backbone_weights == "none" else 3


class MatchingConfig(Section):
    """Which anchor is assigned to which object (Lin et al. 2017, section 4)."""

    fg_iou_thresh: Fraction = 0.5  # anchors with at least this IoU with an object are positive
    bg_iou_thresh: Fraction = 0.4  # anchors below this IoU are background; those in between are ignored
    # Assign to every object its best anchor, whatever its IoU. The paper does not; torchvision and detectron2 do.
    low_quality_matches: bool = False
    # Ignore anchors that lie at least half in a crowd or ignore region, instead of training them as background.
    ignore_regions: bool = True

    @model_validator(mode="after")
    def _ordered(self) -> MatchingConfig:
        if self.bg_iou_thresh > self.fg_iou_thresh:
            thresholds = f"{self.bg_iou_thresh} > {self.fg_iou_thresh}"
            raise ValueError(f"bg_iou_thresh must not exceed fg_iou_thresh, got {thresholds}")
        return self


class LossConfig(Section):
    """A class loss on all anchors plus a box loss on the positive ones (Lin et al. 2017, section 3)."""

    # focal, focal_star (appendix A); ohem (section 5.1) and bootstrap, both with cross entropy; ghm (Li et al. 2019),
    # quality_focal (Li et al. 2020), varifocal (Zhang et al. 2021), poly1_focal (Leng et al. 2022). Cross entropy is
    # focal with gamma 0.
    cls: ClassLossKind = "focal"
    # A number weights positives by alpha, negatives by 1 - alpha; null: both by 1. A list weights the positives of each
    # class (negatives by 1); so do inverse_frequency and effective_number, from the object counts of data.train.
    alpha: Fraction | tuple[NonNegative, ...] | Literal["inverse_frequency", "effective_number"] | None = 0.25
    alpha_exponent: NonNegative = 1.0  # of inverse_frequency
    alpha_beta: Annotated[float, Field(ge=0, lt=1)] = 0.999  # of effective_number (Cui et al. 2019)
    negative_weight: NonNegative | None = None  # weight of negatives; null: derived from alpha
    gamma: NonNegative = 2.0  # 0 is cross entropy
    star_beta: float = 1.0  # of focal_star
    poly_epsilon: float = 1.0  # of poly1_focal
    varifocal_alpha: NonNegative = 0.75  # of varifocal: the weight of negatives
    ghm_bins: PositiveInt = 10  # of ghm
    ohem_batch: PositiveInt = 256  # of ohem: anchors kept per image
    ohem_nms_thresh: Fraction = 0.7  # of ohem: IoU with a harder anchor that removes one before the selection
    ohem_negatives_per_positive: PositiveInt | None = None  # 3 for the paper's 1:3; null: no ratio
    bootstrap_fraction: Annotated[float, Field(gt=0, le=1)] = 0.01  # of bootstrap: share of the anchors kept
    box: BoxLossKind = "smooth_l1"
    # Where smooth L1 changes from quadratic to linear, in encoded units. Not in the paper; its code used 1/9.
    smooth_l1_beta: Positive = 1 / 9
    box_weight: Positive = 1.0
    # global: the sum over the step divided by its positive anchors (the paper); per_image: each image divided by its
    # own, then the mean over images (torchvision).
    normalizer: Normalizer = "global"


SOFTMAX_FORMS = ("focal", "focal_star", "ohem", "bootstrap")
"""Values of `loss.cls` that have a softmax form."""


class PostprocessConfig(Section):
    """From the scores of all anchors to detections (Lin et al. 2017, section 4, "Inference")."""

    score_thresh: Fraction = 0.05
    topk_candidates: PositiveInt = 1000  # per level, before non-maximum suppression
    nms_thresh: Fraction = 0.5
    detections_per_img: PositiveInt = 100


class SplitConfig(Section):
    """A set of images and its COCO-format annotations."""

    images: str
    annotations: str


class DataConfig(Section):
    """What is read, validated, augmented and resized."""

    train: SplitConfig | None = None
    val: SplitConfig | None = None
    test: SplitConfig | None = None
    # Short side in pixels; of a list, every step draws one (multi-scale training).
    min_size: PositiveInt | Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = 800
    max_size: PositiveInt = 1333  # upper bound of the long side
    eval_min_size: PositiveInt | None = None  # short side in evaluation and prediction; null: the largest of min_size
    hflip: Fraction = 0.5  # probability of a horizontal flip in training
    # albumentations transforms, in order, applied to the image as read from the file (before resizing), for example
    # - RandomBrightnessContrast: {brightness_limit: 0.2, p: 0.5}
    augment: tuple[dict[str, dict[str, Any]], ...] = ()
    augment_min_visibility: Fraction = 0.3  # a crop drops objects of which a smaller fraction remains
    # Images of an epoch. plain: each once. repeat_factor: images with rare classes more often (Gupta et al. 2019).
    # class_balanced: as many images, about equally many per class. Both count images; loss.alpha counts objects.
    sampling: Sampling = "plain"
    repeat_threshold: Annotated[float, Field(gt=0, le=1)] = 0.001  # classes in a smaller share of images are rare
    aspect_ratio_grouping: bool = True  # batches are all landscape or all portrait, which saves padding
    num_workers: NonNegativeInt = 2  # loader processes per training process
    worker_timeout: Positive = 300.0  # seconds that a loader process may take to read one image
    # Size in GB of the cache that keeps images from epoch to epoch, shared by all processes of a machine: decoded and,
    # without `augment` and where that is smaller, resized.
    cache_gb: NonNegative = 0.0
    cache_folder: str | None = None  # null: in memory; a folder: on its disk, for this run only
    # Without `augment`, training decodes JPEG files at 1/2, 1/4 or 1/8 of their size if the network input is smaller.
    scaled_decode: bool = True
    # header: every file exists and has the annotated size; decode: and can be decoded completely; auto: decode up to
    # 5,000 images (remembered between runs), headers above that.
    verify: Verify = "auto"
    on_error: OnError = "fail"  # skip: leave out unusable images and annotations, and report them
    # EXIF orientation. auto: decided by the majority of the images whose annotated size shows which one was used.
    exif: Exif = "auto"

    @property
    def train_sizes(self) -> tuple[int, ...]:
        """The short sides of training."""
        return self.min_size if isinstance(self.min_size, tuple) else (self.min_size,)

    @property
    def eval_size(self) -> int:
        """The short side of evaluation and prediction."""
        return self.eval_min_size or max(self.train_sizes)

    @model_validator(mode="after")
    def _complete(self) -> DataConfig:
        if self.cache_folder is not None and not self.cache_gb:
            raise ValueError("cache_folder requires a cache_gb above 0, got cache_gb 0; set both or none")
        for i, step in enumerate(self.augment):
            if len(step) != 1:
                raise ValueError(f"augment[{i}] must be one transform, `- Name: {{arguments}}`, got {step}")
        return self


class EmaConfig(Section):
    """Exponential moving average (EMA) of the weights, which is then evaluated and used."""

    # Share of the old average kept per step. It rises to this value as (1 + step) / (10 + step): otherwise, a run of a
    # few hundred steps would stay at its initial weights.
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.999


class SkipLimits(Section):
    """How many steps may be skipped with `train.on_nonfinite: skip`; one more ends the run."""

    consecutive: PositiveInt = 10  # more in a row are no accident: every step fails
    total: PositiveInt = 100  # of the whole run, interruptions included


class TrainConfig(Section):
    """The training run."""

    epochs: PositiveInt = 12
    batch_size: PositiveInt = 16  # images per optimizer step, over all processes and micro-batches
    # Images per forward pass and process; null: all of the process's share; auto: as many as fit into memory (measured
    # before the first step). The update is that of the whole batch in any case.
    micro_batch: PositiveInt | Literal["auto"] | None = None
    precision: Literal["auto"] | Precision = "auto"  # auto: bf16 where the hardware has it, else fp32
    compile: Literal["auto"] | bool = "auto"  # torch.compile; auto: on CUDA for long runs, on CPU never (no gain there)
    channels_last: bool = True
    # Recompute the backbone's activations in the backward pass instead of storing them: less memory, more time.
    checkpoint_activations: bool = False
    device: Device = "auto"
    rank_timeout: Positive = 600.0  # seconds that processes of one run wait for each other
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    init_from: str | None = None  # checkpoint to fine-tune from; same as --init-from
    ema: EmaConfig | None = None
    checkpoint_every_steps: PositiveInt | None = None  # in addition to the checkpoint after every epoch
    keep_checkpoints: PositiveInt = (
        2  # last checkpoints kept: if the newest is damaged, a run resumes from the one before
    )
    save_timeout: NonNegative = 120.0  # seconds for which a checkpoint that cannot be written is tried again
    # A step whose loss or gradient is not finite never reaches the weights. stop: it ends the run; skip: it is left
    # out, with a warning. Both write nonfinite.json. (In fp16, steps whose gradients overflow are always left out.)
    on_nonfinite: OnNonfinite = "stop"
    max_skipped_steps: SkipLimits = SkipLimits()
    early_stop_patience: PositiveInt | None = None  # evaluations without a better AP before stopping
    log_every: PositiveInt = 20  # steps
    trace_steps: NonNegativeInt = 0  # steps to profile, after the first ones; 0: none
    images_every_epochs: NonNegativeInt = 1  # detections and ground truth of some images in TensorBoard; 0: never
    # How often evaluations compute the loss concentration on loss_images validation images, for TensorBoard; 0: never.
    loss_every_epochs: NonNegativeInt = 0
    loss_images: NonNegativeInt = 8


class OptimConfig(Section):
    """Optimizer and learning rate."""

    name: Literal["sgd", "adamw"] = "sgd"
    lr: Positive = 0.01  # for lr_batch_size images per step (Lin et al. 2017, section 4.1)
    lr_batch_size: PositiveInt = 16
    scale_lr: bool = True  # by batch_size / lr_batch_size: linearly for SGD, by the square root for AdamW
    momentum: Fraction = 0.9  # SGD
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)  # AdamW
    weight_decay: NonNegative = 1e-4
    norm_bias_decay: bool = False  # apply weight decay to norms and biases too
    backbone_lr_factor: NonNegative = 1.0
    schedule: Literal["multistep", "cosine"] = "multistep"
    # Fractions of the run after which the rate is multiplied by gamma (multistep): 60,000 and 80,000 of 90,000 steps.
    milestones: tuple[NonNegative, ...] = (2 / 3, 8 / 9)
    gamma: Positive = 0.1
    final_lr_factor: Fraction = 0.0  # rate at the end of a cosine schedule, relative to lr
    warmup_steps: NonNegativeInt = 500  # clamped, with a warning, to the length of a shorter run
    warmup_factor: Fraction = 0.001  # rate at step 0 relative to lr; it grows linearly
    clip_grad_norm: Positive | None = None

    @model_validator(mode="after")
    def _milestones_ordered(self) -> OptimConfig:
        if max(self.milestones, default=0) > 1:
            raise ValueError(
                "milestones must be fractions of the run, neither epochs nor steps, got "
                f"{list(self.milestones)}: epoch 8 of 12 is {8 / 12:.4f}"
            )
        if list(self.milestones) != sorted(self.milestones):
            raise ValueError(f"milestones must ascend, got {list(self.milestones)}")
        return self


class EvalConfig(Section):
    """How detections are scored."""

    every_epochs: PositiveInt = 1  # the last epoch is always evaluated
    engine: Engine = "hotcoco"  # the same numbers; hotcoco is about eighty times faster
    precision: Literal["auto"] | Precision = "fp32"
    batch_size: PositiveInt | None = None  # null: train.batch_size (or micro_batch)
    loss: bool = True  # in training, also compute the loss of data.val; on a GPU that takes a second forward pass
    max_dets: tuple[PositiveInt, PositiveInt, PositiveInt] = (1, 10, 100)

    @model_validator(mode="after")
    def _max_dets_ordered(self) -> EvalConfig:
        if list(self.max_dets) != sorted(set(self.max_dets)):
            raise ValueError(f"max_dets must be three ascending numbers, got {list(self.max_dets)}")
        return self


class Config(Section):
    """A whole run. The number of classes is not a setting: it is read from the annotations."""

    model: ModelConfig = ModelConfig()
    matching: MatchingConfig = MatchingConfig()
    loss: LossConfig = LossConfig()
    postprocess: PostprocessConfig = PostprocessConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    eval: EvalConfig = EvalConfig()

    @property
    def postprocess_arguments(self) -> dict[str, Any]:
        """Keyword arguments of `detector.inference.postprocess.postprocess`."""
        compat = self.model.compat.model_dump(include={"clip", "drop_empty", "bound_shrinking"})
        return {**self.postprocess.model_dump(), **compat}

    @model_validator(mode="after")
    def _sections_agree(self) -> Config:
        if isinstance(self.train.micro_batch, int) and self.train.micro_batch > self.train.batch_size:
            sizes = f"{self.train.micro_batch} > {self.train.batch_size}"
            raise ValueError(f"train.micro_batch must not exceed train.batch_size, got {sizes}")
        if self.model.head.activation == "softmax" and self.loss.cls not in SOFTMAX_FORMS:
            raise ValueError(
                f"loss.cls must be one of {', '.join(SOFTMAX_FORMS)} with model.head.activation softmax, got "
                f"{self.loss.cls}"
            )
        if max(self.data.train_sizes) > self.data.max_size or self.data.eval_size > self.data.max_size:
            raise ValueError(
                f"data.min_size and data.eval_min_size must not exceed data.max_size, got {self.data.min_size}, "
                f"{self.data.eval_min_size} and {self.data.max_size}"
            )
        return self


def resolve_data_paths(config: Config) -> Config:
    """Make relative data and weight paths absolute, from the working directory."""
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
    """Replace `train.micro_batch: auto` by the size that was determined."""
    if config.train.micro_batch != "auto":
        return config
    return config.model_copy(update={"train": config.train.model_copy(update={"micro_batch": micro_batch})})


def flatten(values: dict[str, Any], at: str = "") -> dict[str, Any]:
    """Nested settings by their full key, `train.epochs` for example."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(flatten(value, f"{at}{key}.") if isinstance(value, dict) else {at + key: value})
    return flat


def config_differences(a: Config, b: Config, keys: Iterable[str] | None = None) -> list[tuple[str, Any, Any]]:
    """List the settings in which two configs differ.

    Args:
        a: a config.
        b: another one.
        keys: full keys of the settings or sections to compare; None compares all.

    Returns:
        (key, value in `a`, value in `b`) of each difference. The value of a key within a section that is null is None.
    """
    one, other = flatten(a.model_dump()), flatten(b.model_dump())
    compared = [k for k in {**one, **other} if keys is None or any(f"{k}.".startswith(f"{key}.") for key in keys)]
    return [(k, one.get(k), other.get(k)) for k in compared if one.get(k) != other.get(k)]
