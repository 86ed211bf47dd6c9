"""From whatever holds images to pairs: all forms of data, streams, loaders of several processes, types of pixels."""

import datasets
import models
import numpy as np
import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler, TensorDataset

from plastic_peft import images as module
from plastic_peft import measure_plasticity
from plastic_peft.images import Stream, as_images, model_inputs
from plastic_peft.pairs import first_pair, most_pairs, pair_batches, repetition_notes
from plastic_peft.processors import find_processor


SIZE = {"height": 32, "width": 32}


def quick(model, target, source=None, **options):
    return measure_plasticity(model, target, source, **{"progress": False, "tolerance": 0, "batch_size": 4, **options})


@pytest.fixture
def processor():
    return transformers.ViTImageProcessor(size=SIZE)


@pytest.fixture
def pictures():
    """Twelve colour pictures of one size."""
    return [Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 36, 3)).astype("uint8")) for i in range(12)]


def numbered(count, start=0):
    """Images that carry their number in every pixel."""
    return torch.arange(start, start + count).float()[:, None, None, None].expand(-1, 3, 2, 2)


def pairs(target, source=None, *, max_pairs=10_000, batch_size=4, **options):
    """The numbers of the source and target images of all pairs, of one process."""
    found = []
    settings = {"processor": None, "seed": 0, "max_pairs": max_pairs, "batch_size": batch_size, **options}
    for batch in pair_batches(target, source, **settings):
        numbers = batch.inputs["pixel_values"][:, 0, 0, 0].int().tolist()
        half = len(numbers) // 2
        left, right = numbers[:half], numbers[half:]
        found += [pair for pair, weight in zip(zip(left, right, strict=True), batch.weights, strict=True) if weight]
    return found


# --- all forms of data -----------------------------------------------------------------------------------------------


def hugging_face(pictures):
    data = datasets.Dataset.from_dict({"label": [0] * len(pictures), "image": pictures})
    return data.cast_column("image", datasets.Image())


RAW = {
    "lists of images": lambda p: DataLoader(p, batch_size=4, collate_fn=list),
    "a column of images": lambda p: ({"label": [0, 1, 2], "image": p[i : i + 3]} for i in range(0, 12, 3)),
    "images and labels": lambda p: ((p[i : i + 3], [0, 1, 2]) for i in range(0, 12, 3)),
    "labels and images": lambda p: ((torch.arange(3), p[i : i + 3]) for i in range(0, 12, 3)),
    "lists of rows": lambda p: DataLoader([(x, 3) for x in p], batch_size=5, collate_fn=list),
    "rows": lambda p: ((5, x) for x in p),
    "batches of arrays": lambda p: iter([np.stack([np.asarray(x) for x in p])]),
    "arrays": lambda p: (np.asarray(x) for x in p),
    "one array": lambda p: np.stack([np.asarray(x) for x in p]),
    "bytes in a tensor": lambda p: torch.from_numpy(np.stack([np.asarray(x) for x in p])).permute(0, 3, 1, 2),
    "one batch": lambda p: {"image": p, "label": list(range(12))},
    "a list of batches": lambda p: [p[:5], p[5:]],
    "torch format": lambda p: hugging_face(p).with_format("torch"),
    "numpy format": lambda p: hugging_face(p).with_format("numpy"),
    "a streamed data set": lambda p: hugging_face(p).to_iterable_dataset(),
    "batches of a data set": lambda p: hugging_face(p).iter(5),
}


@pytest.mark.parametrize("form", RAW)
def test_raw_images_come_in_every_form(tiny_vit, pictures, processor, form):
    """Without it images of a batch beyond the first would be lost, or labels and arrays be taken for pixels."""
    wanted = quick(tiny_vit, pictures, image_processor=processor)
    assert wanted.pairs == 6
    assert quick(tiny_vit, RAW[form](pictures), image_processor=processor).rows == wanted.rows


READY = {
    "a column of tensors": lambda x: DataLoader([{"image": image, "label": 1} for image in x], batch_size=5),
    "labels beside pixels": lambda x: (
        {"labels_onehot": torch.eye(2)[:1], "pixel_values": part} for part in x.split(1)
    ),
    "a mask beside pixels": lambda x: (
        {"mask": torch.ones(3, 4, 4), "pixel_values": part, "labels": torch.zeros(3, 9, 9)} for part in x.split(3)
    ),
    "labels and pixels": lambda x: DataLoader(TensorDataset(torch.arange(12), x), batch_size=5),
    "arrays": lambda x: iter(x.numpy()),
    "double arrays": lambda x: x.double().numpy(),
    "lists of tensors": lambda x: DataLoader(list(x), batch_size=5, collate_fn=list),
    "a column of lists": lambda x: ({"pixel_values": part.tolist()} for part in x.split(4)),
    "one batch": lambda x: transformers.BatchFeature({"pixel_values": x, "labels": torch.arange(12)}),
    "a loader's batch": lambda x: next(iter(DataLoader(TensorDataset(x, torch.arange(12)), batch_size=12))),
}


@pytest.mark.parametrize("form", READY)
def test_ready_pixels_come_in_every_form(tiny_vit, images, form):
    """Without it a batch could be counted by its labels, or pixels be looked for in the wrong place."""
    pixels = images[1][:12]
    wanted = quick(tiny_vit, pixels)
    found = quick(tiny_vit, READY[form](pixels))
    for row, other in zip(wanted.rows, found.rows, strict=True):
        assert (row.name, row.pairs) == (other.name, other.pairs) and other.mean == pytest.approx(row.mean, rel=1e-5)


def test_grey_images_of_a_numpy_data_set_are_images(tiny_vit, pictures, processor):
    """Without it a data set of grey images would have 'no image column' as soon as it is formatted."""
    grey = [picture.convert("L") for picture in pictures]
    wanted = quick(tiny_vit, grey, image_processor=processor)
    for kind in ("numpy", "torch"):
        data = hugging_face(grey).with_format(kind)
        assert quick(tiny_vit, data, image_processor=processor).rows == wanted.rows


class Endless(IterableDataset):
    """A stream that states a length, as some do."""

    def __iter__(self):
        return iter(numbered(30))

    def __len__(self):
        return 30


def test_a_stream_that_states_a_length_is_read_in_order():
    """Without it such a data set would be asked for images by index, which it does not have."""
    assert sorted(number for pair in pairs(Endless()) for number in pair) == list(range(30))


def stacked(dtype):
    return torch.randint(0, 255, (8, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda: stacked(torch.uint8), r"raw images.*image_processor.*scaled and normalised"),
        (lambda: {"pixel_values": stacked(torch.uint8)}, r"pixel values of torch.uint8: scale and normalise"),
        (lambda: stacked(torch.int64), r"pixel values of torch.int64: scale and normalise"),
        (lambda: iter([stacked(torch.int64)]), r"pixel values of torch.int64: scale and normalise"),
        (lambda: [stacked(torch.uint8)[0].reshape(32, 3, 32)] * 2, r"shape \(32, 3, 32\).*must be 1, 3 or 4 channels"),
        (lambda: iter([{"image": ["a.png", "b.png"]}]), r"the columns 'image', of which none holds images"),
        (lambda: iter([None, None]), "yields NoneType objects"),
        (lambda: iter([{"pixel_values": None}]), "the columns 'pixel_values', of which none holds images"),
        (lambda: datasets.DatasetDict(train=datasets.Dataset.from_dict({"a": [1]})), r"keys 'train'.*one split"),
    ],
)
def test_what_holds_no_pixels_is_named_with_the_remedy(tiny_vit, data, message):
    """Without it integers would run through the model as pixels, or the error speak of something else."""
    with pytest.raises((ValueError, TypeError), match=message):
        quick(tiny_vit, data())


# --- processors ------------------------------------------------------------------------------------------------------


def test_raw_images_are_seen_as_training_sees_them(processor):
    """Without it deep or transparent images would be measured white or black, and trained on as they are."""
    deep = Image.fromarray(np.full((32, 32), 30_000, dtype=np.uint16))
    seen, _, _ = first_pair([deep, deep], None, processor)
    grey = Image.new("RGB", (32, 32), (round(30_000 * 255 / 65_535),) * 3)
    assert torch.equal(seen["pixel_values"][0], processor(grey, return_tensors="pt")["pixel_values"][0])


def test_the_processor_is_looked_up_at_the_first_raw_image(tiny_vit, pictures, processor, tmp_path, monkeypatch):
    """Without it measuring ready tensors would ask the Hub for a processor that nobody needs."""
    tiny_vit.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model = type(tiny_vit).from_pretrained(tmp_path)
    asked = []
    find = transformers.AutoImageProcessor.from_pretrained
    monkeypatch.setattr(
        transformers.AutoImageProcessor, "from_pretrained", lambda name: (asked.append(name), find(name))[1]
    )
    quick(model, torch.randn(8, 3, 32, 32))
    assert not asked
    assert quick(model, pictures).rows == quick(model, pictures, image_processor=processor).rows
    assert asked == [str(tmp_path)]


def test_raw_images_get_the_channels_of_the_model(pictures):
    """Without it a model of grey images could not be measured on image files."""
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**models.SMALL, num_channels=1)).eval()
    grey = transformers.ViTImageProcessor(size=SIZE, image_mean=[0.5], image_std=[0.5])
    report = quick(model, pictures, image_processor=find_processor(model, grey))
    assert report.pairs == 6
    example, *_ = first_pair(pictures, None, find_processor(model, grey))
    assert example["pixel_values"].shape == (2, 1, 32, 32)
    by_hand = grey(images=[np.asarray(pictures[0].convert("L"))[..., None]], return_tensors="pt")["pixel_values"]
    assert torch.equal(example["pixel_values"][:1], by_hand)


# --- types of pixels -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [lambda: models.transformers_model("swin"), lambda: models.hand_written("pre_norm")])
def test_pixels_take_the_floating_type_of_the_model(model, images):
    """Without it a bfloat16 model that does not cast its input could not be measured on ordinary images."""
    model = model().bfloat16()
    pixels = images[1][:8]
    wanted = quick(model, pixels.bfloat16())
    for dtype in (torch.float32, torch.float64, torch.float16):
        found = quick(model, pixels.to(dtype))
        assert [row.mean for row in found.rows] == pytest.approx([row.mean for row in wanted.rows], rel=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert quick(model.float(), pixels.bfloat16()).pairs == 4


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_weights_are_no_type_for_pixels(bits):
    """Without it the pixels of a quantised model would become integers."""
    inputs = model_inputs(models.quantised_vit_nano(bits), {"pixel_values": torch.randn(2, 3, 32, 32)})
    assert inputs["pixel_values"].is_floating_point()
    floats_of_eight_bits = torch.nn.Sequential(torch.nn.Linear(2, 2).to(torch.float8_e4m3fn), torch.nn.Linear(2, 2))
    assert model_inputs(floats_of_eight_bits, {"pixel_values": torch.ones(1, dtype=torch.float64)})[0].dtype == (
        torch.float32
    )


# --- streams ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_buffer(monkeypatch):
    monkeypatch.setattr(module, "BUFFER_IMAGES", 9)
    return 10


def test_a_short_stream_is_a_set_like_any_other():
    """Without it a loader's order and length would change the pairs of the same few images."""
    target, source = numbered(20), numbered(7, 100)
    wanted = pairs(target, source)
    assert pairs(iter(target), source) == pairs(iter(target), iter(source)) == pairs(target, iter(source)) == wanted
    assert pairs(iter(target)) == pairs(target)
    _, *opened = first_pair(iter(target), None, None)
    assert most_pairs(*opened, 100) == 10


@pytest.mark.parametrize("streamed", ["target", "source"])
def test_a_set_beside_a_long_stream_is_drawn_at_random_again_and_again(small_buffer, streamed):
    """Without it the set would be read as it is stored, maybe by class, and end the measurement when it ends."""
    stream, stored = numbered(30), numbered(6, 100)

    def drawn(seed=0):
        if streamed == "target":
            return pairs(iter(stream), stored, seed=seed)
        return [pair[::-1] for pair in pairs(stored, iter(stream), seed=seed)]

    left, right = zip(*drawn(), strict=True)
    assert sorted(right) == list(range(30))
    assert all(sorted(left[i : i + 6]) == list(range(100, 106)) for i in range(0, 30, 6))
    assert left[:6] != tuple(range(100, 106)) and left[:6] != left[6:12]
    assert drawn() == drawn() != drawn(seed=1)


def test_a_long_stream_is_shuffled_as_far_as_its_buffer_reaches(small_buffer):
    """Without it a stream that is sorted by class would be measured class after class."""
    order = [number for pair in pairs(iter(numbered(60))) for number in pair]
    assert sorted(order) == list(range(60))
    assert all(number <= place + small_buffer for place, number in enumerate(order))
    ahead = [number - place for place, number in enumerate(order)]
    assert max(ahead) > small_buffer // 2 and min(ahead) < -small_buffer // 2


def test_two_long_streams_keep_their_pairs(small_buffer):
    """Without it images that belong together would be torn apart, or the longer stream's rest be paired at all."""
    found = pairs(iter(numbered(35)), iter(numbered(40, 100)))
    assert sorted(found) == [(100 + i, i) for i in range(35)] != found


def test_a_buffer_keeps_no_batch_in_memory():
    """Without it each buffered image would hold on to the batch that it came in."""
    stream = as_images(iter(numbered(32).contiguous().split(8)), None, "target")
    assert isinstance(stream, Stream) and stream.ends_in_buffer()
    assert all(row.untyped_storage().nbytes() == row.nbytes for row in stream.buffer)


def test_a_buffer_of_large_images_is_short(monkeypatch):
    """Without it a thousand photographs in full resolution would be kept in memory."""
    monkeypatch.setattr(module, "BUFFER_BYTES", 10 * 2 * 2 * 3)
    stream = as_images((Image.new("RGB", (2, 2)) for _ in range(100)), None, "target")
    assert not stream.ends_in_buffer() and len(stream.buffer) == 11


def test_a_repeating_set_gets_a_note(tiny_vit):
    """Without it intervals that count one image as many would be believed."""
    _, target, source = first_pair(numbered(48), numbered(7), None)
    (note,) = repetition_notes(target, source, 48)
    assert note.startswith("source has 7 images for 48 pairs, so each is in about 7 of them; the intervals")
    assert not repetition_notes(target, source, 13)
    assert not repetition_notes(target, None, 24)
    _, target, source = first_pair(iter(numbered(1200)), numbered(7), None)
    assert len(repetition_notes(target, source, 1200)) == 1


# --- several processes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["stored", "short stream", "long stream"])
def test_a_process_decodes_its_share_only(form, request):
    """Without it every process would decode all images, and more processes would not be faster."""
    if form == "long stream":
        request.getfixturevalue("small_buffer")
    decoded = []

    def decode(images, return_tensors):
        decoded.append(images[0].getpixel((0, 0))[0])
        return {"pixel_values": torch.full((1, 3, 2, 2), float(decoded[-1]))}

    def run(rank, world):
        decoded.clear()
        data = [Image.new("RGB", (2, 2), (i, 0, 0)) for i in range(48)]
        found = pairs(data if form == "stored" else iter(data), processor=decode, rank=rank, world=world, batch_size=8)
        return found, len(decoded)

    alone, count = run(0, 1)
    assert count == 48
    shares = [run(rank, 2) for rank in range(2)]
    assert sorted(shares[0][0] + shares[1][0]) == sorted(alone)
    assert [count for _, count in shares] == [24, 24]


@pytest.mark.parametrize("dispatch", [False, True])
def test_a_prepared_loader_is_its_data_set(dispatch):
    """Without it loaders would change the pairs as soon as `accelerator.prepare` has seen them."""
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=dispatch))
    target, source = numbered(20), numbered(20, 100)
    wanted = pairs(target, source)

    def doubled(rows):
        return {"pixel_values": torch.stack([row / 2 for row in rows]), "labels": torch.zeros(len(rows))}

    prepared = accelerator.prepare(DataLoader(2 * target, batch_size=3, shuffle=True, collate_fn=doubled))
    assert pairs(prepared, source) == wanted
    streamed = accelerator.prepare(DataLoader(Endless(), batch_size=3))
    assert pairs(streamed, source) == pairs(numbered(30), source)
    some = accelerator.prepare(DataLoader(target, batch_size=3, sampler=SubsetRandomSampler([3, 8, 5, 13])))
    assert sorted(number for pair in pairs(some) for number in pair) == [3, 5, 8, 13]
