"""Images from folders, split files and npz files."""

import json
import re
import zipfile

import numpy as np
import pytest
from PIL import Image

import eqxmeta as em

pytestmark = pytest.mark.usefixtures("as_users_run_it")


def picture(path, number, mode="RGB", shape=(6, 6)):
    """An image that can be told from others, written to `path`; its pixels."""
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    pixels = np.random.default_rng(number).integers(0, 256, (*shape, *channels), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


@pytest.fixture
def folder(tmp_path):
    """Classes `cat` (2 images), `dog` (3) and `fish/cod` (1), and what else lies around."""
    pixels = {}
    for number, name in enumerate(("cat/b", "cat/a", "dog/1", "dog/2", "dog/3", "fish/cod/x")):
        pixels[name] = picture(tmp_path / f"{name}.png", number)
    (tmp_path / "README.txt").write_text("about")
    (tmp_path / "dog" / ".hidden.png").write_text("not an image")
    (tmp_path / "cat" / "notes.md").write_text("about")
    return tmp_path, pixels


def assert_holds(data, pixels, **expected):
    """Classes of these names, and in each the images of these names, in this order."""
    assert data.class_names == tuple(expected)
    wanted = [pixels[name] for names in expected.values() for name in names]
    assert np.array_equal(data.images, np.moveaxis(np.stack(wanted), 3, 1))
    labels = [i for i, names in enumerate(expected.values()) for _ in names]
    assert np.array_equal(data.labels, labels) and data.labels.dtype == np.int32
    assert data.images.dtype == np.uint8


ALL = {"cat": ["cat/a", "cat/b"], "dog": ["dog/1", "dog/2", "dog/3"], "fish/cod": ["fish/cod/x"]}


def test_a_folder_a_class(folder):
    root, pixels = folder
    assert_holds(em.data.from_folder(root), pixels, **ALL)
    assert_holds(em.data.from_folder(str(root)), pixels, **ALL)


SPLITS = {
    "three and another": (["train/cat/1", "val/cat/1", "test/cow/1", "extra/cat/1"], "train"),
    "one": (["cat/1", "dog/1", "train/dog/1"], "train"),
    "only a test": (["test/cat/1", "test/dog/1"], "test"),
    "another case": (["Train/cat/1", "TEST/dog/1"], "Train"),
    "training": (["training/cat/1", "validation/dog/1"], "training"),
    "valid": (["valid/cat/1", "dog/1"], "valid"),
    "of a challenge": (["val2017/cat/1", "train2017/dog/1"], "val2017"),
    "of a meta-learner": (["meta_train/cat/1", "meta_test/dog/1"], "meta_train"),
    "no classes in them": (["train/1", "test/1"], "train"),
    "below the classes' animals": (["a/train/cat/1", "a/test/dog/1"], "a/train"),
    "twice": (["train/train/cat/1", "train/val/cat/1"], "train"),
}


@pytest.mark.parametrize(("images", "first"), SPLITS.values(), ids=SPLITS)
def test_splits_of_which_none_is_chosen_are_refused(tmp_path, images, first):
    for number, name in enumerate(images):
        picture(tmp_path / f"{name}.png", number)
    above, _, name = str(tmp_path / first).rpartition("/")
    refused(f"has splits.*{first}.*from_folder\\('{above}', split=.*split='all'", tmp_path)
    data = em.data.from_folder(tmp_path, split="all")
    assert data.class_names == tuple(sorted({image.rpartition("/")[0] for image in images}))
    assert len(data.images) == len(images)
    if first == "train" and images[0].startswith("train/train"):
        refused(f"has splits.*from_folder\\('{tmp_path}/train', split='train'", tmp_path, "train")
    elif "/cat/" in images[0] and "/" not in first:
        assert em.data.from_folder(tmp_path, first).class_names[0] in ("cat", "dog")


@pytest.mark.parametrize("file", ["train.csv", "test.txt", "val.json"])
def test_files_of_splits_of_which_none_is_chosen_are_refused(folder, file):
    """Of miniImageNet all images lie in one folder, which would be the one class."""
    root, pixels = folder
    (root / file).write_text("")
    refused(f"has splits.*{file}.*split='{file.partition('.')[0]}'.*split='all'", root)
    assert_holds(em.data.from_folder(root, "all"), pixels, **ALL)


def test_a_class_called_train_is_no_split(tmp_path):
    """CIFAR-100 has trains, and folders may have any other names."""
    for number, name in enumerate(("train/1", "bus/1", "test tube/1", "trainers/a/1", "all/1")):
        picture(tmp_path / f"{name}.png", number)
    names = ("all", "bus", "test tube", "train", "trainers/a")
    assert em.data.from_folder(tmp_path).class_names == names
    refused("several things.*all", tmp_path, "all")


LINES = {
    "apple/1.jpg, 0, 3": "apple/1.jpg,apple",
    "fruit/apple/1.JPEG 5": "fruit/apple/1.JPEG,apple",
    "'1.png'\t7": "1.png,its class",
    "/data/apple/1.jpg,0": "apple/1.jpg,apple",
}


@pytest.mark.parametrize("how", ["txt", "json", "list"])
@pytest.mark.parametrize("line", LINES)
def test_a_list_of_images_is_no_list_of_classes(folder, line, how):
    root, _ = folder
    lines = ["image_path label" * (how == "txt"), line, *[line.replace("1", "2")] * 3]
    lines = [line for line in lines if line]
    (root / "mine.txt").write_text("\n".join(lines))
    (root / "mine.json").write_text(json.dumps(lines))
    split = lines if how == "list" else f"mine.{how}"
    first = re.escape(line if "'" not in line else "'1.png'")
    said = f"names images, not classes.*{first}.*first of {len(lines)} lines"
    refused(f"{said}.*its class in every line, '{re.escape(LINES[line])}'", root, split)


LISTED = ["cat/a.png, tabby", "dog/2.png,terrier", "dog/1.png,terrier"]


@pytest.mark.parametrize("how", ["header", "path", "csv", "txt", "json", "lines", "pairs"])
def test_a_list_of_images_with_their_classes(folder, how):
    root, pixels = folder
    pairs = [tuple(line.replace(" ", "").split(",")) for line in LISTED]
    header = {"header": ["label,id,filename"], "path": ["path,label"]}.get(how, [])
    rows = [f"{label},7,{image}" for image, label in pairs] if how == "header" else LISTED
    suffix = how if how in ("txt", "json") else "csv"
    text = json.dumps(pairs) if how == "json" else "\n".join([*header, *rows]) + "\n"
    (root / f"mine.{suffix}").write_text(text)
    split = {"lines": LISTED, "pairs": pairs}.get(how, f"mine.{suffix}")
    data = em.data.from_folder(root, split)
    assert_holds(data, pixels, tabby=["cat/a"], terrier=["dog/1", "dog/2"])


def test_columns_that_nobody_knows(folder):
    root, _ = folder
    for first in ("image,class", "cat/a.png,0,3"):
        (root / "mine.csv").write_text(f"{first}\ncat/a.png,cat\n")
        refused(f"mine.csv is not a split.*{first.split(',')[0]}.*'filename,label'.*"
                "'apple/1.jpg,apple'", root, "mine.csv")  # fmt: skip
    refused("does not name classes", root, [("cat/a.png", 0)])
    refused("`split` names an image that is missing.*cat/z.png", root, ["cat/z.png,cat"])


def test_a_folder_of_classes_stands_for_all_of_them(folder):
    root, pixels = folder
    pixels["fish/eel/1"] = picture(root / "fish/eel/1.png", 9)
    both = {"fish/cod": ["fish/cod/x"], "fish/eel": ["fish/eel/1"]}
    assert_holds(em.data.from_folder(root, ["fish"]), pixels, **both)
    assert_holds(em.data.from_folder(root, ["fish/eel", "cat", "fish"]), pixels,
                 cat=ALL["cat"], **both)  # fmt: skip
    (root / "train.txt").write_text("fish\n")
    assert_holds(em.data.from_folder(root, "train"), pixels, **both)


def test_several_folders_together(folder, tmp_path_factory):
    root, pixels = folder
    other = tmp_path_factory.mktemp("other")
    pixels["more"], pixels["cow"] = picture(other / "dog/0.png", 7), picture(other / "cow/1.png", 8)
    data = em.data.from_folder([root, str(other)])
    assert_holds(data, pixels, cat=ALL["cat"], cow=["cow"], dog=[*ALL["dog"], "more"],
                 **{"fish/cod": ["fish/cod/x"]})  # fmt: skip
    assert_holds(em.data.from_folder([root, root]), pixels, **ALL)  # an image is there once
    refused("puts an image into two classes.*'fish/cod' and of 'cod'", [root, root / "fish"])
    refused(r"`from_folder\(path=...\)` is empty", [])
    refused("`path` is not a folder", [root, other / "no"], error=FileNotFoundError)


def test_published_layouts(tmp_path):
    """CIFAR-FS: a name a line, beside the data. CUB: as Torchmeta and as easyfsl publish splits.
    (That of miniImageNet: `test_csv_files_as_of_mini_imagenet`.)"""
    bird, gull = "001.Black_footed_Albatross", "059.California_Gull"
    pixels, cub, cifar = {}, tmp_path / "CUB_200_2011/images", tmp_path / "cifar100"
    for number, name in enumerate(("apple", "bear", "train")):
        pixels[name] = picture(cifar / f"data/{name}/{name}_s_000001.png", number)
    splits = cifar / "splits/bertinetto"
    splits.mkdir(parents=True)
    (splits / "train.txt").write_text("train\napple\n")
    data = em.data.from_folder(cifar / "data", splits / "train.txt")
    assert_holds(data, pixels, apple=["apple"], train=["train"])
    for number, name in enumerate((bird, gull)):
        pixels[name] = picture(cub / name / f"{name[4:]}_0001_796111.png", number)
    (tmp_path / "val.json").write_text(json.dumps([gull]))
    assert_holds(em.data.from_folder(cub, tmp_path / "val.json"), pixels, **{gull: [gull]})
    roots = {"class_names": [bird[4:]], "class_roots": [f"./data/CUB/images/{bird}"]}
    (tmp_path / "train.json").write_text(json.dumps(roots))
    assert_holds(em.data.from_folder(cub, tmp_path / "train.json"), pixels, **{bird: [bird]})


@pytest.mark.parametrize("how", ["list", "txt", "json", "elsewhere", "relative", "link"])
def test_a_list_of_class_names(folder, how, tmp_path):
    root, pixels = folder
    names, split = ["fish/cod", "cat"], "train"
    if how == "list":
        split = names
    elif how == "txt":
        (root / "train.txt").write_text("fish/cod\n\ncat\n")
    elif how == "json":
        (root / "train.json").write_text(json.dumps(names))
    elif how == "elsewhere":
        split = tmp_path / "lists" / "mine.txt"
        split.parent.mkdir()
        split.write_text("fish/cod\ncat")
    elif how == "relative":
        split = "lists/train.json"
        (root / "lists").mkdir()
        (root / split).write_text(json.dumps(names))
    else:
        (root / "train").mkdir()
        for name in ("fish", "cat"):
            (root / "train" / name).symlink_to(root / name, target_is_directory=True)
    data = em.data.from_folder(root, split)
    assert_holds(data, pixels, **{name: ALL[name] for name in sorted(names)})


@pytest.mark.parametrize("place", ["", "images/", "images/{label}/", "{label}/"])
def test_csv_files_as_of_mini_imagenet(tmp_path, place):
    rows, pixels = ["filename,label"], {}
    for number, (name, label) in enumerate([("b", "n2"), ("a", "n2"), ("c", "n1"), ("d", "n3")]):
        file = tmp_path / place.format(label=label) / f"{name}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(file, number)
        with Image.open(file) as image:  # as it comes back from a lossy file
            pixels[name] = np.asarray(image)
        rows += [f"{name}.jpg,{label}"] if label != "n3" else []
    (tmp_path / "test.csv").write_text("\n".join(rows))
    data = em.data.from_folder(tmp_path, "test")
    assert_holds(data, pixels, n1=["c"], n2=["a", "b"])


def test_grey_images_and_conversions(tmp_path):
    grey, colour = picture(tmp_path / "a/1.png", 1, "L"), picture(tmp_path / "a/2.png", 2)
    with pytest.raises(ValueError, match=r"(?s)in kind.*1.png is grey.*2.png is colour.*mode="):
        em.data.from_folder(tmp_path)
    images = em.data.from_folder(tmp_path, mode="RGB").images
    assert np.array_equal(images, np.moveaxis([np.stack([grey] * 3, 2), colour], 3, 1))
    images = em.data.from_folder(tmp_path, mode="L").images
    luma = colour @ [0.299, 0.587, 0.114]
    assert images.shape == (2, 1, 6, 6) and np.array_equal(images[0, 0], grey)
    assert np.abs(images[1, 0] - luma).max() <= 1
    (tmp_path / "a/2.png").unlink()
    assert np.array_equal(em.data.from_folder(tmp_path).images, grey[None, None])


def test_transparent_images(tmp_path):
    """Also those with a palette, of which one colour is transparent."""
    (tmp_path / "a").mkdir()
    index = np.array([[0, 1, 2], [2, 1, 0]], np.uint8)
    colours = np.array([[9, 8, 7], [200, 10, 20], [0, 0, 0]], np.uint8)
    image = Image.fromarray(index, "P")
    image.putpalette(colours.tobytes())
    image.save(tmp_path / "a/1.png")
    assert np.array_equal(
        em.data.from_folder(tmp_path).images[0], np.moveaxis(colours[index], 2, 0)
    )
    on_white = np.array([[9, 8, 7], [200, 10, 20], [255, 255, 255]], np.uint8)[index]
    for transparency in (2, bytes([255, 255, 0])):
        image.save(tmp_path / "a/1.png", transparency=transparency)
        refused("1.png cannot be read.*transparent pixels of mode P", tmp_path)
        images = em.data.from_folder(tmp_path, mode="RGB").images
        assert np.array_equal(images[0], np.moveaxis(on_white, 2, 0))
    ink = np.zeros((2, 3, 4), np.uint8)
    ink[..., 3] = [[0, 255, 51], [255, 0, 0]]  # black, more or less of it
    Image.fromarray(ink).save(tmp_path / "a/1.png")
    assert np.array_equal(em.data.from_folder(tmp_path, mode="L").images[0, 0], 255 - ink[..., 3])


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_photographs_are_turned_upright(tmp_path, orientation, turns):
    pixels = np.arange(24, dtype=np.uint8).reshape(4, 6)
    (tmp_path / "a").mkdir()
    exif = Image.Exif()
    exif[0x0112] = orientation  # the camera was held so: as the standard numbers it
    Image.fromarray(pixels).save(tmp_path / "a/1.png", exif=exif)
    assert np.array_equal(em.data.from_folder(tmp_path).images[0, 0], np.rot90(pixels, turns))


def test_a_broken_header_is_no_reason_to_refuse_a_photograph(tmp_path):
    """An entry of the EXIF data that is no number of its kind, as cameras write them: Pillow reads
    it, and cannot write it again (its `exif_transpose` does, and fails)."""
    (tmp_path / "a").mkdir()
    exif = Image.Exif()
    exif[0x0112], exif[0x0103] = 3, 6
    data = exif.tobytes()
    # The type of the entry 0x0103 (big or little endian): from a short integer to text.
    place = max(data.find(bytes(tag)) for tag in ((1, 3, 0, 3), (3, 1, 3, 0)))
    kind = place + (3 if data[place] == 1 else 2)
    broken = data[:kind] + bytes([2]) + data[kind + 1 :]
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(pixels).save(tmp_path / "a/1.png", exif=broken)
    assert np.array_equal(em.data.from_folder(tmp_path).images[0, 0], np.rot90(pixels, 2))


def test_a_class_by_two_names_is_one(tmp_path):
    picture(tmp_path / "a/1.png", 1)
    images, labels = em.data.from_folder(tmp_path, ["a", "./a", "a/"])
    assert len(images) == len(labels) == 1


def test_sizes(tmp_path):
    picture(tmp_path / "a/1.png", 1, shape=(4, 6))
    picture(tmp_path / "b/2.png", 2, shape=(8, 8))
    with pytest.raises(ValueError, match=r"(?s)differ in size.*1.png is .*4 x 6.*2.png is .*8 x 8"):
        em.data.from_folder(tmp_path)
    assert em.data.from_folder(tmp_path, size=5).images.shape == (2, 3, 5, 5)
    # Of one colour it stays, whatever the filter.
    Image.new("RGB", (9, 3), (1, 2, 250)).save(tmp_path / "a/1.png")
    image = em.data.from_folder(tmp_path, ["a"], size=7).images[0]
    assert np.array_equal(image, np.broadcast_to(np.array([1, 2, 250])[:, None, None], (3, 7, 7)))


def test_an_image_that_is_listed_twice_is_one(tmp_path):
    """Two of it could be support and query of one task."""
    pixels = {name: picture(tmp_path / f"images/{name}.png", i) for i, name in enumerate("abc")}
    rows = "a.png,x\nb.png,y\na.png,x\nimages/a.png,x\nc.png,x\n"
    (tmp_path / "train.csv").write_text(f"filename,label\n{rows}")
    assert_holds(em.data.from_folder(tmp_path, "train"), pixels, x=["a", "c"], y=["b"])
    (tmp_path / "train.csv").write_text(f"filename,label\n{rows}images/b.png,x\n")
    refused("train.csv puts an image into two classes.*images/b.png of 'y'", tmp_path, "train")


def test_a_link_that_leads_back_is_refused(folder):
    root, pixels = folder
    (root / "cats").symlink_to(root / "cat")  # elsewhere: a class as others
    assert em.data.from_folder(root).class_names == ("cat", "cats", "dog", "fish/cod")
    (root / "cats").unlink()
    for target in (root, root / "fish", root.parent):
        (root / "fish" / "back").symlink_to(target)
        refused("leads back", root)
        (root / "fish" / "back").unlink()
    assert_holds(em.data.from_folder(root), pixels, **ALL)


@pytest.mark.parametrize(
    ("name", "text"), [("s.csv", "filename,label\ncat/a.png,cat\n"), ("s.txt", "cat\n")]
)
def test_encodings_of_split_files(folder, name, text):
    """Excel and Notepad put a mark in front of UTF-8."""
    (folder[0] / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert em.data.from_folder(folder[0], name).class_names == ("cat",)
    (folder[0] / name).write_bytes((text + "caf\xe9,caf\xe9\n").encode("latin-1"))
    refused(f"{name} cannot be read.*utf-8.*text in UTF-8", folder[0], name)


def refused(said, *args, error=ValueError, **kwargs):
    with pytest.raises(error, match=f"(?s){said}") as caught:
        em.data.from_folder(*args, **kwargs)
    assert "\nReceived: " in str(caught.value) and "\nExpected: " in str(caught.value)


def test_images_that_cannot_be_read_are_named(folder):
    root, _ = folder
    whole = (root / "dog/2.png").read_bytes()
    for content in (b"", b"text", whole[:60], whole[:23] + b"\7" + whole[24:]):
        (root / "dog/2.png").write_bytes(content)
        refused("dog/2.png cannot be read", root)
    picture(root / "dog/2.png", 0, "RGBA")
    refused("dog/2.png cannot be read.*mode RGBA", root)
    Image.fromarray(np.zeros((6, 6), np.uint16)).save(root / "dog/2.png")
    refused("dog/2.png cannot be read.*mode I", root, mode="L")


def test_folders_that_hold_nothing(folder, tmp_path):
    root, _ = folder
    (root / "cow").mkdir()
    refused("cow is empty", root)
    (root / "cow" / "labels.txt").write_text("")
    refused("cow is empty", root)
    refused("`split` names classes.*'cow'.*1 of 2", root, ["cow", "cat"])
    (tmp_path / "none").mkdir()
    refused("none is empty", tmp_path / "none")
    refused("`path` is not a folder", tmp_path / "nowhere", error=FileNotFoundError)
    picture(root / "stray.png", 3)
    refused("stray.png and 0 more", root)


def test_splits_that_are_wrong(folder):
    root, _ = folder
    refused("`split` was not found.*train.csv", root, "train", error=FileNotFoundError)
    refused("`split` was not found.*mine.txt", root, "mine.txt", error=FileNotFoundError)
    refused("`split` names classes.*'cow'", root, ["cow", "cat"])
    refused("0 of 0", root, [])
    refused("`split` does not name classes", root, [1, 2])
    for name, content, said in (
        ("a.json", "{}", "does not name classes|is not a split"),
        ("a.json", "[", "is not a split"),
        ("a.json", '"cat"', "a.json is not a split.*'cat'"),
        ("a.txt", "cat\ncow\n", r"a.txt names classes.*\['cow'\]"),
        ("a.csv", "file,class\n", "filename and label"),
        ("a.csv", "filename,label\n", "names no images"),
        ("a.csv", "filename,label\nx.png\n", "names no images"),
        ("a.csv", "filename,label\nx.png,cat\n", "image that is missing.*x.png"),
    ):
        (root / name).write_text(content)
        refused(said, root, name)
    refused("size", root, size=0)
    refused("mode", root, mode="grey")


@pytest.mark.parametrize("out", ["../cat", "{root}/cat", "cat/../../cat"])
@pytest.mark.parametrize("how", ["list", "a.txt", "a.json", "a.csv", "labels.csv"])
def test_what_a_split_names_is_below_the_folder(folder, how, out):
    root, _ = folder
    outside, inside = out.format(root=root), root / "fish"
    picture(inside / "cat" / "a.png", 0)
    content = {
        "list": "",
        "a.txt": f"cod\n{outside}\n",
        "a.json": json.dumps([outside]),
        "a.csv": f"filename,label\n{outside}/a.png,cat\n",
        "labels.csv": f"filename,label\ncod/x.png,cod\na.png,{outside}\n",
    }[how]
    (inside / how).write_text(content)
    refused("leads out of the folder.*/cat", inside, [outside] if how == "list" else how)


def test_one_name_for_two_splits_is_refused(folder, monkeypatch):
    root, pixels = folder
    (root / "train.csv").write_text("filename,label\ncat/a.png,cat\n")
    assert_holds(em.data.from_folder(root, "train"), pixels, cat=["cat/a"])
    picture(root / "train" / "dog" / "1.png", 2)
    refused("several things.*train.csv.*/train\n", root, "train")
    assert_holds(em.data.from_folder(root, root / "train.csv"), pixels, cat=["cat/a"])
    assert_holds(em.data.from_folder(root / "train"), {"dog/1": pixels["dog/1"]}, dog=["dog/1"])
    # One that happens to lie where the program runs.
    monkeypatch.chdir(root / "fish")
    (root / "fish" / "train.csv").write_text("filename,label\ndog/1.png,dog\n")
    refused("several things.*train.csv.*train.csv", root, "train.csv")
    monkeypatch.chdir(root)
    assert_holds(em.data.from_folder(root, "train.csv"), pixels, cat=["cat/a"])


IMAGES = np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3), np.uint8)


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (IMAGES, np.moveaxis(IMAGES, 3, 1)),
        (np.moveaxis(IMAGES, 3, 1), np.moveaxis(IMAGES, 3, 1)),
        (IMAGES[..., :1], np.moveaxis(IMAGES[..., :1], 3, 1)),
        (IMAGES[..., 0], IMAGES[:, None, :, :, 0]),
        (IMAGES[..., 0] / np.float32(7), IMAGES[:, None, :, :, 0] / np.float32(7)),
    ],
)
def test_npz_files(tmp_path, images, expected):
    np.savez(tmp_path / "data.npz", images=images, labels=[7, -2, 7, 30])
    for data in (
        em.data.from_npz(tmp_path / "data.npz"),
        em.data.from_folder(tmp_path / "data.npz"),
    ):
        assert data.images.dtype == images.dtype and np.array_equal(data.images, expected)
        assert data.class_names == ("-2", "7", "30") and list(data.labels) == [1, 0, 1, 2]
        assert data.labels.dtype == np.int32
    np.savez(tmp_path / "data.npz", images=images, labels=np.array(["b", "a", "b", "a"]))
    assert em.data.from_npz(tmp_path / "data.npz").class_names == ("a", "b")


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"images": IMAGES}, "lacks an array.*labels"),
        ({"images": IMAGES, "labels": [1, 2]}, "`labels`.*4 images"),
        ({"images": IMAGES, "labels": [0.5] * 4}, "`labels`.*float64"),
        ({"images": IMAGES[:, :, :, :2], "labels": [1] * 4}, "no axis of channels"),
        ({"images": IMAGES.astype(int), "labels": [1] * 4}, "`images`.*int64"),
        ({"images": IMAGES, "labels": np.array(["a", None] * 2, object)}, "cannot be read"),
    ],
)
def test_npz_files_that_are_wrong(tmp_path, arrays, said):
    np.savez(tmp_path / "data.npz", **arrays)
    refused(said, tmp_path / "data.npz")


def test_npz_files_of_other_floats(tmp_path):
    """As JAX takes them."""
    floats = IMAGES[..., 0] / 7
    for kind, native in ((">f4", np.float32), (">f8", np.float64), (np.longdouble, np.float64)):
        np.savez(tmp_path / "data.npz", images=floats.astype(kind), labels=[0, 0, 1, 1])
        images, labels = em.data.from_npz(tmp_path / "data.npz")
        assert images.dtype == native and images.dtype.isnative
        assert np.array_equal(images[:, 0], floats.astype(native))
        em.tasks.Episodes(floats.astype(kind), labels, ways=2, shots=1, queries=1)


def test_npz_members_that_are_no_arrays(tmp_path):
    path = tmp_path / "data.npz"
    header = "{'descr': '|u1', 'fortran_order': False, 'shape': (99999999999, 28, 28), }"
    forged = b"\x93NUMPY\x01\x00v\x00" + header.ljust(117).encode() + b"\n"
    for content in (b"text", forged):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("images.npy", content)
            archive.writestr("labels.npy", content)
        refused("cannot be read", path)
        with pytest.raises(ValueError, match=r"cannot be read.*\nReceived: "):
            em.data.omniglot(path)
    np.savez(path, images=IMAGES, labels=np.array([b"caf\xe9", b"b"] * 2))
    refused("`labels`.*caf.*UTF-8", path)


def test_npz_files_that_are_damaged(tmp_path):
    path = tmp_path / "data.npz"
    refused("`path` is not a file", path, error=FileNotFoundError)
    np.savez(path, images=IMAGES, labels=[1] * 4)
    whole = path.read_bytes()
    for content in (whole[:200], b"", b"text"):
        path.write_bytes(content)
        refused("cannot be read", path)
    path.write_bytes(whole)
    refused("is an .npz file", path, size=3)


@pytest.mark.parametrize("path", [5, None, {"a": "b"}])
def test_what_is_no_path_is_refused(path):
    refused(r"`from_folder\(path=...\)`", path, error=TypeError)


def test_without_the_extra(folder, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    refused(r"no PIL.*eqxmeta\[data\]", folder[0], error=ImportError)


@pytest.mark.parametrize(
    "error", [ImportError("libjpeg.so.8: cannot open"), ModuleNotFoundError("no x", name="x")]
)
def test_a_broken_package_is_no_missing_one(folder, monkeypatch, error):
    def broken(name):
        raise error

    monkeypatch.setattr("importlib.import_module", broken)
    with pytest.raises(type(error)) as caught:
        em.data.from_folder(folder[0])
    assert caught.value is error


def test_what_the_disk_says_is_left_as_it_is(folder):
    """It does not follow that the image has too many bits."""
    (folder[0] / "cat" / "c.png").symlink_to("moved.png")
    with pytest.raises(FileNotFoundError, match=r"c\.png"):
        em.data.from_folder(folder[0])


def test_a_data_set_is_a_pair(folder):
    data = em.data.from_folder(folder[0])
    images, labels = data
    assert images is data.images and labels is data.labels
    keep = labels < 2  # cod has one image alone
    tasks = em.tasks.Episodes(images[keep], labels[keep], ways=2, shots=1, queries=1)
    assert tasks.counts.tolist() == [2, 3]
