"""VOC to COCO: the box arithmetic, the reported problems, and untrusted XML."""

import json
import os
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from detector.dataset_tools.voc import VocResult, convert_voc, parse_xml, read_names, voc_to_coco
from detector.datasets.opening import read_coco
from detector.datasets.problems import ANNOTATION_LEFT_OUT, IMAGE_LEFT_OUT, Problem
from detector.errors import UserError
from tools import get_data

REPOSITORY = Path(__file__).resolve().parents[2]


def voc_object(name: str, *corners: object, more: str = "") -> str:
    sides = zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
    box = "".join(f"<{side}>{value}</{side}>" for side, value in sides)
    return f"<object><name>{name}</name>{more}<bndbox>{box}</bndbox></object>"


def voc_size(width: int, height: int) -> str:
    return f"<size><width>{width}</width><height>{height}</height></size>"


def voc_xml(*objects: str, size: str = voc_size(64, 48)) -> str:
    return f"<annotation><filename>elsewhere.jpg</filename>{size}{''.join(objects)}</annotation>"


class Tree:
    """Folders of 64x48 images and their VOC annotations."""

    def __init__(self, root: Path) -> None:
        self.images, self.annotations = root / "images", root / "xml"
        self.images.mkdir()
        self.annotations.mkdir()

    def add(self, name: str, xml: str | None, *, image: bool = True) -> None:
        if image:
            Image.new("RGB", (64, 48)).save(self.images / f"{name}.jpg")
        if xml is not None:
            (self.annotations / f"{name}.xml").write_text(xml, encoding="utf-8")

    def convert(self, *names: str, categories: list[str] | None = None) -> VocResult:
        return voc_to_coco(self.images, self.annotations, names=names, categories=categories)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


@pytest.fixture
def shared_bccd() -> Path:
    folder = Path(os.environ.get("DETECTOR_SHARED", REPOSITORY.parent / "shared")) / "datasets" / "bccd"
    if not folder.is_dir():
        pytest.skip(f"no shared dataset at {folder}; set DETECTOR_SHARED")
    return folder


def test_an_empty_list_gives_an_empty_coco_file(tree: Tree) -> None:
    result = tree.convert()
    assert result.coco == {"images": [], "annotations": [], "categories": []}
    assert result.problems == ()


def test_the_conversion_equals_one_done_by_hand(tree: Tree) -> None:
    tree.add("b", voc_xml(voc_object("dog", 1, 2, 11, 22), voc_object("cat", "0.5", 0, 64, "48.0")))
    tree.add("a", voc_xml())
    result = tree.convert("b", "a")
    assert result.problems == ()
    assert result.coco == {
        "images": [
            {"id": 1, "file_name": "b.jpg", "width": 64, "height": 48},
            {"id": 2, "file_name": "a.jpg", "width": 64, "height": 48},
        ],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 2, "bbox": [1, 2, 10, 20], "area": 200, "iscrowd": 0},
            {"id": 2, "image_id": 1, "category_id": 1, "bbox": [0.5, 0, 63.5, 48], "area": 3048.0, "iscrowd": 0},
        ],
        "categories": [
            {"id": 1, "name": "cat", "supercategory": ""},
            {"id": 2, "name": "dog", "supercategory": ""},
        ],
    }


def test_categories_found_are_sorted(tree: Tree) -> None:
    tree.add("a", voc_xml(*(voc_object(name, 1, 1, 3, 3) for name in "hgfedcba")))
    assert "".join(category["name"] for category in tree.convert("a").coco["categories"]) == "abcdefgh"


def test_given_categories_keep_their_order_and_first_ids_are_respected(tree: Tree) -> None:
    tree.add("a", voc_xml(voc_object("ant", 1, 1, 3, 3)))
    coco = voc_to_coco(
        tree.images, tree.annotations, names=["a"], categories=["bee", "ant"], first_image_id=7, first_annotation_id=9
    ).coco
    assert [(box["id"], box["image_id"], box["category_id"]) for box in coco["annotations"]] == [(9, 7, 2)]
    assert [category["name"] for category in coco["categories"]] == ["bee", "ant"]


GOOD = voc_object("dog", 1, 1, 9, 9)


def test_only_difficult_objects_are_marked_ignore(tree: Tree) -> None:
    marks = ("", "<difficult/>", "<difficult>0</difficult>", "<difficult> 1 </difficult>")
    tree.add("a", voc_xml(*(voc_object("dog", 1, 1, 9, 9, more=mark) for mark in marks)))
    result = tree.convert("a")
    assert result.problems == ()
    assert [box.get("ignore") for box in result.coco["annotations"]] == [None, None, None, 1]


# The file has 64x48 pixels, and 48x64 after rotation by its EXIF tag.
@pytest.mark.parametrize(
    ("orientation", "stated", "written", "problems"),
    [
        (1, (64, 48), (64, 48), 0),
        (1, (48, 64), (64, 48), 1),
        (3, (48, 64), (64, 48), 1),
        *((orientation, (48, 64), (48, 64), 0) for orientation in (5, 6, 7, 8)),
        (6, (64, 48), (64, 48), 0),
        (6, (48, 65), (64, 48), 1),
    ],
)
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_an_xml_size_of_the_rotated_image_is_kept_if_exif_rotates_it(
    tree: Tree, suffix: str, orientation: int, stated: tuple[int, int], written: tuple[int, int], problems: int
) -> None:
    tree.add("a", voc_xml(GOOD, size=voc_size(*stated)), image=False)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (64, 48)).save(tree.images / f"a.{suffix}", exif=exif)
    result = tree.convert("a")
    assert [(image["width"], image["height"]) for image in result.coco["images"]] == [written]
    assert [problem.kind for problem in result.problems] == ["image size mismatch"] * problems


def test_boxes_of_a_rotated_image_are_compared_with_its_rotated_size(tree: Tree, tmp_path: Path) -> None:
    size = voc_size(48, 64)
    tree.add("a", voc_xml(voc_object("dog", 1, 50, 9, 64), voc_object("dog", 1, 1, 49, 9), size=size), image=False)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 48)).save(tree.images / "a.jpg", exif=exif)
    (tmp_path / "list.txt").write_text("a\n")
    result = convert_voc(tree.images, tree.annotations, list_file=tmp_path / "list.txt", output=tmp_path / "coco.json")
    assert result.problems == (
        Problem("box partly outside", "a", "box must lie in the 48x64 image, got dog [1,1,49,9]", "kept unchanged"),
    )
    data = read_coco(tmp_path / "coco.json", tree.images, progress=False)
    assert data.apply_exif
    assert data.objects(0).boxes.tolist() == [[1, 50, 9, 64], [1, 1, 48, 9]]


MALFORMED, FROM_FILE = "malformed annotation", "size read from the file"


@pytest.mark.parametrize(
    ("xml", "kind", "action", "message"),
    [
        (None, MALFORMED, IMAGE_LEFT_OUT, "must exist"),
        ("<annotation>", MALFORMED, IMAGE_LEFT_OUT, "well formed"),
        ("<html></html>", MALFORMED, IMAGE_LEFT_OUT, "root must be <annotation>"),
        ("<!DOCTYPE annotation><annotation/>", MALFORMED, IMAGE_LEFT_OUT, "document type"),
        (voc_xml(GOOD, "<object><bndbox/></object>"), MALFORMED, ANNOTATION_LEFT_OUT, "1 must have name, bndbox/xmin"),
        (voc_xml(GOOD, voc_object("dog", 1, 1, "wide", 9)), MALFORMED, ANNOTATION_LEFT_OUT, "1 must have bndbox/xmax"),
        (voc_xml(GOOD, voc_object("dog", 1, 1, "nan", 9)), MALFORMED, ANNOTATION_LEFT_OUT, "1 must have bndbox/xmax"),
        (voc_xml(GOOD, voc_object("dog", 5, 6, 5, 6)), "box of zero size", ANNOTATION_LEFT_OUT, "got dog [5,6,5,6]"),
        (voc_xml(GOOD, voc_object("dog", 5, 6, 5, 9)), "box of zero size", ANNOTATION_LEFT_OUT, "got dog [5,6,5,9]"),
        (voc_xml(GOOD, voc_object("dog", 5, 6, 9, 6)), "box of zero size", ANNOTATION_LEFT_OUT, "got dog [5,6,9,6]"),
        (voc_xml(GOOD, voc_object("dog", 5, 6, 4, 9)), "box of zero size", ANNOTATION_LEFT_OUT, "xmax > xmin"),
        (voc_xml(GOOD, voc_object("dog", 5, 6, 65, 9)), "box partly outside", "kept unchanged", "in the 64x48 image"),
        (voc_xml(GOOD, voc_object("dig", 5, 6, 9, 9)), "unknown category", ANNOTATION_LEFT_OUT, "did you mean dog?"),
        (voc_xml(voc_object("dog", 1, 1, 9, 9, more="<difficult>yes</difficult>")), MALFORMED, "0 used", "got 'yes'"),
        (voc_xml(GOOD, size=""), "unusable image size", FROM_FILE, "got none"),
        (voc_xml(GOOD, size=voc_size(0, 0)), "unusable image size", FROM_FILE, "got none"),
        (voc_xml(GOOD, size=voc_size(48, 64)), "image size mismatch", FROM_FILE, "rotated by 90 degrees"),
    ],
)
def test_each_problem_is_reported_and_only_the_affected_box_or_image_is_left_out(
    tree: Tree, xml: str | None, kind: str, action: str, message: str
) -> None:
    tree.add("first", xml)
    tree.add("second", voc_xml(GOOD))
    result = tree.convert("first", "second", categories=["dog", "cat"])
    assert [(problem.where, problem.kind, problem.action) for problem in result.problems] == [("first", kind, action)]
    assert message in result.problems[0].detail
    images, boxes = result.coco["images"], result.coco["annotations"]
    assert [image["file_name"] for image in images] == (
        ["second.jpg"] if action == IMAGE_LEFT_OUT else ["first.jpg", "second.jpg"]
    )
    assert all((image["width"], image["height"]) == (64, 48) for image in images)
    assert len(boxes) == len(images) + (kind == "box partly outside")


def test_missing_corrupt_and_repeated_images_are_reported(tree: Tree) -> None:
    tree.add("missing", voc_xml(GOOD), image=False)
    tree.add("corrupt", voc_xml(GOOD), image=False)
    (tree.images / "corrupt.png").write_bytes(b"not an image")
    tree.add("fine", voc_xml(GOOD))
    result = tree.convert("missing", "corrupt", "fine", "fine")
    assert [(p.where, p.kind, p.action) for p in result.problems] == [
        ("missing", "missing image", IMAGE_LEFT_OUT),
        ("corrupt", "undecodable image", IMAGE_LEFT_OUT),
        ("fine", "duplicate file name", "converted once"),
    ]
    assert [image["file_name"] for image in result.coco["images"]] == ["fine.jpg"]


def test_unreadable_images_are_left_out(tree: Tree) -> None:
    tree.add("fine", voc_xml(GOOD))
    tree.add("floats", voc_xml(GOOD), image=False)
    Image.new("F", (64, 48)).save(tree.images / "floats.tif")
    tree.add("program", voc_xml(GOOD), image=False)  # Pillow would start Ghostscript for it
    (tree.images / "program.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 48\n%%EndComments\n")
    result = tree.convert("fine", "floats", "program")
    assert [(p.where, p.kind, p.action) for p in result.problems] == [
        ("floats", "undecodable image", IMAGE_LEFT_OUT),
        ("program", "undecodable image", IMAGE_LEFT_OUT),
    ]
    assert [image["file_name"] for image in result.coco["images"]] == ["fine.jpg"]


def test_boxes_of_an_image_that_is_left_out_are_not_reported_separately(tree: Tree) -> None:
    tree.add("missing", voc_xml("<object/>", GOOD), image=False)
    assert [(p.kind, p.action) for p in tree.convert("missing").problems] == [("missing image", IMAGE_LEFT_OUT)]


def billion_laughs(encoding: str) -> bytes:
    rows = ['<!ENTITY l0 "ha">'] + [f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 10)]
    body = f"<!DOCTYPE annotation [{''.join(rows)}]><annotation>&l9;</annotation>"
    return f'<?xml version="1.0" encoding="{encoding}"?>'.encode() + body.encode(encoding)


# cp037 (EBCDIC): a search of the bytes for b"<!DOCTYPE" finds nothing, but expat would read it.
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "cp037"])
def test_entities_are_refused_before_they_are_expanded(encoding: str) -> None:
    began = time.monotonic()
    with pytest.raises(ValueError, match="must not have a document type"):
        parse_xml(billion_laughs(encoding))
    assert time.monotonic() - began < 1


def test_declared_encodings_and_byte_order_marks_are_read() -> None:
    text = '<?xml version="1.0" encoding="{}"?><annotation><object><name>细胞é</name></object></annotation>'
    assert parse_xml(text.format("gbk").replace("é", "").encode("gbk")).findtext("object/name") == "细胞"
    assert parse_xml(b"\xef\xbb\xbf" + text.format("UTF-8").encode()).findtext("object/name") == "细胞é"
    with pytest.raises(ValueError, match="declared encoding"):
        parse_xml("<annotation>é</annotation>".encode("latin-1"))


@pytest.mark.parametrize("name", ["/etc/passwd", "../up", "a/../../b"])
def test_names_that_lead_out_of_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "list.txt").write_text(f"fine\n\n{name}\n")
    with pytest.raises(UserError, match="must stay inside"):
        read_names(tmp_path / "list.txt")


def test_a_list_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="must be UTF-8 text"):
        read_names(tmp_path / "list.txt")


def run_tool(tree: Tree, output: Path, *names: str) -> int:
    names_file = output.with_suffix(".txt")
    names_file.write_text("".join(f"{name}\n" for name in names))
    folders = [f"--images={tree.images}", f"--annotations={tree.annotations}"]
    return get_data.main(["voc", *folders, f"--list={names_file}", f"--output={output}"])


def test_the_tool_prints_one_line_if_there_are_no_problems(
    tree: Tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree.add("a", voc_xml(GOOD))
    assert run_tool(tree, tmp_path / "a.json", "a") == 0
    assert capsys.readouterr().out == (
        f"{tmp_path}/a.json: 1 images, 1 boxes (0 difficult, marked ignore); "
        "left out: 0 images, 0 boxes of other images; 0 problems\n"
    )
    assert not (tmp_path / "a.problems.tsv").exists()


def test_the_tool_counts_difficult_boxes_and_what_is_left_out(
    tree: Tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hard = voc_object("dog", 1, 1, 9, 9, more="<difficult>1</difficult>")
    empty = voc_object("dog", 3, 3, 3, 3)
    tree.add("a", voc_xml(GOOD, hard, hard, empty, "<object/>"))
    tree.add("b", voc_xml(GOOD, size=""))
    tree.add("c", None)
    assert run_tool(tree, tmp_path / "a.json", "a", "b", "b", "c", "d") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == f"all 6 problems are listed in {tmp_path}/a.problems.tsv"
    assert lines[-1] == (
        f"{tmp_path}/a.json: 2 images, 4 boxes (2 difficult, marked ignore); "
        "left out: 2 images, 2 boxes of other images; 6 problems"
    )
    assert len((tmp_path / "a.problems.tsv").read_text(encoding="utf-8").splitlines()) == 6


def test_the_tool_lists_many_problems_completely_in_a_file(
    tree: Tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree.add("a", voc_xml(GOOD, *(voc_object("d\n\x9bog", k, k, k, k) for k in range(30))))
    assert run_tool(tree, tmp_path / "a.json", "a") == 0
    lines = capsys.readouterr().out.splitlines()
    listed = (tmp_path / "a.problems.tsv").read_text(encoding="utf-8").splitlines()
    assert lines[-3:-1] == ["    ... and 27 more", f"all 30 problems are listed in {tmp_path}/a.problems.tsv"]
    assert len(listed) == 30
    assert listed[29].split("\t") == [
        "box of zero size",
        "a",
        "box must have xmax > xmin and ymax > ymin, got d\\n\\x9bog [29,29,29,29]",
        ANNOTATION_LEFT_OUT,
    ]


def test_the_tool_writes_the_converted_file(tree: Tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree.add("a", voc_xml(GOOD, voc_object("dog", 3, 3, 3, 3)))
    (tmp_path / "list.txt").write_text("a\n")
    output = tmp_path / "new" / "a.json"
    arguments = ["voc", f"--images={tree.images}", f"--annotations={tree.annotations}", f"--output={output}"]
    assert get_data.main([*arguments, f"--list={tmp_path / 'list.txt'}"]) == 0
    assert json.loads(output.read_text()) == tree.convert("a").coco
    assert "1 images, 1 boxes" in capsys.readouterr().out
    assert get_data.main([*arguments, f"--list={tmp_path / 'none.txt'}"]) == 2
    assert capsys.readouterr().err.startswith("error: --list must be a text file")


def test_all_invalid_arguments_are_reported_together(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--images must.*; --annotations must.*; --list must.*; --categories must"):
        convert_voc(
            tmp_path / "a", tmp_path / "b", list_file=tmp_path / "c", output=tmp_path / "d", categories=["x", "x"]
        )


def write_voc(coco: dict[str, Any], folder: Path) -> list[str]:
    """Write one XML file per image of a COCO file; return the image names."""
    folder.mkdir()
    categories = {category["id"]: category["name"] for category in coco["categories"]}
    objects: dict[int, list[str]] = defaultdict(list)
    for box in coco["annotations"]:
        x, y, w, h = box["bbox"]
        objects[box["image_id"]].append(voc_object(categories[box["category_id"]], x, y, x + w, y + h))
    for image in coco["images"]:
        size = voc_size(image["width"], image["height"])
        path = folder / f"{Path(image['file_name']).stem}.xml"
        path.write_text(voc_xml(*objects[image["id"]], size=size), encoding="utf-8")
    return [Path(image["file_name"]).stem for image in coco["images"]]


def test_bccd_written_as_voc_is_converted_back_to_equal_boxes(shared_bccd: Path, tmp_path: Path) -> None:
    boxes = 0
    for split in ("train", "val", "test"):
        original = json.loads((shared_bccd / "annotations" / f"{split}.json").read_text())
        names = write_voc(original, tmp_path / split)
        result = voc_to_coco(
            shared_bccd / "images",
            tmp_path / split,
            names=names,
            categories=[category["name"] for category in original["categories"]],
            first_image_id=original["images"][0]["id"],
            first_annotation_id=original["annotations"][0]["id"],
        )
        assert result.problems == ()
        assert result.coco["annotations"] == original["annotations"]
        assert result.coco["categories"] == original["categories"]
        boxes += len(result.coco["annotations"])
    assert boxes == 2804 + 1137 + 945
