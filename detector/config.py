"""Every setting of the detector: its type, default, unit and reason; and how YAML becomes a `Config`.

A config is read as: the files named by `_base_`, then the file itself, then `key=value` overrides. Mappings merge,
lists replace, null removes. Two things must not replace each other silently: a section and a value (`optim=adamw
optim.lr=0.1`), and what a base says of a section and the same section left empty in a file, because that is what
commenting all of its lines out leaves behind. (Sections that may be absent, data.train and train.ema, are removed by
it; so is any section by `section=null` on the command line.) An override of a text setting, a path, is taken as it
stands and not read as YAML. Once all is merged, the mistakes of all sources are reported together.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

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


def flatten(values: dict[str, Any], at: str = "") -> dict[str, Any]:
    """Nested settings by their full key."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(flatten(value, f"{at}{key}.") if isinstance(value, dict) else {at + key: value})
    return flat
